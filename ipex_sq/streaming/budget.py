"""How much memory and disk a run will take, from shapes alone."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ipex_sq.errors import ResourceError
from ipex_sq.recipe.batching import Batch
from ipex_sq.recipe.gptq import MOST_HESSIAN_BYTES
from ipex_sq.recipe.samples import MOST_ROWS
from ipex_sq.resources import available_memory
from ipex_sq.streaming.blocks import StreamedModel

FP32 = 4
GROUP_COPIES = 6
"""fp32 copies of a group's weights while alpha is searched: plain, smoothed, levels, sums."""

LOGIT_COPIES = 6
"""Logits, probabilities, their sums, and gradients."""

ACTIVATION_COPIES = 6
"""Of a block's widest tensor, and as many of its attention scores."""

MARGIN = 2**30
"""What allocators and Python keep besides: 0.9 GiB at the end of a run on BLOOM-7b1."""


@dataclass(frozen=True)
class Needs:
    """Bytes of memory at the peak, and of disk.

    `with_float_head` is the memory were the head not quantized.
    """

    memory: int
    disk: int
    with_float_head: int


def estimate(
    model: StreamedModel, rows: Sequence[Batch], *, hessians: bool, lm_head: bool = False
) -> Needs:
    """What quantizing `model` on `rows` takes.

    Args:
        model: Not loaded yet.
        rows: Calibration batches.
        hessians: Whether weights are rounded by GPTQ, if its Hessians fit.
        lm_head: Whether the head is quantized too, which is a group of its own.
    """
    config: Any = model.model.config
    blocks = [_Block(model, path) for path in model.blocks]
    outside = FP32 * sum(model.sizes[name] for name in model.outside)
    block = FP32 * max(item.weights for item in blocks)
    gathered = hessians and FP32 * sum(item.hessians for item in blocks) <= MOST_HESSIAN_BYTES
    hessian = FP32 * max(item.hessians for item in blocks) if gathered else 0
    widest = max(item.widest for item in blocks)
    tokens = [row["input_ids"].numel() for row in rows]
    length = max(row["input_ids"].shape[1] for row in rows)
    scores = max(tokens) * length * int(getattr(config, "num_attention_heads", 1))
    running = ACTIVATION_COPIES * FP32 * (max(tokens) * widest + scores) + block // 2
    rounding = GROUP_COPIES * FP32 * max(item.group for item in blocks) + 2 * hessian
    head = LOGIT_COPIES * FP32 * length * int(config.vocab_size)
    memory = psutil.Process().memory_info().rss + outside + MARGIN
    casting = outside // 2  # at the end, to bf16
    width, vocabulary = int(config.hidden_size), int(config.vocab_size)
    int8_head = FP32 * (GROUP_COPIES * width + MOST_ROWS) * vocabulary + 2 * FP32 * width**2
    float_head = memory + max(head, casting, block + hessian + max(running, rounding, head // 3))
    memory = max(float_head, memory + head + int8_head) if lm_head else float_head
    hidden = FP32 * sum(tokens) * width
    kept = len(blocks) * (hessian + FP32 * MOST_ROWS * sum(blocks[0].inputs))
    disk = 2 * hidden + kept + sum(model.sizes.values()) + outside
    return Needs(memory, disk, float_head)


class _Block:
    """Sizes of one block, in numbers."""

    def __init__(self, model: StreamedModel, path: str) -> None:
        linears = {
            name: linear for name, linear in model.linears.items() if name.startswith(f"{path}.")
        }
        groups: dict[tuple[str, int], int] = defaultdict(int)
        for name, linear in linears.items():  # those that may read one tensor: siblings alike
            groups[name.rpartition(".")[0], linear.in_features] += linear.weight.numel()
        self.weights = sum(model.sizes[name] for name in model.parameters_of(path))
        self.group = max(groups.values(), default=0)
        self.inputs = [linear.in_features for linear in linears.values()]
        self.hessians = sum(features**2 for features in self.inputs)
        self.widest = max([*self.inputs, *(item.out_features for item in linears.values())])


def check_needs(needs: Needs, most: int | None, folder: Path) -> None:
    """Refuse what would not fit, before the work.

    Args:
        needs: See `estimate`.
        most: Bytes of memory that the user allows, or None: what is available.
        folder: Where an unfinished run keeps its steps, if there is one; beside it is written.

    Raises:
        ResourceError: With what is needed and what there is.
    """
    limit, name = most, "--max_memory"
    if limit is None:
        left, where = available_memory()
        limit, name = left + psutil.Process().memory_info().rss, f"what is available {where}"
    if needs.memory > limit:
        head = ""
        if needs.with_float_head < needs.memory:
            head = f", or keep the head float (--no_quant_lm_head: {_gib(needs.with_float_head)})"
        raise ResourceError(
            f"this needs about {_gib(needs.memory)} of memory at its peak, {name} is "
            f"{_gib(limit)}: its embeddings, one block in fp32 and what is computed with it must "
            f"fit; allow more, or calibrate on shorter texts (--calib_max_tokens){head}"
        )
    kept = sum(path.stat().st_size for path in folder.rglob("*"))
    free, left = shutil.disk_usage(folder.parent).free, needs.disk - kept
    if left > free:
        raise ResourceError(
            f"this needs about {_gib(left)} of disk in {folder.parent}, {_gib(free)} are free"
        )


def check_peak(peak: int, most: int | None, step: str) -> None:
    """Stop a run that takes more than was allowed.

    Raises:
        ResourceError: With the step that it was seen after.
    """
    if most is not None and peak > most:
        raise ResourceError(
            f"{step} took {_gib(peak)}, --max_memory is {_gib(most)}: what is finished is kept; "
            "go on with --resume and more memory"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
