"""An int8 Linear: how its input is rounded, its weight as kernels want it, which kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.errors import ConfigError
from ipex_sq.kernels.brgemm import GROUP, MOST_ROWS, brgemm_built, pack_rows, sum_rows, unpack_rows
from ipex_sq.kernels.levels import input_levels, token_levels
from ipex_sq.kernels.onednn_linear import pack_weight, unpack_weight
from ipex_sq.kernels.weight_memory import WeightMemory
from ipex_sq.recipe.plan import PreScale
from ipex_sq.recipe.qparams import (
    ACTIVATION_LEVELS,
    TOKEN_ZERO_POINT,
    ActivationQParams,
    TokenParts,
)
from ipex_sq.recipe.splitting import before_parts, checked_channels, number_of_parts

STORED_INPUT = ("multiplier", "channels", "input_scale", "input_zero_point")
INPUT_BUFFERS = (*STORED_INPUT, "parts", "held_low", "held_high")
"""What `Int8Linear.set_input` sets: the same for all readers of a tensor."""

OUTPUT_DTYPES = (torch.float32, torch.bfloat16)


def _in_type_of(before: Tensor, after: Tensor) -> Tensor:
    return before if after.dtype != before.dtype else after


class Int8Linear(nn.Module):
    """A Linear that rounds its input to uint8 and multiplies in int8.

    The pre-scale, where there is one, costs nothing: it is part of the multiplication that
    rounding needs anyway.

    Attributes:
        in_features: Width of the input with its copies.
        out_features: Width of the output.
        output_dtype: Of the output, one of `OUTPUT_DTYPES`; a cast of the module changes it.
        wide_output: Whether it stays fp32 under casts: logits do.
        per_token: Whether the input is rounded per token rather than by a static scale.
        multiplier: `[in_features - copies]`, 1 / (smoothing scale * activation scale), fp32; per
            token 1 / (smoothing scale * parts).
        channels: `[copies]`, sorted, channels with further parts (`splitting.py`), or None.
        parts: `[in_features - copies]` fp32, how many each channel has; None with a static scale or
            without copies.
        held_low, held_high: `[copies]` fp32, levels that the parts before each copy hold, or None.
        input_scale: Scalar fp32, 1 per token; a tensor, because a Python float would be compiled
            in and make every layer a graph of its own.
        input_zero_point: Scalar int32.
        weight_scale: `[out_features]`, fp32.
        bias: `[out_features]`, fp32, or None.
        packed: int8 levels in oneDNN's layout; None after `only_rows`.
        weight_zero_points: `[out_features]` int32, zeros that oneDNN asks for; None with `packed`.
        row_weight: int8 levels in brgemm's layout, for products of a few rows or, where they are
            the only ones, of any number; None until `keep_rows` or `only_rows`.
        row_sums: `[out_features]` int32, sums over its rows.
    """

    multiplier: Tensor
    channels: Tensor | None
    parts: Tensor | None
    held_low: Tensor | None
    held_high: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor
    weight_scale: Tensor
    packed: Tensor | None
    weight_zero_points: Tensor | None
    bias: Tensor | None
    row_weight: Tensor | None
    row_sums: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        *,
        only_rows: bool = False,
        memory: WeightMemory | None = None,
    ) -> None:
        """Pack int8 `weight` `[out_features, in_features]` with its scale and bias.

        `set_input` must follow. With `only_rows`, as the method of that name leaves it, and in
        `memory`, if there is one.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.output_dtype = torch.float32
        self.wide_output = self.per_token = False
        self.register_buffer("weight_scale", weight_scale.float())
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        for name in ("packed", "weight_zero_points", "row_weight", "row_sums"):
            self.register_buffer(name, None, persistent=False)
        if only_rows:
            self._pack_rows(weight, memory)
        if self.row_weight is None:
            self.packed = pack_weight(weight)
            self.weight_zero_points = torch.zeros(self.out_features, dtype=torch.int32)

    @classmethod
    def restored(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        per_token: bool,
        only_rows: bool = False,
        memory: WeightMemory | None = None,
    ) -> Int8Linear:
        """The Linear whose `stored()` is `tensors`; keeps none of them.

        Raises:
            KeyError: One is missing.
            RuntimeError: One has another type or shape, or channels that are not there.
        """
        scale = tensors["weight_scale"].clone()
        weight, bias = tensors["weight"], tensors.get("bias")
        linear = cls(weight, scale, bias, only_rows=only_rows, memory=memory)
        linear.per_token = per_token
        for name in ("multiplier", "input_scale", "input_zero_point"):
            linear.register_buffer(name, tensors[name].clone())
        channels = checked_channels(tensors.get("channels"), linear.multiplier.numel())
        linear._set_channels(channels)
        return linear

    def stored(self) -> dict[str, Tensor]:
        """What `restored` needs: int8 weight, scales, bias and how the input is rounded."""
        fields = {name: getattr(self, name) for name in (*STORED_INPUT, "weight_scale", "bias")}
        held = {name: tensor.clone() for name, tensor in fields.items() if tensor is not None}
        return {"weight": self.levels, **held}

    def set_input(self, activation: ActivationQParams | None, prescale: PreScale | None) -> None:
        """Set how the input is rounded.

        Args:
            activation: Of the smoothed input; None rounds per token.
            prescale: What divides the input and which channels have parts, or None.
        """
        self.per_token = activation is None
        if activation is None:
            activation = ActivationQParams(1.0, TOKEN_ZERO_POINT)
        channels = None if prescale is None else prescale.channels
        features = self.in_features - (0 if channels is None else len(channels))
        divisor = number_of_parts(channels if self.per_token else None, features)
        if prescale is not None and prescale.divisor is not None:
            divisor = divisor * prescale.divisor
        self.register_buffer("multiplier", 1.0 / (divisor * activation.scale))
        self.register_buffer("input_scale", torch.tensor(activation.scale))
        zero_point = torch.tensor(activation.zero_point, dtype=torch.int32)
        self.register_buffer("input_zero_point", zero_point)
        self._set_channels(channels)

    def _set_channels(self, channels: Tensor | None) -> None:
        parts: Tensor | None = None
        held: tuple[Tensor | None, Tensor | None] = (None, None)
        if channels is not None and self.per_token:
            _, parts, held = TokenParts.of(channels, self.multiplier.numel())
        elif channels is not None:
            zero_point = int(self.input_zero_point)
            held = before_parts(channels, -zero_point, ACTIVATION_LEVELS - zero_point)
        self.register_buffer("channels", channels)
        self.register_buffer("parts", parts, persistent=False)
        self.register_buffer("held_low", held[0], persistent=False)
        self.register_buffer("held_high", held[1], persistent=False)

    def keep_rows(self) -> None:
        """Keep what products of a few rows need, where they are faster than oneDNN's."""
        if self.row_weight is None:
            self._pack_rows(self.levels)

    def _pack_rows(self, weight: Tensor, memory: WeightMemory | None = None) -> None:
        if self.in_features % GROUP == 0 and brgemm_built():
            packed = pack_rows(weight, memory)
            self.row_sums = sum_rows(packed, self.out_features)
            # Last: other threads may be in `multiply`, which takes it as the sign for both.
            self.row_weight = packed

    def only_rows(self) -> bool:
        """Use brgemm for any number of rows, which scales each row as it is written.

        oneDNN's product scales by columns only: another pass over the output, hundreds of MB of
        logits. And unlike its weights, brgemm's are tensors that TorchScript can save.

        Returns:
            Whether it can: otherwise nothing has changed.
        """
        self.keep_rows()
        if self.row_weight is not None:
            self.packed = self.weight_zero_points = None
        return self.row_weight is not None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """As `nn.Module`; a cast is one of the outputs, for in bf16 scales would be other scales.

        Raises:
            ConfigError: A cast to a type that is not among `OUTPUT_DTYPES`.
        """
        dtype = fn(torch.empty(0, dtype=self.output_dtype)).dtype
        if dtype not in OUTPUT_DTYPES:
            raise ConfigError(f"an int8 model computes in fp32 or bf16, not in {dtype}")
        if not self.wide_output:
            self.output_dtype = dtype
        return super()._apply(lambda tensor: _in_type_of(tensor, fn(tensor)), recurse)

    def _load_from_state_dict(self, *_args: Any, **_options: Any) -> None:
        """Refuse: a state dict holds no packed weights, only the scales that belong to them.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("a state dict lacks int8 weights: use ipex_sq.save and ipex_sq.load")

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which cannot read oneDNN's layout: plain levels in its place."""
        packed = None if self.packed is None else unpack_weight(self.packed)
        return {**self.__dict__, "_buffers": {**self._buffers, "packed": packed}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the levels again."""
        super().__setstate__(state)
        self.packed = None if self.packed is None else pack_weight(self.packed)

    @property
    def weight(self) -> Tensor:
        """What model code may ask for its type, device and shape; every value is NaN.

        A Linear of which it reads more stays float (`models/watching.py`).
        """
        missing = torch.full((), float("nan"), dtype=self.output_dtype)
        return missing.expand(self.out_features, self.multiplier.numel())

    @property
    def levels(self) -> Tensor:
        """int8, `[out_features, in_features]`, unpacked from the kernel's layout."""
        if self.packed is not None:
            return unpack_weight(self.packed)
        assert self.row_weight is not None  # noqa: S101
        return unpack_rows(self.row_weight, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map x `[..., in_features - copies]`, any float, to `[..., out_features]`.

        Raises:
            ConfigError: A gradient of x is wanted.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise ConfigError("int8 Linears have no gradient: take the float model for it")
        return self.multiply(*self._round(x))

    def multiply(self, levels: Tensor, scale: Tensor) -> Tensor:
        """The product alone, scaled and with its bias.

        Args:
            levels: uint8 `[..., in_features]`.
            scale: Of the levels: `input_scale`, or per token `[..., 1]`.

        Returns:
            `[..., out_features]` of `output_dtype`.
        """
        if self.packed is None:
            return self._multiply_rows(levels, scale)
        # A step of generation has one token of each text: no other graph is asked how many texts.
        # Nor is a classifier's last layer, whose rows are kept for no step.
        one_token = levels.ndim > 1 and levels.shape[-2] == 1
        if self.row_weight is not None and one_token and levels.shape[0] <= MOST_ROWS:
            return self._multiply_rows(levels, scale)
        if not self.per_token:
            return self._multiply(levels, self.bias, self.output_dtype)
        product = self._multiply(levels, None, torch.float32) * scale
        return (product if self.bias is None else product + self.bias).to(self.output_dtype)

    def _round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.per_token:
            copies = self.channels, self.held_low, self.held_high
            return input_levels(x, self.multiplier, self.input_zero_point, copies), self.input_scale
        # Without oneDNN's layout brgemm is there, and with it rounding in one pass.
        fields = self.channels, self.parts, (self.held_low, self.held_high)
        parts = None if self.channels is None else TokenParts(*fields)  # type: ignore[arg-type]
        return token_levels(x, self.multiplier, parts, one_pass=self.packed is None)

    def _multiply_rows(self, levels: Tensor, scale: Tensor) -> Tensor:
        weight = self.row_weight, self.row_sums, self.weight_scale, self.bias
        output: Tensor = torch.ops.ipex_sq.int8_rows(
            levels, scale, self.input_zero_point, *weight, self.output_dtype
        )
        return output

    def _multiply(self, levels: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        weight = self.packed, self.weight_scale, self.weight_zero_points, bias
        output: Tensor = torch.ops.ipex_sq.int8_linear(
            levels, self.input_scale, self.input_zero_point, *weight, dtype, self.out_features
        )
        return output
