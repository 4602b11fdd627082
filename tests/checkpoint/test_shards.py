"""Which files hold the weights of a folder."""

import json

import pytest
import torch

from ipex_sq.checkpoint.shards import INDEX, WEIGHTS, Shards, write_safetensors, write_shards
from ipex_sq.errors import CheckpointError, ConfigError
from ipex_sq.streaming.weights import weight_files


def _index(folder, places):
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def test_one_file_goes_before_an_index(tmp_path):
    write_safetensors({"a": torch.ones(1)}, tmp_path / WEIGHTS)
    write_safetensors({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    _index(tmp_path, {"a": "other.safetensors"})
    assert Shards(tmp_path).read()["a"] == 1


@pytest.mark.parametrize("place", [1, None, ["x"], "../x.safetensors", "/x.safetensors"])
def test_an_index_names_files_of_its_folder(place, tmp_path):
    _index(tmp_path, {"a": place})
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        Shards(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", '{"weight_map": []}', "{"])
def test_a_damaged_index_is_named(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        Shards(tmp_path)


def test_what_is_read_decides_on_a_streamed_run(tmp_path):
    (tmp_path / "part").mkdir()
    write_safetensors({"a": torch.ones(1)}, tmp_path / "part" / "x.safetensors")
    write_safetensors({"a": torch.ones(1)}, tmp_path / "unread.safetensors")
    _index(tmp_path, {"a": "part/x.safetensors"})
    names = [str(path.relative_to(tmp_path)) for path in weight_files(tmp_path)]
    assert names == ["part/x.safetensors", INDEX]


@pytest.mark.parametrize("size", ["x", 0, -5, "-1GB", "", True, "1" * 400])
def test_what_is_no_size_of_a_shard(size, tmp_path):
    with pytest.raises(ConfigError, match="a size is written as"):
        write_shards({"a": torch.ones(1)}, tmp_path, size)
    assert not list(tmp_path.iterdir())
