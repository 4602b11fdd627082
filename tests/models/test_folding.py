from dataclasses import replace

import pytest
import torch
from conftest import logits_of, relative_error
from torch import nn

from ipex_sq.backends.quantization import plan, quantize_model
from ipex_sq.config import QuantConfig
from ipex_sq.errors import CalibrationError, NumericalCheckError
from ipex_sq.models import calibration, folding
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.folding import apply_smoothing, fold_form, fold_scale
from ipex_sq.models.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_from_statistics_is_the_plan_of_the_smoothed_model(family, batches, monkeypatch):
    """Exactly so where calibration multiplies in fp32, as the smoothed model does here."""
    monkeypatch.setattr(calibration, "calibration_dtype", lambda: torch.float32)
    model = tiny_model(family)
    decided = plan(model, calibrate(model, batches), QuantConfig(alpha=0.7))
    apply_smoothing(model, decided, batches[0])
    for name in decided.int8_names:
        linear = folding.smoothed_linear(model, name)
        seen = []
        hook = linear.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        for batch in batches:
            logits_of(model, batch)
        hook.remove()
        low = min(float(x.min()) for x in seen)
        high = max(float(x.max()) for x in seen)
        planned = decided.linears[name].activation
        assert planned.scale == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-4)
        torch.testing.assert_close(
            decided.linears[name].weight_scale,
            linear.weight.detach().abs().amax(1) / 127,
            rtol=1e-5,
            atol=0,
        )


class _OffsetNorm(nn.Module):
    """Multiplies by 1 + weight, as Gemma's norms do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8) * 0.1)

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, (8,)) * (1 + self.weight)


class _Bounded(nn.Module):
    """Has a weight that does not scale its output."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return torch.tanh(x * self.weight)


@pytest.mark.parametrize(
    ("norm", "form"),
    [(nn.LayerNorm(8), "direct"), (nn.RMSNorm(8), "direct"), (_OffsetNorm(), "offset")],
)
def test_the_form_of_a_norm_is_found_and_folds_exactly(norm, form):
    assert fold_form(norm, 8) == form
    x, scale = torch.randn(5, 8), torch.rand(8) + 0.5
    wanted = norm(x) / scale
    fold_scale(norm, scale, form)
    torch.testing.assert_close(norm(x), wanted, rtol=1e-4, atol=1e-5)


def test_a_module_whose_weight_does_not_scale_cannot_fold():
    assert fold_form(_Bounded(), 8) is None


def _broken(decided, key, **changes):
    """The plan with one group whose fold is wrong."""
    item = decided.groups[key]
    wrong = replace(item, group=replace(item.group, **changes))
    return replace(decided, groups={**decided.groups, key: wrong})


ATTENTION, OUT = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        (ATTENTION, {"producer": "model.layers.0.post_attention_layernorm"}),  # the wrong norm
        (ATTENTION, {"readers": (ATTENTION, "model.layers.0.self_attn.k_proj")}),  # v is left out
        (OUT, {"producer_channels": torch.arange(64) % 32}),  # heads in the wrong order
        (DOWN, {"producer": "model.layers.0.mlp.gate_proj"}),  # through the SiLU
    ],
)
def test_a_wrong_fold_is_caught_and_replaced_by_a_pre_scale(key, changes, batches, unseen):
    model = tiny_model("llama")
    before = logits_of(model, unseen)
    decided = plan(model, calibrate(model, batches), QuantConfig(alpha=0.5, backend="reference"))
    broken = _broken(decided, key, **changes)
    if "producer" in changes:
        # Its rows were planned to be divided by the group's scale: they no longer are.
        broken = replace(broken, linears=decided.without_fold(key, "").linears)
    carried_out, change = apply_smoothing(model, broken, batches[0])
    assert change < 1e-4
    assert relative_error(logits_of(model, unseen), before) < 1e-4
    assert carried_out.groups[key].placement == "prescale"
    assert "the fold changed" in carried_out.groups[key].group.fold_problem
    assert carried_out.placements["prescale"] == 1


def test_an_undone_fold_is_reported(batches):
    model = tiny_model("llama")
    stats = calibrate(model, batches)
    config = QuantConfig(alpha=0.5, backend="reference")
    wrong = _broken(
        plan(model, stats, config), ATTENTION, producer="model.layers.0.post_attention_layernorm"
    )
    undone = quantize_model(model, stats, config, decided=wrong).undone_folds
    assert list(undone) == [ATTENTION]
    assert "the fold changed" in undone[ATTENTION]
    right = quantize_model(tiny_model("llama"), stats, config)
    assert not right.undone_folds


def test_smoothing_that_no_pre_scale_mends_is_refused(batches):
    """A scale for other Linears than those that read the tensor: nothing can be saved."""
    model = tiny_model("bloom")
    decided = plan(model, calibrate(model, batches), QuantConfig(alpha=0.5, backend="reference"))
    key = "transformer.h.0.self_attention.dense"
    item = decided.groups[key]
    assert item.placement == "prescale"
    groups = {**decided.groups, key: replace(item, placement="none")}
    with pytest.raises(NumericalCheckError, match="smooth group"):
        apply_smoothing(model, replace(decided, groups=groups), batches[0])


def test_no_batches_are_refused():
    with pytest.raises(CalibrationError, match="no calibration batches"):
        calibrate(tiny_model("llama"), [])
