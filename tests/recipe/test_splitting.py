import pytest
import torch

from ipex_sq.recipe.qparams import ActivationQParams, activation_qparams, round_rows
from ipex_sq.recipe.splitting import (
    append_copies,
    append_rest,
    before_parts,
    number_of_copies,
    number_of_parts,
    split_channels,
)


def _rows(channels=16, massive=(3, 200.0), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, channels, generator=generator, dtype=torch.double)
    x[0, massive[0]] = massive[1]
    return x


@pytest.mark.parametrize("low", [-1.5, -0.25, 0.0])
@pytest.mark.parametrize("size", [-200.0, 0.3, 200.0])
def test_parts_laid_end_to_end_add_up_to_the_channel(low, size):
    channels, high = torch.tensor([3] * 150 + [7, 7]), 2.0
    x = _rows(massive=(3, size)).clamp(low * 151, high * 151)
    parts = append_rest(x, channels, before_parts(channels, low, high))
    cut = parts.clamp(low, high)  # as rounding does
    total = cut[:, :16].index_add(1, channels, cut[:, 16:])
    most = number_of_parts(channels, 16).double()
    torch.testing.assert_close(total, x.clamp(low * most, high * most))


def test_a_value_that_fits_leaves_nothing_to_the_other_parts():
    channels = torch.tensor([2, 2, 2, 5])
    x = _rows().clamp(-0.9, 0.9)
    rest = append_rest(x, channels, before_parts(channels, -1.0, 1.0))[:, 16:]
    assert not rest.any()


@pytest.mark.parametrize("activation", [ActivationQParams(0.01, 90), ActivationQParams(0.01, 0)])
def test_a_channel_in_parts_is_rounded_with_the_step_of_one_part(activation):
    channels = torch.tensor([3] * 9)
    low, high = activation.ends
    x = _rows(massive=(3, high * 7.3)).clamp(low, high * 10).float()
    levels, zero_point, step = round_rows(x, activation, channels)
    assert levels.dtype == torch.uint8
    values = (levels.float() - zero_point) * step
    total = values[:, :16].index_add(1, channels, values[:, 16:])
    in_range = x.clamp(low, None)
    in_range[:, torch.arange(16) != 3] = in_range[:, torch.arange(16) != 3].clamp(None, high)
    assert float((total - in_range).abs().max()) <= 0.5 * step + 1e-4
    whole = activation_qparams(float(x.min()), float(x.max()))  # what one part would need
    assert whole.scale > 2 * step


def test_per_token_a_channel_in_parts_is_rounded_with_the_step_of_one_part():
    channels = torch.tensor([3] * 7)
    x = _rows().float()
    levels, zero_point, step = round_rows(x, None, channels)
    values = (levels.float() - zero_point) * step
    total = values[:, :16].index_add(1, channels, values[:, 16:])
    assert bool(((total - x).abs() <= 0.5 * step + 1e-4).all())
    _, _, whole = round_rows(x, None)
    assert float(whole[0]) > 7 * float(step[0])  # the massive token's


def test_per_token_the_largest_value_fills_all_parts_and_a_small_one_the_first():
    channels = torch.tensor([3, 3])
    x = torch.zeros(2, 16)
    x[:, 3] = torch.tensor([-300.0, 0.5])
    x[1, 7] = 1.0
    levels, zero_point, _ = round_rows(x, None, channels)
    parts = levels[:, [3, 16, 17]].int() - zero_point
    assert parts.tolist() == [[-127, -127, -127], [64, 0, 0]]


def test_equal_shares_times_copied_columns_change_nothing():
    generator = torch.Generator().manual_seed(0)
    x = _rows()
    weight = torch.randn(5, 16, generator=generator, dtype=torch.double)
    channels = torch.tensor([0, 3, 3, 15])
    shares = append_copies(x / number_of_parts(channels, 16), channels)
    torch.testing.assert_close(shares @ append_copies(weight, channels).T, x @ weight.T)


def test_the_largest_part_is_always_split_next():
    ranges = torch.tensor([1.0, 10.0, 4.0])
    assert split_channels(ranges, 3).tolist() == [1, 1, 2]  # parts 10/3, 10/3, 10/3, 4/2, 4/2
    parts = [
        float((ranges / number_of_parts(split_channels(ranges, n), 3)).max()) for n in range(1, 30)
    ]
    assert parts == sorted(parts, reverse=True)


@pytest.mark.parametrize(("head", "share"), [(False, 48), (True, 12)])
@pytest.mark.parametrize("width", [1, 48, 576, 1536, 1537, 11008])
def test_copies_come_in_fours_and_stay_few(width, head, share):
    copies = number_of_copies(width, head=head)
    assert copies % 4 == 0
    assert width / share <= copies < width / share + 4
