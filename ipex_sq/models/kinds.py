"""Which models are causal language models, by their configuration."""

from __future__ import annotations

from typing import Any

from ipex_sq.errors import UnsupportedModelError

_WRITTEN_BY = ("ForCausalLM", "LMHeadModel", "Model")
"""Ends of names of classes: with a head, or the body alone, whose head may be tied. Whether all
weights of the head are there is checked where they are loaded."""


def check_causal(config: Any, name: str) -> None:
    """Refuse a model whose predictions are not those of the next token, before it is loaded.

    transformers makes a language model of nearly anything: weights of other heads are dropped,
    missing ones drawn at random, and encoders see the token that they should predict.

    Args:
        config: As transformers reads config.json.
        name: Of the model, for errors.

    Raises:
        UnsupportedModelError: An encoder, an encoder-decoder, or a model with another head.
    """
    from transformers.models.auto import modeling_auto

    written = _architectures(config)
    what = written[0] if written else "an encoder"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model, not a causal language model: pass a decoder"
        )
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    of_language = any(kind.endswith(_WRITTEN_BY) or kind == causal for kind in written)
    # These classes are encoders unless the configuration says otherwise.
    encodes = causal and config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if (written and not of_language) or (encodes and not decodes):
        raise UnsupportedModelError(
            f"{name} is no causal language model ({what}): pass one, or score a classifier with "
            f"`python -m ipex_sq evaluate --model_path {name}`"
        )


def _architectures(config: Any) -> list[str]:
    found = getattr(config, "architectures", None)
    found = [found] if isinstance(found, str) else found
    return [str(kind) for kind in found] if isinstance(found, (list, tuple)) else []
