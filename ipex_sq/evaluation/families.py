"""Every family on a tiny random model: what folds, and what SmoothQuant gains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.backends.quantization import quantize_model
from ipex_sq.config import STATIC, QuantConfig
from ipex_sq.evaluation.sqnr import sqnr_db
from ipex_sq.models.calibration import calibrate
from ipex_sq.models.running import run_model
from ipex_sq.models.tiny import VOCABULARY, tiny_model
from ipex_sq.recipe.plan import FLOAT, FOLD, PRESCALE

TEXTS, TOKENS = 32, 32


def family_row(family: str) -> dict[str, Any]:
    """Quantize a tiny model of the family with the reference backend, plain and smoothed.

    Returns:
        Counts of groups and Linears, and the SQNR of the logits (dB) on unseen tokens, without
        SmoothQuant, with alpha 0.5 and with searched alphas, all static.
    """
    model = tiny_model(family)
    seen, unseen = (_random_batch(seed) for seed in (1, 2))
    stats = calibrate(model, [seen])
    wanted = _logits(model, unseen)
    row: dict[str, Any] = {"family": family}
    for label, alpha in (("plain", None), ("alpha_0.5", 0.5), ("auto", "auto")):
        config = QuantConfig(alpha=alpha, activations=STATIC, backend="reference")
        quantized = quantize_model(copy.deepcopy(model), stats, config)
        row[f"sqnr_db_{label}"] = sqnr_db(_logits(quantized.model, unseen), wanted)
    plan = quantized.plan
    assert plan is not None  # noqa: S101
    norms = sum(item.group.folds_into_norm for item in plan.groups.values())
    row |= {
        "folded_into_norm": norms,
        "folded_into_linear": plan.placements.get(FOLD, 0) - norms,
        "prescaled": plan.placements.get(PRESCALE, 0),
        "int8_linears": len(plan.int8_names),
        "float_reasons": plan.reasons(FLOAT),
        "smoothing_change": quantized.smoothing_change,
    }
    return row


def _random_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (TEXTS, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return run_model(model, batch)
