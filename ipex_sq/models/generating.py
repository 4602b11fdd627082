"""Greedy generation with a clock on every token."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.errors import UnsupportedModelError
from ipex_sq.models.body import ReplacedBody


def check_generates(model: nn.Module) -> None:
    """Refuse a model that would run the whole text again for every token.

    Raises:
        UnsupportedModelError: Its traced body keeps no key-value cache, or it is no decoder.
    """
    if any(isinstance(module, ReplacedBody) for module in model.children()):
        raise UnsupportedModelError("its traced graph keeps no key-value cache")
    if not hasattr(model, "generate"):
        raise UnsupportedModelError(f"{type(model).__name__} does not generate")


def timed_generation(model: Any, ids: Tensor, new_tokens: int) -> list[float]:
    """Generate `new_tokens` for each row of `ids` `[batch, tokens]`.

    Returns:
        Seconds from the start until each new token, `new_tokens` of them.
    """
    from transformers import StoppingCriteria

    times: list[float] = []

    class Clock(StoppingCriteria):  # type: ignore[misc, unused-ignore]
        def __call__(self, input_ids: Tensor, scores: Any, **_options: Any) -> Any:
            del scores
            times.append(time.perf_counter() - start)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        stopping_criteria=[Clock()],
    )
    return times
