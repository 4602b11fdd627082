"""Every error that a user can cause or mend, as one tree.

IpexSqError
├── ConfigError              value out of range, unknown name
├── DataError                text data missing, malformed, overlapping or unreachable
├── UnsupportedModelError    nothing to quantize, unknown structure
├── CalibrationError         statistics that cannot be trusted
├── NumericalCheckError      smoothing or lowering changed the model beyond tolerance
├── CheckpointError          missing, truncated, wrong version or wrong shapes
├── ResourceError            would not fit in memory or on disk
└── BackendUnavailableError  a backend that cannot run here

The command line prints each of them as one line and exits with 2; any other exception is a bug
and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class IpexSqError(Exception):
    """Base of every error that ipex_sq raises on purpose."""


class ConfigError(IpexSqError):
    """A setting is out of range or names something unknown."""


class DataError(IpexSqError):
    """Text data is missing, malformed, overlapping or unreachable."""


class UnsupportedModelError(IpexSqError):
    """The model has nothing to quantize or a structure that is not understood."""


class CalibrationError(IpexSqError):
    """The calibration statistics cannot be trusted."""


class NumericalCheckError(IpexSqError):
    """Smoothing or lowering changed the model beyond the stated tolerance."""


class CheckpointError(IpexSqError):
    """A saved model is missing, truncated, of another version or of other shapes."""


class ResourceError(IpexSqError):
    """The work would not fit in memory or on disk."""


class BackendUnavailableError(IpexSqError):
    """The backend cannot run here.

    Attributes:
        backend: Name of the backend.
        reasons: Why it cannot run, one sentence each; never empty.
    """

    def __init__(self, backend: str, reasons: Sequence[str]) -> None:
        self.backend = backend
        self.reasons = tuple(reasons)
        super().__init__(f"backend {backend!r} cannot run here: {'; '.join(self.reasons)}")

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        """Pickle the arguments, not the message: it crosses from a benchmark's process."""
        return type(self), (self.backend, self.reasons)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Build the error for an unknown name, with the nearest known one as a suggestion."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ConfigError(f"unknown {kind} {name!r}{hint}; known: {', '.join(choices)}")
