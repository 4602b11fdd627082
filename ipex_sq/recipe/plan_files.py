"""A plan as JSON and tensors, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ipex_sq.errors import CheckpointError
from ipex_sq.recipe.plan import (
    DYNAMIC_INT8,
    FLOAT,
    FOLD,
    PRESCALE,
    STATIC_INT8,
    UNSMOOTHED,
    GroupPlan,
    LinearPlan,
    QuantPlan,
    SmoothGroup,
)
from ipex_sq.recipe.qparams import ACTIVATION_LEVELS, ActivationQParams

PLAN_VERSION = 5


def plan_to_json(plan: QuantPlan) -> str:
    """Everything but the tensors, as JSON."""
    document = {
        "version": PLAN_VERSION,
        "alpha": plan.alpha,
        "alpha_kl": {str(alpha): cost for alpha, cost in plan.alpha_kl.items()},
        "observer": plan.observer,
        "weight_rounding": plan.weight_rounding,
        "corrects_biases": plan.corrects_biases,
        "calibration": dict(plan.calibration),
        "linears": {
            name: {
                "mode": item.mode,
                "reason": item.reason,
                "group": item.group,
                "activation": asdict(item.activation) if item.activation else None,
            }
            for name, item in plan.linears.items()
        },
        "groups": {
            key: {
                "readers": item.group.readers,
                "producer": item.group.producer,
                "fold_problem": item.group.fold_problem,
                "placement": item.placement,
                "alpha": item.alpha,
                "headroom": item.headroom,
                "expected_kl": item.expected_kl,
            }
            for key, item in plan.groups.items()
        },
    }
    return json.dumps(document, indent=1)


def plan_tensors(plan: QuantPlan) -> dict[str, Tensor]:
    """Every tensor of the plan under a unique key, for safetensors."""
    found = {
        f"{name}.weight_scale": item.weight_scale
        for name, item in plan.linears.items()
        if item.weight_scale is not None
    }
    for key, item in plan.groups.items():
        if item.scale is not None:
            found[f"{key}.smoothing_scale"] = item.scale
        if item.channels is not None:
            found[f"{key}.split_channels"] = item.channels
        if item.group.producer_channels is not None:
            found[f"{key}.producer_channels"] = item.group.producer_channels
    return {key: tensor.contiguous() for key, tensor in found.items()}


def plan_from_json(text: str, tensors: Mapping[str, Tensor]) -> QuantPlan:
    """Inverse of `plan_to_json` and `plan_tensors`.

    Raises:
        CheckpointError: The text is no plan, of another version, or a tensor is missing.
    """
    try:
        document = json.loads(text)
        if document["version"] != PLAN_VERSION:
            raise CheckpointError(
                f"the plan has version {document['version']}, this ipex_sq reads "
                f"{PLAN_VERSION}: quantize the model again"
            )
        linears = {
            name: _linear_plan(name, item, tensors) for name, item in document["linears"].items()
        }
        groups = {key: _group_plan(key, item, tensors) for key, item in document["groups"].items()}
        _check_groups(linears, groups)
        costs = {float(alpha): value for alpha, value in document["alpha_kl"].items()}
        calibration = dict(document["calibration"])
        alpha, observer = document["alpha"], document["observer"]
        weights = document["weight_rounding"], document["corrects_biases"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"not a quantization plan: {error!r}") from error
    return QuantPlan(alpha, observer, linears, groups, costs, calibration, *weights)


def _linear_plan(name: str, item: dict[str, Any], tensors: Mapping[str, Tensor]) -> LinearPlan:
    if item["mode"] == FLOAT:
        return LinearPlan(FLOAT, reason=item["reason"])
    if item["mode"] not in (STATIC_INT8, DYNAMIC_INT8):
        raise ValueError(f"{name!r} has the mode {item['mode']!r}")
    activation = ActivationQParams(**item["activation"]) if item["activation"] else None
    if (activation is None) != (item["mode"] == DYNAMIC_INT8):
        raise CheckpointError(f"not a quantization plan: {name!r} lacks its activation range")
    if activation is not None:
        _check_range(name, activation)
    scale = _finite(tensors, f"{name}.weight_scale")
    return LinearPlan(item["mode"], item["reason"], item["group"], activation, scale)


def _group_plan(key: str, item: dict[str, Any], tensors: Mapping[str, Tensor]) -> GroupPlan:
    group = SmoothGroup(
        tuple(item["readers"]),
        item["producer"],
        item["fold_problem"],
        tensors.get(f"{key}.producer_channels"),
    )
    if item["placement"] == UNSMOOTHED:
        return GroupPlan(group)
    if item["placement"] not in (FOLD, PRESCALE):
        raise ValueError(f"group {key!r} has the placement {item['placement']!r}")
    if not math.isfinite(item["headroom"]):
        raise ValueError(f"group {key!r} has the headroom {item['headroom']}")
    scale = _finite(tensors, f"{key}.smoothing_scale")
    channels = tensors.get(f"{key}.split_channels")
    found = item["placement"], item["alpha"], scale, channels, item["headroom"]
    return GroupPlan(group, *found, expected_kl=item["expected_kl"])


def _check_groups(linears: Mapping[str, LinearPlan], groups: Mapping[str, GroupPlan]) -> None:
    for name, item in linears.items():
        if item.mode != FLOAT and item.group not in groups:
            raise ValueError(f"{name!r} is of the group {item.group!r}, which there is not")


def _check_range(name: str, activation: ActivationQParams) -> None:
    scale, zero_point = activation.scale, activation.zero_point
    if not 0 < scale < math.inf or zero_point not in range(ACTIVATION_LEVELS + 1):
        raise ValueError(f"{name!r} has the range {activation}")


def _finite(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if not bool(tensors[name].isfinite().all()):
        raise ValueError(f"{name!r} holds values that are not finite")
    return tensors[name]
