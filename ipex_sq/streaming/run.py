"""Quantize a checkpoint folder with one block in memory at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from ipex_sq import __version__
from ipex_sq.backends.native import NativeBackend
from ipex_sq.backends.quantization import rounding
from ipex_sq.backends.registry import choose_backend
from ipex_sq.checkpoint.folders import check_writable
from ipex_sq.checkpoint.integrity import file_sha256
from ipex_sq.config import QuantConfig
from ipex_sq.errors import ConfigError
from ipex_sq.models.readiness import readable_rows
from ipex_sq.recipe.batching import Batch
from ipex_sq.recipe.plan import QuantPlan
from ipex_sq.streaming.blocks import StreamedModel
from ipex_sq.streaming.budget import check_needs, check_peak, estimate
from ipex_sq.streaming.calibrating import Calibration
from ipex_sq.streaming.findings import Findings, rounding_that_fits
from ipex_sq.streaming.journal import Journal
from ipex_sq.streaming.weights import weight_files
from ipex_sq.streaming.writing import Written, write_blocks, write_checkpoint
from ipex_sq.system import (
    give_freed_memory_back,
    package_versions,
    peak_rss_bytes,
    reset_peak_rss,
)


@dataclass(frozen=True)
class Limits:
    """How a run may go about its work.

    Attributes:
        max_memory: Bytes of resident memory, or None: what is available.
        resume: Go on with an unfinished run.
    """

    max_memory: int | None = None
    resume: bool = False


@dataclass(frozen=True)
class Streamed:
    """What a run has made.

    Attributes:
        plan: As it was carried out.
        proof: `smoothing_change`, the largest relative change that smoothing made in float, and
            `undone_folds`, folds that became pre-scales: what they changed, by group.
        estimated_bytes: What the peak of memory was expected to be at most.
        peak_rss_bytes: Largest resident memory of this process during the run.
        seconds: Wall time of this process, by step.
    """

    plan: QuantPlan
    proof: Mapping[str, Any]
    estimated_bytes: int
    peak_rss_bytes: int
    seconds: Mapping[str, float]


def check_streamed(config: QuantConfig) -> QuantConfig:
    """The config for the native backend, or a refusal of what is not done block by block.

    Raises:
        ConfigError: Says what.
        BackendUnavailableError: The native backend cannot run here.
    """
    if config.backend not in ("auto", NativeBackend.name):
        raise ConfigError(f"--max_memory goes with --backend native, not {config.backend}")
    if config.observer != "minmax" or config.max_drop is not None:
        raise ConfigError("--max_memory goes with --observer minmax and without --max_drop")
    choose_backend(NativeBackend.name)
    return replace(config, backend=NativeBackend.name, dtype=config.dtype or "bf16")


def quantize_folder(
    source: Path,
    target: Path,
    batches: Sequence[Batch],
    config: QuantConfig,
    *,
    tokenizer: Any = None,
    texts: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    limits: Limits = Limits(),
) -> Streamed:
    """Quantize the language model in `source` into `target`, one block in memory at a time.

    What it finds on the way is kept in a folder beside `target`, and removed at the end.

    Args:
        source: Checkpoint in safetensors.
        target: Folder of the int8 checkpoint, which `load` and transformers read.
        batches: Calibration batches.
        config: The recipe; native backend, minmax.
        tokenizer: Saved in `target`.
        texts: Where the batches came from, kept in the plan.
        origin: What the float model was, kept in the manifest.
        limits: Memory, and whether to go on with an unfinished run.

    Raises:
        ConfigError: See `check_streamed`, `Journal.at_work`; `target` is not ours; `source` int8.
        ResourceError: It would take more memory or disk than there is; needed and available.
        CheckpointError: `source` holds no safetensors, or damaged ones.
        CalibrationError, DataError, NumericalCheckError, UnsupportedModelError: As for `quantize`.
    """
    config = check_streamed(config)
    check_writable(target)
    place = target.resolve()
    reset_peak_rss()
    model, texts = StreamedModel(source), dict(texts or {})
    wanted = rounding(config, NativeBackend(), model.model)
    rows = readable_rows(model.model, batches)
    needs = estimate(model, rows, hessians=wanted.needs_hessians, lm_head=wanted.lm_head)
    journal = Journal(place.with_name(f".{place.name}.partial"))
    check_needs(needs, limits.max_memory, journal.folder)
    work = journal.at_work(_identity(source, rows, config, texts), resume=limits.resume)
    findings, seconds = Findings(model, journal, rows, wanted), dict[str, float]()
    with work, _progress(len(model.blocks), limits.max_memory, seconds) as done:
        model.load_outside()
        written = _take_steps(findings, config, texts, done)
        made_from = {**(origin or {}), **written.proof}
        write_checkpoint(findings, written.plan, target, tokenizer=tokenizer, origin=made_from)
        journal.end()
    return Streamed(written.plan, written.proof, needs.memory, peak_rss_bytes(), seconds)


def _take_steps(
    findings: Findings, config: QuantConfig, texts: Mapping[str, Any], done: Callable[[str], None]
) -> Written:
    calibration = Calibration(findings, done)
    calibration.find_topology()
    findings.check_head()
    asked = config.weight_rounding is not None
    findings.wanted = rounding_that_fits(findings, asked=asked)
    calibration.run()
    return write_blocks(findings, texts, str(config.dtype), done=done)


def _identity(
    source: Path, rows: Sequence[Batch], config: QuantConfig, texts: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides on the result."""
    ids = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            ids.update(name.encode() + str(tuple(row[name].shape)).encode())
            ids.update(row[name].contiguous().numpy().tobytes())
    files = weight_files(source)
    bar = tqdm(files, desc="digests", unit="file", disable=None, leave=False)
    return {
        "ipex_sq": {"version": __version__, "code": code_sha256()},
        "versions": package_versions(),
        "files": {str(path.relative_to(source)): file_sha256(path) for path in bar},
        "config": asdict(config),
        "texts": dict(texts),
        "token_ids": ids.hexdigest(),
    }


def code_sha256() -> str:
    """Digest of this package: a run does not go on with code that may round otherwise."""
    package, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            found.update(f"{path.relative_to(package)} {file_sha256(path)}\n".encode())
    return found.hexdigest()


@contextmanager
def _progress(
    blocks: int, most: int | None, seconds: dict[str, float]
) -> Iterator[Callable[[str], None]]:
    """A bar over the blocks of each step, with memory; gives what to call after each block.

    `seconds` gets the time of each step.
    """
    bar: Any = None
    last, step = time.perf_counter(), ""

    def done(name: str) -> None:
        nonlocal bar, last, step
        if name != step:
            if bar is not None:
                bar.close()
            bar, step = tqdm(desc=name, total=blocks, unit="block", disable=None, leave=False), name
        now = time.perf_counter()
        seconds[name] = seconds.get(name, 0.0) + now - last
        last = now
        give_freed_memory_back()  # which a process that has run an int8 model keeps
        peak = peak_rss_bytes()
        used = psutil.Process().memory_info().rss
        bar.set_postfix_str(f"{used / 2**30:.2f} GiB, at most {peak / 2**30:.2f}", refresh=False)
        bar.update()
        check_peak(peak, most, f"step {name!r}")

    try:
        yield done
    finally:
        if bar is not None:
            bar.close()
