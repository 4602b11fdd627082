"""What a float model must be before it is calibrated."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from ipex_sq.errors import CalibrationError, ConfigError

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
