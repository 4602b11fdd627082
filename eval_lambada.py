"""LAMBADA accuracy of a model in fp32, INT8 or INT8 + SmoothQuant; `--help` shows examples."""

import sys

from ipex_sq.cli.eval_lambada import command
from ipex_sq.cli.running import run

if __name__ == "__main__":
    sys.exit(run(command))
