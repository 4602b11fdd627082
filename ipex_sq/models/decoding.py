"""One step of generation as a graph: the key-value cache comes in and goes out as tensors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.errors import UnsupportedModelError
from ipex_sq.models.body import logits_at
from ipex_sq.models.caching import past_of


class StepForTracing(nn.Module):
    """A causal language model with its cache, as torch.jit.trace wants it.

    No length is read from a shape as a Python number: a trace would keep that of its example.
    Every layer attends to the whole text, also where the model has a sliding window.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        picks: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """Run the new tokens behind those that the cache holds.

        Args:
            input_ids: The new ones, `[batch, new]`.
            attention_mask: Of the whole text, `[batch, held + new]`.
            positions: Of the new tokens, `[batch, new]`.
            picks: `[n]`, indices into `[batch * new]`: positions whose logits are computed.
            past: Keys and values of the layers in turn, each `[batch, heads, held, size]`.

        Returns:
            Logits `[1, n, vocabulary]`, then keys and values of `held + new` tokens as in `past`.
        """
        given = {"attention_mask": attention_mask}  # enough for Bloom and MPT: they have ALiBi
        if self.takes_positions:
            mask = _causal_mask(attention_mask, positions)
            given = {"attention_mask": mask, "position_ids": positions}
        cache = _filled_cache(past)
        with logits_at(self.model, picks):
            outputs: Any = self.model(
                input_ids=input_ids, past_key_values=cache, use_cache=True, **given
            )
        return outputs.logits, *_tensors_of(outputs.past_key_values)


def empty_past(model: nn.Module, rows: int) -> list[Tensor]:
    """What a cache of `rows` texts holds at first: keys and values `[rows, heads, 0, size]`.

    Raises:
        UnsupportedModelError: It is none that grows.
    """
    ids = torch.zeros(rows, 1, dtype=torch.long)
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return [tensor.new_zeros(tensor.shape)[:, :, :0] for tensor in _tensors_of(cache)]


def _causal_mask(attention_mask: Tensor, positions: Tensor) -> Tensor:
    """What is added to the attention scores, `[batch, 1, new, held + new]`."""
    index = torch.ones_like(attention_mask).cumsum(1) - 1
    seen = index[:, None, None, :] <= positions[:, None, :, None]
    seen = seen & attention_mask[:, None, None, :].bool()
    scores = torch.zeros_like(seen, dtype=torch.float32)
    return scores.masked_fill(~seen, torch.finfo(torch.float32).min)


def _filled_cache(past: Sequence[Tensor]) -> Any:
    from transformers import DynamicCache, cache_utils

    cache: Any = DynamicCache()
    for index, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
        if not hasattr(cache, "layers"):  # transformers 4
            cache.update(keys, values, index)
            continue
        # Its `update` would begin with an empty tensor of one dimension, which no graph can join.
        layer = cache_utils.DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _tensors_of(cache: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    for index in range(len(cache)):
        held = past_of(cache, index)
        if held is None:  # of fixed size, or of older models in transformers 4
            raise UnsupportedModelError("its key-value cache is not one that grows by tokens")
        tensors += held
    return tensors
