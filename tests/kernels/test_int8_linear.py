"""Copies of int8 Linears, in both layouts of their weights."""

import copy
import pickle

import pytest
import torch
from conftest import logits_of

from ipex_sq import QuantConfig, quantize
from ipex_sq.backends import native
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.models.tiny import tiny_model
from ipex_sq.recipe.plan import PreScale
from ipex_sq.recipe.qparams import ActivationQParams


def _pickled(module):
    return pickle.loads(pickle.dumps(module))  # what this test has just made


COPIES = pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, _pickled])


@COPIES
@pytest.mark.parametrize("layouts", ["oneDNN", "both", "rows"])
@pytest.mark.parametrize("activation", [ActivationQParams(0.02, 100), None])
def test_a_copy_multiplies_as_its_original(activation, layouts, how):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (48, 36), generator=generator, dtype=torch.int8)
    scale, bias = (torch.rand(48, generator=generator) for _ in range(2))
    linear = Int8Linear(weight, scale, bias)
    channels = torch.tensor([3, 3, 17, 30])
    linear.set_input(activation, PreScale(torch.rand(32, generator=generator) + 0.5, channels))
    if layouts == "both":
        linear.keep_rows()
    elif layouts == "rows":
        assert linear.only_rows()
    x = torch.randn(5, 1, 32, generator=generator)
    wanted = linear(x)
    other = how(linear)
    assert other is not linear
    assert torch.equal(other(x), wanted)
    assert torch.equal(other(x.transpose(0, 1)), linear(x.transpose(0, 1)))  # the other kernel
    assert torch.equal(other.levels, weight)
    assert other.state_dict().keys() == linear.state_dict().keys()
    assert torch.equal(linear(x), wanted)


@COPIES
def test_a_whole_model_with_onednns_layout_is_copied(how, batches, unseen, monkeypatch):
    monkeypatch.setattr(native, "rows_everywhere", lambda: False)  # as with AMX
    model = quantize(tiny_model("llama"), batches, QuantConfig(backend="native", alpha=0.5))
    assert any(isinstance(m, Int8Linear) and m.packed is not None for m in model.modules())
    assert torch.equal(logits_of(how(model), unseen), logits_of(model, unseen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_code_may_ask_for_the_weights_type_and_shape_but_finds_no_values(dtype):
    linear = Int8Linear(torch.ones(48, 36, dtype=torch.int8), torch.ones(48), None)
    linear.set_input(None, PreScale(None, torch.tensor([3, 3, 17, 30])))
    weight = linear.to(dtype).weight
    assert (weight.dtype, weight.device.type, weight.shape) == (dtype, "cpu", (48, 32))
    assert weight.isnan().all()
    x = torch.randn(5, 32)
    assert torch.equal(linear(x.to(weight.dtype)), linear(x.to(dtype)))
