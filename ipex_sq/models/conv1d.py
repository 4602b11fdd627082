"""GPT-2's Conv1D is a Linear with a transposed weight; as a Linear the rest need not know it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ipex_sq.errors import ConfigError


def convert_conv1d(model: nn.Module) -> nn.Module:
    """Replace every Conv1D of `model` by the Linear that computes the same, in place."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _linear(module))
    return model


def conv1d_weights(model: nn.Module) -> list[str]:
    """Names of the weights of the Conv1D modules of `model`, `[in_features, out_features]`."""
    from transformers.pytorch_utils import Conv1D

    found = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    return [f"{name}.weight" for name in found]


def check_no_conv1d(model: nn.Module) -> None:
    """Refuse, for the formats of other programs, a model whose class has Conv1D modules.

    Here they are Linears by then; whoever builds the class again has Conv1D modules, which no int8
    weights of a Linear fit.

    Raises:
        ConfigError: Names one.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        names = conv1d_weights(type(model)(copy.deepcopy(model.config)))
    if names:
        raise ConfigError(
            f"other programs do not read {type(model).__name__} in int8: {names[0]!r} is of a "
            "Conv1D, not of a Linear. Save in our own format"
        )


def _linear(conv: nn.Module) -> nn.Linear:
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)  # noqa: S101, PT018
    inputs, outputs = weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
