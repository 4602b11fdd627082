"""ONNX Runtime's static int8: what a user would pick instead, on the same batches.

Its SmoothQuant needs neural-compressor 2, which is not installed beside it: the recipe is plain.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.benchmarking.peer_model import PeerModel, input_names
from ipex_sq.models.body import LogitsForTracing
from ipex_sq.recipe.batching import Batch

LINEARS = ["MatMul", "Gemm"]
"""What a Linear becomes in ONNX, without and with a bias in the same operator."""


def onnxruntime_int8(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Export `model`, quantize its Linears by ONNX Runtime, the head too, and load it.

    Activations are uint8 per tensor over the range that was seen, weights int8 per output channel.
    Outputs stay float, and so does the attention: rounding these too, as its defaults do, costs
    accuracy. It uses as many threads as torch.

    Args:
        model: Float model; left as it is.
        batches: Calibration batches.
    """
    import onnxruntime
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_static

    names = input_names(batches[0])
    logging.getLogger("onnxruntime").setLevel(logging.ERROR)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        exported, ready, quantized = (
            Path(folder) / f"{step}.onnx" for step in ("exported", "ready", "quantized")
        )
        _export(model, batches[0], exported)
        # Weights beside the graph: a file of more than 2 GiB cannot be written.
        quant_pre_process(exported, ready, skip_symbolic_shape=True, save_as_external_data=True)
        quantize_static(
            ready,
            quantized,
            _Batches(batches, names),
            op_types_to_quantize=LINEARS,
            nodes_to_exclude=_products_without_weight(ready),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"OpTypesToExcludeOutputQuantization": LINEARS},
        )
        session = onnxruntime.InferenceSession(quantized, options)

    def run(*tensors: Tensor) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return PeerModel(run, names, model.config)


def _export(model: nn.Module, batch: Batch, path: Path) -> None:
    """Write the model for any batch size and length.

    By tracing: the other exporter needs more packages and computes the same.
    """
    names = input_names(batch)
    with torch.no_grad():
        torch.onnx.export(
            LogitsForTracing(model, names),
            tuple(batch[name] for name in names),
            str(path),
            input_names=list(names),
            output_names=["logits"],
            dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names},
            dynamo=False,
        )


def _products_without_weight(path: Path) -> list[str]:
    """Names of the matrix products of two activations: the attention."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {weight.name for weight in graph.initializer}
    products = [node for node in graph.node if node.op_type in LINEARS]
    return [node.name for node in products if not weights.intersection(node.input)]


class _Batches:
    """Calibration batches as `quantize_static` asks for them."""

    def __init__(self, batches: Sequence[Batch], names: Sequence[str]) -> None:
        self._rows = iter([{name: batch[name].numpy() for name in names} for batch in batches])

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, or None after the last."""
        return next(self._rows, None)
