"""Products of one row agree with those of many."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from ipex_sq.backends import row_kernels
from ipex_sq.backends.int8_linear import Int8Linear
from ipex_sq.backends.row_kernels import RowLinear, row_kernels_built
from ipex_sq.recipe.qparams import ActivationQParams

SHAPES = [(8, 16), (65, 100), (192, 576)]
"""Whole vectors, a last row and columns that fill none, a real model's."""


def test_the_kernels_build_here():
    assert row_kernels_built()


def test_another_cpu_builds_its_own(monkeypatch):
    here = row_kernels.build_directory()
    monkeypatch.setattr(row_kernels, "cpu_flags", lambda: frozenset({"avx2"}))
    assert row_kernels.build_directory() != here


BUILD = """
from ipex_sq.backends.row_kernels import build_directory, row_kernels_built
build_directory().mkdir(parents=True)
(build_directory() / "lock").touch()
assert row_kernels_built()
"""


def test_a_killed_build_does_not_block_the_next(tmp_path):
    environment = {**os.environ, "IPEX_SQ_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", BUILD], env=environment, check=True, timeout=120)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_a_step_are_those_of_many(shape, biased, dtype):
    torch.manual_seed(0)
    out_features, in_features = shape
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    bias = torch.randn(out_features) if biased else None
    linear = Int8Linear(weight, torch.rand(out_features) * 1e-2, bias)
    linear.set_input(ActivationQParams(0.03, 100), None)
    linear.output_dtype = dtype
    x = torch.randn(5, 3, in_features)
    many = linear(x)
    linear.keep_rows()
    rows = torch.cat([linear(x[:, at : at + 1]) for at in range(3)], dim=1)
    single = torch.cat([linear(x[at : at + 1, :1]) for at in range(5)])
    assert torch.equal(single, rows[:, :1])
    # The sums are the same integers; scaling them may round in another order.
    bound = {torch.bfloat16: 2**-8, torch.float32: 2**-22}[dtype]
    assert (rows - many).abs().max() <= bound * many.abs().max()
    assert linear.row_weight is not None


def test_the_largest_sums_are_exact():
    weight = torch.full((2, 4096), 127, dtype=torch.int8)
    linear = Int8Linear(weight, torch.ones(2), None)
    linear.set_input(ActivationQParams(1.0, 0), None)
    linear.keep_rows()
    assert linear(torch.full((1, 4096), 255.0)).tolist() == [[127 * 255 * 4096.0] * 2]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_bf16_row_is_as_near_as_the_library(shape):
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    x = torch.randn(1, 1, shape[1], dtype=torch.bfloat16)
    exact = x.double() @ linear.weight.double().T
    found = RowLinear(linear)(x)
    # One rounding to bf16 at the end, half a unit in the last of 8 bits.
    assert (found - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert torch.equal(RowLinear(linear)(x.expand(1, 2, -1)), linear(x.expand(1, 2, -1)))


def test_a_head_with_a_bias_or_in_fp32_stays_with_the_library():
    for linear in (nn.Linear(16, 8, dtype=torch.bfloat16), nn.Linear(16, 8, bias=False)):
        x = torch.randn(1, 1, 16, dtype=linear.weight.dtype)
        assert torch.equal(RowLinear(linear)(x), linear(x))
