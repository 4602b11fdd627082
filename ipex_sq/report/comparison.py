"""Two results of the benchmark, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ipex_sq.errors import ConfigError, DataError

TEXTS = ("label", "backend", "precision", "workload")
COUNTS = ("batch", "tokens", "instances", "cores")
KEYS = (*TEXTS, *COUNTS)
TIMES = ("p50_ms", "p05_ms", "p95_ms")

SETTINGS = {
    "prefill": ("batch_size", "sequence_length", "logits", "padded"),
    "classify": ("batch_size", "sequence_length", "padded"),
    "decode": ("batch_size", "sequence_length", "new_tokens"),
    "lambada": ("batch_size",),
}
"""What decides on the work of a run, by workload; the others have no use in it."""

MEASURING = ("rounds", "min_runs", "min_seconds", "warmup", "seed", "cores", "numa")
DATASET = ("dataset", "dataset_split", "dataset_sha256", "rows")
MACHINE = ("cpu", "isa", "bf16", "cores", "threads", "allocator", "platform")

WITHIN = "within the spread"
TOO_FEW = "too few runs"
ENOUGH_RUNS = 5
"""Of each. Up to 19 runs the spread is all of them, and n and n runs of one and the same speed lie
apart by chance in 2 (n!)^2 / (2n)! of all cases: always for one, 10 % for three, below 1 % for
five."""


def check_result(document: Any, name: str) -> dict[str, Any]:
    """The document, if it holds what a comparison reads.

    Args:
        document: JSON.
        name: Of its file, for messages.

    Raises:
        DataError: Names the file and the key that is missing or of another type.
    """
    checked = _Checked(name)
    result = checked.entry({"": document}, "", dict)
    checked.entry(result, "model", str)
    for key in ("config", "system", "versions"):
        checked.entry(result, key, dict)
    if not checked.entry(result, "results", list):
        raise checked.error("'results' is empty")
    for number, row in enumerate(result["results"]):
        checked.row(row, f"results[{number}].")
    workload = result["results"][0]["workload"]
    if workload not in SETTINGS:
        raise checked.error(f"workload {workload!r} is unknown")
    for key in (*SETTINGS[workload], *(("seed",) if result["config"].get("padded") else ())):
        kind = {"logits": str, "padded": bool}.get(key, int)
        checked.entry(result["config"], key, kind, within="config.")
    return dict(result)


class _Checked:
    """Reads one file's document."""

    def __init__(self, name: str) -> None:
        self.name = name

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.name} is no result of benchmark.py: {problem}")

    def entry(self, holder: Mapping[str, Any], key: str, kind: type, within: str = "") -> Any:
        path = f"{within}{key}" or "the document"
        if key not in holder:
            raise self.error(f"{path!r} is missing")
        value = holder[key]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            wanted, found = kind.__name__, type(value).__name__
            raise self.error(f"{path!r} must be {wanted}, not {found}")
        return value

    def row(self, row: Any, path: str) -> None:
        self.entry({path.rstrip("."): row}, path.rstrip("."), dict)
        for key in TEXTS:
            self.entry(row, key, str, path)
        for key in COUNTS:
            self.entry(row, key, int, path)
        if row.get("reason") and "p50_ms" not in row:
            return
        if row.get("head") is not None:
            self.entry(row, "head", str, path)
        self.entry(row, "runs", int, path)
        for key in TIMES:
            if not 0 < self.entry(row, key, float, path) < float("inf"):
                raise self.error(f"'{path}{key}' is no time: {row[key]}")


def compare_results(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that both results have figures of.

    Args:
        first: As `check_result` leaves it.
        second: The same.

    Returns:
        For each: what identifies it, `a_ms` and `b_ms` (p50), `speedup` of the second over the
        first, and the `verdict`: "faster", "slower", that the difference is within the 90 %
        spread of the runs of either, or that these are too few to tell.

    Raises:
        ConfigError: They are of other models, workloads or data.
        DataError: They share no row.
    """
    _check_same_work(first, second)
    others = {_key(row): row for row in second["results"] if "p50_ms" in row}
    rows = []
    for row in first["results"]:
        if "p50_ms" in row and _key(row) in others:
            rows.append(_compared(row, others[_key(row)]))
    if not rows:
        raise DataError("the two results share no row: other models, backends or heads")
    return rows


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What differs of machine, versions and measuring: both values, None where there is none."""
    wanted = {"system": MACHINE, "config": MEASURING}
    wanted["versions"] = tuple(dict.fromkeys((*first["versions"], *second["versions"])))
    return {
        f"{part}.{key}": [first[part].get(key), second[part].get(key)]
        for part in ("system", "versions", "config")
        for key in wanted[part]
        if first[part].get(key) != second[part].get(key)
    }


def _check_same_work(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    a, b = _work(first), _work(second)
    other = [
        f"{key} ({a.get(key)} and {b.get(key)})" for key in {**a, **b} if a.get(key) != b.get(key)
    ]
    if other:
        raise ConfigError(f"the two results are of different work: {', '.join(other)}")


def _work(result: Mapping[str, Any]) -> dict[str, Any]:
    """What two results must have in common."""
    row, config = result["results"][0], result["config"]
    found = {"model": result["model"], "workload": row["workload"]}
    found |= {key: config[key] for key in SETTINGS[row["workload"]]}
    if config.get("padded") and "padded" in found:
        found["seed"] = config["seed"]  # it draws the lengths
    found |= {key: row[key] for key in ("instances", "cores")}
    return found | {key: result[key] for key in DATASET if key in result}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the row is of. Files of before did not say what the head of an int8 model was."""
    head = row.get("head")
    if head is None and row["precision"] != "int8":
        head = row["precision"]
    return (*(row[key] for key in KEYS), head)


def _compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    overlap = a["p05_ms"] <= b["p95_ms"] and b["p05_ms"] <= a["p95_ms"]
    direction = "faster" if b["p50_ms"] < a["p50_ms"] else "slower"
    verdict = WITHIN if overlap else direction
    return {
        **{key: a[key] for key in KEYS},
        "head": a.get("head") or b.get("head"),
        "a_ms": a["p50_ms"],
        "b_ms": b["p50_ms"],
        "speedup": a["p50_ms"] / b["p50_ms"],
        "verdict": TOO_FEW if min(a["runs"], b["runs"]) < ENOUGH_RUNS else verdict,
    }
