"""A plan as JSON and tensors, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ipex_sq.errors import CheckpointError
from ipex_sq.recipe.plan import (
    DYNAMIC_INT8,
    FLOAT,
    UNSMOOTHED,
    GroupPlan,
    LinearPlan,
    QuantPlan,
    SmoothGroup,
)
from ipex_sq.recipe.qparams import ActivationQParams

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
        costs = {float(alpha): value for alpha, value in document["alpha_kl"].items()}
        calibration = document["calibration"]
        alpha, observer = document["alpha"], document["observer"]
        weights = document["weight_rounding"], document["corrects_biases"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"not a quantization plan: {error!r}") from error
    return QuantPlan(alpha, observer, linears, groups, costs, calibration, *weights)


def _linear_plan(name: str, item: dict[str, Any], tensors: Mapping[str, Tensor]) -> LinearPlan:
    if item["mode"] == FLOAT:
        return LinearPlan(FLOAT, reason=item["reason"])
    activation = ActivationQParams(**item["activation"]) if item["activation"] else None
    if (activation is None) != (item["mode"] == DYNAMIC_INT8):
        raise CheckpointError(f"not a quantization plan: {name!r} lacks its activation range")
    scale = tensors[f"{name}.weight_scale"]
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
    scale, channels = tensors[f"{key}.smoothing_scale"], tensors.get(f"{key}.split_channels")
    found = item["placement"], item["alpha"], scale, channels, item["headroom"]
    return GroupPlan(group, *found, expected_kl=item["expected_kl"])
