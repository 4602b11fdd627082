"""Who reads what: smooth groups found by watching a forward pass.

A Linear that reads a tensor joins the group of that tensor. A norm that wrote it takes the
smoothing scale, unless anything else reads the norm's output (a residual, a router); so does a
Linear that wrote it through functions that pass a factor on (`probing.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ipex_sq.errors import CalibrationError, UnsupportedModelError
from ipex_sq.models.body import output_head
from ipex_sq.models.folding import fold_form
from ipex_sq.models.probing import probe_channels
from ipex_sq.models.running import run_model
from ipex_sq.models.watching import Source, Watch, watch
from ipex_sq.recipe.observers import UNREACHED_ADVICE
from ipex_sq.recipe.plan import HEAD, SmoothGroup
from ipex_sq.recipe.splitting import MOST_PRODUCTS, number_of_copies

_STACKED_DIMENSIONS = 3
"""transformers 5 keeps the experts of a layer in one `[experts, out, in]` weight."""


MOST_HEAD_BYTES = 2**30
"""Of a language model's head in fp32 that becomes int8 by default; its search holds six of it."""


@dataclass(frozen=True)
class Topology:
    """Groups of Linears that may become int8, and the Linears that stay float with the reason.

    `head` is the path of a language model's head that is among the first.
    """

    groups: tuple[SmoothGroup, ...]
    float_reasons: Mapping[str, str]
    head: str | None = None

    @property
    def readers(self) -> list[str]:
        """Paths of the Linears of all groups."""
        return [name for group in self.groups for name in group.readers]


def language_head(model: nn.Module) -> str | None:
    """Path of the module that gives a language model's logits; None where there is none."""
    head = output_head(model)
    return next((name for name, module in model.named_modules() if module is head), None)


def has_small_head(model: nn.Module) -> bool:
    """Whether `model` is a language model with a head that becomes int8 by default.

    In memory and block by block alike: a weight without data will do.
    """
    head = output_head(model)
    if not isinstance(head, nn.Linear):
        return False
    return head.weight.numel() * torch.float32.itemsize <= MOST_HEAD_BYTES


def quantizable_linears(
    model: nn.Module, *, lm_head: bool = False
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Split the model's Linears into those that may become int8 and those that stay float.

    The head (whatever stands outside the base model: lm_head, classifier) stays float, as do a
    weight that two modules share and experts that are no Linears.

    Args:
        model: Float model.
        lm_head: A language model's head may become int8 too, with a weight of its own.

    Returns:
        Linears by path, and reasons by path.

    Raises:
        UnsupportedModelError: Nothing is left to quantize, or there is no such head.
    """
    wanted = _quantizable_head(model) if lm_head else None
    base = getattr(model, "base_model", model)
    body = {id(module) for module in base.modules()}
    owners: dict[int, int] = defaultdict(int)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            owners[id(weight)] += 1
    linears: dict[str, nn.Linear] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name == wanted:
            linears[name] = module
        elif id(module) not in body:
            reasons[name] = HEAD
        elif owners[id(module.weight)] > 1:
            reasons[name] = "weight shared with another module"
        elif module.in_features + number_of_copies(module.in_features) > MOST_PRODUCTS:
            reasons[name] = "so wide that int32 sums could overflow"
        else:
            linears[name] = module
    reasons |= dict.fromkeys(stacked_weights(model), "experts stacked in one weight")
    if not linears:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Linear layer to quantize below its head"
        )
    return linears, reasons


def _quantizable_head(model: nn.Module) -> str:
    head = language_head(model)
    if head is None or not isinstance(model.get_submodule(head), nn.Linear):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head to quantize: leave quant_lm_head "
            "out"
        )
    return head


def stacked_weights(model: nn.Module) -> list[str]:
    """Paths of the weights of three dimensions, as of experts, that are no convolution's."""
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, _ConvNd)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == _STACKED_DIMENSIONS and id(parameter) not in convolutions
    ]


def find_topology(
    model: nn.Module, examples: Sequence[Mapping[str, Tensor]], *, lm_head: bool = False
) -> Topology:
    """Find the smooth groups of `model`.

    Args:
        model: Float model; it is not changed.
        examples: Batches; one is enough unless the model routes tokens to experts. They are run
            until every Linear was reached.
        lm_head: With that of a language model's head.

    Raises:
        UnsupportedModelError: Nothing to quantize.
        CalibrationError: A Linear was never reached.
    """
    linears, reasons = quantizable_linears(model, lm_head=lm_head)
    head = language_head(model) if lm_head else None
    groups: dict[str, SmoothGroup] = {}
    left = dict(linears)
    for example in examples:
        with torch.no_grad(), watch(model, linears, shared=head) as seen:
            run_model(model, example)
        for name in seen.stay_float.keys() & left.keys():
            reasons[name] = seen.stay_float[name]
            del left[name]
        found = [group for group in _groups(model, seen) if set(group.readers) <= left.keys()]
        candidates = _candidates(found, seen)
        producers = probe_channels(model, example, candidates)
        groups |= {group.key: _with_producer(group, producers) for group in found}
        left = {name: left[name] for name in left if not any(name in g.readers for g in found)}
        if not left:
            return Topology(tuple(groups.values()), reasons, head)
    raise CalibrationError(
        f"{len(left)} Linear layer(s) were never reached, the first is {next(iter(left))!r}: "
        + UNREACHED_ADVICE
    )


def _groups(model: nn.Module, seen: Watch) -> list[SmoothGroup]:
    """The groups of one pass, in order of execution; only norms as producers."""
    found: list[SmoothGroup] = []
    done = set(seen.stay_float)
    for name, sources in seen.reads.items():
        if name in done:
            continue
        repeated = len(sources) > 1
        readers = [name] if repeated else _once(sources[0].readers, seen)
        done.update(readers)
        found.append(_group(model, tuple(readers), sources[0], repeated))
    return found


def _once(readers: list[str], seen: Watch) -> list[str]:
    names = dict.fromkeys(readers)
    return [name for name in names if len(seen.reads[name]) == 1 and name not in seen.stay_float]


def _group(
    model: nn.Module, readers: tuple[str, ...], source: Source, repeated: bool
) -> SmoothGroup:
    if source.producer is None:
        return SmoothGroup(readers, None, "no module wrote the tensor channel by channel")
    features = model.get_submodule(readers[0]).in_features
    problem = ""
    if repeated:
        problem = "a Linear of the group runs several times"
    elif set(source.readers) != set(readers):
        problem = "the norm's output is also read by a Linear outside the group"
    elif source.other_reads:
        problem = f"the norm's output is also read by {source.other_reads[0]}"
    elif fold_form(model.get_submodule(source.producer), int(features)) is None:  # type: ignore[arg-type]
        problem = "scaling the norm's weight does not scale its output"
    return SmoothGroup(readers, source.producer, problem)


def _candidates(groups: Sequence[SmoothGroup], seen: Watch) -> dict[str, list[str]]:
    """By group key, Linears that may have written what the group reads, and nothing else reads."""
    candidates = {}
    for group in groups:
        sources = seen.reads[group.key]
        alone = len(sources) == 1 and set(sources[0].readers) == set(group.readers)
        if group.producer is None and alone and not sources[0].other_reads:
            candidates[group.key] = _once(seen.writers(sources[0]), seen)
    return candidates


def _with_producer(group: SmoothGroup, producers: Mapping[str, tuple[str, Tensor]]) -> SmoothGroup:
    """The group with the Linear that can take its scale, where there is one of its own."""
    if group.key not in producers:
        return group
    name, channels = producers[group.key]
    if sum(other == name for other, _ in producers.values()) > 1:
        return group
    return SmoothGroup(group.readers, name, "", channels)
