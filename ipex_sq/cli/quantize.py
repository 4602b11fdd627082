"""`python -m ipex_sq quantize`: a sequence classifier in int8, as a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipex_sq.cli import quantize_streamed
from ipex_sq.cli.flags import Parser, build
from ipex_sq.cli.running import check_output, findable, show
from ipex_sq.cli.scales import add_recipe, add_scales, recipe, with_scales
from ipex_sq.config import EMBEDDED, OutputConfig
from ipex_sq.review_config import ReviewConfig

DESCRIPTION = """\
Quantize a sequence classifier to static INT8 (W8A8), with SmoothQuant unless --no_sq, and save it
in a folder of its name below --output_dir, ready for `evaluate` and `benchmark`. Statistics come
from a file of `generate-scales`, or are gathered now. stdout ends in one JSON line.

With --max_memory it quantizes the folder of a language model instead, one block in memory at a
time: `quantize --max_memory 8GiB --help`. (A language model that fits in memory is quantized and
saved by eval_lambada.py --int8 --sq --output_dir.)
"""

EXAMPLES = """\
  python -m ipex_sq quantize                                   # calibrates, searches alpha
  python -m ipex_sq quantize --act_scales_path act_scales/embedded.json --alpha 0.5
  python -m ipex_sq quantize --model bert-base-uncased --alpha 0.5 \\
      --act_scales_path act_scales/bert-base-uncased.json --output_dir results/quantized
  python -m ipex_sq quantize --max_memory 8GiB --model bloom-7b1   # a language model, in pieces
"""


def parser() -> Parser:
    """The flags of the command."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_flag(
        "model", default=EMBEDDED, help=f"hub name, local folder, or {EMBEDDED} (default)"
    )
    add_scales(flags)
    add_recipe(flags, skip=("quant_lm_head",))
    flags.add_config(ReviewConfig, skip=("limit",))
    flags.add_config(OutputConfig)
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, quantize, save.

    Raises:
        IpexSqError: Anything that a user can mend; nothing is half-written.
    """
    if quantize_streamed.is_meant(arguments):
        quantize_streamed.command(arguments)
        return
    flags = parser().parse_args(arguments)
    config, data = with_scales(recipe(flags), flags), build(ReviewConfig, flags)
    check_output(flags.output)

    from ipex_sq.backends.quantization import check_config, quantize_model
    from ipex_sq.backends.registry import choose_backend
    from ipex_sq.checkpoint.folders import check_writable
    from ipex_sq.checkpoint.saving import check_savable, save
    from ipex_sq.models.classifier import load_classifier, warn_untrained
    from ipex_sq.system import provenance

    check_config(config)
    check_savable(choose_backend(config.backend).backend.name)
    folder = Path(flags.output_dir) / (Path(flags.model).name or EMBEDDED)
    check_writable(folder)
    classifier = load_classifier(flags.model)
    statistics, source = _statistics(flags, classifier, data)
    quantized = quantize_model(classifier.model, statistics, config, source=source)
    made_from = {
        "model": findable(flags.model),
        "trained_head": classifier.trained_head,
        "smoothing_change": quantized.smoothing_change,
        "undone_folds": dict(quantized.undone_folds),
    }
    save(quantized.model, folder, classifier.tokenizer, made_from=made_from)
    problem = "" if classifier.trained_head else warn_untrained(flags.model)
    result = {
        "model": flags.model,
        "folder": str(folder),
        "problem": problem,
        **provenance(),
        **_description(quantized),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }
    groups = ", ".join(f"{count} {kind}" for kind, count in result["smooth_groups"].items())
    table = (
        f"{folder}: {quantized.int8_linears} Linears in int8 on {quantized.backend}, alpha "
        f"{quantized.alpha}, smooth groups: {groups}; {result['bytes'] / 2**20:.1f} MiB, "
        f"{sum(quantized.seconds.values()):.1f} s"
    )
    show(f"{table}\n{problem}".rstrip(), result, flags.output)


def _description(quantized: Any) -> dict[str, Any]:
    return {
        "backend": quantized.backend,
        "alpha": quantized.alpha,
        "int8_linears": quantized.int8_linears,
        "smooth_groups": quantized.plan.placements,
        "undone_folds": dict(quantized.undone_folds),
        "seconds": quantized.seconds,
    }


def _statistics(flags: argparse.Namespace, classifier: Any, data: ReviewConfig) -> tuple[Any, Any]:
    """Statistics or batches to quantize with, and where they came from."""
    from ipex_sq.evaluation.reviews import calibration_reviews, review_batches, review_source
    from ipex_sq.models.calibration import stats_from_file

    path: Path | None = flags.act_scales_path
    if path is None:
        texts = calibration_reviews(data)
        return review_batches(classifier, texts, data), review_source(texts, data)
    return stats_from_file(classifier.model, path, classifier.tokenizer), None
