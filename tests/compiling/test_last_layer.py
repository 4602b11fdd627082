"""Compiled classifiers end their last layer with the first token; nobody sees but the clock."""

import inspect
import math
import threading
from contextlib import contextmanager

import pytest
import torch
from conftest import logits_of, relative_error
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from ipex_sq import QuantConfig, quantize
from ipex_sq.backends.native import NativeBackend
from ipex_sq.compiling import compiled_layers as compiling
from ipex_sq.compiling.compiled_layers import compile_layers
from ipex_sq.models.layers import find_layers
from ipex_sq.models.tiny import HIDDEN, VOCABULARY, tiny_model

FAMILIES = ("bert", "roberta", "electra")
SIZES = ((4, 24), (1, 7), (6, 11))

FP32_BOUND = 1e-5
"""Relative, of all logits: the same products, summed over as many numbers."""

BOUNDS = {"fp32": 5e-3, "bf16": 3e-2}
"""Of int8 with the rest in this precision: sums in another order push few values over a rounding
boundary, and bf16 keeps 8 bits."""


def _batch(texts, tokens, *, padded=False):
    generator = torch.Generator().manual_seed(texts)
    ids = torch.randint(2, VOCABULARY, (texts, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, tokens // 2 :] = 0
        mask[0, : tokens // 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _traced(model):
    """`model` with compiled layers that Dynamo guards as ever; the compiler makes nobody wait."""
    for layer in find_layers(compile_layers(model)):
        held, eager = vars(layer.forward), layer.forward._eager
        held["_compiled"] = torch.compile(eager, dynamic=True, backend="eager")
        held["_compiled_cut"] = torch.compile(eager.__func__, dynamic=True, backend="eager")
    return model


def _written(model):
    """`model` as compiled, with layers that run as written where they pick between two.

    For hooks inside of layers: where Dynamo has seen one that is freed while it checks its guards,
    torch 2.8 crashes, with whole layers too.
    """
    for layer in find_layers(compile_layers(model)):
        held, eager = vars(layer.forward), layer.forward._eager
        held["_compiled"], held["_compiled_cut"] = eager, eager.__func__
    return model


@pytest.fixture(scope="module")
def models():
    """A BERT in fp32 that picks what to run, and the same as transformers made it."""
    return _written(tiny_model("bert")), tiny_model("bert")


@pytest.fixture(scope="module")
def traced():
    """As `models`, through Dynamo."""
    return _traced(tiny_model("bert")), tiny_model("bert")


@contextmanager
def _inputs_of(module):
    """Shapes of what modules of this class get; hooks would be seen."""
    shapes, kind = [], type(module)
    forward = kind.forward

    def watched(self, hidden, *args, **kwargs):
        shapes.append(tuple(hidden.shape))
        return forward(self, hidden, *args, **kwargs)

    kind.forward = watched
    try:
        yield shapes
    finally:
        kind.forward = forward


def _tokens(model, call):
    """How many tokens of each text the pooler is given in `call`."""
    with _inputs_of(model.base_model.pooler) as shapes, torch.no_grad():
        call()
    return [shape[1] for shape in shapes]


def _compiled(make, monkeypatch, *, treated=True):
    with monkeypatch.context() as patched:
        if not treated:
            patched.setattr(compiling, "find_first_token", lambda model: None)
        return make()


@pytest.mark.parametrize(
    ("family", "dtype"), [*[(family, "fp32") for family in FAMILIES], ("bert", "bf16")]
)
def test_int8_gives_the_logits_of_all_tokens(family, dtype, batches, monkeypatch):
    config = QuantConfig(alpha=0.5, backend="native", dtype=dtype)

    def make():
        return quantize(tiny_model(family), batches, config)

    model = _compiled(make, monkeypatch)
    full = _compiled(make, monkeypatch, treated=False)
    head = getattr(model, "classifier", None) if family != "bert" else model.bert.pooler
    for texts, tokens in SIZES:
        for padded in (False, True):
            batch = _batch(texts, tokens, padded=padded)
            with _inputs_of(head) as shapes:
                got = logits_of(model, batch)
                wanted = logits_of(full, batch)
            assert [shape[1] for shape in shapes] == [1, tokens]
            assert relative_error(got, wanted) < BOUNDS[dtype]


def test_baselines_get_the_same_treatment():
    for dtype in ("fp32", "bf16"):
        model = NativeBackend().optimize_float(tiny_model("bert"), dtype, {})
        batch = _batch(4, 24)
        assert _tokens(model, lambda model=model, batch=batch: model(**batch)) == [1]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("texts", "tokens"), [*SIZES, (40, 5), (2, 1)])
def test_logits_are_those_of_the_model_as_written(texts, tokens, padded, traced):
    model, plain = traced
    batch = _batch(texts, tokens, padded=padded and tokens > 2)
    assert relative_error(logits_of(model, batch), logits_of(plain, batch)) < FP32_BOUND


def test_products_behind_the_attention_have_one_row_of_each_text(batches):
    texts, tokens = 3, 20
    config = QuantConfig(alpha=0.5, backend="native", dtype="fp32")
    model = quantize(tiny_model("bert"), batches, config)
    batch = _batch(texts, tokens)
    logits_of(model, batch)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        logits_of(model, batch)
    # Levels, `[..., in_features]`; q, k and v are one call where brgemm multiplies them.
    found = [
        event.input_shapes[0][:-1]
        for event in profiled.events()
        if event.name.startswith("ipex_sq::int8_")
    ]
    rows = [math.prod(shape) for shape in found]
    behind = 4  # attention output, up, down and the pooler
    assert len(rows) > 2 * behind
    assert set(rows[:-behind]) == {texts * tokens}
    assert rows[-behind:] == [texts] * behind


def test_all_layers_share_a_graph_but_the_last():
    torch._dynamo.reset()
    counters.clear()
    config = tiny_model("bert").config
    config.num_hidden_layers = 5
    torch.manual_seed(0)
    model = compile_layers(type(tiny_model("bert"))(config).eval())
    for texts, tokens in ((2, 5), (3, 9), (4, 12), (2, 6), (33, 7)):
        logits_of(model, _batch(texts, tokens))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("by_config", [False, True])
def test_hidden_states_are_those_of_all_tokens(by_config, models):
    model, plain = models
    batch = _batch(4, 24, padded=True)
    options = {} if by_config else {"output_hidden_states": True}
    for one in (model, plain):
        one.config.output_hidden_states = by_config
    try:
        with torch.no_grad():
            got, wanted = (one(**batch, **options) for one in (model, plain))
    finally:
        for one in (model, plain):
            one.config.output_hidden_states = False
    assert len(got.hidden_states) == len(find_layers(model)) + 1
    for ours, theirs in zip(got.hidden_states, wanted.hidden_states, strict=True):
        assert ours.shape == (4, 24, HIDDEN)
        assert relative_error(ours, theirs) < FP32_BOUND
    assert relative_error(got.logits, wanted.logits) < FP32_BOUND
    # transformers 5 leaves hooks behind, which do nothing until they are asked again.
    assert _tokens(model, lambda: model(**batch)) == [1]


def test_hidden_states_by_place(models):
    """transformers 4 takes them as its eighth argument, 5 by name only."""
    model, _ = models
    names = list(model.forward._names)
    if "output_hidden_states" not in names:
        pytest.skip("this transformers takes output_hidden_states by name only")
    batch = _batch(2, 9)
    args = [batch.get(name) for name in names[: names.index("output_hidden_states")]]
    with torch.no_grad():
        assert model(*args, True).hidden_states[-1].shape == (2, 9, HIDDEN)


def test_attentions_run_all_tokens():
    """Whether or not this implementation of attention can give them."""
    model = _written(tiny_model("bert"))
    batch = _batch(3, 8)
    assert _tokens(model, lambda: model(**batch, output_attentions=True)) == [8]
    assert _tokens(model, lambda: model(**batch, output_attentions=False)) == [1]


def test_a_body_alone_gives_all_tokens(models):
    model, plain = models
    batch = _batch(4, 24, padded=True)
    logits_of(model, batch)
    with torch.no_grad():
        got, wanted = (one.base_model(**batch).last_hidden_state for one in (model, plain))
    assert got.shape == (4, 24, HIDDEN)
    assert relative_error(got, wanted) < FP32_BOUND


def test_labels_and_the_signature_stay(models):
    model, plain = models
    batch = {**_batch(4, 24), "labels": torch.tensor([0, 1, 1, 0])}
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(float(plain(**batch).loss), rel=1e-4)
    assert _tokens(model, lambda: model(**batch)) == [1]
    ours, theirs = (inspect.signature(one.forward) for one in models)
    assert ours == theirs


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("place", ["", "intermediate.dense", "attention.output"])
def test_hooks_of_the_last_layer_see_all_tokens(place, kind, models):
    model, batch, seen = models[0], _batch(3, 10), []
    hooks = [
        getattr(layer.get_submodule(place), kind)(lambda _m, args, *_: seen.append(args[0].shape))
        for layer in find_layers(model)
    ]
    assert _tokens(model, lambda: model(**batch)) == [10]
    assert [shape[:2] for shape in seen] == [(3, 10)] * len(hooks)
    assert relative_error(logits_of(model, batch), logits_of(models[1], batch)) < FP32_BOUND
    for hook in hooks:
        hook.remove()
    assert _tokens(model, lambda: model(**batch)) == [1]


@pytest.mark.parametrize("place", ["encoder", "pooler"])
def test_hooks_behind_the_last_layer_see_all_tokens(place, models):
    model, batch, seen = models[0], _batch(3, 10), []
    module = getattr(model.bert, place)
    assert _tokens(model, lambda: model(**batch)) == [1]
    with module.register_forward_hook(lambda _module, args, _: seen.append(args[0].shape[1])):
        assert _tokens(model, lambda: model(**batch)) == [10]
    assert seen == [10]
    assert _tokens(model, lambda: model(**batch)) == [1]


def test_a_hook_for_every_module_sees_all_tokens(models):
    model, _ = models
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert _tokens(model, lambda: model(**_batch(3, 10))) == [10]
    finally:
        hook.remove()


def test_hooks_of_other_layers_change_nothing(models):
    model, _ = models
    with find_layers(model)[0].register_forward_hook(lambda *_: None):
        assert _tokens(model, lambda: model(**_batch(3, 10))) == [1]


def test_training_runs_all_tokens():
    model = _traced(tiny_model("bert"))
    batch = _batch(3, 10)
    assert _tokens(model, lambda: model(**batch)) == [1]
    assert _tokens(model.train(), lambda: model(**batch)) == [10]
    assert _tokens(model.eval(), lambda: model(**batch)) == [1]


def test_gradients_are_those_of_the_model_as_written(models):
    model, plain = models
    batch, gradients = _batch(3, 10), []
    for one in (model, plain):
        weight = find_layers(one)[-1].intermediate.dense.weight
        gradients += torch.autograd.grad(one(**batch).logits.sum(), [weight])
    assert relative_error(*gradients) < 1e-4


@pytest.mark.parametrize("path", ["encoder.layer.1.attention.output", "pooler"])
def test_another_module_than_was_proved_gets_all_tokens(path):
    model, plain, other = (
        _traced(tiny_model("bert")),
        tiny_model("bert"),
        tiny_model("bert", seed=1),
    )
    batch = _batch(3, 10)
    assert _tokens(model, lambda: model(**batch)) == [1]
    for one in (model, plain):
        holder, _, name = path.rpartition(".")
        setattr(one.bert.get_submodule(holder), name, other.bert.get_submodule(path))
    assert _tokens(model, lambda: model(**batch)) == [10]
    assert relative_error(logits_of(model, batch), logits_of(plain, batch)) < FP32_BOUND


def test_other_weights_are_seen():
    model, other = _traced(tiny_model("bert")), tiny_model("bert", seed=1)
    batch = _batch(3, 10)
    logits_of(model, batch)
    model.load_state_dict(other.state_dict())
    assert relative_error(logits_of(model, batch), logits_of(other, batch)) < FP32_BOUND
    dense, theirs = (find_layers(one)[-1].attention.output.dense for one in (model, other))
    dense.weight = torch.nn.Parameter(2 * dense.weight.detach())  # another tensor
    theirs.weight = dense.weight
    assert _tokens(model, lambda: model(**batch)) == [1]
    assert relative_error(logits_of(model, batch), logits_of(other, batch)) < FP32_BOUND


def _negated(attention_output):
    return -attention_output


def test_other_attributes_of_the_layer_are_seen(models):
    model, batch = _traced(tiny_model("bert")), _batch(3, 10)
    wanted = logits_of(models[1], batch)
    assert relative_error(logits_of(model, batch), wanted) < FP32_BOUND
    layer = find_layers(model)[-1]
    layer.feed_forward_chunk = _negated
    assert relative_error(logits_of(model, batch), wanted) > 0.1
    del layer.feed_forward_chunk
    assert relative_error(logits_of(model, batch), wanted) < FP32_BOUND
    assert _tokens(model, lambda: model(**batch)) == [1]


def test_two_threads_get_what_each_asked_for(models):
    model, plain = models
    batch = _batch(4, 24)
    with torch.no_grad():
        wanted = plain(**batch, output_hidden_states=True)
        model(**batch, output_hidden_states=True)
        model(**batch)
    both = threading.Barrier(2, timeout=60)
    kind = type(model.bert.embeddings)
    forward = kind.forward
    rows, found = {}, {}
    pool = type(model.bert.pooler).forward

    def meet(self, *args, **kwargs):
        both.wait()  # both are inside the classifier before either comes to the last layer
        return forward(self, *args, **kwargs)

    def count(self, hidden):
        rows[threading.current_thread().name] = hidden.shape[1]
        return pool(self, hidden)

    def run(name, options):
        with torch.no_grad():  # of this thread
            found[name] = model(**batch, **options)

    asked = {"all": {"output_hidden_states": True}, "one": {}}
    kind.forward, type(model.bert.pooler).forward = meet, count
    try:
        threads = [threading.Thread(target=run, args=item, name=item[0]) for item in asked.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        kind.forward, type(model.bert.pooler).forward = forward, pool
    assert rows == {"all": 24, "one": 1}
    assert relative_error(found["all"].hidden_states[-1], wanted.hidden_states[-1]) < FP32_BOUND
    for output in found.values():
        assert relative_error(output.logits, wanted.logits) < FP32_BOUND


def test_an_error_inside_leaves_nothing_behind(models):
    model, _ = models
    batch = _batch(2, 9)
    # PyTorch raises IndexError; once IPEX is imported, embeddings are its own: RuntimeError.
    with pytest.raises((IndexError, RuntimeError), match="out of"), torch.no_grad():
        model(input_ids=batch["input_ids"] + VOCABULARY)
    with torch.no_grad():
        assert model.base_model(**batch).last_hidden_state.shape == (2, 9, HIDDEN)
