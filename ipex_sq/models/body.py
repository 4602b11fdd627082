"""Swap the body of a causal language model for anything that maps token ids to hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ReplacedBody(nn.Module):
    """Stands where the base model stood; the head and the rest of the model stay as they were.

    Attributes:
        run: Maps `input_ids` and `attention_mask`, both `[batch, tokens]`, to hidden states
            `[batch, tokens, hidden]`. It keeps no key-value cache.
        dtype: Of the hidden states that the head is given.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.run = run
        self.dtype = dtype

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_ignored: Any
    ) -> Any:
        """Run the body; other arguments of a transformers model (cache, positions) have no use."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
        return BaseModelOutputWithPast(last_hidden_state=self.run(input_ids, mask).to(self.dtype))

    @property
    def decoder(self) -> ReplacedBody:
        """OPT's head calls the decoder inside its body; here that is the body itself."""
        return self


def replace_body(
    model: nn.Module, run: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> nn.Module:
    """Put `run` where the base model of `model` is, in place; no cache is kept from then on.

    What remains of the model, its head, is cast to `dtype`.
    """
    setattr(model, str(model.base_model_prefix), ReplacedBody(run, dtype))
    model.to(dtype)
    config: Any = model.config
    config.use_cache = False
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.use_cache = False
    return model


class BodyForTracing(nn.Module):
    """The base model with tensors in and one tensor out, as torch.jit.trace wants it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map `[batch, tokens]` ids and mask to hidden states `[batch, tokens, hidden]`."""
        outputs = self.body(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=False
        )
        hidden: Tensor = outputs[0]
        return hidden


@contextmanager
def logits_at(model: nn.Module, picks: Tensor) -> Iterator[None]:
    """Inside the block the head sees only rows `picks` of the flattened hidden states.

    All-position logits are half the work of a small model with a large vocabulary, and gigabytes.

    Args:
        model: Without output embeddings of its own (a traced one) it is left as it is.
        picks: `[n]`, indices into `[batch * tokens]`; logits come out as `[1, n, vocabulary]`.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if not isinstance(head, nn.Module):
        yield
        return

    def pick(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[picks][None], *args[1:])

    with head.register_forward_pre_hook(pick):
        yield
