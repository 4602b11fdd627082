"""What every backend has, and the small pieces that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ipex_sq.recipe.plan import QuantPlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Example = Mapping[str, Tensor]
"""`input_ids` and `attention_mask`, `[batch, tokens]`."""


class Backend(ABC):
    """Executes plans.

    Attributes:
        name: As on the command line.
        float_dtype: Precision of what stays float, unless the user says otherwise.
        kernels: What runs the int8 Linears, for the report.
        rounds_tokens: Whether it executes Linears whose input is rounded per token.
    """

    name: str
    float_dtype: str = "fp32"
    kernels: str = ""
    rounds_tokens: bool = False

    @abstractmethod
    def unsupported_reasons(self) -> list[str]:
        """Why this backend cannot run here; empty where it can. Never raises."""

    def optimize_float(self, model: nn.Module, dtype: str, example: Example) -> nn.Module:
        """The float baseline with the treatment that int8 gets; consumes `model`."""
        del example
        return model.to(DTYPES[dtype])

    @abstractmethod
    def lower(self, model: nn.Module, plan: QuantPlan, example: Example, dtype: str) -> nn.Module:
        """Turn a smoothed float model into one that runs the plan in int8; consumes `model`.

        Args:
            model: Already smoothed as the plan says (`apply_smoothing`).
            plan: The numerics.
            example: A batch, for backends that trace.
            dtype: Precision of what stays float.
        """
