"""What every command does around its work: logging, errors as one line, the JSON result."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ipex_sq.distributed import joined, rank
from ipex_sq.errors import ConfigError, IpexSqError
from ipex_sq.logs import quiet_libraries

Command = Callable[[Sequence[str]], None]

USER_ERROR = 2


def run(command: Command, arguments: Sequence[str] | None = None) -> int:
    """Run a command; an `IpexSqError` becomes one line on stderr and exit code 2."""
    configure_logging()
    with joined() as group:
        try:
            command(sys.argv[1:] if arguments is None else arguments)
        except IpexSqError as error:
            line = " ".join(str(error).split())
            if group.fails_first():
                sys.stderr.write(f"error: {line}\n")
            return USER_ERROR
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return 130
    return 0


def configure_logging() -> None:
    """Our lines go to stderr; other libraries speak up only about errors.

    Of several processes the first alone shows lines and progress.
    """
    first = rank() == 0
    level = logging.INFO if first else logging.ERROR
    logging.basicConfig(level=level, stream=sys.stderr, format="%(message)s")
    if not first:  # tqdm is silent where there is no terminal
        sys.stderr.isatty = lambda: False  # type: ignore[method-assign]
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers' bars as well
    quiet_libraries()


def show(table: str, result: dict[str, Any], output: Path | None) -> None:
    """Print the table and, as the last line, the result as compact JSON; write it to `output`.

    Of several processes the first does.

    Raises:
        ConfigError: `output` cannot be written.
    """
    if rank() != 0:
        return
    line = json.dumps(result, separators=(",", ":"))
    if output is not None:
        write_atomically(output, line + "\n")
    sys.stdout.write(f"{table}\n{line}\n")
    sys.stdout.flush()


def check_output(output: Path | None) -> None:
    """Refuse, before the work, a result file that could not be written after it.

    Raises:
        ConfigError: It is a folder, or its folder is missing or not writable.
    """
    if output is None:
        return
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder, name a file")
    target = output.resolve()
    if not os.access(target if _is_special(target) else target.parent, os.W_OK):
        raise ConfigError(f"--output {output}: its folder is missing or not writable")


def write_atomically(path: Path, text: str) -> None:
    """Write through a temporary file and a rename: readers see the old file or the new one.

    What a link points to is written, and a device or pipe is written to, not replaced.

    Raises:
        ConfigError: It cannot be written.
    """
    path = path.resolve()
    try:
        if _is_special(path):
            path.write_text(text, encoding="utf-8")
            return
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}-", delete=False, encoding="utf-8"
        ) as scratch:
            scratch.write(text)
            scratch.flush()
            os.fsync(scratch.fileno())
        Path(scratch.name).chmod(0o644)  # a temporary file is its owner's alone
        os.replace(scratch.name, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def findable(name_or_path: str) -> str:
    """A local folder by its whole path, so that it is found from anywhere; other names as given."""
    return str(Path(name_or_path).resolve()) if Path(name_or_path).exists() else name_or_path
