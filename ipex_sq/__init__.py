"""Static INT8 (W8A8) with SmoothQuant for Hugging Face models on Xeon CPUs.

Public names are loaded on first use: importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ipex_sq.registration import register_with_transformers

if TYPE_CHECKING:
    from ipex_sq.backends.quantization import plan as plan
    from ipex_sq.backends.quantization import quantize as quantize
    from ipex_sq.backends.registry import available_backends as available_backends
    from ipex_sq.benchmark_config import BenchmarkConfig as BenchmarkConfig
    from ipex_sq.checkpoint.compressed import save_compressed as save_compressed
    from ipex_sq.checkpoint.saving import load as load
    from ipex_sq.checkpoint.saving import save as save
    from ipex_sq.config import DataConfig as DataConfig
    from ipex_sq.config import EvaluationConfig as EvaluationConfig
    from ipex_sq.config import QuantConfig as QuantConfig
    from ipex_sq.data.calibration import calibration_batches as calibration_batches
    from ipex_sq.data.lambada import load_lambada as load_lambada
    from ipex_sq.data.reviews import load_reviews as load_reviews
    from ipex_sq.errors import IpexSqError as IpexSqError
    from ipex_sq.evaluation.classification import evaluate_classifier as evaluate_classifier
    from ipex_sq.evaluation.lambada import evaluate_lambada as evaluate_lambada
    from ipex_sq.models.calibration import calibrate as calibrate
    from ipex_sq.models.classifier import load_classifier as load_classifier
    from ipex_sq.models.loading import load_model as load_model
    from ipex_sq.review_config import ReviewConfig as ReviewConfig
    from ipex_sq.streaming.run import quantize_folder as quantize_folder

__version__ = "0.1.0"

_HOMES = {
    "BenchmarkConfig": "benchmark_config",
    "DataConfig": "config",
    "EvaluationConfig": "config",
    "IpexSqError": "errors",
    "QuantConfig": "config",
    "ReviewConfig": "review_config",
    "available_backends": "backends.registry",
    "calibrate": "models.calibration",
    "calibration_batches": "data.calibration",
    "evaluate_classifier": "evaluation.classification",
    "evaluate_lambada": "evaluation.lambada",
    "load": "checkpoint.saving",
    "load_classifier": "models.classifier",
    "load_lambada": "data.lambada",
    "load_model": "models.loading",
    "load_reviews": "data.reviews",
    "plan": "backends.quantization",
    "quantize": "backends.quantization",
    "quantize_folder": "streaming.run",
    "save": "checkpoint.saving",
    "save_compressed": "checkpoint.compressed",
}

__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ipex_sq' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ipex_sq.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


register_with_transformers()
