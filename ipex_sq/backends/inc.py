"""Neural Compressor's own StaticQuant and SmoothQuant recipe: the baseline that users come from.

It follows the language-modeling example of neural-compressor 3.10: default configurations, every
operator type that IPEX can quantize (Linear, the head, add, matmul), prepare, calibrate on one
text at a time, convert.
Nothing of our recipe or plan is in it.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipex_sq.backends.ipex import (
    IpexBackend,
    count_int8_linears,
    quiet_ipex,
    tracing_inputs,
)
from ipex_sq.models.body import LogitsForTracing, in_order
from ipex_sq.recipe.batching import Batch, rows_of
from ipex_sq.system import installed_version

PACKAGE = "neural_compressor_pt"
DEFAULT_ALPHA = 0.5
"""What SmoothQuantConfig takes by default; the new API maps "auto" to it too."""


class TracedModel(nn.Module):
    """A traced model behind the call that the evaluations make."""

    def __init__(self, graph: Any, inputs: Sequence[str], config: Any) -> None:
        super().__init__()
        self.graph = graph
        self.config = config
        self.inputs = tuple(inputs)
        self.int8_linears = count_int8_linears(graph)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor]:
        """Map ids and mask, `[batch, tokens]`, to logits."""
        del use_cache
        outputs = self.graph(*in_order(self.inputs, input_ids, attention_mask, token_type_ids))
        return (outputs if isinstance(outputs, Tensor) else outputs[0],)


class IncBackend:
    """Owns its recipe: it quantizes from batches, not from a plan."""

    name = "inc"
    float_dtype = "fp32"

    @property
    def kernels(self) -> str:
        """As IPEX."""
        return IpexBackend().kernels

    def unsupported_reasons(self) -> list[str]:
        """IPEX's reasons, and a missing neural-compressor."""
        reasons = IpexBackend().unsupported_reasons()
        if installed_version(PACKAGE) is None:
            reasons.append("neural-compressor-pt is not installed: use requirements.txt")
        return reasons

    def quantize(
        self, model: nn.Module, batches: Sequence[Batch], alpha: float | None
    ) -> TracedModel:
        """Run Neural Compressor's recipe; consumes `model`.

        Args:
            model: Float model.
            batches: Calibration batches.
            alpha: Of its SmoothQuant, or None for its static recipe.
        """
        # It keeps its state in a file of the working directory.
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), _silenced():
            names, _ = tracing_inputs(batches[0])
            config = model.config  # the recipe may rebuild the model
            graph = _quantize(LogitsForTracing(model, names).eval(), batches, alpha)
            return TracedModel(graph, names, config)


def _quantize(model: nn.Module, batches: Sequence[Batch], alpha: float | None) -> Any:
    import intel_extension_for_pytorch  # noqa: F401  # without it the static recipe is another one
    from neural_compressor.torch.quantization import (
        SmoothQuantConfig,
        convert,
        get_default_static_config,
        prepare,
    )

    config = get_default_static_config() if alpha is None else SmoothQuantConfig(alpha=alpha)
    _, inputs = tracing_inputs(batches[0])

    texts = [row for batch in batches for row in rows_of(batch)]

    def run(prepared: nn.Module) -> None:
        for text in tqdm(texts, desc="inc", unit="text", disable=None, leave=False):
            prepared(*_padded(text))

    with torch.no_grad():
        prepared = prepare(model, config, example_inputs=inputs)
        run(prepared)
        return convert(prepared)


def _padded(batch: Batch) -> tuple[Tensor, ...]:
    """One padding token behind every row: its calibration must see the operators of the trace."""
    names, _ = tracing_inputs(batch)
    whole = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
    return tuple(torch.nn.functional.pad(whole[name], (0, 1)) for name in names)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet_ipex():
            yield
    finally:
        logging.disable(previous)
