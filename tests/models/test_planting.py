import copy

import pytest
import torch
from conftest import logits_of, relative_error

from ipex_sq.backends.quantization import quantize
from ipex_sq.config import PlantConfig, QuantConfig
from ipex_sq.errors import ConfigError, UnsupportedModelError
from ipex_sq.models.planting import plant_outliers
from ipex_sq.models.tiny import tiny_model


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gptj", "gemma2"])
def test_float_stays_plain_int8_falls_and_smoothquant_restores_it(family, batches, unseen):
    model = tiny_model(family, outliers=False)
    before = logits_of(model, unseen)
    planted = plant_outliers(model, batches[0], PlantConfig(channels=3, factor=64.0))
    assert planted.norms
    if family != "gemma2":  # 1 + w is rounded when w is stored
        assert planted.float_change == 0.0
        assert torch.equal(logits_of(model, unseen), before)
    errors = {}
    for alpha in (None, 0.5):
        config = QuantConfig(alpha=alpha, activations="static", backend="reference")
        int8 = quantize(copy.deepcopy(model), batches, config)
        errors[alpha] = relative_error(logits_of(int8, unseen), before)
    assert errors[None] > 5 * errors[0.5]


def test_what_cannot_be_planted_is_refused(batches):
    with pytest.raises(UnsupportedModelError, match="no norm"):
        plant_outliers(tiny_model("bert"), batches[0], PlantConfig())
    with pytest.raises(ConfigError, match="--channels 64"):
        plant_outliers(tiny_model("llama"), batches[0], PlantConfig(channels=64))
    with pytest.raises(ConfigError, match="factor"):
        PlantConfig(factor=-1.0)
