"""What every family must show, on a tiny random model of its real class."""

import copy

import pytest
import torch
from conftest import logits_of, relative_error

from ipex_sq.backends import native
from ipex_sq.backends.quantization import plan, quantize
from ipex_sq.config import QuantConfig
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.folding import apply_smoothing
from ipex_sq.models.tiny import DECODERS, FAMILIES, tiny_model
from ipex_sq.models.topology import quantizable_linears

FP32_BOUND = 5e-3
"""Only rounding ties differ, as in test_agreement. One that falls to the other side moves its token
and those that attend to it: of one text, by less than rounding moved that text."""


@pytest.fixture(scope="module", params=FAMILIES)
def calibrated(request):
    batches = request.getfixturevalue("batches")
    model = tiny_model(request.param)
    return model, calibrate(model, batches)


@pytest.fixture
def uncompiled(monkeypatch):
    """Twenty families would compile for minutes, and the numbers are those of the kernels."""
    monkeypatch.setattr(native, "compile_layers", lambda model: model)


@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_smoothing_preserves_float_logits(calibrated, alpha, unseen):
    model, stats = copy.deepcopy(calibrated)
    before = logits_of(model, unseen)
    decided = plan(model, stats, QuantConfig(alpha=alpha, backend="reference"))
    carried_out, change = apply_smoothing(model, decided, stats.example)
    assert change < 1e-5
    assert carried_out.placements == decided.placements  # no fold had to be undone
    assert relative_error(logits_of(model, unseen), before) < 1e-4


def test_every_linear_is_int8_or_has_a_reason(calibrated):
    model, stats = calibrated
    decided = plan(model, stats, QuantConfig(backend="reference"))
    linears, kept = quantizable_linears(model)
    assert set(decided.linears) == {*linears, *kept}
    for item in decided.linears.values():
        assert item.reason or item.mode == "static_int8"
    assert decided.int8_names


def test_smoothquant_comes_closer_to_fp32_than_plain_int8(calibrated, unseen):
    model, stats = calibrated
    wanted, errors = logits_of(model, unseen), {}
    for alpha in (None, 0.5, "auto"):
        config = QuantConfig(alpha=alpha, activations="static", backend="reference")
        int8 = quantize(copy.deepcopy(model), stats, config)
        errors[alpha] = relative_error(logits_of(int8, unseen), wanted)
    assert errors[0.5] < 0.7 * errors[None]
    assert errors["auto"] < 0.7 * errors[None]


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_native_agrees_with_reference(uncompiled, calibrated, activations, unseen):
    model, stats = calibrated
    outputs, experts = {}, {}
    for backend in ("reference", "native"):
        config = QuantConfig(activations=activations, backend=backend, dtype="fp32")
        int8 = quantize(copy.deepcopy(model), stats, config)
        experts[backend] = _watch_experts(int8)
        outputs[backend] = logits_of(int8, unseen)
    got, wanted = outputs["native"], outputs["reference"]
    texts = [relative_error(*text) for text in zip(got, wanted, strict=True)]
    most = max(range(len(texts)), key=texts.__getitem__)
    assert sum(error >= FP32_BOUND for error in texts) <= 1
    bound = max(FP32_BOUND, relative_error(wanted[most], logits_of(model, unseen)[most]))
    # A token whose two best experts are all but equal may go to the other: no rounding error bounds
    # what that changes.
    assert texts[most] < bound or most in _sent_elsewhere(experts, len(texts))


NEAR_TIE = 0.01
"""Of router scores, which are of size 1: what rounding changes in them."""


def _watch_experts(model):
    """The scores of experts for every token, in the order of the routers' calls."""
    seen = []

    def keep(router, _inputs, scores):
        del router
        if isinstance(scores, torch.Tensor):  # transformers 5 has routers that choose themselves
            seen.append(scores.reshape(-1, scores.shape[-1]).float())

    for name, module in model.named_modules():
        if name.endswith("moe.gate"):
            module.register_forward_hook(keep)
    return seen


def _sent_elsewhere(experts, texts):
    """Texts with a token that the backends send to other experts, which were all but equal."""
    found = set()
    for one, other in zip(experts["reference"], experts["native"], strict=True):
        chosen = [scores.topk(2).indices.sort(dim=-1).values for scores in (one, other)]
        best = one.sort(dim=-1, descending=True).values
        tied = best[:, 1] - best[:, 2] < NEAR_TIE
        tokens = ((chosen[0] != chosen[1]).any(dim=-1) & tied).reshape(texts, -1)
        found |= set(tokens.any(dim=-1).nonzero().flatten().tolist())
    return found


@pytest.mark.parametrize("family", DECODERS)
def test_generates(uncompiled, family, batches):
    config = QuantConfig(alpha=0.5, backend="native", dtype="fp32")
    model = quantize(tiny_model(family), batches, config)
    prompt = batches[0]["input_ids"][:2, :8]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert found.shape == (2, 12)
    assert torch.equal(found[:, :8], prompt)
