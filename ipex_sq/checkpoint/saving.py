"""Save an int8 model, and load it without the original model, calibration or tracing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ipex_sq.backends.base import DTYPES
from ipex_sq.backends.int8_linear import INPUT_BUFFERS, Int8Linear
from ipex_sq.backends.ipex import IpexBackend, load_graph, tracing_inputs, warm_up
from ipex_sq.backends.native import NativeBackend, finish_native
from ipex_sq.backends.registry import choose_backend
from ipex_sq.checkpoint.folders import read_manifest, replace_folder, write_manifest
from ipex_sq.errors import CheckpointError, ConfigError
from ipex_sq.models.body import ReplacedBody, replace_body
from ipex_sq.models.folding import replace_module
from ipex_sq.models.loading import skeleton, task_of
from ipex_sq.recipe.plan import QuantPlan
from ipex_sq.recipe.plan_files import plan_from_json, plan_tensors, plan_to_json
from ipex_sq.system import package_versions

WEIGHTS = "model.safetensors"
GRAPH = "graph.pt"
PLAN_JSON = "quant_plan.json"
PLAN_TENSORS = "quant_plan.safetensors"


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
) -> Path:
    """Write an int8 model of `quantize` to `folder`, replacing an earlier one of ours.

    Args:
        model: From the native or the ipex backend.
        folder: Made where it is missing.
        tokenizer: Saved beside it where given.
        made_from: What the float model was, kept in the manifest.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder is not ours to write, or the model is of another backend.
    """
    target = Path(folder)
    plan = getattr(model, "quant_plan", None)
    kind = _kind(model)
    if not isinstance(plan, QuantPlan) or kind is None:
        raise ConfigError("only int8 models of the native and ipex backends can be saved")

    def write(scratch: Path) -> None:
        config: Any = model.config
        config.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        (scratch / PLAN_JSON).write_text(plan_to_json(plan) + "\n", encoding="utf-8")
        save_file(plan_tensors(plan), scratch / PLAN_TENSORS)
        if kind == IpexBackend.name:
            body: Any = model.base_model
            torch.jit.save(body.run, str(scratch / GRAPH))
        save_file(_tensors(model), scratch / WEIGHTS)
        write_manifest(
            scratch, {**_manifest(model, kind, scratch), "made_from": dict(made_from or {})}
        )

    replace_folder(target, write)
    return target


def load(folder: str | Path) -> nn.Module:
    """Load a checkpoint of `save`, ready to run.

    Raises:
        CheckpointError: Missing, truncated, damaged, of another version, or written by a newer
            transformers.
        BackendUnavailableError: Its backend cannot run here.
    """
    source = Path(folder)
    manifest = read_manifest(source)
    choose_backend(manifest["backend"])
    _check_transformers(manifest)
    _check_digests(source, manifest)
    plan = load_plan(source)
    model = skeleton(source, manifest["attention"], manifest["task"])
    tensors = _read_tensors(source / WEIGHTS)
    if manifest["backend"] == IpexBackend.name:
        model = _load_ipex(model, source, (tensors, manifest))
    else:
        model = _load_native(model, plan, (tensors, manifest["dtype"]))
    model.quant_plan = plan  # type: ignore[assignment]
    model.quant_dtype = manifest["dtype"]
    return model.eval()


def load_plan(folder: Path) -> QuantPlan:
    """Read the plan of a checkpoint.

    Raises:
        CheckpointError: Missing or damaged.
    """
    try:
        text = (folder / PLAN_JSON).read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder / PLAN_JSON} cannot be read: {error.strerror}") from error
    return plan_from_json(text, _read_tensors(folder / PLAN_TENSORS))


def _kind(model: nn.Module) -> str | None:
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        return NativeBackend.name
    if isinstance(getattr(model, "base_model", None), ReplacedBody):
        return IpexBackend.name
    return None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What no plan holds: int8 weights, biases, everything float. Tied weights once."""
    held = {
        f"{name}.{field}"
        for name, module in model.named_modules()
        if isinstance(module, Int8Linear)
        for field in (*INPUT_BUFFERS, "weight_scale")
    }
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in held or name.startswith(f"{model.base_model_prefix}.run."):
            continue
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach().contiguous()
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            found[f"{name}.weight"] = module.weight
    return found


def _manifest(model: nn.Module, kind: str, folder: Path) -> dict[str, Any]:
    files = sorted(path.name for path in folder.iterdir() if path.suffix in {".safetensors", ".pt"})
    config: Any = model.config
    body: Any = model.base_model
    return {
        "backend": kind,
        "task": task_of(model),
        "attention": config._attn_implementation,
        "dtype": model.quant_dtype,
        "inputs": list(body.inputs) if kind == IpexBackend.name else None,
        "versions": package_versions(),
        "sha256": {name: _sha256(folder / name) for name in files},
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_digests(folder: Path, manifest: dict[str, Any]) -> None:
    for name, digest in manifest["sha256"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}: copy the whole folder again")
        if _sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name} is truncated or changed: copy it again")


def _check_transformers(manifest: dict[str, Any]) -> None:
    written, here = (
        versions.get("transformers", "0").split(".")[0]
        for versions in (manifest["versions"], package_versions())
    )
    if int(written) > int(here):
        raise CheckpointError(
            f"the checkpoint was written by transformers {written}, whose config.json version "
            f"{here} would misread: load it with transformers {written} or quantize again"
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _load_native(
    model: nn.Module, plan: QuantPlan, content: tuple[dict[str, Tensor], str]
) -> nn.Module:
    tensors, dtype = content
    for name in plan.int8_names:
        item = plan.linears[name]
        try:
            weight = tensors.pop(f"{name}.weight")
        except KeyError:
            raise CheckpointError(f"the checkpoint holds no weight for {name!r}") from None
        assert item.weight_scale is not None  # noqa: S101
        linear = Int8Linear(weight, item.weight_scale, tensors.pop(f"{name}.bias", None))
        linear.set_input(item.activation, plan.prescale_of(name))
        replace_module(model, name, linear)
    _assign(model, tensors)
    return finish_native(model, plan, dtype)


def _load_ipex(
    model: nn.Module, folder: Path, content: tuple[dict[str, Tensor], dict[str, Any]]
) -> nn.Module:
    tensors, manifest = content
    ids = torch.ones(1, 8, dtype=torch.long)
    names, inputs = tracing_inputs(dict.fromkeys(manifest["inputs"], ids))
    graph = warm_up(load_graph(folder / GRAPH), inputs)
    setattr(model, str(model.base_model_prefix), nn.Identity())
    _assign(model, tensors)
    return replace_body(model, ReplacedBody(graph, DTYPES[manifest["dtype"]], names))


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give every parameter its tensor; tied ones follow.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape.
    """
    try:
        _, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit its config: {error}") from error
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None and not isinstance(model.base_model, nn.Identity):
        tie()
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if left or unexpected:
        raise CheckpointError(
            f"the checkpoint does not fit its config: missing {left[:3]}, "
            f"unexpected {unexpected[:3]}"
        )
