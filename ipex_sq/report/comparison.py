"""Two results of the benchmark, row by row."""

from __future__ import annotations

from typing import Any

from ipex_sq.errors import DataError

KEYS = ("label", "backend", "precision", "workload", "batch", "tokens", "instances", "cores")

WITHIN = "within the spread"


def compare_results(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that both results have figures of.

    Returns:
        For each: what identifies it, `a_ms` and `b_ms` (p50), `speedup` of the second over the
        first, and the `verdict`: "faster", "slower", or that the difference is within the 90 %
        spread of the runs of either.

    Raises:
        DataError: They share no row.
    """
    others = {_key(row): row for row in second["results"] if "p50_ms" in row}
    rows = []
    for row in first["results"]:
        if "p50_ms" in row and _key(row) in others:
            rows.append(_compared(row, others[_key(row)]))
    if not rows:
        raise DataError("the two results share no row: other models, shapes or instances")
    return rows


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS)


def _compared(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    overlap = a["p05_ms"] <= b["p95_ms"] and b["p05_ms"] <= a["p95_ms"]
    direction = "faster" if b["p50_ms"] < a["p50_ms"] else "slower"
    return {
        **{key: a[key] for key in KEYS},
        "a_ms": a["p50_ms"],
        "b_ms": b["p50_ms"],
        "speedup": a["p50_ms"] / b["p50_ms"],
        "verdict": WITHIN if overlap else direction,
    }
