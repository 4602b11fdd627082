"""PyTorch's own flow, export and quantize (PT2E), with NNCF's SmoothQuant: the same batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ipex_sq.benchmarking.peer_model import PeerModel, input_names
from ipex_sq.models.body import LogitsForTracing, output_head
from ipex_sq.recipe.batching import Batch


def pt2e_int8(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Export `model`, quantize it by torchao's recipe for x86 with NNCF's SmoothQuant, compile it.

    Their defaults are kept: static int8 of weights and activations, the head too, one graph of the
    whole model with its weights frozen.

    Args:
        model: Float model; its head gets a weight of its own.
        batches: Calibration batches.
    """
    import nncf
    from nncf.experimental.torch.fx import quantize_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    logging.getLogger("nncf").setLevel(logging.ERROR)
    names = input_names(batches[0])
    rows = [tuple(batch[name] for name in names) for batch in batches]
    # One row would be exported as the only number of rows that there is.
    example = tuple(torch.cat([tensor, tensor])[:2] for tensor in rows[0])
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    _untie_head(model)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        exported = torch.export.export(
            LogitsForTracing(model, names),
            example,
            dynamic_shapes={"tensors": (sizes,) * len(names)},
        )
        quantized = quantize_pt2e(
            exported.module(),
            quantizer,
            nncf.Dataset(rows),
            subset_size=len(rows),
            smooth_quant=True,
        )
    # Of the process: as an option of one compilation it comes too late for Dynamo.
    torch._inductor.config.freezing = True
    return PeerModel(torch.compile(quantized, dynamic=True), names, model.config)


def _untie_head(model: nn.Module) -> None:
    """Give the head a weight of its own.

    NNCF 3.4 smooths a weight that the embedding shares, and so changes the embedding: the logits
    of the tiny Llama fell from 18.3 to 8.2 dB.
    """
    head = output_head(model)
    if head is not None:
        weight: Any = head.weight
        head.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
