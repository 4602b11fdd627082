"""OpenVINO with NNCF's int8 SmoothQuant: what a user would pick instead, on the same batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ipex_sq.benchmarking.peer_model import PeerModel, input_names
from ipex_sq.models.body import LogitsForTracing
from ipex_sq.recipe.batching import Batch


def openvino_int8(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Quantize `model` by NNCF's recipe for transformers and compile it for the CPU.

    Its defaults are kept: static int8 of weights and activations, SmoothQuant, the head too. It
    uses as many threads as torch.

    Args:
        model: Float model; left as it is.
        batches: Calibration batches.
    """
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    names = input_names(batches[0])
    with torch.no_grad():
        converted = openvino.convert_model(
            LogitsForTracing(model, names),
            example_input=tuple(batches[0][name] for name in names),
        )
    rows = [tuple(batch[name].numpy() for name in names) for batch in batches]
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
    request = compiled.create_infer_request()

    def run(*tensors: Tensor) -> Tensor:
        outputs = request.infer(
            [tensor.numpy() for tensor in tensors], share_inputs=True, share_outputs=True
        )
        return torch.from_numpy(outputs[0])

    return PeerModel(run, names, model.config)
