"""Activation scales that others published, as statistics of this project.

The authors of SmoothQuant publish, for each of their models, the largest absolute value of every
input channel of every Linear (Xiao et al. 2023, arXiv 2211.10438, equation 4): a dict of tensors by
module path, written by `torch.save`. Minima and maxima are not in it.
"""

from __future__ import annotations

import difflib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ipex_sq.errors import CheckpointError
from ipex_sq.models.conv1d import convert_conv1d
from ipex_sq.models.topology import quantizable_linears
from ipex_sq.recipe.observers import LinearStats

_DAMAGED = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError)
"""What torch's restricted unpickler raises on bytes without sense."""

NAMED = 3
"""How many names an error gives."""


def read_absmax(path: Path) -> dict[str, Tensor]:
    """Read a file of activation scales; nothing in it is run.

    Returns:
        `[in_features]` fp32 by module path.

    Raises:
        CheckpointError: Missing, damaged, or anything but a dict of vectors of values >= 0.
    """
    damaged = f"{path} is damaged or no file of torch.save: download it again"
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise CheckpointError(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors: it was not read") from error
    except _DAMAGED as error:
        raise CheckpointError(damaged) from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{path} is no file of activation scales: it holds no dict of tensors"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not _is_absmax(value):
            raise CheckpointError(
                f"{path}: {name!r} is no vector of largest absolute values (finite, 0 or more)"
            )
    return {name: value.float() for name, value in content.items()}


def stats_of_absmax(
    model: nn.Module, absmax: Mapping[str, Tensor], where: str
) -> dict[str, LinearStats]:
    """Symmetric statistics of every Linear of `model` that may become int8, by module path.

    Args:
        model: Float model; Conv1D modules become Linears.
        absmax: `[in_features]` by module path; those of Linears that stay float are left out.
        where: Name of the file, for errors.

    Raises:
        CheckpointError: A name is no Linear of the model, a width is not its, or one is missing.
    """
    convert_conv1d(model)
    widths = {
        name: module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    strange = [name for name in absmax if name not in widths]
    if strange:
        near = difflib.get_close_matches(strange[0], widths, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise CheckpointError(
            f"{where} is of another model: {_named(strange)}, no Linear of this one{hint}"
        )
    wide = [name for name, item in absmax.items() if len(item) != widths[name]]
    if wide:
        raise CheckpointError(
            f"{where} is of another model: {_named(wide)}, {len(absmax[wide[0]])} channels where "
            f"this one reads {widths[wide[0]]}"
        )
    wanted, _ = quantizable_linears(model)
    missing = [name for name in wanted if name not in absmax]
    if missing:
        raise CheckpointError(f"{where} is of another model, it lacks {_named(missing)}")
    return {name: LinearStats(-absmax[name], absmax[name]) for name in wanted}


def _is_absmax(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and value.ndim == 1
        and bool(value.isfinite().all())
        and bool((value >= 0).all())
    )


def _named(names: Sequence[str]) -> str:
    first = ", ".join(map(repr, names[:NAMED]))
    left = len(names) - NAMED
    return f"{first} and {left} more" if left > 0 else first
