"""ONEDNN_MAX_CPU_ISA takes instructions away: int8 stays exact, or is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import INT8_BACKENDS

from ipex_sq import system
from ipex_sq.backends.ipex import IpexBackend
from ipex_sq.backends.native import NativeBackend
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
        ("AVX", "none", False),
        ("SSE41", "none", False),
    ],
)
def test_every_cap_of_a_newer_cpu(monkeypatch, cap, isa, bf16):
    flags = {"amx_tile", "amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512bw"}
    monkeypatch.setattr(system, "cpu_flags", lambda: frozenset(flags | {"avx_vnni", "avx2"}))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert system.int8_isa() == isa
    assert system.has_bf16_instructions() is bf16


def _flags(text):
    return [f"flags\t\t: {text}"]


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "isa", "what"),
    [
        ("aarch64", ["Features\t: fp asimd i8mm bf16 sve"], "aarch64", "this is aarch64"),
        ("x86_64", [], "none", "cpuinfo"),
        ("x86_64", _flags("fpu sse4_2 avx"), "none", "this one has no AVX2"),
        ("x86_64", _flags("avx avx2"), "AVX2", "has AVX2 only: int8 sums would saturate"),
        ("x86_64", _flags("avx2 avx512bw"), "AVX512", "has AVX512 only: int8 sums would saturate"),
        ("x86_64", _flags("avx2 avx_vnni"), "AVX2-VNNI", None),
        ("x86_64", _flags("avx2 avx512bw avx512_vnni"), "AVX512-VNNI", None),
    ],
)
def test_other_machines_are_called_what_they_are(monkeypatch, machine, cpuinfo, isa, what):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(system, "_cpuinfo", lambda: cpuinfo)
    monkeypatch.setattr(system.platform, "machine", lambda: machine)
    system.cpu_flags.cache_clear()
    try:
        assert int8_isa() == isa
        problem = system.int8_problem()
        reasons = [NativeBackend().unsupported_reasons()]
        if "ipex" in INT8_BACKENDS:
            reasons.append(IpexBackend().unsupported_reasons())
    finally:
        system.cpu_flags.cache_clear()
    assert (problem is None) == (what is None)
    for found in reasons:
        assert [item for item in found if "x86-64" in item] == ([problem] if problem else [])
    if what is not None:
        assert what in problem
        assert "AVX512-VNNI, AVX2-VNNI or AMX" in problem


def test_a_cap_is_named_as_the_cause(monkeypatch):
    monkeypatch.setattr(system, "cpu_flags", lambda: frozenset({"avx2", "avx512_vnni"}))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in system.int8_problem()
