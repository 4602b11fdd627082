"""Plant outlier channels into a model: large in the activations, unchanged in what is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ipex_sq.models.folding import fold_form, fold_scale
from ipex_sq.recipe.plan import SmoothGroup


def blow_up(model: nn.Module, group: SmoothGroup, planted: tuple[Sequence[int], float]) -> bool:
    """Multiply channels of a norm by a factor and divide the columns that read them, in place.

    Where only the group reads the norm, the model computes what it did, bit by bit if the factor
    is a power of two; a residual that reads the norm as well is changed.

    Args:
        model: Float model.
        group: Says which norm, and which Linears read it.
        planted: The channels, and the factor, > 0.

    Returns:
        Whether there was a norm to do it in.
    """
    channels, factor = planted
    norm = None if group.producer is None else model.get_submodule(group.producer)
    if norm is None or group.producer_channels is not None:
        return False
    linears = [model.get_submodule(name) for name in group.readers]
    features = int(linears[0].in_features)  # type: ignore[arg-type]
    form = fold_form(norm, features)
    if form is None:
        return False
    scale = torch.ones(features)
    scale[list(channels)] = factor
    fold_scale(norm, 1 / scale, form)
    with torch.no_grad():
        for linear in linears:
            linear.weight.div_(scale)  # type: ignore[operator, union-attr]
    return True
