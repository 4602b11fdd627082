"""Folders of random weights load, and their seed decides on them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ipex_sq.cli import random_weights
from ipex_sq.cli.running import run
from ipex_sq.errors import ConfigError
from ipex_sq.models import shapes
from ipex_sq.models.shapes import Shape
from ipex_sq.system import parse_bytes

SETTINGS = {"hidden_size": 32, "n_layer": 3, "n_head": 2, "vocab_size": 50000}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "bloom-560m", Shape("BloomConfig", SETTINGS))


def _written(folder, *flags):
    assert run(random_weights.command, ["bloom-560m", str(folder), *flags]) == 0
    return AutoModelForCausalLM.from_pretrained(folder)


def test_it_is_a_folder_that_transformers_loads(tmp_path, capsys):
    model = _written(tmp_path / "new", "--max-shard-size", "40KB")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["parameters"] == sum(item.numel() for item in model.parameters())
    assert result["shards"] == len(list(tmp_path.glob("new/*.safetensors"))) > 2
    weight = model.transformer.h[1].mlp.dense_h_to_4h.weight.float()
    assert float(weight.std()) == pytest.approx(model.config.initializer_range, rel=0.1)
    assert torch.equal(model.transformer.ln_f.weight, torch.ones(32, dtype=model.dtype))
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("a text").input_ids
    assert (tmp_path / "new" / "model-00001-of-00004.safetensors").stat().st_mode & 0o044


def test_the_seed_decides(tmp_path):
    first, same, other = (
        _written(tmp_path / name, "--seed", seed).lm_head.weight
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for arguments, message in (
        (["bloom-560m", str(tmp_path / "full")], "exists and is no empty folder"),
        (["bert-base", str(tmp_path / "new")], "bert-base is a classifier"),
        (["bloom-56m", str(tmp_path / "new")], "did you mean 'bloom-560m'"),
        (["bloom-560m", str(tmp_path / "new"), "--max_shard_size", "big"], "8GiB, 500MB"),
    ):
        assert run(random_weights.command, arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 2**33), ("500MB", 5 * 10**8), ("1.5 kib", 1536), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "8GX", "1.2.3GB", "1" * 400])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="8GiB"):
        parse_bytes(text)
