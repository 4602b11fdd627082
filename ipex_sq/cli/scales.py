"""The flags of a recipe, and what --alpha and --act_scales_path say of each other."""

from __future__ import annotations

import argparse
from pathlib import Path

from ipex_sq.cli.flags import Parser, argument, build
from ipex_sq.config import AUTO, GPTQ, QuantConfig, parse_alpha, setting_help
from ipex_sq.errors import ConfigError

PAPER_ALPHA = 0.5


def add_alpha(flags: Parser) -> None:
    """Add --alpha, whose default says nothing so that it can be refused without SmoothQuant."""
    flags.add_flag(
        "alpha",
        type=argument(parse_alpha),
        default=None,
        metavar="ALPHA",
        help=f"{setting_help(QuantConfig, 'alpha')} (default: {QuantConfig.alpha}; the paper's is "
        f"{PAPER_ALPHA})",
    )


def add_scales(flags: Parser) -> None:
    """Add --act_scales_path."""
    flags.add_flag(
        "act_scales_path",
        type=Path,
        help=f"scales file, in the place of calibration; alpha is then a number (default: "
        f"{PAPER_ALPHA})",
    )


def add_recipe(flags: Parser, *, skip: tuple[str, ...] = ()) -> None:
    """Add what both forms of `quantize` take: where to save, and the recipe without `skip`."""
    flags.add_flag(
        "output_dir",
        type=Path,
        default=Path("results/quantized"),
        help="the model is saved in a folder of its name in here (default: results/quantized)",
    )
    flags.add_flag("no_sq", action="store_true", help="without SmoothQuant")
    flags.add_config(QuantConfig, skip=("alpha", "max_drop", *skip))
    add_alpha(flags)


def recipe(flags: argparse.Namespace) -> QuantConfig:
    """The recipe that flags of `add_recipe` ask for.

    Raises:
        ConfigError: They contradict each other.
    """
    if flags.no_sq and flags.alpha is not None:
        raise ConfigError("--alpha belongs to SmoothQuant: leave --no_sq out")
    return build(QuantConfig, flags, alpha=None if flags.no_sq else chosen_alpha(flags))


def chosen_alpha(flags: argparse.Namespace) -> float | str:
    """Alpha as given, else the default, with a scales file the paper's."""
    if flags.alpha is None:
        return AUTO if getattr(flags, "act_scales_path", None) is None else PAPER_ALPHA
    alpha: float | str = flags.alpha
    return alpha


def with_scales(config: QuantConfig, flags: argparse.Namespace) -> QuantConfig:
    """`config`, where a scales file is enough for it.

    Raises:
        ConfigError: It needs texts, and a file was given.
    """
    if flags.act_scales_path is None:
        return config
    if config.searches_alpha:
        raise ConfigError(
            f"--alpha {config.alpha} is searched on texts: leave --act_scales_path out, or pass a "
            "number"
        )
    if config.weight_rounding == GPTQ:
        raise ConfigError("GPTQ needs texts: leave --act_scales_path out, or round to nearest")
    if config.observer != "minmax" or config.max_drop is not None or config.backend == "inc":
        raise ConfigError(
            "--act_scales_path goes with --observer minmax, without --max_drop, and not with inc"
        )
    return config
