"""Calibration and the search of alpha, block after block, each a step of the journal.

Every step calls what calibration in memory calls, on the groups of one block: statistics, samples
and costs are the same to the last bit (tests/streaming).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipex_sq.errors import CalibrationError
from ipex_sq.models.calibration import PROBED_TOKENS, observe
from ipex_sq.models.folding import smoothed_linear
from ipex_sq.models.onednn import fits_packed
from ipex_sq.models.running import run_body
from ipex_sq.models.sampling import run_backward
from ipex_sq.models.topology import find_topology
from ipex_sq.recipe.plan import FLOAT, GroupPlan, LinearPlan, QuantPlan
from ipex_sq.recipe.plan_files import plan_tensors, plan_to_json
from ipex_sq.recipe.planning import search_modes
from ipex_sq.recipe.samples import GroupSample, SampleRecorder, record_samples
from ipex_sq.streaming.findings import (
    HEAD,
    HEADROOM,
    TOPOLOGY,
    UNSAMPLED,
    Findings,
    backward_step,
    forward_step,
)
from ipex_sq.streaming.journal import write_facts, write_tensors


class Calibration:
    """Takes the steps; what they find is kept in the journal of `findings`."""

    def __init__(self, findings: Findings, done: Callable[[str], None]) -> None:
        """`done` is called after each block of a step, with the step's name."""
        self._known, self._done = findings, done
        self._model, self._journal = findings.model, findings.journal

    def find_topology(self) -> None:
        """Which Linears read the same tensor: a short text through all blocks."""
        known = self._known
        if not self._journal.has(TOPOLOGY):
            short = {key: value[:, :PROBED_TOKENS] for key, value in known.example.items()}
            with self._model.all_in_turn(lambda: self._done(TOPOLOGY)):
                rows = [short, *known.rows]
                found = find_topology(self._model.model, rows, lm_head=known.wanted.lm_head)
            groups = {group.key: GroupPlan(group) for group in found.groups}
            reasons = {name: LinearPlan(FLOAT, text) for name, text in found.float_reasons.items()}
            bare = QuantPlan(None, "minmax", reasons, groups)
            with self._journal.step(TOPOLOGY) as folder:
                write_tensors(folder, "groups", plan_tensors(bare))
                facts = {"groups": plan_to_json(bare), "tuples": self._model.gives_tuples}
                write_facts(folder, "facts", {**facts, "head": found.head})
        self._model.gives_tuples = self._journal.facts(TOPOLOGY, "facts")["tuples"]

    def run(self) -> None:
        """Statistics of every block, then the search of alpha, as far as they are not finished."""
        blocks = self._model.blocks
        for index, path in enumerate(blocks):
            if not self._journal.has(forward_step(index)):
                self._forward(index, path)
            self._done("calibrate")
        if self._known.topology.head and not self._journal.has(forward_step(len(blocks))):
            self._forward_head(len(blocks), self._known.topology.head)
        if not self._known.wanted.needs_samples:
            return
        if not self._journal.has(HEAD):
            self._head()
        for index, path in reversed(list(enumerate(blocks))):
            if not self._journal.has(backward_step(index)):
                self._backward(index, path)
            self._done("search")

    def _forward(self, index: int, path: str) -> None:
        model = self._model.model
        with self._model.block(path, check=True), self._journal.step(forward_step(index)) as folder:
            with self._model.feeding(
                path, self._known.inputs("batch", index), _kept(folder, "batch")
            ):
                self._observe(path, folder)
            grad = torch.set_grad_enabled(self._known.wanted.needs_samples)
            inputs = self._known.inputs("text", index)
            with grad, self._model.feeding(path, inputs, _kept(folder, "text")):
                for text in self._known.texts:
                    run_body(model, text)
        if index:
            self._journal.forget(forward_step(index - 1), "batch-*")

    def _forward_head(self, index: int, path: str) -> None:
        """Statistics of the head, after `index` blocks."""
        given = self._known.inputs("batch", index)
        with self._journal.step(forward_step(index)) as folder, self._model.finishing(given):
            self._observe(path, folder, head=path)
        self._journal.forget(forward_step(index - 1), "batch-*")

    def _observe(self, path: str, folder: Path, *, head: str | None = None) -> None:
        """Run all rows, and write what enters the Linears at `path`."""
        known, groups = self._known, self._known.groups_of(path)
        linears = known.linears_of(path)
        readers = {g.key: linears[g.key] for g in groups} if known.gathers_hessians else {}
        packed = fits_packed(known.weights_sizes)
        seen = observe(
            self._model.model, known.rows, linears, readers=readers, packed=packed, head=head
        )
        found = {}
        for group in groups:
            for kind, stats in (("", seen.linears), (UNSAMPLED, seen.unsampled)):
                if group.key in stats:
                    found[f"{group.key}.{kind}minimum"] = stats[group.key].minimum
                    found[f"{group.key}.{kind}maximum"] = stats[group.key].maximum
        write_tensors(folder, "stats", found)
        for key, hessian in seen.hessians.items():
            write_tensors(folder, f"hessian-{key}", {"x": hessian})
        write_facts(folder, "facts", {"dtype": str(seen.dtype).removeprefix("torch.")})

    def _head(self) -> None:
        """Gradients of -log p by what the last block gives, of drawn predictions.

        Where the head is quantized, its samples and costs too.
        """
        last, known = len(self._model.blocks), self._known
        hidden = [known.text_input(last, number) for number in range(len(known.texts))]
        generator = torch.Generator().manual_seed(0)
        head = known.topology.head
        groups = [] if head is None else known.groups_of(head)
        with self._journal.step(HEAD) as folder:
            predictions = 0
            with (
                self._model.finishing(hidden),
                record_samples(self._model.model, groups, known.sampled_tokens) as recorder,
                torch.enable_grad(),
            ):
                for text in known.texts:
                    predictions += run_backward(self._model.model, text, generator)
            for number, item in enumerate(hidden):
                _write_gradient(folder, number, item)
            write_facts(folder, "facts", {"predictions": predictions})
            if head is not None:
                recorder.predictions = predictions
                self._write_samples(folder, head, recorder)

    def _backward(self, index: int, path: str) -> None:
        model, groups = self._model.model, self._known.groups_of(path)
        after = HEAD if path == self._model.blocks[-1] else backward_step(index + 1)
        with self._model.block(path), self._journal.step(backward_step(index)) as folder:
            sampled = record_samples(model, groups, self._known.sampled_tokens)
            with sampled as recorder, torch.enable_grad():
                recorder.predictions = self._journal.facts(HEAD, "facts")["predictions"]
                for number, text in enumerate(self._known.texts):
                    given = self._known.text_input(index, number) if index else None
                    outputs: list[Tensor] = []
                    with self._model.feeding(path, [given], outputs.append):
                        run_body(model, text)
                    gradient = self._journal.tensors(after, f"gradient-{number}")["x"]
                    outputs.pop().backward(gradient)
                    _write_gradient(folder, number, given)
            self._write_samples(folder, path, recorder)
        self._journal.forget(after, "gradient-*")

    def _write_samples(self, folder: Path, path: str, recorder: SampleRecorder) -> None:
        """What was sampled at `path`, and the search of alpha there."""
        samples = recorder.finish()
        write_tensors(folder, "samples", {key: item.inputs for key, item in samples.items()})
        write_facts(folder, "costs", self._costs(path, samples))

    def _costs(self, path: str, samples: dict[str, GroupSample]) -> dict[str, Any]:
        """By mode and group key, pairs of alpha and cost; and headroom by group key."""
        stats = self._known.stats(path, samples)
        weights = {name: smoothed_linear(self._model.model, name).weight for name in stats.linears}
        try:
            search = search_modes(stats, weights, self._known.wanted)
        except CalibrationError:  # experts that these texts do not reach
            return {}
        costs = {
            mode: {key: list(costs.items()) for key, costs in groups.items()}
            for mode, groups in search.kl.items()
        }
        return {**costs, HEADROOM: dict(search.headroom)}


def _kept(folder: Path, kind: str) -> Callable[[Tensor], None]:
    """Writes what it is given, one file after the other."""
    count = 0

    def keep(output: Tensor) -> None:
        nonlocal count
        write_tensors(folder, f"{kind}-{count}", {"x": output})
        count += 1

    return keep


def _write_gradient(folder: Path, number: int, hidden: Tensor | None) -> None:
    if hidden is not None and hidden.grad is not None:
        write_tensors(folder, f"gradient-{number}", {"x": hidden.grad})
