import pytest
import torch
from torch import nn

from ipex_sq.errors import CalibrationError
from ipex_sq.recipe.histograms import BINS, Histogram, kl_threshold_bins
from ipex_sq.recipe.observers import record_stats


def _layers():
    torch.manual_seed(0)
    return {"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)}


def test_statistics_equal_those_of_all_inputs_at_once():
    layers, inputs = _layers(), [torch.randn(3, 5, 8) for _ in range(4)]
    with record_stats(layers) as recorder:
        for x in inputs:
            layers["a"](x)
            layers["b"](2 * x)
    stats = recorder.finish()
    everything = torch.cat([x.reshape(-1, 8) for x in inputs])
    assert torch.equal(stats["a"].minimum, everything.amin(0))
    assert torch.equal(stats["b"].maximum, 2 * everything.amax(0))


def test_a_tensor_changed_in_place_between_readers_is_measured_again():
    layers, x = _layers(), torch.ones(2, 8)
    with record_stats(layers) as recorder, torch.no_grad():
        layers["a"](x)
        layers["b"](x.mul_(5))
    stats = recorder.finish()
    assert stats["a"].maximum.max() == 1
    assert stats["b"].maximum.max() == 5


def test_hooks_are_gone_after_an_error():
    layers = _layers()
    with pytest.raises(ZeroDivisionError), record_stats(layers):
        raise ZeroDivisionError
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_a_layer_never_reached_is_named():
    layers = _layers()
    with record_stats(layers) as recorder:
        layers["a"](torch.ones(1, 8))
    with pytest.raises(CalibrationError, match="'b'"):
        recorder.finish()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_layer(bad):
    layers, x = _layers(), torch.ones(2, 8)
    x[1, 3] = bad
    with pytest.raises(CalibrationError, match="'a'"), record_stats(layers):
        layers["a"](x)


def test_kl_clips_a_lone_outlier_and_keeps_a_uniform_range():
    generator = torch.Generator().manual_seed(0)
    bulk = torch.randn(100_000, generator=generator)
    lone = Histogram(-5.0, 200.0)
    lone.add(torch.cat([bulk, torch.tensor([200.0])]))
    assert lone.kl_range()[1] < 100
    even = Histogram(0.0, 1.0)
    even.add(torch.rand(100_000, generator=generator))
    assert even.kl_range()[1] > 0.9


def test_kl_threshold_stays_within_its_bins():
    assert kl_threshold_bins(torch.zeros(BINS)) <= BINS
