import json

import pytest
import torch
from conftest import CORE_FAMILIES, INT8_BACKENDS, logits_of

from ipex_sq import load, save
from ipex_sq.backends.quantization import quantize
from ipex_sq.config import QuantConfig
from ipex_sq.errors import CheckpointError, ConfigError
from ipex_sq.models.tiny import tiny_model
from ipex_sq.recipe.plan_files import plan_to_json


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", INT8_BACKENDS)
@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_a_loaded_model_computes_the_same_bits(family, backend, dtype, batches, unseen, tmp_path):
    config = QuantConfig(alpha="auto", backend=backend, dtype=dtype)
    model = quantize(tiny_model(family), batches, config)
    folder = save(model, tmp_path / "int8")
    again = load(folder)
    assert torch.equal(logits_of(again, unseen), logits_of(model, unseen))
    assert plan_to_json(again.quant_plan) == plan_to_json(model.quant_plan)


@pytest.fixture(scope="module")
def saved(request, tmp_path_factory):
    batches = request.getfixturevalue("batches")
    config = QuantConfig(alpha=0.5, backend="native")
    model = quantize(tiny_model("llama"), batches, config)
    return model, save(model, tmp_path_factory.mktemp("saved") / "int8")


def test_int8_weights_are_stored_as_int8_and_nothing_as_pickle(saved):
    from safetensors import safe_open

    model, folder = saved
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in model.quant_plan.int8_names:
            assert file.get_tensor(f"{name}.weight").dtype == torch.int8
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".md", ".safetensors"}


def test_saving_twice_replaces_and_leaves_no_scratch(saved):
    model, folder = saved
    save(model, folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["model.safetensors", "quant_plan.safetensors"])
def test_a_truncated_file_is_named(name, saved, tmp_path):
    model, _ = saved
    folder = save(model, tmp_path / "copy")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match=f"{name} is truncated or changed"):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"versions": {"transformers": "99.0"}}, "written by transformers 99"),
    ],
)
def test_another_version_is_refused(change, message, saved, tmp_path):
    model, _ = saved
    folder = save(model, tmp_path / "copy")
    manifest = json.loads((folder / "ipex_sq.json").read_text())
    (folder / "ipex_sq.json").write_text(json.dumps(manifest | change))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_other_folders_are_not_touched(saved, tmp_path):
    model, _ = saved
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not empty and was not written by ipex_sq"):
        save(model, tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        save(model, tmp_path / "file")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no ipex_sq checkpoint"):
        load(tmp_path)


def test_float_and_simulated_models_are_not_saved(batches, tmp_path):
    with pytest.raises(ConfigError, match="native and ipex"):
        save(tiny_model("llama"), tmp_path / "a")
    simulated = quantize(tiny_model("llama"), batches, QuantConfig(backend="reference"))
    with pytest.raises(ConfigError, match="native and ipex"):
        save(simulated, tmp_path / "b")


def test_everybody_may_read_a_checkpoint(batches, tmp_path):
    folder = save(
        quantize(tiny_model("llama"), batches, QuantConfig(backend="native")), tmp_path / "a"
    )
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())
