"""Calibration statistics as a JSON file: one serves every alpha, and only the model it is of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipex_sq.errors import CheckpointError
from ipex_sq.recipe.act_stats import ActStats
from ipex_sq.recipe.observers import LinearStats

FORMAT = "ipex_sq activation scales"
SCALES_VERSION = 1


@dataclass(frozen=True)
class Scales:
    """What a scales file holds.

    Attributes:
        model: Name as it was given, and `sha256` of its weights.
        tokenizer: `sha256` of its vocabulary.
        linears: Input statistics by module path.
        example: One calibration text, `[1, tokens]` each tensor.
        texts: Number of calibration texts.
        tokens: Number of their tokens.
        source: Name, split and digest of the texts, and how they were cut.
    """

    model: Mapping[str, str]
    tokenizer: Mapping[str, str]
    linears: Mapping[str, LinearStats]
    example: Mapping[str, Tensor]
    texts: int
    tokens: int
    source: Mapping[str, Any]


def scales_to_json(stats: ActStats, model: Mapping[str, str], tokenizer: Mapping[str, str]) -> str:
    """The statistics as JSON; floats keep every bit."""
    document = {
        "format": FORMAT,
        "version": SCALES_VERSION,
        "model": dict(model),
        "tokenizer": dict(tokenizer),
        "texts": stats.texts,
        "tokens": stats.tokens,
        "source": dict(stats.source),
        "example": {name: tensor.tolist() for name, tensor in stats.example.items()},
        "linears": {
            name: {
                "min": item.minimum.tolist(),
                "max": item.maximum.tolist(),
                "absmax": item.act_absmax.tolist(),
            }
            for name, item in stats.linears.items()
        },
    }
    return json.dumps(document)


def scales_from_json(text: str, where: str) -> Scales:
    """Read what `scales_to_json` wrote.

    Args:
        text: The file's content.
        where: Its name, for errors.

    Raises:
        CheckpointError: Damaged, no scales file, of another version, or without sense (a maximum
            below a minimum, a value that is not finite).
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where} is no JSON ({error.msg}): make it again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{where} is no scales file of ipex_sq: use generate-scales")
    if document.get("version") != SCALES_VERSION:
        raise CheckpointError(
            f"{where} has version {document.get('version')}, this ipex_sq reads {SCALES_VERSION}: "
            "make it again"
        )
    try:
        return Scales(
            model=document["model"],
            tokenizer=document["tokenizer"],
            linears={
                name: _stats(item, f"{where}: {name!r}")
                for name, item in document["linears"].items()
            },
            example={name: torch.tensor(rows) for name, rows in document["example"].items()},
            texts=document["texts"],
            tokens=document["tokens"],
            source=document["source"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{where} is damaged ({error!r}): make it again") from error


def _stats(item: Mapping[str, Any], where: str) -> LinearStats:
    low, high = (torch.tensor(item[key], dtype=torch.float32) for key in ("min", "max"))
    ordered = low.shape == high.shape and bool((low <= high).all())
    finite = bool(low.isfinite().all() and high.isfinite().all())
    absmax = torch.tensor(item["absmax"], dtype=torch.float32)
    if not (ordered and finite and torch.equal(LinearStats(low, high).act_absmax, absmax)):
        raise CheckpointError(f"{where} holds statistics that contradict each other: make it again")
    return LinearStats(low, high)
