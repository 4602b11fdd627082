"""`python -m ipex_sq <command>`: the commands of the scripts, from anywhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ipex_sq.cli import (
    benchmark,
    compare,
    eval_lambada,
    evaluate,
    families,
    fine_tune,
    generate_scales,
    import_scales,
    plant_outliers,
    quantize,
    random_weights,
    sensitivity,
    tables,
)
from ipex_sq.cli.running import run
from ipex_sq.errors import unknown_name

COMMANDS = {
    "eval_lambada": (eval_lambada.command, "LAMBADA accuracy in fp32 and INT8; saves INT8 models"),
    "benchmark": (benchmark.command, "speed of fp32, bf16, INT8 and other toolkits"),
    "compare": (compare.command, "two results of benchmark, side by side"),
    "fine_tune": (fine_tune.command, "a classification head for the embedded encoder"),
    "generate_scales": (generate_scales.command, "a classifier's activation ranges, as a file"),
    "quantize": (quantize.command, "a classifier, or a language model larger than memory"),
    "evaluate": (evaluate.command, "accuracy of a classifier"),
    "import_scales": (import_scales.command, "activation scales of SmoothQuant's authors"),
    "sensitivity": (sensitivity.command, "which Linears lose most in INT8"),
    "plant_outliers": (plant_outliers.command, "the same model with outlier channels"),
    "random_weights": (random_weights.command, "a checkpoint of a known shape"),
    "families": (families.command, "the table of families in docs/method.md"),
    "tables": (tables.command, "tables of a document, from its result files"),
}

_LINES = "".join(f"  {name.replace('_', '-'):16} {what}\n" for name, (_, what) in COMMANDS.items())
USAGE = f"usage: python -m ipex_sq COMMAND [flags]; each takes --help\n\n{_LINES}"


def main(arguments: Sequence[str]) -> None:
    """Run the command named first."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    name = arguments[0].replace("-", "_")
    if name not in COMMANDS:
        raise unknown_name("command", arguments[0], COMMANDS)
    command, _ = COMMANDS[name]
    command(arguments[1:])


if __name__ == "__main__":
    sys.exit(run(main))
