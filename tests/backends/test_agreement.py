"""Every backend must give what `reference` gives for the same plan."""

import copy

import pytest
import torch
from conftest import CORE_FAMILIES, INT8_BACKENDS, LANE, logits_of, relative_error

from ipex_sq import load, save
from ipex_sq.backends.ipex import IpexBackend
from ipex_sq.backends.native import NativeBackend
from ipex_sq.backends.quantization import plan, quantize, quantize_model, rounding
from ipex_sq.backends.registry import available_backends, choose_backend
from ipex_sq.config import QuantConfig
from ipex_sq.errors import BackendUnavailableError, ConfigError
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.folding import apply_smoothing
from ipex_sq.models.tiny import tiny_model
from ipex_sq.recipe import mixing, planning
from ipex_sq.recipe.plan import DYNAMIC_INT8, PreScale
from ipex_sq.recipe.plan_files import plan_to_json
from ipex_sq.recipe.qparams import activation_qparams, round_rows

# In fp32 only rounding ties differ (a level is 1/255 of the range): well under one level.
FP32_BOUND = 5e-3
# Without smoothing a level is coarse: where sums in another order push one value over a rounding
# boundary, its token and those that attend to it change by as much as rounding did there.
FLIPPED_SHARE = 0.1
# bf16 keeps 8 bits of mantissa in everything that is not int8, as many as int8 itself: the change
# must stay below what quantization did.
BF16_SHARE = 1.0


@pytest.mark.parametrize("alpha", [None, 0.5, "auto"])
@pytest.mark.parametrize("backend", INT8_BACKENDS)
@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_agrees_with_reference(family, backend, alpha, batches, unseen):
    config = QuantConfig(alpha=alpha, backend="reference")
    wanted = logits_of(quantize(tiny_model(family), batches, config), unseen)
    config = QuantConfig(alpha=alpha, backend=backend, dtype="fp32")
    got = logits_of(quantize(tiny_model(family), batches, config), unseen)
    tokens = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float((tokens < FP32_BOUND).float().mean()) > 0.9
    quantization_error = relative_error(wanted, logits_of(tiny_model(family), unseen))
    assert relative_error(got, wanted) < max(FP32_BOUND, FLIPPED_SHARE * quantization_error)


@pytest.mark.parametrize("backend", INT8_BACKENDS)
def test_token_types_count_on_every_backend(backend, batches, unseen):
    """A body that is traced must not leave the second segment of a pair out."""
    typed = [{**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])} for batch in batches]
    for batch in typed:
        batch["token_type_ids"][:, 8:] = 1
    pair = {**unseen, "token_type_ids": (torch.arange(24) >= 12).long().expand(8, 24)}
    logits = {}
    for name in ("reference", backend):
        config = QuantConfig(alpha=0.5, backend=name, dtype="fp32")
        model = tiny_model("bert")
        with torch.no_grad():
            model.bert.embeddings.token_type_embeddings.weight.mul_(50.0)
        model = quantize(model, typed, config)
        logits[name] = logits_of(model, pair)
        assert relative_error(logits_of(model, unseen), logits[name]) > 2 * FP32_BOUND
    assert relative_error(logits[backend], logits["reference"]) < FP32_BOUND


@pytest.mark.parametrize(("alpha", "activations"), [(None, "dynamic"), ("auto", "mixed")])
@pytest.mark.parametrize("backend", INT8_BACKENDS)
def test_agrees_with_reference_per_token(
    monkeypatch, backend, alpha, activations, batches, unseen, tmp_path
):
    for module in (mixing, planning):
        monkeypatch.setattr(module, "LEAST_SAVING", 0.0)  # so that a tiny model has massive groups
    models = {}
    for name in ("reference", backend):
        config = QuantConfig(alpha=alpha, activations=activations, backend=name, dtype="fp32")
        models[name] = quantize(tiny_model("llama"), batches, config)
    decided = models[backend].quant_plan
    assert plan_to_json(decided) == plan_to_json(models["reference"].quant_plan)
    assert decided.names(DYNAMIC_INT8)
    if activations == "mixed":
        body = [name for name in decided.names(DYNAMIC_INT8) if name != "lm_head"]
        assert 0 < len(body) <= 0.1 * len(decided.int8_names)
    wanted = logits_of(models["reference"], unseen)
    got = logits_of(models[backend], unseen)
    assert relative_error(got, wanted) < FP32_BOUND
    assert torch.equal(logits_of(load(save(models[backend], tmp_path / "int8")), unseen), got)


@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize("backend", INT8_BACKENDS)
def test_agrees_in_bf16(backend, alpha, batches, unseen):
    config = QuantConfig(alpha=alpha, backend="reference")
    wanted = logits_of(quantize(tiny_model("llama"), batches, config), unseen)
    config = QuantConfig(alpha=alpha, backend=backend, dtype="bf16")
    model = quantize(tiny_model("llama"), batches, config)
    quantization_error = relative_error(wanted, logits_of(tiny_model("llama"), unseen))
    assert relative_error(logits_of(model, unseen), wanted) < BF16_SHARE * quantization_error


@pytest.mark.parametrize("backend", INT8_BACKENDS)
def test_padding_does_not_change_real_positions(backend, batches, unseen):
    model = quantize(tiny_model("llama"), batches, QuantConfig(backend=backend, dtype="fp32"))
    ids = unseen["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 9))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 9))
    got = logits_of(model, {"input_ids": padded, "attention_mask": mask})[:, : ids.shape[1]]
    assert relative_error(got, logits_of(model, unseen)) < FP32_BOUND


@pytest.mark.parametrize("observer", ["percentile", "mse", "kl"])
def test_observers_that_clip_run_and_are_recorded(observer, batches, unseen):
    config = QuantConfig(observer=observer, backend="reference")
    quantized = quantize_model(tiny_model("llama"), batches, config)
    assert quantized.plan.observer == observer
    assert torch.isfinite(logits_of(quantized.model, unseen)).all()


def test_statistics_stand_in_for_batches(batches, unseen):
    model = tiny_model("llama")
    stats = calibrate(model, batches)
    config = QuantConfig(alpha=0.5, backend="native", dtype="fp32")
    direct = quantize(tiny_model("llama"), batches, config)
    from_stats = quantize(model, stats, config)
    assert torch.equal(logits_of(from_stats, unseen), logits_of(direct, unseen))
    with pytest.raises(ConfigError, match="batches"):
        quantize(tiny_model("llama"), stats, QuantConfig(observer="kl", backend="native"))


def test_native_generates_with_a_cache(batches):
    config = QuantConfig(alpha=0.5, backend="native", dtype="fp32")
    model = quantize(tiny_model("llama"), batches, config)
    prompt = batches[0]["input_ids"][:1, :8]
    mask = torch.ones_like(prompt)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cached = model.generate(prompt, attention_mask=mask, **options)
    plain = model.generate(prompt, attention_mask=mask, use_cache=False, **options)
    assert cached.shape[1] == 16
    assert torch.equal(cached, plain)


def test_int8_linear_matches_the_integers(unseen):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (24, 32), dtype=torch.int8, generator=generator)
    x, bias = torch.randn(5, 32, generator=generator), torch.randn(24, generator=generator)
    scale, prescale = torch.rand(24, generator=generator), torch.rand(32, generator=generator) + 0.5
    qparams = activation_qparams(-2.0, 3.0)
    linear = Int8Linear(weight, scale, bias)
    linear.set_input(qparams, PreScale(prescale))
    levels = (torch.round(x * (1 / (prescale * qparams.scale))) + qparams.zero_point).clamp(0, 255)
    exact = ((levels.long() - qparams.zero_point) @ weight.long().T).double()
    torch.testing.assert_close(
        linear(x).double(), exact * qparams.scale * scale + bias, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(linear.levels, weight)


@pytest.mark.parametrize("activation", [activation_qparams(-0.5, 1.0), None])
def test_int8_linear_rounds_parts_as_the_recipe_does_saved_or_not(activation):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (24, 36), dtype=torch.int8, generator=generator)
    x, divisor = torch.randn(50, 32, generator=generator), torch.rand(32, generator=generator) + 0.5
    x[:9, 3] *= 100.0
    channels = torch.tensor([3, 3, 3, 7])
    linear = Int8Linear(weight, torch.full((24,), 0.01), None)
    linear.set_input(activation, PreScale(divisor, channels))
    levels, zero_point, step = round_rows(x * (1.0 / divisor), activation, channels)
    exact = (levels.long() - zero_point) @ weight.long().T * 0.01 * step
    # A tie that falls to the other side: one level of one channel.
    assert relative_error(linear(x), exact) < 1e-4
    again = Int8Linear.restored(linear.stored(), per_token=activation is None)
    assert torch.equal(again(x), linear(x))


def test_int8_linear_per_token_matches_the_integers():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (24, 32), dtype=torch.int8, generator=generator)
    sizes = torch.tensor([1e-3, 1.0, 3000.0, 1.0, 0.0])[:, None]
    x, bias = sizes * torch.randn(5, 32, generator=generator), torch.randn(24, generator=generator)
    scale = torch.rand(24, generator=generator)
    linear = Int8Linear(weight, scale, bias)
    linear.set_input(None, None)
    steps = (x.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-8)
    exact = (torch.round(x / steps).long() @ weight.long().T).double() * steps * scale + bias
    torch.testing.assert_close(linear(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_backend_that_rounds_per_tensor_only_says_so(monkeypatch):
    """IPEX does where our operator cannot be built."""
    config = QuantConfig(activations="dynamic", alpha=0.5)
    assert rounding(config, IpexBackend(), None).activations == "dynamic"
    monkeypatch.setattr("ipex_sq.backends.ipex.usable_flags", lambda: frozenset({"avx_vnni"}))
    with pytest.raises(ConfigError, match="--activations static"):
        rounding(config, IpexBackend(), None)
    model = tiny_model("llama")
    asked = {
        (backend.name, alpha): rounding(QuantConfig(alpha=alpha), backend, model)
        for backend in (IpexBackend(), NativeBackend())
        for alpha in ("auto", 0.5)
    }
    for key, (activations, lm_head) in {
        ("ipex", "auto"): ("static", False),
        ("native", "auto"): ("mixed", True),
        ("native", 0.5): ("static", False),
    }.items():
        assert (asked[key].activations, asked[key].lm_head) == (activations, lm_head)


def test_every_planned_linear_really_is_int8(batches):
    model = quantize(tiny_model("opt"), batches, QuantConfig(backend="native"))
    lowered = [name for name, m in model.named_modules() if isinstance(m, Int8Linear)]
    assert sorted(lowered) == sorted(model.quant_plan.int8_names)
    assert len(lowered) == 13


def test_the_lane_offers_its_backends():
    reasons = available_backends()
    assert all(not reasons[name] for name in (*INT8_BACKENDS, "reference"))
    assert choose_backend("auto").backend.name == ("ipex" if LANE == "ipex" else "native")
    if LANE == "ipex":
        assert not reasons["inc"]
    else:
        with pytest.raises(BackendUnavailableError) as caught:
            choose_backend("ipex")
        assert caught.value.backend == "ipex"
        assert caught.value.reasons


def test_reference_does_not_round_twice(batches, unseen):
    """Simulating a plan on an already smoothed model equals the one-call pipeline."""
    model = tiny_model("llama")
    stats = calibrate(model, batches)
    decided = plan(model, stats, QuantConfig(alpha=0.5))
    apply_smoothing(model, decided, stats.example)
    backend = choose_backend("reference").backend
    lowered = backend.lower(copy.deepcopy(model), decided, stats.example, "fp32")
    config = QuantConfig(alpha=0.5, backend="reference")
    piped = quantize(tiny_model("llama"), batches, config)
    assert torch.equal(logits_of(lowered, unseen), logits_of(piped, unseen))
