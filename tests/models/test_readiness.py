"""Models that would give wrong numbers without a word are refused, or made ready."""

import pytest
import torch

from ipex_sq.backends.quantization import quantize
from ipex_sq.config import QuantConfig
from ipex_sq.errors import CalibrationError, ConfigError
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.tiny import tiny_model

PLAIN = QuantConfig(alpha=None, backend="reference")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_values_that_are_not_finite_are_named(kind, bad, batches):
    model = tiny_model("opt")
    linear = model.model.decoder.layers[-1].fc2  # nothing is calibrated behind it
    getattr(linear, kind).data.view(-1)[5] = bad
    with pytest.raises(CalibrationError, match=rf"the {kind} of 'model.decoder.layers.1.fc2'"):
        calibrate(model, batches, samples=False, hessians=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("work", [calibrate, lambda *given: quantize(*given, PLAIN)])
def test_a_model_of_fewer_bits_is_refused_with_advice(work, dtype, batches):
    with pytest.raises(ConfigError, match=r"dtype=torch\.float32"):
        work(tiny_model("opt").to(dtype), batches)


def test_dropout_does_not_enter(batches):
    """A model in training mode gives what it gives in eval mode, and so does its int8 form."""
    found = []
    for training in (False, True):
        model = tiny_model("bert").train(training)
        stats = calibrate(model, batches, samples=False, hessians=False)
        int8 = quantize(tiny_model("bert").train(training), stats, PLAIN)
        assert not int8.training
        assert not any(m.training for m in int8.modules() if isinstance(m, torch.nn.Dropout))
        found.append(stats.linears)
    for name, item in found[0].items():
        assert torch.equal(item.maximum, found[1][name].maximum)


def test_an_observer_reads_a_generator_twice(batches):
    config = QuantConfig(alpha=None, backend="reference", observer="percentile")
    given = (batches, iter(batches))
    plans = [quantize(tiny_model("opt"), texts, config).quant_plan for texts in given]
    ranges = [{name: item.activation for name, item in made.linears.items()} for made in plans]
    assert ranges[0] == ranges[1]
