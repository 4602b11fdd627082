"""`python -m ipex_sq import-scales`: a published file of activation scales as one of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipex_sq.cli.flags import Parser
from ipex_sq.cli.running import check_output, show, write_atomically
from ipex_sq.config import EMBEDDED

DESCRIPTION = """\
Read the activation scales that the authors of SmoothQuant publish (torch.save of the largest
absolute value of every input channel of every Linear) and write a scales file, as generate-scales
does. Nothing is run on texts. Minima and maxima are not published: ranges are taken as symmetric,
which costs static activations up to a bit and per-token ones nothing. As with any scales file
alpha is a number and weights are rounded to nearest. stdout ends in one JSON line.
"""

EXAMPLES = """\
  python -m ipex_sq import-scales act_scales/opt-1.3b.pt --model facebook/opt-1.3b \\
      --output act_scales/opt-1.3b.json
"""

RANGES = "symmetric: the published file holds absolute values only"
EXAMPLE = "A short text, on which smoothing is proved to change nothing before it is rounded."


def parser() -> Parser:
    """The flags of the command."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_argument("file", type=Path, help="the published file, .pt")
    flags.add_flag(
        "model", required=True, help=f"the model it is of: hub name, local folder, or {EMBEDDED}"
    )
    flags.add_flag("output", type=Path, required=True, help="the file to write")
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, read, match, write.

    Raises:
        IpexSqError: Anything that a user can mend; nothing is half-written.
    """
    flags = parser().parse_args(arguments)
    output: Path = flags.output
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    check_output(output)

    import torch

    from ipex_sq.checkpoint.integrity import file_sha256
    from ipex_sq.models.identity import model_sha256, tokenizer_sha256
    from ipex_sq.models.importing import read_absmax, stats_of_absmax
    from ipex_sq.models.loading import load_model
    from ipex_sq.recipe.act_stats import ActStats
    from ipex_sq.recipe.scales_files import scales_to_json
    from ipex_sq.system import provenance

    path: Path = flags.file
    absmax = read_absmax(path)
    model, tokenizer = load_model(flags.model)
    identity = {"name": flags.model, "sha256": model_sha256(model)}
    linears = stats_of_absmax(model, absmax, str(path))
    source: dict[str, Any] = {"imported": path.name, "sha256": file_sha256(path), "ranges": RANGES}
    source |= dict.fromkeys(("texts", "tokens"))  # not published
    ids = torch.tensor([tokenizer(EXAMPLE)["input_ids"]])
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stats = ActStats(linears, (), {}, example, texts=0, tokens=0, source=source)
    written = scales_to_json(stats, identity, {"sha256": tokenizer_sha256(tokenizer)})
    write_atomically(output, written + "\n")
    result = {
        "model": identity,
        "output": str(output),
        **provenance(),
        "source": source,
        "linears": len(linears),
        "left_out": sorted(absmax.keys() - linears.keys()),
    }
    table = f"{output}: {len(linears)} Linears of {flags.model} from {path}; ranges {RANGES}"
    show(table, result, None)
