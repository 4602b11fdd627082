import pytest
import torch
from torch import nn

from ipex_sq.errors import CalibrationError
from ipex_sq.recipe.histograms import BINS, Histogram, kl_threshold_bins, mse_bins, percentile_bins
from ipex_sq.recipe.observers import record_stats
from ipex_sq.recipe.qparams import activation_qparams, fake_quantize_activation


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
    assert lone.clipped("kl", 100.0)[1] < 100
    even = Histogram(0.0, 1.0)
    even.add(torch.rand(100_000, generator=generator))
    assert even.clipped("kl", 100.0)[1] > 0.9


def test_counts_of_one_bin_pass_two_to_the_24():
    """torch.histc counts in fp32, which ends there: adding one no longer changes it."""
    threads = torch.get_num_threads()
    histogram, values = Histogram(0.0, 1.0), 2**24 + 1001
    try:
        torch.set_num_threads(1)
        histogram.add(torch.zeros(1, values))
    finally:
        torch.set_num_threads(threads)
    assert int(histogram.counts[0]) == int(histogram.counts.sum()) == values


def test_kl_threshold_stays_within_its_bins():
    assert kl_threshold_bins(torch.zeros(BINS)) <= BINS


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.9])
def test_a_percentile_keeps_that_share_of_the_values(percentile):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    histogram = Histogram(float(x.min()), float(x.max()))
    histogram.add(x)
    low, high = histogram.clipped("percentile", percentile)
    kept = float(((x >= low) & (x <= high)).float().mean()) * 100
    # A bin is 1/2048 of the range and holds at most 0.2 % of a normal distribution.
    assert percentile <= kept + 1e-6 <= percentile + 0.25
    assert percentile_bins(histogram.counts, 100.0) == BINS


def test_mse_takes_the_range_of_least_squared_error():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator)
    x[:20] *= 30  # a few values far out
    histogram = Histogram(float(x.min()), float(x.max()))
    histogram.add(x)

    def error(limit):
        qparams = activation_qparams(-limit, limit)
        return float((fake_quantize_activation(x, qparams) - x).square().mean())

    chosen = histogram.absmax * mse_bins(histogram.counts) / BINS
    tried = [error(float(limit)) for limit in torch.linspace(0.1, 1.0, 40) * histogram.absmax]
    assert chosen < 0.9 * histogram.absmax
    assert error(chosen) < 1.1 * min(tried)


def test_an_expert_that_gets_no_token_in_a_batch_keeps_its_statistics():
    linear = torch.nn.Linear(3, 2)
    with record_stats({"expert": linear}) as recorder:
        linear(torch.ones(4, 3))
        linear(torch.empty(0, 3))
    assert recorder.finish()["expert"].maximum.tolist() == [1.0] * 3
