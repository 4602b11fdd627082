"""LAMBADA, as lm-evaluation-harness defines it.

The whole passage is tokenised, with the special tokens that the tokenizer puts in front by
default but without those that it appends, and cut where the tokens of the context end.
`last_word_accuracy` asks that every token of the last word be the greedy choice given the true text
before it; `last_token_accuracy` asks it of the last token alone. Logits are computed only at the
positions asked for: a hook hands the head just those rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipex_sq.config import EvaluationConfig
from ipex_sq.data.documents import Document
from ipex_sq.data.special_tokens import added_tokens
from ipex_sq.distributed import share
from ipex_sq.errors import DataError, NumericalCheckError
from ipex_sq.evaluation.pairing import perplexity_of, standard_error
from ipex_sq.models.body import logits_at
from ipex_sq.models.positions import position_limit
from ipex_sq.models.vocabulary import check_token_ids

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedDocument:
    """Token ids of a passage; the last `target_tokens` of them are the last word."""

    ids: tuple[int, ...]
    target_tokens: int


@dataclass(frozen=True)
class LambadaResult:
    """Scores of every document, in the order given.

    Attributes:
        word_correct: Every token of the last word was the greedy choice.
        token_correct: The last token was.
        log_probability: log p(last word | context), in nats.
    """

    word_correct: tuple[bool, ...]
    token_correct: tuple[bool, ...]
    log_probability: tuple[float, ...]

    @property
    def correct(self) -> tuple[bool, ...]:
        """By the headline, the whole last word."""
        return self.word_correct

    @property
    def last_word_accuracy(self) -> float:
        """Share of documents, 0 to 1."""
        return sum(self.word_correct) / len(self.word_correct)

    @property
    def last_token_accuracy(self) -> float:
        """Share of documents, 0 to 1."""
        return sum(self.token_correct) / len(self.token_correct)

    @property
    def perplexity(self) -> float:
        """exp(-mean log p(last word)), > 1; may be infinite."""
        return perplexity_of(sum(self.log_probability) / len(self.log_probability))

    @property
    def json_perplexity(self) -> float | None:
        """The same for a result file: JSON has no infinity, None stands for it."""
        return self.perplexity if math.isfinite(self.perplexity) else None

    @property
    def stderr(self) -> float:
        """Standard error of `last_word_accuracy` (sample deviation over root n, as lm-eval)."""
        return standard_error(self.word_correct)


def encode_documents(
    documents: Sequence[Document], tokenizer: Any, max_positions: int | None = None
) -> list[EncodedDocument]:
    """Tokenise passages and mark the tokens of the last word.

    They are those behind the tokens that the passage shares with its context alone. A tokenizer
    whose pieces cross spaces joins the end of the context to the last word: what it joined is
    predicted with it, for given as context it would tell a part of the word.

    Raises:
        DataError: No documents, one whose last word has no tokens of its own, or one longer than
            the model's positions.
    """
    if not documents:
        raise DataError("there are no documents to evaluate")
    before, after = added_tokens(tokenizer, documents[0].text)
    encoded = []
    for number, document in enumerate(documents, 1):
        whole, context = (
            _ids(tokenizer, text, after) for text in (document.text, document.context)
        )
        shared = _shared_tokens(whole, context)
        targets = len(whole) - shared
        if targets < 1 or shared <= before:
            raise DataError(f"document {number}: its last word has no tokens of its own")
        if max_positions is not None and len(whole) > max_positions:
            raise DataError(
                f"document {number} has {len(whole)} tokens, the model has {max_positions} "
                "positions: shorten it"
            )
        encoded.append(EncodedDocument(tuple(whole), targets))
    return encoded


def _ids(tokenizer: Any, text: str, appended: int) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids[: len(ids) - appended]


def _shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = zip(one, other, strict=False)
    differing = (index for index, (a, b) in enumerate(pairs) if a != b)
    return next(differing, min(len(one), len(other)))


def evaluate_lambada(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    config: EvaluationConfig = EvaluationConfig(),  # noqa: B008
) -> LambadaResult:
    """Score every document. The result does not depend on batch size or order.

    Raises:
        DataError: No documents, or one that is too long.
        NumericalCheckError: The model produced logits that are not finite.
    """
    encoded = _encode_for(model, documents, tokenizer)
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids), reverse=True)
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    right: list[bool] = []

    def score(indices: list[int]) -> list[_Score]:
        scored = _score_batch(model, [encoded[index] for index in indices])
        right.extend(score[0] for score in scored)
        return scored

    def watched(mine: list[list[int]]) -> Iterator[list[int]]:
        bar = tqdm(mine, desc="evaluate", unit="batch", disable=None, leave=False)
        for number, indices in enumerate(bar, 1):
            yield indices
            accuracy = sum(right) / len(right)
            bar.set_postfix_str(f"last word {accuracy:.4f}", refresh=False)
            if bar.disable and number % config.log_frequency == 0:
                logger.info("%d of %d batches, last word %.4f", number, len(mine), accuracy)

    def length(indices: list[int]) -> int:
        return sum(len(encoded[index].ids) for index in indices)

    shared = share(batches, score, size=length, progress=watched)
    scores = dict(zip(chain(*batches), chain.from_iterable(shared), strict=True))
    columns = zip(*(scores[index] for index in range(len(encoded))), strict=True)
    words, tokens, logs = columns
    return LambadaResult(words, tokens, logs)


def check_documents(model: nn.Module, tokenizer: Any, documents: Sequence[Document]) -> None:
    """Refuse documents that could not be scored, before the work.

    Args:
        model: Float or int8, as only its config is read.
        tokenizer: The model's.
        documents: Those to evaluate.

    Raises:
        DataError: See `encode_documents`.
    """
    _encode_for(model, documents, tokenizer)


def warm_up(
    model: nn.Module, tokenizer: Any, documents: Sequence[Document], config: EvaluationConfig
) -> None:
    """Score a batch with padding and one without on every process: here a backend compiles.

    Raises:
        DataError: See `encode_documents`.
        NumericalCheckError: See `evaluate_lambada`.
    """
    for few in (documents[: config.batch_size], [documents[0], documents[0]]):
        _score_batch(model, _encode_for(model, few, tokenizer))


_Score = tuple[bool, bool, float]
"""Of a document, as the columns of `LambadaResult`."""


def _encode_for(
    model: nn.Module, documents: Sequence[Document], tokenizer: Any
) -> list[EncodedDocument]:
    configured = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    limits = [limit for limit in (configured, position_limit(model)) if limit is not None]
    encoded = encode_documents(documents, tokenizer, min(limits, default=None))
    check_token_ids(model, max(max(item.ids) for item in encoded))
    return encoded


@torch.inference_mode()
def _score_batch(model: nn.Module, rows: Sequence[EncodedDocument]) -> list[_Score]:
    """Score documents that fit into one forward pass."""
    width = max(len(row.ids) for row in rows) - 1  # the last token is only a target
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    # All ones: behind the last token padding is out of a causal model's sight, and without a real
    # mask attention takes one and the same path for every batch (a mask changes its last bits,
    # which int8 rounding can turn into another answer).
    mask = torch.ones_like(ids)
    picks = []
    for index, row in enumerate(rows):
        inputs = row.ids[:-1]
        ids[index, : len(inputs)] = torch.tensor(inputs)
        start = len(inputs) - row.target_tokens
        picks += [index * width + position for position in range(start, len(inputs))]
    chosen = torch.tensor(picks)
    with logits_at(model, chosen):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    logits = logits.reshape(-1, logits.shape[-1])
    if len(logits) != len(picks):  # a traced model gives every position
        logits = logits[chosen]
    return _score_rows(logits.float(), rows)


def _score_rows(logits: Tensor, rows: Sequence[EncodedDocument]) -> list[_Score]:
    if not bool(torch.isfinite(logits).all()):
        raise NumericalCheckError("the model's logits are not finite: it cannot be scored")
    targets = torch.tensor([token for row in rows for token in row.ids[-row.target_tokens :]])
    greedy = logits.argmax(dim=-1) == targets
    logs = logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
    scores, start = [], 0
    for row in rows:
        end = start + row.target_tokens
        correct = greedy[start:end]
        log = float(logs[start:end].double().sum())
        scores.append((bool(correct.all()), bool(correct[-1]), log))
        start = end
    return scores
