"""`python -m ipex_sq tables`: the tables of a document from the result files that it names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ipex_sq.cli.flags import Parser
from ipex_sq.cli.running import write_atomically
from ipex_sq.errors import DataError
from ipex_sq.report.markdown import with_tables

DESCRIPTION = """\
Make the tables of a Markdown document anew from the result files that they name: what stands
between '<!-- table: results/NAME.json -->' and '<!-- end -->'. Paths are looked up beside it.
"""

EXAMPLES = """\
  python -m ipex_sq tables README.md
  python -m ipex_sq tables docs/results.md
"""


def parser() -> Parser:
    """The flags of the command."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_argument("document", type=Path, help="rewritten in place")
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, read, rewrite.

    Raises:
        DataError: The document or a result file cannot be read.
    """
    document: Path = parser().parse_args(arguments).document

    def read(name: str) -> Mapping[str, Any]:
        try:
            found: dict[str, Any] = json.loads(_text(document.parent / name))
        except ValueError as error:
            raise DataError(f"{name} is no result file: {error}") from error
        return found

    write_atomically(document, with_tables(_text(document), read))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
