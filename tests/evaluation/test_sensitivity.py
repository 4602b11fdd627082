import copy
import math

import pytest
import torch
from conftest import logits_of

from ipex_sq.backends.quantization import plan
from ipex_sq.config import QuantConfig
from ipex_sq.evaluation.sensitivity import rank_linears
from ipex_sq.evaluation.sqnr import sqnr_db
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.folding import apply_smoothing, replace_linear
from ipex_sq.models.rounding import round_weights
from ipex_sq.models.tiny import tiny_model


def _smoothed(family, alpha, batches):
    model = tiny_model(family)
    stats = calibrate(model, batches)
    config = QuantConfig(alpha=alpha, activations="static", backend="reference")
    decided, _ = apply_smoothing(model, plan(model, stats, config), stats.example)
    rounded = copy.deepcopy(model)
    round_weights(rounded, decided, stats)
    return model, rounded, decided


@pytest.mark.parametrize("alpha", [None, 0.5, "auto"])
@pytest.mark.parametrize("family", ["llama", "bloom", "opt-350m", "albert", "mixtral"])
def test_every_linear_is_ranked_and_the_model_is_left_as_it_was(family, alpha, batches):
    model, rounded, decided = _smoothed(family, alpha, batches)
    before = logits_of(model, batches[0])
    damages = rank_linears(model, rounded, decided, batches[:1])
    assert sorted(item.linear for item in damages) == sorted(decided.int8_names)
    assert [item.kl for item in damages] == sorted((item.kl for item in damages), reverse=True)
    assert all(math.isfinite(item.logits_sqnr_db) for item in damages)
    assert torch.equal(logits_of(model, batches[0]), before)


def test_a_linear_alone_gives_what_the_whole_model_would_with_only_it_in_int8(batches):
    """Skipping the blocks before it must change nothing."""
    from ipex_sq.backends.reference import simulated_linear

    model, rounded, decided = _smoothed("llama", "auto", batches)
    wanted = logits_of(model, batches[0])
    measured = {item.linear: item for item in rank_linears(model, rounded, decided, batches[:1])}
    for name in decided.int8_names[-3:]:
        changed = copy.deepcopy(model)
        replace_linear(changed, name, simulated_linear(rounded, decided, name))
        alone = sqnr_db(logits_of(changed, batches[0]), wanted)
        assert measured[name].logits_sqnr_db == pytest.approx(alone, abs=0.01)


def test_the_layer_with_a_massive_channel_comes_first(batches):
    model = tiny_model("llama", outliers=False)
    with torch.no_grad():  # one channel of one product a thousand times the others, and unread
        model.model.layers[1].mlp.up_proj.weight[5] *= 3000
        model.model.layers[1].mlp.down_proj.weight[:, 5] /= 3000
    stats = calibrate(model, batches)
    decided = plan(model, stats, QuantConfig(alpha=None, backend="reference"))
    damages = rank_linears(model, model, decided, batches[:1])
    assert damages[0].linear == "model.layers.1.mlp.down_proj"
    assert damages[0].block_sqnr_db < min(item.block_sqnr_db for item in damages[1:])


def test_sqnr_counts_ten_times_less_noise_as_twenty_db():
    wanted = torch.ones(4)
    assert sqnr_db(wanted + 0.01, wanted) == pytest.approx(40.0, abs=1e-4)
    assert sqnr_db(wanted + 0.001, wanted) == pytest.approx(60.0, abs=1e-3)
