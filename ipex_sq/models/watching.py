"""Which tensor comes from which: one forward pass, every torch function call seen.

No tracing and no table of architectures. Modules that may write a tensor for others (norms,
Linears) are marked by hooks; between them each function call links its outputs to its inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ipex_sq.recipe.hooks import hooked

ROUTER = "router"
READ_APART = "weight read by other code than its own"
NO_LINEAR = "its class does other than a Linear"


@dataclass
class Source:
    """One tensor that Linears read.

    Attributes:
        ids: Of the tensor and of its views.
        producer: Path of the norm that wrote it, or None.
        readers: Paths of the Linears, in order.
        other_reads: Names of the functions that read it besides.
    """

    ids: set[int] = field(default_factory=set)
    producer: str | None = None
    readers: list[str] = field(default_factory=list)
    other_reads: list[str] = field(default_factory=list)


class Watch(TorchFunctionMode):
    """Records the dataflow of one forward pass (see `watch`).

    Attributes:
        reads: By path of a Linear, the tensor of each of its calls.
        stay_float: By path of a Linear that must, the reason.
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        """Of a model with these `linears`, by path."""
        super().__init__()
        self.reads: dict[str, list[Source]] = defaultdict(list)
        self.stay_float: dict[str, str] = {}
        self._linears = linears
        self._sources: dict[int, Source] = {}
        self._written: dict[int, str] = {}  # outputs of Linears
        self._parents: dict[int, set[int]] = defaultdict(set)
        self._children: dict[int, set[int]] = defaultdict(set)
        self._alive: list[Tensor] = []  # an id is only a name while its tensor lives
        self._inside = 0

    def start_linear(self, name: str, x: Tensor) -> None:
        """A Linear begins to read `x`."""
        self._inside += 1
        if x.numel() == 0:
            return  # an expert that no token was sent to
        source = self._source(x)
        source.readers.append(name)
        self.reads[name].append(source)

    def end_linear(self, name: str, output: Any) -> None:
        """It has written `output`."""
        self._inside -= 1
        if isinstance(output, Tensor):
            self._alive.append(output)
            self._written[id(output)] = name

    def end_norm(self, name: str, output: Any) -> None:
        """A norm has written `output`."""
        if isinstance(output, Tensor):
            self._source(output).producer = name

    def _source(self, tensor: Tensor) -> Source:
        if id(tensor) not in self._sources:
            self._sources[id(tensor)] = Source({id(tensor)})
            self._alive.append(tensor)
        return self._sources[id(tensor)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self._inside:
            self._note(getattr(func, "__name__", str(func)), (args, kwargs), output)
        return output

    def _note(self, function: str, inputs: Any, output: Any) -> None:
        outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if not outputs:
            return  # .shape and the like
        for leaf in pytree.tree_leaves(inputs):
            if not isinstance(leaf, Tensor):
                continue
            if isinstance(leaf, nn.Parameter):
                self._note_weight(leaf)
            for tensor in outputs:
                if tensor is not leaf:
                    self._parents[id(tensor)].add(id(leaf))
                    self._children[id(leaf)].add(id(tensor))
            source = self._sources.get(id(leaf))
            if source is None:
                continue
            if len(outputs) == 1 and _is_view(outputs[0], leaf):
                self._sources.setdefault(id(outputs[0]), source)
                source.ids.add(id(outputs[0]))
            else:
                source.other_reads.append(function)
        self._alive += outputs
        if function == "topk":
            chosen = {id(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)}
            self.stay_float.update(dict.fromkeys(self._behind(chosen)[0], ROUTER))

    def _note_weight(self, parameter: nn.Parameter) -> None:
        """Code that is no call of the Linear reads `parameter`: it would find int8 levels there."""
        for name, linear in self._linears.items():
            if linear.weight is parameter:  # of the block that is in memory now
                self.stay_float[name] = READ_APART

    def writers(self, source: Source) -> list[str]:
        """Linears whose output reaches `source`, and nothing else, through other functions only."""
        found, ancestors = self._behind(source.ids)
        inside = ancestors | source.ids
        written = {name: key for key, name in self._written.items()}
        return [name for name in found if self._flows_only(written[name], source.ids, inside)]

    def _behind(self, ids: set[int]) -> tuple[list[str], set[int]]:
        """Linears that wrote the ancestors of some tensors, nearest first, and those ancestors."""
        found, seen, left = [], set(ids), list(ids)
        while left:
            tensor = left.pop(0)
            if tensor in self._written:
                found.append(self._written[tensor])
            elif tensor not in self._sources or self._sources[tensor].producer is None:
                left += self._parents[tensor] - seen
                seen |= self._parents[tensor]
        return list(dict.fromkeys(found)), seen

    def _flows_only(self, start: int, ends: set[int], inside: set[int]) -> bool:
        seen, left = {start}, [start]
        while left:
            tensor = left.pop()
            if tensor in ends:
                continue
            if tensor not in inside or tensor in self._sources:
                return False  # it leads elsewhere, or a Linear reads it on the way
            left += self._children[tensor] - seen
            seen |= self._children[tensor]
        return True


@contextmanager
def watch(
    model: nn.Module, linears: Mapping[str, nn.Module], *, shared: str | None = None
) -> Iterator[Watch]:
    """Watch `model` inside the `with` block; hooks go even where it raises.

    Args:
        model: To be run inside.
        linears: Of the model, by path.
        shared: Path of the one whose weight other modules may read, or None.
    """
    seen = Watch({name: linear for name, linear in linears.items() if name != shared})
    with hooked(_watching(model, linears, seen)), seen:
        yield seen


def _watching(
    model: nn.Module, linears: Mapping[str, nn.Module], seen: Watch
) -> Iterator[RemovableHandle]:
    for name, module in linears.items():
        yield module.register_forward_pre_hook(_starts(seen, name))
        if type(module).forward is not nn.Linear.forward:
            yield module.register_forward_hook(_compares(seen, name))
        yield module.register_forward_hook(_ends(seen.end_linear, name))
    for name, module in model.named_modules():
        if _may_be_norm(module):
            yield module.register_forward_hook(_ends(seen.end_norm, name))


def _starts(seen: Watch, name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.start_linear(name, args[0])

    return hook


def _compares(seen: Watch, name: str) -> Callable[..., None]:
    """A class may write a Linear's product its own way (Falcon), or do more (routers)."""

    def hook(linear: nn.Linear, args: tuple[Tensor, ...], output: Any) -> None:
        product = nn.functional.linear(args[0], linear.weight, linear.bias)
        tensor = isinstance(output, Tensor) and output.shape == product.shape
        if not tensor or not torch.allclose(output, product, rtol=1e-3, atol=1e-4):
            seen.stay_float[name] = NO_LINEAR

    return hook


def _ends(note: Callable[[str, Any], None], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        note(name, output)

    return hook


def _may_be_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    leaf = next(module.children(), None) is None
    return leaf and isinstance(weight, Tensor) and weight.ndim == 1


def _is_view(output: Tensor, tensor: Tensor) -> bool:
    same_storage = output.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return same_storage and output.numel() == tensor.numel()
