"""Calibration batches: which texts, and as rows without padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ipex_sq.config import DataConfig
from ipex_sq.data.documents import Document
from ipex_sq.errors import DataError

MOST_TOKENS_PER_BATCH = 2048


def choose_texts(documents: Sequence[Document], config: DataConfig) -> list[Document]:
    """Draw `config.calib_samples` documents by `config.seed`, in the order of the source.

    Raises:
        DataError: There are fewer than asked for.
    """
    if len(documents) < config.calib_samples:
        raise DataError(
            f"--calib_samples asks for {config.calib_samples} texts, the calibration set has "
            f"{len(documents)}"
        )
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(documents), generator=generator)[: config.calib_samples]
    return [documents[index] for index in sorted(chosen.tolist())]


def calibration_batches(
    documents: Sequence[Document], tokenizer: Any, max_tokens: int = 512
) -> list[dict[str, Tensor]]:
    """Tokenize texts and batch rows of equal length, so that none is padded.

    Args:
        documents: Texts to calibrate on.
        tokenizer: Called as in evaluation, with its default special tokens.
        max_tokens: Longer texts are cut at their end.

    Returns:
        Batches of `input_ids` and `attention_mask`, `[batch, tokens]`, at least 2 tokens long.

    Raises:
        DataError: No text, or one that has fewer than two tokens.
    """
    if not documents:
        raise DataError("there are no calibration texts")
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for document in documents:
        ids = tokenizer(document.text)["input_ids"][:max_tokens]
        if len(ids) < 2:
            raise DataError(f"calibration text {document.text[:30]!r} has fewer than two tokens")
        by_length[len(ids)].append(ids)
    batches = []
    for length in sorted(by_length, reverse=True):
        rows = by_length[length]
        size = max(MOST_TOKENS_PER_BATCH // length, 1)
        for start in range(0, len(rows), size):
            ids = torch.tensor(rows[start : start + size])
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches
