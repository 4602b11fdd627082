"""Batches of token ids without padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ipex_sq.errors import CalibrationError

MOST_TOKENS_PER_BATCH = 2048

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask` and where a model takes them `token_type_ids`, all
`[batch, tokens]`."""


def batch_by_length(rows: Iterable[Batch]) -> list[dict[str, Tensor]]:
    """Join rows of equal length, longest first; rows of one length keep their order.

    Args:
        rows: Unpadded texts, `[1, tokens]` each.
    """
    by_length: dict[int, list[Batch]] = defaultdict(list)
    for row in rows:
        by_length[row["input_ids"].shape[1]].append(row)
    batches = []
    for length in sorted(by_length, reverse=True):
        alike = by_length[length]
        size = max(MOST_TOKENS_PER_BATCH // length, 1)
        for start in range(0, len(alike), size):
            part = alike[start : start + size]
            batches.append({key: torch.cat([row[key] for row in part]) for key in part[0]})
    return batches


def rows_of(batch: Batch) -> Iterator[dict[str, Tensor]]:
    """The batch, one text at a time."""
    for index in range(batch["input_ids"].shape[0]):
        yield {key: value[index : index + 1] for key, value in batch.items()}


def without_padding(batches: Iterable[Batch]) -> list[Batch]:
    """The same texts without padding: as they are where there is none, else batched anew.

    Padding would widen the ranges and a padded batch runs other sums. Texts in the same order give
    the same batches, whichever way they were padded.

    Raises:
        CalibrationError: There is no text or an empty one, or a mask has a hole.
    """
    found = list(batches)
    if not found:
        raise CalibrationError("there are no calibration batches: pass at least one text")
    if any(batch["input_ids"].numel() == 0 for batch in found):
        raise CalibrationError("a calibration batch is empty")
    if not any(_is_padded(batch) for batch in found):
        return found
    rows = [row for batch in found for row in rows_of(batch)]
    return list(batch_by_length([_stripped(row) for row in rows]))


def _is_padded(batch: Batch) -> bool:
    mask = batch.get("attention_mask")
    return mask is not None and not bool(mask.bool().all())


def _stripped(row: Batch) -> dict[str, Tensor]:
    mask: Sequence[int] = row["attention_mask"][0].tolist()
    count = sum(map(bool, mask))
    start = mask.index(1) if count else 0
    if not count or not all(mask[start : start + count]):
        raise CalibrationError(
            "a calibration text is masked all over or in its middle: mask padding at its ends only"
        )
    return {key: value[:, start : start + count] for key, value in row.items()}
