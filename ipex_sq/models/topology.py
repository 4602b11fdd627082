"""Who reads what: smooth groups found by watching one forward pass.

No tracing and no table of architectures. While the model runs, every torch function call is
seen: a Linear that reads a tensor joins the group of that tensor, and a norm's output that
anything else reads (a residual, a router) cannot take a folded scale.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ipex_sq.errors import UnsupportedModelError
from ipex_sq.models.folding import fold_form
from ipex_sq.recipe.plan import SmoothGroup


@dataclass(frozen=True)
class Topology:
    """Groups of Linears that may become int8, and the Linears that stay float with the reason."""

    groups: tuple[SmoothGroup, ...]
    float_reasons: Mapping[str, str]


@dataclass
class _Source:
    """One tensor that Linears read."""

    producer: str | None = None
    readers: list[str] = field(default_factory=list)
    other_reads: list[str] = field(default_factory=list)


def quantizable_linears(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Split the model's Linears into those that may become int8 and those that stay float.

    The head (whatever stands outside the base model: lm_head, classifier) stays float, as does a
    weight that two modules share.

    Returns:
        Linears by path, and reasons by path.

    Raises:
        UnsupportedModelError: Nothing is left to quantize.
    """
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
        if id(module) not in body:
            reasons[name] = "output head"
        elif owners[id(module.weight)] > 1:
            reasons[name] = "weight shared with another module"
        else:
            linears[name] = module
    if not linears:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Linear layer to quantize below its head"
        )
    return linears, reasons


def find_topology(model: nn.Module, example: Mapping[str, Tensor]) -> Topology:
    """Find the smooth groups of `model` from one forward pass over `example`.

    Raises:
        UnsupportedModelError: Nothing to quantize.
    """
    linears, reasons = quantizable_linears(model)
    watch = _Watch(linears)
    handles = [
        module.register_forward_hook(watch.producer_hook(name))
        for name, module in model.named_modules()
        if _may_produce(module)
    ]
    try:
        with torch.no_grad(), watch:
            model(**example, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Topology(tuple(watch.groups(model)), reasons)


def _may_produce(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    leaf = next(module.children(), None) is None
    return leaf and isinstance(weight, Tensor) and weight.ndim == 1


class _Watch(TorchFunctionMode):
    """Sees every torch function and notes which tensors the Linears read."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self._names = {id(linear.weight): name for name, linear in linears.items()}
        self._sources: dict[int, _Source] = {}
        self._calls: dict[str, list[_Source]] = defaultdict(list)
        self._alive: list[Tensor] = []  # an id is only a name while its tensor lives

    def producer_hook(self, name: str) -> Callable[..., None]:
        """A forward hook that notes the module's output as written by `name`."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._source(output).producer = name

        return hook

    def _source(self, tensor: Tensor) -> _Source:
        if id(tensor) not in self._sources:
            self._sources[id(tensor)] = _Source()
            self._alive.append(tensor)
        return self._sources[id(tensor)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is torch.nn.functional.linear and id(_weight(args, kwargs)) in self._names:
            name = self._names[id(_weight(args, kwargs))]
            source = self._source(args[0] if args else kwargs["input"])
            source.readers.append(name)
            self._calls[name].append(source)
        elif isinstance(output, Tensor | tuple | list):
            self._note_reads(func, (args, kwargs), output)
        return output

    def _note_reads(self, func: Callable[..., Any], inputs: Any, output: Any) -> None:
        if getattr(func, "__name__", "") == "__get__" and not isinstance(output, Tensor):
            return  # .shape and the like
        for leaf in pytree.tree_leaves(inputs):
            source = self._sources.get(id(leaf)) if isinstance(leaf, Tensor) else None
            if source is None:
                continue
            if isinstance(output, Tensor) and _is_view(output, leaf):
                self._sources.setdefault(id(output), source)
                self._alive.append(output)
            elif not isinstance(output, torch.Size):
                source.other_reads.append(getattr(func, "__name__", str(func)))

    def groups(self, model: nn.Module) -> list[SmoothGroup]:
        """The groups seen, in order of execution."""
        found: list[SmoothGroup] = []
        done: set[str] = set()
        for name, sources in self._calls.items():
            if name in done:
                continue
            repeated = len(sources) > 1
            readers = [name] if repeated else _once(sources[0].readers, self._calls)
            done.update(readers)
            found.append(_group(model, tuple(readers), sources[0], repeated))
        return found


def _once(readers: list[str], calls: Mapping[str, list[_Source]]) -> list[str]:
    return [name for name in dict.fromkeys(readers) if len(calls[name]) == 1]


def _group(
    model: nn.Module, readers: tuple[str, ...], source: _Source, repeated: bool
) -> SmoothGroup:
    if source.producer is None:
        return SmoothGroup(readers, None, "no norm wrote the tensor")
    features = model.get_submodule(readers[0]).in_features
    problem = ""
    if repeated or set(source.readers) != set(readers):
        problem = "a Linear of the group runs several times"
    elif source.other_reads:
        problem = f"the norm's output is also read by {source.other_reads[0]}"
    elif fold_form(model.get_submodule(source.producer), int(features)) is None:  # type: ignore[arg-type]
        problem = "scaling the norm's weight does not scale its output"
    return SmoothGroup(readers, source.producer, problem)


def _weight(args: Any, kwargs: Any) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("weight")


def _is_view(output: Tensor, tensor: Tensor) -> bool:
    same_storage = output.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return same_storage and output.numel() == tensor.numel()
