"""`python -m ipex_sq plant-outliers`: the same model, with outlier channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ipex_sq.cli.flags import Parser, build
from ipex_sq.cli.running import check_output, show
from ipex_sq.config import EMBEDDED, OutputConfig, PlantConfig
from ipex_sq.errors import ConfigError

DESCRIPTION = """\
Write a copy of a model in which some channels of every norm are a factor larger and the weights
that read them as much smaller. The float model computes what it did; plain INT8 suffers,
SmoothQuant takes the factor out again. stdout ends in one JSON line.
"""

EXAMPLES = """\
  python -m ipex_sq plant-outliers embedded smollm2-planted
  python -m ipex_sq plant-outliers facebook/opt-125m opt-planted --channels 8 --factor 128
  python eval_lambada.py --compare --model_name_or_path smollm2-planted
"""


def parser() -> Parser:
    """The flags of the command."""
    flags = Parser(DESCRIPTION, EXAMPLES)
    flags.add_argument("model", help=f"hub name, local folder, or {EMBEDDED}")
    flags.add_argument("folder", type=Path, help="where to write the copy; must not hold anything")
    flags.add_config(PlantConfig)
    flags.add_config(OutputConfig)
    return flags


def command(arguments: Sequence[str]) -> None:
    """Parse, plant, write.

    Raises:
        IpexSqError: Anything that a user can mend; nothing is half-written.
    """
    flags = parser().parse_args(arguments)
    config = build(PlantConfig, flags)
    folder: Path = flags.folder
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty: name another folder")
    check_output(flags.output)

    from ipex_sq.checkpoint.replacing import replace_folder
    from ipex_sq.data.calibration import calibration_batches
    from ipex_sq.data.lambada import load_lambada
    from ipex_sq.models.loading import load_model
    from ipex_sq.models.planting import plant_outliers
    from ipex_sq.system import provenance

    model, tokenizer = load_model(flags.model)
    texts = load_lambada(EMBEDDED, purpose="calibration").documents[:1]
    (example,) = calibration_batches(texts, tokenizer, 64, appended=False)
    planted = plant_outliers(model, example, config)

    def write(scratch: Path) -> None:
        model.save_pretrained(scratch)  # type: ignore[operator]
        tokenizer.save_pretrained(scratch)

    replace_folder(folder, write)
    result = {
        "model": flags.model,
        "folder": str(folder),
        **provenance(),
        "config": asdict(config),
        "results": [asdict(planted)],
    }
    table = (
        f"{folder}: {config.channels} channels of {len(planted.norms)} norms are {config.factor:g} "
        f"times larger; largest change of a logit {planted.float_change:g}"
    )
    show(table, result, flags.output)
