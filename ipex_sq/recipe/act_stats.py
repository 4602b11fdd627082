"""What calibration hands to planning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ipex_sq.recipe.observers import LinearStats
from ipex_sq.recipe.plan import HEAD, SmoothGroup
from ipex_sq.recipe.samples import GroupSample


@dataclass(frozen=True)
class ActStats:
    """All that calibration learned; enough to plan for any alpha without another pass.

    Attributes:
        linears: Input statistics of each Linear that may become int8, by module path.
        groups: Which Linears read the same tensor, and who wrote it.
        float_reasons: Linears that stay float, and why.
        example: A calibration batch (`input_ids` and `attention_mask`, `[1, tokens]`), for the
            equivalence check and for tracing.
        texts: Number of calibration texts.
        tokens: Number of calibration tokens.
        source: Name and digest of the texts.
        seconds: Wall time of the calibration.
        samples: By group key, for the search of alpha; empty until they are asked for.
        unsampled: As `linears`, without the few texts that samples are taken from.
        hessians: By group key `[in_features, in_features]`, for GPTQ; empty until asked for.
        head: Path of a language model's head, where the statistics hold it.
    """

    linears: Mapping[str, LinearStats]
    groups: Sequence[SmoothGroup]
    float_reasons: Mapping[str, str]
    example: Mapping[str, Tensor]
    texts: int
    tokens: int
    source: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    samples: Mapping[str, GroupSample] = field(default_factory=dict)
    unsampled: Mapping[str, LinearStats] = field(default_factory=dict)
    hessians: Mapping[str, Tensor] = field(default_factory=dict)
    head: str | None = None

    def without_head(self) -> ActStats:
        """The same where a language model's head stays float."""
        if self.head is None:
            return self
        groups = [group for group in self.groups if group.key != self.head]
        return replace(
            self, groups=groups, float_reasons={**self.float_reasons, self.head: HEAD}, head=None
        )
