"""An int8 model of the native backend as other code meets it: casts, state dicts, gradients."""

import pytest
import torch
from conftest import logits_of

from ipex_sq.backends.quantization import quantize
from ipex_sq.config import QuantConfig
from ipex_sq.errors import ConfigError
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.models.tiny import tiny_model


@pytest.fixture
def model(batches):
    return quantize(tiny_model("llama"), batches, QuantConfig(alpha=0.5, backend="native"))


def test_a_cast_to_the_dtype_it_has_changes_nothing(model, unseen):
    before = logits_of(model, unseen)
    assert torch.equal(logits_of(model.to(torch.bfloat16), unseen), before)


def test_scales_keep_their_types_under_any_cast(model):
    linears = [module for module in model.modules() if isinstance(module, Int8Linear)]
    before = [{name: t.clone() for name, t in linear.stored().items()} for linear in linears]
    model.to(torch.float32).to(torch.bfloat16)
    for linear, held in zip(linears, before, strict=True):
        assert all(torch.equal(tensor, held[name]) for name, tensor in linear.stored().items())


def test_a_model_in_fp32_runs_after_a_cast(model, unseen):
    """What stays float is more exact then: it must stay within what bf16 had changed."""
    before = logits_of(model, unseen)
    after = logits_of(model.to(torch.float32), unseen)
    assert float((after - before).norm() / before.norm()) < 0.05


def test_fp16_is_refused(model):
    with pytest.raises(ConfigError, match="fp32 or bf16"):
        model.to(torch.float16)


def test_state_dicts_are_refused(model, batches):
    other = quantize(tiny_model("llama"), batches, QuantConfig(alpha=0.5, backend="native"))
    with pytest.raises(ConfigError, match=r"ipex_sq\.save"):
        other.load_state_dict(model.state_dict())


def test_no_gradient_goes_around_the_int8_linears(model, unseen):
    loss = model(**unseen, use_cache=False).logits.float().logsumexp(-1).sum()
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


def test_a_gradient_through_them_is_refused(model, unseen):
    vectors = model.get_input_embeddings()(unseen["input_ids"]).detach().requires_grad_(True)
    with pytest.raises(ConfigError, match="no gradient"):
        model(inputs_embeds=vectors, use_cache=False)


def test_a_refused_gradient_leaves_the_compiler_as_it_was(model, batches, unseen):
    """What raises while Dynamo reads it is never compiled again in that process."""
    torch.compiler.reset()  # layers of other tests would be found in its memory
    vectors = model.get_input_embeddings()(unseen["input_ids"]).detach().requires_grad_(True)
    with pytest.raises(ConfigError, match="no gradient"):
        model(inputs_embeds=vectors, use_cache=False)
    other = quantize(tiny_model("llama"), batches, QuantConfig(alpha=0.5, backend="native"))
    after = logits_of(other, unseen)
    torch.compiler.reset()
    assert torch.equal(after, logits_of(model, unseen))
