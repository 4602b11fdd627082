"""The folder of a checkpoint: is it ours to write, and what its manifest says."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ipex_sq.errors import CheckpointError, ConfigError

MANIFEST = "ipex_sq.json"
CONFIG = "config.json"
PLAN_JSON = "quant_plan.json"
QUANT_METHOD = "ipex_sq"
COMPRESSED_TENSORS = "compressed-tensors"
FORMAT_VERSION = 4
_FIELDS = frozenset(
    (
        "architecture",
        "attention",
        "backend",
        "dtype",
        "ipex_sq",
        "made_from",
        "sha256",
        "task",
        "versions",
    )
)


def check_writable(folder: Path, marker: str = MANIFEST) -> None:
    """Refuse, before the work, a folder that could not be written after it.

    Args:
        folder: May exist where it holds a file `marker`, which says that it is ours.
        marker: Name of that file.

    Raises:
        ConfigError: It is a file, holds what is not ours, or its parent is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output_dir {folder} is a file, name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise ConfigError(
            f"--output_dir {folder} is not empty and was not written by ipex_sq: name another"
        )
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=parent).cleanup()
    except OSError as error:
        raise ConfigError(f"--output_dir {folder} is not writable: {error.strerror}") from error


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the file that marks a folder as ours."""
    document = {"format_version": FORMAT_VERSION, **content}
    (folder / MANIFEST).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: No manifest, a damaged one, or one of another format version.
    """
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = document["format_version"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no ipex_sq checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error!r}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, this ipex_sq reads {FORMAT_VERSION}"
        )
    missing = sorted(_FIELDS - set(document))
    if missing:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it lacks {missing[0]}")
    return dict(document)
