"""OpenVINO with NNCF's int8 SmoothQuant: what a user would pick instead, on the same batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

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
    import openvino

    names = input_names(batches[0])
    with torch.no_grad():
        converted = openvino.convert_model(
            LogitsForTracing(model, names),
            example_input=tuple(batches[0][name] for name in names),
        )
    rows = [tuple(batch[name].numpy() for name in names) for batch in batches]
    request = infer_request(quantized_graph(converted, rows))

    def run(*tensors: Tensor) -> Tensor:
        outputs = request.infer(
            [tensor.numpy() for tensor in tensors], share_inputs=True, share_outputs=True
        )
        return torch.from_numpy(outputs[0])

    return PeerModel(run, names, model.config)


def quantized_graph(graph: Any, rows: Sequence[tuple[Any, ...]], **settings: Any) -> Any:
    """Quantize an OpenVINO graph by NNCF's recipe for transformers.

    Args:
        graph: Float.
        rows: Its inputs, batch by batch, to calibrate on.
        settings: Others of `nncf.quantize`.
    """
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf.quantize(
        graph,
        nncf.Dataset(rows),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(rows),
        **settings,
    )


def infer_request(graph: Any) -> Any:
    """Compile a graph for the CPU, with as many threads as torch, and hand out what runs it."""
    import openvino

    compiled = openvino.compile_model(
        graph,
        "CPU",
        {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()},
    )
    return compiled.create_infer_request()
