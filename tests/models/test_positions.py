"""What is refused for its length is what fails, and nothing else."""

import pytest
import torch

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
