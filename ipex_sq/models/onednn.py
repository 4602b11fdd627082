"""Calibration's Linears on oneDNN, which multiplies a few hundred rows faster than torch's BLAS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ipex_sq.system import has_bf16_instructions

MOST_BYTES = 4 * 2**30
"""Of weights copied into oneDNN's layout; a larger model keeps torch's BLAS, in fp32."""

EXPECTED_ROWS = 256
"""oneDNN chooses the layout for this many rows; others run too."""


def calibration_dtype() -> torch.dtype:
    """bf16 where the CPU multiplies it in hardware, else fp32."""
    return torch.bfloat16 if has_bf16_instructions() else torch.float32


def fits_packed(sizes: Iterable[int]) -> bool:
    """Whether copies of weights of these sizes in oneDNN's layout are worth their memory."""
    return sum(sizes) * calibration_dtype().itemsize <= MOST_BYTES


@contextmanager
def onednn_linears(
    linears: Iterable[nn.Module], dtype: torch.dtype = torch.float32
) -> Iterator[torch.dtype]:
    """Inside the block these Linears multiply with oneDNN, without gradients.

    In fp32 only the order of sums differs. In bf16 inputs, weights and outputs keep 8 bits, as in
    an int8 model whose rest is bf16, and everything between the Linears stays fp32. Calibration of
    SmolLM2-135M (2 cores of an AMD EPYC, batches of 256 tokens): docs/log.md.

    Args:
        linears: Modules of other classes or dtypes are left as they are.
        dtype: Of the products: fp32 or bf16.

    Yields:
        The dtype that they multiply in.
    """
    swapped = [linear for linear in linears if _can_swap(linear)]
    try:
        for linear in swapped:
            linear.forward = _forward(linear, dtype)  # type: ignore[assignment, method-assign]
        yield dtype if swapped else torch.float32
    finally:
        for linear in swapped:
            linear.__dict__.pop("forward", None)


def _can_swap(linear: nn.Module) -> TypeGuard[nn.Linear]:
    fp32 = type(linear) is nn.Linear and linear.weight.dtype == torch.float32
    untouched = "forward" not in linear.__dict__
    return fp32 and untouched and torch.backends.mkldnn.is_available()


def _forward(linear: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight = linear.weight.detach().to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, EXPECTED_ROWS)
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(x: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(dtype), packed, bias, "none", [], ""
        )
        return output.to(x.dtype)

    return forward
