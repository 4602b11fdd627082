import pytest
import torch

from ipex_sq.recipe.splitting import (
    append_copies,
    number_of_copies,
    smoothed_weight,
    split_channels,
)


@pytest.mark.parametrize("copies", [1, 7, 40])
def test_splitting_changes_nothing_in_exact_arithmetic(copies):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 16, generator=generator, dtype=torch.double)
    weight = torch.randn(5, 16, generator=generator, dtype=torch.double)
    scale = torch.rand(16, generator=generator, dtype=torch.double) + 0.1
    channels = split_channels(weight.abs().amax(0) * scale, copies)
    smoothed = smoothed_weight(weight, scale, channels)
    assert smoothed.shape == (5, 16 + copies)
    inputs = append_copies(x, channels) / append_copies(scale, channels)
    torch.testing.assert_close(inputs @ smoothed.T, x @ weight.T)


def test_the_largest_part_is_always_split_next():
    columns = torch.tensor([1.0, 10.0, 4.0])
    assert split_channels(columns, 3).tolist() == [1, 1, 2]  # parts 10/3, 10/3, 10/3, 4/2, 4/2
    parts = [
        float((columns / (torch.bincount(split_channels(columns, n), minlength=3) + 1)).max())
        for n in range(1, 30)
    ]
    assert parts == sorted(parts, reverse=True)


@pytest.mark.parametrize("width", [1, 576, 1536, 1537, 11008])
def test_copies_come_in_blocks_and_stay_few_on_wide_layers(width):
    copies = number_of_copies(width)
    assert copies % 32 == 0
    assert copies <= max(32, 0.042 * width)
