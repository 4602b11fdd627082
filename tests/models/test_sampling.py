"""The samples must predict what int8 does to the predictions of the whole model."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import logits_of
from torch.nn import functional

from ipex_sq.backends.quantization import plan, quantize
from ipex_sq.config import QuantConfig
from ipex_sq.errors import CalibrationError, UnsupportedModelError
from ipex_sq.models.calibration import add_samples, calibrate
from ipex_sq.models.sampling import draw_tokens
from ipex_sq.models.tiny import DECODERS, FAMILIES, tiny_model


def _kl(got, wanted):
    logs = [functional.log_softmax(logits, -1) for logits in (wanted, got)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


# Not Mixtral: a router that chooses another expert is no small error (docs/log.md). Nor the head of
# OPT-350m, whose errors are nearly the same for every token: biases take them up, which the cost
# does not count.
@pytest.mark.parametrize(
    ("family", "lm_head"),
    [
        (family, lm_head)
        for family in DECODERS
        for lm_head in (False, True)
        if family != "mixtral" and (family, lm_head) != ("opt-350m", True)
    ],
)
def test_expected_kl_meets_the_measured_one(family, lm_head, batches):
    model = tiny_model(family)
    stats = calibrate(model, batches, lm_head=lm_head)
    # Measured on a text that the ranges hold: so must be expected what no clipping costs.
    stats = replace(stats, unsampled=stats.linears)
    wanted = logits_of(model, batches[0])
    # The cost is that of weights rounded to nearest, which alpha is searched with.
    config = QuantConfig(alpha="auto", backend="reference", weight_rounding="nearest")
    int8 = quantize(copy.deepcopy(model), stats, config)
    measured = _kl(logits_of(int8, batches[0]), wanted)
    # One drawn label per position and independent errors: the right size, not the third digit.
    assert 0.4 < int8.quant_plan.expected_kl / measured < 2.5


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_leaves_the_model_as_it_was(family, batches):
    model = tiny_model(family)
    before = {
        name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()
    }
    stats = add_samples(model, calibrate(model, batches, samples=False), batches)
    assert set(stats.samples) == {group.key for group in stats.groups}
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name][0])
        assert tensor.requires_grad == before[name][1]
        assert tensor.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_are_those_of_automatic_differentiation(batches):
    """Shift the output of one Linear a little: -log p must change by gradient times shift."""
    model = tiny_model("llama").double()
    text = {key: value[:1] for key, value in batches[0].items()}
    stats = calibrate(model, [text], samples=True)
    key = "model.layers.1.mlp.down_proj"
    sample = stats.samples[key]
    logits = model(**text, use_cache=False)[0].detach().flatten(end_dim=-2)
    generator = torch.Generator().manual_seed(0)
    drawn = draw_tokens(logits.float().softmax(-1), generator)
    direction = torch.randn(64, generator=generator, dtype=torch.double)

    def loss(step):
        layer = model.get_submodule(key)
        handle = layer.register_forward_hook(lambda _m, _a, output: output + step * direction)
        with torch.no_grad():
            shifted = model(**text, use_cache=False)[0].flatten(end_dim=-2)
        handle.remove()
        return float(functional.cross_entropy(shifted, drawn, reduction="sum"))

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert slope == pytest.approx(float((sample.gradients.double() @ direction).sum()), rel=1e-3)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    likely = torch.tensor([0.0, 0.6, 0.0, 0.3, 0.1])
    drawn = draw_tokens(likely.expand(20_000, 5), torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=5) / 20_000
    assert torch.equal(share == 0, likely == 0)
    assert torch.allclose(share, likely, atol=0.015)  # four standard errors


def test_a_search_without_samples_says_what_to_do(batches):
    model = tiny_model("llama")
    stats = calibrate(model, batches, samples=False)
    with pytest.raises(CalibrationError, match="samples=True"):
        plan(model, stats, QuantConfig(alpha="auto"))
    assert plan(model, stats, QuantConfig(alpha=0.5)).alpha == 0.5


def test_auto_global_is_one_alpha_and_auto_is_no_worse(batches):
    model = tiny_model("llama")
    for lm_head in (False, True):
        stats = calibrate(model, batches, lm_head=lm_head)
        one, many = (plan(model, stats, QuantConfig(alpha=a)) for a in ("auto-global", "auto"))
        assert one.alpha_range == (one.alpha, one.alpha)
        assert many.alpha == "auto"
        assert many.expected_kl <= one.expected_kl
        head = one.groups["lm_head"].expected_kl if lm_head else 0.0
        # It is the best of the Linears that all may have.
        assert one.expected_kl - head == pytest.approx(min(one.alpha_kl.values()))


def test_a_model_that_hides_its_embedding_is_told_what_to_do(batches, monkeypatch):
    model = tiny_model("bert")

    def hidden(_self):
        raise NotImplementedError("override it")  # as transformers has it for Canine

    monkeypatch.setattr(type(model), "get_input_embeddings", hidden)
    with pytest.raises(UnsupportedModelError, match=r"BertForSeq.*give alpha a number"):
        calibrate(model, batches)
    config = QuantConfig(alpha=0.5, backend="reference")
    quantize(model, calibrate(model, batches, samples=False), config)
