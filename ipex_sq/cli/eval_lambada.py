"""The command behind eval_lambada.py: LAMBADA accuracy of fp32, INT8 and INT8 + SmoothQuant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ipex_sq.checkpoint.folders import COMPRESSED_TENSORS, QUANT_METHOD
from ipex_sq.cli.flags import Parser, build
from ipex_sq.cli.running import check_output, findable, show
from ipex_sq.cli.scales import add_alpha, add_scales, chosen_alpha, with_scales
from ipex_sq.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OutputConfig,
    QuantConfig,
    flag_settings,
)
from ipex_sq.distributed import processes, rank
from ipex_sq.errors import ConfigError
from ipex_sq.report.rows import perplexity_cell

DESCRIPTION = """\
LAMBADA accuracy of a causal language model on this CPU: in fp32, in static INT8 (W8A8), or in
INT8 with SmoothQuant. Calibration and evaluation rows are disjoint. stdout ends in one JSON line.
"""

EXAMPLES = """\
  python eval_lambada.py                                            # embedded model, fp32
  python eval_lambada.py --int8 --sq                                # embedded model, SmoothQuant
  python eval_lambada.py --compare                                  # all of them in one table
  python eval_lambada.py --model_name_or_path bigscience/bloom-560m --int8 --sq --alpha 0.5
  python eval_lambada.py --int8 --sq --backend native --output_dir  # and save the int8 model
  python eval_lambada.py --model_path saved_results/embedded-native-int8-sq   # score it again
  torchrun --nproc-per-node 2 eval_lambada.py --int8 --sq           # shared by two processes
  python eval_lambada.py --model_name_or_path facebook/opt-1.3b --int8 --sq --alpha 0.5 \\
      --act_scales_path act_scales/opt-1.3b.json                    # of import-scales
  python eval_lambada.py --dataset my.jsonl --calib_dataset other.jsonl --int8
"""

SAVED_RESULTS = Path("saved_results")
DEFAULT_FOLDER = SAVED_RESULTS / "<model>-<backend>-<recipe>"
"""Stands for a name that is made of the run."""

INT8_ONLY = (
    *("observer", "percentile", "activations", "weight_rounding", "max_drop"),
    *("quant_lm_head", "portable", "backend"),
)
"""Settings that a float run would ignore. Those of calibration stay: a baseline is often the same
command without --int8."""


def parser() -> Parser:
    """The flags of eval_lambada.py."""
    flags = Parser(DESCRIPTION, EXAMPLES, shared=True)
    flags.add_config(ModelConfig)
    flags.add_flag(
        "model_path",
        type=Path,
        help="score an int8 folder of --output_dir or `quantize --max_memory` as it is: no float "
        "model, no calibration",
    )
    flags.add_flag("int8", action="store_true", help="quantize to static INT8 (W8A8)")
    flags.add_flag("sq", action="store_true", help="with SmoothQuant (needs --int8)")
    flags.add_flag(
        "compare",
        action="store_true",
        help="fp32, then INT8 and INT8+SQ on every backend that can run, or on those that "
        "--backend names (comma-separated; inc and reference run only if named)",
    )
    flags.add_config(QuantConfig, skip=("alpha",))
    add_alpha(flags)
    add_scales(flags)
    flags.add_flag("kl", action="store_true", help="the same as --observer kl")
    flags.add_config(DataConfig)
    flags.add_config(EvaluationConfig)
    flags.add_flag(
        "output_dir",
        type=Path,
        nargs="?",
        const=DEFAULT_FOLDER,
        default=None,
        help=f"save the int8 model (default folder: {DEFAULT_FOLDER})",
    )
    flags.add_flag(
        "format",
        choices=(QUANT_METHOD, COMPRESSED_TENSORS),
        default=QUANT_METHOD,
        help=f"of the saved model: {QUANT_METHOD}, which runs here and in transformers (default), "
        f"or {COMPRESSED_TENSORS}, for other programs (native backend; every smoothing scale must "
        "fold; what stays float is fp32 unless --dtype says otherwise)",
    )
    flags.add_config(OutputConfig)
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, run, print.

    Raises:
        IpexSqError: Anything that a user can mend; nothing is half-written.
    """
    flags = parser().parse_args(arguments)
    _check(flags)
    model, data = build(ModelConfig, flags), build(DataConfig, flags)
    evaluation = build(EvaluationConfig, flags)
    runs = _runs(flags)
    folder = None
    if rank() == 0:  # it alone writes
        folder = _output_folder(flags, runs)
        check_output(flags.output)

    from ipex_sq.evaluation.experiment import Experiment, load_texts
    from ipex_sq.evaluation.runs import pair

    scales = flags.act_scales_path
    texts = load_texts(data, calibrate=scales is None and any(run.quant for run in runs))
    experiment = Experiment(texts, model, data, evaluation=evaluation, scales=scales)
    outcomes = []
    if flags.model_path is not None:
        outcomes.append(experiment.run_checkpoint(flags.model_path))
    for run in runs:
        outcome = experiment.run(run)
        if folder is not None:
            outcome.row["saved_to"] = _save(outcome, folder, flags, texts)
        outcome.model = None  # one model in memory at a time
        outcomes.append(outcome)
        if outcomes[0].row["precision"] == "fp32":
            pair(outcome, outcomes[0])
    settings = {name: asdict(item) for name, item in (("data", data), ("evaluation", evaluation))}
    rows = [outcome.row for outcome in outcomes]
    name = str(flags.model_path or model.model_name_or_path)
    result = _document(name, texts, rows) | {"config": settings}
    show(_table(result), result, flags.output)


def _save(outcome: Any, folder: Path, flags: argparse.Namespace, texts: Any) -> str:
    """Write the int8 model; returns its folder."""
    from ipex_sq.checkpoint.compressed import save_compressed
    from ipex_sq.checkpoint.saving import save

    made_from = {
        "model": findable(flags.model_name_or_path),
        "smoothing_change": outcome.row["smoothing_change"],
        "undone_folds": outcome.row["undone_folds"],
        "measured": _measured(outcome.row, texts),
    }
    write = save_compressed if flags.format == COMPRESSED_TENSORS else save
    return str(write(outcome.model, folder, outcome.tokenizer, made_from=made_from))


def _measured(row: dict[str, Any], texts: Any) -> dict[str, Any]:
    """What the model card of a saved model says of its accuracy."""
    shares = ("last_word_accuracy", "last_token_accuracy")
    return {
        "dataset": f"{texts.evaluation.name}, {len(texts.evaluation.documents)} documents",
        **{name: f"{row[name]:.2%}" for name in shares},
        "perplexity": perplexity_cell(row),
    }


def _check(flags: argparse.Namespace) -> None:
    if flags.compare and (flags.int8 or flags.sq):
        raise ConfigError("--compare runs fp32, INT8 and INT8+SQ by itself: leave --int8 --sq out")
    if flags.sq and not flags.int8:
        raise ConfigError("--sq smooths for INT8: add --int8")
    if flags.alpha is not None and not (flags.sq or flags.compare):
        raise ConfigError("--alpha belongs to SmoothQuant: add --int8 --sq")
    if flags.kl:
        flags.observer = "kl"
    if not (flags.int8 or flags.compare or flags.model_path):
        for name in INT8_ONLY:
            if getattr(flags, name) != getattr(QuantConfig, name):
                flag = "kl" if flags.kl and name == "observer" else name
                raise ConfigError(f"--{flag} belongs to INT8: add --int8")
    if flags.percentile != QuantConfig.percentile and flags.observer != "percentile":
        raise ConfigError("--percentile belongs to --observer percentile")
    if flags.act_scales_path is not None and not (flags.int8 or flags.compare):
        raise ConfigError("--act_scales_path belongs to INT8: add --int8")
    if flags.output_dir is not None and not flags.int8:
        raise ConfigError("--output_dir saves one int8 model: add --int8")
    _check_format(flags)
    _check_model(flags)
    if "," in flags.backend and not flags.compare:
        raise ConfigError("several backends go with --compare")


def _check_model(flags: argparse.Namespace) -> None:
    """Refuse an int8 folder as a float model, and what cannot be asked of an int8 folder."""
    from ipex_sq.checkpoint.folders import read_manifest
    from ipex_sq.models.int8_folders import refuse_int8

    if flags.model_path is None:
        refuse_int8(flags.model_name_or_path)
        return
    if flags.int8 or flags.compare:
        raise ConfigError(
            f"--{'compare' if flags.compare else 'int8'} quantizes a float model: --model_path is "
            "an int8 folder already"
        )
    for config in (ModelConfig, QuantConfig):
        for setting in flag_settings(config):
            if setting.name != "alpha" and getattr(flags, setting.name) != setting.default:
                raise ConfigError(f"--{setting.name} has no use with --model_path: leave it out")
    read_manifest(flags.model_path)  # refused before any data set is loaded


def _check_format(flags: argparse.Namespace) -> None:
    if flags.format != COMPRESSED_TENSORS:
        return
    if flags.output_dir is None:
        raise ConfigError("--format is that of a saved model: add --output_dir")
    if flags.backend != "native":
        raise ConfigError(f"--format {COMPRESSED_TENSORS} goes with --backend native")
    flags.portable = True
    # Loaded in bf16 its scales are rounded to bf16, and it is not the model that was measured.
    flags.dtype = flags.dtype or "fp32"


def _runs(flags: argparse.Namespace) -> list[Any]:
    from ipex_sq.backends.quantization import check_config
    from ipex_sq.backends.registry import backends_to_compare
    from ipex_sq.evaluation.runs import Run

    alpha = chosen_alpha(flags)
    if flags.compare:
        runs = [Run("fp32")]
        for name in backends_to_compare(flags.backend):
            for label, strength in (("int8", None), ("int8+sq", alpha)):
                quant = with_scales(build(QuantConfig, flags, backend=name, alpha=strength), flags)
                check_config(quant)  # fail before any model is loaded
                runs.append(Run(label, quant=quant))
        return runs
    if flags.model_path is not None:
        return []
    if not flags.int8:
        dtype = flags.dtype or "fp32"
        return [Run(dtype, dtype)]
    quant = with_scales(build(QuantConfig, flags, alpha=alpha if flags.sq else None), flags)
    check_config(quant)
    return [Run("int8+sq" if flags.sq else "int8", quant=quant)]


def _output_folder(flags: argparse.Namespace, runs: list[Any]) -> Path | None:
    if flags.output_dir is None:
        return None
    from ipex_sq.backends.registry import choose_backend
    from ipex_sq.checkpoint.folders import check_writable
    from ipex_sq.checkpoint.saving import check_savable

    backend = choose_backend(runs[0].quant.backend).backend.name
    check_savable(backend)
    folder: Path = flags.output_dir
    if folder == DEFAULT_FOLDER:
        recipe = runs[0].label.replace("+", "-")
        folder = SAVED_RESULTS / f"{Path(flags.model_name_or_path).name}-{backend}-{recipe}"
    check_writable(folder)
    return folder


def _document(model: str, texts: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from ipex_sq.evaluation.runs import describe_texts
    from ipex_sq.system import provenance

    return {
        "model": model,
        **describe_texts(texts.evaluation, texts.calibration),
        **provenance(),
        "processes": processes(),
        "results": rows,
    }


def _table(result: dict[str, Any]) -> str:
    from ipex_sq.report.accuracy import accuracy_report

    return accuracy_report(result)
