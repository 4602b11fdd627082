"""Is a folder what was written? Digests of its files, and no weights that do not belong."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ipex_sq.checkpoint.folders import CONFIG, PLAN_JSON, read_manifest
from ipex_sq.errors import CheckpointError
from ipex_sq.system import package_versions

_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".gguf"}
)
_GUARDED_NAMES = (CONFIG, PLAN_JSON)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 by file name of what decides on numbers: weights, indices, plan, config."""
    paths = [path for path in sorted(folder.iterdir()) if _guarded(path)]
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        return dict(zip([path.name for path in paths], pool.map(file_sha256, paths), strict=True))


def check_folder(folder: Path) -> dict[str, Any]:
    """Verify every guarded file of a checkpoint.

    Returns:
        The manifest.

    Raises:
        CheckpointError: A file is missing or changed, one holds weights and does not belong, or the
            checkpoint is of another version or of a newer transformers.
    """
    manifest = read_manifest(folder)
    check_transformers(manifest)
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        list(pool.map(partial(check_file, folder, manifest), manifest["sha256"]))
    strangers = [
        path.name
        for path in sorted(folder.iterdir())
        if _guarded(path) and path.name not in manifest["sha256"]
    ]
    if strangers:
        raise CheckpointError(
            f"{folder} holds {strangers[0]}, which was not saved with it and could be loaded in "
            "its place: remove it"
        )
    return manifest


def check_file(folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    """Verify one file.

    Raises:
        CheckpointError: Missing or changed.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks {name}: copy the whole folder again")
    if file_sha256(path) != manifest["sha256"].get(name):
        raise CheckpointError(f"{path} is truncated or changed: copy it again")


def check_transformers(manifest: Mapping[str, Any]) -> None:
    """Refuse what a newer transformers wrote.

    Raises:
        CheckpointError: Names both versions; or the manifest's is none.
    """
    here = package_versions()["transformers"].split(".")[0]
    written = str(manifest["versions"].get("transformers", "0")).split(".")[0]
    if not written.isdecimal():
        raise CheckpointError(f"the manifest is damaged: it is of transformers {written!r}")
    if int(written) > int(here):
        raise CheckpointError(
            f"the checkpoint was written by transformers {written}, whose config.json version "
            f"{here} would misread: load it with transformers {written} or quantize again"
        )


def _guarded(path: Path) -> bool:
    name = path.name
    return path.suffix in _WEIGHTS or name in _GUARDED_NAMES or name.endswith(".index.json")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
