"""Statistics of what enters each Linear, gathered by forward hooks that cannot leak."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ipex_sq.errors import CalibrationError

ROWS_PER_BATCH = 12
MOST_ROWS = 512


@dataclass(frozen=True)
class LinearStats:
    """What one Linear was fed during calibration.

    Attributes:
        minimum: `[in_features]`, smallest value per channel.
        maximum: `[in_features]`, largest value per channel.
        rows: `[n, in_features]`, a few of the inputs themselves, drawn uniformly over tokens, on
            which the output error of a candidate alpha is measured.
    """

    minimum: Tensor
    maximum: Tensor
    rows: Tensor

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


@dataclass
class _Accumulator:
    minimum: Tensor | None = None
    maximum: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)

    def add(self, measured: _Measured) -> None:
        if self.minimum is None or self.maximum is None:
            self.minimum, self.maximum = measured.minimum, measured.maximum
        else:
            self.minimum = torch.minimum(self.minimum, measured.minimum)
            self.maximum = torch.maximum(self.maximum, measured.maximum)
        if sum(rows.shape[0] for rows in self.rows) < MOST_ROWS:
            self.rows.append(measured.rows)


@dataclass(frozen=True)
class _Measured:
    minimum: Tensor
    maximum: Tensor
    rows: Tensor


class StatsRecorder:
    """Collects `LinearStats` for named Linears while its hooks are on (see `record_stats`)."""

    def __init__(self, names: tuple[str, ...], seed: int) -> None:
        self._accumulators = {name: _Accumulator() for name in names}
        self._generator = torch.Generator().manual_seed(seed)
        # q, k and v read one tensor: it is measured once and shared.
        self._last: tuple[Tensor, int, _Measured] | None = None

    def observe(self, name: str, x: Tensor) -> None:
        """Take in one input `[..., in_features]` of the Linear called `name`.

        Raises:
            CalibrationError: The input holds a NaN or an infinity.
        """
        last = self._last
        if last is not None and last[0] is x and last[1] == x._version:
            measured = last[2]
        else:
            measured = self._measure(name, x)
            self._last = (x, x._version, measured)
        self._accumulators[name].add(measured)

    def _measure(self, name: str, x: Tensor) -> _Measured:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        minimum, maximum = torch.aminmax(flat, dim=0)
        if not bool(torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
            raise CalibrationError(
                f"the input of {name!r} is not finite in calibration: the float model is broken "
                "there, check its weights"
            )
        picks = torch.randint(flat.shape[0], (ROWS_PER_BATCH,), generator=self._generator)
        return _Measured(minimum, maximum, flat[picks].clone())

    def finish(self) -> dict[str, LinearStats]:
        """The statistics of every Linear.

        Raises:
            CalibrationError: A Linear was never reached.
        """
        self._last = None
        missed = [name for name, seen in self._accumulators.items() if seen.minimum is None]
        if missed:
            raise CalibrationError(
                f"{len(missed)} Linear layer(s) were never reached in calibration, the first is "
                f"{missed[0]!r}: calibrate on more texts, or keep them in float"
            )
        joined: dict[tuple[int, ...], Tensor] = {}  # readers of one tensor share their rows
        stats: dict[str, LinearStats] = {}
        for name, seen in self._accumulators.items():
            key = tuple(map(id, seen.rows))
            if key not in joined:
                joined[key] = torch.cat(seen.rows)[:MOST_ROWS]
            if seen.minimum is not None and seen.maximum is not None:
                stats[name] = LinearStats(seen.minimum, seen.maximum, joined[key])
        return stats


@contextmanager
def record_stats(linears: Mapping[str, nn.Module], seed: int = 0) -> Iterator[StatsRecorder]:
    """Observe the inputs of `linears` inside the `with` block; hooks go even where it raises.

    Example:
        with record_stats(linears) as recorder:
            model(input_ids)
        stats = recorder.finish()
    """
    recorder = StatsRecorder(tuple(linears), seed)

    def hook_for(name: str) -> object:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            recorder.observe(name, args[0])

        return hook

    handles = [
        module.register_forward_pre_hook(hook_for(name))  # type: ignore[arg-type]
        for name, module in linears.items()
    ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
