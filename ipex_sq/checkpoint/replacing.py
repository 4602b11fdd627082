"""A folder is replaced as a whole; what others have put into it stays."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from ipex_sq.checkpoint.disk import (
    SAVE_AGAIN,
    disk_errors,
    exchange,
    link_or_copy,
    make_durable,
)
from ipex_sq.checkpoint.folders import (
    CONFIG,
    PLAN_JSON,
    TOKENIZER_FILES,
    check_writable,
)
from ipex_sq.errors import ResourceError
from ipex_sq.models.int8_folders import MANIFEST

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


def replace_folder(
    folder: Path,
    write: Callable[[Path], None],
    marker: str = MANIFEST,
    *,
    advice: str = SAVE_AGAIN,
) -> None:
    """Fill a scratch folder by `write`, make it durable and put it in the place of `folder`.

    Whatever is raised on the way leaves the old folder. What the old one holds and we did not write
    (notes, subfolders, a tokenizer where `write` writes none) is in the new one too.

    Args:
        folder: Or a link to it, which stays one.
        write: Is given the folder to write into.
        marker: See `check_writable`.
        advice: What to do where the disk is full.

    Raises:
        ConfigError: See `check_writable`.
        ResourceError: The disk is full, or `folder` was changed by another process meanwhile.
    """
    check_writable(folder, marker)
    place = folder.resolve()
    # Made here and not by tempfile: it and what is written into it get the user's umask.
    scratch = place.with_name(f".{place.name}-{secrets.token_hex(4)}")
    try:
        with disk_errors(folder, advice):
            scratch.mkdir()
            write(scratch)
            _carry_over(place, scratch)
            for path in (*scratch.rglob("*"), scratch):
                if not path.is_symlink() and (path.is_file() or path.is_dir()):
                    make_durable(path)
        _swap(scratch, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(scratch: Path, place: Path) -> None:
    """Put `scratch` in the place of `place`, whose old content goes only when that is done.

    Where folders cannot be exchanged, a kill between two renames leaves both under hidden names.

    Raises:
        ResourceError: It cannot be put there.
    """
    if exchange(scratch, place):  # the caller removes the old content, which is in `scratch` now
        make_durable(place.parent)
        return
    old = scratch.with_name(f"{scratch.name}-old")
    try:
        if place.exists():
            os.replace(place, old)
        os.replace(scratch, place)
    except OSError as error:
        left = "" if _put_back(old, place) else f"; what it held before is in {old}"
        raise ResourceError(
            f"{place} cannot be replaced ({error.strerror}), another process may have written "
            f"it: save to another folder{left}"
        ) from error
    finally:
        if scratch.exists():  # interrupted
            _put_back(old, place)
        else:
            shutil.rmtree(old, ignore_errors=True)
    make_durable(place.parent)


def _put_back(old: Path, place: Path) -> bool:
    """Whether nothing is left of `old` to be put back."""
    with contextlib.suppress(OSError):  # another process has filled the place
        if old.exists():
            os.replace(old, place)
    return not old.exists()


def _carry_over(old: Path, new: Path) -> None:
    """Put what is not ours in `old` into `new` as well: whatever happens, it is in one of them."""
    if not old.is_dir():
        return
    ours, written = _written(old), {path.name for path in new.iterdir()}
    if written & TOKENIZER_FILES:
        ours |= TOKENIZER_FILES  # a new one must not meet files of another
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
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _OURS
