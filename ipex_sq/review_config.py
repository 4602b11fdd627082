"""Settings of the classification pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from ipex_sq.config import check_positive, setting
from ipex_sq.errors import ConfigError
from ipex_sq.seeds import parse_seed


@dataclass(frozen=True)
class ReviewConfig:
    """Which reviews a classifier is calibrated, fine-tuned and evaluated on; the sets are apart."""

    dataset: str = setting(
        "auto",
        "amazon_polarity, embedded, a local .jsonl of text and label, or auto: amazon_polarity "
        "when the hub or its cache answers, else embedded",
    )
    calib_dataset: str | None = setting(
        None,
        "reviews to calibrate on, named as for --dataset (default: amazon_polarity's train split "
        "for amazon_polarity, the embedded training reviews for everything else)",
    )
    num_samples: int = setting(128, "number of calibration texts", type=int)
    max_length: int = setting(128, "texts are cut to this many tokens", type=int)
    limit: int = setting(1000, "evaluate at most the first N reviews", type=int)
    seed: int = setting(42, "seed of the choice of calibration texts", type=parse_seed)

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_length", "limit"):
            check_positive(name, getattr(self, name))


@dataclass(frozen=True)
class FineTuneConfig:
    """A short training of a whole encoder with a new head."""

    epochs: int = setting(4, "passes over the training reviews", type=int)
    learning_rate: float = setting(1e-4, "of AdamW, falling linearly to 0", type=float)
    train_batch_size: int = setting(16, "reviews per step", type=int)
    max_length: int = setting(128, "texts are cut to this many tokens", type=int)
    seed: int = setting(42, "seed of the head, the order and dropout", type=parse_seed)

    def __post_init__(self) -> None:
        for name in ("epochs", "train_batch_size", "max_length"):
            check_positive(name, getattr(self, name))
        if not 0.0 < self.learning_rate < 1.0:
            raise ConfigError(f"learning_rate must lie between 0 and 1, not {self.learning_rate}")
