"""The folder of a checkpoint: is it ours to write, and what its manifest says."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ipex_sq.errors import CheckpointError, ConfigError
from ipex_sq.models.int8_folders import MANIFEST

CONFIG = "config.json"
PLAN_JSON = "quant_plan.json"
QUANT_METHOD = "ipex_sq"
COMPRESSED_TENSORS = "compressed-tensors"
FORMAT_VERSION = 4
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
"""What transformers writes of tokenizers."""

TEXT_FILES = TOKENIZER_FILES | {
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
}
"""What may lie in a folder before its model is saved."""

_FIELDS: dict[str, tuple[type, ...]] = {
    "architecture": (str,),
    "attention": (str, type(None)),
    "backend": (str,),
    "dtype": (str,),
    "ipex_sq": (str,),
    "made_from": (dict,),
    "sha256": (dict,),
    "task": (str,),
    "versions": (dict,),
}
_VALUES = {
    "backend": ("native", "ipex", COMPRESSED_TENSORS),
    "dtype": ("fp32", "bf16"),
    "task": ("causal-lm", "sequence-classification"),
}


def check_writable(folder: Path, marker: str = MANIFEST) -> None:
    """Refuse, before the work, a folder that could not be written after it.

    Args:
        folder: May exist where it holds a file `marker`, which says that it is ours, or nothing
            but what `save_pretrained` of a tokenizer or processor writes.
        marker: Name of that file.

    Raises:
        ConfigError: It is a file, holds what is not ours, cannot be renamed, or its parent is not
            writable.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, name a folder")
    place = folder.resolve()
    if _is_mounted(place) or Path.cwd().is_relative_to(place):
        raise ConfigError(
            f"{folder} is a mount point or the working directory, which cannot be replaced as a "
            "whole: name a folder in it"
        )
    if folder.is_dir() and not (place / marker).is_file():
        strangers = sorted({path.name for path in place.iterdir()} - TEXT_FILES)
        if strangers:
            raise ConfigError(
                f"{folder} is not empty and was not written by ipex_sq (it holds {strangers[0]}): "
                "name another folder"
            )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent).cleanup()
    except OSError as error:
        raise ConfigError(f"{folder} is not writable: {error.strerror}") from error


def _is_mounted(place: Path) -> bool:
    """Also where a folder of the same disk is mounted, as containers do."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return place.is_mount()
    escaped = str(place).replace("\\", "\\134").replace(" ", "\\040")
    return place.is_mount() or any(line.split(" ")[4] == escaped for line in lines)


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
    problem = _problem(document)
    if problem:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {problem}")
    return dict(document)


def _problem(document: dict[str, Any]) -> str:
    """What is wrong with a manifest, or nothing."""
    for field, types in _FIELDS.items():
        if field not in document:
            return f"it lacks {field}"
        if not isinstance(document[field], types):
            return f"{field} is {document[field]!r}"
    for field, values in _VALUES.items():
        if document[field] not in values:
            return f"{field} is {document[field]!r}, not one of {', '.join(values)}"
    for name, digest in document["sha256"].items():
        if not isinstance(digest, str) or Path(name).name != name:
            return f"sha256 holds {name!r}: {digest!r}"
    return ""
