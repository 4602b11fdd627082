"""All contenders in turns, and the rows that come of it (docs/protocol.md)."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from ipex_sq.benchmark_config import CLASSIFY, DECODE, BenchmarkConfig
from ipex_sq.benchmarking.contenders import Contender
from ipex_sq.benchmarking.cores import instance_cores
from ipex_sq.benchmarking.limits import Limits, LimitsSession
from ipex_sq.benchmarking.session import Load, Sample, Session
from ipex_sq.benchmarking.subjects import Subject
from ipex_sq.benchmarking.work import Work
from ipex_sq.benchmarking.workers import Worker
from ipex_sq.errors import IpexSqError


@dataclass
class Entry:
    """A contender with its processes, and what they measured.

    Attributes:
        workers: One process per instance.
        processes: Ends them.
        samples: Of each instance.
        turns: Runs per second of all instances together, turn by turn.
        work: Of one instance.
        load: Of one batch.
        described: What the row says of getting ready.
        reason: Why it has no figures.
    """

    contender: Contender
    workers: list[Worker] = field(default_factory=list)
    processes: ExitStack = field(default_factory=ExitStack)
    samples: list[Sample] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    work: Work | None = None
    load: Load | None = None
    described: dict[str, float | None] = field(default_factory=dict)
    breakdown: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def run_benchmark(
    timed: Sequence[Contender], subject: Subject, config: BenchmarkConfig
) -> tuple[Limits, list[dict[str, Any]]]:
    """Measure the limits, then every contender in turns.

    One that fails, or whose process dies, costs the figures of its own row only.

    Returns:
        The limits, and the rows of the JSON document in the order of `timed`.

    Raises:
        ConfigError: Cores that cannot be had.
        ResourceError: The process that measures the limits died.
    """
    instances = instance_cores(config)
    every = [core for cores in instances for core in cores]
    with Worker("the limits", LimitsSession, every, bind=config.pinned) as meter:
        meter.ready()
        limits: Limits = meter.call("measure")
    with ExitStack() as stack:
        entries = [_start(item, (subject, config, instances), stack) for item in _bar(timed)]
        for turn in tqdm(range(config.rounds), desc="rounds", disable=None, leave=False):
            ready = _ready(entries)
            first = turn % len(ready) if ready else 0
            for entry in ready[first:] + ready[:first]:
                with _alone(entry):
                    _take_turn(entry, config)
        for entry in _ready(entries):
            with _alone(entry):
                _finish(entry)
    rows = [_row(entry, (subject, config), (limits, instances)) for entry in entries]
    add_speedups(rows)
    return limits, rows


def check_timed(rows: Sequence[dict[str, Any]]) -> None:
    """Refuse a result without figures.

    Raises:
        IpexSqError: With the reason of every row.
    """
    if not any("p50_ms" in row for row in rows):
        reasons = "; ".join(f"{row['label']} {row['backend']}: {row['reason']}" for row in rows)
        raise IpexSqError(f"nothing was timed: {reasons}")


@contextmanager
def _alone(entry: Entry) -> Iterator[None]:
    """Inside the block an error of the entry ends its processes and is the reason of its row.

    A row has the figures of all turns or none: fewer would be those of other moments.
    """
    try:
        yield
    except IpexSqError as error:
        entry.reason = " ".join(str(error).split()) or type(error).__name__
        entry.processes.close()


def _ready(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if not entry.reason]


def _start(
    contender: Contender,
    setting: tuple[Subject, BenchmarkConfig, list[tuple[int, ...]]],
    stack: ExitStack,
) -> Entry:
    subject, config, instances = setting
    entry = Entry(contender)
    stack.enter_context(entry.processes)
    factory = functools.partial(Session, contender, subject, config)
    for cores in instances:
        worker = Worker(str(contender), factory, cores, bind=config.pinned)
        entry.workers.append(entry.processes.enter_context(worker))
    with _alone(entry):
        for worker in entry.workers:
            worker.ready()
        entry.work, entry.load, entry.described = entry.workers[0].call("describe")
    return entry


def _take_turn(entry: Entry, config: BenchmarkConfig) -> None:
    """One turn of all instances at once."""
    for worker in entry.workers:
        worker.send("take_turn", config.min_runs, config.min_seconds)
    found: list[list[Sample]] = [worker.receive() for worker in entry.workers]
    entry.turns.append(sum(1000 * len(runs) / sum(run.ms for run in runs) for runs in found))
    for runs in found:
        entry.samples += runs


def _finish(entry: Entry) -> None:
    """The memory that all instances took, and the breakdown of one."""
    stats = [worker.call("describe")[2] for worker in entry.workers]
    entry.described["peak_rss_bytes"] = sum(item["peak_rss_bytes"] for item in stats)
    peer = entry.contender.peer
    if peer is None or peer.in_torch:  # else torch sees none of its operators
        entry.breakdown = entry.workers[0].call("breakdown")  # its events take memory


def _times(times: list[float]) -> dict[str, Any]:
    return {
        "p50_ms": statistics.median(times),
        "p90_ms": quantile(times, 0.9),
        "min_ms": min(times),
        "p05_ms": quantile(times, 0.05),
        "p95_ms": quantile(times, 0.95),
        "runs": len(times),
        "samples_ms": [round(time, 3) for time in times],
    }


def _row(
    entry: Entry,
    asked: tuple[Subject, BenchmarkConfig],
    machine: tuple[Limits, list[tuple[int, ...]]],
) -> dict[str, Any]:
    (subject, config), (limits, instances) = asked, machine
    contender = entry.contender
    row: dict[str, Any] = {
        "label": contender.label,
        "backend": contender.backend,
        "precision": contender.precision,
        "workload": CLASSIFY if subject.classifies else config.workload,
        "batch": config.batch_size,
        "tokens": config.sequence_length,
        "instances": len(instances),
        "cores": len(instances[0]),
        "reason": entry.reason,
    }
    if entry.reason:
        return row
    row |= {
        **_times([sample.ms for sample in entry.samples]),
        "batches_per_s": statistics.median(entry.turns),
        "breakdown": entry.breakdown,
        **entry.described,
    }
    assert entry.work is not None and entry.load is not None  # noqa: S101, PT018
    row["head"] = entry.work.head_precision
    tokens, runs_per_s = entry.load.tokens, row["batches_per_s"]
    if config.workload == DECODE:
        ttft = statistics.median(sample.ttft_ms or 0.0 for sample in entry.samples)
        tpot = statistics.median(sample.tpot_ms or 0.0 for sample in entry.samples)
        row |= {"ttft_ms": ttft, "tpot_ms": tpot}
        tokens, runs_per_s = config.batch_size * config.new_tokens, 1000 * len(instances) / tpot
    row["limit_share"] = None
    if entry.work.unknown:
        row["limit_unknown"] = entry.work.unknown
    else:
        least = entry.work.least_seconds(limits, entry.load.tokens, entry.load.predictions)
        row["limit_share"] = least * runs_per_s
    if entry.load.documents is not None:
        row["tokens"] = round(tokens / entry.load.documents)
        row["docs_per_s"] = row["batches_per_s"] * entry.load.documents
    row["tokens_per_s"] = row["batches_per_s"] * tokens
    return row


def add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """Fill in each row's speedup over eager fp32 and over the best bf16, as ratios of throughput.

    One instance: of latency. A row without figures has none.
    """
    timed = [row for row in rows if "p50_ms" in row]
    speed = {id(row): 1000 / row["p50_ms"] for row in timed}
    if any(row["instances"] > 1 for row in timed):
        speed = {id(row): row["batches_per_s"] for row in timed}
    for precision, key in (("fp32", "speedup_vs_fp32"), ("bf16", "speedup_vs_bf16")):
        baselines = [row for row in timed if row["precision"] == precision]
        if precision == "fp32":
            baselines = [row for row in baselines if row["backend"] == "eager"]
        best = max((speed[id(row)] for row in baselines), default=None)
        for row in timed:
            row[key] = None if best is None else speed[id(row)] / best


def quantile(times: Sequence[float], share: float) -> float:
    """The smallest time that `share` of the times do not exceed."""
    ordered = sorted(times)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _bar(timed: Sequence[Contender]) -> Any:
    return tqdm(timed, desc="prepare", unit="model", disable=None, leave=False)
