"""Prompts of generation, compiled where that was asked for."""

import copy
import pickle

import pytest
import torch
import transformers
from conftest import relative_error
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from ipex_sq import QuantConfig, compile_prefill, quantize
from ipex_sq.compiling import compiled_layers
from ipex_sq.compiling.compiled_layers import compile_layers
from ipex_sq.errors import UnsupportedModelError
from ipex_sq.models.layers import find_layers
from ipex_sq.models.tiny import DECODERS, tiny_model

OF_FOUR = transformers.__version__.startswith("4.")
WITHOUT = {"mpt", "gpt2", "gemma2", "gemma3"} if OF_FOUR else set()
"""As in `test_stepping.py`: they have caches of their own there."""

BOUND = 1e-4
"""Sums in another order; logits are of the size of 1."""


@pytest.fixture
def prefilled(monkeypatch):
    """The numbers of tokens of prompts that layers ran compiled, in turn."""
    found = []
    original = compiled_layers._CompiledForward._prefill

    def counted(self, name, arguments):
        found.append(next(iter(arguments.values())).shape[-2])
        return original(self, name, arguments)

    monkeypatch.setattr(compiled_layers._CompiledForward, "_prefill", counted)
    return found


@pytest.fixture
def only_traced(monkeypatch):
    """Layers run the graph that Dynamo reads, without waiting for C++."""

    def compiled(function):
        return torch.compile(function, dynamic=True, backend="eager")

    monkeypatch.setattr(compiled_layers, "_compile", compiled)


def _prompt(texts=1, tokens=9):
    return torch.stack([torch.arange(3 + n, 3 + n + tokens) for n in range(texts)])


def _run(model, ids, cache=None, **options):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **options)


def _held(cache):
    pairs = [cache[n] for n in range(len(cache))] if OF_FOUR else cache.layers
    return [pair[0] if OF_FOUR else pair.keys for pair in pairs], [
        pair[1] if OF_FOUR else pair.values for pair in pairs
    ]


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_has_the_same_logits_and_cache(family, prefilled, only_traced):
    model = compile_prefill(compile_layers(tiny_model(family)))
    ids = _prompt(2, 12)
    found, wanted = (_run(item, ids) for item in (model, tiny_model(family)))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=BOUND, atol=BOUND)
    assert bool(prefilled) == (family not in WITHOUT)
    if family not in WITHOUT:
        for mine, own in zip(
            _held(found.past_key_values), _held(wanted.past_key_values), strict=True
        ):
            for got, expected in zip(mine, own, strict=True):
                torch.testing.assert_close(got, expected, rtol=BOUND, atol=BOUND)
    options = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None, "max_new_tokens": 6}
    texts = [item.generate(ids, **options) for item in (model, tiny_model(family))]
    assert torch.equal(*texts)


def test_one_graph_serves_all_layers_lengths_and_numbers_of_texts(prefilled):
    torch._dynamo.reset()
    counters.clear()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_hidden_layers=5, num_attention_heads=4)
    wanted = LlamaForCausalLM(config).eval()
    model = compile_prefill(compile_layers(copy.deepcopy(wanted)))
    for ids in (_prompt(2, 12), _prompt(3, 17)):
        _run(model, ids)
    before = counters["stats"]["unique_graphs"]
    for ids in (_prompt(4, 40), _prompt(7, 5), _prompt(3, 31)):
        found = _run(model, ids).logits
        torch.testing.assert_close(found, _run(wanted, ids).logits, rtol=BOUND, atol=BOUND)
    assert counters["stats"]["unique_graphs"] == before <= 2
    assert len(prefilled) == 5 * 5


def test_prompts_run_as_written_unless_asked(prefilled):
    model = compile_layers(tiny_model("llama"))
    own = _run(tiny_model("llama"), _prompt()).logits
    assert torch.equal(_run(model, _prompt()).logits, own)
    assert not prefilled


def test_padded_prompts_are_compiled_too(prefilled, only_traced):
    model = compile_prefill(compile_layers(tiny_model("llama")))
    ids, mask = _prompt(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    texts = [item.generate(ids, **options) for item in (model, tiny_model("llama"))]
    assert torch.equal(*texts)
    assert prefilled


def test_what_is_no_first_prompt_runs_as_written(prefilled, only_traced):
    model, own = compile_prefill(compile_layers(tiny_model("llama"))), tiny_model("llama")
    more = _prompt(1, 20)[:, 9:]
    results = []
    for item in (model, own):
        cache = DynamicCache()
        _run(item, _prompt(), cache)
        done = len(prefilled)
        results.append(_run(item, more, cache).logits)
        assert len(prefilled) == done, "behind tokens that are there already"
    torch.testing.assert_close(*results, rtol=BOUND, atol=BOUND)
    done = len(prefilled)
    model.generate(_prompt(), max_new_tokens=3, cache_implementation="static", pad_token_id=1)
    model(_prompt(), use_cache=True).logits.sum().backward()
    with find_layers(model)[0].self_attn.register_forward_hook(lambda *_: None):
        hooked = _run(model, _prompt())
    assert len(prefilled) == done + len(find_layers(model)) - 1, "all layers but the hooked one"
    torch.testing.assert_close(hooked.logits, _run(own, _prompt()).logits, rtol=BOUND, atol=BOUND)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))  # what this test has just made


@pytest.mark.parametrize("how", [copy.deepcopy, _pickled])
def test_int8_models_and_their_copies(how, batches, prefilled):
    model = quantize(tiny_model("llama"), batches, QuantConfig(backend="native"))
    as_written = _run(model, _prompt(2)).logits
    assert compile_prefill(model) is model
    found = _run(model, _prompt(2)).logits
    assert prefilled
    with torch.no_grad():
        assert torch.equal(model(_prompt(2), use_cache=False).logits, found)
    float_logits = _run(tiny_model("llama"), _prompt(2)).logits
    # Last bits move levels, so that two int8 runs differ as much as each does from fp32.
    errors = [relative_error(item, float_logits) for item in (as_written, found)]
    assert errors[1] < 1.2 * errors[0]
    done = len(prefilled)
    assert torch.equal(_run(how(model), _prompt(2)).logits, found)
    assert len(prefilled) > done


def test_a_model_without_compiled_layers_is_refused(batches):
    for model in (
        tiny_model("llama"),
        quantize(tiny_model("llama"), batches, QuantConfig(alpha=None, backend="reference")),
    ):
        with pytest.raises(UnsupportedModelError, match="native backend"):
            compile_prefill(model)
