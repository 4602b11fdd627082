"""`compare`: two result files of the benchmark side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipex_sq.cli.flags import Parser
from ipex_sq.cli.running import check_output, show
from ipex_sq.errors import DataError

DESCRIPTION = """\
Compare two results that benchmark.py wrote with --output: the rows that both have, B against A, and
whether the difference is larger than the spread of the runs. Both must be of one model, workload
and data; what differs of machine, versions and measuring is said above the table.
"""

EXAMPLES = """\
  python -m ipex_sq compare before.json after.json
"""


def parser() -> Parser:
    """The flags of `compare`."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_argument("a", metavar="A.json", type=Path, help="the result to compare with")
    flags.add_argument("b", metavar="B.json", type=Path, help="the result to compare")
    flags.add_flag("output", type=Path, help="write the JSON result to this file")
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, compare, print.

    Raises:
        ConfigError: They are of other models, workloads or data.
        DataError: A file is missing or no result, or they share no row.
    """
    flags = parser().parse_args(arguments)
    check_output(flags.output)

    from ipex_sq.report.comparison import compare_results, differences
    from ipex_sq.report.latency import comparison_report

    first, second = _read(flags.a), _read(flags.b)
    rows = compare_results(first, second)
    names = (flags.a.name, flags.b.name)
    other = differences(first, second)
    result = {"a": names[0], "b": names[1], "differences": other, "results": rows}
    show(comparison_report(names, other, rows), result, flags.output)


def _read(path: Path) -> dict[str, Any]:
    from ipex_sq.report.comparison import check_result

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is no result of benchmark.py: {error}") from error
    return check_result(document, str(path))
