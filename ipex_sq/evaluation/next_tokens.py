"""Every token of a few texts predicted from those before it.

Far less noisy than last words: 32 texts hold some 2,500 predictions and 32 last words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ipex_sq.distributed import share
from ipex_sq.evaluation.pairing import perplexity_of
from ipex_sq.models.running import run_model
from ipex_sq.recipe.batching import Batch


@dataclass(frozen=True)
class NextTokens:
    """Predictions of all tokens but the first of each text, in the order of the batches.

    Attributes:
        correct: The token was the greedy choice.
        log_probability: Mean log p(token | those before), in nats.
    """

    correct: tuple[bool, ...]
    log_probability: float

    @property
    def perplexity(self) -> float:
        """exp(-mean log p(token)), > 1; may be infinite."""
        return perplexity_of(self.log_probability)


@torch.inference_mode()
def predict_tokens(model: nn.Module, batches: Sequence[Batch]) -> NextTokens:
    """Score a causal language model on unpadded batches of `input_ids`, `[batch, tokens]`."""

    def score(batch: Batch) -> tuple[list[bool], float]:
        logits = run_model(model, batch)[:, :-1].float()
        targets = batch["input_ids"][:, 1:]
        logs = logits.log_softmax(dim=-1).gather(2, targets[..., None])
        correct = (logits.argmax(dim=-1) == targets).flatten().tolist()
        return correct, float(logs.double().sum())

    correct: list[bool] = []
    total = 0.0
    for right, log in share(batches, score, size=lambda batch: batch["input_ids"].numel()):
        correct += right
        total += log
    return NextTokens(tuple(correct), total / len(correct))
