"""Linears on oneDNN's brgemm kernels, which torch exports to C++ only; built once for a machine."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.kernels.weight_memory import WeightMemory
from ipex_sq.system import cache_directory, cpu_flags, int8_isa, usable_flags

logger = logging.getLogger(__name__)

_SOURCES = ("brgemm.cpp", "rounding.cpp", "levels.cpp", "attention.cpp")
_HEADERS = (
    *("vectors.h", "tile.h", "few_rows.h", "tile_output.h", "int8_product.h", "activation.h"),
    *("softmax.h", "prompt_attention.h", "step_attention.h"),
)
SOURCES = tuple(Path(__file__).with_name(name) for name in _SOURCES)
HEADERS = tuple(Path(__file__).with_name(name) for name in _HEADERS)
MOST_ROWS = 32
"""That `int8_rows` is used for in the place of oneDNN: a step of generation of so many texts."""

TILE = 64
"""Columns of one call of brgemm."""

GROUP = 4
"""int8 levels that one instruction multiplies and adds up."""

FLAGS = ["-O3", "-march=native", "-fopenmp", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"]
_NAME = "ipex_sq_brgemm"
_BUILT = "built"
_LOCK = threading.Lock()


def build_directory() -> Path:
    """Folder of the built library: one for each CPU, torch and source, as hosts share homes."""
    code = [source.read_text(encoding="utf-8") for source in (*SOURCES, *HEADERS)]
    of = " ".join([torch.__version__, *sorted(cpu_flags()), *FLAGS, *code])
    return cache_directory() / f"brgemm-{hashlib.sha256(of.encode()).hexdigest()[:16]}"


def brgemm_built() -> bool:
    """Whether the operators of `SOURCES` are in `torch.ops.ipex_sq`.

    The first call builds them.

    Without them, or where oneDNN may not use AVX512-VNNI, torch's own operators give the same
    numbers in more time.
    """
    with _LOCK:
        return _registered()


@cache
def _registered() -> bool:
    if "avx512_vnni" not in usable_flags():
        return False
    folder = build_directory()
    library = folder / f"{_NAME}.so"
    try:
        if not (folder / _BUILT).is_file() or not library.is_file():
            _build(folder)
        torch.ops.load_library(str(library))
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        logger.warning("this will take more time: the brgemm kernels do not build: %s", reason)
        (folder / _BUILT).unlink(missing_ok=True)  # what does not load is built again
        return False
    torch.library.register_fake("ipex_sq::int8_rows", _shape_of_rows)
    torch.library.register_fake("ipex_sq::int8_rows_together", _shapes_of_rows)
    torch.library.register_fake("ipex_sq::int8_levels", _shape_of_next_levels)
    torch.library.register_fake("ipex_sq::round_tokens", _shape_of_tokens)
    torch.library.register_fake("ipex_sq::round_static", _shape_of_levels)
    torch.library.register_fake("ipex_sq::bf16_logits", _shape_of_logits)
    torch.library.register_fake("ipex_sq::short_attention", _shape_of_attention)
    torch.library.register_autograd(
        "ipex_sq::bf16_logits", _gradients_of_logits, setup_context=_keep_for_gradients
    )
    return True


def _build(folder: Path) -> None:
    import ninja
    from filelock import FileLock
    from torch.utils import cpp_extension

    # An environment that is run without being activated has ninja, but not on its path.
    os.environ["PATH"] = os.pathsep.join((str(ninja.BIN_DIR), os.environ.get("PATH", "")))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "building"):
        # torch waits for this file forever; whoever left it is dead, as we hold the other.
        (folder / "lock").unlink(missing_ok=True)
        cpp_extension.load(
            _NAME,
            [str(source) for source in SOURCES],
            extra_cflags=FLAGS,
            build_directory=str(folder),
            is_python_module=False,
        )
        (folder / _BUILT).touch()  # the library itself may be half of one


def rows_everywhere() -> bool:
    """Whether products of many rows run on brgemm too, in the place of oneDNN's own.

    It multiplies as fast with AVX512-VNNI, one layout serves prompts and steps, and what the next
    Linear does first is done as outputs are written. With AMX it has not been measured.
    """
    return int8_isa() == "AVX512-VNNI" and brgemm_built()


def unpack_rows(packed: Tensor, out_features: int) -> Tensor:
    """The weight `[out_features, in]` of `pack_rows`."""
    tiles, groups, _, _ = packed.shape
    return packed.transpose(1, 2).reshape(tiles * TILE, groups * GROUP)[:out_features].contiguous()


def packed_shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    """Of brgemm's layout `[out / 64, in / 4, 64, 4]` of a weight `[out, in]`."""
    return -(-out_features // TILE), in_features // GROUP, TILE, GROUP


def pack_rows(weight: Tensor, memory: WeightMemory | None = None) -> Tensor:
    """int8 `weight` `[out, in]` in brgemm's layout (`packed_shape`), padded with 0.

    `in` must be a multiple of 4. It stands in `memory`, if there is one.

    Raises:
        RuntimeError: Another type, as of oneDNN.
    """
    if weight.dtype != torch.int8:
        raise RuntimeError(f"a weight of int8 levels has type {weight.dtype}")
    out_features, in_features = weight.shape
    shape = packed_shape(out_features, in_features)
    tiles, groups, _, _ = shape
    missing = tiles * TILE - out_features
    # pad() copies, with nothing to add as well.
    padded = nn.functional.pad(weight, (0, 0, 0, missing)) if missing else weight
    packed = torch.empty(shape, dtype=torch.int8) if memory is None else memory.take(shape)
    # A group of four is moved as one number: half the time.
    split = padded.contiguous().view(torch.int32).view(tiles, TILE, groups)
    packed.view(torch.int32).squeeze(-1).copy_(split.transpose(1, 2))
    return packed


def sum_rows(packed: Tensor, out_features: int) -> Tensor:
    """The sum of each row of the weight in `packed`, of `pack_rows`, `[out_features]` int32.

    The product with ones: sum() would write its input down in int32 first, four times a whole head.
    It is in fp32, exact for up to 2^17 columns.
    """
    one, none = torch.ones(()), torch.zeros((), dtype=torch.int32)
    ones = torch.ones(1, packed.shape[1] * GROUP, dtype=torch.uint8)
    no_sums = torch.zeros(out_features, dtype=torch.int32)
    scale = torch.ones(out_features)
    sums: Tensor = torch.ops.ipex_sq.int8_rows(
        ones, one, none, packed, no_sums, scale, None, torch.float32
    )
    return sums[0].int()


def _shape_of_rows(
    levels: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor,
    packed: Tensor,
    weight_sums: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    del input_scale, input_zero_point, packed, weight_sums, bias
    return levels.new_empty((*levels.shape[:-1], weight_scale.shape[0]), dtype=dtype)


def _shape_of_next_levels(levels: Tensor, *rest: Any) -> Tensor:
    *_, multiplier, _, channels, _, _ = rest
    copies = 0 if channels is None else channels.shape[0]
    return levels.new_empty((*levels.shape[:-1], multiplier.shape[0] + copies))


def _shapes_of_rows(
    levels: Tensor,
    input_scale: Tensor,
    input_zero_point: Tensor,
    packed: list[Tensor],
    weight_sums: list[Tensor],
    weight_scales: list[Tensor],
    biases: list[Tensor | None],
    dtype: torch.dtype,
) -> list[Tensor]:
    del input_scale, input_zero_point, packed, weight_sums, biases
    shape = levels.shape[:-1]
    return [levels.new_empty((*shape, scale.shape[0]), dtype=dtype) for scale in weight_scales]


def _shape_of_tokens(
    x: Tensor, multiplier: Tensor, least: float, channels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    del multiplier, least
    copies = 0 if channels is None else channels.shape[0]
    levels = x.new_empty((*x.shape[:-1], x.shape[-1] + copies), dtype=torch.uint8)
    return levels, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _shape_of_levels(
    x: Tensor,
    multiplier: Tensor,
    zero_point: Tensor,
    channels: Tensor | None,
    held_low: Tensor | None,
    held_high: Tensor | None,
) -> Tensor:
    del multiplier, zero_point, held_low, held_high
    copies = 0 if channels is None else channels.shape[0]
    return x.new_empty((*x.shape[:-1], x.shape[-1] + copies), dtype=torch.uint8)


def _shape_of_logits(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


def _shape_of_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    del key, value, mask, causal, scale
    output = query.new_empty([query.shape[d] for d in (0, 2, 1, 3)]).transpose(1, 2)
    rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return output, rows, torch.empty_like(rows)


def _keep_for_gradients(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _gradients_of_logits(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    narrow = gradient.to(x.dtype)
    return narrow @ weight, narrow.flatten(0, -2).T @ x.flatten(0, -2)
