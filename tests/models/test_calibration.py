"""Statistics do not see padding."""

import copy

import pytest
import torch

from ipex_sq.data.calibration import calibration_batches
from ipex_sq.data.documents import split_last_word
from ipex_sq.models import calibration
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.tiny import tiny_model

SENTENCES = ["the cat sat on the mat", "a dog", "she left the house at dawn and", "he gave the boy"]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_unpadded_batches_give_the_same_statistics(family, side, tokenizer):
    texts = [split_last_word(text, "test") for text in SENTENCES]
    unpadded = calibration_batches(texts, tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    padded = [{key: batch[key] for key in ("input_ids", "attention_mask")}]
    assert not padded[0]["attention_mask"].all()
    stats = [calibrate(tiny_model(family), batches) for batches in (unpadded, padded)]
    for name, item in stats[0].linears.items():
        assert torch.equal(item.minimum, stats[1].linears[name].minimum)
        assert torch.equal(item.maximum, stats[1].linears[name].maximum)
    assert stats[0].tokens == stats[1].tokens


@pytest.mark.parametrize("family", ["bloom", "llama", "gemma2", "bert"])
def test_products_in_bf16_move_ranges_by_a_few_levels(family, batches, monkeypatch):
    """A range has 255 levels, and bf16 keeps 8 bits of every product on the way to it."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(calibration, "calibration_dtype", lambda dtype=dtype: dtype)
        found.append(calibrate(tiny_model(family), batches))
    for name, exact in found[0].linears.items():
        low, high = exact.smoothed_range(None)
        moved = found[1].linears[name].smoothed_range(None)
        # Two layers of products with errors of 2^-9 each: within a few levels of the range.
        assert max(abs(moved[0] - low), abs(moved[1] - high)) < 4 / 255 * (high - low)
    assert found[0].source["dtype"] == "float32"
    assert found[1].source["dtype"] == "bfloat16"
