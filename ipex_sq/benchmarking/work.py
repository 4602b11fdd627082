"""How much the Linears of a model multiply, counted by running it on a few tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.benchmarking.limits import BYTES, Limits
from ipex_sq.models.body import logits_at
from ipex_sq.models.first_token import copy_modules, find_first_token, give_values
from ipex_sq.models.loading import CAUSAL_LM, task_of
from ipex_sq.models.running import run_model
from ipex_sq.models.topology import quantizable_linears, stacked_weights

logger = logging.getLogger(__name__)

FEW_TOKENS = (4, 6)
"""Two lengths tell what runs for each token from what runs once for each text."""

Rows = dict[nn.Linear, int]


@dataclass(frozen=True)
class Work:
    """The Linears of a model: what its speed is bounded by. Attention is not counted.

    Attributes:
        body: Products for one token of the Linears that may become int8: their weights, as often
            as they run.
        head: Products for one prediction of the others: the head, and what stays float.
        precision: Of the body.
        head_precision: Of the head.
        first_token: Those of the body that a classifier needs for one token of each text only.
        float_body: Products for one token of what stays float, at the head's precision.
        repeated: Products of the body with weights that the same token has met already, in a
            layer that runs several times.
        unknown: Why it could not be counted; empty where it could.
    """

    body: float
    head: float
    precision: str
    head_precision: str
    first_token: float = 0
    float_body: float = 0
    repeated: float = 0
    unknown: str = ""

    def least_seconds(self, limits: Limits, tokens: float, predictions: float) -> float:
        """No run is faster: its products at the measured rates, or its weights read once.

        Of experts, those of one token are read.

        Args:
            limits: Of this machine.
            tokens: That run through the body.
            predictions: Positions whose logits are computed.
        """
        body = (self.body - self.first_token) * tokens + self.first_token * predictions
        head = self.float_body * tokens + self.head * predictions
        products = 2 * body / limits.rate(self.precision)
        products += 2 * head / limits.rate(self.head_precision)
        read = (self.body - self.repeated) * BYTES[self.precision]
        read += (self.float_body + self.head) * BYTES[self.head_precision]
        return max(products, read / (1e9 * limits.bandwidth_gbs))


def work_of(model: nn.Module, precision: str, head_precision: str) -> Work:
    """Count the products of a float model whose Linears will run in `precision`.

    One on the meta device is given values: it is run on a few tokens.
    """
    found, _ = quantizable_linears(model)
    body = set(found.values())
    stacked = next(iter(stacked_weights(model)), None)
    if stacked is not None:
        reason = f"{stacked} is multiplied with, and is the weight of no Linear"
        return Work(0, 0, precision, head_precision, unknown=reason)
    give_values(model)
    try:
        short, long = (_rows(model, tokens) for tokens in FEW_TOKENS)
    except Exception as error:  # noqa: BLE001  # of the model's own code, which a real text may not raise
        logger.debug("the products are not counted: %r", error)
        reason = f"the model does not run on {FEW_TOKENS[0]} tokens"
        return Work(0, 0, precision, head_precision, unknown=reason)
    first_token = find_first_token(model)
    tail = body.intersection(first_token.linears) if first_token else set()
    body_token, body_text = _products(short, long, body - tail)
    head_token, head_text = _products(short, long, short.keys() - body)
    few = body_text + sum(linear.weight.numel() for linear in tail)
    repeated = sum(
        linear.weight.numel() * max(0.0, short[linear] / FEW_TOKENS[0] - 1) for linear in body
    )
    return Work(
        *(body_token + few, head_text, precision, head_precision),
        first_token=few,
        float_body=head_token,
        repeated=repeated,
    )


@torch.no_grad()
def _rows(model: nn.Module, tokens: int) -> Rows:
    """How many rows each Linear multiplies for one text, whose last logits alone are asked for."""
    copied = copy_modules(model)  # a short text may make another model of it
    rows: Rows = {}
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    ids = torch.randint(2, int(config.vocab_size), (1, tokens), generator=generator)
    with ExitStack() as hooks:
        for linear, theirs in zip(model.modules(), copied.modules(), strict=True):
            if isinstance(linear, nn.Linear):
                rows[linear] = 0
                hooks.enter_context(theirs.register_forward_hook(_counter(rows, linear)))
        if task_of(model) == CAUSAL_LM:
            hooks.enter_context(logits_at(copied, torch.tensor([tokens - 1])))
        run_model(copied, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return rows


def _counter(rows: Rows, linear: nn.Linear) -> Callable[[nn.Module, Any, Tensor], None]:
    def count(_module: nn.Module, _args: Any, output: Tensor) -> None:
        rows[linear] += output.numel() // linear.out_features

    return count


def _products(short: Rows, long: Rows, linears: Iterable[nn.Linear]) -> tuple[float, float]:
    """For each token, and for each text besides.

    Of the sum: which expert has a token is chance, how many have it is not.
    """
    chosen = list(linears)
    few, more = (sum(item.weight.numel() * rows[item] for item in chosen) for rows in (short, long))
    least, most = FEW_TOKENS
    for_token = (more - few) / (most - least)
    return for_token, few - least * for_token
