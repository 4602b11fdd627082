"""Sampled inputs of the Linears, with what an error in their outputs does to the predictions.

Second-order expansion of the KL divergence between the float model's predictions and those of a
model whose Linear outputs are off by e: KL ~ 1/2 E[(g . e)^2], where g is the gradient of
-log p(y) by the output and y is drawn from the model's own prediction (the Fisher information).
Errors of different Linears and tokens are taken as independent. Measured on SmolLM2-135M the sum
over all Linears meets the KL divergence of the whole int8 model within a tenth (docs/log.md). Not
seen: errors that make a router choose another expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ipex_sq.recipe.hooks import hooked
from ipex_sq.recipe.plan import SmoothGroup

MOST_ROWS = 512


@dataclass(frozen=True)
class GroupSample:
    """Some of the tokens that one smooth group read.

    Attributes:
        inputs: `[n, in_features]`, unsmoothed.
        gradients: `[n, sum of out_features]`, of -log p(y) summed over the text's predictions, by
            the outputs of the group's readers, side by side in their order.
        weight: Rows that one sampled row stands for, per prediction of the model.
    """

    inputs: Tensor
    gradients: Tensor
    weight: float

    def thinned(self, rows: int) -> GroupSample:
        """About `rows` of the rows, evenly spread."""
        every = max(len(self.inputs) // rows, 1)
        inputs, gradients = self.inputs[::every], self.gradients[::every]
        return GroupSample(inputs, gradients, self.weight * len(self.inputs) / len(inputs))

    def expected_kl(self, output_change: Tensor) -> float:
        """KL divergence in nats per prediction that a change of the outputs costs.

        Args:
            output_change: `[n]`, the change of each row projected on its gradient, g . e.
        """
        return 0.5 * self.weight * float(output_change.double().pow(2).sum())


class SampleRecorder:
    """Collects `GroupSample`s while its hooks are on (see `record_samples`).

    Attributes:
        predictions: To be set by the caller: how many predictions the model made.
    """

    def __init__(self, groups: Sequence[SmoothGroup], share: float) -> None:
        self.predictions = 0
        self._groups, self._share = groups, share
        self._inputs: dict[str, list[Tensor]] = {group.key: [] for group in groups}
        self._gradients: dict[str, list[Tensor]] = {
            name: [] for group in groups for name in group.readers
        }
        self._picks: dict[str, Tensor] = {}
        self._seen = {group.key: 0 for group in groups}

    def hook_for(self, group: SmoothGroup, name: str) -> Callable[..., Tensor | None]:
        """A forward hook for the group's reader `name`."""

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            if not len(rows):
                return None  # an expert that no token was sent to
            if name == group.key:  # the readers run in this order, on the same tensor
                inputs = self._inputs[group.key]
                self._picks[group.key] = self._drawn(rows.shape[0], text=len(inputs))
                inputs.append(rows[self._picks[group.key]].float())
                self._seen[group.key] += len(rows)
            picks = self._picks[group.key]
            gradients = self._gradients[name]
            place = len(gradients)
            gradients.append(torch.zeros(len(picks), output.shape[-1]))

            def keep(gradient: Tensor) -> None:
                gradients[place] = gradient.reshape(-1, gradient.shape[-1])[picks].float()

            if output.requires_grad:
                output.register_hook(keep)  # type: ignore[no-untyped-call]
                return None
            # Of a parameter, such as DeBERTa's relative positions: no gradient goes further back.
            start = output.detach().requires_grad_()
            start.register_hook(keep)
            return start.clone()  # the model may change it in place, and a leaf must not change

        return hook

    def _drawn(self, rows: int, text: int) -> Tensor:
        """The same rows whichever order the groups are run in: blocks may be run one by one."""
        generator = torch.Generator().manual_seed(text)
        return torch.randperm(rows, generator=generator)[: max(1, round(self._share * rows))]

    def finish(self) -> dict[str, GroupSample]:
        """The samples by group key; a group that was never reached has none."""
        found = {}
        for group in self._groups:
            if self._inputs[group.key]:
                gradients = [torch.cat(self._gradients[name]) for name in group.readers]
                inputs = torch.cat(self._inputs[group.key])
                weight = self._seen[group.key] / len(inputs) / max(self.predictions, 1)
                found[group.key] = GroupSample(inputs, torch.cat(gradients, dim=1), weight)
        return found


@contextmanager
def record_samples(
    model: nn.Module, groups: Sequence[SmoothGroup], tokens: int
) -> Iterator[SampleRecorder]:
    """Sample inputs and output gradients of `groups` inside the `with` block.

    Args:
        model: Holds the Linears; the caller runs it forward and backward.
        groups: Which Linears read one tensor.
        tokens: How many tokens the block will run, to take `MOST_ROWS` of them.
    """
    recorder = SampleRecorder(groups, min(1.0, MOST_ROWS / max(tokens, 1)))
    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    with hooked(
        modules[name].register_forward_hook(recorder.hook_for(group, name))
        for group in groups
        for name in group.readers
    ):
        yield recorder
