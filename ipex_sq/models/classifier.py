"""Load a sequence classifier: any of the hub or a folder, or the embedded one."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipex_sq.config import EMBEDDED
from ipex_sq.errors import DataError, UnsupportedModelError
from ipex_sq.models.completeness import (
    check_body_complete,
    check_finite,
    missing_weights,
    refuse_integer_weights,
)
from ipex_sq.models.embedded_encoder import embedded_classifier_folder
from ipex_sq.models.failures import loading_errors
from ipex_sq.models.int8_folders import refuse_int8
from ipex_sq.models.loading import COMPLETELY, refuse_quantized, resolve_source
from ipex_sq.models.vocabulary import check_vocabulary, read_tokenizer

logger = logging.getLogger(__name__)

UNTRAINED = "UNTRAINED HEAD"
UNLIMITED = 2**30
SHORTEST_NAME = 3
"""Letters that names of a class have in common: neg, NEGATIVE."""

OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier in fp32, for inference.

    Attributes:
        model: Maps a batch to logits `[batch, classes]`.
        tokenizer: Its tokenizer.
        trained_head: False where the checkpoint has no classification head, so that it was drawn
            at random and the predictions mean nothing.
    """

    model: nn.Module
    tokenizer: Any
    trained_head: bool = True

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the model takes of what the tokenizer gives."""
        return model_inputs(self.model, self.tokenizer)

    @property
    def positions(self) -> int:
        """Most tokens that the model can read."""
        config: Any = self.model.config
        positions = int(getattr(config, "max_position_embeddings", None) or UNLIMITED)
        # RoBERTa counts its positions from behind the padding index.
        offset = config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0
        return min(positions - offset, int(self.tokenizer.model_max_length))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, by index."""
        config: Any = self.model.config
        return tuple(str(config.id2label[index]) for index in range(config.num_labels))


def class_order(labels: Sequence[str], classes: Sequence[str]) -> tuple[int, ...]:
    """The class of each label, by their names.

    Args:
        labels: Names of the labels of a data set, by index.
        classes: Names of the classes of a head, by index. They match by the first letters in any
            case, as heads say neg, NEGATIVE or Negative; a head without names of its own (LABEL_0,
            or just 0) has the order of the labels.

    Raises:
        DataError: The classes are others than the labels, or more.
    """
    if len(classes) == len(labels):
        plain = [re.fullmatch(r"(?:label[_ ]?)?(\d+)", name, re.IGNORECASE) for name in classes]
        if all(found and int(found[1]) == index for index, found in enumerate(plain)):
            return tuple(range(len(labels)))
        starts = [label[:SHORTEST_NAME].lower() for label in labels]
        named = [name.lower()[:SHORTEST_NAME] for name in classes]
        if sorted(starts) == sorted(named):
            return tuple(named.index(start) for start in starts)
    raise DataError(
        f"the model's classes are {', '.join(classes)}, the labels of these reviews "
        f"{' and '.join(labels)}: pass a model of these classes, or --dataset FILE.jsonl with "
        "labels that are indexes of the model's classes"
    )


def classifier_source(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """As `resolve_source`; "embedded" is the classifier that `fine-tune` left.

    Raises:
        DataError: A path that is no model folder; nothing was fine-tuned yet.
    """
    if name_or_path == EMBEDDED:
        return str(embedded_classifier_folder()), {"local_files_only": True}
    return resolve_source(name_or_path)


def load_classifier(
    name_or_path: str = EMBEDDED, *, num_labels: int | None = None, trust_remote_code: bool = False
) -> Classifier:
    """Load a sequence classifier and its tokenizer.

    Args:
        name_or_path: "embedded" (as `fine-tune` left it), a local folder, or a hub name.
        num_labels: Classes of a new head; None keeps the config's.
        trust_remote_code: Run code that comes with the model.

    Raises:
        DataError: The hub is unreachable or knows no such model; the folder is none; the embedded
            classifier was not fine-tuned yet; there is no tokenizer, or another model's.
        ConfigError: It is quantized.
        UnsupportedModelError: It is a causal language model, or no classifier can be made of it.
        CheckpointError: Weights are damaged or of other shapes, or missing in the body.
        NumericalCheckError: A weight is not finite.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    refuse_int8(name_or_path)
    source, options = classifier_source(name_or_path)
    options["trust_remote_code"] = trust_remote_code
    with loading_errors(name_or_path, "sequence classifier"):
        config = AutoConfig.from_pretrained(source, **options)
        refuse_quantized(config, name_or_path)
        _refuse_decoder(name_or_path, config)
        classes = config.num_labels
        if num_labels is not None:
            config.num_labels = num_labels
        tokenizer = read_tokenizer(source, options, name_or_path)
        refuse_integer_weights(Path(source))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a missing head is at least the same in every run
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source, config=config, torch_dtype=torch.float32, **COMPLETELY, **options
            )
    if info["mismatched_keys"] and num_labels not in (None, classes):
        raise DataError(
            f"{name_or_path} has a head for {classes} classes, the reviews have {num_labels}: pass "
            "an encoder without a head"
        )
    check_body_complete(model, info, name_or_path)
    check_vocabulary(model, tokenizer, name_or_path)
    trained = not missing_weights(model, info)
    check_finite(model)
    return Classifier(model.eval(), tokenizer, trained)


def warn_untrained(name: str) -> str:
    """What to say, on stderr and in a report, of a model without a trained head."""
    return (
        f"{UNTRAINED}: {name} has no classification head of its own, one was drawn at random, and "
        "its predictions mean nothing. Fine-tune it first: python -m ipex_sq fine-tune --model "
        f"{name}"
    )


def model_inputs(model: nn.Module, tokenizer: Any) -> tuple[str, ...]:
    """Names of the tensors that `tokenizer` gives and `model` takes."""
    takes = inspect.signature(model.forward).parameters
    return tuple(name for name in tokenizer.model_input_names if name in takes)


def _refuse_decoder(name: str, config: Any) -> None:
    kinds = config.architectures or []
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise UnsupportedModelError(
            f"{name} is a causal language model ({kinds[0]}), not a sequence classifier: use "
            "eval_lambada.py"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise DataError(f"{name} is an encoder-decoder model: pass an encoder")
