import pytest
import torch

from ipex_sq.recipe import row_blocks
from ipex_sq.recipe.observers import LinearStats
from ipex_sq.recipe.smoothing import column_absmax, smoothing_scale


def _random(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothing_changes_nothing_in_exact_arithmetic(alpha):
    x, weight = _random(10, 16, 0).double(), _random(8, 16, 1).double()
    scale = smoothing_scale(x.abs().amax(0), column_absmax([weight]), alpha).double()
    torch.testing.assert_close((x / scale) @ (weight * scale).T, x @ weight.T)


def test_alpha_half_balances_activations_and_weights():
    # Equation 4 at alpha 0.5: after smoothing both have the geometric mean as their range.
    x, weight = _random(10, 16, 0) * torch.logspace(0, 3, 16), _random(8, 16, 1)
    scale = smoothing_scale(x.abs().amax(0), column_absmax([weight]), 0.5)
    torch.testing.assert_close((x / scale).abs().amax(0), (weight * scale).abs().amax(0))


def test_absmax_of_columns_is_over_all_rows_of_all_readers(monkeypatch):
    monkeypatch.setattr(row_blocks, "NUMBERS_IN_CACHE", 32)
    first, second = _random(7, 16, 0), _random(2, 16, 1)
    wanted = torch.cat((first, second)).abs().amax(dim=0)
    assert torch.equal(column_absmax([first, second]), wanted)


def test_dead_channels_keep_scale_one_where_others_are_larger():
    act = torch.tensor([0.0, 2.0])
    assert smoothing_scale(act, torch.ones(2), 0.9)[0] == 1.0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [1.0, 0.1, 0.001])
def test_dead_channels_do_not_set_the_steps_of_weights(alpha, size):
    act = _random(50, 16, 0).abs().amax(0) * size
    act[:3] = 0.0
    weight = column_absmax([_random(8, 16, 1)])
    weight[0] *= 100.0
    scale = smoothing_scale(act, weight, alpha)
    assert bool((scale > 0).all())
    assert float(scale[:3].max()) <= 1.0
    smoothed = scale * weight
    assert float(smoothed[:3].max()) <= float(smoothed[3:].max()) * (1 + 1e-6)


def test_a_group_of_dead_channels_is_left_alone():
    assert torch.equal(smoothing_scale(torch.zeros(3), torch.ones(3), 0.5), torch.ones(3))


@pytest.mark.parametrize("alpha", [0.3, 0.85])
def test_range_from_statistics_equals_range_of_smoothed_activations(alpha):
    x = _random(50, 16, 0) * torch.logspace(-1, 2, 16) + 1
    weight = _random(8, 16, 1)
    stats = LinearStats(x.amin(0), x.amax(0))
    scale = smoothing_scale(stats.act_absmax, column_absmax([weight]), alpha)
    smoothed = x / scale
    assert stats.smoothed_range(scale) == pytest.approx(
        (smoothed.min().item(), smoothed.max().item()), rel=1e-6
    )
