"""One model in its process: made ready once, then timed turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ipex_sq.benchmark_config import DECODE, LAMBADA, BenchmarkConfig
from ipex_sq.benchmarking.contenders import Contender, Prepared, prepare
from ipex_sq.benchmarking.subjects import Subject
from ipex_sq.benchmarking.work import Work
from ipex_sq.config import EvaluationConfig
from ipex_sq.data.documents import Document
from ipex_sq.errors import UnsupportedModelError
from ipex_sq.evaluation.lambada import LambadaResult, encode_documents, evaluate_lambada
from ipex_sq.models.body import logits_at
from ipex_sq.models.generating import check_generates, timed_generation
from ipex_sq.models.running import run_model
from ipex_sq.system import (
    give_freed_memory_back,
    keep_freed_memory,
    peak_rss_bytes,
    reset_peak_rss,
)

SHORTEST_SHARE = 0.25
"""Of the sequence length, for the shortest row of a padded batch."""

PROFILED_TOKENS = 8
"""In decode; the events of a hundred tokens take minutes to add up."""

TIMED_BATCHES = 4
"""Of documents; accuracy is that of all of them."""

MOST_WARMUP = 8
STILL_FASTER = 0.95
"""A run that takes less than this share of the one before is still warming up."""

KINDS = {
    "gemm": (
        *("qlinear", "::mm", "addmm", "+linear", "aten::linear", "mkldnn", "ipex_linear"),
        *("int8_rows", "int8_levels", "bf16_logits"),
    ),
    "attention": ("bmm", "short_attention", "scaled_dot_product", "_softmax", "matmul"),
    "elementwise": (
        *("Compiled", "aten::", "quantize", "onednn::", "torch_ipex::"),
        "ipex_sq::round_",
    ),
}
"""Parts of the names of operators, tried in this order; what Inductor fuses counts as
elementwise."""


@dataclass(frozen=True)
class Sample:
    """One run.

    Attributes:
        ms: The whole of it.
        ttft_ms: Until the first new token (decode).
        tpot_ms: Of each further token, on average (decode).
    """

    ms: float
    ttft_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(frozen=True)
class Load:
    """What one batch, or one step of decode, holds.

    Attributes:
        tokens: That run through the body.
        predictions: Positions whose logits are computed.
        documents: Of the lambada workload.
    """

    tokens: float
    predictions: float
    documents: float | None = None


class Session:
    """Prepares one contender and runs its workload.

    Raises:
        UnsupportedModelError: It cannot run this workload.
    """

    _load: Load
    _run: Callable[[], Sample]
    _profiled: Callable[[], Sample]
    _score: Callable[[], dict[str, float | None]]

    def __init__(self, contender: Contender, subject: Subject, config: BenchmarkConfig) -> None:
        reset_peak_rss()
        keep_freed_memory()
        start = time.perf_counter()
        prepared = prepare(contender, subject, generates=config.workload == DECODE)
        self._work = prepared.work
        self._accuracy: dict[str, float | None] = {}
        if config.workload == LAMBADA:
            self._prepare_lambada(prepared, subject, config)
        else:
            self._load = _load_of(subject, config)
            self._run = _workload(prepared, config)
            few = replace(config, new_tokens=min(config.new_tokens, PROFILED_TOKENS))
            self._profiled = _workload(prepared, few)
        self._first = self._run()
        self._setup = time.perf_counter() - start
        if config.workload == LAMBADA:
            self._accuracy = self._score()
        self._warm_up(config.warmup)
        give_freed_memory_back()

    def describe(self) -> tuple[Work, Load, dict[str, float | None]]:
        """Its work, that of one batch, and what the row says of getting ready."""
        return (
            self._work,
            self._load,
            {
                "setup_s": self._setup,
                "first_run_ms": self._first.ms,
                "peak_rss_bytes": peak_rss_bytes(),
                "threads": torch.get_num_threads(),
                **self._accuracy,
            },
        )

    def take_turn(self, min_runs: int, min_seconds: float) -> list[Sample]:
        """At least `min_runs` runs and `min_seconds` of them, after one that does not count.

        The caches hold another model then, and memory has been given back.
        """
        self._run()
        samples: list[Sample] = []
        end = time.perf_counter() + min_seconds
        while len(samples) < min_runs or time.perf_counter() < end:
            samples.append(self._run())
        give_freed_memory_back()  # the others need it while this one sleeps
        return samples

    def breakdown(self) -> dict[str, float]:
        """Share of the operators' own time in one run (of a few tokens), by kind."""
        self._profiled()  # memory was given back after the last turn
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self._profiled()
        totals = dict.fromkeys((*KINDS, "other"), 0.0)
        for event in profiled.key_averages():
            totals[_kind(event.key)] += event.self_cpu_time_total
        whole = sum(totals.values()) or 1.0
        return {kind: total / whole for kind, total in totals.items()}

    def _prepare_lambada(
        self, prepared: Prepared, subject: Subject, config: BenchmarkConfig
    ) -> None:
        if subject.texts is None or prepared.tokenizer is None:
            raise UnsupportedModelError("it has no tokenizer to read documents with")
        documents = subject.texts.evaluation.documents
        size = config.batch_size

        def score(some: Sequence[Document]) -> LambadaResult:
            settings = EvaluationConfig(batch_size=size)
            return evaluate_lambada(prepared.model, prepared.tokenizer, some, settings)

        def timed(some: Sequence[Document]) -> Sample:
            start = time.perf_counter()
            score(some)
            return Sample(1000 * (time.perf_counter() - start) / -(-len(some) // size))

        few = documents[: TIMED_BATCHES * size]
        encoded = encode_documents(few, prepared.tokenizer)
        batches = -(-len(few) // size)
        self._load = Load(
            sum(len(item.ids) - 1 for item in encoded) / batches,
            sum(item.target_tokens for item in encoded) / batches,
            len(few) / batches,
        )
        self._run = lambda: timed(few)
        self._profiled = lambda: timed(few[:size])
        self._score = lambda: _accuracy(score(documents))

    def _warm_up(self, least: int) -> None:
        last = float("inf")
        for number in range(max(least, MOST_WARMUP)):
            sample = self._run().ms
            if number + 1 >= least and sample > STILL_FASTER * last:
                return
            last = sample


def _kind(name: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return "other"


def _load_of(subject: Subject, config: BenchmarkConfig) -> Load:
    rows, tokens = config.batch_size, config.batch_size * config.sequence_length
    if config.workload == DECODE:
        return Load(rows, rows)
    last_only = subject.classifies or config.logits == "last"
    return Load(tokens, rows if last_only else tokens)


def _workload(prepared: Prepared, config: BenchmarkConfig) -> Callable[[], Sample]:
    model = prepared.model
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, config.sequence_length)
    ids = torch.randint(prepared.vocabulary, shape, generator=generator)
    if config.workload == DECODE:
        check_generates(model)
        return lambda: _decode(model, ids, config.new_tokens)
    batch = {"input_ids": ids, "attention_mask": attention_mask(config, generator)}
    last = None
    if config.logits == "last":
        last = torch.arange(1, config.batch_size + 1) * config.sequence_length - 1
    return lambda: _forward(model, batch, last)


def _accuracy(result: LambadaResult) -> dict[str, float | None]:
    return {
        "accuracy": result.last_word_accuracy,
        "accuracy_stderr": result.stderr,
        "perplexity": result.json_perplexity,
    }


@torch.inference_mode()
def _forward(model: nn.Module, batch: Mapping[str, Tensor], last: Tensor | None) -> Sample:
    start = time.perf_counter()
    if last is None:
        run_model(model, batch)
    else:
        with logits_at(model, last):
            run_model(model, batch)
    return Sample(1000 * (time.perf_counter() - start))


@torch.inference_mode()
def _decode(model: nn.Module, ids: Tensor, new_tokens: int) -> Sample:
    times = timed_generation(model, ids, new_tokens)
    first, last = 1000 * times[0], 1000 * times[-1]
    return Sample(last, first, (last - first) / (len(times) - 1))


def attention_mask(config: BenchmarkConfig, generator: torch.Generator) -> Tensor:
    """All ones, or rows that end in padding: lengths even between a quarter and the whole."""
    rows, most = config.batch_size, config.sequence_length
    if not config.padded:
        return torch.ones(rows, most, dtype=torch.long)
    least = max(1, round(SHORTEST_SHARE * most))
    lengths = torch.randint(least, most + 1, (rows, 1), generator=generator)
    lengths[0] = most
    return (torch.arange(most)[None] < lengths).long()
