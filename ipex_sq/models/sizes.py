"""How large a model is and how long its texts, before any of it is in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipex_sq.models.classifier import classifier_source
from ipex_sq.models.failures import loading_errors
from ipex_sq.models.kinds import check_causal
from ipex_sq.models.loading import (
    CAUSAL_LM,
    SEQUENCE_CLASSIFICATION,
    refuse_quantized,
    resolve_source,
)
from ipex_sq.models.positions import position_limit
from ipex_sq.models.shapes import is_classifier_shape, shape_config


@dataclass(frozen=True)
class ModelSize:
    """What a configuration says.

    Attributes:
        parameters: Number of weights, tied ones once.
        outputs: Numbers per prediction: the vocabulary, or the classes.
        positions: Most tokens of a text; None where the model sets no limit.
    """

    parameters: int
    outputs: int
    positions: int | None = None


def named_size(name_or_path: str, task: str, *, trust_remote_code: bool = False) -> ModelSize:
    """Of a model on disk or on the hub.

    Args:
        name_or_path: As for `load_model`.
        task: "causal-lm" or "sequence-classification".
        trust_remote_code: Run code that comes with the model.

    Raises:
        DataError: It cannot be found.
        ConfigError: It is quantized.
        UnsupportedModelError: It is of another kind.
    """
    from transformers import AutoConfig

    find = classifier_source if task == SEQUENCE_CLASSIFICATION else resolve_source
    source, options = find(name_or_path)
    options["trust_remote_code"] = trust_remote_code
    with loading_errors(name_or_path, "model"):
        config = AutoConfig.from_pretrained(source, **options)
        refuse_quantized(config, name_or_path)
        if task == CAUSAL_LM:
            check_causal(config, name_or_path)
        return _size(config, task, trust_remote_code)


def shape_size(name: str) -> ModelSize:
    """Of a shape with random weights.

    Raises:
        ConfigError: Unknown name.
    """
    task = SEQUENCE_CLASSIFICATION if is_classifier_shape(name) else CAUSAL_LM
    return _size(shape_config(name), task, False)


def _size(config: Any, task: str, trust_remote_code: bool) -> ModelSize:
    # The models' base class comes before the empty weights: what it imports of torch cannot be
    # imported under them.
    import transformers.modeling_utils  # noqa: F401
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kinds = {
        CAUSAL_LM: AutoModelForCausalLM,
        SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
    }
    with init_empty_weights(include_buffers=True):
        model = kinds[task].from_config(config, trust_remote_code=trust_remote_code)
    parameters = sum(item.numel() for item in model.parameters())
    outputs = config.vocab_size if task == CAUSAL_LM else config.num_labels
    return ModelSize(parameters, int(outputs), position_limit(model))
