"""Layers stay compiled, however many kinds of them a process has met."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ipex_sq import QuantConfig, quantize
from ipex_sq.backends import native
from ipex_sq.compiling import compiled_layers
from ipex_sq.compiling.compiled_layers import compile_layers
from ipex_sq.kernels import attention
from ipex_sq.kernels.brgemm import MOST_ROWS
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.models.layers import find_layers
from ipex_sq.models.running import run_model
from ipex_sq.models.tiny import tiny_model
from ipex_sq.system import has_bf16_instructions, int8_isa

KINDS = 12
"""More than torch.compile's own limit per function, 8, after which it silently stops compiling."""


class Layer(nn.Module):
    """Adds 1 where it is compiled and takes away 1 where it is not."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return (x + 1 if torch.compiler.is_compiling() else x - 1) * (self.kind + 1)


def test_the_ninth_kind_of_layer_is_compiled_as_the_first():
    torch._dynamo.reset()
    x = torch.ones(3, 4)
    for kind in range(KINDS):
        model = nn.Sequential(nn.ModuleList([Layer(kind)]))
        compile_layers(model)
        with torch.inference_mode():
            assert bool((model[0][0](x) == 2 * (kind + 1)).all())


GENERATION = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}


def _generate(model, prompt, **options):
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, **GENERATION, **options)


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}]
)
def test_other_ways_to_generate_say_the_same(options):
    prompt = torch.stack([torch.arange(3, 12), torch.arange(13, 22)])
    wanted = _generate(tiny_model("llama"), prompt, **options)
    assert torch.equal(_generate(compile_layers(tiny_model("llama")), prompt, **options), wanted)


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {"use_cache": False}), ("llama", {}), ("bert", {})]
)
def test_compiling_the_whole_model_leaves_its_layers_as_they_are(batches, family, options):
    torch._dynamo.reset()
    model = quantize(tiny_model(family), batches, QuantConfig(backend="native"))
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        own = model(tokens, **options).logits
        # Nothing of the compiler but what it traces: the same operations around the layers.
        whole = torch.compile(model, backend="eager")(tokens, **options).logits
    assert torch.equal(whole, own)


def test_generated_tokens_run_the_kernel_of_few_rows(batches, monkeypatch):
    monkeypatch.setattr(native, "rows_everywhere", lambda: False)  # as with AMX
    called = []
    kept = Int8Linear.keep_rows
    monkeypatch.setattr(Int8Linear, "keep_rows", lambda self: (called.append(self), kept(self))[1])
    model = quantize(tiny_model("llama"), batches, QuantConfig(backend="native"))
    called.clear()  # of the head, whose input is rounded per token
    run_model(model, batches[0])
    _generate(model, torch.arange(3, 12)[None].repeat(MOST_ROWS + 1, 1))
    assert not called, "more rows go through oneDNN"
    _generate(model, torch.arange(3, 12)[None].repeat(2, 1))
    linears = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert set(map(id, called)) == set(map(id, linears)) - {id(model.lm_head)}
    assert all(linear.row_weight is not None for linear in linears)


@pytest.mark.skipif(int8_isa() != "AVX512-VNNI", reason="another layout is kept on this CPU")
def test_prompts_and_steps_share_one_layout_of_the_weights(batches):
    model = quantize(tiny_model("llama"), batches, QuantConfig(backend="native"))
    _generate(model, torch.arange(3, 12)[None].repeat(2, 1))
    linears = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert linears
    assert all(item.packed is None and item.row_weight is not None for item in linears)


@pytest.mark.skipif(not has_bf16_instructions(), reason="the CPU has neither AVX512-BF16 nor AMX")
def test_prompts_of_generation_have_our_attention(monkeypatch):
    """They are not compiled, so nothing but PyTorch's dispatcher can give it to them."""
    prompt = torch.arange(3, 43)[None]
    model = compile_layers(tiny_model("llama").bfloat16())
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as ours:
        model(prompt, use_cache=True)
    monkeypatch.setattr(attention, "has_kernel", lambda: False)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as pytorchs:
        model(prompt, use_cache=True)
    switches = [
        sum("replace_attention" in event.key for event in run.key_averages())
        for run in (ours, pytorchs)
    ]
    assert switches == [1, 0]


@pytest.fixture
def called(monkeypatch, batches):
    """A classifier of two layers and the logits of its first, compiled call."""

    def traced(function):
        return torch.compile(function, dynamic=True, backend="eager")

    torch._dynamo.reset()
    monkeypatch.setattr(compiled_layers, "_compile", traced)
    model = quantize(tiny_model("bert"), batches, QuantConfig(backend="native", dtype="fp32"))
    return model, _logits(model)


def _logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 21).reshape(2, 9)).logits


def _double(*_):
    return _[-1] * 2


def test_hooks_inside_of_layers_are_called_whenever_they_come(called):
    model, wanted = called
    module, seen = find_layers(model)[0].intermediate, []
    with module.register_forward_hook(lambda *_: seen.append(1)):
        _logits(model)
    assert seen == [1]
    with module.register_forward_hook(_double):
        changed = _logits(model)
    assert not torch.allclose(changed, wanted)
    with torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: seen.append(2)):
        _logits(model)
    assert seen.count(2) > len(find_layers(model)), "modules inside of layers too"
    seen.clear()
    assert torch.equal(_logits(model), wanted)
    assert not seen


def _pickled(model):
    return pickle.loads(pickle.dumps(model))  # what this test has just made


@pytest.mark.parametrize("how", [copy.deepcopy, _pickled])
def test_a_copy_of_a_called_model_runs_its_own_layers(how, called):
    model, wanted = called
    other = how(model)
    assert torch.equal(_logits(other), wanted)
    with torch.no_grad():
        find_layers(other)[0].output.LayerNorm.weight.mul_(3)
    assert not torch.allclose(_logits(other), wanted)
    assert torch.equal(_logits(model), wanted)
