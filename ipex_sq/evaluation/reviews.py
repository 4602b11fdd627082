"""Accuracy of a sequence classifier in several forms: load, quantize, evaluate."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipex_sq.backends.base import DTYPES
from ipex_sq.checkpoint.folders import read_manifest
from ipex_sq.checkpoint.plans import load_plan
from ipex_sq.checkpoint.saving import load
from ipex_sq.config import EMBEDDED, EvaluationConfig
from ipex_sq.data.calibration import calibration_batches, choose_texts
from ipex_sq.data.documents import TextSet, check_disjoint, check_unseen
from ipex_sq.data.reviews import Review, load_reviews, training_reviews
from ipex_sq.errors import DataError, UnsupportedModelError
from ipex_sq.evaluation.classification import (
    ClassificationResult,
    evaluate_classifier,
    order_of,
    predict,
)
from ipex_sq.evaluation.runs import (
    Outcome,
    Run,
    SharedCalibration,
    checkpoint_description,
    describe_with_rows,
    float_description,
    int8_description,
)
from ipex_sq.models.classifier import Classifier, load_classifier
from ipex_sq.models.embedded_encoder import embedded_classifier_folder
from ipex_sq.models.finetuning import TRAINING
from ipex_sq.models.loading import SEQUENCE_CLASSIFICATION, load_tokenizer
from ipex_sq.review_config import ReviewConfig
from ipex_sq.system import keep_freed_memory, peak_rss_bytes, reset_peak_rss


@dataclass(frozen=True)
class ReviewTexts:
    """The reviews to score and to calibrate on; disjoint."""

    evaluation: TextSet[Review]
    calibration: TextSet[Review] | None


def load_review_texts(config: ReviewConfig, *, calibrate: bool) -> ReviewTexts:
    """Load the reviews to score and, for int8, those to calibrate on.

    Raises:
        DataError: Missing, malformed, too few, or rows in both sets.
    """
    evaluation = load_reviews(config.dataset).first(config.limit)
    if not calibrate:
        return ReviewTexts(evaluation, None)
    chosen = calibration_reviews(config, evaluation)
    check_disjoint(chosen.documents, evaluation.documents)
    return ReviewTexts(evaluation, chosen)


def calibration_reviews(
    config: ReviewConfig, evaluation: TextSet[Review] | None = None
) -> TextSet[Review]:
    """Draw the reviews to calibrate on.

    Args:
        config: Which and how many.
        evaluation: Those to score, which decide where the config names none.
    """
    if config.calib_dataset is not None:
        pool = load_reviews(config.calib_dataset, purpose="calibration")
    elif evaluation is not None:
        pool = training_reviews(evaluation)
    else:
        pool = load_reviews(config.dataset, purpose="calibration")
    drawn = choose_texts(pool.documents, config.num_samples, config.seed)
    return TextSet(pool.name, pool.split, tuple(drawn), pool.why)


def review_source(texts: TextSet[Review], config: ReviewConfig) -> dict[str, Any]:
    """What plans and scales files say of their calibration texts."""
    return {**describe_with_rows(texts), "max_length": config.max_length}


def check_training(name_or_path: str, evaluation: TextSet[Review]) -> None:
    """Refuse reviews that `fine-tune` trained this model on.

    Raises:
        DataError: Says which.
    """
    folder = embedded_classifier_folder() if name_or_path == EMBEDDED else Path(name_or_path)
    record = folder / TRAINING
    if record.is_file():
        rows = json.loads(record.read_text(encoding="utf-8"))["row_sha256"]
        check_unseen(rows, evaluation.documents, "fine-tuned")


class ReviewExperiment:
    """Runs that share a classifier, reviews and one calibration."""

    def __init__(
        self, texts: ReviewTexts, model: str, data: ReviewConfig, *, evaluation: EvaluationConfig
    ) -> None:
        self._texts, self._model, self._data = texts, model, data
        self._evaluation = evaluation
        self._calibration: SharedCalibration | None = None
        self.classes: tuple[str, ...] = ()
        """The model's names of the labels, known after a run."""
        self.label_mapping: dict[str, int] = {}
        """The model's class of each label, where names gave another order than indexes."""

    def run(self, run: Run) -> Outcome:
        """Load, quantize where asked, and score one model."""
        reset_peak_rss()
        keep_freed_memory()
        check_training(self._model, self._texts.evaluation)
        classifier = load_classifier(self._model)
        self._match(classifier)
        if run.quant is None:
            ready = replace(classifier, model=classifier.model.to(DTYPES[run.dtype]))
            return self._score(run.label, ready, float_description(run))
        if self._calibration is None:
            texts = self._texts.calibration
            assert texts is not None  # noqa: S101
            batches = review_batches(classifier, texts, self._data)
            source = review_source(texts, self._data)
            self._calibration = SharedCalibration(batches, source)
        quantized = self._calibration.quantize(classifier.model, run.quant)
        ready = replace(classifier, model=quantized.model)
        return self._score(run.label, ready, int8_description(quantized, run.quant))

    def run_checkpoint(self, folder: Path) -> Outcome:
        """Load an int8 model of `quantize` and score it.

        Raises:
            UnsupportedModelError: It is no sequence classifier.
            DataError: It was calibrated on some of the reviews.
        """
        reset_peak_rss()
        keep_freed_memory()
        manifest = check_task(folder)
        plan = load_plan(folder)
        rows = plan.calibration.get("row_sha256", ())
        check_unseen(rows, self._texts.evaluation.documents, "calibrated")
        classifier = load_checkpoint(folder)
        self._match(classifier)
        label = "int8" if plan.alpha is None else "int8+sq"
        return self._score(label, classifier, checkpoint_description(plan, manifest))

    def _match(self, classifier: Classifier) -> None:
        """Find the model's class of each label, before the work.

        Raises:
            DataError: See `order_of`.
        """
        reviews = self._texts.evaluation.documents
        order = order_of(classifier, reviews)
        self.classes = tuple(classifier.classes[index] for index in order)
        if order != tuple(range(len(order))):
            self.label_mapping = dict(zip(reviews[0].names, order, strict=True))

    def _score(self, label: str, classifier: Classifier, description: dict[str, Any]) -> Outcome:
        documents = self._texts.evaluation.documents
        most, few = self._data.max_length, documents[: self._evaluation.batch_size]
        start = time.perf_counter()
        # Untimed: here a backend compiles, once with padding and once without.
        for texts in (few, 2 * few[:1]):
            predict(classifier, texts, self._evaluation, max_length=most)
        first = time.perf_counter() - start
        start = time.perf_counter()
        scores = evaluate_classifier(classifier, documents, self._evaluation, max_length=most)
        seconds = time.perf_counter() - start
        row = {
            "label": label,
            **description,
            **_accuracy(scores, len(classifier.classes)),
            "trained_head": classifier.trained_head,
            "warm_up_s": first,
            "evaluate_s": seconds,
            "docs_per_s": len(documents) / seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        return Outcome(row, scores, classifier.model, classifier.tokenizer)


def review_batches(
    classifier: Classifier, texts: TextSet[Review], config: ReviewConfig
) -> list[dict[str, Any]]:
    """Calibration batches with all that the model takes.

    Raises:
        DataError: `max_length` is more than the model's positions.
    """
    if config.max_length > classifier.positions:
        raise DataError(
            f"--max_length {config.max_length} is more than the {classifier.positions} positions "
            "of the model"
        )
    return list(
        calibration_batches(
            texts.documents,
            classifier.tokenizer,
            max_tokens=config.max_length,
            inputs=classifier.inputs,
        )
    )


def check_task(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that must be a classifier.

    Raises:
        CheckpointError: It cannot be read.
        UnsupportedModelError: It is no sequence classifier.
    """
    manifest = read_manifest(folder)
    if manifest["task"] != SEQUENCE_CLASSIFICATION:
        raise UnsupportedModelError(
            f"{folder} is a causal language model, not a sequence classifier: use eval_lambada.py"
        )
    return manifest


def load_checkpoint(folder: Path) -> Classifier:
    """An int8 classifier of `quantize`, with its tokenizer."""
    manifest = read_manifest(folder)
    trained = bool(manifest["made_from"].get("trained_head", True))
    return Classifier(load(folder), load_tokenizer(str(folder)), trained)


def _accuracy(scores: ClassificationResult, classes: int) -> dict[str, Any]:
    return {
        "accuracy": scores.accuracy,
        "stderr": scores.stderr,
        "f1": scores.f1(classes),
        "confusion_matrix": scores.confusion_matrix(classes),
        "truncated": scores.truncated,
        "delta": None,
        "delta_stderr": None,
        "gained": None,
        "lost": None,
    }
