"""The command behind benchmark.py: forward-pass latency of fp32, bf16 and int8."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ipex_sq.benchmark_config import LAMBADA, PEERS, BenchmarkConfig, parse_peers
from ipex_sq.cli.flags import Parser, build
from ipex_sq.cli.running import check_output, show
from ipex_sq.config import (
    BACKENDS,
    RANDOM_SHAPES,
    DataConfig,
    ModelConfig,
    OutputConfig,
    QuantConfig,
    setting_help,
)
from ipex_sq.errors import ConfigError

DESCRIPTION = """\
Speed of one model on this CPU: fp32 and bf16 as transformers runs them, bf16 compiled per layer,
and with --int8 the int8 model of every backend that can run. Each lives in a process of its own;
they take turns in rotated order (docs/protocol.md). stdout ends in one JSON line.
"""

EXAMPLES = """\
  python benchmark.py --int8                              # embedded model
  python benchmark.py --compare                           # fp32, bf16, INT8 and INT8 + SmoothQuant
  python benchmark.py --model_name_or_path bigscience/bloom-560m --int8
  python benchmark.py --int8 --sq --backend native --batch_size 1 --sequence_length 512
  python benchmark.py --int8 --sq --backend native --quant_lm_head
  python benchmark.py --int8 --workload decode --batch_size 1 --sequence_length 32
  python benchmark.py --compare --workload lambada        # accuracy and documents/s in one table
  python benchmark.py --int8 --sq --peers openvino,onnxruntime,ctranslate2,pt2e
  python benchmark.py --int8 --num_instances 2 --cores_per_instance 1
  python benchmark.py --int8 --preset latency             # single texts, 4 cores each, side by side
  python -m ipex_sq benchmark --model_path results/quantized/embedded --batch_size 8 \\
      --sequence_length 128 --padded
  python -m ipex_sq benchmark --random_weights bert-base --int8 --batch_size 8 \\
      --sequence_length 128
"""


def parser() -> Parser:
    """The flags of benchmark.py."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_config(ModelConfig)
    flags.add_flag(
        "model_path",
        help="an int8 folder of eval_lambada.py or `quantize`, beside the float model that it was "
        "made from; or a float sequence classifier",
    )
    flags.add_flag(
        "random_weights",
        metavar="SHAPE",
        help=f"a known shape with random weights instead: {', '.join(RANDOM_SHAPES)}",
    )
    flags.add_flag("int8", action="store_true", help="time static INT8 too")
    flags.add_flag("sq", action="store_true", help="time it with SmoothQuant (needs --int8)")
    flags.add_flag(
        "quant_lm_head",
        action="switch",
        help=setting_help(QuantConfig, "quant_lm_head"),
    )
    flags.add_flag(
        "compare",
        action="store_true",
        help="fp32 and bf16, eager and compiled, INT8 and INT8 + SmoothQuant on every backend",
    )
    flags.add_flag(
        "backend",
        default="auto",
        help=f"auto (all that can run) or some of: {', '.join(BACKENDS)}, comma-separated",
    )
    flags.add_flag(
        "peers",
        type=parse_peers,
        default=(),
        help=f"also time int8 of other toolkits, some of: {', '.join(PEERS)}, comma-separated "
        "(install requirements-peers.txt first)",
    )
    flags.add_config(BenchmarkConfig)
    flags.add_config(DataConfig, skip=("seed",))
    flags.add_config(OutputConfig)
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, time, print.

    Raises:
        IpexSqError: Anything that a user can mend.
    """
    flags = parser().parse_args(arguments)
    if flags.sq and not flags.int8:
        raise ConfigError("--sq smooths for INT8: add --int8")
    asked = build(BenchmarkConfig, flags)
    check_output(flags.output)

    from ipex_sq.benchmarking.contenders import Contender, contenders, peer_contenders
    from ipex_sq.benchmarking.cores import core_notes, instance_cores, resolve_preset
    from ipex_sq.benchmarking.memory import check_length, check_memory
    from ipex_sq.benchmarking.run import check_timed, run_benchmark
    from ipex_sq.evaluation.runs import describe_texts
    from ipex_sq.report.latency import latency_report
    from ipex_sq.system import provenance

    subject, folder = _subject(flags)
    texts = _texts(flags, subject)
    subject = replace(subject, texts=texts, calib_max_tokens=flags.calib_max_tokens)
    config = resolve_preset(asked)
    notes = core_notes(config, instance_cores(config))  # refused before the work
    timed = contenders(_quants(flags, folder), compare=flags.compare)
    timed += peer_contenders(flags.peers)
    if folder is not None:
        timed.append(Contender(*_checkpoint_label(folder), "int8", checkpoint=str(folder)))
    check_length(subject, config)
    check_memory(timed, subject, config)
    limits, rows = run_benchmark(timed, subject, config)
    check_timed(rows)  # else --output keeps the result of an earlier run
    result = {
        "model": flags.model_path or flags.random_weights or flags.model_name_or_path,
        **provenance(),
        **(describe_texts(texts.evaluation, texts.calibration) if texts else {}),
        "config": asdict(config),
        "notes": notes,
        "limits": asdict(limits),
        "results": rows,
    }
    show(latency_report(result), result, flags.output)


def _quants(flags: argparse.Namespace, folder: Path | None) -> Any:
    """The recipes of the int8 models to quantize and time."""
    from ipex_sq.backends.registry import backends_to_compare
    from ipex_sq.benchmarking.contenders import int8_quants

    if not (flags.int8 or (flags.compare and folder is None)):
        if flags.quant_lm_head is not None:
            raise ConfigError("--quant_lm_head rounds the head of an INT8 model: add --int8")
        return []
    labels = ("int8", "int8+sq") if flags.compare else ("int8+sq" if flags.sq else "int8",)
    return int8_quants(backends_to_compare(flags.backend), labels, lm_head=flags.quant_lm_head)


def _subject(flags: argparse.Namespace) -> tuple[Any, Path | None]:
    """The float model to time, and the int8 folder that was made of it, or None."""
    from ipex_sq.benchmarking.subjects import CLASSIFIER, RANDOM, Subject
    from ipex_sq.checkpoint.folders import read_manifest
    from ipex_sq.models.int8_folders import is_checkpoint, refuse_int8
    from ipex_sq.models.loading import CAUSAL_LM, SEQUENCE_CLASSIFICATION

    if flags.model_path and flags.random_weights:
        raise ConfigError("--model_path and --random_weights name two models: pass one")
    if flags.random_weights:
        return Subject(flags.random_weights, RANDOM), None
    if not flags.model_path:
        model = build(ModelConfig, flags)
        refuse_int8(model.model_name_or_path)
        trust = model.trust_remote_code
        return Subject(model.model_name_or_path, trust_remote_code=trust), None
    if not is_checkpoint(flags.model_path):
        return Subject(flags.model_path, CLASSIFIER), None
    if flags.int8:
        raise ConfigError("--int8 quantizes a float model: --model_path is an int8 folder already")
    folder = Path(flags.model_path)
    manifest = read_manifest(folder)
    source = manifest["made_from"].get("model")
    if not source:
        raise ConfigError(
            f"{folder} does not say which float model it was made from, and that is the baseline: "
            "save it again with eval_lambada.py --output_dir or `quantize`"
        )
    kind = CLASSIFIER if manifest["task"] == SEQUENCE_CLASSIFICATION else CAUSAL_LM
    return Subject(str(source), kind), folder


def _texts(flags: argparse.Namespace, subject: Any) -> Any:
    """The documents of the lambada workload, or None."""
    from ipex_sq.benchmarking.subjects import RANDOM
    from ipex_sq.evaluation.experiment import load_texts

    data = build(DataConfig, flags)
    if flags.workload != LAMBADA:
        if data != DataConfig(seed=data.seed):
            raise ConfigError("--dataset, --limit and --calib_* go with --workload lambada")
        return None
    if subject.classifies or subject.kind == RANDOM:
        raise ConfigError("--workload lambada scores a causal language model with its own weights")
    return load_texts(data, calibrate=True)


def _checkpoint_label(folder: Path) -> tuple[str, str]:
    from ipex_sq.checkpoint.folders import read_manifest
    from ipex_sq.checkpoint.plans import load_plan

    smoothed = load_plan(folder).alpha is not None
    return "int8+sq" if smoothed else "int8", read_manifest(folder)["backend"]
