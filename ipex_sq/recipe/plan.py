"""QuantPlan: every numeric decision of a quantized model, in one frozen, serialisable value.

Backends execute a plan and decide nothing. A plan file reproduces a run without calibration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ipex_sq.config import NEAREST
from ipex_sq.recipe.qparams import ActivationQParams, activation_qparams

STATIC_INT8 = "static_int8"
DYNAMIC_INT8 = "dynamic_int8"
FLOAT = "float"
HEAD = "output head"
"""Why a Linear is not static int8: its errors are the logits' own."""

FOLD, PRESCALE, UNSMOOTHED = "fold", "prescale", "none"


@dataclass(frozen=True)
class SmoothGroup:
    """Linears that read one tensor, and the module that wrote it.

    Attributes:
        readers: Module paths of the Linears; they share one smoothing scale.
        producer: Module path of the norm or Linear that wrote the tensor, or None.
        fold_problem: Why the scale cannot go into the producer; empty where it can.
        producer_channels: `[in_features]`, the producer's output channel behind each channel of the
            tensor, where the producer is a Linear; None where it is a norm. Channels with the same
            producer channel (grouped-query attention) share one scale.
    """

    readers: tuple[str, ...]
    producer: str | None
    fold_problem: str = ""
    producer_channels: Tensor | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """Name of the group: its first reader."""
        return self.readers[0]

    @property
    def foldable(self) -> bool:
        """Whether the producer can take the scale."""
        return self.producer is not None and not self.fold_problem

    @property
    def folds_into_norm(self) -> bool:
        """Whether a norm takes the scale, so that nothing stands in front of the readers."""
        return self.foldable and self.producer_channels is None


@dataclass(frozen=True)
class LinearPlan:
    """What becomes of one Linear.

    Attributes:
        mode: "static_int8", "dynamic_int8" (its input is rounded per token) or "float".
        reason: Why it is not static int8; empty where it is.
        group: Key of its smooth group; empty for float.
        activation: uint8 parameters of its (smoothed) input; None unless static.
        weight_scale: `[out_features]`, of its (smoothed) weight; None for float.
    """

    mode: str
    reason: str = ""
    group: str = ""
    activation: ActivationQParams | None = None
    weight_scale: Tensor | None = None


@dataclass(frozen=True)
class GroupPlan:
    """How one smooth group is smoothed.

    Attributes:
        group: The group.
        placement: "fold" (into the producer), "prescale" (multiplied at run time) or "none".
        alpha: Migration strength used, or None.
        scale: `[in_features]` smoothing scale s of one part of each channel, or None.
        channels: `[copies]`, sorted, one for each part but the first that a channel has
            (`splitting.py`), or None.
        headroom: How many times as large as calibration's the static range is.
        expected_kl: What int8 in this group is expected to cost, in nats of KL divergence per
            prediction, with weights rounded to nearest (GPTQ costs less); None where alpha was
            given and nothing was searched.
    """

    group: SmoothGroup
    placement: str = UNSMOOTHED
    alpha: float | None = None
    scale: Tensor | None = None
    channels: Tensor | None = None
    headroom: float = 1.0
    expected_kl: float | None = None


@dataclass(frozen=True)
class PreScale:
    """What happens to the input of a Linear at run time, before it is rounded.

    Attributes:
        divisor: `[in_features]`, divides the input; None where the producer has taken the scale.
        channels: `[copies]`, parts that are appended to the input, or None.
    """

    divisor: Tensor | None
    channels: Tensor | None = None


@dataclass(frozen=True)
class QuantPlan:
    """The whole plan.

    Attributes:
        alpha: The alpha used for the model, "auto" where each group has its own, or None without
            SmoothQuant.
        alpha_kl: Expected KL divergence per prediction for each alpha that the search tried, were
            it used for all groups.
        observer: "minmax", "percentile", "mse" or "kl".
        linears: By module path.
        groups: By group key.
        calibration: Texts and tokens behind the statistics, and where they came from.
        weight_rounding: "nearest" or "gptq".
        corrects_biases: Whether the mean error of int8 outputs is taken from the biases.
    """

    alpha: float | str | None
    observer: str
    linears: Mapping[str, LinearPlan]
    groups: Mapping[str, GroupPlan]
    alpha_kl: Mapping[float, float] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    weight_rounding: str = NEAREST
    corrects_biases: bool = False

    @property
    def int8_names(self) -> list[str]:
        """Module paths of the Linears that run in int8."""
        return [name for name, item in self.linears.items() if item.mode != FLOAT]

    def names(self, mode: str) -> list[str]:
        """Module paths of the Linears of one mode."""
        return [name for name, item in self.linears.items() if item.mode == mode]

    def reasons(self, mode: str) -> dict[str, int]:
        """How many Linears have this mode, by reason."""
        return dict(Counter(item.reason for item in self.linears.values() if item.mode == mode))

    @property
    def alpha_range(self) -> tuple[float, float] | None:
        """Smallest and largest alpha of the groups, or None without SmoothQuant."""
        alphas = [item.alpha for item in self.groups.values() if item.alpha is not None]
        return (min(alphas), max(alphas)) if alphas else None

    @property
    def expected_kl(self) -> float | None:
        """Sum over the groups, nats per prediction; None where nothing was searched."""
        known = [item.expected_kl for item in self.groups.values() if item.expected_kl is not None]
        return sum(known) if known else None

    @property
    def placements(self) -> dict[str, int]:
        """How many groups are folded, pre-scaled and left alone."""
        return dict(Counter(item.placement for item in self.groups.values()))

    def part(self, keys: Iterable[str]) -> QuantPlan:
        """The plan of the groups `keys` alone; Linears of no group are left out."""
        groups = {key: self.groups[key] for key in keys}
        names = [name for item in groups.values() for name in item.group.readers]
        linears = {name: self.linears[name] for name in names}
        return replace(self, linears=linears, groups=groups)

    def with_part(self, part: QuantPlan) -> QuantPlan:
        """The same plan with the groups and Linears of `part` in the place of its own."""
        linears = {**self.linears, **part.linears}
        return replace(self, linears=linears, groups={**self.groups, **part.groups})

    def prescale_of(self, name: str) -> PreScale | None:
        """What happens to this Linear's input at run time, or None."""
        group = self.groups[self.linears[name].group]
        if group.placement == PRESCALE and group.scale is not None:
            return PreScale(group.scale, group.channels)
        return None if group.channels is None else PreScale(None, group.channels)

    def output_scale(self, name: str, features: int) -> Tensor | None:
        """`[features]` by which the rows of Linear `name` are divided as a producer, or None."""
        for item in self.groups.values():
            if item.placement == FOLD and item.group.producer == name:
                return producer_scale(item, features)
        return None

    def without_fold(self, key: str, problem: str) -> QuantPlan:
        """The same plan with a pre-scale in the place of one fold."""
        item = self.groups[key]
        linears = dict(self.linears)
        producer = item.group.producer
        if item.group.producer_channels is not None and producer in linears:
            linears[producer] = _scaled_rows(linears[producer], item, -1)
        group = replace(item.group, fold_problem=problem)
        groups = {**self.groups, key: replace(item, group=group, placement=PRESCALE)}
        return replace(self, linears=linears, groups=groups)

    def folds_lost_from(self, planned: QuantPlan) -> dict[str, str]:
        """Why groups that fold in the plan `planned` do not fold in this one, by group key."""
        return {
            key: self.groups[key].group.fold_problem
            for key, item in planned.groups.items()
            if item.placement == FOLD and self.groups[key].placement != FOLD
        }

    def with_ranges(self, ranges: Mapping[str, tuple[float, float]], observer: str) -> QuantPlan:
        """The same plan with other activation ranges (of the smoothed inputs)."""
        linears = dict(self.linears)
        for name, (low, high) in ranges.items():
            linears[name] = replace(linears[name], activation=activation_qparams(low, high))
        return replace(self, linears=linears, observer=observer)


def producer_scale(item: GroupPlan, features: int) -> Tensor:
    """`[features]` by which the rows of the producing Linear are divided; 1 where nobody reads."""
    assert item.scale is not None and item.group.producer_channels is not None  # noqa: S101, PT018
    scale = torch.ones(features)
    scale[item.group.producer_channels] = item.scale
    return scale


def fold_into_producers(
    linears: Mapping[str, LinearPlan], groups: Mapping[str, GroupPlan]
) -> dict[str, LinearPlan]:
    """The plans of all Linears once producers have taken their groups' scales.

    int8 levels of a row do not change when it is divided: its scale does.
    """
    scaled = dict(linears)
    for item in groups.values():
        producer = item.group.producer
        if item.placement == FOLD and item.group.producer_channels is not None:
            assert producer is not None  # noqa: S101
            scaled[producer] = _scaled_rows(scaled[producer], item, 1)
    return scaled


def _scaled_rows(linear: LinearPlan, item: GroupPlan, sign: int) -> LinearPlan:
    if linear.weight_scale is None:
        return linear
    divisor = producer_scale(item, linear.weight_scale.numel()).pow(sign)
    return replace(linear, weight_scale=linear.weight_scale / divisor)
