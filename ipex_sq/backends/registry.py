"""Backends by name, and the choice of one."""

from __future__ import annotations

from dataclasses import dataclass

from ipex_sq.backends.base import Backend
from ipex_sq.backends.inc import IncBackend
from ipex_sq.backends.ipex import IpexBackend
from ipex_sq.backends.native import NativeBackend
from ipex_sq.backends.reference import ReferenceBackend
from ipex_sq.errors import BackendUnavailableError, unknown_name

AnyBackend = Backend | IncBackend

_BACKENDS: dict[str, type[AnyBackend]] = {
    "ipex": IpexBackend,
    "native": NativeBackend,
    "inc": IncBackend,
    "reference": ReferenceBackend,
}
PREFERRED = ("ipex", "native")
"""What `auto` tries, in this order."""

COMPARED_BACKENDS = ("native", "ipex")
"""What a comparison runs unless told otherwise: native first, because IPEX, once imported, patches
operators of the whole process."""


@dataclass(frozen=True)
class Choice:
    """A backend that can run, and why it was taken."""

    backend: AnyBackend
    why: str


def available_backends() -> dict[str, list[str]]:
    """Every backend with the reasons why it cannot run here (empty: it can)."""
    return {name: kind().unsupported_reasons() for name, kind in _BACKENDS.items()}


def choose_backend(name: str) -> Choice:
    """The backend called `name`, or for "auto" the first preferred one that can run.

    Raises:
        ConfigError: Unknown name.
        BackendUnavailableError: It cannot run here.
    """
    if name == "auto":
        return _automatic()
    if name not in _BACKENDS:
        raise unknown_name("backend", name, (*_BACKENDS, "auto"))
    backend = _BACKENDS[name]()
    reasons = backend.unsupported_reasons()
    if reasons:
        raise BackendUnavailableError(name, reasons)
    return Choice(backend, "asked for")


def _automatic() -> Choice:
    passed_over: list[str] = []
    for name in PREFERRED:
        backend = _BACKENDS[name]()
        reasons = backend.unsupported_reasons()
        if not reasons:
            return Choice(backend, "auto: " + ("; ".join(passed_over) or "it can run"))
        passed_over.append(f"{name} cannot run ({'; '.join(reasons)})")
    raise BackendUnavailableError("auto", passed_over)


def backends_to_compare(names: str) -> tuple[str, ...]:
    """The backends of a comparison: those named (comma-separated), or for "auto" all that can run.

    Raises:
        BackendUnavailableError: A named one cannot run, or none can.
    """
    if names != "auto":
        wanted = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
        return tuple(choose_backend(name).backend.name for name in wanted)
    reasons = available_backends()
    runnable = tuple(name for name in COMPARED_BACKENDS if not reasons[name])
    if not runnable:
        raise BackendUnavailableError("auto", [f"{name}: {reasons[name]}" for name in reasons])
    return runnable
