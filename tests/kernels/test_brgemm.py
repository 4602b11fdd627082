"""Products of one row agree with those of many."""

import os
import subprocess
import sys

import pytest
import torch

from ipex_sq.kernels import brgemm
from ipex_sq.kernels.brgemm import MOST_ROWS, brgemm_built, pack_rows, sum_rows, unpack_rows
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.kernels.levels import static_levels
from ipex_sq.recipe.plan import PreScale
from ipex_sq.recipe.qparams import (
    SMALLEST_SCALE,
    ActivationQParams,
    TokenParts,
    quantize_tokens,
    token_scale,
)
from ipex_sq.system import peak_rss_bytes, reset_peak_rss, usable_flags

SHAPES = [(8, 16), (65, 100), (192, 576)]
"""Less than a tile, a tile and a broken one, a real model's."""

BEYOND_CACHES = 64 << 20
"""Bytes from which outputs are streamed: `kBeyondCaches`."""

pytestmark = pytest.mark.skipif(
    "avx512_vnni" not in usable_flags(), reason="the CPU has no AVX512-VNNI"
)


def _linear(shape, *, biased, dtype):
    """An int8 Linear whose input is not set yet, and its weight."""
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    bias = torch.randn(shape[0]) if biased else None
    linear = Int8Linear(weight, torch.rand(shape[0]) * 1e-2, bias)
    linear.output_dtype = dtype
    return linear, weight


def test_the_kernels_build_here():
    assert brgemm_built()


def test_another_cpu_builds_its_own(monkeypatch):
    here = brgemm.build_directory()
    monkeypatch.setattr(brgemm, "cpu_flags", lambda: frozenset({"avx2"}))
    assert brgemm.build_directory() != here


@pytest.mark.parametrize("rows", [1, 64, 100, 192])
def test_a_packed_weight_is_the_weight(rows):
    weight = torch.randint(-127, 128, (rows, 64), dtype=torch.int8)
    packed = pack_rows(weight)
    assert torch.equal(unpack_rows(packed, rows), weight)
    assert torch.equal(sum_rows(packed, rows), weight.double().sum(dim=1).int())


@pytest.mark.parametrize("rows", [*range(1, 9), 64, 65, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_integers_are_those_integers(shape, rows):
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    levels = torch.randint(0, 256, (rows, shape[1]), dtype=torch.uint8)
    one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    packed = pack_rows(weight)
    product = torch.ops.ipex_sq.int8_rows(
        levels,
        one,
        zero,
        packed,
        sum_rows(packed, len(weight)),
        torch.ones(shape[0]),
        None,
        one.dtype,
    )
    assert torch.equal(product.double(), levels.double() @ weight.double().t())


def test_packing_takes_little_more_memory_than_the_packed_weight():
    weight = torch.zeros(2**16, 512, dtype=torch.int8)  # 32 MiB
    reset_peak_rss()
    before = peak_rss_bytes()
    packed = pack_rows(weight)
    sums = sum_rows(packed, len(weight))
    taken = peak_rss_bytes() - before
    assert taken < 1.25 * (packed.nbytes + sums.nbytes)


BUILD = """
from ipex_sq.kernels.brgemm import build_directory, brgemm_built
build_directory().mkdir(parents=True)
(build_directory() / "lock").touch()
assert brgemm_built()
"""


def test_a_killed_build_does_not_block_the_next(tmp_path):
    environment = {**os.environ, "IPEX_SQ_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", BUILD], env=environment, check=True, timeout=120)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_a_step_are_those_of_many(shape, biased, dtype):
    linear, _ = _linear(shape, biased=biased, dtype=dtype)
    linear.set_input(ActivationQParams(0.03, 100), None)
    x = torch.randn(MOST_ROWS, 3, shape[1])
    many = linear(x)
    linear.keep_rows()
    rows = torch.cat([linear(x[:, at : at + 1]) for at in range(3)], dim=1)
    single = torch.cat([linear(x[at : at + 1, :1]) for at in range(MOST_ROWS)])
    assert torch.equal(linear(x[:17, :1]), single[:17])
    assert torch.equal(single, rows[:, :1])
    # The sums are the same integers; scaling them may round in another order.
    bound = {torch.bfloat16: 2**-8, torch.float32: 2**-22}[dtype]
    assert (rows - many).abs().max() <= bound * many.abs().max()
    assert linear.row_weight is not None


def test_another_thread_never_sees_rows_without_their_sums():
    class Watched(Int8Linear):
        def __setattr__(self, name, value):
            if name == "row_weight":
                assert self.row_sums is not None
            super().__setattr__(name, value)

    linear = Watched(torch.ones(8, 16, dtype=torch.int8), torch.ones(8), None)
    linear.keep_rows()
    assert linear.row_weight is not None


def test_the_largest_sums_are_exact():
    weight = torch.full((2, 4096), 127, dtype=torch.int8)
    linear = Int8Linear(weight, torch.ones(2), None)
    linear.set_input(ActivationQParams(1.0, 0), None)
    linear.keep_rows()
    assert linear(torch.full((1, 4096), 255.0)).tolist() == [[127 * 255 * 4096.0] * 2]


def test_a_width_that_fills_no_group_of_four_stays_with_the_library():
    linear = Int8Linear(torch.ones(8, 18, dtype=torch.int8), torch.ones(8), None)
    linear.set_input(ActivationQParams(1.0, 0), None)
    linear.keep_rows()
    assert linear.row_weight is None
    assert linear(torch.full((2, 1, 18), 3.0)).tolist() == [[[54.0] * 8]] * 2


OLDER_CPU = """
from ipex_sq.kernels import brgemm
brgemm.FLAGS = [flag.replace("march=native", "march=cascadelake") for flag in brgemm.FLAGS]
assert brgemm.brgemm_built()
from ipex_sq.kernels import attention
attention.has_bf16_instructions = lambda: True  # a new CPU whose compiler does not know them
assert not attention.has_kernel()
"""


def test_cpus_that_do_not_multiply_bf16_have_the_int8_kernels(tmp_path):
    environment = {**os.environ, "IPEX_SQ_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", OLDER_CPU], env=environment, check=True, timeout=120)


def test_many_threads_may_be_the_first():
    code = """
from concurrent.futures import ThreadPoolExecutor
from ipex_sq.kernels.brgemm import brgemm_built
with ThreadPoolExecutor(8) as pool:
    print(all(pool.map(lambda _: brgemm_built(), range(8))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (700, 64)])
def test_rows_alone_multiply_any_number_of_them(shape, biased, dtype):
    linear, weight = _linear(shape, biased=biased, dtype=dtype)
    linear.set_input(None, PreScale(torch.rand(shape[1]) + 0.5))
    x = torch.randn(3, 50, shape[1]).to(dtype)
    wanted = linear(x)
    assert linear.only_rows()
    assert linear.packed is None
    assert torch.equal(linear.levels, weight)
    found = linear(x)
    assert found.shape == wanted.shape
    # The sums are the same integers; scaling them may round in another order.
    bound = {torch.bfloat16: 2**-8, torch.float32: 2**-22}[dtype]
    assert (found - wanted).abs().max() <= bound * wanted.abs().max()
    assert torch.equal(linear(x[:, ::2]), found[:, ::2])  # of any layout, any number
    restored = Int8Linear.restored(linear.stored(), per_token=True, only_rows=True)
    restored.output_dtype = dtype
    assert restored.packed is None
    assert torch.equal(restored(x), found)


@pytest.mark.parametrize("width", [16384, 16390])
def test_outputs_beyond_caches_are_those_of_their_parts(width):
    rows, features = 1100, 64
    linear, _ = _linear((width, features), biased=True, dtype=torch.float32)
    assert linear.only_rows()
    linear.set_input(None, None)
    x = torch.randn(rows, features)
    parts = torch.cat([linear(part) for part in x.split(100)])
    assert parts.nbytes >= BEYOND_CACHES > parts.nbytes // 11  # only the whole is streamed
    torch.testing.assert_close(linear(x), parts, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [None, [3, 3, 3, 70, 190, 190, 191, 191]])
def test_static_rounding_in_one_pass_is_that_of_the_formula(channels, dtype, monkeypatch):
    copies = None if channels is None else torch.tensor(channels)
    width = 192 + (0 if channels is None else len(channels))
    linear, _ = _linear((65, width), biased=True, dtype=torch.float32)
    linear.set_input(ActivationQParams(0.03, 100), PreScale(torch.rand(192) + 0.5, copies))
    x = torch.randn(3, 50, 192) * 4  # some beyond the range, more of them in channels with parts
    x[..., [3, 190]] *= 8
    x = x.to(dtype)
    found, of_any_layout = linear(x), linear(x[:, ::2])
    monkeypatch.setattr("ipex_sq.kernels.levels.brgemm_built", lambda: False)
    assert torch.equal(found, linear(x))
    assert torch.equal(of_any_layout, found[:, ::2])


def test_a_weight_that_is_not_int8_is_refused():
    linear, weight = _linear((70, 32), biased=False, dtype=torch.float32)
    linear.set_input(None, None)
    tensors = {**linear.stored(), "weight": weight.float()}
    with pytest.raises(RuntimeError, match="float32"):
        Int8Linear.restored(tensors, per_token=True, only_rows=True)


@pytest.mark.parametrize(
    "channels",
    [
        [1, 2, 3, 60],
        [-1, 2, 3, 4],
        [3, 2, 3, 4],
        [0, 99, 1, 2],
        [[1, 2, 3, 4]],
        [0.0, 1.0, 2.0, 3.0],
    ],
)
def test_channels_that_are_not_there_are_refused(channels):
    linear, _ = _linear((8, 64), biased=False, dtype=torch.float32)
    linear.set_input(ActivationQParams(0.1, 3), PreScale(None, torch.tensor([1, 1, 2, 59])))
    tensors = linear.stored()
    assert torch.equal(Int8Linear.restored(tensors, per_token=False).levels, linear.levels)
    with pytest.raises(RuntimeError, match="channels must be int64, sorted, from 0 to 59"):
        Int8Linear.restored({**tensors, "channels": torch.tensor(channels)}, per_token=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_are_rounded_as_the_recipe_says(dtype):
    assert brgemm_built()
    torch.manual_seed(0)
    x, multiplier = torch.randn(2, 70, 100), torch.rand(100) + 0.5
    x[0, 1] = 0.0
    x[1, 2] *= 1e30
    x = x.to(dtype)
    levels, scale = torch.ops.ipex_sq.round_tokens(x, multiplier, SMALLEST_SCALE)
    smoothed = x.float() * multiplier
    assert torch.equal(scale, token_scale(smoothed))
    assert torch.equal(levels, quantize_tokens(smoothed, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_in_parts_are_rounded_as_the_recipe_says(dtype):
    assert brgemm_built()
    torch.manual_seed(0)
    x, channels = torch.randn(2, 70, 100), torch.tensor([0, 7, 7, 7, 50, 50, 99, 99])
    x[..., 7] *= 100.0
    x[0, 1], x[0, 2, 7], x[0, 3, 50] = 0.0, 1e30, -torch.inf
    x = x.to(dtype)
    parts = TokenParts.of(channels, 100)
    multiplier = (torch.rand(100) + 0.5) / parts.number
    levels, scale = torch.ops.ipex_sq.round_tokens(x, multiplier, SMALLEST_SCALE, channels)
    shares = x.float() * multiplier
    assert torch.equal(scale, token_scale(shares))
    finite = scale[..., 0].isfinite()
    assert (~finite).sum() == 1
    assert torch.equal(levels[finite], quantize_tokens(shares, scale, parts)[finite])
    with pytest.raises(RuntimeError, match="sorted"):
        torch.ops.ipex_sq.round_tokens(x, multiplier, SMALLEST_SCALE, channels.flip(0))
    with pytest.raises(RuntimeError, match="beyond"):
        torch.ops.ipex_sq.round_tokens(x, multiplier, SMALLEST_SCALE, channels + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_in_parts_are_the_same_in_every_form(dtype):
    """By the kernel, in operators, compiled; and near the float product."""
    channels = torch.tensor([2, 2, 7, 98])
    linear, weight = _linear((65, 104), biased=True, dtype=torch.float32)
    weight[:, 100:] = weight[:, channels]
    linear = Int8Linear(weight, linear.weight_scale, linear.bias)
    linear.set_input(None, PreScale(None, channels))
    x = torch.randn(2, 40, 100)
    x[..., 2] *= 90.0
    x = x.to(dtype)
    operators = linear(x)
    compiled = torch.compile(linear, fullgraph=True)(x)
    assert linear.only_rows()
    outputs = linear(x)
    # One division of two may be fused with what stands around it: the scale's last bit.
    torch.testing.assert_close(operators, outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled, outputs, rtol=1e-5, atol=1e-5)
    exact = x.float() @ (weight[:, :100].float() * linear.weight_scale[:, None]).T + linear.bias
    plain = Int8Linear(weight[:, :100].contiguous(), linear.weight_scale, linear.bias)
    plain.set_input(None, None)
    assert (outputs - exact).norm() < 0.5 * (plain(x) - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_of_a_token_with_nan_are_nan(dtype):
    linear, _ = _linear((65, 100), biased=True, dtype=dtype)
    linear.set_input(None, None)
    x = torch.randn(3, 1, 100).to(dtype)
    finite = linear(x)
    x[1, 0, 37] = torch.nan
    for _ in range(2):
        found = linear(x)
        assert bool(found[1].isnan().all())
        assert torch.equal(found[[0, 2]], finite[[0, 2]])
        assert linear.only_rows()
        finite = linear(x.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_static_levels_of_nan_are_zero_in_every_form(dtype):
    assert brgemm_built()
    x = torch.randn(2, 40).to(dtype)
    x[:, [3, 20, 37]] = torch.nan
    copies = torch.tensor([3, 5]), torch.full((2,), -100.0), torch.full((2,), 155.0)
    for own in ((None, None, None), copies):
        rest = torch.ones(40), torch.tensor(100, dtype=torch.int32)
        found = torch.ops.ipex_sq.round_static(x, *rest, *own)
        assert torch.equal(found, static_levels(x, *rest, own))
        assert bool((found[:, [3, 20, 37]] == 0).all())
    weight = torch.ones(40, 8, dtype=torch.int8)
    packed = pack_rows(weight)
    levels = torch.ones(2, 8, dtype=torch.uint8)
    for activation in ("relu", "silu", "gelu", "gelu_tanh"):
        of_nan = torch.ops.ipex_sq.int8_levels(
            levels,
            torch.tensor(torch.nan),
            torch.tensor(0, dtype=torch.int32),
            [packed],
            [sum_rows(packed, 40)],
            [torch.ones(40)],
            [None],
            activation,
            *rest,
            *copies,
        )
        assert bool((of_nan == 0).all())
