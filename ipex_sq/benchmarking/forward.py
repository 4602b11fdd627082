"""Time of one forward pass in one precision, made comparable with others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipex_sq.backends.base import Backend
from ipex_sq.backends.native import NativeBackend
from ipex_sq.backends.quantization import quantize_model
from ipex_sq.backends.registry import choose_backend
from ipex_sq.config import AUTO, BenchmarkConfig, DataConfig, ModelConfig, QuantConfig
from ipex_sq.data.calibration import calibration_batches, choose_texts
from ipex_sq.data.lambada import load_lambada
from ipex_sq.errors import ConfigError
from ipex_sq.models.body import logits_at
from ipex_sq.models.loading import load_model
from ipex_sq.models.topology import quantizable_linears
from ipex_sq.system import peak_rss_bytes, reset_peak_rss

LATENCY_CALIBRATION_TEXTS = 8
"""Latency does not depend on the ranges: a few texts set them."""


@dataclass(frozen=True)
class Contender:
    """One model to time.

    Attributes:
        label: "fp32", "bf16", "int8" or "int8+sq".
        backend: "eager", "compiled" or an int8 backend.
        precision: "fp32", "bf16" or "int8".
        quant: Recipe of an int8 one.
    """

    label: str
    backend: str
    precision: str
    quant: QuantConfig | None = None


def contenders(quants: list[tuple[str, QuantConfig]]) -> list[Contender]:
    """The float baselines, then the int8 models asked for."""
    float_ones = [
        Contender("fp32", "eager", "fp32"),
        Contender("bf16", "eager", "bf16"),
        Contender("bf16", "compiled", "bf16"),
    ]
    return float_ones + [Contender(label, item.backend, "int8", item) for label, item in quants]


class ForwardBenchmark:
    """Times forward passes of several forms of one model on the same token ids."""

    def __init__(self, model: ModelConfig, config: BenchmarkConfig) -> None:
        self._model, self._config = model, config

    def run(self, contender: Contender) -> dict[str, Any]:
        """Prepare one model, time it, and describe it.

        Returns:
            A row of the JSON document; times in milliseconds.
        """
        reset_peak_rss()
        start = time.perf_counter()
        model, vocabulary, operations = self._prepare(contender)
        call = self._call(model, vocabulary)
        first = _milliseconds(call)
        prepared = time.perf_counter() - start
        for _ in range(self._config.warmup):
            call()
        rounds = range(self._config.iterations)
        bar = tqdm(rounds, desc=f"{contender.label} {contender.backend}", disable=None, leave=False)
        times = [_milliseconds(call) for _ in bar]
        median = statistics.median(times)
        tokens = self._config.batch_size * self._config.sequence_length
        return {
            "label": contender.label,
            "backend": contender.backend,
            "precision": contender.precision,
            "median_ms": median,
            "min_ms": min(times),
            "max_ms": max(times),
            "first_call_ms": first,
            "prepare_s": prepared,
            "tokens_per_s": 1000 * tokens / median,
            "linear_gops": operations * tokens / median / 1e6,
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def _prepare(self, contender: Contender) -> tuple[nn.Module, int, int]:
        model, tokenizer = load_model(
            self._model.model_name_or_path, trust_remote_code=self._model.trust_remote_code
        )
        config: Any = model.config
        linears, _ = quantizable_linears(model)
        operations = 2 * sum(linear.weight.numel() for linear in linears.values())
        vocabulary = int(config.vocab_size)
        if contender.quant is None:
            return _float_model(model, contender), vocabulary, operations
        batches = _calibration(tokenizer)
        quantized = quantize_model(model, batches, contender.quant)
        return quantized.model, vocabulary, operations

    def _call(self, model: nn.Module, vocabulary: int) -> Callable[[], Tensor]:
        config = self._config
        generator = torch.Generator().manual_seed(config.seed)
        shape = (config.batch_size, config.sequence_length)
        ids = torch.randint(vocabulary, shape, generator=generator)
        mask = torch.ones_like(ids)
        last = torch.arange(1, config.batch_size + 1) * config.sequence_length - 1

        def forward() -> Tensor:
            logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            return logits

        @torch.inference_mode()
        def call() -> Tensor:
            if config.logits == "all":
                return forward()
            with logits_at(model, last):
                return forward()

        return call


def _float_model(model: nn.Module, contender: Contender) -> nn.Module:
    if contender.backend == "compiled":
        return NativeBackend().optimize_float(model, contender.precision, {})
    return Backend.optimize_float(NativeBackend(), model, contender.precision, {})


def _calibration(tokenizer: Any) -> list[dict[str, Tensor]]:
    texts = load_lambada("embedded", purpose="calibration").documents
    chosen = choose_texts(texts, LATENCY_CALIBRATION_TEXTS, DataConfig.seed)
    return calibration_batches(chosen, tokenizer)


def _milliseconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Fill in each row's speedup over fp32 and over the best bf16, as latency ratios."""
    fp32 = rows[0]["median_ms"]
    bf16 = min(row["median_ms"] for row in rows if row["precision"] == "bf16")
    for row in rows:
        row["speedup_vs_fp32"] = fp32 / row["median_ms"]
        row["speedup_vs_best_bf16"] = bf16 / row["median_ms"]


def int8_quants(
    backends: tuple[str, ...], labels: tuple[str, ...]
) -> list[tuple[str, QuantConfig]]:
    """Recipes to time: each label ("int8", "int8+sq") on each backend."""
    for name in backends:
        if choose_backend(name).backend.name in ("inc", "reference"):
            raise ConfigError(f"backend {name!r} is not timed: use native or ipex")
    alphas = {"int8": None, "int8+sq": AUTO}
    return [
        (label, QuantConfig(alpha=alphas[label], backend=name))
        for name in backends
        for label in labels
    ]
