"""The accuracy table, and the lines under it that say what was run."""

from __future__ import annotations

from typing import Any

from ipex_sq.report.rows import alpha_cell, linears_cell, number, perplexity_cell, run_note
from ipex_sq.report.tables import format_table

HEADER = (
    "model", "backend", "alpha", "last word", "+-", "delta", "gained/lost", "last token",
    "perplexity", "int8/float Linears", "quantize s", "docs/s", "peak GiB",
)  # fmt: skip


def accuracy_report(result: dict[str, Any]) -> str:
    """Render the JSON document of an accuracy run as text."""
    table = format_table(HEADER, [_cells(row) for row in result["results"]])
    return "\n".join([_title(result), "", table, "", *_notes(result)])


def _title(result: dict[str, Any]) -> str:
    system = result["system"]
    return (
        f"{result['model']} on {result['dataset']} ({result['dataset_split']}), "
        f"{result['rows']} documents\n"
        f"{system['cpu']}, {system['threads']} threads, {system['isa']}"
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    paired = row["delta"] is not None
    return (
        row["label"],
        row["backend"],
        alpha_cell(row),
        f"{100 * row['last_word_accuracy']:.2f} %",
        f"{100 * row['stderr']:.2f}",
        f"{row['delta']:+.2f}" if paired else "-",
        f"{row['gained']}/{row['lost']}" if paired else "-",
        f"{100 * row['last_token_accuracy']:.2f} %",
        perplexity_cell(row),
        linears_cell(row),
        number(row["quantize_s"], ".1f"),
        f"{row['docs_per_s']:.1f}",
        f"{row['peak_rss_bytes'] / 2**30:.1f}",
    )


def _notes(result: dict[str, Any]) -> list[str]:
    notes = []
    if result["dataset_why"] != "asked for":
        notes.append(f"data: {result['dataset_why']}")
    calibration = result["calibration"]
    if calibration:
        notes.append(
            f"calibrated on {calibration['rows']} rows of {calibration['dataset']} "
            f"({calibration['split']})"
        )
    if any(row["delta"] is not None and row["precision"] == "int8" for row in result["results"]):
        notes.append("delta: points of last-word accuracy against fp32 on the same documents")
    for row in result["results"]:
        if row.get("made_from"):
            notes.append(f"an int8 model that was saved, made from {row['made_from']}")
        if row["precision"] == "int8":
            notes.append(run_note(row))
    return notes
