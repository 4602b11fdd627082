import pytest
import torch

from ipex_sq.recipe import qparams, row_blocks
from ipex_sq.recipe.qparams import (
    activation_qparams,
    fake_quantize_activation,
    fake_quantize_weight,
    int8_sums,
    quantize_activation,
    quantize_weight,
    round_weight,
    weight_scale,
)
from ipex_sq.system import int8_isa

RANGES = [(-1.0, 1.0), (-3.0, 0.5), (0.5, 4.0), (-9.0, -2.0), (0.0, 0.0), (-1e-3, 900.0)]


@pytest.mark.parametrize("limits", RANGES)
def test_zero_is_a_level_of_its_own(limits):
    qparams = activation_qparams(*limits)
    assert 0 <= qparams.zero_point <= 255
    assert fake_quantize_activation(torch.zeros(1), qparams).item() == 0.0


@pytest.mark.parametrize("limits", RANGES)
def test_rounding_error_is_at_most_half_a_step_plus_the_zero_shift(limits):
    low, high = min(limits[0], 0.0), max(limits[1], 0.0)
    qparams = activation_qparams(*limits)
    x = torch.linspace(low, high, 999)
    error = (fake_quantize_activation(x, qparams) - x).abs().max().item()
    # Rounding the zero point to an integer moves the grid by half a step at most: one step in all.
    assert error <= qparams.scale * (1 + 1e-3)


def test_values_outside_the_range_saturate():
    qparams = activation_qparams(-1.0, 1.0)
    levels = quantize_activation(torch.tensor([-50.0, 50.0]), qparams)
    assert levels.tolist() == [0, 255]


def test_weights_use_the_whole_symmetric_range_of_each_row():
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -3, 2, 6
    ).unsqueeze(1)
    scale = weight_scale(weight)
    levels = quantize_weight(weight, scale)
    assert levels.abs().amax(dim=1).tolist() == [127] * 6
    error = (fake_quantize_weight(weight, scale) - weight).abs()
    assert bool((error <= scale[:, None] / 2 * (1 + 1e-4)).all())


@pytest.mark.parametrize("together", [1, 3, 6, 100])
@pytest.mark.parametrize("smoothed", [False, True])
def test_weights_rounded_a_few_rows_at_a_time_are_the_same(monkeypatch, together, smoothed):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 20, generator=generator) * torch.logspace(-3, 2, 7)[:, None]
    smoothing = torch.logspace(-2, 2, 20) if smoothed else None
    whole = weight * smoothing if smoothed else weight
    monkeypatch.setattr(row_blocks, "NUMBERS_IN_CACHE", 20 * together)
    levels, scale = round_weight(weight, smoothing)
    assert torch.equal(scale, whole.abs().amax(dim=1) / 127)
    assert torch.equal(scale, weight_scale(weight, smoothing))
    assert torch.equal(levels, quantize_weight(whole, scale))


def test_an_all_zero_row_stays_zero():
    weight = torch.zeros(2, 4)
    assert torch.equal(fake_quantize_weight(weight, weight_scale(weight)), weight)


@pytest.mark.parametrize("isa", [int8_isa(), "AVX2"])
@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
@pytest.mark.parametrize("channels", [1, 2, 3, 70])
def test_int8_sums_are_the_sums_of_the_integers(monkeypatch, isa, zero_point, channels):
    """By this CPU's own kernels; and, as where int8 kernels saturate, by fp32."""
    monkeypatch.setattr(qparams, "int8_isa", lambda: isa)
    generator = torch.Generator().manual_seed(zero_point)
    levels = torch.randint(0, 256, (33, channels), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (19, channels), generator=generator, dtype=torch.int8)
    weight[3], levels[4] = 127, 255  # the largest sums
    wanted = (levels.long() - zero_point) @ weight.long().T
    assert torch.equal(int8_sums(levels, zero_point, weight).long(), wanted)
