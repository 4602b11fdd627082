"""Swap the body of a causal language model for anything that maps token ids to hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.errors import UnsupportedModelError
from ipex_sq.models.running import run_model, without_cache


def in_order(
    names: Sequence[str], input_ids: Tensor, mask: Tensor | None, types: Tensor | None
) -> tuple[Tensor, ...]:
    """The tensors that `names` name, for a graph that takes them by place; missing ones filled."""
    given = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids) if mask is None else mask,
        "token_type_ids": torch.zeros_like(input_ids) if types is None else types,
    }
    return tuple(given[name] for name in names)


class ReplacedBody(nn.Module):
    """Stands where the base model stood; the head and the rest of the model stay as they were.

    Attributes:
        run: Maps the tensors that `inputs` name, each `[batch, tokens]`, to hidden states
            `[batch, tokens, hidden]`, and where the body pools to these and `[batch, hidden]`. It
            keeps no key-value cache.
        inputs: "input_ids", "attention_mask", and "token_type_ids" where the body takes them.
        dtype: Of what the head is given.
    """

    def __init__(self, run: Callable[..., Any], dtype: torch.dtype, inputs: Sequence[str]) -> None:
        super().__init__()
        self.run = run
        self.inputs = tuple(inputs)
        self.dtype = dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **_ignored: Any,
    ) -> Any:
        """Run the body; other arguments of a transformers model (cache, positions) have no use."""
        from transformers.modeling_outputs import (
            BaseModelOutputWithPast,
            BaseModelOutputWithPooling,
        )

        typed = token_type_ids is not None and bool(token_type_ids.any())
        if typed and "token_type_ids" not in self.inputs:
            raise UnsupportedModelError("this body was traced without token_type_ids")
        outputs = self.run(*in_order(self.inputs, input_ids, attention_mask, token_type_ids))
        if isinstance(outputs, Tensor):
            return BaseModelOutputWithPast(last_hidden_state=outputs.to(self.dtype))
        hidden, pooled = (output.to(self.dtype) for output in outputs)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    @property
    def decoder(self) -> ReplacedBody:
        """OPT's head calls the decoder inside its body; here that is the body itself."""
        return self


def replace_body(model: nn.Module, body: ReplacedBody) -> nn.Module:
    """Put `body` where the base model of `model` is, in place; no cache is kept from then on.

    What remains of the model, its head, is cast to the dtype that the body gives.
    """
    setattr(model, str(model.base_model_prefix), body)
    model.to(body.dtype)
    config: Any = model.config
    config.use_cache = False
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.use_cache = False
    return model


class BodyForTracing(nn.Module):
    """The base model with tensors in and tensors out, as torch.jit.trace wants it."""

    def __init__(self, body: nn.Module, inputs: Sequence[str]) -> None:
        """`inputs` name the tensors, in the order in which they will be given."""
        super().__init__()
        self.body = body
        self.inputs = tuple(inputs)

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map ids, mask and what else is named to hidden states, and pooled ones if there are."""
        given = dict(zip(self.inputs, tensors, strict=True))
        outputs = self.body(**given, **without_cache(self.body), return_dict=False)
        found = tuple(output for output in outputs if isinstance(output, Tensor))
        return found[0] if len(found) == 1 else found


class LogitsForTracing(nn.Module):
    """A whole model with tensors in and its logits out."""

    def __init__(self, model: nn.Module, inputs: Sequence[str]) -> None:
        """`inputs` name the tensors, in the order in which they will be given."""
        super().__init__()
        self.model = model
        self.inputs = tuple(inputs)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Map the named tensors, `[batch, tokens]` each, to logits."""
        return run_model(self.model, dict(zip(self.inputs, tensors, strict=True)))


def output_head(model: nn.Module) -> nn.Module | None:
    """What maps the hidden states of a language model to logits; None where there is none."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return head if isinstance(head, nn.Module) else None


@contextmanager
def logits_at(model: nn.Module, picks: Tensor) -> Iterator[None]:
    """Inside the block the head sees only rows `picks` of the flattened hidden states.

    All-position logits are half the work of a small model with a large vocabulary, and gigabytes.

    Args:
        model: Without output embeddings of its own (a traced one) it is left as it is.
        picks: `[n]`, indices into `[batch * tokens]`; logits come out as `[1, n, vocabulary]`.
    """
    head = output_head(model)
    if head is None:
        yield
        return

    def pick(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[picks][None], *args[1:])

    with head.register_forward_pre_hook(pick):
        yield
