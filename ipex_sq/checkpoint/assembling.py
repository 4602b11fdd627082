"""A saved int8 model put into the model that transformers builds from its config.

transformers loads what stayed float. Int8 Linears are packed here, one at a time and straight from
the mapped file: its loader would hold all int8 weights once more until they are packed, and would
cast their fp32 scales.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from ipex_sq.backends.native import NativeBackend, finish_native
from ipex_sq.checkpoint.integrity import check_folder
from ipex_sq.checkpoint.plans import load_plan
from ipex_sq.checkpoint.shards import Shards
from ipex_sq.errors import CheckpointError
from ipex_sq.kernels.brgemm import packed_shape, rows_everywhere
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.kernels.weight_memory import WeightMemory
from ipex_sq.models.conv1d import convert_conv1d
from ipex_sq.models.folding import replace_module
from ipex_sq.recipe.plan import DYNAMIC_INT8
from ipex_sq.system import give_freed_memory_back


class _Vacancy(nn.Module):
    """Where an int8 Linear will stand.

    Nothing of it is loaded; transformers initialises what it does not load, and some models (GPT-2)
    reach for the weight by its name then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0, device="meta"), persistent=False)


class SavedModel:
    """A verified checkpoint of the native backend.

    Attributes:
        folder: Where it is.
        manifest: Of the folder.
        plan: What the model executes.
    """

    def __init__(self, folder: Path) -> None:
        """Verify and open `folder`.

        Raises:
            CheckpointError: See `check_folder`; or it is of another backend.
        """
        self.manifest = check_folder(folder)
        backend = self.manifest["backend"]
        if backend != NativeBackend.name:
            raise CheckpointError(
                f"{folder} is of the {backend} backend, which transformers cannot load: use "
                "ipex_sq.load"
            )
        self.plan = load_plan(folder)
        self.folder = folder
        self._shards = Shards(folder)

    def prepare(self, model: nn.Module) -> None:
        """Take the planned Linears out of `model`, whose parameters are on the meta device.

        Raises:
            CheckpointError: It is not the model that was saved.
        """
        wanted, got = self.manifest["architecture"], type(model).__name__
        if wanted != got:
            raise CheckpointError(f"{self.folder} holds a {wanted}, it cannot be loaded as {got}")
        convert_conv1d(model)
        state = model.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in self.plan.int8_names:
            channels = self._shards.shapes.get(f"{name}.channels", (0,))
            fields = int8_shapes(shapes.pop(f"{name}.weight", ()), channels)
            shapes |= {f"{name}.{field}": shape for field, shape in fields.items()}
            try:
                replace_module(model, name, _Vacancy())
            except AttributeError:
                raise self._misfit([name]) from None
        saved = self._shards.shapes
        misfits = [name for name, shape in saved.items() if shapes.get(name) != shape]
        if misfits:
            raise self._misfit(misfits)

    def fill(self, model: nn.Module) -> None:
        """Put the int8 Linears into `model`, whose float parameters are loaded, and finish it.

        Raises:
            CheckpointError: A tensor is missing.
        """
        state = model.state_dict(keep_vars=True)
        loaded = {id(tensor) for name, tensor in state.items() if name in self._shards.shapes}
        missing = [name for name, tensor in state.items() if id(tensor) not in loaded]
        if missing:
            raise self._misfit(missing)
        give_freed_memory_back()  # of imports and of a tokenizer: there is no use for it here
        # The largest first: mapped and packed it is in memory twice, the others are not there yet.
        names = sorted(self.plan.int8_names, key=self._size, reverse=True)
        memory = WeightMemory(packed_shape(*self._shape(name)) for name in names)
        for name in names:
            replace_module(model, name, self._int8_linear(name, memory))
        finish_native(model, self.plan, self.manifest["dtype"])
        model.quant_plan = self.plan  # type: ignore[assignment]
        model.quant_dtype = self.manifest["dtype"]
        model.made_from = self.manifest["made_from"]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._shards.shapes.get(f"{name}.weight", (0, 0))

    def _size(self, name: str) -> int:
        return math.prod(self._shape(name))

    def _int8_linear(self, name: str, memory: WeightMemory) -> Int8Linear:
        tensors = self._shards.read(f"{name}.")
        per_token = self.plan.linears[name].mode == DYNAMIC_INT8
        if "weight" in tensors and tensors["weight"].dtype != torch.int8:
            raise self._misfit([f"{name}.weight"])  # oneDNN of torch 2.8 would take it
        try:
            # Packed for both kernels, those per token would be twice in memory for a while.
            only_rows = per_token or rows_everywhere()
            linear = Int8Linear.restored(
                tensors, per_token=per_token, only_rows=only_rows, memory=memory
            )
        except (KeyError, RuntimeError):
            raise self._misfit([f"{name}.{field}" for field in tensors] or [name]) from None
        # The plan's own, as where it was lowered: not the same numbers twice.
        scale = self.plan.linears[name].weight_scale
        assert scale is not None  # noqa: S101
        linear.weight_scale = scale
        return linear

    def _misfit(self, names: list[str]) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} does not fit its config or lacks a tensor: {', '.join(names[:3])}"
        )


def int8_shapes(weight: tuple[int, ...], channels: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of what is stored of an int8 Linear, by field.

    Args:
        weight: Shape of the float weight, or empty where there was none.
        channels: Shape of the channels in parts, `[copies]`.
    """
    out_features, in_features = weight or (0, 0)
    return {
        "weight": (out_features, in_features + channels[0]),
        "weight_scale": (out_features,),
        "bias": (out_features,),
        "multiplier": (in_features,),
        "channels": channels,
        "input_scale": (),
        "input_zero_point": (),
    }
