"""Linears of a few rows, built from C++ once for a machine, when the first text is generated."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ipex_sq.system import cache_directory, cpu_flags

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("row_kernels.cpp")
MOST_ROWS = 16
"""That `int8_rows` is used for. In SmolLM2-135M a product of 16 rows takes 66 us on average, and
oneDNN's 105 to 138; on its own, everything in cache, oneDNN is faster from about 12 rows on."""

FLAGS = ["-O3", "-march=native", "-fopenmp"]


def build_directory() -> Path:
    """Folder of the built library: one for each CPU and torch, as hosts may share a home."""
    of = " ".join([torch.__version__, *sorted(cpu_flags())])
    return cache_directory() / f"row_kernels-{hashlib.sha256(of.encode()).hexdigest()[:16]}"


@cache
def row_kernels_built() -> bool:
    """Whether `int8_rows` and `bf16_row` of `torch.ops.ipex_sq` are there; builds them if not yet.

    Without them they go through oneDNN as all others do: the same sums, in more time.
    """
    from torch.utils import cpp_extension

    try:
        import ninja
        from filelock import FileLock

        # An environment that is run without being activated has ninja, but not on its path.
        os.environ["PATH"] = os.pathsep.join((str(ninja.BIN_DIR), os.environ.get("PATH", "")))
        folder = build_directory()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "building"):
            # torch waits for this file forever; whoever left it is dead, as we hold the other.
            (folder / "lock").unlink(missing_ok=True)
            cpp_extension.load(
                "ipex_sq_row_kernels",
                [str(SOURCE)],
                extra_cflags=FLAGS,
                build_directory=str(folder),
                is_python_module=False,
            )
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning(
            "tokens are generated more slowly: row_kernels.cpp does not build: %s", reason
        )
        return False
    torch.library.register_fake("ipex_sq::int8_rows", _shape)
    return True


class RowLinear:
    """The forward of a bf16 Linear, with `bf16_row` for one row."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        """Map x `[..., in_features]` to `[..., out_features]`."""
        weight, bias = self._linear.weight, self._linear.bias
        bf16 = x.dtype == weight.dtype == torch.bfloat16
        if bf16 and bias is None and x.shape[:-1].numel() == 1 and row_kernels_built():
            return torch.ops.ipex_sq.bf16_row(x, weight)
        return nn.functional.linear(x, weight, bias)


def _shape(
    levels: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor,
    weight: Tensor,
    weight_sums: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    del input_scale, input_zero_point, weight_sums, weight_scale, bias
    return levels.new_empty((*levels.shape[:-1], weight.shape[0]), dtype=dtype)
