from dataclasses import replace

import pytest
import torch

from ipex_sq.recipe.alpha import ALPHA_GRID, AlphaSearch, GroupInputs, group_costs, search_alpha
from ipex_sq.recipe.observers import LinearStats
from ipex_sq.recipe.samples import GroupSample


def _group(seed, outlier):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 32, generator=generator)
    x[:, 5] *= outlier
    weight = torch.randn(24, 32, generator=generator) * 0.1
    gradients = torch.randn(64, 24, generator=generator)
    sample = GroupSample(x[:64], gradients, 1 / 64)
    return GroupInputs(LinearStats(x.amin(0), x.amax(0)), [weight], sample=sample)


def test_smoothing_beats_plain_where_a_channel_stands_out():
    group = _group(0, outlier=100.0)
    assert min(group_costs(group, ALPHA_GRID)) < 0.25 * group_costs(group, [None])[0]


def test_each_group_gets_its_own_least_cost_and_the_model_the_least_sum():
    groups = {"a": _group(0, 100.0), "b": _group(1, 1.0)}
    search = search_alpha(groups)
    for key, group in groups.items():
        costs = group_costs(group, ALPHA_GRID)
        assert search.cost(key, search.best(key)) == min(costs)
    assert search.total[search.best_for_all] == min(search.total.values())
    separate = sum(search.cost(key, search.best(key)) for key in groups)
    assert separate <= search.total[search.best_for_all]


def test_a_group_without_a_sample_takes_the_alpha_of_the_model():
    search = AlphaSearch((0.5, 0.8), {"a": (2.0, 1.0)})
    assert search.best("unseen") == search.best_for_all == 0.8
    assert search.cost("unseen", 0.8) == 0.0


def _with_effect(group, factor):
    sample = replace(group.sample, gradients=factor * group.sample.gradients)
    return replace(group, sample=sample)


def test_a_layer_without_effect_on_the_predictions_costs_nothing():
    assert max(group_costs(_with_effect(_group(0, 100.0), 0.0), [None, 0.5])) == 0.0


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_cost_grows_with_the_square_of_the_effect(factor):
    group = _group(0, 10.0)
    before = torch.tensor(group_costs(group, [0.5]))
    after = torch.tensor(group_costs(_with_effect(group, factor), [0.5]))
    # fp32 sums of outputs near 1 whose changes are near 1e-2 leave five digits.
    torch.testing.assert_close(after, factor**2 * before, rtol=1e-3, atol=0)


def test_a_rescaling_between_activations_and_weights_changes_no_cost():
    # x * k and W / k leave the product alone, and the smoothing scale takes up k exactly.
    group = _group(0, outlier=10.0)
    factor = torch.logspace(-2, 2, 32)
    stats = LinearStats(group.stats.minimum * factor, group.stats.maximum * factor)
    sample = replace(group.sample, inputs=group.sample.inputs * factor)
    moved = GroupInputs(stats, [weight / factor for weight in group.weights], sample=sample)
    before, after = group_costs(group, ALPHA_GRID), group_costs(moved, ALPHA_GRID)
    # A value on a rounding boundary may fall to the other side: a hundredth of the squared error.
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=4e-2, atol=0)


def test_splitting_helps_where_one_token_is_massive():
    # The channel matters in one token of 200; its smoothed column must not cost the others theirs.
    costs = {0: 0.0, 8: 0.0}
    for seed in range(4):
        group = _group(seed, outlier=1.0)
        maximum = group.stats.maximum.clone()
        maximum[5] = 3000.0
        massive = replace(group, stats=LinearStats(group.stats.minimum, maximum))
        for copies in costs:
            costs[copies] += min(group_costs(replace(massive, copies=copies), ALPHA_GRID))
    assert costs[8] < 0.8 * costs[0]
