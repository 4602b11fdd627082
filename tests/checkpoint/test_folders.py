"""A folder is replaced as a whole, and nothing in it that we did not write is lost."""

import errno
import json
import os

import pytest
import torch

from ipex_sq.checkpoint import folders, replacing
from ipex_sq.checkpoint.disk import exchange
from ipex_sq.checkpoint.folders import MANIFEST, check_writable, read_manifest, write_manifest
from ipex_sq.checkpoint.integrity import check_transformers
from ipex_sq.checkpoint.replacing import replace_folder
from ipex_sq.checkpoint.shards import write_safetensors
from ipex_sq.errors import CheckpointError, ConfigError, ResourceError


def _files(folder):
    """Relative path and text of every file below `folder`."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def _writer(**texts):
    """Writes a checkpoint of files with these texts; `_` in a name stands for the dot."""
    files = {name.replace("_", "."): text for name, text in texts.items()}

    def write(folder):
        for name, text in files.items():
            (folder / name).write_text(text)
        manifest = {"sha256": dict.fromkeys(files, "")}
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return write


def _write_old(folder):
    replace_folder(folder, _writer(model_safetensors="old", extra_bin="old"))
    return folder


def test_files_of_others_are_kept(tmp_path):
    folder = _write_old(tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "deep" / "model.safetensors").write_text("mine")
    (folder / "link").symlink_to("notes.txt")
    (folder / "tokenizer.json").write_text("tokens")
    replace_folder(folder, _writer(config_json="new"))
    found = _files(folder)
    assert found.pop(MANIFEST)
    assert found == {
        "config.json": "new",
        "link": "mine",
        "notes.txt": "mine",
        "sub/deep/model.safetensors": "mine",
        "tokenizer.json": "tokens",
    }
    assert (folder / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_tokenizer_goes_without_files_of_the_old_one(tmp_path):
    folder = _write_old(tmp_path / "out")
    for name in ("tokenizer.json", "added_tokens.json", "merges.txt"):
        (folder / name).write_text("old")
    replace_folder(folder, _writer(tokenizer_json="new"))
    assert _files(folder).keys() == {MANIFEST, "tokenizer.json"}


def test_a_damaged_manifest_does_not_cost_files(tmp_path):
    folder = _write_old(tmp_path / "out")
    for text in ("{", "[]", '{"sha256": 3}'):
        (folder / MANIFEST).write_text(text)
        (folder / "notes.txt").write_text(text)
        replace_folder(folder, _writer(model_safetensors="new"))
        assert (folder / "notes.txt").read_text() == text


def _failing(count, error, before=lambda: None):
    """`os.replace` that calls `before` and raises `error` at its call number `count`."""
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(source)
        if len(calls) == count:
            before()
            raise error
        real(source, target)

    return replace


@pytest.fixture
def two_renames(monkeypatch):
    """As where the system cannot exchange folders."""
    monkeypatch.setattr(replacing, "exchange", lambda _first, _second: False)


def test_folders_are_exchanged_in_one_step(tmp_path, monkeypatch):
    """At no moment is there no folder, or half of one."""
    folder = _write_old(tmp_path / "out")
    before, seen, real = _files(folder), [], replacing.exchange

    def watched(scratch, place):
        seen.append(_files(place))
        done = real(scratch, place)
        seen.append(_files(place))
        assert _files(scratch) == before
        return done

    monkeypatch.setattr(replacing, "exchange", watched)
    monkeypatch.setattr(replacing.os, "replace", _failing(1, OSError(errno.EBUSY, "busy")))
    replace_folder(folder, _writer(model_safetensors="new"))
    assert seen == [before, _files(folder)]
    assert _files(folder)["model.safetensors"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_exchanged_is_left(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("a")
    assert not exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "file").read_text() == "a"
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("two_renames")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EBUSY, "busy")])
def test_an_interrupted_swap_leaves_the_old_folder(error, count, tmp_path, monkeypatch):
    folder = _write_old(tmp_path / "out")
    before = _files(folder)
    monkeypatch.setattr(replacing.os, "replace", _failing(count, error))
    raised = ResourceError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(raised):
        replace_folder(folder, _writer(model_safetensors="new"))
    assert _files(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("two_renames")
def test_a_second_writer_costs_nothing_that_was_there(tmp_path, monkeypatch):
    folder = _write_old(tmp_path / "out")
    (folder / "notes.txt").write_text("mine")

    def other():
        folder.mkdir()
        (folder / MANIFEST).write_text("of the other")

    error = OSError(errno.ENOTEMPTY, "Directory not empty")
    monkeypatch.setattr(replacing.os, "replace", _failing(2, error, other))
    with pytest.raises(ResourceError, match=r"not empty.*what it held before is in .*-old"):
        replace_folder(folder, _writer(model_safetensors="new"))
    assert _files(folder) == {MANIFEST: "of the other"}
    (old,) = tmp_path.glob(".out-*-old")
    assert _files(old)["notes.txt"] == "mine"


def test_files_are_on_the_disk_before_the_swap(tmp_path, monkeypatch):
    events = []
    real = os.replace
    monkeypatch.setattr(replacing, "make_durable", lambda path: events.append(path.name))
    monkeypatch.setattr(
        replacing.os, "replace", lambda *names: (events.append("swap"), real(*names))
    )
    replace_folder(tmp_path / "out", _writer(model_safetensors="new"))
    swap = events.index("swap")
    assert {"model.safetensors", MANIFEST} < set(events[:swap])
    assert events[swap + 1 :] == [tmp_path.name]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("No space left on device (os error 28)"),  # tokenizers raises no other
    ],
)
def test_a_full_disk_is_one_line_and_leaves_the_old_folder(error, tmp_path):
    folder = _write_old(tmp_path / "out")
    before = _files(folder)

    def write(_folder):
        raise error

    with pytest.raises(ResourceError, match=r"out cannot be written \(No space.*save again"):
        replace_folder(folder, write)
    with pytest.raises(ResourceError, match="--resume"):
        replace_folder(folder, write, advice="go on with --resume")
    assert _files(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_errors_stay_what_they_are(tmp_path):
    def write(_folder):
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing"):
        replace_folder(tmp_path / "out", write)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_come_from_the_umask(mask, tmp_path):
    def write(folder):
        write_safetensors({"a": torch.zeros(2)}, folder / "model.safetensors")
        (folder / MANIFEST).write_text("{}")

    before = os.umask(mask)
    try:
        replace_folder(tmp_path / "out", write)
    finally:
        os.umask(before)
    folder = tmp_path / "out"
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "real")
    for text in ("first", "second"):
        replace_folder(link, _writer(model_safetensors=text))
        assert link.is_symlink()
        assert _files(tmp_path / "disk" / "real")["model.safetensors"] == text
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_folders_that_cannot_be_renamed_are_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for folder in (".", "..", "x/..", tmp_path / "a"):
        with pytest.raises(ConfigError, match=r"working directory.*name a folder in it"):
            check_writable(tmp_path / "a" / "b" / folder)
    check_writable(tmp_path / "a" / "b" / "c")
    with pytest.raises(ConfigError, match="mount point"):
        check_writable(folders.Path("/proc"))


def test_a_tokenizer_may_be_there_first(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("tokenizer.json", "generation_config.json", "processor_config.json"):
        (tmp_path / "out" / name).write_text("mine")
    replace_folder(tmp_path / "out", _writer(model_safetensors="new"))
    found = _files(tmp_path / "out")
    assert found.pop("model.safetensors") == "new"
    assert found.keys() == {
        MANIFEST, "tokenizer.json", "generation_config.json", "processor_config.json"
    }  # fmt: skip
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"it holds model\.safetensors"):
        check_writable(tmp_path / "out")


WHOLE = {
    "architecture": "LlamaForCausalLM",
    "attention": "sdpa",
    "backend": "native",
    "dtype": "bf16",
    "ipex_sq": "0.1.0",
    "made_from": {},
    "sha256": {"config.json": "0"},
    "task": "causal-lm",
    "versions": {"transformers": "5.0"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": 3},
        {"backend": "x"},
        {"backend": None},
        {"dtype": "fp8"},
        {"made_from": []},
        {"sha256": None},
        {"sha256": []},
        {"sha256": {"config.json": 1}},
        {"sha256": {"../config.json": "0"}},
        {"task": []},
        {"versions": []},
    ],
)
def test_a_damaged_manifest_is_named(change, tmp_path):
    write_manifest(tmp_path, WHOLE)
    assert read_manifest(tmp_path).items() >= WHOLE.items()
    write_manifest(tmp_path, WHOLE | change)
    with pytest.raises(CheckpointError, match=rf"is damaged: {next(iter(change))}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("version", ["x.y", None, {}])
def test_a_manifest_of_no_transformers_is_damaged(version):
    with pytest.raises(CheckpointError, match="damaged"):
        check_transformers({"versions": {"transformers": version}})
