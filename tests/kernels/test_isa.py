"""ONEDNN_MAX_CPU_ISA takes instructions away: int8 stays exact, or is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipex_sq import system
from ipex_sq.system import int8_isa

ROOT = Path(__file__).parents[2]
PRODUCT = """
import torch
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.recipe.qparams import ActivationQParams
weight = torch.full((16, 256), 127, dtype=torch.int8)
weight[1::2] = -127
linear = Int8Linear(weight, torch.ones(16), None)
linear.set_input(ActivationQParams(1.0, 0), None)
levels = torch.full((4, 256), 255, dtype=torch.uint8)
found = linear.multiply(levels, linear.input_scale)
wanted = levels.double() @ weight.double().T
print(bool((found.double() == wanted).all()))
"""
ROWS = (
    PRODUCT.replace("linear.multiply(levels,", "linear.multiply(levels[:, None],")
    .replace("levels =", "linear.keep_rows()\nlevels =")
    .replace("found.double()", "found[:, 0].double()")
)
BUILT = """
from ipex_sq.kernels.brgemm import brgemm_built
print(brgemm_built())
"""
LOGITS = """
import torch
from ipex_sq.kernels.head import WideHead
torch.manual_seed(0)
linear = torch.nn.Linear(64, 100, bias=False, dtype=torch.bfloat16).requires_grad_(False)
x = torch.randn(40, 64).bfloat16()
for rows in (1, 2, 40):
    found, exact = WideHead(linear)(x[:rows]), x[:rows].double() @ linear.weight.double().T
    assert (found - exact).abs().max() <= 2**-19 * exact.abs().max()
print(True)
"""
BACKEND = """
from ipex_sq.backends.registry import choose_backend
from ipex_sq.errors import BackendUnavailableError
try:
    print(choose_backend("native").backend.kernels)
except BackendUnavailableError as error:
    print(error)
"""
EXACT_CAPS = {
    "AMX": "AVX512_CORE_VNNI",
    "AVX512-VNNI": "AVX512_CORE_VNNI",
    "AVX2-VNNI": "AVX2_VNNI",
}


def _printed(code, cap):
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": cap}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def test_sums_are_exact_where_the_cap_leaves_vnni():
    """Products of the largest levels, which 16-bit sums of pairs cannot hold."""
    cap = EXACT_CAPS[int8_isa()]
    assert _printed(PRODUCT, cap) == "True"
    assert _printed(BACKEND, cap).startswith("oneDNN ")


@pytest.mark.parametrize(
    ("cap", "needs"), [("AVX512_CORE_VNNI", "avx512_vnni"), ("AVX2_VNNI", "avx_vnni")]
)
def test_kernels_of_few_rows_and_of_logits_keep_to_the_cap(cap, needs):
    """Without bf16 instructions brgemm has no kernel for bf16: Cascade Lake, Ice Lake."""
    if needs not in system.cpu_flags():
        pytest.skip(f"the CPU has no {needs}")
    assert _printed(BUILT, cap) == str(needs == "avx512_vnni")
    assert _printed(ROWS, cap) == "True"
    assert _printed(LOGITS, cap) == "True"


@pytest.mark.parametrize("cap", ["AVX2", "avx512_core"])
def test_native_is_refused_where_sums_would_saturate(cap):
    assert "int8 sums would saturate" in _printed(BACKEND, cap)


@pytest.mark.parametrize(
    ("cap", "isa", "bf16"),
    [
        ("", "AMX", True),
        ("ALL", "AMX", True),
        ("AVX512_CORE_BF16", "AVX512-VNNI", True),
        ("AVX512_CORE_VNNI", "AVX512-VNNI", False),
        ("AVX512_CORE", "AVX512", False),
        ("AVX2_VNNI", "AVX2-VNNI", False),
        ("AVX2", "AVX2", False),
    ],
)
def test_every_cap_of_a_newer_cpu(monkeypatch, cap, isa, bf16):
    flags = {"amx_tile", "amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512bw"}
    monkeypatch.setattr(system, "cpu_flags", lambda: frozenset(flags | {"avx_vnni", "avx2"}))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert system.int8_isa() == isa
    assert system.has_bf16_instructions() is bf16
