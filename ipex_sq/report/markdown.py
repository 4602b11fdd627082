"""Tables of a Markdown document, made from the result files that it names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ipex_sq.errors import DataError
from ipex_sq.report.latency import backend_and_head
from ipex_sq.report.rows import (
    alpha_cell,
    missing_notes,
    number,
    perplexity_cell,
    ratio,
    share,
)
from ipex_sq.report.tables import markdown_table

_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(\n<!-- end -->)", flags=re.DOTALL)
_MODELS = {"int8": "INT8", "int8+sq": "INT8 + SmoothQuant", "int8 dynamic": "INT8, dynamic"}
ACCURACY = (
    "model", "backend", "alpha", "last word", "against fp32", "last token", "perplexity",
    "quantize s", "documents/s",
)  # fmt: skip
_SPEEDUPS = ("against eager fp32", "against the best bf16", "of the limit")
LATENCY = ("model", "how", "p50 ms", *_SPEEDUPS)
DECODE = ("model", "how", "first token ms", "ms a token", *_SPEEDUPS)
LAMBADA = ("model", "how", "last word", "standard error", "a batch ms", *_SPEEDUPS)


def with_tables(document: str, read: Callable[[str], Mapping[str, Any]]) -> str:
    """The document with every table made anew.

    Args:
        document: Markdown; a table stands between `<!-- table: results/NAME.json -->` and
            `<!-- end -->`.
        read: The result in a file, by its name in the document.

    Raises:
        DataError: There is no such table in it.
    """
    filled, count = _TABLE.subn(lambda m: f"{m[1]}\n{result_table(read(m[2]))}\n{m[3]}", document)
    if not count:
        raise DataError("the document holds no '<!-- table: results/NAME.json -->'")
    return filled


def result_table(result: Mapping[str, Any]) -> str:
    """The rows of an accuracy run or of a benchmark, and below them why others have no figures."""
    rows = [row for row in result["results"] if not row.get("reason")]
    notes = missing_notes(result["results"])
    return "\n\n".join([_table(rows), *notes] if rows else notes)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if "last_word_accuracy" in rows[0]:
        return markdown_table(ACCURACY, [_accuracy(row) for row in rows])
    header = {"decode": DECODE, "lambada": LAMBADA}.get(rows[0]["workload"], LATENCY)
    return markdown_table(header, [_latency(row) for row in rows])


def _accuracy(row: Mapping[str, Any]) -> tuple[str, ...]:
    int8 = row["precision"] == "int8"
    return (
        _MODELS.get(row["label"], row["label"]),
        row["backend"] if int8 else "torch, eager",
        alpha_cell(dict(row)),
        f"{100 * row['last_word_accuracy']:.2f} %",
        f"{row['delta']:+.2f}" if int8 and row["delta"] is not None else "",
        f"{100 * row['last_token_accuracy']:.2f} %",
        perplexity_cell(row),
        number(row["quantize_s"], ".1f"),
        f"{row['docs_per_s']:.1f}",
    )


def _latency(row: Mapping[str, Any]) -> tuple[str, ...]:
    times: tuple[str, ...] = (f"{row['p50_ms']:.0f}",)
    if row["workload"] == "decode":
        times = (f"{row['ttft_ms']:.0f}", f"{row['tpot_ms']:.1f}")
    elif row["workload"] == "lambada":
        times = (f"{row['accuracy']:.2%}", f"{row['accuracy_stderr']:.2%}", *times)
    return (
        _MODELS.get(row["label"], row["label"]),
        backend_and_head(row),
        *times,
        ratio(row["speedup_vs_fp32"]),
        ratio(row["speedup_vs_bf16"]),
        share(row["limit_share"]),
    )
