import json

import pytest
import torch

from ipex_sq.backends.quantization import plan
from ipex_sq.config import QuantConfig
from ipex_sq.errors import CheckpointError
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.tiny import tiny_model
from ipex_sq.recipe.plan_files import plan_from_json, plan_tensors, plan_to_json


@pytest.fixture(scope="module")
def decided(request):
    batches = request.getfixturevalue("batches")
    model = tiny_model("llama")
    return plan(model, calibrate(model, batches), QuantConfig(alpha="auto"))


def test_a_plan_survives_serialisation(decided):
    assert any(item.headroom > 1.0 for item in decided.groups.values())
    again = plan_from_json(plan_to_json(decided), plan_tensors(decided))
    assert plan_to_json(again) == plan_to_json(decided)
    for key, tensor in plan_tensors(decided).items():
        assert torch.equal(plan_tensors(again)[key], tensor)


def test_every_linear_is_int8_or_has_a_reason(decided):
    assert len(decided.int8_names) == len(decided.linears) == 15
    assert decided.reasons("dynamic_int8") == {"output head": 1}


def test_a_linear_that_stays_float_has_a_reason(batches):
    model = tiny_model("llama")
    config = QuantConfig(alpha="auto", quant_lm_head=False)
    decided = plan(model, calibrate(model, batches), config)
    assert len(decided.int8_names) == 14
    assert decided.reasons("float") == {"output head": 1}
    assert decided.linears["lm_head"].mode == "float"


def test_readers_of_one_tensor_share_scale_and_range(decided):
    prefix = "model.layers.0.self_attn."
    readers = [decided.linears[f"{prefix}{name}_proj"] for name in "qkv"]
    assert len({item.activation for item in readers}) == 1
    assert len({item.group for item in readers}) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}', '{"version": 1}'])
def test_a_damaged_plan_is_a_checkpoint_error(text):
    with pytest.raises(CheckpointError):
        plan_from_json(text, {})


DAMAGES = {
    "mode": ("linears", "mode", "x"),
    "no group": ("linears", "group", None),
    "scale nan": ("linears", "activation", {"scale": float("nan"), "zero_point": 1}),
    "scale 0": ("linears", "activation", {"scale": 0, "zero_point": 1}),
    "scale text": ("linears", "activation", {"scale": "a", "zero_point": 1}),
    "zero point": ("linears", "activation", {"scale": 1.0, "zero_point": 999}),
    "placement": ("groups", "placement", "x"),
    "headroom": ("groups", "headroom", float("inf")),
}


@pytest.mark.parametrize(("part", "field", "value"), DAMAGES.values(), ids=DAMAGES)
def test_a_plan_with_an_impossible_value_is_a_checkpoint_error(part, field, value, decided):
    document = json.loads(plan_to_json(decided))
    items = document[part].values()
    item = next(i for i in items if i.get("mode") != "float" and i.get("placement") != "none")
    item[field] = value
    with pytest.raises(CheckpointError, match="not a quantization plan"):
        plan_from_json(json.dumps(document), plan_tensors(decided))


@pytest.mark.parametrize(
    "change",
    [{"alpha_kl": {"a": 1}}, {"alpha_kl": []}, {"calibration": None}, {"groups": {}}],
    ids=str,
)
def test_a_plan_with_a_damaged_part_is_a_checkpoint_error(change, decided):
    document = json.loads(plan_to_json(decided)) | change
    with pytest.raises(CheckpointError, match="not a quantization plan"):
        plan_from_json(json.dumps(document), plan_tensors(decided))


def test_scales_that_are_not_finite_are_no_plan(decided):
    for kind in ("weight_scale", "smoothing_scale"):
        tensors = dict(plan_tensors(decided))
        name = next(name for name in tensors if name.endswith(kind))
        tensors[name] = torch.full_like(tensors[name], float("nan"))
        with pytest.raises(CheckpointError, match=kind):
            plan_from_json(plan_to_json(decided), tensors)


def test_kl_narrows_ranges_and_says_so(decided):
    name = decided.int8_names[0]
    narrowed = decided.with_ranges({name: (-0.01, 0.01)}, "kl")
    assert narrowed.observer == "kl"
    assert narrowed.linears[name].activation.scale < decided.linears[name].activation.scale
