"""Runs a model's decoder layers on one more token, as few checks as possible between them.

torch.compile checks with every call whether its graph is still right, which for a small layer takes
half as long as its products. A call of a `StepGraph` compares little: that the arguments have the
declared form, and that the layer still has the tensors it had.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Mapping
from operator import is_
from typing import Any

from torch import nn

from ipex_sq.compiling.hooks import HooksInside
from ipex_sq.compiling.layer_kind import kind_of
from ipex_sq.compiling.one_thread import one_at_a_time
from ipex_sq.compiling.step_call import StepCall
from ipex_sq.compiling.step_graph import StepGraph, compile_step, place_of
from ipex_sq.models.caching import LayerCache, keep_token, past_of, room_for_one, with_cache

logger = logging.getLogger(__name__)

MOST_GRAPHS = 16
"""Of one kind of layer. Sizes that change with every token would otherwise be compiled forever."""


class StepGraphs:
    """The compiled steps that the layers of one model share."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, list[StepGraph]] = {}
        self._failed: set[Hashable] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepGraphs:
        """Those of a copied model: graphs hold no tensors of a layer, and stay."""
        twin = StepGraphs()
        twin._graphs = copy.deepcopy(dict(self._graphs), memo)
        twin._failed = copy.deepcopy(set(self._failed), memo)
        return twin

    def __reduce__(self) -> tuple[type[StepGraphs], tuple[()]]:
        """Of a pickled model: none, what is compiled belongs to its process."""
        return StepGraphs, ()

    def __len__(self) -> int:
        return sum(len(graphs) for graphs in self._graphs.values())

    def get(
        self, layer: nn.Module, forward: Callable[..., Any], call: StepCall
    ) -> StepGraph | None:
        """The graph of `layer`, whose own forward is `forward`; None if it can have none.

        A call that another thread's graph may be for waits until that is compiled.
        """
        kind = kind_of(layer)
        fitting = self._find(kind, call)
        if fitting is not None or self._is_hopeless(kind, call):
            return fitting
        with one_at_a_time():
            kind = kind_of(layer)  # of the layer as it is now that no other thread compiles
            fitting = self._find(kind, call)
            if fitting is not None or self._is_hopeless(kind, call):
                return fitting
            try:
                graph = compile_step(layer, forward, call)
            except Exception as error:  # noqa: BLE001  # of torch.export and of the model's own code
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                if not self._failed:
                    logger.warning("this will take more time: steps are not compiled: %s", reason)
                self._failed.add((kind, call.form))
                return None
            self._graphs[kind] = [*self._graphs.get(kind, []), graph]
            return graph

    def _find(self, kind: Hashable, call: StepCall) -> StepGraph | None:
        graphs = self._graphs.get(kind, [])
        return next((graph for graph in graphs if graph.fits(call)), None)

    def _is_hopeless(self, kind: Hashable, call: StepCall) -> bool:
        many = len(self._graphs.get(kind, [])) >= MOST_GRAPHS
        return many or (kind, call.form) in self._failed


class LayerStep:
    """One layer on one more token of each text."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any], graphs: StepGraphs) -> None:
        """`forward` is the layer's own, of its class."""
        self._layer = layer
        self._forward = forward
        self._graphs = graphs
        self._bound: list[_BoundGraph] = []
        self._hooks = HooksInside(layer)

    def run(self, name: str, cache: Any, index: int, arguments: Mapping[str, Any]) -> Any:
        """The layer's outputs; `cache`, its argument `name`, holds the token for layer `index`."""
        held = past_of(cache, index)
        assert held is not None  # noqa: S101
        room = room_for_one(cache, index, held)
        call = StepCall.of(name, room, arguments)
        bound = None if call is None else self._graph_for(call)
        if bound is None or call is None:
            here = LayerCache(room)
            outputs = with_cache(self._forward(self._layer, **arguments, **{name: here}), cache)
        else:
            outputs = bound.run(call, cache)
        keep_token(cache, index, room)
        return outputs

    def _graph_for(self, call: StepCall) -> _BoundGraph | None:
        if self._hooks.any():
            return None
        for bound in self._bound:
            if bound.graph.fits(call) and bound.is_current():
                return bound
        graph = self._graphs.get(self._layer, self._forward, call)
        if graph is None:
            return None
        bound = _BoundGraph(graph, self._layer)
        # Another thread may put its own there meanwhile: what is lost is bound again.
        self._bound = [bound, *(other for other in self._bound if other.is_current())]
        return bound


class _BoundGraph:
    """A graph with the tensors of one layer."""

    def __init__(self, graph: StepGraph, layer: nn.Module) -> None:
        self.graph = graph
        self._layer = layer
        self._training = layer.training
        places = [place_of(layer, of) for of in graph.inputs if isinstance(of, str)]
        held = iter([place[0][place[1]] for place in places if place is not None])
        self._tensors = [
            next(held) if isinstance(of, str) else None if isinstance(of, int) else of
            for of in graph.inputs
        ]
        self._of_call = [(n, of) for n, of in enumerate(graph.inputs) if isinstance(of, int)]
        places += [
            (module._modules, name) for module in layer.modules() for name in module._modules
        ]
        self._holders = [place[0] for place in places if place is not None]
        self._names = [place[1] for place in places if place is not None]
        self._held = [holder[name] for holder, name in zip(self._holders, self._names, strict=True)]

    def is_current(self) -> bool:
        """Whether the layer still has the tensors and modules that it had, in the same mode."""
        held = map(dict.get, self._holders, self._names)
        same = self._layer.training == self._training
        return same and all(map(is_, held, self._held))

    def run(self, call: StepCall, cache: Any) -> Any:
        """The layer's outputs, `cache` among them where it hands its cache on."""
        inputs = self._tensors.copy()
        for n, at in self._of_call:
            inputs[n] = call.tensors[at]
        return self.graph.outputs_of(self.graph.run(*inputs), cache)
