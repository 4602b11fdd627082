"""Padding is taken out, whichever way it was put in."""

import pytest
import torch

from ipex_sq.errors import CalibrationError
from ipex_sq.recipe.batching import batch_by_length, rows_of, without_padding

LENGTHS = (5, 9, 5, 3, 9, 7)


def _texts():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 100, (1, length), generator=generator) for length in LENGTHS]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def _padded(texts, side):
    most = max(LENGTHS)
    batch = {"input_ids": [], "attention_mask": []}
    for text in texts:
        missing = most - text["input_ids"].shape[1]
        pad = (missing, 0) if side == "left" else (0, missing)
        for key, value in text.items():
            batch[key].append(torch.nn.functional.pad(value, pad))
    return {key: torch.cat(rows) for key, rows in batch.items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("per_batch", [2, 6])
def test_padded_texts_become_the_batches_that_unpadded_ones_are(side, per_batch):
    texts = _texts()
    padded = [_padded(texts[i : i + per_batch], side) for i in range(0, len(texts), per_batch)]
    wanted, got = batch_by_length(texts), without_padding(padded)
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        for key in one:
            assert torch.equal(one[key], other[key])


def test_no_token_is_lost_and_lengths_are_equal():
    batches = batch_by_length(_texts())
    rows = [row["input_ids"][0].tolist() for batch in batches for row in rows_of(batch)]
    assert sorted(rows) == sorted(text["input_ids"][0].tolist() for text in _texts())
    assert [batch["input_ids"].shape for batch in batches] == [(2, 9), (1, 7), (2, 5), (1, 3)]


def test_unpadded_batches_are_left_as_they_are():
    batches = batch_by_length(_texts())
    assert all(one is other for one, other in zip(without_padding(batches), batches, strict=True))


@pytest.mark.parametrize("mask", [[1, 0, 1], [0, 0, 0]])
def test_masks_that_are_no_padding_are_refused(mask):
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([mask])}
    with pytest.raises(CalibrationError, match="in its middle"):
        without_padding([batch])


def test_nothing_to_calibrate_on_is_refused():
    with pytest.raises(CalibrationError, match="no calibration batches"):
        without_padding([])
    with pytest.raises(CalibrationError, match="empty"):
        without_padding([{"input_ids": torch.empty(1, 0, dtype=torch.long)}])
