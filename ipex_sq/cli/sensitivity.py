"""`python -m ipex_sq sensitivity`: which Linears lose most in int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ipex_sq.cli.flags import Parser, build
from ipex_sq.cli.running import check_output, show
from ipex_sq.cli.scales import add_alpha
from ipex_sq.config import DataConfig, ModelConfig, OutputConfig, QuantConfig
from ipex_sq.errors import ConfigError

DESCRIPTION = """\
Rank the Linears of a model by the damage that each does when it alone runs in int8: SQNR of its
block's output and of the logits (dB, higher is better) and KL divergence of the predictions (nats
per token, lower is better). Simulated in float, on calibration texts. stdout ends in one JSON line.
"""

EXAMPLES = """\
  python -m ipex_sq sensitivity                    # embedded model, plain INT8
  python -m ipex_sq sensitivity --sq               # with SmoothQuant and searched alphas
  python -m ipex_sq sensitivity --sq --alpha 0.5 --texts 8 --output ranking.json
"""

SHOWN = 20


def parser() -> Parser:
    """The flags of the command."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_config(ModelConfig)
    flags.add_flag("sq", action="store_true", help="with SmoothQuant")
    add_alpha(flags)
    flags.add_config(
        QuantConfig,
        skip=("alpha", "backend", "dtype", "observer", "percentile", "max_drop"),
    )
    flags.add_config(DataConfig, skip=("limit",))
    flags.add_flag("texts", type=int, default=4, help="texts to measure on (default: 4)")
    flags.add_config(OutputConfig)
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, measure, print.

    Raises:
        IpexSqError: Anything that a user can mend.
    """
    flags = parser().parse_args(arguments)
    if flags.alpha is not None and not flags.sq:
        raise ConfigError("--alpha belongs to SmoothQuant: add --sq")
    if flags.texts < 1:
        raise ConfigError(f"--texts must be at least 1, not {flags.texts}")
    alpha = (QuantConfig.alpha if flags.alpha is None else flags.alpha) if flags.sq else None
    quant = build(QuantConfig, flags, alpha=alpha, backend="reference")
    model, data = build(ModelConfig, flags), build(DataConfig, flags)
    check_output(flags.output)

    from ipex_sq.evaluation.experiment import load_texts
    from ipex_sq.evaluation.runs import describe
    from ipex_sq.evaluation.sensitivity import measure_sensitivity
    from ipex_sq.report.tables import format_table
    from ipex_sq.system import provenance

    texts = load_texts(replace(data, limit=1), calibrate=True).calibration
    assert texts is not None  # noqa: S101
    damages = measure_sensitivity(model, quant, (texts, data.calib_max_tokens, flags.texts))
    rows = [damage.as_dict() for damage in damages]
    result = {
        "model": model.model_name_or_path,
        "alpha": alpha,
        "texts": flags.texts,
        "calibration": describe(texts),
        **provenance(),
        "results": rows,
    }
    header = ("Linear", "mode", "block SQNR dB", "logits SQNR dB", "KL nats")
    table = format_table(header, [_cells(row) for row in rows[:SHOWN]])
    total = sum(row["kl"] for row in rows)
    note = f"{len(rows)} Linears, the worst {min(SHOWN, len(rows))} shown; sum of KL {total:.4f}"
    show(f"{table}\n\n{note}", result, flags.output)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    block = row["block_sqnr_db"]
    return (
        row["linear"],
        row["mode"],
        "-" if block is None else f"{block:.1f}",
        f"{row['logits_sqnr_db']:.1f}",
        f"{row['kl']:.5f}",
    )
