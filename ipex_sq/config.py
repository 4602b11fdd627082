"""The settings and their defaults, each written once; flags are generated from here."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from ipex_sq.errors import ConfigError, unknown_name
from ipex_sq.seeds import parse_seed

EMBEDDED = "embedded"
"""Name of the model and of the texts that need no download."""

AUTO, AUTO_GLOBAL = "auto", "auto-global"
"""Alpha searched for each smooth group, or one for the model."""

BACKENDS = ("ipex", "native", "inc", "reference")
OBSERVERS = ("minmax", "percentile", "mse", "kl")
STATIC, DYNAMIC, MIXED = "static", "dynamic", "mixed"
ACTIVATIONS = (STATIC, DYNAMIC, MIXED)
NEAREST, GPTQ = "nearest", "gptq"
WEIGHT_ROUNDINGS = (NEAREST, GPTQ)
PRECISIONS = ("fp32", "bf16")
RANDOM_SHAPES = (
    "bert-base",
    "bert-large",
    "bloom-560m",
    "bloom-1b7",
    "bloom-7b1",
    "llama-1b",
    "opt-125m",
    "opt-1.3b",
)


def setting(default: Any, text: str, **flag: Any) -> Any:
    """A dataclass field that also describes its command-line flag (`flag` goes to argparse)."""
    return field(default=default, metadata={"help": text, "flag": flag})


def parse_alpha(text: str) -> float | str:
    """Turn the text of `--alpha` into a number in [0, 1], "auto" or "auto-global".

    Raises:
        ConfigError: The text is neither.
    """
    if text in (AUTO, AUTO_GLOBAL):
        return text
    try:
        return check_alpha(float(text))
    except ValueError:
        raise ConfigError(
            f"--alpha takes a number from 0 to 1, 'auto' or 'auto-global', not {text!r}"
        ) from None


def check_alpha(alpha: float) -> float:
    """Return `alpha` where it lies in [0, 1].

    Raises:
        ConfigError: It does not (or is NaN).
    """
    if not (math.isfinite(alpha) and 0.0 <= alpha <= 1.0):
        raise ConfigError(f"alpha must lie between 0 and 1 (or be 'auto'), not {alpha}")
    return alpha


@dataclass(frozen=True)
class Drop:
    """The loss that `--max_drop` allows on held-out texts.

    Attributes:
        points: Of next-token accuracy against fp32, or None.
        ratio: Of perplexity to fp32's, at least 1, or None.
    """

    points: float | None = None
    ratio: float | None = None


def parse_drop(text: str) -> Drop:
    """Turn the text of `--max_drop`, as "0.5" (points) or "1.02x" (perplexity ratio), into a value.

    Raises:
        ConfigError: It is neither.
    """
    problem = ConfigError(
        f"--max_drop takes accuracy points as 0.5, or a perplexity ratio as 1.02x, not {text!r}"
    )
    try:
        value = float(text.removesuffix("x"))
    except ValueError:
        raise problem from None
    smallest = 1.0 if text.endswith("x") else 0.0
    if not (math.isfinite(value) and value >= smallest):
        raise problem
    return Drop(ratio=value) if text.endswith("x") else Drop(points=value)


def check_choice(kind: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a name that is not known.

    Raises:
        ConfigError: With the nearest known name.
    """
    if value not in known:
        raise unknown_name(kind, value, known)


def check_positive(name: str, value: int | None) -> None:
    """Refuse a count below 1.

    Raises:
        ConfigError: Names it.
    """
    if value is not None and value < 1:
        raise ConfigError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized.

    `alpha=None` switches SmoothQuant off; 0.0 does not (it is the strongest use of weight ranges).
    `dtype=None` takes the backend's own: bf16 for native, fp32 for the others.
    """

    alpha: float | str | None = setting(
        AUTO,
        "migration strength of SmoothQuant, 0 to 1, or 'auto' to choose it for every smooth group "
        "by the change of the predictions, 'auto-global' to choose one for the model",
        type=parse_alpha,
    )
    observer: str = setting(
        "minmax",
        "range of static activations: minmax, or clipped after a second pass over the smoothed "
        "model: to a percentile of the values, to the least squared error, or to the least KL "
        "divergence",
        choices=OBSERVERS,
    )
    percentile: float = setting(
        99.99, "share of the values that --observer percentile keeps, in percent", type=float
    )
    activations: str | None = setting(
        None,
        "how inputs are rounded: static (per tensor), dynamic (per token), or mixed: per token "
        "where massive activations make static rounding cost most (default: mixed where alpha is "
        "searched and the backend rounds per token, else static)",
        choices=ACTIVATIONS,
    )
    weight_rounding: str | None = setting(
        None,
        "how weights are rounded: nearest, or gptq, so that their errors cancel in the outputs "
        "(default: gptq where alpha is searched, else nearest)",
        choices=WEIGHT_ROUNDINGS,
    )
    max_drop: str | None = setting(
        None,
        "largest loss over the tokens of held-out texts (a quarter of the calibration texts), in "
        "points of accuracy (0.5) or as perplexity ratio (1.02x): the fewest layers that meet it "
        "leave static int8, first for per-token rounding, then for float",
        metavar="X",
    )
    quant_lm_head: bool | None = setting(
        None,
        "int8 also for the head of a language model, rounded per token: a large vocabulary is half "
        "of a small model's work (default: where alpha is searched and other inputs may be rounded "
        "per token, for a head of at most 1 GiB in fp32)",
        action="switch",
    )
    portable: bool = setting(
        False,
        "nothing that other programs' formats cannot say: no channels in parts, no corrected "
        "biases, static activations unless asked for others",
        action="store_true",
    )
    backend: str = setting("auto", f"auto or one of: {', '.join(BACKENDS)}")
    dtype: str | None = setting(
        None, "precision of what stays float (default: the backend's own)", choices=PRECISIONS
    )

    @property
    def searches_alpha(self) -> bool:
        """Whether alpha is "auto" or "auto-global"."""
        return isinstance(self.alpha, str)

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str):
            parse_alpha(self.alpha)
        elif self.alpha is not None:
            check_alpha(self.alpha)
        check_choice("observer", self.observer, OBSERVERS)
        if not 50.0 < self.percentile <= 100.0:
            raise ConfigError(f"percentile must lie between 50 and 100, not {self.percentile}")
        check_choice("backend", self.backend, (*BACKENDS, "auto"))
        if self.max_drop is not None:
            parse_drop(self.max_drop)
        if self.activations is not None:
            check_choice("activations", self.activations, ACTIVATIONS)
        if self.weight_rounding is not None:
            check_choice("weight_rounding", self.weight_rounding, WEIGHT_ROUNDINGS)
        if self.dtype is not None:
            check_choice("dtype", self.dtype, PRECISIONS)


@dataclass(frozen=True)
class DataConfig:
    """Which texts are evaluated and which calibrate. Both sets are disjoint, or it is an error."""

    dataset: str = setting(
        "auto",
        "lambada, lambada_openai, embedded, a local .jsonl, or auto: lambada when the hub or its "
        "cache answers, else embedded",
    )
    calib_dataset: str | None = setting(
        None,
        "texts to calibrate on, named as for --dataset (default: lambada's train split for "
        "lambada, the embedded calibration texts for everything else)",
    )
    calib_samples: int = setting(128, "number of calibration texts", type=int)
    calib_max_tokens: int = setting(
        128, "calibration texts are cut to this many tokens; equal lengths batch well", type=int
    )
    limit: int | None = setting(None, "evaluate only the first N documents", type=int)
    seed: int = setting(42, "seed of the choice of calibration texts", type=parse_seed)

    def __post_init__(self) -> None:
        check_positive("calib_samples", self.calib_samples)
        check_positive("calib_max_tokens", self.calib_max_tokens)
        check_positive("limit", self.limit)


@dataclass(frozen=True)
class EvaluationConfig:
    """How documents are run through the model. None of these changes a result."""

    batch_size: int = setting(16, "documents per forward pass", type=int)
    log_frequency: int = setting(
        10, "batches between two log lines where stderr is no terminal", type=int
    )

    def __post_init__(self) -> None:
        check_positive("batch_size", self.batch_size)
        check_positive("log_frequency", self.log_frequency)


@dataclass(frozen=True)
class ModelConfig:
    """Which model."""

    model_name_or_path: str = setting(
        EMBEDDED,
        "hub name or local folder; embedded is SmolLM2-135M-Instruct, dequantized from the 4-bit "
        "file in its PyPI package",
    )
    trust_remote_code: bool = setting(
        False, "run code that comes with the model", action="store_true"
    )


@dataclass(frozen=True)
class PlantConfig:
    """Outlier channels planted into a model."""

    channels: int = setting(4, "channels of every norm", type=int)
    factor: float = setting(
        64.0, "how much larger they become; a power of two keeps every bit", type=float
    )
    seed: int = setting(42, "seed that draws the channels", type=parse_seed)

    def __post_init__(self) -> None:
        check_positive("channels", self.channels)
        if not (math.isfinite(self.factor) and self.factor > 0.0):
            raise ConfigError(f"factor must be a positive number, not {self.factor}")


@dataclass(frozen=True)
class OutputConfig:
    """Where results go besides stdout."""

    output: Path | None = setting(None, "write the JSON result to this file", type=Path)


def flag_settings(config_class: type) -> list[Field[Any]]:
    """The fields of a config class that have a command-line flag."""
    return [item for item in fields(config_class) if "flag" in item.metadata]


def setting_help(config_class: type, name: str) -> str:
    """What a setting means, as its flag says it."""
    return next(
        str(item.metadata["help"]) for item in flag_settings(config_class) if item.name == name
    )
