"""Sequence classification: accuracy, F1 and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ipex_sq.config import EvaluationConfig
from ipex_sq.data.reviews import Review, check_labels
from ipex_sq.errors import DataError, NumericalCheckError
from ipex_sq.evaluation.pairing import standard_error
from ipex_sq.models.classifier import Classifier, class_order
from ipex_sq.models.running import run_model
from ipex_sq.models.vocabulary import check_token_ids


@dataclass(frozen=True)
class ClassificationResult:
    """Predictions of every review, in the order given.

    Attributes:
        predicted: Label of the class with the largest logit.
        labels: The true one.
        truncated: Reviews that were cut to the longest length.
    """

    predicted: tuple[int, ...]
    labels: tuple[int, ...]
    truncated: int

    @property
    def correct(self) -> tuple[bool, ...]:
        """Whether each prediction is the label."""
        pairs = zip(self.predicted, self.labels, strict=True)
        return tuple(guess == label for guess, label in pairs)

    @property
    def accuracy(self) -> float:
        """Share of reviews, 0 to 1."""
        return sum(self.correct) / len(self.labels)

    @property
    def stderr(self) -> float:
        """Standard error of `accuracy`."""
        return standard_error(self.correct)

    def f1(self, classes: int) -> float:
        """F1 of class 1 where there are two classes, else the mean over the classes that occur.

        0 for a class that is never predicted right.
        """
        counts = torch.tensor(self.confusion_matrix(classes))
        right, labelled, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        occur = labelled + predicted
        of_class = 2 * right.double() / occur.clamp(min=1)
        return float(of_class[1] if classes == 2 else of_class[occur > 0].mean())

    def confusion_matrix(self, classes: int) -> list[list[int]]:
        """`[true class][predicted class]`, counts."""
        cells = torch.tensor(self.labels) * classes + torch.tensor(self.predicted)
        counts = torch.bincount(cells, minlength=classes**2).view(classes, classes)
        return counts.tolist()  # type: ignore[no-any-return]


def order_of(classifier: Classifier, reviews: Sequence[Review]) -> tuple[int, ...]:
    """The model's class of each label: by name where the reviews name their labels, else as it is.

    Raises:
        DataError: No reviews, labels that the model does not have, or one class only.
    """
    if not reviews:
        raise DataError("there are no reviews to evaluate")
    sets = {review.names for review in reviews}
    if len(sets) > 1:
        raise DataError("some of the reviews name their labels, some do not: evaluate them apart")
    names, classes = sets.pop(), classifier.classes
    order = class_order(names, classes) if names else tuple(range(len(classes)))
    check_labels(reviews, len(order))
    return order


def evaluate_classifier(
    classifier: Classifier,
    reviews: Sequence[Review],
    config: EvaluationConfig = EvaluationConfig(),  # noqa: B008
    *,
    max_length: int | None = None,
) -> ClassificationResult:
    """Classify every review. The result does not depend on batch size or order.

    Args:
        classifier: Model and tokenizer; the model float or int8.
        reviews: With labels of the model's classes, or with names of their labels (`order_of`).
        config: How they are batched.
        max_length: Longer ones are cut to so many tokens; None cuts at the model's positions.

    Raises:
        DataError: No reviews, labels that the model does not have, or one class only.
        NumericalCheckError: The model produced logits that are not finite.
    """
    order = order_of(classifier, reviews)
    predicted, truncated = predict(classifier, reviews, config, max_length=max_length)
    as_labels = tuple(order.index(found) for found in predicted)
    return ClassificationResult(as_labels, tuple(review.label for review in reviews), truncated)


def predict(
    classifier: Classifier,
    reviews: Sequence[Review],
    config: EvaluationConfig = EvaluationConfig(),  # noqa: B008
    *,
    max_length: int | None = None,
) -> tuple[tuple[int, ...], int]:
    """The class of every review, in the order given, and how many reviews were cut.

    Raises:
        DataError: A review has a token that the model does not know.
        NumericalCheckError: The model produced logits that are not finite.
    """
    rows, truncated = _encode(classifier, reviews, max_length)
    check_token_ids(
        classifier.model, max((max(row["input_ids"], default=0) for row in rows), default=0)
    )
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]), reverse=True)
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    predicted: dict[int, int] = {}
    with torch.no_grad():
        for indices in tqdm(batches, desc="evaluate", unit="batch", disable=None, leave=False):
            logits = run_model(classifier.model, _padded(classifier, [rows[i] for i in indices]))
            if not bool(torch.isfinite(logits).all()):
                raise NumericalCheckError("the model produced logits that are not finite")
            predicted |= dict(zip(indices, logits.argmax(dim=-1).tolist(), strict=True))
    return tuple(predicted[index] for index in range(len(rows))), truncated


def _encode(
    classifier: Classifier, reviews: Sequence[Review], max_length: int | None
) -> tuple[list[dict[str, list[int]]], int]:
    """Token ids of every review, and how many were cut."""
    most = classifier.positions if max_length is None else max_length
    if most > classifier.positions:
        raise DataError(
            f"max_length {most} is more than the {classifier.positions} positions of the model"
        )
    texts = [review.text for review in reviews]
    whole = classifier.tokenizer(texts, verbose=False)["input_ids"]
    encoded = classifier.tokenizer(texts, truncation=True, max_length=most)
    rows = [
        {key: encoded[key][index] for key in classifier.inputs if key in encoded}
        for index in range(len(texts))
    ]
    return rows, sum(len(ids) > most for ids in whole)


def _padded(classifier: Classifier, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    padded: Any = classifier.tokenizer.pad(rows, return_tensors="pt")
    return {key: padded[key] for key in classifier.inputs if key in padded}
