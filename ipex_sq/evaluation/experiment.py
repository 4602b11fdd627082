"""LAMBADA accuracy of a model in several forms: load, quantize, evaluate."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ipex_sq.backends.base import DTYPES, Backend
from ipex_sq.backends.quantization import QuantizedModel, check_config, quantize_model
from ipex_sq.backends.registry import choose_backend
from ipex_sq.checkpoint.folders import read_manifest
from ipex_sq.checkpoint.plans import load_plan
from ipex_sq.checkpoint.saving import load
from ipex_sq.config import DataConfig, EvaluationConfig, ModelConfig, QuantConfig
from ipex_sq.data.calibration import calibration_batches, choose_texts
from ipex_sq.data.documents import Document, TextSet, check_disjoint, check_unseen
from ipex_sq.data.lambada import default_calibration, load_lambada
from ipex_sq.errors import ConfigError, UnsupportedModelError
from ipex_sq.evaluation.lambada import LambadaResult, check_documents, evaluate_lambada, warm_up
from ipex_sq.evaluation.max_drop import Search, plan_within_drop
from ipex_sq.evaluation.runs import (
    Outcome,
    Run,
    SharedCalibration,
    checkpoint_description,
    describe,
    describe_with_rows,
    float_description,
    int8_description,
)
from ipex_sq.models.calibration import stats_from_file
from ipex_sq.models.loading import CAUSAL_LM, load_model, load_tokenizer
from ipex_sq.system import keep_freed_memory, peak_rss_bytes, reset_peak_rss

HELD_OUT = 4
"""One text in so many is held out of the calibration, where `max_drop` measures."""


@dataclass(frozen=True)
class Texts:
    """The documents to score and to calibrate on; disjoint."""

    evaluation: TextSet[Document]
    calibration: TextSet[Document] | None


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
    drawn = choose_texts(pool.documents, config.calib_samples, config.seed)
    chosen = TextSet(pool.name, pool.split, tuple(drawn), pool.why)
    check_disjoint(chosen.documents, evaluation.documents)
    return Texts(evaluation, chosen)


def hold_out(texts: TextSet[Document]) -> tuple[TextSet[Document], TextSet[Document]]:
    """The texts to calibrate on, and one in four, where `max_drop` measures.

    Raises:
        ConfigError: Fewer than four.
    """
    documents = texts.documents
    if len(documents) < HELD_OUT:
        raise ConfigError(f"--max_drop needs at least {HELD_OUT} calibration texts")
    rest = tuple(item for index, item in enumerate(documents) if index % HELD_OUT)
    return replace(texts, documents=rest), replace(texts, documents=documents[::HELD_OUT])


class Experiment:
    """Runs that share a model, texts and one calibration."""

    def __init__(
        self,
        texts: Texts,
        model: ModelConfig,
        data: DataConfig,
        *,
        evaluation: EvaluationConfig,
        scales: Path | None = None,
    ) -> None:
        """`scales`: a scales file, in the place of calibration texts."""
        self._scales = scales
        self._texts, self._model, self._data = texts, model, data
        self._evaluation = evaluation
        self._calibration: SharedCalibration | None = None
        self._held_out: list[dict[str, Tensor]] = []

    def run(self, run: Run) -> Outcome:
        """Load, quantize where asked, and score one model."""
        reset_peak_rss()
        keep_freed_memory()
        model, tokenizer = load_model(
            self._model.model_name_or_path, trust_remote_code=self._model.trust_remote_code
        )
        check_documents(model, tokenizer, self._texts.evaluation.documents)
        if run.quant is None:
            ready, description = model.to(DTYPES[run.dtype]), float_description(run)
        else:
            quantized = self._quantize(model, tokenizer, run.quant)
            ready, description = quantized.model, int8_description(quantized, run.quant)
        return self._score(run.label, (ready, tokenizer), description)

    def run_checkpoint(self, folder: Path) -> Outcome:
        """Load an int8 model of `save` and score it.

        Raises:
            CheckpointError: It cannot be loaded.
            UnsupportedModelError: It is no causal language model.
            DataError: It was calibrated on some of the documents.
        """
        reset_peak_rss()
        keep_freed_memory()
        manifest = read_manifest(folder)
        if manifest["task"] != CAUSAL_LM:
            raise UnsupportedModelError(
                f"{folder} is a sequence classifier, not a causal language model: use "
                "`python -m ipex_sq evaluate --model_path`"
            )
        plan, documents = load_plan(folder), self._texts.evaluation.documents
        check_unseen(plan.calibration.get("row_sha256", ()), documents, "calibrated")
        tokenizer = load_tokenizer(str(folder))
        model = load(folder)
        check_documents(model, tokenizer, documents)
        label = "int8" if plan.alpha is None else "int8+sq"
        made_from = str(manifest["made_from"].get("model", ""))
        description = checkpoint_description(plan, manifest) | {"made_from": made_from}
        return self._score(label, (model, tokenizer), description)

    def _score(
        self, label: str, ready_and_tokenizer: tuple[nn.Module, Any], description: dict[str, Any]
    ) -> Outcome:
        ready, tokenizer = ready_and_tokenizer
        documents = self._texts.evaluation.documents
        start = time.perf_counter()
        warm_up(ready, tokenizer, documents, self._evaluation)
        first = time.perf_counter() - start
        start = time.perf_counter()
        scores = evaluate_lambada(ready, tokenizer, documents, self._evaluation)
        seconds = time.perf_counter() - start
        row = {
            "label": label,
            **description,
            **_accuracy(scores),
            "warm_up_s": first,
            "evaluate_s": seconds,
            "docs_per_s": len(documents) / seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        return Outcome(row, scores, ready, tokenizer)

    def _quantize(self, model: nn.Module, tokenizer: Any, quant: QuantConfig) -> QuantizedModel:
        check_config(quant, model)
        if self._scales is not None:
            return quantize_model(model, stats_from_file(model, self._scales, tokenizer), quant)
        if self._texts.calibration is None:
            raise ConfigError("int8 needs calibration texts")
        if self._calibration is None:
            calibrated, held_out = self._texts.calibration, None
            rows = describe_with_rows(calibrated)["row_sha256"]  # those held out too
            if quant.max_drop is not None:
                calibrated, held_out = hold_out(calibrated)
            source = {**describe(calibrated), "row_sha256": rows}
            self._calibration = SharedCalibration(self._batches(calibrated, tokenizer), source)
            self._held_out = self._batches(held_out, tokenizer) if held_out else []
        if quant.max_drop is None:
            return self._calibration.quantize(model, quant)
        stats = self._calibration.stats(model, quant)
        backend = choose_backend(quant.backend).backend
        assert isinstance(backend, Backend)  # noqa: S101
        start = time.perf_counter()
        decided = plan_within_drop(Search(model, stats, self._held_out), quant, backend)
        seconds = time.perf_counter() - start
        quantized = quantize_model(model, stats, quant, decided=decided)
        quantized.seconds["max_drop"] = seconds
        return quantized

    def _batches(self, texts: TextSet[Document], tokenizer: Any) -> list[dict[str, Tensor]]:
        most = self._data.calib_max_tokens
        return calibration_batches(texts.documents, tokenizer, most, appended=False)


def _accuracy(scores: LambadaResult) -> dict[str, Any]:
    return {
        "last_word_accuracy": scores.last_word_accuracy,
        "last_token_accuracy": scores.last_token_accuracy,
        "perplexity": scores.json_perplexity,
        "stderr": scores.stderr,
        "delta": None,
        "delta_stderr": None,
        "gained": None,
        "lost": None,
    }
