"""`python -m ipex_sq evaluate`: accuracy of a sequence classifier, in fp32 or int8."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ipex_sq.cli.flags import Parser, build
from ipex_sq.cli.running import check_output, show
from ipex_sq.cli.scales import add_alpha
from ipex_sq.config import EMBEDDED, EvaluationConfig, OutputConfig, QuantConfig
from ipex_sq.errors import ConfigError, IpexSqError
from ipex_sq.review_config import ReviewConfig

DESCRIPTION = """\
Accuracy, F1 and confusion matrix of a sequence classifier on labelled reviews: of an int8 model of
`quantize` beside the fp32 model that it was made of, of a float model, or with --compare of fp32,
bf16, INT8 and INT8+SQ on every backend that can run. stdout ends in one JSON line.
"""

EXAMPLES = """\
  python -m ipex_sq evaluate --model_path results/quantized/embedded
  python -m ipex_sq evaluate --compare
  python -m ipex_sq evaluate --compare --model_path my-classifier --dataset eval.jsonl \\
      --calib_dataset train.jsonl --backend native,ipex,inc
"""

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """The flags of the command."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_flag(
        "model_path",
        default=EMBEDDED,
        help=f"folder of `quantize`, local float model, hub name, or {EMBEDDED} (default)",
    )
    flags.add_flag(
        "baseline",
        help="float model beside an int8 folder, or none (default: the one it was made of)",
    )
    flags.add_flag(
        "compare",
        action="store_true",
        help="fp32 and bf16, then INT8 and INT8+SQ on every backend that can run, or on those that "
        "--backend names (comma-separated; inc and reference run only if named)",
    )
    flags.add_config(QuantConfig, skip=("alpha", "max_drop", "quant_lm_head"))
    add_alpha(flags)
    flags.add_config(ReviewConfig)
    flags.add_config(EvaluationConfig)
    flags.add_config(OutputConfig)
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, run, print.

    Raises:
        IpexSqError: Anything that a user can mend.
    """
    flags = parser().parse_args(arguments)
    data, evaluation = build(ReviewConfig, flags), build(EvaluationConfig, flags)
    _check(flags)
    check_output(flags.output)

    from ipex_sq.evaluation.reviews import ReviewExperiment, load_review_texts
    from ipex_sq.evaluation.runs import Run, pair
    from ipex_sq.models.int8_folders import is_checkpoint
    from ipex_sq.report.classification import classification_report

    folder = Path(flags.model_path) if is_checkpoint(flags.model_path) else None
    runs = _runs(flags) if folder is None else []
    texts = load_review_texts(data, calibrate=any(run.quant for run in runs))
    if folder is None:
        experiment = ReviewExperiment(texts, flags.model_path, data, evaluation=evaluation)
        outcomes = []
        for run in runs:
            outcomes.append(experiment.run(run))
            outcomes[-1].model = None  # one model in memory at a time
    else:
        baseline = _baseline(flags, folder)
        experiment = ReviewExperiment(texts, baseline or "", data, evaluation=evaluation)
        outcomes = [experiment.run(Run("fp32"))] if baseline else []
        outcomes.append(experiment.run_checkpoint(folder))
    if outcomes[0].row["precision"] == "fp32":
        for outcome in outcomes:
            pair(outcome, outcomes[0])
    rows = [outcome.row for outcome in outcomes]
    result = _document(flags.model_path, texts, rows) | {
        "classes": experiment.classes,
        "config": {"data": asdict(data), "evaluation": asdict(evaluation)},
    }
    if experiment.label_mapping:
        result["label_mapping"] = experiment.label_mapping
    show(classification_report(result), result, flags.output)


def _check(flags: argparse.Namespace) -> None:
    from ipex_sq.models.int8_folders import is_checkpoint

    if flags.compare and is_checkpoint(flags.model_path):
        raise ConfigError("--compare quantizes by itself: pass the float model, not an int8 folder")
    if flags.baseline is not None and not is_checkpoint(flags.model_path):
        raise ConfigError("--baseline goes with an int8 folder of `quantize`")
    if not flags.compare:
        for name in ("observer", "percentile", "activations", "weight_rounding", "alpha"):
            default = None if name == "alpha" else getattr(QuantConfig, name)
            if getattr(flags, name) != default:
                raise ConfigError(f"--{name} belongs to quantization: use `quantize`, or --compare")
        if "," in flags.backend:
            raise ConfigError("several backends go with --compare")


def _runs(flags: argparse.Namespace) -> list[Any]:
    from ipex_sq.backends.quantization import check_config
    from ipex_sq.backends.registry import backends_to_compare
    from ipex_sq.evaluation.runs import Run

    if not flags.compare:
        dtype = flags.dtype or "fp32"
        return [Run(dtype, dtype)]
    runs = [Run("fp32"), Run("bf16", "bf16")]
    alpha = QuantConfig.alpha if flags.alpha is None else flags.alpha
    for name in backends_to_compare(flags.backend):
        for label, strength in (("int8", None), ("int8+sq", alpha)):
            quant = build(QuantConfig, flags, backend=name, alpha=strength)
            check_config(quant)
            runs.append(Run(label, quant=quant))
    return runs


def _baseline(flags: argparse.Namespace, folder: Path) -> str | None:
    """The float model that an int8 folder is compared with, or None."""
    from ipex_sq.evaluation.reviews import check_task
    from ipex_sq.models.classifier import load_classifier

    manifest = check_task(folder)
    if flags.baseline is not None:
        return None if flags.baseline == "none" else str(flags.baseline)
    name = str(manifest["made_from"].get("model", ""))
    try:
        load_classifier(name)
    except IpexSqError as error:
        logger.info("no fp32 baseline: %s; --baseline names one", error)
        return None
    return name


def _document(model: str, texts: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from ipex_sq.evaluation.runs import describe_texts
    from ipex_sq.models.classifier import warn_untrained
    from ipex_sq.system import provenance

    return {
        "model": model,
        "problem": "" if rows[-1]["trained_head"] else warn_untrained(model),
        **describe_texts(texts.evaluation, texts.calibration),
        **provenance(),
        "results": rows,
    }
