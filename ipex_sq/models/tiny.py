"""Tiny random models of real Hugging Face classes, with outlier channels, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ipex_sq.errors import unknown_name

VOCABULARY = 128
HIDDEN = 64
LAYERS = 2
HEADS = 4
POSITIONS = 128

OUTLIER_CHANNELS = (3, 17)
OUTLIER_FACTOR = 30.0


def _config(family: str) -> Any:
    from transformers import BloomConfig, LlamaConfig, OPTConfig

    if family == "bloom":
        return BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS)
    if family == "opt":
        return OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
        )
    if family == "llama":
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
        )
    raise unknown_name("tiny family", family, FAMILIES)


FAMILIES = ("bloom", "opt", "llama")


def tiny_model(family: str, *, outliers: bool = True, seed: int = 0) -> nn.Module:
    """A random model of two layers, whose norms blow up a few channels as large models do.

    Args:
        family: One of `FAMILIES`.
        outliers: Multiply `OUTLIER_CHANNELS` of every norm inside the layers by `OUTLIER_FACTOR`
            and divide the columns that read them, so that the channels are large and matter little.
        seed: Of the weights.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(_config(family)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(4.0)  # initialised at 0.02: too flat to tell logits apart
            elif parameter.ndim == 1 and name.endswith("bias"):
                parameter.normal_(std=0.1)
        if outliers:
            _plant_outliers(model)
    return model


def _plant_outliers(model: nn.Module) -> None:
    norms = [
        module
        for name, module in model.named_modules()
        if "norm" in name.split(".")[-1] and any(part.isdigit() for part in name.split("."))
    ]
    for norm in norms:
        for field in ("weight", "bias"):
            values = getattr(norm, field, None)
            if values is not None:
                values[list(OUTLIER_CHANNELS)] *= OUTLIER_FACTOR
    for name, module in model.named_modules():
        reader = name.split(".")[-1]
        if isinstance(module, nn.Linear) and reader in _NORM_READERS:
            module.weight[:, list(OUTLIER_CHANNELS)] /= OUTLIER_FACTOR


_NORM_READERS = {
    "query_key_value", "dense_h_to_4h",
    "q_proj", "k_proj", "v_proj", "fc1", "gate_proj", "up_proj",
}  # fmt: skip


def tiny_tokenizer(texts: Iterable[str]) -> Any:
    """A word-level tokenizer over the commonest words of `texts`; the rest become one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    trainer = trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>", "<pad>"])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
