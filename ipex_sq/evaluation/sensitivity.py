"""Which Linear does most damage: each alone in int8, everything else in float."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipex_sq.backends.quantization import plan, rounding
from ipex_sq.backends.reference import ReferenceBackend, simulated_linear
from ipex_sq.config import ModelConfig, QuantConfig
from ipex_sq.data.calibration import calibration_batches
from ipex_sq.data.documents import Document, TextSet
from ipex_sq.errors import UnsupportedModelError
from ipex_sq.evaluation.sqnr import sqnr_db
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.folding import apply_smoothing, replace_linear, smoothed_linear
from ipex_sq.models.layers import find_layers
from ipex_sq.models.loading import load_model
from ipex_sq.models.rounding import round_weights
from ipex_sq.models.running import run_model
from ipex_sq.recipe.batching import rows_of
from ipex_sq.recipe.hooks import hooked
from ipex_sq.recipe.plan import QuantPlan


@dataclass(frozen=True)
class Damage:
    """What one Linear does to the model when it alone is int8.

    Attributes:
        linear: Its path.
        mode: As planned, "static_int8" or "dynamic_int8".
        block_sqnr_db: Signal to noise at the output of its block; None outside the blocks.
        logits_sqnr_db: The same of the logits.
        kl: KL divergence of the predictions to those in float, nats per prediction.
    """

    linear: str
    mode: str
    block_sqnr_db: float | None
    logits_sqnr_db: float
    kl: float

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


def measure_sensitivity(
    model_config: ModelConfig, quant: QuantConfig, texts: tuple[TextSet[Document], int, int]
) -> list[Damage]:
    """Load, calibrate, plan and smooth a model, and rank its Linears.

    Args:
        model_config: Which model.
        quant: Which plan, for the reference backend.
        texts: Calibration texts, how many tokens of each, and on how many of them to measure.
    """
    calibration, most_tokens, count = texts
    model, tokenizer = load_model(
        model_config.model_name_or_path, trust_remote_code=model_config.trust_remote_code
    )
    batches = calibration_batches(calibration.documents, tokenizer, most_tokens, appended=False)
    wanted = rounding(quant, ReferenceBackend(), model)
    stats = calibrate(
        model,
        batches,
        samples=wanted.needs_samples,
        hessians=wanted.needs_hessians,
        lm_head=wanted.lm_head,
    )
    decided, _ = apply_smoothing(model, plan(model, stats, quant), stats.example)
    rows = [row for batch in batches for row in rows_of(batch)]
    chosen = [rows[index * len(rows) // count] for index in range(min(count, len(rows)))]
    rounded = copy.deepcopy(model)
    round_weights(rounded, decided, stats)
    return rank_linears(model, rounded, decided, chosen)


def rank_linears(
    model: nn.Module,
    rounded: nn.Module,
    decided: QuantPlan,
    batches: Sequence[Mapping[str, Tensor]],
) -> list[Damage]:
    """Measure every int8 Linear of the plan alone, worst first (by KL divergence).

    Blocks before the Linear's own are not run again: their outputs are kept.

    Args:
        model: Float model, smoothed as the plan says; as it was afterwards.
        rounded: The same with weights rounded and biases corrected as the plan says.
        decided: The plan.
        batches: Unpadded texts to measure on; figures are means over them.

    Raises:
        UnsupportedModelError: The model has no repeated blocks.
    """
    blocks = find_layers(model)
    if not blocks:
        raise UnsupportedModelError(f"{type(model).__name__} has no repeated blocks to measure at")
    found: dict[str, list[Damage]] = {name: [] for name in decided.int8_names}
    bar = tqdm(total=len(batches) * len(found), desc="sensitivity", disable=None, leave=False)
    with torch.no_grad(), bar:
        for batch in batches:
            outputs: list[Any] = []
            with _keep_outputs(blocks, outputs):
                logits = run_model(model, batch)
            kept = _Kept(blocks, outputs, logits)
            for name, damages in found.items():
                damages.append(_alone((model, rounded), decided, (name, batch, kept)))
                bar.update()
    means = [_mean(damages) for damages in found.values()]
    return sorted(means, key=lambda item: item.kl, reverse=True)


@dataclass(frozen=True)
class _Kept:
    """What the float model gave: output of every block, and the logits."""

    blocks: Sequence[nn.Module]
    outputs: Sequence[Any]
    logits: Tensor


def _alone(
    models: tuple[nn.Module, nn.Module],
    decided: QuantPlan,
    what: tuple[str, Mapping[str, Tensor], _Kept],
) -> Damage:
    model, rounded = models
    name, batch, kept = what
    linear = smoothed_linear(model, name)
    owners = [index for index, block in enumerate(kept.blocks) if _holds(block, linear)]
    home = owners[0] if len(owners) == 1 else None
    seen: list[Any] = []
    replace_linear(model, name, simulated_linear(rounded, decided, name))
    try:
        watched = [] if home is None else [kept.blocks[home]]
        with _skip(kept.blocks[:home] if home else [], kept.outputs), _keep_outputs(watched, seen):
            logits = run_model(model, batch)
    finally:
        replace_linear(model, name, linear)
    block = None if home is None else sqnr_db(_tensor(seen[0]), _tensor(kept.outputs[home]))
    before, after = (x.float().log_softmax(dim=-1) for x in (kept.logits, logits))
    kl = float((before.exp() * (before - after)).sum(dim=-1).mean())
    return Damage(name, decided.linears[name].mode, block, sqnr_db(logits, kept.logits), kl)


def _holds(block: nn.Module, module: nn.Module) -> bool:
    return any(inner is module for inner in block.modules())


def _tensor(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


@contextmanager
def _keep_outputs(blocks: Sequence[nn.Module], outputs: list[Any]) -> Iterator[None]:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output)

    with hooked(block.register_forward_hook(keep) for block in blocks):
        yield


@contextmanager
def _skip(blocks: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Inside the block these modules give their kept outputs at once."""

    def giving(output: Any) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: output

    try:
        for block, output in zip(blocks, outputs, strict=False):
            block.forward = giving(output)  # type: ignore[method-assign]
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _mean(damages: Sequence[Damage]) -> Damage:
    first, count = damages[0], len(damages)
    blocks = [item.block_sqnr_db for item in damages if item.block_sqnr_db is not None]
    return Damage(
        first.linear,
        first.mode,
        sum(blocks) / count if blocks else None,
        sum(item.logits_sqnr_db for item in damages) / count,
        sum(item.kl for item in damages) / count,
    )
