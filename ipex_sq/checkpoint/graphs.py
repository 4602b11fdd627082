"""Checkpoints of the ipex backend: the body is a graph, what stands behind it are tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ipex_sq.backends.ipex import load_graph, tracing_inputs, warm_up, with_graph
from ipex_sq.checkpoint.assembling import int8_shapes
from ipex_sq.checkpoint.integrity import check_folder
from ipex_sq.checkpoint.plans import load_plan
from ipex_sq.checkpoint.shards import Shards
from ipex_sq.errors import CheckpointError
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.models.folding import replace_module
from ipex_sq.models.loading import skeleton
from ipex_sq.models.topology import language_head
from ipex_sq.recipe.plan import QuantPlan

GRAPH = "graph.pt"


def load_ipex(folder: Path) -> nn.Module:
    """Load a checkpoint of the ipex backend.

    Raises:
        CheckpointError: Missing, truncated, damaged, or of another version.
    """
    manifest = check_folder(folder)
    model = skeleton(folder, manifest["attention"], manifest["task"])
    ids = torch.ones(1, 8, dtype=torch.long)
    names, inputs = tracing_inputs(dict.fromkeys(manifest["inputs"], ids))
    graph = warm_up(load_graph(folder / GRAPH), inputs)
    plan, tensors, head = load_plan(folder), Shards(folder).read(), language_head(model) or ""
    setattr(model, str(model.base_model_prefix), nn.Identity())
    int8_head = None
    if head in plan.int8_names:
        int8_head = _int8_head(model.get_submodule(head), tensors, plan, head)
        replace_module(model, head, nn.Identity())
    _assign(model, tensors)
    if int8_head is not None:
        replace_module(model, head, int8_head)
    model = with_graph(model, graph, manifest["dtype"], names)
    model.quant_plan = plan  # type: ignore[assignment]
    model.quant_dtype = manifest["dtype"]
    model.made_from = manifest["made_from"]
    return model.eval()


def _int8_head(
    head: nn.Module, tensors: dict[str, Tensor], plan: QuantPlan, name: str
) -> Int8Linear:
    """What stands in the place of `head`, the module `name`; its tensors are taken out.

    Raises:
        CheckpointError: A tensor is missing or of another shape.
    """
    fields = [path for path in tensors if path.startswith(f"{name}.")]
    stored = {path.removeprefix(f"{name}."): tensors.pop(path) for path in fields}
    channels = tuple(stored["channels"].shape) if "channels" in stored else (0,)
    shapes = int8_shapes(tuple(head.weight.shape), channels)  # type: ignore[union-attr, arg-type]
    misfits = [field for field, item in stored.items() if item.shape != shapes.get(field)]
    try:
        linear = Int8Linear.restored(stored, per_token=True, only_rows=True)
    except (KeyError, RuntimeError):
        misfits.append("weight")
    if misfits:
        raise CheckpointError(f"the checkpoint does not fit its config: {name}.{misfits[0]}")
    scale = plan.linears[name].weight_scale
    assert scale is not None  # noqa: S101
    linear.weight_scale, linear.wide_output = scale, True
    return linear


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give every parameter its tensor.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape.
    """
    try:
        _, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit its config: {error}") from error
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if left or unexpected:
        raise CheckpointError(
            f"the checkpoint does not fit its config: missing {left[:3]}, "
            f"unexpected {unexpected[:3]}"
        )
