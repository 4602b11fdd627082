"""OpenVINO with NNCF's int8 SmoothQuant: what a user would pick instead, on the same batches."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.errors import BackendUnavailableError
from ipex_sq.models.body import LogitsForTracing, in_order
from ipex_sq.recipe.batching import Batch

NAME = "openvino"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def check_installed() -> None:
    """Refuse, before the work, a peer that is missing.

    Raises:
        BackendUnavailableError: OpenVINO or NNCF is not installed.
    """
    missing = [name for name in (NAME, "nncf") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            NAME, [f"{' and '.join(missing)} not installed: use requirements-peers.txt"]
        )


def openvino_int8(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Quantize `model` by NNCF's recipe for transformers and compile it for the CPU.

    Its defaults are kept: static int8 of weights and activations, SmoothQuant, the head too. It
    uses as many threads as torch.

    Args:
        model: Float model; left as it is.
        batches: Calibration batches.

    Raises:
        BackendUnavailableError: OpenVINO or NNCF is not installed.
    """
    check_installed()
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    names = tuple(name for name in INPUTS if name in batches[0])
    example = {name: batches[0][name] for name in names}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's notes
        converted = openvino.convert_model(
            LogitsForTracing(model, names), example_input=tuple(example.values())
        )
    rows = [tuple(batch[name].numpy() for name in names) for batch in batches]
    with contextlib.redirect_stdout(sys.stderr):  # its progress bars
        quantized = nncf.quantize(
            converted,
            nncf.Dataset(rows),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(rows),
        )
    compiled = openvino.compile_model(
        quantized,
        "CPU",
        {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()},
    )
    return OpenVinoModel(compiled, names, model.config)


class OpenVinoModel(nn.Module):
    """A compiled OpenVINO model behind the call of a transformers one.

    Attributes:
        inputs: Names of the tensors that it takes, in order.
    """

    def __init__(self, compiled: Any, inputs: Sequence[str], config: Any) -> None:
        super().__init__()
        self.request = compiled.create_infer_request()
        self.inputs = tuple(inputs)
        self.config = config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor]:
        """Map `[batch, tokens]` to logits; there is no cache."""
        del use_cache
        given = in_order(self.inputs, input_ids, attention_mask, token_type_ids)
        outputs = self.request.infer(
            [tensor.numpy() for tensor in given], share_inputs=True, share_outputs=True
        )
        return (torch.from_numpy(outputs[0]),)
