"""Checkpoints as plain transformers loads them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CORE_FAMILIES, LANE, logits_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    FalconMambaConfig,
    LlamaForCausalLM,
    pipeline,
)

from ipex_sq import load, save
from ipex_sq.backends.quantization import quantize
from ipex_sq.checkpoint import assembling
from ipex_sq.config import QuantConfig
from ipex_sq.errors import CheckpointError, ConfigError
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.models.layers import find_layers
from ipex_sq.models.tiny import VOCABULARY, tiny_model

ROOT = Path(__file__).parents[2]
SHARDS = "40KB"
RUN = {"_compiled", "_compiled_cut"}
"""What a layer has compiled: itself, or itself with the first token alone behind its attention."""


def _quantized(family, batches, dtype):
    config = QuantConfig(alpha=0.5, backend="native", dtype=dtype)
    return quantize(tiny_model(family), batches, config)


def _uncompiled(model):
    """The same arithmetic on both sides without waiting for the compiler."""
    for layer in find_layers(model):
        layer.forward = layer.forward._eager
    return model


@pytest.fixture(scope="module")
def saved(request, tmp_path_factory):
    """A llama in fp32, whose tokens do not hang on the last bit, in several shards."""
    batches, tokenizer = (request.getfixturevalue(name) for name in ("batches", "tokenizer"))
    model = _quantized("llama", batches, "fp32")
    folder = tmp_path_factory.mktemp("hf") / "int8"
    return model, save(model, folder, tokenizer, max_shard_size=SHARDS)


@pytest.fixture
def copy(saved, tmp_path):
    return save(saved[0], tmp_path / "copy", max_shard_size=SHARDS)


def test_the_largest_weights_are_packed_before_the_others_are_there(saved, monkeypatch):
    sizes = []
    pack = assembling.SavedModel._int8_linear

    def packed(self, name, memory):
        linear = pack(self, name, memory)
        sizes.append(linear.levels.numel())
        return linear

    monkeypatch.setattr(assembling.SavedModel, "_int8_linear", packed)
    AutoModelForCausalLM.from_pretrained(saved[1])
    assert len(set(sizes)) > 1
    assert sizes == sorted(sizes, reverse=True)


def test_a_model_that_was_just_quantized_says_how_it_is_saved(saved, tmp_path):
    with pytest.raises(ConfigError, match=r"ipex_sq\.save"):
        saved[0].save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", [*CORE_FAMILIES, "gpt2", "gptj"])
def test_from_pretrained_computes_the_same_bits(family, dtype, batches, unseen, tmp_path):
    model = _uncompiled(_quantized(family, batches, dtype))
    folder = save(model, tmp_path / "int8", max_shard_size=SHARDS)
    auto = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    again = _uncompiled(auto.from_pretrained(folder))
    assert torch.equal(logits_of(again, unseen), logits_of(model, unseen))
    int8 = {name for name, item in again.named_modules() if isinstance(item, Int8Linear)}
    assert int8 == set(model.quant_plan.int8_names)
    assert {item.dtype for item in again.parameters()} == {next(model.parameters()).dtype}


def test_code_that_asks_whether_a_model_is_quantized_does_the_same(batches, unseen, tmp_path):
    config = FalconMambaConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=VOCABULARY, pad_token_id=1, bos_token_id=0
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model = quantize(model, batches, QuantConfig(alpha=0.5, backend="native", dtype="bf16"))
    loaded = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "int8"))
    found, wanted = (logits_of(_uncompiled(item), unseen) for item in (loaded, model))
    assert torch.equal(found, wanted)


def test_memory_freed_before_goes_back_before_weights_take_some(saved, monkeypatch):
    done = []
    monkeypatch.setattr(assembling, "give_freed_memory_back", lambda: done.append("given back"))
    pack = assembling.SavedModel._int8_linear

    def packed(self, *args):
        done.append("packed")
        return pack(self, *args)

    monkeypatch.setattr(assembling.SavedModel, "_int8_linear", packed)
    AutoModelForCausalLM.from_pretrained(saved[1])
    assert done[0] == "given back"
    assert set(done[1:]) == {"packed"}


def test_a_model_of_from_pretrained_compiles_its_layers(saved, unseen):
    model, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(again, unseen), logits_of(model, unseen))
    assert all(layer.forward._compiled is not None for layer in find_layers(again))


def test_a_classifier_of_from_pretrained_ends_with_the_first_token(batches, unseen, tmp_path):
    model = _quantized("bert", batches, "fp32")
    again = AutoModelForSequenceClassification.from_pretrained(save(model, tmp_path / "int8"))
    assert torch.equal(logits_of(again, unseen), logits_of(model, unseen))
    for one in (model, again):
        ran = [vars(layer.forward).keys() & RUN for layer in find_layers(one)]
        assert ran == [{"_compiled"}, {"_compiled_cut"}]


@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}],
    ids=["dynamic", "static", "beams", "no-cache"],
)
def test_generated_tokens_are_those_of_the_model_in_memory(settings, saved):
    model, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    batch = tokenizer(["the cat sat on the mat", "a boat"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    assert (batch["attention_mask"][1, :3] == 0).all()  # padded on the left
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **settings}
    wanted = model.generate(**batch, **settings)
    assert torch.equal(again.generate(**batch, **settings), wanted)
    greedy = {key: value for key, value in settings.items() if key != "cache_implementation"}
    assert torch.equal(again.generate(**batch, **greedy), wanted)


def test_static_cache_in_bf16(batches, tmp_path):
    folder = save(_quantized("llama", batches, "bf16"), tmp_path / "int8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = batches[0]["input_ids"]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    got = model.generate(ids, cache_implementation="static", **settings)
    assert got.shape == (len(ids), ids.shape[1] + 4)


def test_pipelines(saved, batches, tokenizer, tmp_path):
    _, folder = saved
    generator = pipeline("text-generation", model=str(folder))
    (answer,) = generator("the cat sat on", max_new_tokens=3, do_sample=False)
    assert answer["generated_text"].startswith("the cat sat on")
    classifier = save(_quantized("bert", batches, "fp32"), tmp_path / "bert", tokenizer)
    (label,) = pipeline("text-classification", model=str(classifier))("the cat sat")
    assert label["label"] in {"LABEL_0", "LABEL_1"}


def test_save_pretrained_writes_the_same_files(saved, tmp_path):
    _, folder = saved
    again = tmp_path / "again"
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(again, max_shard_size=SHARDS)
    manifests = [json.loads((item / "ipex_sq.json").read_text()) for item in (folder, again)]
    assert manifests[0] == manifests[1]
    assert len([name for name in manifests[0]["sha256"] if name.startswith("model-")]) > 2
    load(again)


def test_save_pretrained_obeys_or_refuses(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    with pytest.raises(ConfigError, match="no variant="):
        model.save_pretrained(tmp_path / "x", variant="fp16")
    with pytest.raises(ConfigError, match="no push_to_hub=True"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    usual = {"safe_serialization": True, "push_to_hub": False, "token": None, "variant": None}
    AutoTokenizer.from_pretrained(saved[1]).save_pretrained(tmp_path / "x")
    model.save_pretrained(tmp_path / "x", is_main_process=True, **usual)
    assert {"tokenizer.json", "ipex_sq.json"} < {item.name for item in (tmp_path / "x").iterdir()}


def _shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def _flip_a_byte(folder):
    path = _shards(folder)[1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _truncate(folder):
    path = _shards(folder)[0]
    path.write_bytes(path.read_bytes()[:-9])


def _swap(folder):
    first, second = _shards(folder)[:2]
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def _delete_index(folder):
    (folder / "model.safetensors.index.json").unlink()


def _delete_shard(folder):
    _shards(folder)[-1].unlink()


def _edit_shape(folder):
    """[64, 64] becomes [32,128] in the header of a shard."""
    path = next(item for item in _shards(folder) if b"[64,64]" in item.read_bytes())
    path.write_bytes(path.read_bytes().replace(b"[64,64]", b"[8,512]", 1))


def _edit_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))


def _edit_plan(folder):
    text = (folder / "quant_plan.json").read_text()
    (folder / "quant_plan.json").write_text(text.replace('"static_int8"', '"dynamic_int8"', 1))


def _plant_pickle(folder):
    torch.save({"lm_head.weight": torch.zeros(128, 64)}, folder / "pytorch_model.bin")


def _replace_by_pickle(folder):
    _delete_index(folder)
    _plant_pickle(folder)


def _plant_weights(folder):
    (folder / "model.safetensors").write_bytes(_shards(folder)[0].read_bytes())


def _delete_manifest(folder):
    (folder / "ipex_sq.json").unlink()


DAMAGES = [
    (_flip_a_byte, "is truncated or changed"),
    (_truncate, "is truncated or changed"),
    (_swap, "is truncated or changed"),
    (_delete_index, "lacks model.safetensors.index.json"),
    (_delete_shard, "lacks model-"),
    (_edit_shape, "is truncated or changed"),
    (_edit_config, "config.json is truncated or changed"),
    (_edit_plan, "quant_plan.json is truncated or changed"),
    (_plant_pickle, "holds pytorch_model.bin"),
    (_replace_by_pickle, "lacks model.safetensors.index.json"),
    (_plant_weights, "holds model.safetensors"),
    (_delete_manifest, "no ipex_sq checkpoint"),
]


@pytest.mark.parametrize("way", [load, AutoModelForCausalLM.from_pretrained, None])
@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[item.__name__ for item, _ in DAMAGES])
def test_a_damaged_folder_is_refused(damage, message, way, copy):
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        way(copy) if way else pipeline("text-generation", model=str(copy))


def _sign(folder):
    """Make the digests right again: what is left is what only the contents tell."""
    from ipex_sq.checkpoint.integrity import digests

    manifest = json.loads((folder / "ipex_sq.json").read_text())
    (folder / "ipex_sq.json").write_text(json.dumps(manifest | {"sha256": digests(folder)}))


@pytest.mark.parametrize("damage", [_edit_config, _edit_shape, _delete_index, _edit_plan])
def test_contents_that_do_not_fit_are_refused_whatever_the_digests_say(damage, copy):
    damage(copy)
    _sign(copy)
    for way in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError):
            way(copy)


def test_another_format_version_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has format version 99, this ipex_sq reads"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_another_task_or_device_is_refused(saved):
    _, folder = saved
    with pytest.raises(CheckpointError, match="holds a LlamaForCausalLM"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(ConfigError, match="run on the CPU"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="cuda:0")
    AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


def test_another_precision_is_not_taken(saved, unseen, caplog):
    model, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert "was asked for" in caplog.text
    assert torch.equal(logits_of(again, unseen), logits_of(model, unseen))


@pytest.mark.skipif(LANE != "ipex", reason="no IPEX goes with this torch; the ipex lane runs it")
def test_a_graph_of_ipex_is_not_for_from_pretrained(batches, tmp_path):
    model = quantize(tiny_model("llama"), batches, QuantConfig(alpha=0.5, backend="ipex"))
    folder = save(model, tmp_path / "int8")
    with pytest.raises(CheckpointError, match=r"use ipex_sq\.load"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "imports",
    [
        "import ipex_sq, transformers",
        "import transformers, ipex_sq",
        "import transformers.modeling_utils, ipex_sq",
    ],
)
def test_imports_in_any_order(imports, saved):
    code = (
        f"{imports}; from transformers import AutoModelForCausalLM as auto; "
        f"print(type(auto.from_pretrained({str(saved[1])!r}).quant_plan).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "QuantPlan", done.stderr[-2000:]


def test_the_card_says_what_the_model_is(saved):
    _, folder = saved
    card = (folder / "README.md").read_text()
    assert "14 static int8, 0 int8 with inputs rounded per token, 1 float (1 output head)" in card
    assert "SmoothQuant, alpha 0.5" in card
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_saving_over_its_own_folder_loses_nothing(saved, tokenizer, unseen, tmp_path):
    folder = save(saved[0], tmp_path / "int8", tokenizer, max_shard_size=SHARDS)
    (folder / "notes.txt").write_text("mine")
    names = {path.name for path in folder.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size=SHARDS)
    assert {path.name for path in folder.iterdir()} == names
    AutoTokenizer.from_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(again, unseen), logits_of(model, unseen))


def _scales(model):
    return model.model.layers[0].self_attn.q_proj.weight_scale


def test_int8_weights_come_from_where_the_others_do(saved, batches, tmp_path):
    """A subfolder, another folder's config, and a snapshot of the hub: never two checkpoints."""
    model, folder = saved
    plain = quantize(
        tiny_model("llama"), batches, QuantConfig(alpha=None, backend="native", dtype="fp32")
    )
    parent = save(plain, tmp_path / "plain")
    shutil.copytree(folder, parent / "int8")
    hub = tmp_path / "hub" / "models--me--int8"
    shutil.copytree(folder, hub / "snapshots" / ("a" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    cached = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    for again in (
        AutoModelForCausalLM.from_pretrained(parent, subfolder="int8"),
        AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(parent)),
        AutoModelForCausalLM.from_pretrained("me/int8", **cached),
    ):
        assert not torch.equal(_scales(again), _scales(plain))
        assert again.quant_plan.alpha == model.quant_plan.alpha
        assert torch.equal(_norm(again), _norm(model))
        assert torch.equal(_scales(again), _scales(model))


def _norm(model):
    return model.state_dict()["model.norm.weight"]


def test_a_config_of_another_precision_is_refused(saved, batches, tmp_path):
    other = save(_quantized("llama", batches, "bf16"), tmp_path / "other")
    with pytest.raises(CheckpointError, match="in fp32, the config is of one in bf16"):
        AutoModelForCausalLM.from_pretrained(saved[1], config=AutoConfig.from_pretrained(other))


def test_a_folder_with_a_checkpoint_below_it_is_none(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "int8")
    AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="int8")
    config, state = AutoConfig.from_pretrained(saved[1]), {"lm_head.weight": None}
    with pytest.raises(CheckpointError, match="one folder of files"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
