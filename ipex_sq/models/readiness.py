"""What a float model and its texts must be before it is calibrated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ipex_sq.errors import CalibrationError, ConfigError
from ipex_sq.models.positions import check_length
from ipex_sq.models.vocabulary import check_token_ids
from ipex_sq.recipe.batching import Batch, without_padding

SMALLEST_FLOAT_BYTES = 4


def prepare_float(model: nn.Module) -> None:
    """Put `model` in eval mode: dropout would enter the statistics, and the int8 model.

    Raises:
        ConfigError: It holds parameters of fewer bits than fp32.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() < SMALLEST_FLOAT_BYTES:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(
                f"the model is in {dtype} (first {name!r}): load it with dtype=torch.float32. "
                "Smoothing and its proof need fp32, what stays float gets its dtype from the config"
            )
    model.eval()


def readable_rows(model: nn.Module, batches: Iterable[Batch]) -> list[Batch]:
    """Texts without padding (`without_padding`) that the model has tokens and positions for.

    Raises:
        CalibrationError: See `without_padding`.
        DataError: See `check_token_ids`, `check_length`.
    """
    rows = without_padding(batches)
    check_token_ids(model, max(int(row["input_ids"].max()) for row in rows))
    check_length(model, max(row["input_ids"].shape[1] for row in rows))
    return rows


def check_linears(linears: Mapping[str, nn.Linear]) -> None:
    """Refuse Linears whose weights or biases are not all finite.

    Raises:
        CalibrationError: Names the first.
    """
    for name, linear in linears.items():
        for kind, value in (("weight", linear.weight), ("bias", linear.bias)):
            if value is not None and not _is_finite(value):
                raise CalibrationError(
                    f"the {kind} of {name!r} holds a NaN or an infinity: the checkpoint is broken "
                    "there, load another"
                )


def _is_finite(value: Tensor) -> bool:
    # By its extremes: isfinite makes copies.
    return all(map(math.isfinite, map(float, value.detach().aminmax())))
