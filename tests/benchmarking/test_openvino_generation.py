"""OpenVINO's key-value cache. The float graph, in fp32, says whether positions and state are right;
the int8 one runs as it is timed."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from conftest import LANE, logits_of

from ipex_sq.benchmark_config import DECODE, BenchmarkConfig
from ipex_sq.benchmarking import openvino_generation
from ipex_sq.benchmarking.contenders import peer_contenders
from ipex_sq.benchmarking.openvino_generation import OpenVinoGenerator, openvino_int8_to_generate
from ipex_sq.benchmarking.peers import PEERS, build_peer
from ipex_sq.benchmarking.session import Session
from ipex_sq.benchmarking.subjects import Subject
from ipex_sq.errors import UnsupportedModelError
from ipex_sq.evaluation.sqnr import sqnr_db
from ipex_sq.models.decoding import empty_past
from ipex_sq.models.generating import check_generates, timed_generation
from ipex_sq.models.tiny import LAYERS, VOCABULARY, tiny_model

NEW = 12
LEAST_DB = 15
"""As for the graph without a cache in test_peers.py. Measured: 18.8 dB, and 32.0 dB to its own
logits of the whole text; the cache is u8."""

with_openvino = pytest.mark.skipif(
    LANE == "ipex", reason="requirements-peers.txt goes into the native lane: make test-native"
)


@pytest.fixture(scope="module")
def generator(batches):
    single = {key: value[:1] for key, value in batches[0].items()}
    model = tiny_model("llama", outliers=False)
    return build_peer("openvino", model, [single, *batches], generates=True)


def _in_fp32(graph):
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    return openvino.compile_model(graph, "CPU", exact).create_infer_request()


def _generated(model, ids):
    """New tokens `[rows, NEW]`, and the logits that each was chosen by."""
    seen = []

    def keep(_text, logits):
        seen.append(logits.clone())
        return torch.zeros(len(logits), dtype=torch.bool)

    text = model.generate(ids, max_new_tokens=NEW, stopping_criteria=[keep])
    assert torch.equal(text[:, : ids.shape[1]], ids)
    return text[:, ids.shape[1] :], torch.stack(seen, dim=1)


@with_openvino
@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gpt2"])
def test_every_step_has_the_logits_of_the_whole_text(family, batches, unseen, monkeypatch):
    """Rotary and learned positions and ALiBi, and lengths and numbers of rows never traced."""
    monkeypatch.setattr(openvino_generation, "quantized_graph", lambda graph, _rows, **_: graph)
    monkeypatch.setattr(openvino_generation, "infer_request", _in_fp32)
    model = tiny_model(family, outliers=False)
    generator = openvino_int8_to_generate(model, batches)
    for ids in (unseen["input_ids"][:3, :9], unseen["input_ids"][:1]):  # state of other sizes
        tokens, logits = _generated(generator, ids)
        text = torch.cat((ids, tokens), dim=1)
        wanted = logits_of(model, {"input_ids": text, "attention_mask": torch.ones_like(text)})
        torch.testing.assert_close(generator(text)[0], wanted, rtol=1e-4, atol=1e-4)
        steps = wanted[:, ids.shape[1] - 1 : -1]
        torch.testing.assert_close(logits, steps, rtol=1e-4, atol=1e-4)
        assert torch.equal(tokens, steps.argmax(-1))


@with_openvino
def test_int8_steps_are_near_the_float_model(generator, unseen):
    ids = unseen["input_ids"]
    tokens, logits = _generated(generator, ids)
    text = torch.cat((ids, tokens), dim=1)
    batch = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    steps = slice(ids.shape[1] - 1, -1)
    assert tokens.shape == (len(ids), NEW)
    wanted = logits_of(tiny_model("llama", outliers=False), batch)
    assert sqnr_db(logits, wanted[:, steps]) > LEAST_DB
    assert sqnr_db(logits, generator(text)[0][:, steps]) > LEAST_DB


@with_openvino
def test_a_text_does_not_see_the_one_before(generator, unseen):
    ids = unseen["input_ids"][:2]
    first, _ = _generated(generator, ids)
    _generated(generator, ids[:1, :5])
    again, _ = _generated(generator, ids)
    assert torch.equal(first, again)


@with_openvino
def test_every_new_token_is_clocked(generator, unseen):
    check_generates(generator)
    times = timed_generation(generator, unseen["input_ids"], 5)
    assert len(times) == 5
    assert times == sorted(times)


@with_openvino
def test_attention_is_fused_with_the_cache(generator):
    """Else the peer is timed off its fast path: a token takes twice the time."""
    graph = generator.request.get_compiled_model().get_runtime_model()
    inputs = [
        [_kind(port.get_node()) for port in node.input_values()]
        for node in graph.get_ops()
        if _kind(node) == "ScaledDotProductAttention"
    ]
    assert [kinds.count("MemoryInput") for kinds in inputs] == [2] * LAYERS  # keys and values
    assert [_kind(node) for node in graph.get_ops()].count("RoPE") == 2 * LAYERS


def _kind(node):
    return node.get_rt_info()["layerType"].astype(str)


class _Request:
    """Takes the next token for the likeliest."""

    def reset_state(self):
        pass

    def infer(self, inputs, **_options):
        ids, picks = inputs[0].reshape(-1), inputs[3]
        return [torch.nn.functional.one_hot(torch.tensor(ids[picks] + 1)[None], VOCABULARY).numpy()]


def test_the_criteria_stop_it():
    def at_eight(text, _logits):
        return text[:, -1] >= 8

    model = OpenVinoGenerator(_Request(), window=None)
    ids = torch.tensor([[4, 5], [1, 3]])
    text = model.generate(ids, max_new_tokens=9, stopping_criteria=[at_eight])
    assert text.tolist() == [[4, 5, 6, 7, 8, 9, 10], [1, 3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("mask", "window", "reason"), [([1, 0], None, "without padding"), ([1, 1], 10, "outgrow 10")]
)
def test_what_the_graph_cannot_do_is_refused(mask, window, reason):
    model = OpenVinoGenerator(_Request(), window)
    with pytest.raises(UnsupportedModelError, match=reason):
        model.generate(torch.tensor([[4, 5]]), torch.tensor([mask]), max_new_tokens=9)


def test_a_cache_that_cannot_become_state_is_refused():
    """Older models of transformers 4 hand out tuples: a graph without a cache would forget."""

    class Tuples(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            keys = torch.zeros(len(input_ids), 2, 1, 4)
            return SimpleNamespace(past_key_values=((keys, keys),))

    with pytest.raises(UnsupportedModelError, match="not one that grows"):
        empty_past(Tuples(), 1)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "openvino"])
def test_a_peer_without_a_cache_is_refused_before_the_work(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _package: object())
    monkeypatch.setattr(Subject, "load", lambda _self: pytest.fail("loaded"))
    (contender,) = peer_contenders([name])
    with pytest.raises(UnsupportedModelError, match=f"{name} does not generate"):
        Session(contender, Subject("embedded"), BenchmarkConfig(workload=DECODE))
