"""What another toolkit compiled, behind the call of a transformers model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ipex_sq.models.body import in_order
from ipex_sq.recipe.batching import Batch

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def input_names(batch: Batch) -> tuple[str, ...]:
    """Names of the tensors of `batch`, in the order in which a graph takes them."""
    return tuple(name for name in INPUTS if name in batch)


class PeerModel(nn.Module):
    """Maps token ids to logits; there is no key-value cache.

    Attributes:
        run: Maps the tensors that `inputs` name, `[batch, tokens]` each, to logits.
        inputs: Names of the tensors that it takes, in order.
        config: Of the float model.
    """

    def __init__(self, run: Callable[..., Tensor], inputs: tuple[str, ...], config: Any) -> None:
        super().__init__()
        self.run = run
        self.inputs = inputs
        self.config = config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor]:
        """Map `[batch, tokens]` to logits."""
        del use_cache
        return (self.run(*in_order(self.inputs, input_ids, attention_mask, token_type_ids)),)
