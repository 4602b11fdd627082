"""What the steps of a run have found so far, read from its journal."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from ipex_sq.config import GPTQ, NEAREST
from ipex_sq.errors import CalibrationError, UnsupportedModelError
from ipex_sq.models.folding import smoothed_linear
from ipex_sq.models.sampling import sampled_texts
from ipex_sq.models.topology import Topology
from ipex_sq.recipe.act_stats import ActStats
from ipex_sq.recipe.alpha import AlphaSearch, Costs
from ipex_sq.recipe.batching import Batch
from ipex_sq.recipe.gptq import fit_hessians
from ipex_sq.recipe.observers import LinearStats
from ipex_sq.recipe.plan import DYNAMIC_INT8, SmoothGroup
from ipex_sq.recipe.plan_files import plan_from_json
from ipex_sq.recipe.planning import Rounding
from ipex_sq.recipe.samples import GroupSample
from ipex_sq.streaming.blocks import StreamedModel
from ipex_sq.streaming.journal import Journal
from ipex_sq.streaming.weights import OnDisk

TOPOLOGY, HEAD = "topology", "head"
UNSAMPLED, HEADROOM = "unsampled_", "headroom"


@dataclass
class Findings:
    """What is known of a streamed model, block by block.

    Attributes:
        model: The model.
        journal: Where it is kept.
        rows: Calibration batches without padding.
        wanted: What the plan will be asked for.
    """

    model: StreamedModel
    journal: Journal
    rows: Sequence[Batch]
    wanted: Rounding

    @cached_property
    def example(self) -> dict[str, Tensor]:
        """The first text, `[1, tokens]`."""
        return {key: value[:1] for key, value in self.rows[0].items()}

    @cached_property
    def texts(self) -> list[Batch]:
        """What is run in fp32: the texts that samples are taken from, else the example alone."""
        return list(sampled_texts(self.rows)) if self.wanted.needs_samples else [self.example]

    @cached_property
    def sampled_tokens(self) -> int:
        """Tokens of these texts."""
        return sum(text["input_ids"].numel() for text in self.texts)

    @cached_property
    def topology(self) -> Topology:
        """Groups and Linears that stay float."""
        facts = self.journal.facts(TOPOLOGY, "facts")
        bare = plan_from_json(facts["groups"], self.journal.tensors(TOPOLOGY, "groups"))
        reasons = {name: item.reason for name, item in bare.linears.items()}
        groups = tuple(item.group for item in bare.groups.values())
        return Topology(groups, reasons, facts["head"])

    @cached_property
    def places(self) -> dict[str, str]:
        """Where Linears are, blocks and a head that is quantized, and each one's calibration."""
        head = self.topology.head
        paths = [*self.model.blocks, *([] if head is None else [head])]
        return {path: forward_step(index) for index, path in enumerate(paths)}

    def check_head(self) -> None:
        """Refuse a head whose scale would go into a block, which is written before it.

        Raises:
            UnsupportedModelError: Names the block's norm.
        """
        for group in self.topology.groups:
            producer = str(group.producer)
            inside = any(producer.startswith(f"{path}.") for path in self.model.blocks)
            if group.key == self.topology.head and inside:
                raise UnsupportedModelError(
                    f"the scale of the head goes into {producer!r}, a part of a block: pass "
                    "--no_quant_lm_head, or quantize in memory"
                )

    def groups_of(self, path: str) -> list[SmoothGroup]:
        """The groups of one block, or of the head, in order of execution."""
        return [g for g in self.topology.groups if f"{g.key}.".startswith(f"{path}.")]

    def linears_of(self, path: str) -> dict[str, nn.Linear]:
        """The Linears of these groups, which are in memory now."""
        names = [name for group in self.groups_of(path) for name in group.readers]
        return {name: smoothed_linear(self.model.model, name) for name in names}

    @cached_property
    def weights_sizes(self) -> list[int]:
        """How many weights each Linear of the blocks has."""
        return [linear.weight.numel() for linear in self.model.linears.values()]

    @cached_property
    def gathers_hessians(self) -> bool:
        """Whether Hessians are wanted and fit, as they would have to in memory."""
        model, keys = self.model.model, [group.key for group in self.topology.groups]
        features = [int(model.get_submodule(key).in_features) for key in keys]  # type: ignore[arg-type]
        return self.wanted.needs_hessians and fit_hessians(features)

    def stats(
        self, path: str | None = None, samples: Mapping[str, GroupSample] | None = None
    ) -> ActStats:
        """Statistics of the block at `path`, or of the whole model; Hessians stay on disk.

        `samples`: of its groups, where they are needed.
        """
        steps = self.places if path is None else {path: self.places[path]}
        groups = {group.key: step for at, step in steps.items() for group in self.groups_of(at)}
        tensors: dict[str, Tensor] = {}
        for step in steps.values():
            tensors |= self.journal.tensors(step, "stats")
        head = self.topology.head
        return ActStats(
            linears=self._linear_stats(groups, tensors, ""),
            groups=[group for group in self.topology.groups if group.key in groups],
            float_reasons=self.topology.float_reasons,
            example=self.example,
            texts=sum(row["input_ids"].shape[0] for row in self.rows),
            tokens=sum(row["input_ids"].numel() for row in self.rows),
            source=self.journal.facts(forward_step(0), "facts"),
            samples=samples or {},
            unsampled=self._linear_stats(groups, tensors, UNSAMPLED),
            hessians=OnDisk(
                groups if self.gathers_hessians else (),
                lambda key: self.journal.tensors(groups[key], f"hessian-{key}")["x"],
            ),
            head=head if head in steps else None,
        )

    def _linear_stats(
        self, keys: Container[str], tensors: Mapping[str, Tensor], kind: str
    ) -> dict[str, LinearStats]:
        """By path; readers of one tensor share theirs."""
        found: dict[str, LinearStats] = {}
        for group in self.topology.groups:
            if group.key in keys and f"{group.key}.{kind}minimum" in tensors:
                low, high = (tensors[f"{group.key}.{kind}{end}"] for end in ("minimum", "maximum"))
                found |= dict.fromkeys(group.readers, LinearStats(low, high))
        return found

    @cached_property
    def search(self) -> AlphaSearch | None:
        """What each alpha costs, in all groups."""
        if not self.wanted.needs_samples:
            return None
        kl: dict[str, dict[str, Costs]] = {}
        steps = [backward_step(index) for index in range(len(self.model.blocks))]
        if self.topology.head is not None:
            steps.append(HEAD)
        found = [self.journal.facts(step, "costs") for step in steps]
        for mode in dict.fromkeys((*self.wanted.modes, DYNAMIC_INT8)):
            costs = {
                key: dict(pairs) for block in found for key, pairs in block.get(mode, {}).items()
            }
            if costs:
                kl[mode] = costs
        headroom = {key: room for block in found for key, room in block.get(HEADROOM, {}).items()}
        return AlphaSearch(kl, headroom)

    def rounding_samples(self, step: str) -> dict[str, GroupSample]:
        """The inputs that biases are corrected with, of a search's step, by group key."""
        if not self.wanted.needs_samples:
            return {}
        tensors = self.journal.tensors(step, "samples")
        return {key: GroupSample(inputs, inputs[:, :0], 0.0) for key, inputs in tensors.items()}

    def example_input(self, index: int) -> Tensor | None:
        """What block `index` is given of the example; None of the first one."""
        return self._input("text", index, 0)

    def inputs(self, kind: str, index: int) -> Iterator[Tensor | None]:
        """What block `index` is given, run after run; None of the first one.

        `kind`: "batch" (of calibration), or "text" (of `texts`).
        """
        number = 0
        while True:
            yield self._input(kind, index, number)
            number += 1

    def _input(self, kind: str, index: int, number: int) -> Tensor | None:
        if index == 0:
            return None  # the model's embeddings
        return self.journal.tensors(forward_step(index - 1), f"{kind}-{number}")["x"]

    def text_input(self, index: int, number: int) -> Tensor:
        """What a later block is given of text `number`, ready for its gradient."""
        hidden = self._input("text", index, number)
        assert hidden is not None  # noqa: S101
        return hidden.requires_grad_()


def forward_step(index: int) -> str:
    """Name of the calibration of a block."""
    return f"calibrate-{index:05d}"


def backward_step(index: int) -> str:
    """Name of the search in a block."""
    return f"search-{index:05d}"


def rounding_that_fits(findings: Findings, *, asked: bool) -> Rounding:
    """The rounding with weights to nearest where Hessians would not fit in memory.

    Raises:
        CalibrationError: GPTQ was `asked` for.
    """
    wanted = findings.wanted
    if wanted.weights != GPTQ or findings.gathers_hessians:
        return wanted
    if asked:
        raise CalibrationError("GPTQ's Hessians of this model are too large: use nearest")
    return replace(wanted, weights=NEAREST)
