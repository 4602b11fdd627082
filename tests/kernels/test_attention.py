"""Attention of short sequences, in one kernel and as batched matmuls, is PyTorch's attention."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ipex_sq.compiling import inductor as layers
from ipex_sq.compiling.inductor import inductor
from ipex_sq.kernels import attention
from ipex_sq.kernels.attention import (
    MOST_TOKENS,
    MOST_TOKENS_OF_MATMULS,
    kernel_for_attention,
    short_attention,
)
from ipex_sq.system import has_bf16_instructions

BATCH, HEADS, SIZE = 3, 4, 16
MODES = ("plain", "causal", "padded", "biased")
with_kernel = pytest.mark.skipif(
    not has_bf16_instructions(), reason="the CPU has neither AVX512-BF16 nor AMX"
)


@pytest.fixture(params=[pytest.param("kernel", marks=with_kernel), "matmuls"])
def form(request, monkeypatch):
    """Which of the two is looked at."""
    if request.param == "matmuls":
        monkeypatch.setattr(attention, "has_kernel", lambda: False)
    else:
        assert attention.has_kernel()
    torch._dynamo.reset()
    return request.param


def _inputs(tokens, dtype, key_heads=HEADS):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(BATCH, tokens, heads, SIZE, generator=generator).to(dtype).transpose(1, 2)
        for heads in (HEADS, key_heads, key_heads)
    ]


def _options(mode, tokens):
    if mode == "padded":
        mask = torch.ones(BATCH, 1, tokens, tokens, dtype=torch.bool)
        mask[0, ..., tokens // 2 :] = False
        return {"attn_mask": mask}
    if mode == "biased":
        generator = torch.Generator().manual_seed(1)
        bias = torch.randn(BATCH, HEADS, tokens, tokens, generator=generator)
        return {"attn_mask": bias.bfloat16()}
    return {"is_causal": mode == "causal"}


def _difference(got, wanted):
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("mode", MODES)
def test_compiled_attention_agrees_with_exact_attention(form, mode):
    for tokens in (20, 33, 130):
        query, key, value = _inputs(tokens, torch.bfloat16)
        options = _options(mode, tokens)

        def attend(query, key, value, options=options):
            return functional.scaled_dot_product_attention(query, key, value, **options)

        exact = {name: x.double() if name == "attn_mask" and x.is_floating_point() else x
                 for name, x in options.items()}  # fmt: skip
        wanted = attend(query.double(), key.double(), value.double(), exact)
        with torch.inference_mode():
            got = torch.compile(attend, dynamic=True, backend=inductor)(query, key, value)
            kernel = attend(query, key, value)
        # All round the weights and the output to bf16 (8 bits), the matmuls the query and the
        # scores as well: four roundings instead of two.
        allowed = {"kernel": 1.05, "matmuls": 2.0}[form] * _difference(kernel, wanted)
        assert _difference(got, wanted) < allowed < 0.01


@pytest.mark.usefixtures("form")
def test_grouped_keys_are_shared_as_pytorch_shares_them():
    query, key, value = _inputs(24, torch.bfloat16, key_heads=2)
    got, sums = short_attention(query, key, value, is_causal=True)
    spread = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    wanted = functional.scaled_dot_product_attention(query, *spread, is_causal=True)
    assert _difference(got, wanted) < 0.01
    scores = (query.double() @ spread[0].double().transpose(2, 3)) / SIZE**0.5
    scores = scores.masked_fill(torch.ones(24, 24).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(sums.double(), scores.logsumexp(-1), rtol=0, atol=0.02)


@pytest.mark.usefixtures("form")
def test_rows_that_are_masked_all_over_stay_finite():
    query, key, value = _inputs(8, torch.bfloat16)
    mask = torch.zeros(BATCH, 1, 8, 8)
    mask[1] = float("-inf")
    got, _ = short_attention(query, key, value, attn_mask=mask)
    assert bool(got.isfinite().all())


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("causal", [True, False])
def test_masked_keys_have_no_influence_at_all(causal):
    """Not even in the last bit: what stands in padding does not matter."""
    query, key, value = _inputs(40, torch.bfloat16)
    mask = torch.zeros(BATCH, 1, 1, 40)
    mask[..., 25:] = torch.finfo(torch.float32).min
    options = {"is_causal": True} if causal else {"attn_mask": mask}
    found = short_attention(query, key, value, **options)[0]
    for tensor in (key, value):
        tensor[:, :, 25:] = 100.0
    again = short_attention(query, key, value, **options)[0]
    rows = slice(0, 25) if causal else slice(None)
    assert torch.equal(found[:, :, rows], again[:, :, rows])


@pytest.mark.usefixtures("form")
def test_scores_of_any_size_give_weights_that_sum_to_one():
    query, key, value = _inputs(70, torch.bfloat16)
    for factor in (0.0, 1e-3, 1e3, 1e18):
        found = short_attention(query * factor, key, torch.ones_like(value))[0]
        assert (found.float() - 1).abs().max() <= 2**-8  # bf16 weights


@with_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_kernel_adds_masks_of_any_type_and_layout(dtype):
    query, key, value = _inputs(50, torch.bfloat16)
    torch.manual_seed(0)
    whole = torch.randn(BATCH, HEADS, 50, 50).to(dtype)
    masks = [whole, whole.transpose(2, 3), whole[:1, :, :1], whole[:, :1, :, :1], whole[0, 0]]
    for mask in masks:
        found = short_attention(query, key, value, attn_mask=mask)[0]
        wanted = functional.scaled_dot_product_attention(
            *(x.double() for x in (query, key, value)), mask.double().expand(*whole.shape)
        )
        assert _difference(found, wanted) < 0.005  # bf16 has 8 bits


@with_kernel
@pytest.mark.parametrize("size", [16, 32, 64, 80, 96, 128, 18])
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "odd strides", "fewer keys"])
def test_the_kernel_takes_any_size_and_layout(layout, size):
    torch.manual_seed(0)
    keys = 37 if layout == "fewer keys" else 50
    query, key, value = (torch.randn(2, 3, n, size + 1).bfloat16() for n in (50, keys, keys))
    if layout != "odd strides":
        query, key, value = (x[..., :size].contiguous() for x in (query, key, value))
    if layout == "tokens first":
        query, key, value = (
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)
        )
    query, key, value = (x[..., :size] for x in (query, key, value))
    for causal in (True, False):
        found = short_attention(query, key, value, is_causal=causal)[0]
        wanted = functional.scaled_dot_product_attention(
            *(x.double() for x in (query, key, value)), is_causal=causal
        )
        assert _difference(found, wanted) < 0.005  # bf16 has 8 bits
        assert found.transpose(1, 2).is_contiguous()


def _exact(query, key, value, mask=None):
    share = query.shape[1] // key.shape[1]
    spread = [x.double().repeat_interleave(share, dim=1) for x in (key, value)]
    mask = None if mask is None else mask.double()
    return functional.scaled_dot_product_attention(query.double(), *spread, attn_mask=mask)


@with_kernel
@pytest.mark.parametrize("size", [2, 16, 18, 64, 80, 128])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (9, 3), (12, 2), (7, 1)])
def test_a_step_attends_to_any_number_of_keys(size, heads, groups):
    torch.manual_seed(0)
    for batch, keys in ((1, 1), (1, 15), (3, 16), (1, 33), (5, 130), (2, 513)):
        query = torch.randn(batch, heads, 1, size).bfloat16()
        # As a cache holds them: the first of many tokens, and what comes after is not theirs.
        room = torch.full((2, batch, groups, keys + 3, size), torch.nan).bfloat16()
        room[..., :keys, :] = torch.randn(2, batch, groups, keys, size)
        key, value = room[..., :keys, :]
        for mask in (None, torch.randn(batch, 1, 1, keys), torch.randn(1, heads, 1, keys)):
            found, sums = short_attention(query, key, value, attn_mask=mask)
            assert _difference(found, _exact(query, key, value, mask)) < 0.01  # bf16 has 8 bits
            assert found.transpose(1, 2).is_contiguous()
            assert bool(sums.isfinite().all())


@pytest.mark.usefixtures("form")
def test_masked_keys_have_no_influence_on_a_step():
    _, key, value = _inputs(40, torch.bfloat16)
    query = torch.randn(BATCH, HEADS, 1, SIZE).bfloat16()
    mask = torch.zeros(BATCH, 1, 1, 40)
    mask[1, ..., :25] = torch.finfo(torch.float32).min
    found = short_attention(query, key, value, attn_mask=mask)[0]
    key[1, :, :25], value[1, :, :25] = 100.0, -100.0
    assert torch.equal(short_attention(query, key, value, attn_mask=mask)[0], found)


@pytest.fixture
def one_thread():
    """Each has kernels of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _bytes_of_generated_code():
    mappings = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    ranges = [
        place.split("-") for place, rights, *rest in mappings if "x" in rights and len(rest) < 4
    ]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)


@with_kernel
@pytest.mark.usefixtures("one_thread")
def test_prompts_of_further_lengths_need_no_further_kernels():
    """PyTorch keeps each for good: memory would grow with every new length."""

    def attend(lengths):
        for tokens in lengths:
            query = torch.zeros(1, 1, tokens, 10, dtype=torch.bfloat16)
            for keys in (query, query[:, :, :1].expand(1, 1, tokens + 40, 10)):
                short_attention(query, keys, keys, is_causal=keys is query)

    attend(range(8, 260, 8))
    before = _bytes_of_generated_code()
    attend(range(11, 400, 13))
    assert _bytes_of_generated_code() == before


@with_kernel
def test_a_step_that_is_causal_sees_the_first_key():
    """As PyTorch counts, from the first key on."""
    _, key, value = _inputs(9, torch.bfloat16)
    query = torch.randn(BATCH, HEADS, 1, SIZE).bfloat16()
    found = short_attention(query, key, value, is_causal=True)[0]
    assert torch.equal(found, value[:, :, :1])


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.0), (torch.bfloat16, 0.1)])
def test_what_has_no_other_form_is_left_to_pytorch(dtype, dropout):
    assert short_attention(*_inputs(8, dtype), dropout) is NotImplemented


def test_what_pytorch_does_better_is_left_to_it(form):
    most = {"kernel": MOST_TOKENS, "matmuls": MOST_TOKENS_OF_MATMULS}[form]
    assert short_attention(*_inputs(most, torch.bfloat16)) is not NotImplemented
    assert short_attention(*_inputs(most + 1, torch.bfloat16)) is NotImplemented


def test_the_compiled_graph_has_it(monkeypatch):
    """A cached graph without it would be as right and twice as slow."""
    calls = []
    original = attention.short_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "short_attention", counted)
    monkeypatch.setattr(layers, "VERSION", str(uuid4()))  # no graph of a run before
    torch._dynamo.reset()
    query, key, value = _inputs(20, torch.bfloat16)
    with torch.inference_mode():
        attend = torch.compile(functional.scaled_dot_product_attention, backend=inductor)
        attend(query, key, value)
    assert calls


@with_kernel
@pytest.mark.parametrize("mode", MODES)
def test_as_written_it_is_the_kernel_within_its_place_alone(mode):
    attend = functional.scaled_dot_product_attention
    query, key, value = _inputs(196, torch.bfloat16)  # so many that some last bits differ
    options = _options(mode, 196)
    with torch.inference_mode():
        before = attend(query, key, value, **options)
        with kernel_for_attention():
            found = attend(query, key, value, **options)
            with ThreadPoolExecutor(1) as other:
                elsewhere = other.submit(torch.inference_mode(attend), query, key, value, **options)
        after = attend(query, key, value, **options)
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        options = {"attn_mask": torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)}
    wanted = short_attention(query, key, value, **options)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(found[1:], before[1:])  # the first text may be masked all over
    for other_result in (after, elsewhere.result()):
        torch.testing.assert_close(other_result, before, rtol=0, atol=0, equal_nan=True)


@with_kernel
@pytest.mark.parametrize(
    ("tokens", "dtype"), [(40, torch.float32), (MOST_TOKENS + 1, torch.bfloat16)]
)
def test_as_written_the_rest_is_pytorchs(tokens, dtype):
    inputs = _inputs(tokens, dtype)
    with torch.inference_mode():
        wanted = functional.scaled_dot_product_attention(*inputs, is_causal=True)
        with kernel_for_attention():
            found = functional.scaled_dot_product_attention(*inputs, is_causal=True)
    assert torch.equal(found, wanted)


@with_kernel
def test_as_written_gradients_are_pytorchs():
    query, key, value = _inputs(40, torch.bfloat16)
    query.requires_grad_()
    with kernel_for_attention():
        functional.scaled_dot_product_attention(query, key, value).sum().backward()
    assert float(query.grad.abs().max()) > 0


@with_kernel
def test_as_written_tensors_without_data_are_pytorchs():
    inputs = _inputs(40, torch.bfloat16)
    with torch.no_grad(), kernel_for_attention(), FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in inputs]
        found = functional.scaled_dot_product_attention(*fake)
    assert found.shape == inputs[0].shape


@with_kernel
def test_as_written_a_mode_in_python_sees_pytorchs_operator():
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), kernel_for_attention(), Watching():
        functional.scaled_dot_product_attention(*_inputs(40, torch.bfloat16))
    assert attention.SDPA in seen


@with_kernel
def test_as_written_batches_of_functorch_are_pytorchs():
    inputs = [x.unsqueeze(1) for x in _inputs(40, torch.bfloat16)]
    attend = torch.vmap(functional.scaled_dot_product_attention)
    with torch.no_grad():
        wanted = attend(*inputs)
        with kernel_for_attention():
            found = attend(*inputs)
    assert _difference(found, wanted) < 0.01


@with_kernel
def test_as_written_gradients_that_are_asked_for_later_are_pytorchs():
    query, key, value = _inputs(40, torch.bfloat16)
    query.requires_grad_()
    with torch.no_grad(), kernel_for_attention(), torch.enable_grad():
        functional.scaled_dot_product_attention(query, key, value).sum().backward()
    assert float(query.grad.abs().max()) > 0


@with_kernel
def test_a_failure_ends_its_place_too():
    query, key, value = _inputs(40, torch.bfloat16)
    with torch.inference_mode():
        before = functional.scaled_dot_product_attention(query, key, value)
        with pytest.raises(ZeroDivisionError), kernel_for_attention():
            raise ZeroDivisionError
        assert torch.equal(functional.scaled_dot_product_attention(query, key, value), before)
