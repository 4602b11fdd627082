import pytest
import torch

from ipex_sq.recipe.alpha import ALPHA_GRID, AlphaSearch, group_costs, search_alpha
from ipex_sq.recipe.observers import LinearStats
from ipex_sq.recipe.samples import GroupSample


def _group(seed, outlier):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 32, generator=generator)
    x[:, 5] *= outlier
    weight = torch.randn(24, 32, generator=generator) * 0.1
    gradients = torch.randn(64, 24, generator=generator)
    return LinearStats(x.amin(0), x.amax(0)), GroupSample(x[:64], gradients, 1 / 64), [weight]


def test_smoothing_beats_plain_where_a_channel_stands_out():
    group = _group(0, outlier=100.0)
    assert min(group_costs(*group, ALPHA_GRID)) < 0.25 * group_costs(*group, [None])[0]


def test_each_group_gets_its_own_least_cost_and_the_model_the_least_sum():
    groups = {"a": _group(0, 100.0), "b": _group(1, 1.0)}
    search = search_alpha(groups)
    for key, group in groups.items():
        costs = group_costs(*group, ALPHA_GRID)
        assert search.cost(key, search.best(key)) == min(costs)
    assert search.total[search.best_for_all] == min(search.total.values())
    separate = sum(search.cost(key, search.best(key)) for key in groups)
    assert separate <= search.total[search.best_for_all]


def test_a_group_without_a_sample_takes_the_alpha_of_the_model():
    search = AlphaSearch((0.5, 0.8), {"a": (2.0, 1.0)})
    assert search.best("unseen") == search.best_for_all == 0.8
    assert search.cost("unseen", 0.8) == 0.0


def test_a_layer_without_effect_on_the_predictions_costs_nothing():
    stats, sample, weights = _group(0, 100.0)
    mute = GroupSample(sample.inputs, torch.zeros_like(sample.gradients), sample.weight)
    assert max(group_costs(stats, mute, weights, [None, 0.5])) == 0.0


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_cost_grows_with_the_square_of_the_effect(factor):
    stats, sample, weights = _group(0, 10.0)
    stronger = GroupSample(sample.inputs, factor * sample.gradients, sample.weight)
    before = torch.tensor(group_costs(stats, sample, weights, [0.5]))
    after = torch.tensor(group_costs(stats, stronger, weights, [0.5]))
    # fp32 sums of outputs near 1 whose changes are near 1e-2 leave five digits.
    torch.testing.assert_close(after, factor**2 * before, rtol=1e-3, atol=0)


def test_a_rescaling_between_activations_and_weights_changes_no_cost():
    # x * k and W / k leave the product alone, and the smoothing scale takes up k exactly.
    stats, sample, weights = _group(0, outlier=10.0)
    factor = torch.logspace(-2, 2, 32)
    scaled = LinearStats(stats.minimum * factor, stats.maximum * factor)
    moved = GroupSample(sample.inputs * factor, sample.gradients, sample.weight)
    before = group_costs(stats, sample, weights, ALPHA_GRID)
    after = group_costs(scaled, moved, [weight / factor for weight in weights], ALPHA_GRID)
    # A value on a rounding boundary may fall to the other side: a hundredth of the squared error.
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=4e-2, atol=0)
