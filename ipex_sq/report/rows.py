"""What all accuracy tables say of a row: alpha, Linears, and how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def alpha_cell(row: dict[str, Any]) -> str:
    """The alpha, or the range of the groups' alphas."""
    if isinstance(row["alpha"], str):
        low, high = row["alpha_range"]
        return f"{row['alpha']} {low:g}-{high:g}"
    return number(row["alpha"], "g")


def linears_cell(row: dict[str, Any]) -> str:
    """Linears in int8 / in float."""
    return "-" if row["precision"] != "int8" else f"{row['int8_linears']}/{row['float_linears']}"


def perplexity_cell(row: Mapping[str, Any]) -> str:
    """The perplexity; None in a result stands for infinity."""
    value = row["perplexity"]
    return "inf" if value is None else f"{value:.2f}"


def number(value: float | None, style: str) -> str:
    """The number, or "-" where there is none."""
    return "-" if value is None else format(value, style)


def run_note(row: dict[str, Any]) -> str:
    """A line on an int8 row: kernels, what is not static int8 and why, smoothing."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in row["float_reasons"].items())
    groups = row["smooth_groups"]
    smoothing = ""
    if row["alpha"] is not None and groups:
        counts = ", ".join(f"{count} {placement}" for placement, count in groups.items())
        smoothing = f"; smooth groups: {counts}"
        if row["smoothing_change"] is not None:
            smoothing += f"; float change {row['smoothing_change']:.1e}"
    if row["expected_kl"] is not None:
        smoothing += f"; expected KL to fp32 {row['expected_kl']:.3f} nats a token"
    for problem in row["undone_folds"].values():
        smoothing += f"; pre-scaled instead: {problem}"
    per_token = ", ".join(f"{count} {why}" for why, count in row["dynamic_reasons"].items())
    if row["weight_rounding"] != "nearest":
        smoothing += f"; weights by {row['weight_rounding'].upper()}"
    return (
        f"{row['label']} {row['backend']} ({row['backend_why']}): {row['kernels']}, "
        f"{row['dtype']} elsewhere; rounded per token: {per_token or 'none'}; "
        f"float: {reasons or 'none'}{smoothing}"
    )


def ratio(value: float | None) -> str:
    """A speedup, or "-" where there is no baseline."""
    return "-" if value is None else f"{value:.2f}x"


def share(value: float | None) -> str:
    """Of the limit, or "-" where that is unknown."""
    return "-" if value is None else f"{value:.0%}"


def missing_notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why rows have no figures, a line for each."""
    return [
        f"{row['label']} {row['backend']}: no figures: {row['reason']}"
        for row in rows
        if row.get("reason")
    ]
