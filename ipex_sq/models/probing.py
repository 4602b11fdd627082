"""Which channel of a Linear's input is which channel of the Linear that wrote it, found by trying.

Between up_proj and down_proj stands a product, between v_proj and o_proj attention with its heads
and their copies, between fc1 and fc2 a ReLU: all of them pass a positive factor on a channel
through to one channel. So the producer's output is multiplied by a factor of its own in every
channel, and the reader's input shows which factor arrived where. What passes no factor through
(SiLU, a product with itself, keys and queries) fails the check and cannot take a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ipex_sq.models.running import run_model
from ipex_sq.recipe.hooks import hooked

SMALLEST_FACTOR, LARGEST_FACTOR = 1.5, 3.0
"""Away from 1: a channel that the producer does not reach must not look as if it were."""

TOLERANCE = 1e-4
"""Relative; attention over 128 tokens in fp32 loses 1e-6."""


@dataclass
class _Probe:
    """One reader and the producer that is tried for it."""

    producer: str
    factors: Tensor
    before: Tensor | None = None
    after: Tensor | None = None


@dataclass
class _Recorder:
    probes: Mapping[str, _Probe]
    multiply: bool = False

    def reader_hook(self, reader: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            probe = self.probes[reader]
            if not self.multiply:
                probe.before = args[0].detach().clone()
                return None
            probe.after = args[0].detach().clone()
            # What follows must not feel the probe: other layers are probed in the same pass.
            return (probe.before, *args[1:]) if probe.before is not None else None

        return hook

    def producer_hook(self, reader: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            return output * self.probes[reader].factors.to(output.dtype) if self.multiply else None

        return hook


def probe_channels(
    model: nn.Module, example: Mapping[str, Tensor], candidates: Mapping[str, list[str]]
) -> dict[str, tuple[str, Tensor]]:
    """Find the producers through which smoothing scales can be folded.

    Args:
        model: It is not changed.
        example: A batch to run.
        candidates: By path of a Linear, paths of the Linears whose output may reach it.

    Returns:
        By reader, its producer and `[in_features]`, the producer's channel behind each channel.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    rounds = max(map(len, candidates.values()), default=0)
    for number in range(rounds):
        probes = {
            reader: _Probe(names[number], _factors(model, names[number]))
            for reader, names in candidates.items()
            if number < len(names) and reader not in found
        }
        _run_twice(model, example, probes)
        for reader, probe in probes.items():
            channels = _channels(probe)
            if channels is not None:
                found[reader] = (probe.producer, channels)
    return found


def _factors(model: nn.Module, producer: str) -> Tensor:
    features = int(model.get_submodule(producer).out_features)  # type: ignore[arg-type]
    order = torch.randperm(features, generator=torch.Generator().manual_seed(0))
    return torch.linspace(SMALLEST_FACTOR, LARGEST_FACTOR, features)[order]


def _run_twice(
    model: nn.Module, example: Mapping[str, Tensor], probes: Mapping[str, _Probe]
) -> None:
    recorder = _Recorder(probes)
    with hooked(_probing(model, probes, recorder)), torch.no_grad():
        for recorder.multiply in (False, True):
            run_model(model, example)


def _probing(
    model: nn.Module, probes: Mapping[str, _Probe], recorder: _Recorder
) -> Iterator[RemovableHandle]:
    for reader, probe in probes.items():
        module, producer = model.get_submodule(reader), model.get_submodule(probe.producer)
        yield module.register_forward_pre_hook(recorder.reader_hook(reader))
        yield producer.register_forward_hook(recorder.producer_hook(reader))


def _channels(probe: _Probe) -> Tensor | None:
    """The producer's channel behind each input channel, or None where there is no such thing."""
    if probe.before is None or probe.after is None or probe.before.shape != probe.after.shape:
        return None
    features = probe.before.shape[-1]
    before, after = (x.reshape(-1, features).double() for x in (probe.before, probe.after))
    largest = before.abs().argmax(dim=0)
    size = before.gather(0, largest[None])[0]
    alive = size.abs() > 0
    ratio = after.gather(0, largest[None])[0] / torch.where(alive, size, torch.ones_like(size))
    ordered, order = probe.factors.double().sort()
    middles = (ordered[1:] + ordered[:-1]) / 2
    channels = order[torch.bucketize(ratio, middles)]
    if not bool(alive.all()):
        # A channel that ReLU shuts off shows no factor: only an unpermuted input tells its place.
        if features != len(probe.factors):
            return None
        channels = torch.where(alive, channels, torch.arange(features))
        if not torch.equal(channels, torch.arange(features)):
            return None
    expected = before * probe.factors.double()[channels]
    change = (after - expected).norm() / expected.norm().clamp(min=1e-30)
    return channels if float(change) < TOLERANCE else None
