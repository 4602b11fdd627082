"""The command behind benchmark.py: forward-pass latency of fp32, bf16 and int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ipex_sq.cli.flags import Parser, build
from ipex_sq.cli.running import check_output, in_fresh_process, show
from ipex_sq.config import BACKENDS, BenchmarkConfig, ModelConfig, OutputConfig
from ipex_sq.errors import ConfigError

DESCRIPTION = """\
Latency of one forward pass on this CPU: fp32 and bf16 as transformers runs them, bf16 compiled per
layer, and with --int8 the int8 model of every backend that can run, each in a process of its own.
stdout ends in one JSON line.
"""

EXAMPLES = """\
  python benchmark.py --int8                              # embedded model
  python benchmark.py --model_name_or_path bigscience/bloom-560m --int8
  python benchmark.py --int8 --sq --backend native --batch_size 1 --sequence_length 512
  python benchmark.py --int8 --logits last                # as the prefill of generate()
"""


def parser() -> Parser:
    """The flags of benchmark.py."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_config(ModelConfig)
    flags.add_flag("int8", action="store_true", help="time static INT8 too")
    flags.add_flag("sq", action="store_true", help="time it with SmoothQuant (needs --int8)")
    flags.add_flag(
        "backend",
        default="auto",
        help=f"auto (all that can run) or some of: {', '.join(BACKENDS)}, comma-separated",
    )
    flags.add_config(BenchmarkConfig)
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
    model, config = build(ModelConfig, flags), build(BenchmarkConfig, flags)
    check_output(flags.output)

    from ipex_sq.backends.registry import backends_to_compare
    from ipex_sq.benchmarking.forward import (
        ForwardBenchmark,
        add_speedups,
        contenders,
        int8_quants,
    )
    from ipex_sq.report.latency import latency_report
    from ipex_sq.system import provenance

    label = ("int8+sq" if flags.sq else "int8",)
    quants = int8_quants(backends_to_compare(flags.backend), label) if flags.int8 else []
    benchmark = ForwardBenchmark(model, config)
    rows = [in_fresh_process(benchmark.run, contender) for contender in contenders(quants)]
    add_speedups(rows)
    result = {
        "model": model.model_name_or_path,
        **provenance(),
        "config": asdict(config),
        "results": rows,
    }
    show(latency_report(result), result, flags.output)
