"""Weights of a smoothed model put on the plan's levels, and what int8 shifts taken from biases.

Backends then round to the nearest level, which is the one that a weight stands on already.

Bias correction (Nagel et al. 2019, arXiv 1906.04721): rounding errors of a Linear average to nearly
nothing over inputs that average to nothing; inputs of a network do not. What remains is the same
shift at every token, and it moves predictions one way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipex_sq.config import GPTQ
from ipex_sq.distributed import share
from ipex_sq.models.folding import smoothed_linear
from ipex_sq.recipe.act_stats import ActStats
from ipex_sq.recipe.gptq import gptq_weight, smoothed_hessian
from ipex_sq.recipe.plan import FLOAT, GroupPlan, LinearPlan, QuantPlan
from ipex_sq.recipe.qparams import ActivationQParams, quantize_weight, round_rows
from ipex_sq.recipe.row_blocks import joined_rows
from ipex_sq.recipe.samples import GroupSample
from ipex_sq.recipe.splitting import append_copies

MASSIVE_FACTOR = 8.0
"""A token this many times larger than the median one is left out of the mean error: its error is
its own, and the others would pay for it."""


@torch.no_grad()
def round_weights(model: nn.Module, plan: QuantPlan, stats: ActStats) -> None:
    """Round weights and correct biases as `plan` says, in place.

    The float model is no longer what it was: this comes after `apply_smoothing` and its proof.

    Args:
        model: Smoothed as the plan says.
        plan: Says how weights are rounded and whether biases are corrected.
        stats: Hold the Hessians and samples that the plan was made with.

    Raises:
        CalibrationError: See `gptq_weight`.
    """
    if plan.weight_rounding != GPTQ and not plan.corrects_biases:
        return
    groups = [item for item in plan.groups.values() if plan.linears[item.group.key].mode != FLOAT]

    def bar(mine: Sequence[GroupPlan]) -> Iterable[GroupPlan]:
        return tqdm(mine, desc="round weights", unit="group", disable=None, leave=False)

    def work(item: GroupPlan) -> _Rounded:
        return _round_group(model, plan, item, stats)

    def size(item: GroupPlan) -> int:
        linears = [smoothed_linear(model, name) for name in item.group.readers]
        return sum(linear.in_features * linear.weight.numel() for linear in linears)

    rounded = share(groups, work, size=size, progress=bar)
    for item, (levels, error) in zip(groups, rounded, strict=True):
        _set_group(model, plan, item, (levels, error))


_Rounded = tuple[Tensor, Tensor | None]
"""Levels `[sum of out_features, in_features]` int8 of a group's readers, and the mean error
`[sum of out_features]` of their outputs where biases are corrected."""


def _round_group(model: nn.Module, plan: QuantPlan, item: GroupPlan, stats: ActStats) -> _Rounded:
    key, readers = item.group.key, item.group.readers
    linears = [smoothed_linear(model, name) for name in readers]
    # Parts of a channel have one column, and what they hold adds up to the channel.
    width = linears[0].in_features - (0 if item.channels is None else len(item.channels))
    weight = joined_rows([linear.weight[:, :width].float() for linear in linears])
    steps = torch.cat([_steps(plan.linears[name]) for name in readers])
    if plan.weight_rounding == GPTQ:
        hessian = smoothed_hessian(stats.hessians[key], item.scale)
        levels = gptq_weight(weight, steps, hessian, name=key)
    else:
        levels = quantize_weight(weight, steps)
    if not plan.corrects_biases or key not in stats.samples:
        return levels, None
    weights = weight, levels.float().mul_(steps[:, None])
    return levels, _mean_error(stats.samples[key], item, plan.linears[key].activation, weights)


def _set_group(model: nn.Module, plan: QuantPlan, item: GroupPlan, rounded: _Rounded) -> None:
    levels, error = rounded
    linears = [smoothed_linear(model, name) for name in item.group.readers]
    steps = torch.cat([_steps(plan.linears[name]) for name in item.group.readers])
    sizes = [linear.out_features for linear in linears]
    if error is not None:
        for linear, part in zip(linears, error.split(sizes), strict=True):
            bias = -part if linear.bias is None else linear.bias - part
            linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
    weight = append_copies(levels.float().mul_(steps[:, None]), item.channels)
    for linear, part in zip(linears, weight.split(sizes), strict=True):
        linear.weight.copy_(part)


def _steps(linear: LinearPlan) -> Tensor:
    assert linear.weight_scale is not None  # noqa: S101
    return linear.weight_scale


def _mean_error(
    sample: GroupSample,
    item: GroupPlan,
    activation: ActivationQParams | None,
    weights: tuple[Tensor, Tensor],
) -> Tensor:
    """Mean error `[out_features]` of int8 outputs over the ordinary sampled tokens.

    Args:
        sample: Of the group's unsmoothed inputs.
        item: How it is smoothed.
        activation: How its input is rounded.
        weights: `[out_features, in_features]`, before and after rounding.
    """
    rows = sample.inputs if item.scale is None else sample.inputs / item.scale
    size = rows.abs().amax(dim=1)
    rows = rows[size <= MASSIVE_FACTOR * size.median()]
    levels, zero_point, step = round_rows(rows, activation, item.channels)
    # The mean of products with one weight is the product of the mean.
    means = ((levels.float() - zero_point) * step).mean(dim=0)
    width = rows.shape[1]
    after = means[:width]
    if item.channels is not None:
        after = after.index_add(0, item.channels, means[width:])
    return weights[1] @ after - weights[0] @ rows.mean(dim=0)
