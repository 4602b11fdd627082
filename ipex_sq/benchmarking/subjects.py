"""What is timed: a causal language model, a classifier, or a known shape with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.config import DataConfig
from ipex_sq.data.calibration import calibration_batches, choose_texts
from ipex_sq.data.lambada import load_lambada
from ipex_sq.data.reviews import load_reviews
from ipex_sq.evaluation.experiment import Texts
from ipex_sq.models.classifier import load_classifier
from ipex_sq.models.loading import CAUSAL_LM, SEQUENCE_CLASSIFICATION, load_model, task_of
from ipex_sq.models.shapes import is_classifier_shape, random_model
from ipex_sq.models.sizes import ModelSize, named_size, shape_size
from ipex_sq.review_config import ReviewConfig

CALIBRATION_TEXTS = 8
"""Latency does not depend on the ranges: a few texts set them."""

CLASSIFIER, RANDOM = "classifier", "random"

RANDOM_TOKENS = 64


@dataclass(frozen=True)
class Loaded:
    """A float model in fp32, calibration batches, and the tokenizer of a language model."""

    model: nn.Module
    batches: list[dict[str, Tensor]]
    tokenizer: Any = None


@dataclass(frozen=True)
class Subject:
    """A model to load.

    Attributes:
        name: Hub name, folder, "embedded", or a shape.
        kind: "causal-lm", "classifier" or "random" (weights, of the shape `name`).
        trust_remote_code: Run code that comes with the model.
        texts: LAMBADA documents to score, and those to calibrate on, for that workload.
        calib_max_tokens: These are cut to so many tokens.
    """

    name: str
    kind: str = CAUSAL_LM
    trust_remote_code: bool = False
    texts: Texts | None = None
    calib_max_tokens: int = DataConfig.calib_max_tokens

    @property
    def classifies(self) -> bool:
        """Whether it has a classification head."""
        return self.kind == CLASSIFIER or (self.kind == RANDOM and is_classifier_shape(self.name))

    def size(self) -> ModelSize:
        """Of the model, without loading it."""
        if self.kind == RANDOM:
            return shape_size(self.name)
        task = SEQUENCE_CLASSIFICATION if self.kind == CLASSIFIER else CAUSAL_LM
        return named_size(self.name, task, trust_remote_code=self.trust_remote_code)

    def load(self) -> Loaded:
        """The float model, and batches to calibrate on: a few where only speed is asked for."""
        if self.kind == RANDOM:
            return Loaded(*_random(self.name))
        trust = self.trust_remote_code
        if self.kind == CLASSIFIER:
            classifier = load_classifier(self.name, trust_remote_code=trust)
            reviews = load_reviews("embedded", purpose="calibration").documents
            chosen = choose_texts(reviews, CALIBRATION_TEXTS, ReviewConfig.seed)
            inputs = classifier.inputs
            batches = calibration_batches(chosen, classifier.tokenizer, 128, inputs=inputs)
            return Loaded(classifier.model, batches)
        model, tokenizer = load_model(self.name, trust_remote_code=trust)
        if self.texts is not None and self.texts.calibration is not None:
            documents = self.texts.calibration.documents
            most = self.calib_max_tokens
            batches = calibration_batches(documents, tokenizer, most, appended=False)
            return Loaded(model, batches, tokenizer)
        texts = load_lambada("embedded", purpose="calibration").documents
        chosen_texts = choose_texts(texts, CALIBRATION_TEXTS, DataConfig.seed)
        return Loaded(
            model, calibration_batches(chosen_texts, tokenizer, appended=False), tokenizer
        )


def _random(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model = random_model(name)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    generator = torch.Generator().manual_seed(0)
    shape = (CALIBRATION_TEXTS, RANDOM_TOKENS)
    ids = torch.randint(2, vocabulary, shape, generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task_of(model) == SEQUENCE_CLASSIFICATION:
        batch["token_type_ids"] = torch.zeros_like(ids)
    return model, [batch]
