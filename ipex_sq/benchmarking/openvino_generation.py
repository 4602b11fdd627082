"""OpenVINO's int8 with a key-value cache that the graph itself keeps: its fast path to generate."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.benchmarking.openvino_peer import infer_request, quantized_graph
from ipex_sq.errors import UnsupportedModelError
from ipex_sq.models.decoding import StepForTracing, empty_past
from ipex_sq.recipe.batching import Batch

LEADING = 4
"""Inputs of the graph before the cache: ids, mask, positions, picks."""

HELD = 3
"""Tokens in the cache of the traced example; any number but 0 and 1 will do."""


class OpenVinoGenerator(nn.Module):
    """Generates greedily with a graph that keeps its cache.

    Attributes:
        request: Runs the graph.
        window: Sliding window of the model, in tokens; the graph has none.
    """

    def __init__(self, request: Any, window: int | None) -> None:
        super().__init__()
        self.request = request
        self.window = window

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        """Map whole texts `[batch, tokens]`, all of one length, to the logits of every token."""
        self._begin(attention_mask, input_ids.shape[1])
        rows, tokens = input_ids.shape
        logits = self._step(input_ids, 0, torch.arange(rows * tokens))
        return (logits.reshape(rows, tokens, -1).clone(),)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        stopping_criteria: Sequence[Callable[..., Tensor]] = (),
        **_greedy: Any,
    ) -> Tensor:
        """Append the likeliest token `max_new_tokens` times to each row of `[batch, tokens]`.

        The loop is bare, which favours OpenVINO: that of transformers prepares the inputs of every
        step and looks for an end token. Here no token ends a text, and none is ruled out.

        Args:
            input_ids: All rows of one length.
            attention_mask: All ones.
            max_new_tokens: Fewer come where the criteria stop all rows.
            stopping_criteria: Called with the text and its last logits after every token.

        Raises:
            UnsupportedModelError: Rows are padded, or the text outgrows the sliding window.
        """
        self._begin(attention_mask, input_ids.shape[1] + max_new_tokens)
        text, new, held = input_ids, input_ids, 0
        for _ in range(max_new_tokens):
            rows, tokens = new.shape
            logits = self._step(new, held, torch.arange(1, rows + 1) * tokens - 1)[0]
            held += tokens
            new = logits.argmax(-1, keepdim=True)
            text = torch.cat((text, new), dim=1)
            stopped = [criterion(text, logits) for criterion in stopping_criteria]
            if any(bool(rows_stopped.all()) for rows_stopped in stopped):
                break
        return text

    def _begin(self, attention_mask: Tensor | None, most: int) -> None:
        if attention_mask is not None and not bool(attention_mask.all()):
            raise UnsupportedModelError("openvino generates here for rows without padding only")
        if self.window is not None and most > self.window:
            raise UnsupportedModelError(
                f"openvino's graph has no sliding window, and {most} tokens outgrow {self.window}"
            )
        self.request.reset_state()

    def _step(self, ids: Tensor, held: int, picks: Tensor) -> Tensor:
        """Logits `[1, n, vocabulary]` at `picks`, in memory that the next step writes over."""
        beams = torch.arange(len(ids), dtype=torch.int32)  # each row goes on from itself
        inputs = [*_around(ids, held), picks, beams]
        outputs = self.request.infer(
            [tensor.numpy() for tensor in inputs], share_inputs=True, share_outputs=True
        )
        return torch.from_numpy(outputs[0])


def openvino_int8_to_generate(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Quantize `model` as `openvino_int8` does, into a graph that keeps its key-value cache.

    It differs in one thing: the attention products stay float. With their inputs rounded, as NNCF
    would, the CPU plugin does not fuse attention with the cache, and a token takes twice the time.
    The plugin's default precision of the cache is kept: u8 (OpenVINO 2026.4 on x86).

    Args:
        model: Float model; left as it is.
        batches: Calibration batches. The logits of all their positions are computed, as in
            `openvino_int8`, so that the ranges are the same.
    """
    import nncf

    past = empty_past(model, 1)
    rows = []
    for batch in batches:
        ids = batch["input_ids"]
        held = [tensor.expand(len(ids), -1, -1, -1) for tensor in past]
        ids, _, positions = _around(ids, 0)
        inputs = (ids, batch["attention_mask"], positions, torch.arange(ids.numel()), *held)
        rows.append(tuple(tensor.numpy() for tensor in inputs))
    attention = nncf.IgnoredScope(types=["ScaledDotProductAttention"], validate=False)
    graph = quantized_graph(_converted(model, past), rows, ignored_scope=attention)
    _make_stateful(graph)
    window = getattr(model.config, "sliding_window", None)
    return OpenVinoGenerator(infer_request(_saved_and_read(graph)), window)


def _around(ids: Tensor, held: int) -> tuple[Tensor, Tensor, Tensor]:
    """`ids` `[batch, new]`, the mask of the whole text and the positions of `ids` in it."""
    rows, tokens = ids.shape
    positions = torch.arange(held, held + tokens).repeat(rows, 1)
    return ids, torch.ones(rows, held + tokens, dtype=torch.long), positions


def _converted(model: nn.Module, past: Sequence[Tensor]) -> Any:
    """The graph of one step, of any number of rows and tokens."""
    import openvino

    held = [tensor.new_zeros(2, tensor.shape[1], HELD, tensor.shape[3]) for tensor in past]
    example = (*_around(torch.zeros(2, 2, dtype=torch.long), HELD), torch.tensor([1, 3]), *held)
    with torch.no_grad():
        graph = openvino.convert_model(StepForTracing(model), example_input=example)
    shapes = {}
    for port, tensor in zip(graph.inputs, example, strict=True):
        kept = (1, 3) if tensor.ndim == 4 else ()  # heads and their size
        shapes[port] = [tensor.shape[dim] if dim in kept else -1 for dim in range(tensor.ndim)]
    graph.reshape({port: openvino.PartialShape(shape) for port, shape in shapes.items()})
    return graph


def _make_stateful(graph: Any) -> None:
    """Turn the cache's inputs and outputs into state, in place.

    The CPU plugin fuses attention with a cache that is gathered by "beam_idx", the row that each
    row goes on from, and that begins with as many rows as the ids have.
    """
    import openvino
    from openvino import opset13 as ops
    from openvino.passes import MakeStateful, Manager

    ids, past = graph.input(0), graph.get_parameters()[LEADING:]
    beams = ops.parameter([-1], dtype=openvino.Type.i32, name="beam_idx")
    for parameter in past:
        readers = parameter.output(0).get_target_inputs()
        gathered = ops.gather(parameter, beams, ops.constant(0))
        for reader in readers:
            reader.replace_source_output(gathered.output(0))
    graph.add_parameters([beams])
    graph.validate_nodes_and_infer_types()
    manager = Manager()
    manager.register_pass(MakeStateful(list(zip(past, graph.get_results()[1:], strict=True))))
    manager.run_passes(graph)
    rows = ops.gather(ops.shape_of(ids, "i64"), ops.constant([0]), ops.constant(0))
    for state in [op for op in graph.get_ops() if op.get_type_name() == "ReadValue"]:
        _, heads, _, size = state.get_output_partial_shape(0)
        lengths = [ops.constant([number]) for number in (heads.get_length(), 0, size.get_length())]
        shape = ops.concat([rows, *lengths], axis=0)
        zero = ops.constant(0.0, dtype=state.get_output_element_type(0))
        state.set_arguments([ops.broadcast(zero, shape)])
    graph.validate_nodes_and_infer_types()


def _saved_and_read(graph: Any) -> Any:
    """The graph as users get it, from a file.

    A converted graph marks constants as not to be folded, and with these marks the CPU plugin does
    not fuse rotary embeddings. A file does not keep them.
    """
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(graph, path, compress_to_fp16=False)
        return openvino.Core().read_model(path)
