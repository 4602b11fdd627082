"""From a float model to an int8 one: calibrate, plan, smooth, lower, each step timed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ipex_sq.backends.base import Backend
from ipex_sq.backends.inc import DEFAULT_ALPHA, IncBackend
from ipex_sq.backends.registry import Choice, choose_backend
from ipex_sq.config import GPTQ, MIXED, NEAREST, STATIC, QuantConfig
from ipex_sq.errors import ConfigError
from ipex_sq.models.calibration import calibrate, clipped_ranges
from ipex_sq.models.conv1d import check_no_conv1d
from ipex_sq.models.folding import apply_smoothing
from ipex_sq.models.readiness import prepare_float
from ipex_sq.models.rounding import round_weights
from ipex_sq.models.topology import has_small_head
from ipex_sq.recipe.act_stats import ActStats
from ipex_sq.recipe.batching import Batch
from ipex_sq.recipe.plan import QuantPlan
from ipex_sq.recipe.planning import Rounding, make_plan
from ipex_sq.recipe.portable import check_portable


@dataclass
class QuantizedModel:
    """An int8 model with how it came to be.

    Attributes:
        model: Ready to run.
        plan: What it executes; None for inc, which has a recipe of its own.
        backend: Its backend.
        dtype: Precision of what stays float.
        alpha: SmoothQuant's alpha, "auto" where each smooth group has its own, or None.
        int8_linears: Linears that run in int8.
        smoothing_change: Largest relative change that smoothing made in float.
        undone_folds: Folds that changed the float model and became pre-scales: what they changed,
            by group.
        seconds: Of each step.
    """

    model: nn.Module
    plan: QuantPlan | None
    backend: str
    dtype: str
    alpha: float | str | None
    int8_linears: int
    smoothing_change: float = 0.0
    undone_folds: Mapping[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def plan(model: nn.Module, stats: ActStats, config: QuantConfig = QuantConfig()) -> QuantPlan:  # noqa: B008
    """Decide the numerics of every Linear of `model` from its statistics (minmax ranges).

    Raises:
        BackendUnavailableError: The backend cannot run here.
        ConfigError: It does not round per token, and the config asks for it.
        CalibrationError: The statistics hold no samples, and the config searches; or no Hessians,
            and it asks for GPTQ.
    """
    weights = {name: model.get_submodule(name).weight for name in stats.linears}
    backend = choose_backend(config.backend).backend
    if isinstance(backend, IncBackend):
        raise ConfigError("backend 'inc' has a recipe of its own and no plan")
    return make_plan(stats, weights, rounding_of(config, backend, stats, model))  # type: ignore[arg-type]


def check_config(config: QuantConfig, model: nn.Module | None = None) -> None:
    """Refuse, before any work, what the backend of `config` cannot do, with `model` if it is known.

    Raises:
        BackendUnavailableError: It cannot run here.
        ConfigError: It has no such recipe, or no portable form of `model`.
    """
    if config.portable and model is not None:
        check_no_conv1d(model)
    backend = choose_backend(config.backend).backend
    if config.max_drop is not None and config.observer != "minmax":
        raise ConfigError("--max_drop goes with --observer minmax")
    if not isinstance(backend, IncBackend):
        rounding(config, backend, model)
    elif (
        config.observer != "minmax"
        or config.activations not in (None, STATIC)
        or config.weight_rounding not in (None, NEAREST)
        or config.max_drop is not None
        or config.portable
        or config.quant_lm_head
    ):
        raise ConfigError(
            "backend 'inc' runs its published recipe only: --observer minmax, --activations "
            "static, --weight_rounding nearest, no --max_drop, no --portable, no --quant_lm_head "
            "(it quantizes the head anyway)"
        )


def rounding(config: QuantConfig, backend: Backend, model: nn.Module | None) -> Rounding:
    """What a plan for `backend` is asked for: the config, its open choices made.

    Without `model` its head stays float unless the config says otherwise.

    Raises:
        ConfigError: The backend does not round per token, and the config asks for it.
    """
    mixes = config.searches_alpha and backend.rounds_tokens and not config.portable
    wanted = config.activations or (MIXED if mixes else STATIC)
    lm_head = config.quant_lm_head
    if lm_head is None:
        free = mixes and wanted != STATIC and config.max_drop is None
        lm_head = free and model is not None and has_small_head(model)
    if (wanted != STATIC or config.quant_lm_head) and not backend.rounds_tokens:
        raise ConfigError(
            f"backend {backend.name!r} rounds per tensor only: use --activations static without "
            "--quant_lm_head, or --backend native"
        )
    if config.quant_lm_head and config.portable:
        raise ConfigError("--portable goes without --quant_lm_head: other formats keep it float")
    weights = config.weight_rounding or (GPTQ if config.searches_alpha else NEAREST)
    return Rounding(config.alpha, wanted, weights, config.portable, lm_head)


def rounding_of(
    config: QuantConfig, backend: Backend, stats: ActStats, model: nn.Module
) -> Rounding:
    """As `rounding`, from what the statistics hold: GPTQ only with Hessians, a head only with its.

    Raises:
        ConfigError: See `rounding`.
    """
    wanted = rounding(config, backend, model)
    if wanted.lm_head and stats.head is None:
        if config.quant_lm_head:
            raise ConfigError(
                "--quant_lm_head needs statistics of the head, which scales files do not hold: "
                "calibrate(model, batches, lm_head=True)"
            )
        wanted = replace(wanted, lm_head=False)
    open_choice = config.weight_rounding is None and not stats.hessians
    return replace(wanted, weights=NEAREST) if open_choice else wanted


def quantize(
    model: nn.Module,
    batches: Iterable[Batch] | ActStats,
    config: QuantConfig = QuantConfig(),  # noqa: B008
) -> nn.Module:
    """Quantize `model`, which is consumed, and return the int8 model, in eval mode.

    The plan that it executes is its attribute `quant_plan`.

    Args:
        model: Float model in fp32; it is put in eval mode first.
        batches: Calibration batches (a generator too), or statistics already gathered.
        config: The recipe and the backend.

    Raises:
        BackendUnavailableError: The backend cannot run here.
        ConfigError: The observer or the backend needs batches and got statistics; the model is in
            bf16 or fp16.
        CalibrationError, NumericalCheckError, UnsupportedModelError: see `calibrate` and
            `apply_smoothing`.
    """
    return quantize_model(model, batches, config).model


def quantize_model(
    model: nn.Module,
    batches: Iterable[Batch] | ActStats,
    config: QuantConfig,
    *,
    source: Mapping[str, Any] | None = None,
    decided: QuantPlan | None = None,
) -> QuantizedModel:
    """As `quantize`, with the plan, the timings and what was chosen.

    `decided` is executed instead of a plan made from `config`.
    """
    check_config(config, model)
    choice = choose_backend(config.backend)
    dtype = config.dtype or choice.backend.float_dtype
    if config.max_drop is not None and decided is None:
        raise ConfigError(
            "max_drop is measured on documents: use eval_lambada.py, or pass the plan of "
            "evaluation.max_drop.plan_within_drop"
        )
    prepare_float(model)
    if not isinstance(batches, ActStats):
        batches = list(batches)  # an observer reads them twice
    if isinstance(choice.backend, IncBackend):
        return _quantize_with_inc(choice.backend, model, batches, config)
    return _quantize_with_plan(choice, model, batches, _Settings(config, dtype, source, decided))


@dataclass(frozen=True)
class _Settings:
    config: QuantConfig
    dtype: str
    source: Mapping[str, Any] | None
    decided: QuantPlan | None


def _quantize_with_plan(
    choice: Choice,
    model: nn.Module,
    batches: Sequence[Batch] | ActStats,
    settings: _Settings,
) -> QuantizedModel:
    config, dtype, backend = settings.config, settings.dtype, choice.backend
    assert isinstance(backend, Backend)  # noqa: S101
    if isinstance(batches, ActStats) and config.observer != "minmax":
        raise ConfigError(f"observer {config.observer!r} makes a second pass: pass the batches")
    wanted = rounding(config, backend, model)
    stats = batches
    if not isinstance(stats, ActStats):
        stats = calibrate(
            model,
            stats,
            settings.source,
            samples=wanted.needs_samples,
            hessians=wanted.needs_hessians,
            lm_head=wanted.lm_head,
        )
    seconds = {"calibrate": stats.seconds}
    with _timed(seconds, "plan"):
        decided = settings.decided or plan(model, stats, config)
    with _timed(seconds, "smooth"):
        smoothed, change = apply_smoothing(model, decided, stats.example)
    undone, decided = smoothed.folds_lost_from(decided), smoothed
    if config.portable:
        check_portable(decided)
    if config.observer != "minmax" and not isinstance(batches, ActStats):
        with _timed(seconds, "observe"):
            ranges = clipped_ranges(model, decided, batches, config)
            decided = decided.with_ranges(ranges, config.observer)
    with _timed(seconds, "round"):
        round_weights(model, decided, stats)
    with _timed(seconds, "lower"):
        lowered = backend.lower(model, decided, stats.example, dtype)
    lowered.quant_plan = decided  # type: ignore[assignment]
    lowered.quant_dtype = dtype  # type: ignore[assignment]
    return QuantizedModel(
        model=lowered,
        plan=decided,
        backend=backend.name,
        dtype=dtype,
        alpha=decided.alpha,
        int8_linears=len(decided.int8_names),
        smoothing_change=change,
        undone_folds=undone,
        seconds=seconds,
    )


def _quantize_with_inc(
    backend: IncBackend,
    model: nn.Module,
    batches: Sequence[Batch] | ActStats,
    config: QuantConfig,
) -> QuantizedModel:
    if isinstance(batches, ActStats):
        raise ConfigError("backend 'inc' calibrates by itself: pass the batches")
    alpha = DEFAULT_ALPHA if config.searches_alpha else config.alpha
    strength = None if alpha is None else float(alpha)
    seconds: dict[str, float] = {}
    with _timed(seconds, "lower"):
        lowered = backend.quantize(model, batches, strength)
    return QuantizedModel(
        model=lowered,
        plan=None,
        backend=backend.name,
        dtype="fp32",
        alpha=strength,
        int8_linears=lowered.int8_linears,
        seconds=seconds,
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
