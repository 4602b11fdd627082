"""`python -m ipex_sq families`: the table of docs/method.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ipex_sq.cli.flags import Parser, build
from ipex_sq.cli.running import check_output, show
from ipex_sq.config import OutputConfig

DESCRIPTION = """\
Quantize a tiny random model of every family that the tests know: which groups fold into a norm or a
Linear, which are pre-scaled, and the SQNR of the logits with and without SmoothQuant. No download.
stdout is a Markdown table, then one JSON line.
"""

EXAMPLES = """\
  python -m ipex_sq families
  python -m ipex_sq families --output families.json
"""

HEADER = (
    "family", "into norm", "into Linear", "pre-scaled", "int8 Linears", "float",
    "plain", "alpha 0.5", "auto",
)  # fmt: skip


def parser() -> Parser:
    """The flags of the command."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_config(OutputConfig)
    return flags


def command(arguments: Sequence[str]) -> None:
    """Measure every family and print the table."""
    flags = parser().parse_args(arguments)
    output = build(OutputConfig, flags).output
    check_output(output)

    from tqdm import tqdm

    from ipex_sq.evaluation.families import family_row
    from ipex_sq.models.tiny import FAMILIES
    from ipex_sq.report.tables import markdown_table
    from ipex_sq.system import provenance

    rows = [family_row(family) for family in tqdm(FAMILIES, disable=None, leave=False)]
    result = {**provenance(), "results": rows}
    show(markdown_table(HEADER, [_cells(row) for row in rows]), result, output)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    reasons = ", ".join(f"{count} {reason}" for reason, count in row["float_reasons"].items())
    return (
        row["family"],
        *(str(row[name]) for name in ("folded_into_norm", "folded_into_linear", "prescaled")),
        str(row["int8_linears"]),
        reasons,
        *(f"{row[f'sqnr_db_{label}']:.1f} dB" for label in ("plain", "alpha_0.5", "auto")),
    )
