"""Logits in fp32 of a head with bf16 weights.

Rounded to bf16, logits lose a third of a point of SmolLM2's accuracy on LAMBADA (docs/log.md): with
8 bits the best words tie. The products are the same, and their sums are kept as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ipex_sq.kernels.brgemm import brgemm_built
from ipex_sq.models.body import output_head
from ipex_sq.system import has_bf16_instructions

CHUNK = 4096
"""Rows of the weight that are widened at a time where brgemm is missing."""


def widen_logits(model: nn.Module) -> None:
    """Let the bf16 head of a language model, where it has one, give fp32; in place."""
    head = output_head(model)
    # A forward of its own, or one that hooks have replaced, stays.
    if not isinstance(head, nn.Linear) or "forward" in vars(head):
        return
    if type(head).forward is nn.Linear.forward:
        head.forward = WideHead(head)  # type: ignore[assignment, method-assign]


class WideHead:
    """The forward of a Linear; of a bf16 one it gives fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        """Map x `[..., in_features]` to `[..., out_features]`."""
        weight, bias = self._linear.weight, self._linear.bias
        if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
            return nn.functional.linear(x, weight, bias)
        product = _logits(x.contiguous(), weight)
        return product if bias is None else product.add_(bias)


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    # One row is summed without brgemm, which needs pairs and instructions that add them up.
    one_row = x.numel() == x.shape[-1]
    even = x.numel() > 0 and weight.shape[1] % 2 == 0
    return weight.is_contiguous() and (one_row or (even and has_bf16_instructions()))


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    if _has_kernel(x, weight) and brgemm_built():
        product: Tensor = torch.ops.ipex_sq.bf16_logits(x, weight)
        return product
    product = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)
    wide = x.float()
    for first in range(0, weight.shape[0], CHUNK):
        rows = weight[first : first + CHUNK].float()
        product[..., first : first + CHUNK] = nn.functional.linear(wide, rows)
    return product
