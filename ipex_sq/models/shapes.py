"""Models of known shapes with random weights, so that speed can be measured without a download."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ipex_sq.config import RANDOM_SHAPES
from ipex_sq.errors import unknown_name


@dataclass(frozen=True)
class Shape:
    """A published model's configuration.

    Attributes:
        config: Name of its configuration class in transformers.
        settings: Where it differs from the class's defaults.
        classifier: Whether it gets a classification head rather than a language model's.
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    classifier: bool = False


SHAPES: dict[str, Shape] = {
    "bert-base": Shape("BertConfig", {"vocab_size": 30522}, classifier=True),
    "bert-large": Shape(
        "BertConfig",
        {
            "vocab_size": 30522,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        classifier=True,
    ),
    "bloom-560m": Shape(
        "BloomConfig", {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}
    ),
    "bloom-1b7": Shape(
        "BloomConfig", {"hidden_size": 2048, "n_layer": 24, "n_head": 16, "vocab_size": 250880}
    ),
    "bloom-7b1": Shape(
        "BloomConfig", {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880}
    ),
    "llama-1b": Shape(
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "opt-125m": Shape("OPTConfig", {}),
    "opt-1.3b": Shape(
        "OPTConfig",
        {
            "hidden_size": 2048,
            "ffn_dim": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
        },
    ),
}


def is_classifier_shape(name: str) -> bool:
    """Whether the shape `name` has a classification head.

    Raises:
        ConfigError: Unknown name.
    """
    return _shape(name).classifier


def shape_config(name: str) -> Any:
    """The transformers configuration of the shape `name`.

    Raises:
        ConfigError: Unknown name.
    """
    import transformers

    shape = _shape(name)
    return getattr(transformers, shape.config)(**shape.settings)


def random_model(name: str, seed: int = 0) -> nn.Module:
    """A model of the shape `name`, weights as its class draws them, in fp32 for inference.

    Raises:
        ConfigError: Unknown name.
    """
    import transformers

    kind = "SequenceClassification" if is_classifier_shape(name) else "CausalLM"
    config = shape_config(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    return model.float().eval()


def _shape(name: str) -> Shape:
    if name not in SHAPES:
        raise unknown_name("shape", name, RANDOM_SHAPES)
    return SHAPES[name]
