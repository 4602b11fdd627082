"""An int8 model in the compressed-tensors layout, for other programs that read it.

What it can say: int8 weights with a scale per output channel, inputs rounded by one scale and zero
point. What it cannot: a multiplication in front of a Linear (pre-scale), channels in parts, a bias
where the model has none; its rounding per token is another than ours (by absmax / 127.5). A plan
made with `QuantConfig(portable=True)` asks for none of these but for pre-scales, which are refused.
The programs that read it run it as they do; compressed-tensors itself simulates int8 in float.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.backends.base import DTYPES
from ipex_sq.checkpoint.folders import COMPRESSED_TENSORS
from ipex_sq.checkpoint.saving import stored_tensors, write_folder
from ipex_sq.checkpoint.shards import MAX_SHARD_SIZE, write_shards
from ipex_sq.errors import ConfigError
from ipex_sq.kernels.int8_linear import INPUT_BUFFERS, Int8Linear
from ipex_sq.models.conv1d import check_no_conv1d
from ipex_sq.recipe.plan import FLOAT, QuantPlan
from ipex_sq.recipe.portable import check_portable

_WEIGHTS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
}
_INPUTS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": False,
    "strategy": "tensor",
    "dynamic": False,
}
_FIELDS = (*INPUT_BUFFERS, "weight", "weight_scale", "bias")
_OFFSET = 128
"""Our levels are 0 to 255, theirs -128 to 127."""


def save_compressed(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    made_from: Mapping[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write an int8 model of `quantize`, of the native backend, in this layout.

    Args:
        model: Just quantized with `portable=True`.
        folder: Made where it is missing; an earlier one of ours is replaced.
        tokenizer: Saved beside it where given.
        made_from: What the float model was, kept in the manifest.
        max_shard_size: Bytes, or "200MB"; larger weights become several files and an index.

    Raises:
        ConfigError: The folder is not ours, the model is of another backend, or it does what the
            layout cannot say: names the Linears; or its class has Conv1D modules.
    """
    plan, target = getattr(model, "quant_plan", None), Path(folder)
    int8 = {n: item for n, item in model.named_modules() if isinstance(item, Int8Linear)}
    if not isinstance(plan, QuantPlan) or not int8:
        raise ConfigError("only int8 models of the native backend have a compressed-tensors form")
    check_portable(plan)
    check_no_conv1d(model)
    tensors = stored_tensors(model)
    for name in int8:
        ours = {field: tensors.pop(f"{name}.{field}", None) for field in _FIELDS}
        theirs = _compressed(ours, DTYPES[str(model.quant_dtype)])
        tensors |= {f"{name}.{field}": item for field, item in theirs.items()}
    write_folder(
        model,
        target,
        tokenizer,
        origin=made_from or {},
        write_weights=lambda scratch: write_shards(tensors, scratch, max_shard_size),
        layout=_layout(plan),
    )
    return target


def _layout(plan: QuantPlan) -> dict[str, Any]:
    """`quantization_config` for config.json."""
    group = {
        "targets": ["Linear"],
        "weights": _WEIGHTS,
        "input_activations": _INPUTS,
        "output_activations": None,
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": plan.names(FLOAT),
    }


def _compressed(ours: Mapping[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    """What `Int8Linear.stored` holds of a Linear, in this layout."""
    scale, input_scale, levels = (
        ours[field] for field in ("weight_scale", "input_scale", "input_zero_point")
    )
    assert scale is not None and input_scale is not None and levels is not None  # noqa: S101, PT018
    found = {
        "weight": ours["weight"],
        "weight_scale": scale[:, None],
        "input_scale": input_scale.reshape(1),
        "input_zero_point": (levels.reshape(1) - _OFFSET).to(torch.int8),
        "bias": None if ours["bias"] is None else ours["bias"].to(dtype),
    }
    return {field: item for field, item in found.items() if item is not None}
