"""int8 for the head of a language model too (`QuantConfig.quant_lm_head`)."""

import json

import pytest
import torch
from conftest import INT8_BACKENDS, logits_of, relative_error

from ipex_sq import load, save
from ipex_sq.backends.quantization import quantize
from ipex_sq.checkpoint.folders import MANIFEST, read_manifest
from ipex_sq.checkpoint.integrity import file_sha256
from ipex_sq.config import QuantConfig
from ipex_sq.errors import CheckpointError, ConfigError, UnsupportedModelError
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.models import topology
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.tiny import tiny_model
from ipex_sq.models.topology import find_topology, has_small_head, language_head
from ipex_sq.recipe.plan import DYNAMIC_INT8, FLOAT, HEAD, STATIC_INT8

FAMILIES = ("llama", "opt", "gpt2", "bloom", "gptj")
"""With a norm before the head, tied and untied, Conv1D, and one with a bias."""

FP32_BOUND = 5e-3
FLIPPED_SHARE = 0.1
"""As of the other Linears (`test_agreement.py`): only rounding ties differ, and what they move."""


def _quantized(family, batches, **settings):
    return quantize(tiny_model(family), batches, QuantConfig(quant_lm_head=True, **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_a_group_that_its_norm_can_take(family, batches):
    model = tiny_model(family)
    head = language_head(model)
    with_head, without = (
        find_topology(model, batches[:1], lm_head=lm_head) for lm_head in (True, False)
    )
    (group,) = [group for group in with_head.groups if head in group.readers]
    assert group.readers == (head,)
    assert group.folds_into_norm
    assert without.float_reasons == {**with_head.float_reasons, head: HEAD}


@pytest.mark.parametrize("alpha", [None, "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_native_agrees_with_reference_and_embeddings_stay(family, alpha, batches, unseen):
    before = tiny_model(family).get_input_embeddings().weight
    logits, settings = {}, {"alpha": alpha, "weight_rounding": "gptq", "dtype": "fp32"}
    for backend in ("reference", "native"):
        model = _quantized(family, batches, backend=backend, **settings)
        logits[backend] = logits_of(model, unseen)
        assert torch.equal(model.get_input_embeddings().weight, before)
        head = language_head(model)
        assert model.quant_plan.linears[head].mode == DYNAMIC_INT8
        assert model.quant_plan.linears[head].reason == HEAD
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    error = relative_error(logits["reference"], logits_of(tiny_model(family), unseen))
    bound = max(FP32_BOUND, FLIPPED_SHARE * error)
    assert relative_error(logits["native"], logits["reference"]) < bound


@pytest.mark.parametrize("activations", ["static", "mixed"])
@pytest.mark.parametrize("alpha", [None, 0.5, "auto", "auto-global"])
def test_only_the_head_is_out_of_static_int8(alpha, activations, batches):
    model = _quantized("llama", batches, backend="reference", alpha=alpha, activations=activations)
    decided, head = model.quant_plan, language_head(model)
    assert set(decided.names(STATIC_INT8)) == set(decided.int8_names) - {head}
    assert len(decided.int8_names) == len(decided.linears)


@pytest.mark.parametrize(
    ("settings", "int8"),
    [
        ({}, True),
        ({"alpha": "auto-global"}, True),
        ({"activations": "dynamic"}, True),
        ({"activations": "static"}, False),
        ({"alpha": None}, False),
        ({"alpha": 0.5}, False),
        ({"alpha": 0.5, "activations": "dynamic"}, False),
        ({"portable": True}, False),
        ({"quant_lm_head": False}, False),
    ],
)
def test_the_head_is_int8_by_default_where_alpha_is_searched(settings, int8, batches):
    config = QuantConfig(backend="reference", **settings)
    model = quantize(tiny_model("llama"), batches, config)
    assert model.quant_plan.linears["lm_head"].mode == (DYNAMIC_INT8 if int8 else FLOAT)


def test_a_large_head_stays_float_by_default(batches, monkeypatch):
    """By its size in fp32, with weights or without, so that both ways of quantizing agree."""
    model = tiny_model("llama")
    size = 4 * model.lm_head.weight.numel()
    for most, small in ((size, True), (size - 1, False)):
        monkeypatch.setattr(topology, "MOST_HEAD_BYTES", most)
        assert has_small_head(model) == small
        assert has_small_head(tiny_model("llama").to("meta")) == small
    assert calibrate(model, batches).head is None
    config = QuantConfig(backend="reference")
    assert quantize(model, batches, config).quant_plan.linears["lm_head"].mode == FLOAT
    assert not has_small_head(tiny_model("bert"))


def test_the_rest_of_the_plan_is_the_one_without_it(batches):
    stats = calibrate(tiny_model("llama"), batches, lm_head=True)
    plans = [
        quantize(tiny_model("llama"), stats, QuantConfig(backend="reference", **more)).quant_plan
        for more in ({"quant_lm_head": False}, {"quant_lm_head": True})
    ]
    (head,) = set(plans[1].int8_names) - set(plans[0].int8_names)
    assert plans[0].linears[head].reason == HEAD
    for name in plans[0].int8_names:
        assert torch.equal(plans[0].linears[name].weight_scale, plans[1].linears[name].weight_scale)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_it_is_saved_loaded_and_generates(family, batches, unseen, tmp_path):
    from transformers import AutoModelForCausalLM

    model = _quantized(family, batches, backend="native", alpha=0.5)
    wanted = logits_of(model, unseen)
    assert wanted.dtype == torch.float32
    folder = save(model, tmp_path / "int8")
    for again in (load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(logits_of(again, unseen), wanted)
        assert torch.equal(
            again.get_output_embeddings().levels, model.get_output_embeddings().levels
        )
    prompt = unseen["input_ids"][:2, :8]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    texts = [
        item.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        for item in (model, again)
    ]
    assert torch.equal(*texts)
    assert torch.equal(logits_of(load(save(again, tmp_path / "twice")), unseen), wanted)


@pytest.mark.parametrize("backend", INT8_BACKENDS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_backend_runs_and_saves_it(family, backend, batches, unseen, tmp_path):
    settings = {"alpha": "auto", "activations": "static", "dtype": "fp32"}
    wanted = logits_of(_quantized(family, batches, backend="reference", **settings), unseen)
    model = _quantized(family, batches, backend=backend, **settings)
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    found = logits_of(model, unseen)
    assert relative_error(found, wanted) < FP32_BOUND
    folder = save(model, tmp_path / "int8")
    again = load(folder)
    assert torch.equal(logits_of(again, unseen), found)
    assert torch.equal(logits_of(load(save(again, tmp_path / "twice")), unseen), found)
    narrow = _quantized(family, batches, backend=backend, alpha="auto", dtype="bf16")
    assert logits_of(narrow, unseen).dtype == torch.float32


@pytest.mark.parametrize("backend", INT8_BACKENDS)
@pytest.mark.parametrize("field", ["weight", "multiplier", "channels"])
def test_a_damaged_head_is_refused(field, backend, batches, tmp_path):
    from safetensors.torch import load_file, save_file

    model = _quantized("llama", batches, backend=backend, alpha="auto", activations="static")
    folder = save(model, tmp_path / "int8")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"lm_head.{field}"] = tensors[f"lm_head.{field}"][:-4]
    if field == "channels":
        tensors["lm_head.channels"] = tensors["lm_head.channels"] + 10_000
    save_file(tensors, file)
    manifest = read_manifest(folder)
    manifest["sha256"]["model.safetensors"] = file_sha256(file)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not fit"):
        load(folder)


def test_smoothing_helps_a_head_that_reads_outliers(batches, unseen):
    """Channels of the last norm are large in tiny models, as planted there."""
    wanted = logits_of(tiny_model("llama"), unseen)
    errors = {
        alpha: relative_error(
            logits_of(_quantized("llama", batches, backend="reference", alpha=alpha), unseen),
            wanted,
        )
        for alpha in (None, "auto")
    }
    assert errors["auto"] < errors[None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "native", "portable": True}, "portable"),
        ({"backend": "inc"}, "cannot run|published recipe"),
    ],
)
def test_what_has_no_int8_head_is_refused(settings, message, batches):
    from ipex_sq.errors import IpexSqError

    with pytest.raises(IpexSqError, match=message):
        _quantized("llama", batches, **settings)


def test_statistics_without_the_head_are_refused(batches):
    stats = calibrate(tiny_model("llama"), batches, lm_head=False)
    with pytest.raises(ConfigError, match="statistics of the head"):
        _quantized("llama", stats, backend="reference")
    # Where nothing is said of the head, it is as the statistics are.
    model = quantize(tiny_model("llama"), stats, QuantConfig(backend="reference"))
    assert model.quant_plan.linears["lm_head"].mode == FLOAT


def test_a_classifier_has_none(batches):
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        _quantized("bert", batches, backend="reference")
