"""The plan, and block after block what it makes of the model, as files of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.backends.native import cast_float, int8_linear
from ipex_sq.checkpoint.disk import RESUME, link_or_copy
from ipex_sq.checkpoint.saving import stored_tensors, write_folder
from ipex_sq.checkpoint.shards import shard_names, write_index, write_safetensors
from ipex_sq.models.body import logits_at
from ipex_sq.models.folding import apply_smoothing, replace_module
from ipex_sq.models.rounding import round_weights
from ipex_sq.recipe.plan import QuantPlan
from ipex_sq.recipe.plan_files import plan_from_json, plan_tensors, plan_to_json
from ipex_sq.recipe.planning import make_plan
from ipex_sq.streaming.findings import HEAD, Findings, backward_step
from ipex_sq.streaming.journal import write_facts, write_tensors
from ipex_sq.streaming.weights import OnDisk

PLAN = "plan"


@dataclass(frozen=True)
class Written:
    """Blocks in the journal.

    Attributes:
        plan: As it was carried out.
        proof: `smoothing_change` and `undone_folds`, for the manifest.
    """

    plan: QuantPlan
    proof: dict[str, Any]


def write_blocks(
    findings: Findings, texts: Mapping[str, Any], dtype: str, *, done: Callable[[str], None]
) -> Written:
    """Plan, then smooth, prove, round and write every block into the journal.

    Args:
        findings: All calibration steps are taken.
        texts: Where the calibration texts came from.
        dtype: Of what stays float, "bf16" or "fp32".
        done: Is called after each block, with the step's name.

    Raises:
        NumericalCheckError: Smoothing changed a block.
    """
    journal, blocks = findings.journal, findings.model.blocks
    planned = plan = _plan(findings, texts, dtype)
    change = 0.0
    for index, path in enumerate(blocks):
        if not journal.has(_step(index)):
            _write_block(findings, planned, (index, path), dtype)
        facts = journal.facts(_step(index), "facts")
        plan = plan.with_part(plan_from_json(facts["plan"], journal.tensors(_step(index), "plan")))
        change = max(change, facts["change"])
        done("write")
    if findings.topology.head is not None:
        part, of_head = _put_head(findings, planned, findings.topology.head)
        plan, change = plan.with_part(part), max(change, of_head)
    undone = plan.folds_lost_from(planned)
    return Written(plan, {"smoothing_change": change, "undone_folds": undone})


def write_checkpoint(
    findings: Findings,
    plan: QuantPlan,
    target: Path,
    *,
    tokenizer: Any,
    origin: Mapping[str, Any],
) -> None:
    """Put the blocks of the journal and the rest of the model into the folder `target`.

    Args:
        findings: Whose journal holds all blocks; its model is cast.
        plan: As it was carried out.
        target: The folder.
        tokenizer: Saved in it.
        origin: What the float model was, for the manifest.

    Raises:
        ResourceError: The disk is full; the journal keeps all blocks.
    """
    model, journal = findings.model.model, findings.journal
    dtype = journal.facts(PLAN, "facts")["dtype"]
    cast_float(model, dtype)
    model.quant_plan = plan  # type: ignore[assignment]
    model.quant_dtype = dtype
    model.config.use_cache = False  # type: ignore[union-attr]

    def write_weights(folder: Path) -> None:
        blocks = findings.model.blocks
        files = shard_names(len(blocks) + 1)
        for index, file in enumerate(files[:-1]):
            link_or_copy(journal.folder / _step(index) / "block.safetensors", folder / file)
        outside = {
            name: tensor
            for name, tensor in stored_tensors(model).items()
            if not any(name.startswith(f"{path}.") for path in blocks)
        }
        write_safetensors(outside, folder / files[-1])
        write_index(folder, files)

    write_folder(
        model, target, tokenizer, origin=origin, write_weights=write_weights, advice=RESUME
    )


def _plan(findings: Findings, texts: Mapping[str, Any], dtype: str) -> QuantPlan:
    journal = findings.journal
    if not journal.has(PLAN):
        stats = findings.stats()
        stats = replace(stats, source={**texts, **stats.source})
        weights = OnDisk(stats.linears, lambda name: findings.model.weights.read(f"{name}.weight"))
        plan = make_plan(stats, weights, findings.wanted, findings.search)
        with journal.step(PLAN) as folder:
            write_tensors(folder, "plan", plan_tensors(plan))
            write_facts(folder, "facts", {"plan": plan_to_json(plan), "dtype": dtype})
    facts = journal.facts(PLAN, "facts")
    return plan_from_json(facts["plan"], journal.tensors(PLAN, "plan"))


def _write_block(findings: Findings, plan: QuantPlan, block: tuple[int, str], dtype: str) -> None:
    (index, path), streamed = block, findings.model
    model = streamed.model
    part = plan.part(group.key for group in findings.groups_of(path))
    with streamed.block(path) as module:
        example = repeat(findings.example_input(index))
        feeding = streamed.feeding(path, example, lambda _output: None)
        # The head is the same after every block, and a large one takes longer than the block.
        with feeding, logits_at(model, torch.zeros(1, dtype=torch.long)):
            part, change = apply_smoothing(model, part, findings.example)
        stats = findings.stats(path, findings.rounding_samples(backward_step(index)))
        round_weights(model, part, stats)
        del stats
        for name in part.int8_names:
            replace_module(model, name, int8_linear(model, part, name))
        cast_float(module, dtype)
        with findings.journal.step(_step(index)) as folder:
            write_tensors(folder, "block", _named(path, module))
            write_tensors(folder, "plan", plan_tensors(part))
            write_facts(folder, "facts", {"plan": plan_to_json(part), "change": change})


def _put_head(findings: Findings, plan: QuantPlan, head: str) -> tuple[QuantPlan, float]:
    """Smooth and round the head, which is no block and stays in the model until it is written.

    Raises:
        NumericalCheckError: Smoothing changed the logits.
    """
    streamed = findings.model
    part = plan.part(group.key for group in findings.groups_of(head))
    last = repeat(findings.example_input(len(streamed.blocks)))
    with streamed.finishing(last):
        part, change = apply_smoothing(streamed.model, part, findings.example)
    round_weights(streamed.model, part, findings.stats(head, findings.rounding_samples(HEAD)))
    replace_module(streamed.model, head, int8_linear(streamed.model, part, head))
    return part, change


def _named(path: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{path}.{name}": tensor for name, tensor in stored_tensors(module).items()}


def _step(index: int) -> str:
    return f"write-{index:05d}"
