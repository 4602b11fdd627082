"""A checkpoint with random weights, written one module after the other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipex_sq.backends.base import DTYPES
from ipex_sq.checkpoint.replacing import replace_folder
from ipex_sq.checkpoint.shards import shard_names, write_index, write_safetensors
from ipex_sq.errors import ConfigError, ResourceError
from ipex_sq.models.loading import float_skeleton, load_tokenizer
from ipex_sq.models.shapes import is_classifier_shape, shape_config


def write_random_weights(
    shape: str, folder: Path, *, dtype: str, seed: int, shard_bytes: int
) -> dict[str, Any]:
    """Write a language model of the shape `shape`, weights as its class draws them.

    Args:
        shape: One of `config.RANDOM_SHAPES`.
        folder: Is made.
        dtype: Of the weights, "bf16" or "fp32".
        seed: Of the weights.
        shard_bytes: Of one file; a module is never split.

    Returns:
        How many parameters, bytes and shards.

    Raises:
        ConfigError: The shape is a classifier's, or the folder holds something.
        ResourceError: The disk is full.
    """
    if is_classifier_shape(shape):
        raise ConfigError(f"{shape} is a classifier: random-weights writes language models")
    written: dict[str, Any] = {}

    def write(scratch: Path) -> None:
        written.update(_write(shape, scratch, dtype=dtype, seed=seed, shard_bytes=shard_bytes))

    replace_folder(folder, write)
    return written


def _write(shape: str, folder: Path, *, dtype: str, seed: int, shard_bytes: int) -> dict[str, Any]:
    config = shape_config(shape)
    config.torch_dtype = DTYPES[dtype]
    config.save_pretrained(folder)
    load_tokenizer("embedded").save_pretrained(folder)
    model = float_skeleton(str(folder))
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    parameters = sum(item.numel() for item in model.parameters())
    needed = parameters * DTYPES[dtype].itemsize
    if needed > shutil.disk_usage(folder).free:
        raise ResourceError(f"{shape} takes {needed / 2**30:.1f} GiB, the disk has less")
    files: list[str] = []
    shard: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tensors in _drawn(model, DTYPES[dtype]):
            if shard and _bytes(shard) + _bytes(tensors) > shard_bytes:
                files.append(_flush(folder, len(files), shard))
            shard |= tensors
        files.append(_flush(folder, len(files), shard))
    names = shard_names(len(files))
    for old, new in zip(files, names, strict=True):
        (folder / old).rename(folder / new)
    write_index(folder, names)
    return {"parameters": parameters, "bytes": needed, "shards": len(files)}


def _drawn(model: nn.Module, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The parameters of one module with parameters of its own after the other; tied ones once."""
    modules = [(path, item) for path, item in model.named_modules() if item._parameters]
    done: set[int] = set()
    draw: Any = model._init_weights
    for path, module in tqdm(modules, desc="weights", unit="module", disable=None, leave=False):
        own = {name: item for name, item in module._parameters.items() if item is not None}
        new = [name for name, item in own.items() if id(item) not in done]
        if not new:
            continue
        done |= {id(item) for item in own.values()}
        for name, item in own.items():
            module._parameters[name] = nn.Parameter(torch.empty(item.shape), requires_grad=False)
        with torch.no_grad():
            draw(module)
        yield {f"{path}.{name}": module._parameters[name].to(dtype) for name in new}  # type: ignore[union-attr]
        module._parameters.update(own)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _flush(folder: Path, number: int, shard: dict[str, Tensor]) -> str:
    """Write `shard` and empty it."""
    name = f"shard-{number}.safetensors"
    write_safetensors(shard, folder / name)
    shard.clear()
    return name
