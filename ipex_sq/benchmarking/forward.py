"""Time of one forward pass in one precision, made comparable with others."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipex_sq.backends.base import Backend
from ipex_sq.backends.native import NativeBackend
from ipex_sq.backends.quantization import quantize_model
from ipex_sq.backends.registry import choose_backend
from ipex_sq.benchmarking import openvino_peer
from ipex_sq.benchmarking.subjects import Subject
from ipex_sq.checkpoint.saving import load
from ipex_sq.config import AUTO, BenchmarkConfig, QuantConfig
from ipex_sq.errors import ConfigError
from ipex_sq.models.body import logits_at
from ipex_sq.models.running import run_model
from ipex_sq.models.topology import quantizable_linears
from ipex_sq.system import peak_rss_bytes, reset_peak_rss

SHORTEST_SHARE = 0.25
"""Of the sequence length, for the shortest row of a padded batch."""


@dataclass(frozen=True)
class Contender:
    """One model to time.

    Attributes:
        label: "fp32", "bf16", "int8" or "int8+sq".
        backend: "eager", "compiled", an int8 backend or a peer.
        precision: "fp32", "bf16" or "int8".
        quant: Recipe of an int8 one that is quantized now.
        checkpoint: Folder of an int8 one that is loaded.
    """

    label: str
    backend: str
    precision: str
    quant: QuantConfig | None = None
    checkpoint: str | None = None


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

    def __init__(self, subject: Subject, config: BenchmarkConfig) -> None:
        self._subject, self._config = subject, config

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
            "p90_ms": quantile(times, 0.9),
            "min_ms": min(times),
            "max_ms": max(times),
            "first_call_ms": first,
            "prepare_s": prepared,
            "tokens_per_s": 1000 * tokens / median,
            "linear_gops": operations * tokens / median / 1e6,
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def _prepare(self, contender: Contender) -> tuple[nn.Module, int, int]:
        model, batches = self._subject.load()
        config: Any = model.config
        linears, _ = quantizable_linears(model)
        operations = 2 * sum(linear.weight.numel() for linear in linears.values())
        vocabulary = int(config.vocab_size)
        if contender.backend == openvino_peer.NAME:
            return openvino_peer.openvino_int8(model, batches), vocabulary, operations
        if contender.checkpoint is not None:
            return load(contender.checkpoint), vocabulary, operations
        if contender.quant is None:
            return _float_model(model, contender), vocabulary, operations
        quantized = quantize_model(model, batches, contender.quant)
        return quantized.model, vocabulary, operations

    def _call(self, model: nn.Module, vocabulary: int) -> Callable[[], Tensor]:
        config = self._config
        generator = torch.Generator().manual_seed(config.seed)
        shape = (config.batch_size, config.sequence_length)
        ids = torch.randint(vocabulary, shape, generator=generator)
        batch = {"input_ids": ids, "attention_mask": self._mask(generator)}
        last = torch.arange(1, config.batch_size + 1) * config.sequence_length - 1

        @torch.inference_mode()
        def call() -> Tensor:
            if config.logits == "all":
                return run_model(model, batch)
            with logits_at(model, last):
                return run_model(model, batch)

        return call

    def _mask(self, generator: torch.Generator) -> Tensor:
        """All ones, or rows that end in padding: lengths even between a quarter and the whole."""
        config = self._config
        rows, most = config.batch_size, config.sequence_length
        if not config.padded:
            return torch.ones(rows, most, dtype=torch.long)
        least = max(1, round(SHORTEST_SHARE * most))
        lengths = torch.randint(least, most + 1, (rows, 1), generator=generator)
        lengths[0] = most
        return (torch.arange(most)[None] < lengths).long()


def _float_model(model: nn.Module, contender: Contender) -> nn.Module:
    if contender.backend == "compiled":
        return NativeBackend().optimize_float(model, contender.precision, {})
    return Backend.optimize_float(NativeBackend(), model, contender.precision, {})


def quantile(times: Sequence[float], share: float) -> float:
    """The smallest time that `share` of the times do not exceed."""
    ordered = sorted(times)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


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
