"""A float model is the one in its folder, whole, or it is refused in one line."""

import json
import shutil

import pytest
import torch
from conftest import logits_of
from safetensors.torch import load_file, save_file

from ipex_sq.config import QuantConfig
from ipex_sq.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    IpexSqError,
    UnsupportedModelError,
)
from ipex_sq.models.classifier import load_classifier
from ipex_sq.models.loading import float_skeleton, load_model, load_tokenizer
from ipex_sq.models.sizes import named_size
from ipex_sq.models.tiny import DECODERS, FAMILIES, HIDDEN, tiny_model
from ipex_sq.streaming.run import quantize_folder

UP = "model.layers.0.mlp.up_proj.weight"


def _load(family, folder):
    loaded = load_model if family in DECODERS else load_classifier
    found = loaded(str(folder))
    return found[0] if family in DECODERS else found.model


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """A folder of an untied decoder, and one of an encoder."""
    place = tmp_path_factory.mktemp("whole")
    for family in ("mistral", "bert"):
        tiny_model(family, outliers=False).save_pretrained(place / family)
        tokenizer.save_pretrained(place / family)
    return place


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of a folder, with changes to its config.json and its tensors."""

    def copy(family="mistral", *, tensors=None, **settings):
        folder = tmp_path / family
        shutil.copytree(whole / family, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        if tensors is not None:
            file = folder / "model.safetensors"
            changed = {
                name: item.contiguous().clone() for name, item in tensors(load_file(file)).items()
            }
            save_file(changed, file, metadata={"format": "pt"})
        return folder

    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_whole(family, tmp_path, tokenizer, unseen):
    """Tied heads and what a family computes itself are not missing."""
    model = tiny_model(family, outliers=False)
    if family == "gpt2":  # the tiny one has Linears for its Conv1D modules
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits_of(_load(family, tmp_path), unseen), logits_of(model, unseen))


@pytest.mark.parametrize("family", ["bloom", "opt", "falcon", "llama"])
def test_a_body_whose_head_is_tied_is_whole(family, tmp_path, tokenizer, unseen):
    """As BLOOM's and OPT's authors publish them."""
    model = tiny_model(family, outliers=False)
    getattr(model, model.base_model_prefix).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits_of(_load(family, tmp_path), unseen), logits_of(model, unseen))


def _without(part):
    return lambda tensors: {name: item for name, item in tensors.items() if part not in name}


def test_missing_weights_are_named_and_counted(copied):
    down = "layers.1.mlp.down_proj.weight"
    with pytest.raises(CheckpointError, match=rf"lacks 1 of .* first is 'model\.{down}'"):
        load_model(str(copied(tensors=_without(down))))


def test_a_layer_too_many_in_the_config_is_refused(copied):
    with pytest.raises(CheckpointError, match=r"lacks 9 of .* first is 'model\.layers\.2\."):
        load_model(str(copied(num_hidden_layers=3)))


def test_a_body_without_its_head_is_refused(copied):
    folder = copied(tensors=_without("lm_head"), architectures=["MistralModel"])
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*'lm_head\.weight'"):
        load_model(str(folder))


def test_a_prefix_too_many_is_named(copied):
    folder = copied(tensors=lambda all_: {f"module.{name}": item for name, item in all_.items()})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight'.*module\..*rename"):
        load_model(str(folder))


def test_other_shapes_are_refused(copied):
    with pytest.raises(
        CheckpointError, match=r"6 weights have not the shapes .*down_proj.*\[64, 96"
    ):
        load_model(str(copied(intermediate_size=96)))


def test_a_classifier_may_lack_its_head_but_nothing_else(copied):
    folder = copied("bert", tensors=_without("pooler"))
    assert not load_classifier(str(folder)).trained_head
    shutil.rmtree(folder)
    folder = copied("bert", tensors=_without("layer.1.output.dense.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*layer\.1\.output\.dense\.weight"):
        load_classifier(str(folder))


def test_a_trained_head_of_other_classes_is_refused(whole):
    with pytest.raises(DataError, match="a head for 2 classes, the reviews have 3"):
        load_classifier(str(whole / "bert"), num_labels=3)


@pytest.mark.parametrize("method", ["ipex_sq", "gptq", "awq", "bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize(
    "read",
    [
        load_model,
        float_skeleton,
        lambda name: named_size(name, "causal-lm"),
    ],
    ids=["load_model", "float_skeleton", "named_size"],
)
def test_quantized_models_are_no_float_models(copied, method, read):
    folder = copied(quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ConfigError, match=rf"mistral is quantized already .*{method}.* float"):
        read(str(folder))


@pytest.mark.parametrize("value", [{"quant_method": "foo"}, {}])
def test_unknown_ways_of_quantizing_are_refused(copied, value):
    with pytest.raises(ConfigError, match="a float checkpoint is needed"):
        load_model(str(copied(quantization_config=value)))


def test_quantized_classifiers_are_no_float_models(copied):
    folder = copied("bert", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="quant_method gptq"):
        load_classifier(str(folder))


def test_integers_are_no_float_weights(copied, batches, tmp_path):
    folder = copied(tensors=lambda all_: all_ | {UP: (all_[UP] * 9).to(torch.int8)})
    config = QuantConfig(backend="native", dtype="bf16")
    for read in (
        lambda: load_model(str(folder)),
        lambda: quantize_folder(folder, tmp_path / "out", batches, config),
    ):
        with pytest.raises(UnsupportedModelError, match=rf"'{UP}' is stored as I8"):
            read()


def _write(folder, name, content):
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("keep", [0, 5000])
def test_damaged_weights_are_one_line(copied, keep):
    folder = copied()
    _write(folder, "model.safetensors", (folder / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="mistral: its safetensors are damaged"):
        load_model(str(folder))


@pytest.mark.parametrize("content", [b"[]", b"5", b'"x"', b"{}", b"{", b"\xff"])
def test_a_config_that_is_none_is_one_line(copied, content):
    folder = copied()
    _write(folder, "config.json", content)
    with pytest.raises(IpexSqError, match="mistral"):
        load_model(str(folder))


def test_the_type_of_a_model_is_not_guessed_from_the_name_of_its_folder(copied):
    """Transformers 4 made the default model of that type, of 7 billion weights, for "mistral"."""
    folder = copied()
    _write(folder, "config.json", b'{"hidden_size": 64}')
    for read in (load_model, lambda name: named_size(name, "causal-lm")):
        with pytest.raises(DataError, match="it holds no model_type"):
            read(str(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": str(HIDDEN)},
        {"num_hidden_layers": None},
        {"num_attention_heads": 0, "head_dim": None},
        {"hidden_size": -HIDDEN},
        {"hidden_act": "foo"},
    ],
)
def test_sizes_that_are_none_are_one_line(copied, settings):
    folder = copied(**settings)
    for read in (load_model, float_skeleton):
        with pytest.raises(IpexSqError, match="mistral"):
            read(str(folder))


def test_programming_errors_keep_their_traceback(whole, monkeypatch):
    monkeypatch.setattr("ipex_sq.models.loading.float_config", lambda *_: [].nothing)
    with pytest.raises(AttributeError):
        load_model(str(whole / "mistral"))


def test_a_folder_without_a_tokenizer_is_refused(copied):
    """Transformers 5 makes one of special tokens."""
    for family, read in (("bert", load_classifier), ("mistral", load_model)):
        folder = copied(family)
        (folder / "tokenizer.json").unlink()
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            (folder / name).unlink(missing_ok=True)
        for reading in (read, load_tokenizer):
            with pytest.raises(DataError, match=f"{family} holds no tokenizer"):
                reading(str(folder))


def test_settings_alone_are_no_tokenizer(copied):
    folder = copied("bert")
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(IpexSqError, match="bert"):
        load_classifier(str(folder))


def test_bytes_need_no_vocabulary(tmp_path):
    from transformers import ByT5Tokenizer, T5Config

    T5Config().save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))("cat")["input_ids"]) == 4  # and the end of the text
