"""A decoder layer on one more token of each text, as a compiled graph.

torch.export makes the graph and proves it for all numbers of texts and tokens that it is declared
for. What a layer's own Python decides is decided once; layers that differ in any of that have
graphs of their own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from ipex_sq.compiling.one_thread import traced_alone
from ipex_sq.compiling.step_call import (
    CAPACITY,
    TEXTS,
    TOKENS,
    Form,
    Size,
    Sizes,
    StepCall,
    shape_of,
)
from ipex_sq.kernels.brgemm import MOST_ROWS
from ipex_sq.models.caching import LayerCache

MOST_TOKENS = 2**20
_TEXTS = (1, 1), (2, MOST_ROWS), (MOST_ROWS + 1, 2**16)
"""Least and most of a graph: code branches on these."""

_EXAMPLE = {TOKENS: 101, CAPACITY: 113}
"""Unlike each other and the texts: torch.export takes equal numbers for the same."""

_OF_LAYER = "layer."

Input = str | int | Tensor
"""Of a graph: a path in the layer, a place among a call's tensors, or a constant."""


class _Output(Enum):
    TENSOR = auto()
    CACHE = auto()
    NOTHING = auto()

    @classmethod
    def of(cls, item: Any, cache: LayerCache) -> _Output:
        if isinstance(item, Tensor):
            return cls.TENSOR
        if item is not None and item is not cache:
            raise TypeError("the layer's outputs are not tensors")
        return cls.NOTHING if item is None else cls.CACHE


_Outputs = tuple[_Output, ...] | _Output
"""Of a layer; in a tuple if they are in one."""


@dataclass
class StepGraph:
    """A compiled step.

    Attributes:
        run: Takes what `inputs` name, gives the tensors of the outputs; fills the room.
        inputs: In turn.
        form: Of the calls that it is for.
        sizes: As well.
        texts: Least and most.
        outputs: Of each output of the layer what it is, in a tuple if it was in one.
    """

    run: Callable[..., Sequence[Tensor]]
    inputs: tuple[Input, ...]
    form: Form
    sizes: Sizes
    texts: tuple[int, int]
    outputs: _Outputs
    _shapes: tuple[dict[str, int], list[tuple[int, ...]]] = field(default=({}, []))

    def outputs_of(self, tensors: Sequence[Tensor], cache: Any) -> Any:
        """What the layer would return, from what `run` gave; `cache` where it hands that on."""
        if isinstance(self.outputs, _Output):
            return tensors[0]
        rest = iter(tensors)
        others = {_Output.CACHE: cache, _Output.NOTHING: None}
        return tuple(
            next(rest) if kind is _Output.TENSOR else others[kind] for kind in self.outputs
        )

    def fits(self, call: StepCall) -> bool:
        """Whether it is proved for `call`."""
        proved = self.texts[0] <= call.texts <= self.texts[1]
        if call.form != self.form or not proved or call.numbers[CAPACITY] > MOST_TOKENS:
            return False
        numbers, shapes = self._shapes
        if numbers != call.numbers:  # the same for all layers of a step
            shapes = [shape_of(sizes, call.numbers) for _, sizes in self.sizes]
            self._shapes = call.numbers, shapes
        return all(
            tensor.shape == shape and tensor.dtype == dtype
            for tensor, shape, (dtype, _) in zip(call.tensors, shapes, self.sizes, strict=True)
        )


class _NoNumber:
    """Stands for a layer's number while its graph is made: code that asks for it fails."""

    def _refuse(self, *_args: Any) -> Any:
        raise TypeError("the layer's code depends on its number")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = __bool__ = __int__ = __index__ = __float__ = _refuse
    __str__ = __format__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mod__ = __mul__ = _refuse


def _without_number(module: nn.Module) -> nn.Module:
    """A module with the same tensors and attributes, but for the layer's number.

    The module itself stays as it is, other threads may be running it: torch.export puts tensors of
    its own into the twin's dictionaries while it traces.
    """
    twin = copy.copy(module)
    own = vars(twin)
    for name in ("_parameters", "_buffers", "_modules"):
        own[name] = own[name].copy()
    for name, child in module._modules.items():
        own["_modules"][name] = None if child is None else _without_number(child)
    if "layer_idx" in own:
        own["layer_idx"] = _NoNumber()
    return twin


class _Step(nn.Module):
    """A layer with tensors in and tensors out, as torch.export wants it."""

    def __init__(
        self,
        layer: nn.Module,
        forward: Callable[..., Any],
        call: StepCall,
        tell: Callable[[_Outputs], None],
    ) -> None:
        """`tell` is given what the layer's outputs were, once it has run."""
        super().__init__()
        self.layer = layer
        self._tell = tell  # torch.export takes back what it finds changed in a module
        self._forward = forward
        self._call = call

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        cache, arguments = self._call.cache_and_arguments(tensors)
        outputs = self._forward(self.layer, **arguments)
        items = outputs if isinstance(outputs, tuple) else (outputs,)
        kinds = tuple(_Output.of(item, cache) for item in items)
        self._tell(kinds if isinstance(outputs, tuple) else kinds[0])
        return tuple(item for item in items if isinstance(item, Tensor))


def compile_step(layer: nn.Module, forward: Callable[..., Any], call: StepCall) -> StepGraph:
    """The graph of `layer`, whose own forward is `forward`, for calls like `call`.

    To be called by one thread at a time; others may run the layer.

    Raises:
        Exception: Of torch.export or of the layer's code, where it is none that can be a graph.
    """
    from ipex_sq.compiling.inductor import inductor

    sizes = call.sizes()
    texts = next(span for span in _TEXTS if span[0] <= call.texts <= span[1])
    of = {name: torch.export.Dim(name, min=2, max=MOST_TOKENS) for name in (TOKENS, CAPACITY)}
    if call.texts > 1:
        of[TEXTS] = torch.export.Dim(TEXTS, min=texts[0], max=texts[1])
    shapes = [{d: _dim(of, size) for d, size in enumerate(named)} for _, named in sizes]
    example = {**_EXAMPLE, TEXTS: min(texts[0] + 5, texts[1])}
    outputs: list[_Outputs] = []
    step = _Step(_without_number(layer), forward, call, outputs.append)
    with traced_alone(), torch.inference_mode(False), torch.no_grad():
        examples = [torch.zeros(shape_of(named, example), dtype=dtype) for dtype, named in sizes]
        exported = torch.export.export(step, (examples,), dynamic_shapes=(shapes,), strict=False)
        graph, inputs = _with_used_inputs(exported, layer)
        run = inductor(
            graph, [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        )
    return StepGraph(run, inputs, call.form, sizes, texts, outputs[-1])


def _dim(of: Mapping[str, Any], size: Size) -> Any:
    if isinstance(size, int):
        return torch.export.Dim.STATIC
    name, number = size
    return of[name] if number == 1 else number * of[name]


def _with_used_inputs(exported: Any, layer: nn.Module) -> tuple[fx.GraphModule, tuple[Input, ...]]:
    """The graph without the inputs that it does not read, and where the others come from."""
    graph: fx.GraphModule = exported.graph_module
    nodes = graph.graph.find_nodes(op="placeholder")
    inputs: list[Input] = []
    places = itertools.count()
    for node, spec in zip(nodes, exported.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            source: Input = next(places)
        elif place_of(layer, spec.target.removeprefix(_OF_LAYER)) is not None:
            source = spec.target.removeprefix(_OF_LAYER)
        else:
            source = exported.constants[spec.target]
        if node.users:
            inputs.append(source)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return graph, tuple(inputs)


def place_of(layer: nn.Module, path: str) -> tuple[dict[str, Any], str] | None:
    """The dictionary that holds the tensor at `path` of `layer`, and its key; None if none does."""
    parent, _, name = path.rpartition(".")
    try:
        module = layer.get_submodule(parent)
    except AttributeError:
        return None
    holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
    return next(((holder, name) for holder in holders if name in holder), None)
