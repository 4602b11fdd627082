"""The tables of the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ipex_sq.report.rows import missing_notes, ratio, share
from ipex_sq.report.tables import format_table

HEADER = (
    "model", "backend", "p50 ms", "p90", "min", "90 % spread", "vs fp32", "vs best bf16",
    "tokens/s", "of the limit", "gemm / attn / elem / other", "setup s", "peak GiB",
)  # fmt: skip
DECODE_HEADER = (
    "model", "backend", "TTFT ms", "TPOT ms", "p50 ms", "90 % spread", "vs fp32", "vs best bf16",
    "tokens/s", "of the limit", "gemm / attn / elem / other", "setup s", "peak GiB",
)  # fmt: skip

LAMBADA_HEADER = (
    "model", "backend", "last word", "SE", "batch ms", "90 % spread", "vs fp32", "vs best bf16",
    "documents/s", "of the limit", "gemm / attn / elem / other", "setup s", "peak GiB",
)  # fmt: skip


def latency_report(result: dict[str, Any]) -> str:
    """Render the JSON document of a benchmark as text."""
    rows = result["results"]
    timed = [row for row in rows if not row["reason"]]
    headers = {"decode": DECODE_HEADER, "lambada": LAMBADA_HEADER}
    lines = [*_title(result), ""]
    header = headers.get(result["config"]["workload"], HEADER)
    lines.append(format_table(header, [_cells(row) for row in timed]))
    lines += missing_notes(rows)
    unknown = [row["limit_unknown"] for row in timed if row.get("limit_unknown")]
    lines += [f"share of the limit unknown: {reason}" for reason in dict.fromkeys(unknown)]
    lines.append(_limits(result["limits"]))
    return "\n".join(lines)


def _title(result: dict[str, Any]) -> list[str]:
    config, system = result["config"], result["system"]
    row = result["results"][0]
    what = f"{row['workload']} of {row['batch']} x {row['tokens']} tokens"
    if config["padded"]:
        what += ", padded"
    if row["workload"] == "decode":
        what += f", {config['new_tokens']} new ones"
    elif row["workload"] == "lambada":
        what = f"{result['rows']} documents of {result['dataset']}, {row['batch']} a batch"
    elif row["workload"] == "prefill":
        what += f", {config['logits']} logits"
    instances = f"{row['instances']} instance(s) x {row['cores']} core(s)"
    return [
        f"{result['model']}: {what}, {instances}, {config['rounds']} rounds",
        f"{system['cpu']}, {system['isa']}, allocator {system['allocator']}",
        *(f"note: {note}" for note in result.get("notes", [])),
    ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{row['p50_ms']:.0f}", f"{row['p90_ms']:.0f}", f"{row['min_ms']:.0f}")
    rate = row["tokens_per_s"]
    if "tpot_ms" in row:
        times = (f"{row['ttft_ms']:.1f}", f"{row['tpot_ms']:.1f}", f"{row['p50_ms']:.0f}")
    if "docs_per_s" in row:
        accuracy = (f"{row['accuracy']:.2%}", f"{row['accuracy_stderr']:.2%}")
        times, rate = (*accuracy, f"{row['p50_ms']:.0f}"), row["docs_per_s"]
    return (
        row["label"],
        backend_and_head(row),
        *times,
        f"{row['p05_ms']:.0f}-{row['p95_ms']:.0f}",
        ratio(row["speedup_vs_fp32"]),
        ratio(row["speedup_vs_bf16"]),
        f"{rate:.1f}",
        share(row["limit_share"]),
        " / ".join(f"{100 * part:.0f}" for part in row["breakdown"].values()) or "-",
        f"{row['setup_s']:.1f}",
        f"{row['peak_rss_bytes'] / 2**30:.1f}",
    )


def backend_and_head(row: Mapping[str, Any]) -> str:
    """The backend, and that its head is int8 where it is: a good part of a small model's work."""
    return f"{row['backend']}, int8 head" if row.get("head") == "int8" else str(row["backend"])


def _limits(limits: dict[str, Any]) -> str:
    int8 = limits["int8_gops"]
    parts = [] if int8 is None else [f"int8 {int8:.0f} GOP/s"]
    parts += [f"{name} {limits[f'{name}_gflops']:.0f} GFLOP/s" for name in ("bf16", "fp32")]
    parts.append(f"{limits['bandwidth_gbs']:.0f} GB/s")
    return f"limits measured in this run: {', '.join(parts)}"


def comparison_report(
    names: tuple[str, str], other: Mapping[str, Sequence[Any]], rows: Sequence[Mapping[str, Any]]
) -> str:
    """Render what `compare` found: two results side by side, `other` than the code that ran."""
    header = (
        "model", "backend", "workload", "batch x tokens", "A ms", "B ms", "B vs A", "verdict",
    )  # fmt: skip
    cells = [
        (
            row["label"],
            backend_and_head(row),
            row["workload"],
            f"{row['batch']} x {row['tokens']}",
            f"{row['a_ms']:.1f}",
            f"{row['b_ms']:.1f}",
            f"{row['speedup']:.2f}x",
            row["verdict"],
        )
        for row in rows
    ]
    notes = [f"{name} differs: A {a}, B {b}" for name, (a, b) in other.items()]
    return "\n".join([f"A: {names[0]}", f"B: {names[1]}", *notes, "", format_table(header, cells)])
