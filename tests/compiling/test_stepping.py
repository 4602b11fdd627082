"""A step of generation: one graph for layers alike, right for whatever a layer or cache becomes."""

import copy

import pytest
import torch
import transformers
from torch import nn

from ipex_sq.compiling import stepping
from ipex_sq.compiling.compiled_layers import compile_layers
from ipex_sq.compiling.layer_kind import kind_of
from ipex_sq.kernels.brgemm import MOST_ROWS
from ipex_sq.models.caching import SPARE, Room, keep_token, past_of, room_for_one
from ipex_sq.models.layers import find_layers
from ipex_sq.models.tiny import DECODERS, tiny_model

GENERATION = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None}
WITHOUT_STEPS = {"mpt"} | (
    {"gpt2", "gemma2", "gemma3"} if transformers.__version__.startswith("4.") else set()
)
"""MPT keeps no cache by its configuration; in transformers 4 these three have caches of their
own."""

COPIES = [copy.deepcopy] + ([] if transformers.__version__.startswith("4.") else [copy.copy])
"""Those of transformers 4 that are not deep share their lists of tensors."""


@pytest.fixture
def compiled(monkeypatch):
    """The numbers of texts for which steps were compiled, in turn."""
    found = []
    original = stepping.compile_step

    def counted(layer, forward, call):
        graph = original(layer, forward, call)
        found.append(call.texts)
        return graph

    monkeypatch.setattr(stepping, "compile_step", counted)
    return found


def _prompt(texts=1, tokens=9):
    return torch.stack([torch.arange(3 + n, 3 + n + tokens) for n in range(texts)])


def _generate(model, prompt, mask=None, new=6, **options):
    mask = torch.ones_like(prompt) if mask is None else mask
    options = {**GENERATION, "max_new_tokens": new, **options}
    return model.generate(prompt, attention_mask=mask, **options)


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_says_the_same(family, compiled):
    found = _generate(compile_layers(tiny_model(family)), _prompt())
    assert torch.equal(found, _generate(tiny_model(family), _prompt()))
    assert bool(compiled) == (family not in WITHOUT_STEPS)


@pytest.mark.parametrize("family", ["llama", "bloom", "opt"])
def test_one_graph_serves_all_layers_lengths_and_numbers_of_texts(family, compiled):
    model = compile_layers(tiny_model(family))
    assert len(find_layers(model)) > 1
    for texts, tokens in ((1, 9), (1, 40), (2, 9), (5, 12), (MOST_ROWS, 5), (MOST_ROWS + 1, 5)):
        prompt = _prompt(texts, tokens)
        assert torch.equal(_generate(model, prompt), _generate(tiny_model(family), prompt))
    assert [texts if texts < 3 else "more" for texts in compiled] == [1, 2, "more"]


@pytest.mark.parametrize("texts", [2, 3])
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_padded_texts_and_numbers_that_coincide_say_the_same(family, texts, compiled):
    """The first step has as many tokens as a head is wide, and there are as many texts as heads."""
    prompt = _prompt(texts, 15)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    found = _generate(compile_layers(tiny_model(family)), prompt, mask)
    assert torch.equal(found, _generate(tiny_model(family), prompt, mask))
    assert compiled == [texts] or family in WITHOUT_STEPS


def test_a_cache_grows_past_its_room():
    new = 2 * SPARE + 5
    found = _generate(compile_layers(tiny_model("llama")), _prompt(), new=new)
    assert torch.equal(found, _generate(tiny_model("llama"), _prompt(), new=new))


def _logits(model, cache, token):
    with torch.inference_mode():
        ids = torch.tensor([[token]])
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]


def _after(model, tokens):
    """A cache that holds `tokens`, taken one by one."""
    cache = transformers.DynamicCache()
    for token in tokens:
        _logits(model, cache, token)
    return cache


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_cache_and_its_original_go_on_apart(how):
    model = compile_layers(tiny_model("llama"))
    cache = _after(model, [5, 6, 7])
    other = how(cache)
    if how is copy.copy:
        other.layers = [copy.copy(layer) for layer in cache.layers]
    for token, own in ((8, cache), (9, other), (10, cache), (11, other)):
        found = _logits(model, own, token)
    torch.testing.assert_close(found, _logits(model, _after(model, [5, 6, 7, 9]), 11))
    wanted = _logits(model, _after(model, [5, 6, 7, 8, 10]), 12)
    torch.testing.assert_close(_logits(model, cache, 12), wanted)


def test_a_cropped_cache_goes_on_from_where_it_was_cut():
    model = compile_layers(tiny_model("llama"))
    cache = _after(model, [5, 6, 7, 8, 9])
    held = [tensor.clone() for tensor in past_of(cache, 0)]
    kept = past_of(cache, 0)
    cache.crop(-2 if hasattr(cache, "layers") else 3)
    wanted = _logits(model, _after(model, [5, 6, 7]), 10)
    torch.testing.assert_close(_logits(model, cache, 10), wanted)
    # What somebody still holds of the cache before has not changed.
    assert all(torch.equal(*pair) for pair in zip(kept, held, strict=True))


def test_the_cache_holds_what_transformers_would_put_there():
    caches = []
    for model in (compile_layers(tiny_model("llama")), tiny_model("llama")):
        caches.append(_after(model, [5, 6, 7, 8]))
    assert caches[0].get_seq_length() == 4
    for index in range(2):
        for found, wanted in zip(*(past_of(cache, index) for cache in caches), strict=True):
            torch.testing.assert_close(found, wanted)


def test_tokens_are_written_where_there_is_room():
    """Copying all of a cache for each token is what generation spent its time on."""
    model = compile_layers(tiny_model("llama"))
    cache = _after(model, [5, 6])
    first = past_of(cache, 0)[0].data_ptr()
    _logits(model, cache, 7)
    assert past_of(cache, 0)[0].data_ptr() == first


def test_a_room_takes_what_is_held_and_gives_it_back():
    cache = transformers.DynamicCache()
    held = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    cache.update(*held, 0)
    room = room_for_one(cache, 0, past_of(cache, 0))
    assert isinstance(room, Room)
    assert room.tokens == 5
    new = torch.ones(2, 3, 8), torch.zeros(2, 3, 8)
    for place, token in zip(room.shown(), new, strict=True):
        place[:, :, 4] = token
    keep_token(cache, 0, room)
    for found, before, token in zip(past_of(cache, 0), held, new, strict=True):
        assert torch.equal(found, torch.cat((before, token[:, :, None]), dim=2))


def test_a_layer_with_other_tensors_or_in_another_mode_is_not_run_as_it_was():
    model, other = compile_layers(tiny_model("llama")), tiny_model("llama", seed=1)
    _generate(model, _prompt())
    for layer, source in zip(find_layers(model), find_layers(other), strict=True):
        layer.mlp.up_proj.weight = source.mlp.up_proj.weight
    plain = tiny_model("llama")
    for layer, source in zip(find_layers(plain), find_layers(other), strict=True):
        layer.mlp.up_proj.weight = source.mlp.up_proj.weight
    assert torch.equal(_generate(model, _prompt()), _generate(plain, _prompt()))
    model.double()
    assert torch.equal(_generate(model, _prompt()), _generate(plain.double(), _prompt()))


def test_a_layer_with_another_module_runs_it():
    model, other = compile_layers(tiny_model("llama")), tiny_model("llama", seed=1)
    _generate(model, _prompt())
    plain = tiny_model("llama")
    for layers in (find_layers(model), find_layers(plain)):
        layers[1].mlp = find_layers(other)[1].mlp
    assert torch.equal(_generate(model, _prompt()), _generate(plain, _prompt()))
    layers = find_layers(model)
    layers[0].mlp.up_proj = nn.Sequential(layers[0].mlp.up_proj, nn.Identity())
    assert torch.equal(_generate(model, _prompt()), _generate(plain, _prompt()))


def test_a_prompt_of_one_token_is_a_prompt():
    model = compile_layers(tiny_model("llama"))
    found, wanted = (_generate(m, torch.tensor([[5]])) for m in (model, tiny_model("llama")))
    assert torch.equal(found, wanted)
    cache = transformers.DynamicCache()
    if hasattr(cache, "layers"):
        empty = torch.empty(1, 2, 0, 16)
        cache.update(empty, empty, 0)
        cache.update(empty, empty, 1)
    torch.testing.assert_close(_logits(model, cache, 5), _logits(model, _after(model, []), 5))


def test_a_copied_model_has_steps_of_its_own():
    model = compile_layers(tiny_model("llama"))
    wanted = _generate(model, _prompt())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(1.5)
    assert torch.equal(_generate(other, _prompt()), wanted)
    assert not torch.equal(_generate(model, _prompt()), wanted)


def test_hooks_are_called_in_every_step():
    model = compile_layers(tiny_model("llama"))
    _generate(model, _prompt())
    calls = []
    handle = find_layers(model)[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    _generate(model, _prompt(), new=6)
    assert len(calls) == 6
    handle.remove()


def test_hidden_states_asked_for_once_do_not_end_compiled_steps(monkeypatch):
    """The hooks that transformers 5 leaves for them, and for attentions, sleep."""
    model = compile_layers(tiny_model("llama"))
    wanted, runs = _generate(model, _prompt()), []
    outputs = model(_prompt(), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == len(find_layers(model)) + 1
    original = stepping._BoundGraph.run

    def counted(self, *args):
        runs.append(1)
        return original(self, *args)

    monkeypatch.setattr(stepping._BoundGraph, "run", counted)
    assert torch.equal(_generate(model, _prompt()), wanted)
    assert len(runs) == 5 * len(find_layers(model))


def test_steps_have_gradients_where_they_are_asked_for():
    """Through the cache too: two steps, each as transformers would take it."""
    found = []
    for model in (compile_layers(tiny_model("llama")), tiny_model("llama")):
        cache = transformers.DynamicCache()
        ids = torch.tensor([[5, 6]]), torch.tensor([[7]]), torch.tensor([[8]])
        outputs = [model(input_ids=new, past_key_values=cache, use_cache=True) for new in ids]
        sum(output.logits.square().sum() for output in outputs).backward()
        found.append([parameter.grad for parameter in model.model.layers.parameters()])
    for pair in zip(*found, strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("hooked", [True, False])
def test_a_cache_of_inference_mode_goes_on_outside_of_it(hooked):
    model = compile_layers(tiny_model("llama"))
    cache = _after(model, [5, 6, 7])
    if hooked:
        find_layers(model)[0].mlp.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        ids = torch.tensor([[8]])
        found = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
    torch.testing.assert_close(found, _logits(model, _after(model, [5, 6, 7]), 8))


class Attention(nn.Module):
    """Adds up what the cache holds, in a way that may depend on the layer's number."""

    def __init__(self, index, factor, own_number):
        super().__init__()
        self.layer_idx = index
        self.factor = factor
        self.own_number = own_number

    def forward(self, x, past_key_values=None):
        if past_key_values is not None:
            keys, _ = past_key_values.update(x[:, None], x[:, None], self.layer_idx)
            x = keys.sum(dim=2)
        return x * self.factor + (self.layer_idx * 100 if self.own_number else 0)


@pytest.mark.parametrize(
    ("factors", "own_number", "graphs"), [((2, 2), False, 1), ((2, 3), False, 2), ((2, 2), True, 0)]
)
def test_layers_share_a_graph_only_if_they_are_alike(factors, own_number, graphs, compiled, caplog):
    layers = [Attention(n, factor, own_number) for n, factor in enumerate(factors)]
    model = nn.Sequential(nn.ModuleList(layers))
    assert (kind_of(layers[0]) == kind_of(layers[1])) == (factors[0] == factors[1])
    compile_layers(model)
    for layer, factor in zip(layers, factors, strict=True):
        cache = transformers.DynamicCache()
        with torch.inference_mode():
            for _ in range(layer.layer_idx):
                cache.update(*(torch.zeros(1, 1, 1, 4),) * 2, _)
            for count in range(1, 4):
                found = layer(torch.ones(1, 1, 4), past_key_values=cache)
                offset = layer.layer_idx * 100 if own_number else 0
                assert bool((found == count * factor + offset).all())
    assert len(compiled) == graphs
    warnings = [record for record in caplog.records if "steps are not compiled" in record.message]
    assert len(warnings) == (1 if own_number else 0)  # once, not for every layer and token
