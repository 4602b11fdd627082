"""The operator `ipex_sq::int8_linear`, PyTorch's oneDNN product (AMX, VNNI), and its weights.

Inductor lowers oneDNN's operator by itself only where weights are constants of the graph, which
one graph shared by all layers cannot have; wrapped in an operator of our own it is left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("ipex_sq", "DEF")
_LIBRARY.define(
    "int8_linear(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor packed, Tensor scale, "
    "Tensor zero_points, Tensor? bias, ScalarType dtype, int out_features) -> Tensor"
)


def pack_weight(levels: Tensor) -> Tensor:
    """Int8 `levels` `[out_features, in_features]` in oneDNN's layout, an opaque tensor."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(levels.contiguous(), None)
    return packed


def unpack_weight(packed: Tensor) -> Tensor:
    """The `levels` that `pack_weight` was given."""
    return packed.to_dense().t().contiguous()


def _run(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_points: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_features: int,
) -> Tensor:
    del out_features
    output: Tensor = torch.ops.onednn.qlinear_pointwise.tensor(
        x, x_scale, x_zero_point, packed, scale, zero_points, bias, 1.0, 0, dtype, "none", [], ""
    )
    return output


# The packed weight lives under the Mkldnn key and x under CPU: one kernel serves any mixture.
_LIBRARY.impl("int8_linear", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("ipex_sq::int8_linear", lib=_LIBRARY)
def _shape(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_points: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_features: int,
) -> Tensor:
    del x_scale, x_zero_point, packed, scale, zero_points, bias
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)
