"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights rounded so that their errors cancel.

Rounding to nearest keeps each weight's error small; what matters is the error of the output. Input
channels are rounded one after the other, and each takes over what the ones before it did to the
output, as far as it can. Written as LDLQ (Chee et al. 2023, arXiv 2307.13304: it is the same): with
H = U D U^T, U unit upper triangular, channel k is rounded at w_k + sum_j<k U_jk (w_j - q_j).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ipex_sq.distributed import collect, owners, processes, share
from ipex_sq.errors import CalibrationError
from ipex_sq.recipe.hooks import hooked
from ipex_sq.recipe.qparams import WEIGHT_MAXIMUM, int8_sums, quantize_weight, weight_scale

ROWS_PER_CHANNEL = 2
"""Tokens behind a Hessian, where the texts have as many. On SmolLM2-135M half as many cost 10 % of
expected KL, and all tokens of 128 texts (7 per channel of down_proj) gain 5 % (docs/log.md)."""

MOST_HESSIAN_BYTES = 8 * 2**30
"""Of all Hessians of a model together."""

MOST_WAITING = 1024
"""Rows that wait for one product: a few at a time cost more in reading the sum than in adding."""

DAMPING = 0.01
"""Of the mean diagonal, added to the diagonal: the paper's value. 0.001 to 0.1 are alike here."""

BLOCK = 64
"""Channels that take over the errors of all before them in one product, and then among them."""

NUMBERS_AT_ONCE = 2**25
"""Of a weight; rows are independent of each other, and rounding them holds four copies."""

TOGETHER = 4
"""Channels rounded at once, without regard to each other: one by one takes a third longer and gains
less than two runs differ."""

HASH_BITS = 2**31 - 1
HASH_FACTORS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)
"""Odd, below 2^32: of the golden ratio, and of MurmurHash3's last step."""


def fit_hessians(in_features: Iterable[int]) -> bool:
    """Whether the Hessians of inputs with so many channels are gathered."""
    return sum(4 * channels**2 for channels in in_features) <= MOST_HESSIAN_BYTES


Rows = tuple[int, Tensor]
"""Inputs `[rows, in_features]`, and how many tokens the batches before theirs hold."""


class HessianRecorder:
    """Sums x x^T of one Linear's inputs, of one token in n, each channel rounded to int8.

    Which tokens, and the order of the sum, do not depend on which process ran a batch.

    Attributes:
        size: Work that the sum is.
        kept: What was observed and not summed yet.
    """

    def __init__(self, channels: int, tokens: int, *, at_once: bool = True) -> None:
        """`at_once`: every batch is seen here, and summed when enough rows wait."""
        self.size = channels**2
        self.kept: list[Rows] = []
        self._every = max(tokens // (ROWS_PER_CHANNEL * channels), 1)
        self._at_once = at_once
        self._channels = channels
        self._hessian: Tensor | None = None
        self._before = self._passed = 0
        self._waiting: list[Tensor] = []

    def begin(self, before: int) -> None:
        """The next inputs are of a batch that follows `before` tokens."""
        self._before = self._passed = before

    def observe(self, x: Tensor) -> None:
        """Take in one input `[..., in_features]`."""
        rows = x.detach().reshape(-1, x.shape[-1])
        start, self._passed = self._passed, self._passed + len(rows)
        picked = rows[picked_rows(start, self._passed, self._every) - start].float()
        if not len(picked):
            return  # an expert that no token was sent to, or no picked one
        if self._at_once:
            self._wait(picked)
        else:
            self.kept.append((self._before, picked))

    def finish(self) -> Tensor:
        """`[in_features, in_features]`."""
        for _, rows in sorted(self.kept, key=lambda item: item[0]):
            self._wait(rows)
        self.kept = []
        self._add()
        if self._hessian is None:
            return torch.zeros(self._channels, self._channels)
        return self._hessian

    def _wait(self, rows: Tensor) -> None:
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= MOST_WAITING:
            self._add()

    def _add(self) -> None:
        if self._waiting:
            channels = torch.cat(self._waiting).T
            scale = weight_scale(channels)
            levels = quantize_weight(channels, scale)
            sums = int8_sums(levels.view(torch.uint8) ^ 128, 128, levels)
            sums.mul_(scale).mul_(scale[:, None])
            self._hessian = sums if self._hessian is None else self._hessian.add_(sums)
            self._waiting.clear()


def picked_rows(start: int, stop: int, every: int) -> Tensor:
    """Which rows from `start` to `stop` are summed: one of each `every`, anywhere among them.

    A fixed stride would meet the same few positions of every text where it shares a factor with
    their length. The place within the stride is a hash of its number instead: the same in every
    run and process, however rows are batched.

    Returns:
        `[n]` int64, ascending, `start` <= row < `stop`.
    """
    strides = torch.arange(start // every, -(-stop // every))
    places = strides * every + _hashed(strides) % every
    return places[(places >= start) & (places < stop)]


def _hashed(numbers: Tensor) -> Tensor:
    """31 bits of each of `numbers` (int64, >= 0): multiplied and shifted, with no overflow."""
    mixed = numbers & HASH_BITS
    for factor in HASH_FACTORS:
        mixed = (mixed * factor) & HASH_BITS
        mixed = mixed ^ (mixed >> 15)
    return mixed


def joined_hessians(recorders: Mapping[str, HessianRecorder]) -> dict[str, Tensor]:
    """The sum over the inputs that all processes saw `[in_features, in_features]`, by group key."""
    whole = list(recorders.values())
    for recorder, owner in zip(whole, owners([item.size for item in whole]), strict=True):
        recorder.kept = [rows for kept in collect(recorder.kept, owner) for rows in kept]
    sums = share(whole, HessianRecorder.finish, size=lambda item: item.size)
    return dict(zip(recorders, sums, strict=True))


@contextmanager
def record_hessians(
    readers: Mapping[str, nn.Linear], tokens: int
) -> Iterator[dict[str, HessianRecorder]]:
    """Observe the inputs of `readers` inside the `with` block.

    Args:
        readers: One Linear of each smooth group, by group key.
        tokens: How many all processes will run, to take one in n (`ROWS_PER_CHANNEL`).
    """
    alone = processes() == 1
    recorders = {
        key: HessianRecorder(linear.in_features, tokens, at_once=alone)
        for key, linear in readers.items()
    }

    def hook_for(key: str) -> Callable[..., None]:
        return lambda _module, args: recorders[key].observe(args[0])

    with hooked(module.register_forward_pre_hook(hook_for(key)) for key, module in readers.items()):
        yield recorders


def smoothed_hessian(hessian: Tensor, scale: Tensor | None) -> Tensor:
    """The Hessian of smoothed inputs, from that of the inputs.

    Args:
        hessian: `[in_features, in_features]`.
        scale: `[in_features]`, divides the input, or None.
    """
    return hessian if scale is None else hessian / scale / scale[:, None]


def gptq_weight(
    weight: Tensor, steps: Tensor, hessian: Tensor, *, name: str = "a Linear"
) -> Tensor:
    """Round `weight` to int8 levels that keep its outputs.

    Args:
        weight: `[out_features, in_features]`, fp32.
        steps: `[out_features]`, the weight scale.
        hessian: `[in_features, in_features]`, sum of x x^T over inputs.
        name: Path of the Linear, for errors.

    Returns:
        `[out_features, in_features]` int8 in [-127, 127].

    Raises:
        CalibrationError: The Hessian is not positive definite in fp32, or not finite.
    """
    size = hessian.diagonal()
    damped = hessian + torch.eye(len(size)) * (DAMPING * size.mean()).clamp(min=1e-12)
    # Channels with the largest inputs first: the others can take over their errors.
    order = size.argsort(descending=True, stable=True)
    try:
        feedback = _feedback(damped[order][:, order])
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise CalibrationError(
            f"GPTQ cannot round {name!r}: its inputs in calibration give no positive definite "
            "Hessian. Calibrate on more texts, or round weights to nearest (--weight_rounding "
            "nearest)"
        ) from error
    back = order.argsort()
    rows = max(1, NUMBERS_AT_ONCE // len(order))
    parts = zip(weight.split(rows), steps.split(rows), strict=True)
    return torch.cat(
        [
            _rounded((part / step[:, None]).T[order].contiguous(), feedback)[back].T.contiguous()
            for part, step in parts
        ]
    )


def _rounded(wanted: Tensor, feedback: Tensor) -> Tensor:
    """Levels int8 of `wanted` `[in_features, rows]`, whose channels are contiguous."""
    levels, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    shifted = wanted.clone()
    for start in range(0, len(wanted), BLOCK):
        stop = min(start + BLOCK, len(wanted))
        shifted[start:stop].addmm_(feedback[:start, start:stop].T, errors[:start])
        for first in range(start, stop, TOGETHER):
            now = slice(first, min(first + TOGETHER, stop))
            aim = torch.addmm(shifted[now], feedback[start:first, now].T, errors[start:first])
            torch.round(aim, out=levels[now]).clamp_(-WEIGHT_MAXIMUM, WEIGHT_MAXIMUM)
            torch.sub(wanted[now], levels[now], out=errors[now])
    return levels.to(torch.int8)


def _feedback(hessian: Tensor) -> Tensor:
    """U of H = U D U^T, unit upper triangular."""
    flipped = hessian.flip(0, 1)
    with one_thread():  # with more its last bits are others, and so are the weights
        root = torch.linalg.cholesky(flipped).flip(0, 1)  # upper: H = root root^T
    return root / root.diagonal()


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block torch computes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
