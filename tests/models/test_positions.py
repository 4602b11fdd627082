"""What is refused for its length is what fails, and nothing else."""

import pytest
import torch

from ipex_sq.data.calibration import calibration_batches
from ipex_sq.data.documents import split_last_word
from ipex_sq.errors import DataError
from ipex_sq.evaluation.lambada import evaluate_lambada
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.positions import position_limit
from ipex_sq.models.tiny import FAMILIES, tiny_model

FIXED = {"opt", "opt-350m", "gpt2", "gptj", "mpt", "bert", "roberta", "distilbert", "electra"}
FIXED |= {"albert"}


@torch.no_grad()
def _runs(model, tokens):
    try:
        model(input_ids=torch.full((1, tokens), 5))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_the_limit_is_where_the_model_fails(family):
    model = tiny_model(family, outliers=False)
    limit = position_limit(model)
    assert (limit is not None) == (family in FIXED)
    if limit is None:  # rotary, or a bias of its own for each distance
        assert _runs(model, 4 * 128)
    else:
        assert _runs(model, limit)
        assert not _runs(model, limit + 1)


@pytest.mark.parametrize("family", ["opt", "mpt", "gptj", "bert"])
def test_texts_beyond_it_are_refused_before_the_work(family, tokenizer):
    document = split_last_word("the cat sat on the mat " * 40, "here")
    model = tiny_model(family, outliers=False)
    limit = position_limit(model)
    calibrate(model, calibration_batches([document], tokenizer, limit), samples=False)
    beyond = calibration_batches([document], tokenizer, limit + 1)
    with pytest.raises(DataError, match=f"a text has {limit + 1} tokens"):
        calibrate(model, beyond)
    if family != "bert":
        with pytest.raises(DataError, match=f"the model has {limit} positions"):
            evaluate_lambada(model, tokenizer, [document])
