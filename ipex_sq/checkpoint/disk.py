"""Files that outlast a loss of power, and a disk that is full."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipex_sq.errors import ResourceError

SAVE_AGAIN = "free space and save again"
RESUME = "free space and go on with --resume"
_FOREIGN = ("No space left", "PytorchStreamWriter failed", "Disk quota exceeded")
"""How libraries in Rust and C++ say that a file cannot be written: not by an OSError."""

_RELATIVE_TO_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux."""


def make_durable(path: Path) -> None:
    """Wait until the file, or the names in the folder, `path` are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same file in two folders where the disk can, else a copy; links stay links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def exchange(first: Path, second: Path) -> bool:
    """Give each of two folders the other's name, in one step that a kill cannot divide.

    False, and nothing has changed, where one is not there or the system cannot (Python's `os` has
    no such call; glibc has it from 2.28 on, some network file systems refuse it).
    """
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    names = os.fsencode(first), os.fsencode(second)
    places = [item for name in names for item in (_RELATIVE_TO_HERE, name)]
    return bool(rename(*places, ctypes.c_uint(_EXCHANGE)) == 0)


@contextmanager
def disk_errors(folder: Path, advice: str = SAVE_AGAIN) -> Iterator[None]:
    """Failing writes into `folder` as one of our errors.

    Raises:
        ResourceError: With the reason and `advice`.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not any(text in str(error) for text in _FOREIGN):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ResourceError(f"{folder} cannot be written ({reason}): {advice}") from error
