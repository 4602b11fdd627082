"""Other toolkits. They are optional, and run here in the native lane."""

import importlib.util
import math

import pytest
import torch
from conftest import LANE, TEXTS, logits_of

from ipex_sq import benchmark_config
from ipex_sq.benchmark_config import parse_peers
from ipex_sq.benchmarking import peers
from ipex_sq.benchmarking import run as benchmarking
from ipex_sq.benchmarking.contenders import peer_contenders, prepare
from ipex_sq.benchmarking.peer_model import PeerModel
from ipex_sq.benchmarking.peers import PEERS, Peer, build_peer
from ipex_sq.benchmarking.subjects import Subject
from ipex_sq.cli import benchmark
from ipex_sq.cli.running import run
from ipex_sq.data.documents import split_last_word
from ipex_sq.errors import ConfigError, UnsupportedModelError
from ipex_sq.evaluation.lambada import evaluate_lambada
from ipex_sq.evaluation.sqnr import sqnr_db
from ipex_sq.models.running import run_model
from ipex_sq.models.tiny import tiny_model

LEAST_DB = {"openvino": 15, "onnxruntime": 25, "ctranslate2": 28, "pt2e": 15}
"""Measured: 18.7, 26.8, 32.5 and 18.4 dB; NNCF's alpha of 0.95 suits no model without outliers.
What went wrong on the way lies below: outputs rounded too (24.1), the embedding smoothed with the
head (8.2)."""


with_peers = pytest.mark.skipif(
    LANE == "ipex", reason="requirements-peers.txt goes into the native lane: make test-native"
)


@pytest.fixture(scope="module", params=PEERS)
def built(request, batches):
    """A peer's name and what it made of the tiny Llama; one calibration batch has a single row."""
    single = {key: value[:1] for key, value in batches[0].items()}
    with torch._inductor.config.patch(freezing=False):  # pt2e sets it
        model = tiny_model("llama", outliers=False)
        yield request.param, build_peer(request.param, model, [single, *batches])


@with_peers
def test_logits_are_near_those_of_the_float_model(built, unseen):
    name, model = built
    padded = {key: value.clone() for key, value in unseen.items()}
    padded["attention_mask"][1, 10:] = 0
    single = {key: value[:1, :7] for key, value in unseen.items()}
    for batch in (unseen, padded, single):
        kept = batch["attention_mask"].bool()
        wanted = logits_of(tiny_model("llama", outliers=False), batch)
        with torch.inference_mode():
            assert sqnr_db(run_model(model, batch)[kept], wanted[kept]) > LEAST_DB[name]


@with_peers
def test_lambada_scores_it_as_any_other_model(built, tokenizer):
    documents = [split_last_word(text, "text") for text in TEXTS]
    wanted = evaluate_lambada(tiny_model("llama", outliers=False), tokenizer, documents)
    found = evaluate_lambada(built[1], tokenizer, documents)
    # At 15 dB an error of a fifth of the logits' spread, about 1 here, in a mean of 6 documents.
    assert math.log(found.perplexity / wanted.perplexity) == pytest.approx(0, abs=0.2)


@with_peers
@pytest.mark.parametrize(
    ("family", "reason"),
    [("bert", "no classification head"), ("gemma2", "computes something else")],
)
def test_ctranslate2_says_what_it_cannot_take(family, reason, batches):
    with pytest.raises(UnsupportedModelError, match=reason):
        build_peer("ctranslate2", tiny_model(family), batches)


def test_inputs_go_in_by_name_and_missing_ones_are_filled():
    def sums(*tensors):
        return torch.tensor([[float(tensor.sum()) for tensor in tensors]])

    model = PeerModel(sums, ("input_ids", "attention_mask", "token_type_ids"), None)
    ids = torch.tensor([[5, 6, 7]])
    assert run_model(model, {"input_ids": ids}).tolist() == [[18.0, 3.0, 0.0]]
    mask, types = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 1]])
    batch = {"token_type_ids": types, "attention_mask": mask, "input_ids": ids}
    assert run_model(model, batch).tolist() == [[18.0, 2.0, 2.0]]


def test_names_are_those_of_the_registry():
    assert tuple(PEERS) == benchmark_config.PEERS
    assert parse_peers("pt2e, openvino,pt2e") == ("pt2e", "openvino")
    with pytest.raises(ConfigError, match="did you mean 'ctranslate2'"):
        parse_peers("openvino,ctranslate")


def test_an_unknown_peer_is_refused_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr("ipex_sq.benchmarking.run.run_benchmark", lambda *_a: pytest.fail("timed"))
    flags = ["--random_weights", "bert-base", "--peers", "openvino,onxruntime"]
    assert run(benchmark.command, flags) == 2
    assert "did you mean 'onnxruntime'" in capsys.readouterr().err


class _HereWorker:
    """Makes its object in this process."""

    def __init__(self, _name, factory, _cores, *, bind):
        del bind
        self.ready = factory

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass


@pytest.mark.parametrize("name", PEERS)
def test_the_row_of_a_missing_peer_says_how_to_install_it(name, monkeypatch):
    last = PEERS[name].packages[-1]
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package: None if package == last else found(package)
    )
    monkeypatch.setattr(Subject, "load", lambda _self: pytest.fail("loaded"))
    monkeypatch.setattr(benchmarking, "Worker", _HereWorker)
    monkeypatch.setattr(benchmarking, "Session", lambda what, subject, _: prepare(what, subject))
    (contender,) = peer_contenders([name])
    with benchmarking.ExitStack() as stack:
        setting = (Subject("embedded"), benchmark_config.BenchmarkConfig(), [(0,)])
        entry = benchmarking._start(contender, setting, stack)
    assert f"{last} not installed: pip install -r requirements-peers.txt" in entry.reason


def test_any_failure_of_a_peer_becomes_one_line(monkeypatch, batches):
    def fails(_model, _batches):
        raise KeyError("rope_theta\nand more")

    monkeypatch.setitem(peers.PEERS, "openvino", Peer("int8+sq", (), fails))
    with pytest.raises(UnsupportedModelError) as caught:
        build_peer("openvino", tiny_model("llama"), batches)
    assert "openvino fails on this model: KeyError" in str(caught.value)
    assert "\n" not in str(caught.value)
