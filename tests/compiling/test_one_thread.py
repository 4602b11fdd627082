"""Threads that share a model: one compiles while others go on as if nothing had happened."""

import copy
import threading

import pytest
import torch

from ipex_sq import QuantConfig, quantize
from ipex_sq.compiling import compiled_layers, inductor, step_graph, stepping
from ipex_sq.compiling.one_thread import one_at_a_time
from ipex_sq.compiling.step_graph import _without_number
from ipex_sq.models.layers import find_layers
from ipex_sq.models.tiny import tiny_model

GENERATION = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}

PATIENCE = 120
"""Seconds, for what takes one or two: threads that wait for each other wait forever."""


@pytest.fixture
def traced(monkeypatch):
    """Layers are traced as ever, but the compiler makes nobody wait."""

    def compiled(function):
        return torch.compile(function, dynamic=True, backend="eager")

    monkeypatch.setattr(inductor, "inductor", lambda graph, inputs: graph)
    monkeypatch.setattr(compiled_layers, "_compile", compiled)
    torch._dynamo.reset()


def _prompt(texts, tokens=9):
    return torch.stack([torch.arange(3 + n, 3 + n + tokens) for n in range(texts)])


def _generate(model, texts):
    prompt = _prompt(texts)
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **GENERATION)


def _logits(model):
    with torch.no_grad():
        return model(_prompt(2), use_cache=False).logits


def _start(function):
    """A thread that runs `function`, and the list that gets what it returns."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    return thread, results


def _end(started):
    """What the thread's function has returned; fails where it raised or does not end."""
    thread, results = started
    thread.join(PATIENCE)
    assert results, "the other thread failed or waits forever"
    return results[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_others_run_the_model_while_a_step_is_traced(dtype, batches, traced, monkeypatch):
    model = quantize(tiny_model("llama"), batches, QuantConfig(backend="native", dtype=dtype))
    wanted, logits = _generate(model, 1), _logits(model)
    forward, found, plain = step_graph._Step.forward, [], []

    def interrupted(self, tensors):
        assert torch.compiler.is_exporting()
        if not found:
            found.append(_end(_start(lambda: _generate(model, 1))))
            plain.append(_start(lambda: _logits(model)))  # may wait for a compiler of its own
        return forward(self, tensors)

    monkeypatch.setattr(step_graph._Step, "forward", interrupted)
    again = _generate(model, 2)
    torch.testing.assert_close(_end(plain[0]), logits, rtol=5e-2, atol=5e-2)
    assert torch.equal(found[0], wanted)
    assert torch.equal(again, _generate(model, 2))
    assert torch.equal(_generate(model, 1), wanted)
    assert not find_layers(model)[0].forward._graphs._failed


def test_threads_that_need_one_graph_compile_it_once(traced, monkeypatch):
    texts = []
    original = stepping.compile_step

    def counted(layer, forward, call):
        texts.append(call.texts)
        return original(layer, forward, call)

    monkeypatch.setattr(stepping, "compile_step", counted)
    model = compiled_layers.compile_layers(tiny_model("llama"))
    started = [(n, _start(lambda n=n: _generate(model, n))) for n in (1, 1, 2, 3)]
    for n, thread in started:
        assert torch.equal(_end(thread), _generate(tiny_model("llama"), n))
    assert len(texts) == 2  # one text, several texts


def test_first_plain_calls_of_several_threads_say_the_same(traced):
    model = compiled_layers.compile_layers(tiny_model("llama"))
    wanted = _logits(tiny_model("llama"))
    for thread in [_start(lambda: _logits(model)) for _ in range(3)]:
        torch.testing.assert_close(_end(thread), wanted)


def test_other_threads_compile_as_many_kinds_of_layers(traced):
    model = compiled_layers.compile_layers(tiny_model("llama"))

    def limit():
        _logits(model)
        return torch._dynamo.config.recompile_limit

    assert _end(_start(limit)) >= compiled_layers.KINDS


def test_running_layers_wait_for_no_compiler(traced):
    model = compiled_layers.compile_layers(tiny_model("llama"))
    wanted = _generate(model, 1)
    with one_at_a_time():
        assert torch.equal(_end(_start(lambda: _generate(model, 1))), wanted)


def test_what_is_traced_shares_tensors_but_no_dictionary():
    layer = find_layers(tiny_model("llama"))[0]
    before = [copy.copy(vars(module)) for module in layer.modules()]
    twin = _without_number(layer)
    for module, own in zip(layer.modules(), twin.modules(), strict=True):
        assert module._parameters is not own._parameters
        assert module._buffers is not own._buffers
        assert all(own._parameters[name] is module._parameters[name] for name in own._parameters)
    twin.mlp.up_proj.weight = None
    twin.self_attn.layer_idx = twin.mlp.extra = 7
    assert [vars(module) for module in layer.modules()] == before
    assert layer.mlp.up_proj.weight is not None
