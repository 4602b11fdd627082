import pytest
import torch

from ipex_sq.backends.quantization import plan
from ipex_sq.config import QuantConfig
from ipex_sq.errors import CheckpointError
from ipex_sq.models.calibration import calibrate
from ipex_sq.recipe.plan_files import plan_from_json, plan_tensors, plan_to_json


@pytest.fixture(scope="module")
def decided(request):
    from ipex_sq.models.tiny import tiny_model

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
    assert len(decided.int8_names) == 14
    assert decided.reasons("float") == {"output head": 1}
    assert all(item.reason for item in decided.linears.values() if item.mode == "float")


def test_readers_of_one_tensor_share_scale_and_range(decided):
    prefix = "model.layers.0.self_attn."
    readers = [decided.linears[f"{prefix}{name}_proj"] for name in "qkv"]
    assert len({item.activation for item in readers}) == 1
    assert len({item.group for item in readers}) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}', '{"version": 1}'])
def test_a_damaged_plan_is_a_checkpoint_error(text):
    with pytest.raises(CheckpointError):
        plan_from_json(text, {})


def test_kl_narrows_ranges_and_says_so(decided):
    name = decided.int8_names[0]
    narrowed = decided.with_ranges({name: (-0.01, 0.01)}, "kl")
    assert narrowed.observer == "kl"
    assert narrowed.linears[name].activation.scale < decided.linears[name].activation.scale
