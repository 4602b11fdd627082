"""Save an int8 model, and load it without the original model, calibration or tracing."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq import __version__
from ipex_sq.backends.base import DTYPES
from ipex_sq.backends.ipex import IpexBackend
from ipex_sq.backends.native import NativeBackend
from ipex_sq.backends.registry import choose_backend
from ipex_sq.checkpoint.card import model_card
from ipex_sq.checkpoint.disk import SAVE_AGAIN
from ipex_sq.checkpoint.folders import (
    COMPRESSED_TENSORS,
    CONFIG,
    FORMAT_VERSION,
    QUANT_METHOD,
    read_manifest,
    write_manifest,
)
from ipex_sq.checkpoint.graphs import GRAPH, load_ipex
from ipex_sq.checkpoint.integrity import check_file, check_transformers, digests
from ipex_sq.checkpoint.plans import save_plan
from ipex_sq.checkpoint.replacing import replace_folder
from ipex_sq.checkpoint.shards import MAX_SHARD_SIZE, write_shards
from ipex_sq.errors import CheckpointError, ConfigError
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.models.body import ReplacedBody
from ipex_sq.models.loading import load_quantized, task_of
from ipex_sq.recipe.plan import QuantPlan
from ipex_sq.system import package_versions


def check_savable(backend: str) -> None:
    """Refuse, before the work, a backend whose models cannot be saved.

    Raises:
        ConfigError: Says which can.
    """
    if backend not in (NativeBackend.name, IpexBackend.name):
        raise ConfigError(f"backend {backend!r} cannot be saved: use native or ipex")


def save(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    made_from: Mapping[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write an int8 model of `quantize` to `folder`, replacing an earlier one of ours.

    Files in the folder that we did not write are kept.

    Args:
        model: From the native or the ipex backend.
        folder: Made where it is missing.
        tokenizer: Saved beside it; without one, that of an earlier checkpoint there is kept.
        made_from: What the float model was, kept in the manifest; of a loaded model, by default
            what its own checkpoint says.
        max_shard_size: Bytes, or "200MB"; larger weights become several files and an index.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder is not ours to write, or the model is of another backend.
        ResourceError: The disk is full; the folder is as before.
    """
    target = Path(folder)
    plan = getattr(model, "quant_plan", None)
    kind = _kind(model)
    if not isinstance(plan, QuantPlan) or kind is None:
        raise ConfigError("only int8 models of the native and ipex backends can be saved")
    origin = dict(getattr(model, "made_from", {}) if made_from is None else made_from)

    def write_weights(scratch: Path) -> None:
        if kind == IpexBackend.name:
            body: Any = model.base_model
            torch.jit.save(body.run, str(scratch / GRAPH))
        write_shards(stored_tensors(model), scratch, max_shard_size)

    write_folder(model, target, tokenizer, origin=origin, write_weights=write_weights)
    return target


def write_folder(
    model: nn.Module,
    target: Path,
    tokenizer: Any,
    *,
    origin: Mapping[str, Any],
    write_weights: Callable[[Path], None],
    layout: Mapping[str, Any] | None = None,
    advice: str = SAVE_AGAIN,
) -> None:
    """Write everything of a checkpoint, weights by `write_weights`, as a whole or not at all.

    Args:
        model: With the attributes `quant_plan` and `quant_dtype`; its weights are not touched.
        target: The folder.
        tokenizer: Or None.
        origin: What the float model was.
        write_weights: Is given the folder to write into.
        layout: `quantization_config` of another program's format, which is not ours to load.
        advice: What to do where the disk is full.

    Raises:
        ConfigError: The folder is not ours to write.
        ResourceError: The disk is full; the folder is as before.
    """
    plan, kind = model.quant_plan, _kind(model) or NativeBackend.name
    assert isinstance(plan, QuantPlan)  # noqa: S101

    def write(scratch: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        _write_configs(model, kind, scratch, layout)
        save_plan(plan, scratch)
        write_weights(scratch)
        manifest = {**_manifest(model, kind, scratch), "made_from": dict(origin)}
        if layout is not None:
            manifest["backend"] = layout["quant_method"]
        card = model_card(plan, manifest, target.name)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        write_manifest(scratch, manifest)

    replace_folder(target, write, advice=advice)


def load(folder: str | Path) -> nn.Module:
    """Load a checkpoint of `save`, ready to run.

    Raises:
        CheckpointError: Missing, truncated, damaged, of another version, or written by a newer
            transformers.
        BackendUnavailableError: Its backend cannot run here.
    """
    source = Path(folder)
    manifest = read_manifest(source)
    if manifest["backend"] == COMPRESSED_TENSORS:
        raise CheckpointError(
            f"{source} has the compressed-tensors layout: load it with transformers and the "
            "package compressed-tensors; save in our own format to run it here"
        )
    choose_backend(manifest["backend"])
    if manifest["backend"] == IpexBackend.name:
        return load_ipex(source)
    check_transformers(manifest)
    check_file(source, manifest, CONFIG)  # it sends transformers to the quantizer, which checks all
    return load_quantized(source, manifest["attention"], manifest["task"])


def keep_savable(model: nn.Module) -> nn.Module:
    """Make `model.save_pretrained` write what `from_pretrained` reads: `save`.

    transformers' own would leave out the packed weights, the plan and the digests.
    """
    model.save_pretrained = functools.partial(_save_pretrained, model)  # type: ignore[assignment]
    return model


def _save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **options: Any,
) -> None:
    """As transformers' method, with the arguments that an int8 model can obey.

    Raises:
        ConfigError: An argument that it cannot obey; see also `save`.
    """
    theirs: Any = type(model)
    known = inspect.signature(theirs.save_pretrained).parameters
    for name, value in options.items():
        usual = known[name].default if name in known else name == "safe_serialization"
        if value is None or value == usual:
            continue
        raise ConfigError(f"save_pretrained of an int8 model has no {name}={value!r}")
    save(model, save_directory, max_shard_size=max_shard_size)


def _kind(model: nn.Module) -> str | None:
    if isinstance(getattr(model, "base_model", None), ReplacedBody):
        return IpexBackend.name
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        return NativeBackend.name
    return None


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """int8 Linears, and everything float that is in memory; tied weights once.

    Not those of a body that is a graph, nor what is on the meta device.
    """
    modules = dict(model.named_modules())
    int8 = {name: item for name, item in modules.items() if isinstance(item, Int8Linear)}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    graph = f"{getattr(model, 'base_model_prefix', '')}.run."
    for name, tensor in model.state_dict(keep_vars=True).items():
        inside = name.rpartition(".")[0] in int8 or name.startswith(graph)
        if inside or tensor.is_meta or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        found[name] = tensor.detach().contiguous()
    for name, module in int8.items():
        found |= {f"{name}.{field}": tensor for field, tensor in module.stored().items()}
    return found


def _write_configs(
    model: nn.Module, kind: str, folder: Path, layout: Mapping[str, Any] | None
) -> None:
    config: Any = model.config
    document = json.loads(config.to_json_string())
    document = {key: value for key, value in document.items() if not key.startswith("_")}
    document["architectures"] = [type(model).__name__]
    if kind == NativeBackend.name:
        key = "dtype" if hasattr(config, "dtype") else "torch_dtype"  # transformers 5 or 4
        document[key] = str(DTYPES[str(model.quant_dtype)]).removeprefix("torch.")
    document["quantization_config"] = layout or {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "backend": kind,
        "dtype": model.quant_dtype,
    }
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")


def _manifest(model: nn.Module, kind: str, folder: Path) -> dict[str, Any]:
    config: Any = model.config
    body: Any = model.base_model
    return {
        "backend": kind,
        "task": task_of(model),
        "architecture": type(model).__name__,
        "attention": config._attn_implementation,
        "dtype": model.quant_dtype,
        "ipex_sq": __version__,
        "inputs": list(body.inputs) if kind == IpexBackend.name else None,
        "versions": package_versions(),
        "sha256": digests(folder),
    }
