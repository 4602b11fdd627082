"""CTranslate2's int8: what a user would pick instead. It rounds activations per token, as it runs.

It has a model of each family of its own, into which the weights are copied.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ipex_sq.benchmarking.peer_model import PeerModel, input_names
from ipex_sq.errors import UnsupportedModelError
from ipex_sq.models.loading import CAUSAL_LM, task_of
from ipex_sq.models.running import run_model
from ipex_sq.recipe.batching import Batch

MOST_ERROR = 1e-3
"""Of the logits of a converted float model, relative; 1e-6 was measured where its family's model is
the same, 0.36 for Gemma 2 (version 4.8.5)."""


def ctranslate2_int8(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Convert `model`, prove that the converted one computes the same, and load it in int8.

    Weights are int8 per output channel, activations int8 per token, the head and the embeddings
    too; nothing is calibrated. It uses as many threads as torch.

    Args:
        model: Float model; the converter takes it apart.
        batches: The first is what the converted model is tried on.

    Raises:
        UnsupportedModelError: Not a decoder, or the converted model computes something else.
    """
    if task_of(model) != CAUSAL_LM:
        raise UnsupportedModelError("CTranslate2 has no classification head")
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc, unused-ignore]
        """Takes the model at hand, and needs no tokenizer."""

        def load_model(self, *_args: Any, **_options: Any) -> nn.Module:
            return model

        def load_tokenizer(self, *_args: Any, **_options: Any) -> _Ids:
            return _Ids(int(config.vocab_size))

    config: Any = model.config
    batch = {name: batches[0][name][:2] for name in input_names(batches[0])}
    with torch.inference_mode():
        wanted = run_model(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        converted = str(Path(folder) / "converted")
        Converter(folder).convert(converted)
        error = (run_model(_load(converted, "float32", config), batch) - wanted).norm()
        if not error <= MOST_ERROR * wanted.norm():
            raise UnsupportedModelError(
                "CTranslate2's model of this family computes something else: in fp32 its logits "
                f"are off by {float(error / wanted.norm()):.2g} of their norm"
            )
        return _load(converted, "int8", config)


def _load(folder: str, precision: str, config: Any) -> PeerModel:
    import ctranslate2

    generator = ctranslate2.Generator(
        folder, device="cpu", compute_type=precision, intra_threads=torch.get_num_threads()
    )

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        """Padding, if any, is at the end."""
        tokens, lengths = (
            ctranslate2.StorageView.from_array(tensor.int().numpy())
            for tensor in (ids, mask.sum(dim=1))
        )
        return torch.from_numpy(numpy.asarray(generator.forward_batch(tokens, lengths)))

    return PeerModel(run, ("input_ids", "attention_mask"), config)


class _Ids:
    """Stands where a tokenizer is asked for: every id is its own token."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.bos_token = self.eos_token = self.unk_token = str(0)

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return {str(index): index for index in range(self._size)}
