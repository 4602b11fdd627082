"""A folder is replaced as a whole; what others have put into it stays."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ipex_sq.checkpoint.folders import CONFIG, MANIFEST, PLAN_JSON, check_writable

TOKENIZER_FILES = frozenset(
    (
        "added_tokens.json",
        "additional_chat_templates",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    )
)
"""What transformers writes of tokenizers: a new one must not meet files of another."""

_OURS = frozenset(
    (
        CONFIG,
        MANIFEST,
        PLAN_JSON,
        "README.md",
        "generation_config.json",
        "graph.pt",
        "quant_plan.safetensors",
    )
)
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def replace_folder(folder: Path, write: Callable[[Path], None], marker: str = MANIFEST) -> None:
    """Fill a scratch folder by `write` and put it in the place of `folder` in one rename.

    A killed run leaves the old folder or the new one. What the old one holds and we did not write
    (notes, subfolders, a tokenizer where `write` writes none) is in the new one too.

    Raises:
        ConfigError: See `check_writable`.
    """
    check_writable(folder, marker)
    parent = folder.absolute().parent
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    old = scratch.with_name(f"{scratch.name}-old")
    try:
        write(scratch)
        _carry_over(folder, scratch)
        scratch.chmod(0o755)
        if folder.exists():
            os.replace(folder, old)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same file in two folders where the disk can, else a copy; links stay links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _carry_over(old: Path, new: Path) -> None:
    """Put what is not ours in `old` into `new` as well: whatever happens, it is in one of them."""
    if not old.is_dir():
        return
    ours, written = _written(old), {path.name for path in new.iterdir()}
    if written & TOKENIZER_FILES:
        ours |= TOKENIZER_FILES
    for path in old.iterdir():
        if path.name in ours | written or _WEIGHTS.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(path, new / path.name)


def _written(folder: Path) -> frozenset[str]:
    """Names of what a checkpoint of any format version has written, as far as it is known."""
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return _OURS | set(document["sha256"].keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _OURS
