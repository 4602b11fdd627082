"""Whether a benchmark fits in memory and in the model, asked before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence

from ipex_sq.benchmark_config import DECODE, LAMBADA, PREFILL, BenchmarkConfig
from ipex_sq.benchmarking.contenders import Contender
from ipex_sq.benchmarking.limits import BYTES
from ipex_sq.benchmarking.subjects import Subject
from ipex_sq.errors import ConfigError, ResourceError
from ipex_sq.resources import available_memory

PROCESS_BYTES = 400 * 2**20
"""Python with torch and transformers."""

PREPARING = 2
"""While a model is made ready its fp32 weights are there about twice."""


def needed_bytes(timed: Sequence[Contender], subject: Subject, config: BenchmarkConfig) -> int:
    """Estimate: weights of every contender, logits of one at a time, and one that is made ready."""
    size = subject.size()
    positions = config.batch_size
    if config.logits == "all" and config.workload == PREFILL and not subject.classifies:
        positions *= config.sequence_length
    resident = 0
    for contender in timed:
        weights = size.parameters * BYTES[contender.precision]
        if config.workload == DECODE and contender.precision == "int8":
            weights *= 2  # rows are multiplied from a copy in another layout
        resident += weights + PROCESS_BYTES
    logits = BYTES["fp32"] * positions * size.outputs  # given back after every turn
    return config.num_instances * (resident + logits + PREPARING * 4 * size.parameters)


def check_memory(timed: Sequence[Contender], subject: Subject, config: BenchmarkConfig) -> None:
    """Refuse what would not fit.

    Raises:
        ResourceError: With what is needed and what is available.
    """
    needed, (available, where) = needed_bytes(timed, subject, config), available_memory()
    if needed > available:
        raise ResourceError(
            f"{len(timed)} models in {config.num_instances} instance(s) need about "
            f"{needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available {where}: take a "
            "smaller --batch_size, --logits last, fewer instances, or fewer backends"
        )


def check_length(subject: Subject, config: BenchmarkConfig) -> None:
    """Refuse texts that the model would fail on.

    Raises:
        ConfigError: With the positions that are asked for and those of the model.
    """
    if config.workload == LAMBADA:
        return  # its documents are checked when they are read
    asked, flags = config.sequence_length, f"--sequence_length {config.sequence_length}"
    if config.workload == DECODE:
        asked += config.new_tokens - 1  # the last new token is not read
        flags += f" and --new_tokens {config.new_tokens}"
    positions = subject.size().positions
    if positions is not None and asked > positions:
        raise ConfigError(
            f"{flags} take {asked} positions, {subject.name} has {positions}: take fewer tokens"
        )
