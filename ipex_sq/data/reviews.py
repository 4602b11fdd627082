"""Labelled reviews by name: amazon_polarity from the hub, the embedded ones, or a local file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ipex_sq.config import EMBEDDED
from ipex_sq.data.documents import TextSet
from ipex_sq.data.hub_sets import hub_rows
from ipex_sq.data.jsonl import read_rows
from ipex_sq.errors import DataError, unknown_name

AMAZON = "amazon_polarity"
REPOSITORY = "fancyzhx/amazon_polarity"
SPLITS = {"calibration": "train", "evaluation": "test"}
POLARITY = ("negative", "positive")
"""What labels 0 and 1 of amazon_polarity and of the embedded reviews mean."""

MOST_TRAINING_ROWS = 4096
"""Of the hub's 3.6 million: enough to draw calibration texts from and to fine-tune on."""

EMBEDDED_FILES = {"calibration": "reviews_train.jsonl", "evaluation": "reviews_eval.jsonl"}


@dataclass(frozen=True)
class Review:
    """A text with its class.

    Attributes:
        text: What the model reads; for amazon_polarity title and content, a line each.
        label: Index of its class, as in the model's config.
        names: Of the labels, by index, where the set says what they mean: then a model's classes
            are found by name.
    """

    text: str
    label: int
    names: tuple[str, ...] = ()

    @property
    def record(self) -> str:
        """Label and text."""
        return f"{self.label}\t{self.text}"


def load_reviews(name: str = "auto", *, purpose: str = "evaluation") -> TextSet[Review]:
    """Load reviews to evaluate, or to calibrate and fine-tune on.

    Args:
        name: "amazon_polarity", "embedded", a path ending in .jsonl, or "auto": amazon_polarity
            where the hub or its cache answers, else embedded.
        purpose: "evaluation" or "calibration"; chooses the split.

    Raises:
        DataError: Unreachable, missing or malformed.
        ConfigError: Unknown name.
    """
    if name == "auto":
        try:
            return replace(_amazon(purpose), why=f"auto: {AMAZON} is reachable")
        except DataError as error:
            return replace(_embedded(purpose), why=f"auto: {error}")
    if name == EMBEDDED:
        return _embedded(purpose)
    if name == AMAZON:
        return _amazon(purpose)
    if name.endswith((".jsonl", ".json")) or Path(name).exists():
        return TextSet(Path(name).name, "file", read_rows(Path(name), _review))
    raise unknown_name("dataset", name, ("auto", EMBEDDED, AMAZON, "FILE.jsonl"))


def training_reviews(evaluation: TextSet[Review]) -> TextSet[Review]:
    """Reviews to calibrate on where none were named: those that go with `evaluation`."""
    name = AMAZON if evaluation.name == AMAZON else EMBEDDED
    return load_reviews(name, purpose="calibration")


def check_labels(reviews: Sequence[Review], classes: int) -> None:
    """Refuse labels that the head of a model does not have, and reviews of one class only.

    Raises:
        DataError: Says which.
    """
    labels = {review.label for review in reviews}
    beyond = sorted(label for label in labels if not 0 <= label < classes)
    if beyond:
        raise DataError(
            f"the reviews have label {beyond[0]}, the model's head has {classes} classes "
            f"(0 to {classes - 1}): pass data or a model that fit each other"
        )
    if len(labels) == 1:
        raise DataError(
            f"all {len(reviews)} reviews have label {labels.pop()}: accuracy on one class says "
            "nothing, pass reviews of at least two"
        )


def _embedded(purpose: str) -> TextSet[Review]:
    file = resources.files("ipex_sq.data") / "texts" / EMBEDDED_FILES[purpose]
    with resources.as_file(file) as path:
        return TextSet(EMBEDDED, purpose, _named(read_rows(path, _review)))


def _amazon(purpose: str) -> TextSet[Review]:
    split = SPLITS[purpose]
    rows = hub_rows(REPOSITORY, f"{split}[:{MOST_TRAINING_ROWS}]" if split == "train" else split)
    columns = zip(rows["title"], rows["content"], rows["label"], strict=True)
    reviews = tuple(
        _checked(f"{title}\n{content}", label, f"{REPOSITORY} {split} row {row}")
        for row, (title, content, label) in enumerate(columns)
    )
    return TextSet(AMAZON, split, _named(reviews))


def _named(reviews: Sequence[Review]) -> tuple[Review, ...]:
    return tuple(replace(review, names=POLARITY) for review in reviews)


def _review(row: dict[str, Any], where: str) -> Review:
    return _checked(row.get("text"), row.get("label"), where)


def _checked(text: Any, label: Any, where: str) -> Review:
    if not isinstance(text, str) or not isinstance(label, int) or isinstance(label, bool):
        raise DataError(f'{where}: needs "text" as a string and "label" as an integer')
    if not text.strip():
        raise DataError(f"{where}: the text is empty")
    return Review(text.strip(), label)
