import copy
from dataclasses import replace

import pytest
import torch
from conftest import logits_of

from ipex_sq.backends.quantization import plan, quantize_model
from ipex_sq.backends.reference import ReferenceBackend
from ipex_sq.config import GPTQ, NEAREST, QuantConfig
from ipex_sq.errors import CalibrationError, ConfigError
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.folding import apply_smoothing, smoothed_linear
from ipex_sq.models.rounding import round_weights
from ipex_sq.models.tiny import tiny_model
from ipex_sq.recipe import gptq

SEARCHED = QuantConfig(backend="reference")
STATIC = QuantConfig(activations="static", backend="reference")


@pytest.fixture(scope="module", params=["llama", "bloom", "bert"])
def prepared(request):
    """A smoothed model, its plan with GPTQ, and the statistics."""
    batches = request.getfixturevalue("batches")
    model = tiny_model(request.param)
    stats = calibrate(model, batches)
    decided, _ = apply_smoothing(model, plan(model, stats, STATIC), stats.example)
    return model, decided, stats


def _rounded(model, decided, stats):
    rounded = copy.deepcopy(model)
    round_weights(rounded, decided, stats)
    return rounded


def test_weights_stand_on_levels_of_the_plan(prepared):
    model, decided, stats = prepared
    assert decided.weight_rounding == GPTQ
    assert decided.corrects_biases
    rounded = _rounded(model, decided, stats)
    moved = 0
    for name in decided.int8_names:
        levels = smoothed_linear(rounded, name).weight / decided.linears[name].weight_scale[:, None]
        assert float((levels - levels.round()).detach().abs().max()) < 1e-3
        assert float(levels.detach().abs().max()) < 127.5
        before = smoothed_linear(model, name).weight / decided.linears[name].weight_scale[:, None]
        moved += int((levels.round() != before.round()).sum())
    assert moved > 0  # else it was rounding to nearest


def test_int8_outputs_are_right_on_average(prepared, batches):
    """Of the tokens that biases were corrected on, in each Linear by itself."""
    model, decided, stats = prepared
    for corrects in (True, False):
        rounded = _rounded(model, replace(decided, corrects_biases=corrects), stats)
        lowered = ReferenceBackend().lower(rounded, decided, stats.example, "fp32")
        shifts = []
        for name in decided.int8_names[:4]:
            item = decided.groups[decided.linears[name].group]
            rows = stats.samples[item.group.key].inputs
            size = (rows / item.scale).abs().amax(dim=1)
            rows = rows[size <= 8 * size.median()]
            prescale = decided.prescale_of(name)
            if prescale is None or prescale.divisor is None:
                rows = rows / item.scale
            with torch.no_grad():
                wanted = model.get_submodule(name)(rows)
                error = lowered.get_submodule(name)(rows) - wanted
            shifts.append(float(error.mean(dim=0).norm() / error.norm(dim=1).mean()))
        assert (max(shifts) < 1e-3) is corrects


def test_gptq_is_closer_to_the_float_model(batches):
    errors = {NEAREST: 0.0, GPTQ: 0.0}
    for seed in range(3):
        model = tiny_model("llama", seed=seed)
        wanted = logits_of(model, batches[-1])
        stats = calibrate(model, batches)
        for rounding in errors:
            config = replace(STATIC, alpha=0.5, weight_rounding=rounding)
            got = logits_of(quantize_model(copy.deepcopy(model), stats, config).model, batches[-1])
            errors[rounding] += float((got - wanted).pow(2).mean())
    assert errors[GPTQ] < errors[NEAREST]


def test_a_number_as_alpha_keeps_rounding_to_nearest(batches):
    model = tiny_model("llama")
    stats = calibrate(model, batches)
    assert plan(model, stats, replace(STATIC, alpha=0.5)).weight_rounding == NEAREST
    assert plan(model, stats, replace(STATIC, alpha=None)).weight_rounding == NEAREST
    asked = replace(STATIC, alpha=0.5, weight_rounding=GPTQ)
    assert plan(model, stats, asked).weight_rounding == GPTQ


def test_hessians_that_take_too_much_memory_are_not_gathered(batches, monkeypatch):
    monkeypatch.setattr(gptq, "MOST_HESSIAN_BYTES", 10)
    model = tiny_model("llama")
    stats = calibrate(model, batches)
    assert plan(model, stats, SEARCHED).weight_rounding == NEAREST
    with pytest.raises(CalibrationError, match="GPTQ needs Hessians"):
        plan(model, stats, replace(SEARCHED, weight_rounding=GPTQ))


def test_unknown_rounding_is_refused():
    with pytest.raises(ConfigError, match="gptq"):
        QuantConfig(weight_rounding="gtpq")


def test_biases_are_corrected_for_clipped_ranges_too(batches):
    config = replace(STATIC, observer="mse")
    quantized = quantize_model(tiny_model("llama"), batches, config)
    assert quantized.plan.corrects_biases
    assert any(
        module.bias is not None
        for name, module in quantized.model.named_modules()
        if name in quantized.plan.int8_names
    )
