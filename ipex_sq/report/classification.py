"""The table of a classifier's accuracy."""

from __future__ import annotations

from typing import Any

from ipex_sq.report.rows import alpha_cell, linears_cell, number, run_note
from ipex_sq.report.tables import format_table

HEADER = (
    "model", "backend", "alpha", "accuracy", "+-", "F1", "delta", "gained/lost",
    "int8/float Linears", "quantize s", "docs/s", "peak GiB",
)  # fmt: skip


def classification_report(result: dict[str, Any]) -> str:
    """Render the JSON document of a classification run as text."""
    system, rows = result["system"], result["results"]
    title = (
        f"{result['model']} on {result['dataset']} ({result['dataset_split']}), "
        f"{result['rows']} reviews of classes {', '.join(result['classes'])}\n"
        f"{system['cpu']}, {system['threads']} threads, {system['isa']}"
    )
    table = format_table(HEADER, [_cells(row) for row in rows])
    return "\n".join([title, "", table, "", *_notes(result)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    paired = row["delta"] is not None
    return (
        row["label"],
        row["backend"],
        alpha_cell(row),
        f"{100 * row['accuracy']:.2f} %",
        f"{100 * row['stderr']:.2f}",
        f"{row['f1']:.4f}",
        f"{row['delta']:+.2f}" if paired else "-",
        f"{row['gained']}/{row['lost']}" if paired else "-",
        linears_cell(row),
        number(row["quantize_s"], ".1f"),
        f"{row['docs_per_s']:.1f}",
        f"{row['peak_rss_bytes'] / 2**30:.1f}",
    )


def _notes(result: dict[str, Any]) -> list[str]:
    notes = [result["problem"]] if result["problem"] else []
    mapping = result.get("label_mapping")
    if mapping:
        named = ", ".join(
            f"{label} is the model's class {index} ({name})"
            for (label, index), name in zip(mapping.items(), result["classes"], strict=True)
        )
        notes.append(f"labels by name: {named}")
    if result["dataset_why"] != "asked for":
        notes.append(f"data: {result['dataset_why']}")
    calibration = result["calibration"]
    if calibration:
        notes.append(f"calibrated on {calibration['rows']} reviews of {calibration['dataset']}")
    for row in result["results"]:
        notes.append(
            f"{row['label']} {row['backend']}: confusion matrix (true by predicted) "
            f"{row['confusion_matrix']}"
        )
        if row["precision"] == "int8":
            notes.append(run_note(row))
    truncated = result["results"][0]["truncated"]
    most = result["config"]["data"]["max_length"]
    notes.append(f"{truncated} of {result['rows']} reviews cut to {most} tokens")
    if any(row["delta"] is not None and row["precision"] == "int8" for row in result["results"]):
        notes.append("delta: points of accuracy against fp32 on the same reviews")
    return notes
