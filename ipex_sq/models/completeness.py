"""Whether a checkpoint holds the float weights of the model that was made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ipex_sq.errors import CheckpointError, NumericalCheckError, UnsupportedModelError

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""As safetensors names them. 8-bit floats are scaled, as integers are."""

_OF_HEAD = "pooler"
"""Lies in the body of BERT and ALBERT, and checkpoints of their other heads have none."""


def refuse_integer_weights(folder: Path) -> None:
    """Refuse weights that are not float; transformers would take integers as they stand.

    Args:
        folder: Its files are read where it is one; a hub name is not looked up.

    Raises:
        UnsupportedModelError: Names the first.
        SafetensorError: A file is damaged.
    """
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name).get_dtype()
                if name.endswith(".weight") and dtype not in _FLOATS:
                    raise UnsupportedModelError(
                        f"{folder}: {name!r} is stored as {dtype}, so it is quantized: pass a "
                        "float checkpoint"
                    )


def check_complete(model: nn.Module, info: Mapping[str, Any], name: str) -> None:
    """Refuse a model of which weights were not in the checkpoint: they were drawn at random.

    Args:
        model: As `from_pretrained` made it.
        info: Its loading info; tied weights are not missing there.
        name: Of the model, for errors.

    Raises:
        CheckpointError: Weights are missing or have other shapes; names the first.
    """
    _check_shapes(model, info, name)
    _refuse_missing(model, info, (name, missing_weights(model, info)))


def check_body_complete(model: nn.Module, info: Mapping[str, Any], name: str) -> None:
    """As `check_complete`, of a classifier, whose head may be missing.

    Raises:
        CheckpointError: Weights of the body are missing, or any have other shapes.
    """
    _check_shapes(model, info, name)
    body = f"{model.base_model_prefix}."
    missing = missing_weights(model, info)
    inside = [key for key in missing if key.startswith(body) and _OF_HEAD not in key.split(".")]
    _refuse_missing(model, info, (name, inside))


def missing_weights(model: nn.Module, info: Mapping[str, Any]) -> list[str]:
    """Names of weights that no file held, in the order of the model.

    Integer and bool buffers (position ids, masks) are the model's own.
    """
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    missing = set(info["missing_keys"])
    found = [key for key, item in own.items() if key in missing and item.is_floating_point()]
    return found + sorted(missing - own.keys())


def check_finite(model: nn.Module) -> None:
    """Refuse a model with a NaN or an infinity among its weights.

    Raises:
        NumericalCheckError: Names the first such weight.
    """
    for name, parameter in model.named_parameters():
        check_finite_weight(name, parameter)


@torch.no_grad()
def check_finite_weight(name: str, weight: Tensor) -> None:
    """As `check_finite`, for one; by its extremes, as isfinite makes copies.

    Raises:
        NumericalCheckError: Names it.
    """
    if weight.numel() and not all(map(math.isfinite, map(float, weight.aminmax()))):
        raise NumericalCheckError(f"weight {name!r} holds values that are not finite")


def _check_shapes(model: nn.Module, info: Mapping[str, Any], name: str) -> None:
    # transformers 4 gives names, 5 names and shapes.
    other = [item if isinstance(item, str) else item[0] for item in info["mismatched_keys"]]
    if other:
        first = min(other)
        shape = list(model.state_dict()[first].shape)
        raise CheckpointError(
            f"{name}: {len(other)} weights have not the shapes that config.json says, the first is "
            f"{first!r}, which should be {shape}: config.json and weights are of two models"
        )


def _refuse_missing(
    model: nn.Module, info: Mapping[str, Any], named: tuple[str, list[str]]
) -> None:
    name, missing = named
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of the weights that its config.json asks for, the first "
            f"is {missing[0]!r}: {_advice(model, missing[0], info['unexpected_keys'])}"
        )


def _advice(model: nn.Module, missing: str, unexpected: Iterable[str]) -> str:
    """Wrappers (DataParallel, torch.compile) write names with a prefix of their own."""
    end = missing.removeprefix(f"{model.base_model_prefix}.")
    near = next((key for key in sorted(unexpected) if key.endswith(f".{end}")), None)
    return f"it has {near!r}, rename its tensors" if near else "pass a complete checkpoint"
