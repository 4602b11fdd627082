"""`python -m ipex_sq quantize --max_memory`: a language model, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipex_sq.cli.flags import Parser, argument, build
from ipex_sq.cli.running import check_output, findable, show
from ipex_sq.cli.scales import add_recipe, recipe
from ipex_sq.config import EMBEDDED, DataConfig, OutputConfig
from ipex_sq.errors import DataError
from ipex_sq.system import parse_bytes

DESCRIPTION = """\
Quantize the checkpoint folder of a causal language model to static INT8 (W8A8), with SmoothQuant
unless --no_sq, with one block of its float weights in memory at a time, for the native backend.
The result is that of quantizing in memory. What a block gives the next one lies on disk, in a
folder beside the result that is removed at the end; a run that was killed goes on with --resume
after the last finished block. stdout ends in one JSON line.
"""

EXAMPLES = """\
  python -m ipex_sq random-weights bloom-7b1 bloom-7b1          # something to try it on
  python -m ipex_sq quantize --max_memory 8GiB --model bloom-7b1
  python -m ipex_sq quantize --max_memory 8GiB --model bloom-7b1 --resume
"""

_FLAGS = ("--max_memory", "--max-memory", "--resume")


def is_meant(arguments: Sequence[str]) -> bool:
    """Whether these arguments of `quantize` ask for a model in pieces."""
    return any(item.split("=")[0] in _FLAGS for item in arguments)


def parser() -> Parser:
    """The flags of the command."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_flag("model", required=True, help=f"local folder with safetensors, or {EMBEDDED}")
    flags.add_flag(
        "max_memory",
        type=argument(parse_bytes),
        metavar="SIZE",
        help="resident memory that the run may take, as 8GiB; refused before the work where it "
        "would take more (default: what is available)",
    )
    flags.add_flag("resume", action="store_true", help="go on after the last finished block")
    add_recipe(flags, skip=("observer", "percentile"))
    flags.add_config(DataConfig, skip=("limit",))
    flags.add_config(OutputConfig)
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, quantize block by block.

    Raises:
        IpexSqError: Anything that a user can mend; finished blocks are kept.
    """
    flags = parser().parse_args(arguments)
    config, data = recipe(flags), build(DataConfig, flags)
    check_output(flags.output)
    if flags.model != EMBEDDED and not (Path(flags.model) / "config.json").is_file():
        raise DataError(f"--model {flags.model} is not a folder with config.json and safetensors")

    from ipex_sq.data.calibration import calibration_batches
    from ipex_sq.evaluation.experiment import load_texts
    from ipex_sq.evaluation.runs import describe_with_rows
    from ipex_sq.models.int8_folders import refuse_int8
    from ipex_sq.models.loading import load_tokenizer, resolve_source
    from ipex_sq.streaming.run import Limits, check_streamed, quantize_folder
    from ipex_sq.system import provenance

    refuse_int8(flags.model)
    config = check_streamed(config)
    texts = load_texts(data, calibrate=True).calibration
    assert texts is not None  # noqa: S101
    source = Path(resolve_source(flags.model)[0])
    tokenizer = load_tokenizer(flags.model)
    batches = calibration_batches(texts.documents, tokenizer, data.calib_max_tokens, appended=False)
    folder = Path(flags.output_dir) / Path(flags.model).resolve().name
    streamed = quantize_folder(
        source,
        folder,
        batches,
        config,
        tokenizer=tokenizer,
        texts=describe_with_rows(texts),
        origin={"model": findable(flags.model)},
        limits=Limits(flags.max_memory, flags.resume),
    )
    result = {"model": flags.model, "folder": str(folder), **provenance(), **_made(streamed)}
    result |= {
        "max_memory_bytes": flags.max_memory,
        "float_bytes": _safetensors(source),
        "bytes": _safetensors(folder),
    }
    show(_table(result), result, flags.output)


def _made(streamed: Any) -> dict[str, Any]:
    return {
        "alpha": streamed.plan.alpha,
        "int8_linears": len(streamed.plan.int8_names),
        "weight_rounding": streamed.plan.weight_rounding,
        "smooth_groups": streamed.plan.placements,
        **streamed.proof,
        "seconds": streamed.seconds,
        "estimated_bytes": streamed.estimated_bytes,
        "peak_rss_bytes": streamed.peak_rss_bytes,
    }


def _safetensors(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def _table(result: dict[str, Any]) -> str:
    groups = ", ".join(f"{count} {kind}" for kind, count in result["smooth_groups"].items())
    return (
        f"{result['folder']}: {result['int8_linears']} Linears in int8, alpha {result['alpha']}, "
        f"smooth groups: {groups}; {result['bytes'] / 2**30:.2f} GiB of "
        f"{result['float_bytes'] / 2**30:.2f}; peak memory "
        f"{result['peak_rss_bytes'] / 2**30:.2f} GiB; {sum(result['seconds'].values()):.0f} s"
    )
