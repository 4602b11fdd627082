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
        path: UTF-8 text, with or without a byte order mark; lines end in LF or CR LF.
        make: Called with the object and where it stands ("file:line"); it may refuse it.

    Raises:
        DataError: Missing or unreadable file, no row, or a malformed one.
    """
    try:
        # Not splitlines, which also splits at characters that JSON strings may hold (U+2028).
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
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
    except ValueError as error:  # a number with thousands of digits
        raise DataError(f"{where}: not JSON that can be read ({error})") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error
    if "\\u" in line and _has_surrogate(row):
        raise DataError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no character")
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}")
    return row


def _has_surrogate(row: Any) -> bool:
    """Whether a string in `row` cannot be written as UTF-8."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
