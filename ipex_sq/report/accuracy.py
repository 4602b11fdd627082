"""The accuracy table, and the lines under it that say what was run."""

from __future__ import annotations

from typing import Any

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
        _alpha(row),
        f"{100 * row['last_word_accuracy']:.2f} %",
        f"{100 * row['stderr']:.2f}",
        f"{row['delta']:+.2f}" if paired else "-",
        f"{row['gained']}/{row['lost']}" if paired else "-",
        f"{100 * row['last_token_accuracy']:.2f} %",
        f"{row['perplexity']:.2f}",
        _linears(row),
        _number(row["quantize_s"], ".1f"),
        f"{row['docs_per_s']:.1f}",
        f"{row['peak_rss_bytes'] / 2**30:.1f}",
    )


def _alpha(row: dict[str, Any]) -> str:
    if isinstance(row["alpha"], str):
        low, high = row["alpha_range"]
        return f"{row['alpha']} {low:g}-{high:g}"
    return _number(row["alpha"], "g")


def _linears(row: dict[str, Any]) -> str:
    return "-" if row["precision"] != "int8" else f"{row['int8_linears']}/{row['float_linears']}"


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


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
        if row["precision"] == "int8":
            notes.append(_run_note(row))
    return notes


def _run_note(row: dict[str, Any]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in row["float_reasons"].items())
    groups = row["smooth_groups"]
    smoothing = ""
    if row["alpha"] is not None and groups:
        counts = ", ".join(f"{count} {placement}" for placement, count in groups.items())
        smoothing = f"; smooth groups: {counts}; float change {row['smoothing_change']:.1e}"
    if row["expected_kl"] is not None:
        smoothing += f"; expected KL to fp32 {row['expected_kl']:.3f} nats a token"
    for problem in row["undone_folds"].values():
        smoothing += f"; pre-scaled instead: {problem}"
    per_token = ", ".join(f"{count} {why}" for why, count in row["dynamic_reasons"].items())
    return (
        f"{row['label']} {row['backend']} ({row['backend_why']}): {row['kernels']}, "
        f"{row['dtype']} elsewhere; rounded per token: {per_token or 'none'}; "
        f"float: {reasons or 'none'}{smoothing}"
    )
