"""JSON lines, each problem named as file:line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ipex_sq.errors import DataError

Item = TypeVar("Item")


def read_rows(path: Path, make: Callable[[dict[str, Any], str], Item]) -> tuple[Item, ...]:
    """Read one item from every line that is not blank.

    Args:
        path: UTF-8 text.
        make: Called with the object and where it stands ("file:line"); it may refuse it.

    Raises:
        DataError: Missing or unreadable file, no row, or a malformed one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    rows = tuple(
        make(_object(line, f"{path}:{number}"), f"{path}:{number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    if not rows:
        raise DataError(f"{path}: no documents")
    return rows


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}")
    return row
