"""The float weights of a checkpoint folder, read when they are asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ipex_sq.checkpoint.shards import INDEX, WEIGHTS, Shards, shard_files
from ipex_sq.errors import CheckpointError
from ipex_sq.models.completeness import check_finite_weight, refuse_integer_weights
from ipex_sq.models.loading import loaded_names

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class FloatWeights:
    """Weights by the names that the model gives them, in fp32.

    Persistent buffers are weights too: some models keep what training has found in them (Gemma 4's
    `layer_scalar`, the router of DeepSeek-V3).

    Attributes:
        tied: Other names of the same weight, by its first name.
    """

    def __init__(self, folder: Path, model: nn.Module, transposed: Iterable[str]) -> None:
        """Match the files of `folder` with `model`, whose parameters are on the meta device.

        Args:
            folder: Holds safetensors.
            model: Of transformers; Conv1D modules are Linears already.
            transposed: Names of parameters that lie in the files as Conv1D's, `[in, out]`.

        Raises:
            CheckpointError: There are no safetensors, or they are damaged or of another model.
            UnsupportedModelError: They are not float.
        """
        _refuse_pickles(folder)
        self._shards = Shards(folder)
        refuse_integer_weights(folder)
        self._transposed = frozenset(transposed)
        same: dict[int, list[str]] = defaultdict(list)
        shapes = {}
        for name, weight in model.state_dict(keep_vars=True).items():
            same[id(weight)].append(name)
            shapes[name] = tuple(weight.shape)
        self.tied = {names[0]: tuple(names[1:]) for names in same.values()}
        names = loaded_names(model, self._shards.shapes)
        prefix = f"{model.base_model_prefix}."
        self._stored = {
            first: _find(names, (first, *others), prefix) for first, others in self.tied.items()
        }
        self._first = {name: first for first, others in self.tied.items() for name in others}
        missing = [name for name, stored in self._stored.items() if not stored]
        if missing:
            raise CheckpointError(
                f"{folder} holds no tensor that is {missing[0]!r} as it stands: it is of another "
                "model, or transformers joins several to make it; quantize that in memory"
            )
        for name in self._stored:
            wanted = shapes[name][::-1] if name in self._transposed else shapes[name]
            if self._shards.shapes[self._stored[name]] != wanted:
                raise CheckpointError(f"{folder}: {name!r} has not the shape that config.json says")

    def read(self, name: str, *, check: bool = False) -> Tensor:
        """The weight `name`; its file is unmapped again.

        Whole numbers, which a buffer may hold, stay what they are. `check`: also whether it is
        finite.

        Raises:
            CheckpointError: A file cannot be read.
            NumericalCheckError: A value is not finite.
        """
        name = self._first.get(name, name)
        stored = self._stored[name]
        tensor = self._shards.named([stored])[stored]
        tensor = tensor.t() if name in self._transposed else tensor
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        found = tensor.to(dtype, copy=True).contiguous()
        if check and found.is_floating_point():
            check_finite_weight(name, found)
        return found


class OnDisk(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = list(names), read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def weight_files(folder: Path) -> list[Path]:
    """What decides on the float model: config, index and weights.

    Raises:
        CheckpointError: There are no safetensors, or their index is damaged.
    """
    _refuse_pickles(folder)
    others = [path for path in (folder / "config.json", folder / INDEX) if path.is_file()]
    return shard_files(folder) + others


def _find(stored: Mapping[str, str], names: Iterable[str], prefix: str) -> str:
    """The name in the files: transformers writes base models without their prefix."""
    for name in names:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in stored:
                return stored[candidate]
    return ""


def _refuse_pickles(folder: Path) -> None:
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles:
        raise CheckpointError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code and is not opened: where "
            "you trust it, load it with transformers and write it with save_pretrained"
        )
    raise CheckpointError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
