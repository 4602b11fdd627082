"""Linears on oneDNN compute what they did, inside the block only."""

import pytest
import torch
from torch import nn

from ipex_sq.models import onednn
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.onednn import calibration_dtype, fits_packed, onednn_linears
from ipex_sq.models.tiny import tiny_model


class _Odd(nn.Linear):
    """A subclass may compute anything: it must keep its own forward."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("shape", [(0, 48), (1, 48), (3, 5, 48), (700, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_the_same(shape, bias):
    linear, x = nn.Linear(48, 80, bias=bias), torch.randn(shape)
    with torch.no_grad():
        wanted = linear(x)
        with onednn_linears([linear]):
            assert "forward" in linear.__dict__
            got = linear(x)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert "forward" not in linear.__dict__


def test_bf16_products_keep_eight_bits():
    linear, x = nn.Linear(48, 80), torch.randn(7, 48)
    with torch.no_grad():
        wanted = linear(x)
        with onednn_linears([linear], torch.bfloat16) as dtype:
            got = linear(x)
    assert dtype == torch.bfloat16
    assert got.dtype == torch.float32
    assert not torch.equal(got, wanted)
    # Inputs, weights and outputs are each off by 2^-9 of their own size at most.
    bound = 2**-8 * (x.abs() @ linear.weight.abs().T + linear.bias.abs()) + 2**-8 * wanted.abs()
    assert bool(((got - wanted).abs() <= bound).all())


def test_other_modules_and_large_models_are_left_alone(monkeypatch):
    modules = [_Odd(4, 4), nn.Linear(4, 4).double(), nn.LayerNorm(4)]
    with onednn_linears(modules):
        assert not any("forward" in module.__dict__ for module in modules)
    assert fits_packed([100, 100])
    monkeypatch.setattr(onednn, "MOST_BYTES", 10)
    assert not fits_packed([3, 3])


def test_calibration_of_a_large_model_stays_in_fp32(batches, monkeypatch):
    assert calibrate(tiny_model("llama"), batches).source["dtype"] == str(
        calibration_dtype()
    ).removeprefix("torch.")
    monkeypatch.setattr(onednn, "MOST_BYTES", 10)
    assert calibrate(tiny_model("llama"), batches).source["dtype"] == "float32"


def test_the_block_ends_where_it_raises():
    linear = nn.Linear(4, 4)
    with pytest.raises(ZeroDivisionError), onednn_linears([linear]):
        1 / 0  # noqa: B018
    assert "forward" not in linear.__dict__
