"""int8 Linears from stock PyTorch, bf16 elsewhere, one compiled graph per layer type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ipex_sq.backends.base import DTYPES, Backend, Example
from ipex_sq.compiling.compiled_layers import compile_layers, compiler_problem
from ipex_sq.errors import ConfigError
from ipex_sq.kernels.brgemm import rows_everywhere
from ipex_sq.kernels.int8_linear import INPUT_BUFFERS, Int8Linear
from ipex_sq.kernels.weight_memory import WeightMemory
from ipex_sq.models.folding import replace_module, smoothed_linear
from ipex_sq.models.topology import language_head
from ipex_sq.recipe.plan import QuantPlan
from ipex_sq.recipe.qparams import quantize_weight
from ipex_sq.system import give_freed_memory_back, int8_isa, int8_problem


class NativeBackend(Backend):
    """oneDNN int8 through stock PyTorch, any version from 2.8."""

    name = "native"
    float_dtype = "bf16"
    rounds_tokens = True

    @property
    def kernels(self) -> str:  # type: ignore[override]
        """OneDNN and the instruction set that it picks."""
        return f"oneDNN {int8_isa()}"

    def unsupported_reasons(self) -> list[str]:
        """CPU without exact int8, no C++ compiler, or an operator that this torch lacks."""
        reasons = [problem] if (problem := int8_problem()) else []
        if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
            reasons.append(f"torch {torch.__version__} has no oneDNN int8 Linear: install 2.8 on")
        if problem := compiler_problem():
            reasons.append(problem)
        return reasons

    def optimize_float(self, model: nn.Module, dtype: str, example: Example) -> nn.Module:
        """Cast, and compile per layer as int8 is."""
        return compile_layers(super().optimize_float(model, dtype, example))

    def lower(self, model: nn.Module, plan: QuantPlan, example: Example, dtype: str) -> nn.Module:
        """Replace planned Linears by `Int8Linear`, cast the rest, compile per layer."""
        del example
        for name in plan.int8_names:
            replace_module(model, name, int8_linear(model, plan, name))
        finish_native(model, plan, dtype)
        _move_weights(model)
        return model


def int8_linear(model: nn.Module, plan: QuantPlan, name: str) -> Int8Linear:
    """The int8 form of the smoothed Linear at path `name`."""
    item = plan.linears[name]
    assert item.weight_scale is not None  # noqa: S101
    linear = smoothed_linear(model, name)
    lowered = Int8Linear(
        quantize_weight(linear.weight, item.weight_scale), item.weight_scale, linear.bias
    )
    lowered.set_input(item.activation, plan.prescale_of(name))
    return lowered


def finish_native(model: nn.Module, plan: QuantPlan, dtype: str) -> nn.Module:
    """Cast what stays float, share what readers of one tensor share, and compile."""
    lowered: dict[str, Any] = {name: model.get_submodule(name) for name in plan.int8_names}
    head = language_head(model)
    if head in lowered:
        lowered[head].wide_output = True
    cast_float(model, dtype)
    for name, module in lowered.items():
        if module.per_token or rows_everywhere():
            module.only_rows()  # of tokens, another pass over the product would scale it
        first = lowered[plan.linears[name].group]
        # The same tensor objects: q, k and v then round their input once in the compiled graph.
        for shared in INPUT_BUFFERS:
            setattr(module, shared, getattr(first, shared))
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.use_cache = (
            False  # a plain call scores text, compiled; generate() has its own setting
        )
    # Rounding has no gradient: what came past it would be taken for all of it.
    model.requires_grad_(False)
    model.save_pretrained = _refuse_to_save  # type: ignore[assignment]
    return compile_layers(model)


def _move_weights(model: nn.Module) -> None:
    linears = [item for item in model.modules() if isinstance(item, Int8Linear)]
    weights = [(item, item.row_weight) for item in linears if item.row_weight is not None]
    memory = WeightMemory(weight.shape for _, weight in weights)
    for linear, weight in weights:
        linear.row_weight = memory.take(weight.shape).copy_(weight)
    give_freed_memory_back()  # where they were packed, and float weights before


def cast_float(module: nn.Module, dtype: str) -> None:
    """Cast, in place, all that is not part of an int8 Linear."""
    module._apply(lambda t: t.to(DTYPES[dtype]) if t.is_floating_point() else t)


def _refuse_to_save(*_args: Any, **_options: Any) -> None:
    """In the place of transformers' method, which would leave out weights and plan.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError("a model that was just quantized is saved by ipex_sq.save(model, folder)")
