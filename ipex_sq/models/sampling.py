"""One forward and backward pass over a few texts: what the predictions owe to each Linear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ipex_sq.errors import UnsupportedModelError
from ipex_sq.models.running import run_model
from ipex_sq.recipe.batching import Batch, rows_of
from ipex_sq.recipe.plan import SmoothGroup
from ipex_sq.recipe.samples import GroupSample, record_samples

SAMPLED_TEXTS = 8
"""On SmolLM2-135M 16 and 32 choose a little better and cost 2 and 4 times as much (ADR 4)."""

TEXTS_PER_SAMPLED = 4
"""At most one text in four is sampled; were it more, the others would say little about ranges."""


def sample_groups(
    model: nn.Module, groups: Sequence[SmoothGroup], batches: Sequence[Batch]
) -> dict[str, GroupSample]:
    """Sample what `groups` read and how their outputs move the predictions of `model`.

    Args:
        model: Float model; it is not changed.
        groups: Of its Linears.
        batches: Unpadded; `SAMPLED_TEXTS` texts evenly spread over them are run.

    Returns:
        By group key; a group that these texts never reach has none.
    """
    texts = sampled_texts(batches)
    tokens = sum(text["input_ids"].numel() for text in texts)
    generator = torch.Generator().manual_seed(0)
    with record_samples(model, groups, tokens) as recorder, _only_activations(model):
        for text in tqdm(texts, desc="sample", unit="text", disable=None, leave=False):
            recorder.predictions += run_backward(model, text, generator)
    return recorder.finish()


def run_backward(model: nn.Module, text: Batch, generator: torch.Generator) -> int:
    """Run one text, and backward from -log p of predictions drawn from the model's own.

    Returns:
        The number of predictions.
    """
    logits = run_model(model, text).float().flatten(end_dim=-2)
    drawn = draw_tokens(logits.detach().softmax(-1), generator)
    functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return logits.shape[0]


def draw_tokens(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token `[n]` from each row of `[n, vocabulary]`.

    By the cumulative sum: torch.multinomial draws a random number for every word, which takes
    longer than the model.
    """
    cumulative = probabilities.cumsum(dim=-1)
    level = torch.rand(len(probabilities), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level).clamp(max=probabilities.shape[-1] - 1)[:, 0]


def set_apart(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The texts that are not sampled, batched, and those that are; a lone text is both."""
    counts = [batch["input_ids"].shape[0] for batch in batches]
    if sum(counts) == 1:
        return list(batches), []
    sampled = set(_sampled_indices(sum(counts)))
    kept: list[Batch] = []
    start = 0
    for batch, count in zip(batches, counts, strict=True):
        rows = [row for row in range(count) if start + row not in sampled]
        if rows:
            kept.append({key: value[rows] for key, value in batch.items()})
        start += count
    return kept, list(sampled_texts(batches))


def sampled_texts(batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """The texts that `sample_groups` runs, evenly spread over `batches`, one by one."""
    texts = [row for batch in batches for row in rows_of(batch)]
    return [texts[index] for index in _sampled_indices(len(texts))]


def _sampled_indices(texts: int) -> list[int]:
    count = min(SAMPLED_TEXTS, max(1, texts // TEXTS_PER_SAMPLED))
    return [index * texts // count for index in range(count)]


@contextmanager
def _only_activations(model: Any) -> Iterator[None]:
    """Inside the block gradients flow through activations, and no weight gets one."""
    parameters = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in parameters:
        parameter.requires_grad_(False)

    def start(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        # A copy, because a model may scale its embeddings in place and a leaf must not change.
        return output.detach().requires_grad_(True).clone()

    try:
        with _embedding(model).register_forward_hook(start), torch.enable_grad():
            yield
    finally:
        for parameter, required in parameters.items():
            parameter.requires_grad_(required)


def _embedding(model: Any) -> nn.Module:
    """What embeds the tokens.

    Raises:
        UnsupportedModelError: The model does not say (Canine, which hashes characters).
    """
    try:
        found: nn.Module = model.get_input_embeddings()
    except NotImplementedError:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not say which module embeds its tokens, where the search "
            "of alpha starts: give alpha a number"
        ) from None
    return found
