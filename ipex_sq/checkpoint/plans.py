"""The plan in the folder of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ipex_sq.checkpoint.folders import PLAN_JSON
from ipex_sq.checkpoint.shards import write_safetensors
from ipex_sq.errors import CheckpointError
from ipex_sq.recipe.plan import QuantPlan
from ipex_sq.recipe.plan_files import plan_from_json, plan_tensors, plan_to_json

PLAN_TENSORS = "quant_plan.safetensors"


def save_plan(plan: QuantPlan, folder: Path) -> None:
    """Write the plan's two files."""
    (folder / PLAN_JSON).write_text(plan_to_json(plan) + "\n", encoding="utf-8")
    write_safetensors(plan_tensors(plan), folder / PLAN_TENSORS)


def load_plan(folder: Path) -> QuantPlan:
    """Read the plan of a checkpoint.

    Raises:
        CheckpointError: Missing or damaged.
    """
    try:
        text = (folder / PLAN_JSON).read_text(encoding="utf-8")
        tensors = load_file(folder / PLAN_TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the plan of {folder} cannot be read: {error}") from error
    return plan_from_json(text, tensors)
