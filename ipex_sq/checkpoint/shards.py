"""Tensors of a checkpoint in one or several safetensors files, named as transformers names them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ipex_sq.errors import CheckpointError
from ipex_sq.system import parse_bytes

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one file with the user's umask: safetensors makes it its owner's alone."""
    held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    save_file(held, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_shards(
    tensors: Mapping[str, Tensor], folder: Path, max_shard_size: int | str = MAX_SHARD_SIZE
) -> None:
    """Write `WEIGHTS`, or above `max_shard_size` (bytes, or "5GB") shards and their index.

    Raises:
        ConfigError: The size is not one.
    """
    size = parse_bytes(str(max_shard_size))
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern=pattern, max_shard_size=size
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors({name: tensors[name] for name in names}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=1, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def shard_names(count: int) -> list[str]:
    """Transformers' names of the files of a checkpoint in `count` shards."""
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, files: Sequence[str]) -> None:
    """Write transformers' list of which of `files` holds which tensor."""
    places: dict[str, str] = {}
    for file in files:
        with _opened(folder / file) as opened:
            places |= dict.fromkeys(opened.keys(), file)
    size = sum((folder / file).stat().st_size for file in files)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    text = json.dumps(index, indent=1, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


class Shards:
    """Reads the tensors of a folder; files are mapped only while they are read.

    Attributes:
        shapes: Of every tensor, by its name.
    """

    def __init__(self, folder: Path) -> None:
        """Read the names and shapes.

        Raises:
            CheckpointError: A file is missing or damaged, or the index is.
        """
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in shard_files(folder):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    self._files[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`, by the rest of the name.

        They are views of mapped files, which stay mapped as long as one of them lives.

        Raises:
            CheckpointError: A file cannot be read.
        """
        names = [name for name in self._files if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor for name, tensor in self.named(names).items()}

    def named(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors called `names`, as `read` gives them."""
        found: dict[str, Tensor] = {}
        for path in sorted({self._files[name] for name in names}):
            with _opened(path) as file:
                for name in names:
                    if self._files[name] == path:
                        found[name] = file.get_tensor(name)
        return found


def shard_files(folder: Path) -> list[Path]:
    """The files that hold the weights, as transformers chooses: one file goes before an index.

    Raises:
        CheckpointError: The index is damaged, or names what lies outside the folder.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    try:
        document = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(document["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{folder / INDEX} is damaged: {name!r} is no file of the folder")
    return [folder / name for name in names]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
