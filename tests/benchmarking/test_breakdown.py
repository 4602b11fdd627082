"""Every operator of ours is in the breakdown under what it is."""

import pytest
import torch

from ipex_sq.benchmarking.session import _kind
from ipex_sq.kernels.brgemm import brgemm_built
from ipex_sq.system import usable_flags

KINDS = {
    "int8_rows": "gemm",
    "int8_rows_together": "gemm",
    "int8_levels": "gemm",
    "bf16_logits": "gemm",
    "short_attention": "attention",
    "round_tokens": "elementwise",
    "round_static": "elementwise",
    "int8_linear": "other",  # the call alone: oneDNN's operator inside it has its own time
    "causal_bias": "other",
    "replace_attention": "other",  # a switch; what it switches to has its own time
}


@pytest.mark.skipif("avx512_vnni" not in usable_flags(), reason="the CPU has no AVX512-VNNI")
def test_operators_of_ours_have_their_kind():
    assert brgemm_built()
    schemas = torch._C._jit_get_all_schemas()
    names = {item.name.removeprefix("ipex_sq::") for item in schemas if "ipex_sq::" in item.name}
    assert names >= {"int8_levels", "short_attention"}
    assert {name: _kind(f"ipex_sq::{name}") for name in names} == {
        name: KINDS[name] for name in names
    }
