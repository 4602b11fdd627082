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
    "eval_lambada": eval_lambada.command,
    "benchmark": benchmark.command,
    "compare": compare.command,
    "plant_outliers": plant_outliers.command,
    "sensitivity": sensitivity.command,
    "families": families.command,
    "fine_tune": fine_tune.command,
    "generate_scales": generate_scales.command,
    "import_scales": import_scales.command,
    "quantize": quantize.command,
    "random_weights": random_weights.command,
    "evaluate": evaluate.command,
    "tables": tables.command,
}

_NAMES = ",".join(COMMANDS).replace("_", "-")
USAGE = f"usage: python -m ipex_sq {{{_NAMES}}} [flags]; each takes --help\n"


def main(arguments: Sequence[str]) -> None:
    """Run the command named first."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    name = arguments[0].replace("-", "_")
    if name not in COMMANDS:
        raise unknown_name("command", arguments[0], COMMANDS)
    COMMANDS[name](arguments[1:])


if __name__ == "__main__":
    sys.exit(run(main))
