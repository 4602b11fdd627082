"""Tiny random models of real Hugging Face classes, with outlier channels, for tests and tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ipex_sq.errors import unknown_name
from ipex_sq.models.conv1d import convert_conv1d
from ipex_sq.models.planting import blow_up
from ipex_sq.models.topology import find_topology

VOCABULARY = 128
HIDDEN = 64
LAYERS = 2
HEADS = 4
POSITIONS = 128

OUTLIER_CHANNELS = (3, 17)
OUTLIER_FACTOR = 30.0


@dataclass(frozen=True)
class Family:
    """A model class in a small size.

    Attributes:
        config: Name of its configuration class in transformers.
        settings: What the configuration calls its sizes.
        encoder: A sequence classifier rather than a causal language model.
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    encoder: bool = False


_USUAL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
_GROUPED: dict[str, Any] = _USUAL | {"num_key_value_heads": HEADS // 2}
_GEMMA: dict[str, Any] = _GROUPED | {"head_dim": HIDDEN // HEADS}
_GPT: dict[str, Any] = {
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": POSITIONS,
}
_BLOOM: dict[str, Any] = {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
_OPT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "ffn_dim": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
_FALCON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}

_FAMILIES = {
    "bloom": Family("BloomConfig", _BLOOM),
    "opt": Family("OPTConfig", _OPT),
    "opt-350m": Family(
        "OPTConfig", _OPT | {"word_embed_proj_dim": HIDDEN // 2, "do_layer_norm_before": False}
    ),
    "gpt2": Family("GPT2Config", _GPT),
    "gptj": Family("GPTJConfig", _GPT | {"rotary_dim": 8}),
    "gpt-neox": Family("GPTNeoXConfig", _USUAL),
    "falcon": Family("FalconConfig", _FALCON),
    "falcon-new": Family(
        "FalconConfig", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": HEADS // 2}
    ),
    "mpt": Family(
        "MptConfig",
        {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": POSITIONS},
    ),
    "llama": Family("LlamaConfig", _GROUPED | {"tie_word_embeddings": True}),
    "mistral": Family("MistralConfig", _GROUPED),
    "qwen2": Family("Qwen2Config", _GROUPED),
    "qwen3": Family("Qwen3Config", _GEMMA),
    "phi": Family("PhiConfig", _USUAL),
    "phi3": Family("Phi3Config", _GROUPED),
    "gemma2": Family("Gemma2Config", _GEMMA),
    "gemma3": Family("Gemma3TextConfig", _GEMMA),
    "granite": Family("GraniteConfig", _GROUPED),
    "glm4": Family("Glm4Config", _GEMMA),
    "stablelm": Family("StableLmConfig", _GROUPED),
    "mixtral": Family("MixtralConfig", _GROUPED | {"num_local_experts": 4}),
    "bert": Family("BertConfig", _USUAL, encoder=True),
    "roberta": Family("RobertaConfig", _USUAL, encoder=True),
    "distilbert": Family(
        "DistilBertConfig",
        {
            "dim": HIDDEN,
            "hidden_dim": 2 * HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "max_position_embeddings": POSITIONS,
        },
        encoder=True,
    ),
    "electra": Family("ElectraConfig", _USUAL | {"embedding_size": HIDDEN // 2}, encoder=True),
    "albert": Family("AlbertConfig", _USUAL | {"embedding_size": HIDDEN // 2}, encoder=True),
}
FAMILIES = tuple(_FAMILIES)
DECODERS = tuple(name for name, family in _FAMILIES.items() if not family.encoder)


def tiny_model(family: str, *, outliers: bool = True, seed: int = 0) -> nn.Module:
    """A random model of two layers, whose norms blow up a few channels as large models do.

    Args:
        family: One of `FAMILIES`.
        outliers: Multiply `OUTLIER_CHANNELS` of every norm that Linears read by `OUTLIER_FACTOR`
            and divide the columns that read them, so that the channels are large and matter little.
        seed: Of the weights.
    """
    if family not in _FAMILIES:
        raise unknown_name("tiny family", family, FAMILIES)
    torch.manual_seed(seed)
    model = convert_conv1d(_random_model(_FAMILIES[family])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not _is_embedding(name):
                parameter.mul_(4.0)  # initialised at 0.02: too flat to tell logits apart
            elif parameter.ndim == 3:
                parameter.mul_(4.0)  # experts of one layer, stacked
            elif parameter.ndim == 1 and name.endswith("bias"):
                parameter.normal_(std=0.1)
    if outliers:
        ids = torch.arange(2, 34)[None]
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for group in find_topology(model, [example] * 4).groups:
            blow_up(model, group, (OUTLIER_CHANNELS, OUTLIER_FACTOR))
    return model


def _random_model(family: Family) -> nn.Module:
    import transformers

    kind = "SequenceClassification" if family.encoder else "CausalLM"
    config = getattr(transformers, family.config)(
        vocab_size=VOCABULARY, pad_token_id=1, bos_token_id=0, eos_token_id=0, **family.settings
    )
    model: nn.Module = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    return model


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "wte", "wpe"))


def tiny_tokenizer(texts: Iterable[str]) -> Any:
    """A word-level tokenizer over the commonest words of `texts`; the rest become one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    trainer = trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>", "<pad>"])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
