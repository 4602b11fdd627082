"""One row of the comparison: load, quantize, evaluate, and say what was run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from ipex_sq.backends.base import DTYPES, Backend
from ipex_sq.backends.inc import IncBackend
from ipex_sq.backends.quantization import QuantizedModel, check_config, quantize_model, rounding
from ipex_sq.backends.registry import choose_backend
from ipex_sq.config import DataConfig, EvaluationConfig, ModelConfig, QuantConfig
from ipex_sq.data.calibration import calibration_batches, choose_texts
from ipex_sq.data.documents import TextSet, check_disjoint
from ipex_sq.data.lambada import default_calibration, load_lambada
from ipex_sq.errors import ConfigError
from ipex_sq.evaluation.lambada import LambadaResult, evaluate_lambada, paired_difference
from ipex_sq.evaluation.max_drop import Search, plan_within_drop
from ipex_sq.models.calibration import add_samples, calibrate
from ipex_sq.models.loading import load_model
from ipex_sq.recipe.plan import DYNAMIC_INT8, FLOAT
from ipex_sq.recipe.planning import ActStats
from ipex_sq.system import peak_rss_bytes, reset_peak_rss


@dataclass(frozen=True)
class Texts:
    """The documents to score and to calibrate on; disjoint."""

    evaluation: TextSet
    calibration: TextSet | None


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
    """

    row: dict[str, Any]
    scores: LambadaResult
    model: nn.Module | None = None
    tokenizer: Any = None


def load_texts(config: DataConfig, *, calibrate: bool) -> Texts:
    """Load the documents to score and, for int8, those to calibrate on.

    Raises:
        DataError: Missing, malformed, too few, or rows in both sets.
    """
    evaluation = load_lambada(config.dataset).first(config.limit)
    if not calibrate:
        return Texts(evaluation, None)
    if config.calib_dataset is None:
        pool = default_calibration(evaluation)
    else:
        pool = load_lambada(config.calib_dataset, purpose="calibration")
    chosen = TextSet(pool.name, pool.split, tuple(choose_texts(pool.documents, config)), pool.why)
    check_disjoint(chosen.documents, evaluation.documents)
    return Texts(evaluation, chosen)


class Experiment:
    """Runs that share a model, texts and one calibration.

    The float model is the same for every recipe, and so are its statistics: they are gathered
    once, and the time is counted in every row that uses them.
    """

    def __init__(
        self, texts: Texts, model: ModelConfig, data: DataConfig, *, evaluation: EvaluationConfig
    ) -> None:
        self._texts, self._model, self._data = texts, model, data
        self._evaluation = evaluation
        self._stats: ActStats | None = None

    def run(self, run: Run) -> Outcome:
        """Load, quantize where asked, and score one model."""
        reset_peak_rss()
        model, tokenizer = load_model(
            self._model.model_name_or_path, trust_remote_code=self._model.trust_remote_code
        )
        if run.quant is None:
            ready, description = model.to(DTYPES[run.dtype]), _float_description(run)
        else:
            quantized = self._quantize(model, tokenizer, run.quant)
            ready, description = quantized.model, _int8_description(quantized, run.quant)
        documents = self._texts.evaluation.documents
        start = time.perf_counter()
        scores = evaluate_lambada(ready, tokenizer, documents, self._evaluation)
        seconds = time.perf_counter() - start
        row = {
            "label": run.label,
            **description,
            **_accuracy(scores),
            "evaluate_s": seconds,
            "docs_per_s": len(documents) / seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        return Outcome(row, scores, ready, tokenizer)

    def _quantize(self, model: nn.Module, tokenizer: Any, quant: QuantConfig) -> QuantizedModel:
        texts = self._texts.calibration
        if texts is None:
            raise ConfigError("int8 needs calibration texts")
        batches = calibration_batches(
            texts.documents, tokenizer, max_tokens=self._data.calib_max_tokens
        )
        source = describe(texts)
        check_config(quant)
        if quant.backend == IncBackend.name or quant.observer != "minmax":
            return quantize_model(model, batches, quant, source=source)
        if self._stats is None:
            self._stats = calibrate(model, batches, source, samples=False)
        backend = choose_backend(quant.backend).backend
        assert isinstance(backend, Backend)  # noqa: S101
        searches = rounding(quant, backend).needs_samples or quant.max_drop is not None
        if searches and not self._stats.samples:
            self._stats = add_samples(model, self._stats, batches)
        if quant.max_drop is None:
            return quantize_model(model, self._stats, quant)
        start = time.perf_counter()
        search = Search(model, tokenizer, texts.documents, self._stats)
        decided = plan_within_drop(search, quant, backend)
        seconds = time.perf_counter() - start
        quantized = quantize_model(model, self._stats, quant, decided=decided)
        quantized.seconds["max_drop"] = seconds
        return quantized


def pair(outcome: Outcome, baseline: Outcome) -> None:
    """Fill in what the run gains and loses against the fp32 one."""
    difference = paired_difference(outcome.scores, baseline.scores)
    outcome.row["delta"] = difference.delta
    outcome.row["delta_stderr"] = difference.stderr
    outcome.row["gained"], outcome.row["lost"] = difference.gained, difference.lost


def describe(texts: TextSet) -> dict[str, Any]:
    """Name, split, digest and size of a text set, for results and plans."""
    return {
        "dataset": texts.name,
        "split": texts.split,
        "sha256": texts.sha256,
        "rows": len(texts.documents),
    }


def _accuracy(scores: LambadaResult) -> dict[str, Any]:
    return {
        "last_word_accuracy": scores.last_word_accuracy,
        "last_token_accuracy": scores.last_token_accuracy,
        "perplexity": scores.perplexity,
        "stderr": scores.stderr,
        "delta": None,
        "delta_stderr": None,
        "gained": None,
        "lost": None,
    }


def _float_description(run: Run) -> dict[str, Any]:
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


def _int8_description(quantized: QuantizedModel, quant: QuantConfig) -> dict[str, Any]:
    plan = quantized.plan
    choice = choose_backend(quant.backend)
    reasons = plan.reasons(FLOAT) if plan else {}
    dynamic = plan.reasons(DYNAMIC_INT8) if plan else {}
    return {
        "backend": quantized.backend,
        "backend_why": choice.why,
        "kernels": choice.backend.kernels,
        "precision": "int8",
        "dtype": quantized.dtype,
        "alpha": quantized.alpha,
        "alpha_range": plan.alpha_range if plan else None,
        "expected_kl": plan.expected_kl if plan else None,
        "observer": plan.observer if plan else "minmax",
        "int8_linears": len(plan.int8_names) if plan else quantized.int8_linears,
        "dynamic_linears": sum(dynamic.values()),
        "dynamic_reasons": dynamic,
        "float_linears": sum(reasons.values()),
        "float_reasons": reasons,
        "smooth_groups": plan.placements if plan else {},
        "smoothing_change": quantized.smoothing_change,
        "undone_folds": dict(quantized.undone_folds),
        "quantize_s": sum(quantized.seconds.values()),
        "seconds": quantized.seconds,
    }
