from dataclasses import replace

import pytest
import torch

from ipex_sq.recipe.alpha import ALPHA_GRID, AlphaSearch, GroupCosts, GroupInputs, search_alpha
from ipex_sq.recipe.observers import LinearStats
from ipex_sq.recipe.plan import DYNAMIC_INT8, STATIC_INT8
from ipex_sq.recipe.samples import GroupSample
from ipex_sq.recipe.splitting import number_of_parts


def _group(seed, outlier):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 32, generator=generator)
    x[:, 5] *= outlier
    weight = torch.randn(24, 32, generator=generator) * 0.1
    gradients = torch.randn(64, 24, generator=generator)
    sample = GroupSample(x[:64], gradients, 1 / 64)
    return GroupInputs(LinearStats(x.amin(0), x.amax(0)), [weight], sample=sample)


def costs_of(group, grid, mode=STATIC_INT8):
    return list(GroupCosts(group).over(grid, mode).values())


def test_smoothing_beats_plain_where_a_channel_stands_out():
    group = _group(0, outlier=100.0)
    assert min(costs_of(group, ALPHA_GRID)) < 0.25 * costs_of(group, [None])[0]


def test_each_group_gets_its_own_least_cost_and_the_model_the_least_sum():
    groups = {"a": _group(0, 100.0), "b": _group(1, 1.0)}
    search = search_alpha(groups)
    for key, group in groups.items():
        costs = costs_of(group, ALPHA_GRID)
        assert search.cost(key, search.best(key)) == min(costs)
    assert search.total()[search.best_for_all()] == min(search.total().values())
    separate = sum(search.cost(key, search.best(key)) for key in groups)
    assert separate <= search.total()[search.best_for_all()]


def test_a_refined_search_tries_less_and_finds_a_neighbour_of_the_best():
    groups = {str(seed): _group(seed, outlier=10.0**seed) for seed in range(3)}
    whole, refined = (search_alpha(groups, refine=refine) for refine in (False, True))
    for key in groups:
        tried = refined.kl[STATIC_INT8][key]
        assert len(tried) <= len(ALPHA_GRID) // 2 + 3
        found = {**whole.kl[STATIC_INT8][key]}
        if key in refined.headroom:
            found[refined.best(key)] = refined.cost(key, refined.best(key))
        assert tried.items() <= found.items()
        assert set(tried) >= set(ALPHA_GRID[::2])
        best = ALPHA_GRID.index(refined.best(key))
        beside = {ALPHA_GRID[i] for i in (best - 1, best + 1) if 0 <= i < len(ALPHA_GRID)}
        assert beside <= set(tried) or best % 2
    assert list(refined.total()) == list(ALPHA_GRID[::2])


def test_a_static_range_gets_room_where_unseen_texts_need_it():
    group = _group(0, outlier=1.0)
    narrow = LinearStats(group.stats.minimum / 2, group.stats.maximum / 2)
    groups = {"seen": group, "unseen": replace(group, unsampled_stats=narrow)}
    search = search_alpha(groups, modes=(STATIC_INT8, DYNAMIC_INT8), refine=True)
    assert search.headroom == {"unseen": 2.0}
    plain = search_alpha(groups, modes=(STATIC_INT8, DYNAMIC_INT8))
    assert not plain.headroom
    for key, better in (("seen", 1.0), ("unseen", 0.5)):
        assert search.cost(key, search.best(key)) <= better * plain.cost(key, search.best(key))
    # A scale per token holds whatever comes.
    assert search.kl[DYNAMIC_INT8]["unseen"].items() <= plain.kl[DYNAMIC_INT8]["unseen"].items()


def test_a_group_without_a_sample_takes_the_alpha_of_the_model():
    search = AlphaSearch({STATIC_INT8: {"a": {0.5: 2.0, 0.8: 1.0}}})
    assert search.best("unseen") == search.best_for_all() == 0.8
    assert search.cost("unseen", 0.8) == 0.0


def _with_effect(group, factor):
    sample = replace(group.sample, gradients=factor * group.sample.gradients)
    return replace(group, sample=sample)


def test_a_layer_without_effect_on_the_predictions_costs_nothing():
    assert max(costs_of(_with_effect(_group(0, 100.0), 0.0), [None, 0.5])) == 0.0


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_cost_grows_with_the_square_of_the_effect(factor):
    group = _group(0, 10.0)
    before = torch.tensor(costs_of(group, [0.5]))
    after = torch.tensor(costs_of(_with_effect(group, factor), [0.5]))
    # fp32 sums of outputs near 1 whose changes are near 1e-2 leave five digits.
    torch.testing.assert_close(after, factor**2 * before, rtol=1e-3, atol=0)


def test_a_rescaling_between_activations_and_weights_changes_no_cost():
    # x * k and W / k leave the product alone, and the smoothing scale takes up k exactly.
    group = _group(0, outlier=10.0)
    factor = torch.logspace(-2, 2, 32)
    stats = LinearStats(group.stats.minimum * factor, group.stats.maximum * factor)
    sample = replace(group.sample, inputs=group.sample.inputs * factor)
    moved = GroupInputs(stats, [weight / factor for weight in group.weights], sample=sample)
    before, after = costs_of(group, ALPHA_GRID), costs_of(moved, ALPHA_GRID)
    # A value on a rounding boundary may fall to the other side: a hundredth of the squared error.
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=4e-2, atol=0)


def test_at_one_half_a_part_and_its_column_have_the_same_range():
    group = replace(_group(0, outlier=100.0), copies=8)
    scale, channels = group.smoothing(0.5)
    parts = number_of_parts(channels, 32)
    assert float(parts[5]) > 4
    columns = group.weights[0].abs().amax(dim=0)
    torch.testing.assert_close(group.stats.act_absmax / (scale * parts), columns * scale)


def test_splitting_helps_where_one_token_is_massive():
    # The channel matters in one token of 200; its smoothed column must not cost the others theirs.
    costs = {0: 0.0, 8: 0.0}
    for seed in range(4):
        group = _group(seed, outlier=1.0)
        maximum = group.stats.maximum.clone()
        maximum[5] = 3000.0
        massive = replace(group, stats=LinearStats(group.stats.minimum, maximum))
        for copies in costs:
            costs[copies] += min(costs_of(replace(massive, copies=copies), ALPHA_GRID))
    assert costs[8] < 0.8 * costs[0]


def test_a_scale_per_token_pays_where_tokens_differ_in_size():
    group = _group(0, outlier=1.0)
    sizes = torch.ones(200, 1)
    sizes[0] = 100.0  # calibrated on, in no sampled row but the first
    inputs = group.sample.inputs * sizes[:64]
    stats = LinearStats(group.stats.minimum * 100, group.stats.maximum * 100)
    massive = replace(group, stats=stats, sample=replace(group.sample, inputs=inputs))
    static, dynamic = (min(costs_of(massive, ALPHA_GRID, m)) for m in (STATIC_INT8, DYNAMIC_INT8))
    assert dynamic < 0.1 * static


def test_the_search_rounds_by_the_range_of_the_texts_that_are_not_sampled():
    group = _group(0, outlier=1.0)
    narrow = LinearStats(group.stats.minimum / 4, group.stats.maximum / 4)
    clipping = replace(group, unsampled_stats=narrow)
    assert costs_of(clipping, [0.5])[0] > 4 * costs_of(group, [0.5])[0]


def test_a_channel_that_only_sampled_texts_use_is_clipped_in_the_search():
    """At alpha 1 every channel fills the range, and a new maximum has no room: it must show."""
    group = _group(0, outlier=1.0)
    smaller = torch.ones(32)
    smaller[5] = 1 / 3
    stats = LinearStats(group.stats.minimum * smaller, group.stats.maximum * smaller)
    low, high = costs_of(replace(group, unsampled_stats=stats), [0.5, 1.0])
    assert high > 10 * low
    assert costs_of(group, [1.0])[0] < low
