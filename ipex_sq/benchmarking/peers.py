"""What a user might pick instead of this project, by name."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ipex_sq.benchmarking.ctranslate2_peer import ctranslate2_int8
from ipex_sq.benchmarking.onnxruntime_peer import onnxruntime_int8
from ipex_sq.benchmarking.openvino_generation import openvino_int8_to_generate
from ipex_sq.benchmarking.openvino_peer import openvino_int8
from ipex_sq.benchmarking.pt2e_peer import pt2e_int8
from ipex_sq.errors import BackendUnavailableError, IpexSqError, UnsupportedModelError
from ipex_sq.models.running import run_model
from ipex_sq.recipe.batching import Batch

Quantize = Callable[[nn.Module, Sequence[Batch]], nn.Module]
"""Makes of a float model and calibration batches one that is called alike."""


@dataclass(frozen=True)
class Peer:
    """Int8 of another toolkit.

    Attributes:
        label: Its recipe: "int8", "int8+sq", or "int8 dynamic" where nothing is calibrated.
        packages: What it imports.
        quantize: For forward passes of whole texts.
        in_torch: Whether torch's profiler sees its operators.
        quantize_to_generate: For `generate`, where it has a key-value cache here.
    """

    label: str
    packages: tuple[str, ...]
    quantize: Quantize
    in_torch: bool = False
    quantize_to_generate: Quantize | None = None

    def missing(self) -> list[str]:
        """Those of its packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


PEERS = {
    "openvino": Peer(
        "int8+sq",
        ("openvino", "nncf"),
        openvino_int8,
        quantize_to_generate=openvino_int8_to_generate,
    ),
    "onnxruntime": Peer("int8", ("onnxruntime", "onnx"), onnxruntime_int8),
    "ctranslate2": Peer("int8 dynamic", ("ctranslate2",), ctranslate2_int8),
    "pt2e": Peer("int8+sq", ("nncf", "torchao"), pt2e_int8, in_torch=True),
}


def check_peer(name: str, *, generates: bool) -> None:
    """Refuse, before the work, a peer that is missing or cannot do it.

    Raises:
        BackendUnavailableError: One of its packages is not installed.
        UnsupportedModelError: It does not generate.
    """
    missing = PEERS[name].missing()
    if missing:
        reason = f"{' and '.join(missing)} not installed: pip install -r requirements-peers.txt"
        raise BackendUnavailableError(name, [reason])
    _quantize_of(name, generates=generates)


def _quantize_of(name: str, *, generates: bool) -> Quantize:
    quantize = PEERS[name].quantize_to_generate if generates else PEERS[name].quantize
    if quantize is None:
        raise UnsupportedModelError(f"{name} does not generate: it has no key-value cache here")
    return quantize


def build_peer(
    name: str, model: nn.Module, batches: Sequence[Batch], *, generates: bool = False
) -> nn.Module:
    """Let the peer quantize `model`, and run it once.

    Args:
        name: One of `PEERS`.
        model: Float model; not to be used afterwards.
        batches: Calibration batches.
        generates: Whether `generate` is asked for.

    Raises:
        UnsupportedModelError: It does not generate, or it failed; says how.
    """
    quantize = _quantize_of(name, generates=generates)
    try:
        # Their progress bars and notes do not belong to the result.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = quantize(model, batches)
            with torch.inference_mode():
                run_model(built, batches[0])
    except IpexSqError:
        raise
    except Exception as error:  # other people's errors are of any kind
        kind, text = type(error).__name__, str(error).strip()
        line = text.splitlines()[0] if text else ""
        raise UnsupportedModelError(f"{name} fails on this model: {kind}: {line}") from error
    return built
