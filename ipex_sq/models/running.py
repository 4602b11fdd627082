"""Run a model on a batch, decoder or encoder, without a key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn


def run_model(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """First output of `model`: logits, or hidden states of a base model."""
    output: Tensor = model(**batch, **without_cache(model))[0]
    return output


def run_body(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Run only the base model: the head feeds no Linear that is quantized."""
    body = getattr(model, "base_model", model)
    body(**batch, **without_cache(body))


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument that keeps `model` from making a key-value cache, where it has one."""
    takes = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if takes else {}
