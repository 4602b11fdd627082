"""`python -m ipex_sq random-weights`: a folder with random weights of a published shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ipex_sq.cli.flags import Parser, argument
from ipex_sq.cli.running import show
from ipex_sq.config import PRECISIONS, RANDOM_SHAPES, check_choice
from ipex_sq.errors import ConfigError
from ipex_sq.seeds import parse_seed
from ipex_sq.system import parse_bytes

DESCRIPTION = """\
Write a checkpoint folder with random weights at the shape of a published language model, in shards
and with one module in memory at a time: something to try commands on where the weights are not at
hand. The tokenizer is the embedded model's. stdout ends in one JSON line.
"""

EXAMPLES = """\
  python -m ipex_sq random-weights bloom-7b1 bloom-7b1
  python -m ipex_sq random-weights opt-125m opt-125m --dtype fp32
"""


def parser() -> Parser:
    """The flags of the command."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_argument("shape", help=f"one of: {', '.join(RANDOM_SHAPES)}")
    flags.add_argument("folder", type=Path, help="where to write; must not exist, or be empty")
    flags.add_flag("dtype", default="bf16", choices=PRECISIONS, help="default: bf16")
    flags.add_flag("seed", type=parse_seed, default=0, help="of the weights (default: 0)")
    flags.add_flag(
        "max_shard_size",
        type=argument(parse_bytes),
        default=parse_bytes("2GB"),
        metavar="SIZE",
        help="of one file, where a module fits in it (default: 2GB)",
    )
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, write.

    Raises:
        ConfigError: Unknown shape, one of a classifier, or a folder that holds something.
        ResourceError: It would not fit on the disk.
    """
    flags = parser().parse_args(arguments)
    check_choice("shape", flags.shape, RANDOM_SHAPES)
    folder: Path = flags.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is no empty folder: name another")

    from ipex_sq.streaming.random_weights import write_random_weights

    written = write_random_weights(
        flags.shape, folder, dtype=flags.dtype, seed=flags.seed, shard_bytes=flags.max_shard_size
    )
    result = {"shape": flags.shape, "folder": str(folder), **written}
    table = (
        f"{folder}: {written['parameters'] / 1e6:.0f} million random weights of {flags.shape}, "
        f"{written['bytes'] / 2**30:.2f} GiB in {written['shards']} files"
    )
    show(table, result, None)
