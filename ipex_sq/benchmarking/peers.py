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
from ipex_sq.benchmarking.openvino_peer import openvino_int8
from ipex_sq.benchmarking.pt2e_peer import pt2e_int8
from ipex_sq.errors import BackendUnavailableError, IpexSqError, UnsupportedModelError
from ipex_sq.models.running import run_model
from ipex_sq.recipe.batching import Batch


@dataclass(frozen=True)
class Peer:
    """Int8 of another toolkit.

    Attributes:
        label: Its recipe: "int8", "int8+sq", or "int8 dynamic" where nothing is calibrated.
        packages: What it imports.
        quantize: Makes of a float model and calibration batches one that is called alike.
        in_torch: Whether torch's profiler sees its operators.
    """

    label: str
    packages: tuple[str, ...]
    quantize: Callable[[nn.Module, Sequence[Batch]], nn.Module]
    in_torch: bool = False

    def missing(self) -> list[str]:
        """Those of its packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


PEERS = {
    "openvino": Peer("int8+sq", ("openvino", "nncf"), openvino_int8),
    "onnxruntime": Peer("int8", ("onnxruntime", "onnx"), onnxruntime_int8),
    "ctranslate2": Peer("int8 dynamic", ("ctranslate2",), ctranslate2_int8),
    "pt2e": Peer("int8+sq", ("nncf", "torchao"), pt2e_int8, in_torch=True),
}


def check_installed(name: str) -> None:
    """Refuse, before the work, a peer that is missing.

    Raises:
        BackendUnavailableError: One of its packages is not installed.
    """
    missing = PEERS[name].missing()
    if missing:
        reason = f"{' and '.join(missing)} not installed: pip install -r requirements-peers.txt"
        raise BackendUnavailableError(name, [reason])


def build_peer(name: str, model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Let the peer quantize `model`, and run it once.

    Args:
        name: One of `PEERS`.
        model: Float model; not to be used afterwards.
        batches: Calibration batches.

    Raises:
        UnsupportedModelError: It failed; says how.
    """
    try:
        # Their progress bars and notes do not belong to the result.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = PEERS[name].quantize(model, batches)
            with torch.inference_mode():
                run_model(built, batches[0])
    except IpexSqError:
        raise
    except Exception as error:  # other people's errors are of any kind
        kind, text = type(error).__name__, str(error).strip()
        line = text.splitlines()[0] if text else ""
        raise UnsupportedModelError(f"{name} fails on this model: {kind}: {line}") from error
    return built
