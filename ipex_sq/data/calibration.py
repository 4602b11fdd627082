"""Calibration batches: which texts, and as rows without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ipex_sq.data.documents import Text
from ipex_sq.data.special_tokens import added_tokens
from ipex_sq.errors import DataError
from ipex_sq.recipe.batching import batch_by_length

Item = TypeVar("Item", bound=Text)


def choose_texts(texts: Sequence[Item], count: int, seed: int) -> list[Item]:
    """Draw `count` texts by `seed`, in the order of the source.

    Raises:
        DataError: There are fewer than asked for.
    """
    if len(texts) < count:
        raise DataError(
            f"calibration asks for {count} texts, its set has {len(texts)}: pass more texts or ask "
            "for fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(texts), generator=generator)[:count]
    return [texts[index] for index in sorted(chosen.tolist())]


def calibration_batches(
    documents: Sequence[Text],
    tokenizer: Any,
    max_tokens: int = 512,
    *,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
    appended: bool = True,
) -> list[dict[str, Tensor]]:
    """Tokenize texts and batch rows of equal length, so that none is padded.

    Args:
        documents: Texts to calibrate on.
        tokenizer: Called as in evaluation, with its default special tokens.
        max_tokens: Longer texts are cut to it; special tokens stay.
        inputs: What the model takes of what the tokenizer gives.
        appended: Keep the special tokens that the tokenizer puts behind a text. Classifiers read
            them; a language model is scored without them, and a text that is cut ends nowhere.

    Returns:
        Batches of `inputs`, each `[batch, tokens]`, at least 2 tokens long.

    Raises:
        DataError: No text, or one that has fewer than two tokens.
    """
    if not documents:
        raise DataError("there are no calibration texts")
    dropped = 0 if appended else added_tokens(tokenizer, documents[0].text)[1]
    rows = []
    for document in documents:
        encoded = tokenizer(document.text, truncation=True, max_length=max_tokens + dropped)
        tokens = len(encoded["input_ids"]) - dropped
        if tokens < 2:
            raise DataError(f"calibration text {document.text[:30]!r} has fewer than two tokens")
        rows.append(
            {key: torch.tensor([encoded[key][:tokens]]) for key in inputs if key in encoded}
        )
    return batch_by_length(rows)
