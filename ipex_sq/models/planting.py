"""Plant outlier channels into a model: large in the activations, unchanged in what is computed.

What SmoothQuant was made for does not occur in every model at hand. Planted, it does: plain INT8
loses the model, SmoothQuant takes the factor out again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ipex_sq.config import PlantConfig
from ipex_sq.errors import ConfigError, NumericalCheckError, UnsupportedModelError
from ipex_sq.models.folding import fold_form, fold_scale
from ipex_sq.models.running import run_model
from ipex_sq.models.topology import find_topology
from ipex_sq.recipe.plan import SmoothGroup

PLANTING_TOLERANCE = 1e-5
"""Relative; a power of two as factor changes nothing at all."""


@dataclass(frozen=True)
class Planted:
    """What was done.

    Attributes:
        norms: Paths of the norms that were blown up.
        channels: How many channels of each.
        factor: By how much.
        float_change: Largest absolute change of a logit on the example.
    """

    norms: tuple[str, ...]
    channels: int
    factor: float
    float_change: float


def plant_outliers(model: nn.Module, example: Mapping[str, Tensor], config: PlantConfig) -> Planted:
    """Blow up channels of every norm that only Linears read, in place.

    Args:
        model: Float model.
        example: A batch to find the norms with and to check the logits on.
        config: How many channels, by how much, and the seed that draws them.

    Raises:
        ConfigError: More channels than the norm has.
        UnsupportedModelError: No norm is read by Linears alone.
        NumericalCheckError: The float model changed.
    """
    with torch.no_grad():
        before = run_model(model, example)
    generator = torch.Generator().manual_seed(config.seed)
    norms = []
    for group in find_topology(model, [example]).groups:
        if not group.folds_into_norm or group.producer is None:
            continue
        features = int(model.get_submodule(group.key).in_features)  # type: ignore[arg-type]
        if config.channels >= features:
            raise ConfigError(f"--channels {config.channels}: {group.producer} has {features}")
        channels = torch.randperm(features, generator=generator)[: config.channels].tolist()
        if blow_up(model, group, (channels, config.factor)):
            norms.append(group.producer)
    if not norms:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no norm that Linears alone read: nothing can be planted "
            "without changing it"
        )
    with torch.no_grad():
        after = run_model(model, example)
    change = float((after - before).abs().max())
    if not change <= PLANTING_TOLERANCE * float(before.abs().max()):
        raise NumericalCheckError(f"planting changed a logit by {change:.2g}")
    return Planted(tuple(norms), config.channels, config.factor, change)


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
