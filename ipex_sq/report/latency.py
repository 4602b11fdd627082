"""The latency table."""

from __future__ import annotations

from typing import Any

from ipex_sq.report.tables import format_table

HEADER = (
    "model", "backend", "median ms", "p90", "min", "vs fp32", "vs best bf16", "tokens/s",
    "Linear GOP/s", "prepare s", "peak GiB",
)  # fmt: skip


def latency_report(result: dict[str, Any]) -> str:
    """Render the JSON document of a forward benchmark as text."""
    config, system = result["config"], result["system"]
    padded = ", padded" if config["padded"] else ""
    title = (
        f"{result['model']}: forward of {config['batch_size']} x {config['sequence_length']} "
        f"tokens{padded}, {config['logits']} logits, median of {config['iterations']}\n"
        f"{system['cpu']}, {system['threads']} threads, {system['isa']}"
    )
    return "\n".join([title, "", format_table(HEADER, [_cells(row) for row in result["results"]])])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["label"],
        row["backend"],
        f"{row['median_ms']:.0f}",
        f"{row['p90_ms']:.0f}",
        f"{row['min_ms']:.0f}",
        f"{row['speedup_vs_fp32']:.2f}x",
        f"{row['speedup_vs_best_bf16']:.2f}x",
        f"{row['tokens_per_s']:.0f}",
        f"{row['linear_gops']:.0f}",
        f"{row['prepare_s']:.1f}",
        f"{row['peak_rss_bytes'] / 2**30:.1f}",
    )
