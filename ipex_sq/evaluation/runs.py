"""Rows of a comparison: what was run, quantized by one calibration, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ipex_sq.backends.base import Backend
from ipex_sq.backends.inc import IncBackend
from ipex_sq.backends.quantization import QuantizedModel, check_config, quantize_model, rounding
from ipex_sq.backends.registry import choose_backend
from ipex_sq.config import QuantConfig
from ipex_sq.data.documents import TextSet, row_digests
from ipex_sq.evaluation.pairing import Scored, paired_difference
from ipex_sq.models.calibration import add_samples, calibrate
from ipex_sq.recipe.act_stats import ActStats
from ipex_sq.recipe.batching import Batch
from ipex_sq.recipe.plan import DYNAMIC_INT8, FLOAT, QuantPlan


@dataclass(frozen=True)
class Run:
    """One model to score: float where `quant` is None.

    Attributes:
        label: "fp32", "bf16", "int8" or "int8+sq".
        dtype: Precision of a float run.
        quant: Recipe and backend of an int8 run.
    """

    label: str
    dtype: str = "fp32"
    quant: QuantConfig | None = None


@dataclass
class Outcome:
    """A scored run.

    Attributes:
        row: As in the JSON document; `delta`, `gained` and `lost` are None until paired.
        scores: Per document.
        model: Kept only where it was asked for.
        tokenizer: The model's.
    """

    row: dict[str, Any]
    scores: Scored
    model: nn.Module | None = None
    tokenizer: Any = None


class SharedCalibration:
    """One calibration for several recipes.

    The float model is the same for every recipe, and so are its statistics: they are gathered
    once, or twice where a later recipe needs Hessians, and the time is counted in every row that
    uses them.
    """

    def __init__(self, batches: Sequence[Batch], source: Mapping[str, Any]) -> None:
        self._batches, self._source = batches, source
        self._stats: ActStats | None = None
        self._has_hessians = False

    def stats(self, model: nn.Module, quant: QuantConfig) -> ActStats:
        """Statistics of the float `model`, with the samples and Hessians that the recipe needs."""
        backend = choose_backend(quant.backend).backend
        assert isinstance(backend, Backend)  # noqa: S101
        wanted = rounding(quant, backend, model)
        lacks_head = wanted.lm_head and self._stats is not None and self._stats.head is None
        if self._stats is None or lacks_head or (wanted.needs_hessians and not self._has_hessians):
            self._has_hessians = wanted.needs_hessians
            self._stats = calibrate(
                model,
                self._batches,
                self._source,
                samples=False,
                hessians=wanted.needs_hessians,
                lm_head=wanted.lm_head,
            )
        searches = wanted.needs_samples or quant.max_drop is not None
        if searches and not self._stats.samples:
            self._stats = add_samples(model, self._stats, self._batches)
        return self._stats

    def quantize(self, model: nn.Module, quant: QuantConfig) -> QuantizedModel:
        """Quantize `model`, which is consumed.

        Raises:
            ConfigError: The backend cannot do what is asked.
        """
        check_config(quant)
        if quant.backend == IncBackend.name or quant.observer != "minmax":
            return quantize_model(model, self._batches, quant, source=self._source)
        return quantize_model(model, self.stats(model, quant), quant)


def pair(outcome: Outcome, baseline: Outcome) -> None:
    """Fill in what the run gains and loses against the fp32 one."""
    difference = paired_difference(outcome.scores, baseline.scores)
    outcome.row["delta"] = difference.delta
    outcome.row["delta_stderr"] = difference.stderr
    outcome.row["gained"], outcome.row["lost"] = difference.gained, difference.lost


def describe(texts: TextSet[Any]) -> dict[str, Any]:
    """Name, split, digest and size of a text set, for results and plans."""
    return {
        "dataset": texts.name,
        "split": texts.split,
        "sha256": texts.sha256,
        "rows": len(texts.documents),
    }


def describe_with_rows(texts: TextSet[Any]) -> dict[str, Any]:
    """The same with a digest of each text, so that a checkpoint is not scored on its own texts."""
    return {**describe(texts), "row_sha256": row_digests(texts.documents)}


def describe_texts(evaluation: TextSet[Any], calibration: TextSet[Any] | None) -> dict[str, Any]:
    """What a result says of the texts that were scored and calibrated on."""
    evaluated = describe(evaluation)
    return {
        "dataset": evaluated["dataset"],
        "dataset_split": evaluated["split"],
        "dataset_why": evaluation.why or "asked for",
        "dataset_sha256": evaluated["sha256"],
        "rows": evaluated["rows"],
        "calibration": None if calibration is None else describe(calibration),
    }


def float_description(run: Run) -> dict[str, Any]:
    """What a float row says of its model."""
    return {
        "backend": "torch",
        "kernels": "eager",
        "precision": run.dtype,
        "dtype": run.dtype,
        "alpha": None,
        "int8_linears": 0,
        "dynamic_linears": 0,
        "dynamic_reasons": {},
        "float_linears": None,
        "float_reasons": {},
        "quantize_s": None,
    }


def int8_description(quantized: QuantizedModel, quant: QuantConfig) -> dict[str, Any]:
    """What an int8 row says of a model that was quantized now."""
    choice = choose_backend(quant.backend)
    return {
        "backend": quantized.backend,
        "backend_why": choice.why,
        "kernels": choice.backend.kernels,
        "precision": "int8",
        "dtype": quantized.dtype,
        "alpha": quantized.alpha,
        **_numerics(quantized.plan),
        "int8_linears": quantized.int8_linears,
        "smoothing_change": quantized.smoothing_change,
        "undone_folds": dict(quantized.undone_folds),
        "quantize_s": sum(quantized.seconds.values()),
        "seconds": quantized.seconds,
    }


def checkpoint_description(plan: QuantPlan, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What an int8 row says of a model that was loaded."""
    return {
        "backend": manifest["backend"],
        "backend_why": "of the checkpoint",
        "kernels": choose_backend(manifest["backend"]).backend.kernels,
        "precision": "int8",
        "dtype": manifest["dtype"],
        "alpha": plan.alpha,
        **_numerics(plan),
        "int8_linears": len(plan.int8_names),
        "smoothing_change": manifest["made_from"].get("smoothing_change"),
        "undone_folds": manifest["made_from"].get("undone_folds", {}),
        "quantize_s": None,
        "seconds": {},
    }


def _numerics(plan: QuantPlan | None) -> dict[str, Any]:
    reasons = plan.reasons(FLOAT) if plan else {}
    dynamic = plan.reasons(DYNAMIC_INT8) if plan else {}
    return {
        "alpha_range": plan.alpha_range if plan else None,
        "expected_kl": plan.expected_kl if plan else None,
        "observer": plan.observer if plan else "minmax",
        "weight_rounding": plan.weight_rounding if plan else "nearest",
        "dynamic_linears": sum(dynamic.values()),
        "dynamic_reasons": dynamic,
        "float_linears": sum(reasons.values()),
        "float_reasons": reasons,
        "smooth_groups": plan.placements if plan else {},
    }
