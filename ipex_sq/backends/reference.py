"""The oracle: int8 simulated in fp32, slow and right. The other backends must agree with it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from ipex_sq.backends.base import DTYPES, Backend, Example
from ipex_sq.models.folding import replace_linear, smoothed_linear
from ipex_sq.recipe.plan import QuantPlan
from ipex_sq.recipe.qparams import (
    ActivationQParams,
    TokenParts,
    fake_quantize_activation,
    fake_quantize_tokens,
    fake_quantize_weight,
)
from ipex_sq.recipe.splitting import append_rest, before_parts, number_of_parts


class SimulatedInt8Linear(nn.Module):
    """A Linear whose input and weight are rounded to the plan's levels and multiplied in fp32.

    Attributes:
        weight: `[out_features, in_features]`, values that int8 levels stand for, fp32.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        weight_scale: Tensor,
        activation: ActivationQParams | None,
        channels: Tensor | None = None,
    ) -> None:
        """`activation` None rounds per token; `channels` have parts, with equal shares of x."""
        super().__init__()
        self.activation = activation
        self.channels = channels
        self.register_buffer("weight", fake_quantize_weight(linear.weight, weight_scale))
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x `[..., in_features]` to `[..., out_features]`, in the dtype of x."""
        if self.activation is None:
            rounded = _per_token(x, self.channels)
        else:
            if self.channels is not None:
                x = _end_to_end(x, self.channels, self.activation)
            rounded = fake_quantize_activation(x, self.activation)
        return functional.linear(rounded, self.weight, self.bias).to(x.dtype)


def _per_token(shares: Tensor, channels: Tensor | None) -> Tensor:
    if channels is None:
        return fake_quantize_tokens(shares)
    width = shares.shape[-1] - len(channels)
    return fake_quantize_tokens(shares[..., :width], TokenParts.of(channels, width))


def _end_to_end(shares: Tensor, channels: Tensor, activation: ActivationQParams) -> Tensor:
    """`[..., in_features + copies]`, channels in equal shares laid end to end instead."""
    width = shares.shape[-1] - len(channels)
    x = shares[..., :width] * number_of_parts(channels, width)
    return append_rest(x, channels, before_parts(channels, *activation.ends))


class ReferenceBackend(Backend):
    """Simulated int8 in float, on any machine."""

    name = "reference"
    rounds_tokens = True
    kernels = "fp32 simulation"

    def unsupported_reasons(self) -> list[str]:
        """Always empty."""
        return []

    def lower(self, model: nn.Module, plan: QuantPlan, example: Example, dtype: str) -> nn.Module:
        """Replace every planned Linear by its simulation; a pre-scale stays a multiplication."""
        del example
        for name in plan.int8_names:
            simulate_linear(model, plan, name)
        if dtype == "fp32":
            return model
        return _cast_float_modules(model, dtype)


def simulate_linear(model: nn.Module, plan: QuantPlan, name: str) -> None:
    """Put the simulation of one planned Linear into `model`; a pre-scale stays in front of it."""
    replace_linear(model, name, simulated_linear(model, plan, name))


def simulated_linear(model: nn.Module, plan: QuantPlan, name: str) -> SimulatedInt8Linear:
    """The simulation of the smoothed Linear at path `name`."""
    item = plan.linears[name]
    assert item.weight_scale is not None  # noqa: S101
    channels = plan.groups[item.group].channels
    linear = smoothed_linear(model, name)
    return SimulatedInt8Linear(linear, item.weight_scale, item.activation, channels)


def _cast_float_modules(model: nn.Module, dtype: str) -> nn.Module:
    kept = {
        id(tensor)
        for module in model.modules()
        if isinstance(module, SimulatedInt8Linear)
        for tensor in module.buffers()
    }
    # One call per tensor: model.to() would round the simulated weights as well.
    model._apply(lambda t: t if id(t) in kept or not t.is_floating_point() else t.to(DTYPES[dtype]))
    return model
