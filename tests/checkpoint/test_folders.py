"""A folder is replaced as a whole, and nothing in it that we did not write is lost."""

import json

from ipex_sq.checkpoint.folders import MANIFEST
from ipex_sq.checkpoint.replacing import replace_folder


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
