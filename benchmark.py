"""Forward-pass latency of a model in fp32, bf16 and int8; `--help` shows examples."""

import sys

from ipex_sq.cli.benchmark import command
from ipex_sq.cli.running import run

if __name__ == "__main__":
    sys.exit(run(command))
