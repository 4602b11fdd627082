"""Statistics of what enters each Linear, gathered by forward hooks that cannot leak."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ipex_sq.errors import CalibrationError
from ipex_sq.recipe.hooks import hooked

UNREACHED_ADVICE = (
    "calibrate on more texts, which may send tokens to every expert; a model with Linears that no "
    "text reaches is not supported (--max_drop does not leave them out)"
)


@dataclass(frozen=True)
class LinearStats:
    """What one Linear was fed during calibration.

    Attributes:
        minimum: `[in_features]`, smallest value per channel.
        maximum: `[in_features]`, largest value per channel.
    """

    minimum: Tensor
    maximum: Tensor

    @property
    def act_absmax(self) -> Tensor:
        """`[in_features]`, largest absolute value per channel."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    def smoothed_range(self, scale: Tensor | None) -> tuple[float, float]:
        """Exact per-tensor range after dividing by `scale` `[in_features]` (None: no smoothing)."""
        low, high = self.minimum, self.maximum
        if scale is not None:
            low, high = low / scale, high / scale
        return float(low.min()), float(high.max())

    def joined(self, other: LinearStats) -> LinearStats:
        """Statistics of both inputs together."""
        low = torch.minimum(self.minimum, other.minimum)
        return LinearStats(low, torch.maximum(self.maximum, other.maximum))


class StatsRecorder:
    """Collects `LinearStats` for named Linears while its hooks are on (see `record_stats`)."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._stats: dict[str, LinearStats | None] = dict.fromkeys(names)
        # q, k and v read one tensor: it is measured once and shared.
        self._last: tuple[Tensor, int, LinearStats] | None = None

    def observe(self, name: str, x: Tensor) -> None:
        """Take in one input `[..., in_features]` of the Linear called `name`.

        Raises:
            CalibrationError: The input holds a NaN or an infinity.
        """
        if x.numel() == 0:
            return  # an expert that no token was sent to
        last = self._last
        if last is not None and last[0] is x and last[1] == x._version:
            measured = last[2]
        else:
            measured = _measure(name, x)
            self._last = (x, x._version, measured)
        seen = self._stats[name]
        self._stats[name] = measured if seen is None else seen.joined(measured)

    def merge(self, others: Iterable[Mapping[str, LinearStats]]) -> None:
        """Take in what was seen elsewhere, each as of `so_far`."""
        for stats in others:
            for name, item in stats.items():
                seen = self._stats[name]
                self._stats[name] = item if seen is None else seen.joined(item)

    def so_far(self) -> dict[str, LinearStats]:
        """The statistics of the Linears that were reached until now."""
        return {name: seen for name, seen in self._stats.items() if seen is not None}

    def finish(self) -> dict[str, LinearStats]:
        """The statistics of every Linear.

        Raises:
            CalibrationError: A Linear was never reached.
        """
        self._last = None
        missed = [name for name, seen in self._stats.items() if seen is None]
        if missed:
            raise CalibrationError(
                f"{len(missed)} Linear layer(s) were never reached in calibration, the first is "
                f"{missed[0]!r}: {UNREACHED_ADVICE}"
            )
        return self.so_far()


def _measure(name: str, x: Tensor) -> LinearStats:
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    minimum, maximum = rows.amin(dim=0), rows.amax(dim=0)  # aminmax is ten times slower
    if not bool(torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
        raise CalibrationError(
            f"the input of {name!r} is not finite in calibration: the float model is broken "
            "there, check its weights"
        )
    return LinearStats(minimum, maximum)


@contextmanager
def record_stats(linears: Mapping[str, nn.Module]) -> Iterator[StatsRecorder]:
    """Observe the inputs of `linears` inside the `with` block; hooks go even where it raises.

    Example:
        with record_stats(linears) as recorder:
            model(input_ids)
        stats = recorder.finish()
    """
    recorder = StatsRecorder(tuple(linears))

    def hook_for(name: str) -> object:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            recorder.observe(name, args[0])

        return hook

    with hooked(
        module.register_forward_pre_hook(hook_for(name))  # type: ignore[arg-type]
        for name, module in linears.items()
    ):
        yield recorder
