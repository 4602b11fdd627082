"""Products of one row agree with those of many."""

import os
import subprocess
import sys

import pytest
import torch

from ipex_sq.backends import brgemm
from ipex_sq.backends.brgemm import brgemm_built
from ipex_sq.backends.int8_linear import Int8Linear
from ipex_sq.recipe.qparams import ActivationQParams

SHAPES = [(8, 16), (65, 100), (192, 576)]
"""Whole vectors, a last row and columns that fill none, a real model's."""


def test_the_kernels_build_here():
    assert brgemm_built()


def test_another_cpu_builds_its_own(monkeypatch):
    here = brgemm.build_directory()
    monkeypatch.setattr(brgemm, "cpu_flags", lambda: frozenset({"avx2"}))
    assert brgemm.build_directory() != here


BUILD = """
from ipex_sq.backends.brgemm import build_directory, brgemm_built
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
