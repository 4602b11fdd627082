"""A model whose blocks are in memory one at a time.

The model of transformers stays as it is: its embeddings, masks, positions and head run as written.
Blocks are empty and pass their input on, but for the one that is worked on, which gets the hidden
states that the block before it left. So nothing is known here about any architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.errors import UnsupportedModelError
from ipex_sq.models.conv1d import conv1d_weights, convert_conv1d
from ipex_sq.models.folding import replace_module
from ipex_sq.models.loading import float_skeleton
from ipex_sq.models.topology import quantizable_linears
from ipex_sq.streaming.weights import FloatWeights

Feed = Iterable[Tensor | None]
"""What enters a block, run after run; None stands for what the model itself gives it."""


class StreamedModel:
    """A float language model in fp32, of which a folder holds the weights.

    Attributes:
        model: As transformers builds it; parameters of blocks with more than one dimension are on
            the meta device. Persistent buffers count as parameters.
        blocks: Module paths of the blocks, in order of execution.
        weights: Where the parameters come from.
        linears: Those of the blocks that may become int8, by path.
        outside: Names of the parameters of no block.
        sizes: How many numbers each parameter has.
        gives_tuples: Whether blocks return tuples; known after `all_in_turn`.
    """

    def __init__(self, folder: Path) -> None:
        """Build the model, without weights.

        Raises:
            CheckpointError: The folder holds no safetensors or others than config.json says.
            UnsupportedModelError: No language model, or Linears that belong to no block.
        """
        model = float_skeleton(str(folder))
        transposed = conv1d_weights(model)
        self.model = convert_conv1d(model)
        self.linears, _ = quantizable_linears(self.model)
        self.blocks = _block_paths(self.model, self.linears)
        self.weights = FloatWeights(folder, self.model, transposed)
        self.gives_tuples = False
        state = self.model.state_dict(keep_vars=True)
        self._meta = sizes = {name: state[name] for name in self.weights.tied}
        self._own = {
            path: [name for name in sizes if name.startswith(f"{path}.")] for path in self.blocks
        }
        inside = {name for names in self._own.values() for name in names}
        self.outside = [name for name in sizes if name not in inside]
        self.sizes = {name: parameter.numel() for name, parameter in sizes.items()}
        self._large = {
            path: [name for name in names if sizes[name].ndim > 1]
            for path, names in self._own.items()
        }

    def load_outside(self) -> None:
        """Load what belongs to no block, and the small parameters of the blocks.

        Raises:
            NumericalCheckError: A weight is not finite.
        """
        large = {name for names in self._large.values() for name in names}
        self._fill([name for name in self.sizes if name not in large], check=True)
        for path in self.blocks:
            self.model.get_submodule(path).forward = self._skip  # type: ignore[method-assign]

    def parameters_of(self, path: str) -> list[str]:
        """Names of the parameters of a block."""
        return self._own[path]

    @contextmanager
    def block(self, path: str, *, check: bool = False) -> Iterator[nn.Module]:
        """Inside, the block at `path` has its weights, and may be changed: a fresh one comes next.

        `check`: whether these are finite.
        """
        empty = self.model.get_submodule(path)
        skip = empty.__dict__.pop("forward")  # it knows the whole model, which is not to be copied
        real = copy.deepcopy(empty)
        empty.forward = skip
        replace_module(self.model, path, real)
        try:
            self._fill(self._large[path], check=check)
            yield real
        finally:
            replace_module(self.model, path, empty)

    @contextmanager
    def feeding(self, path: str, inputs: Feed, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """Inside, every run of the model goes through the block at `path` alone.

        Args:
            path: Of a block in memory (`block`).
            inputs: Of its runs, `[batch, tokens, hidden]`.
            keep: Is given its outputs.
        """
        block, given = self.model.get_submodule(path), iter(inputs)
        real: Any = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = next(given)
            hidden = _hidden(args, kwargs) if hidden is None else hidden
            if torch.is_grad_enabled() and not hidden.requires_grad:
                hidden = hidden.detach().requires_grad_()
            # A copy: a block may change its input in place, and a leaf must not change.
            args, kwargs = _with_hidden(hidden.clone(), args, kwargs)
            output = real(*args, **kwargs)
            keep(output[0] if isinstance(output, tuple) else output)
            return output

        block.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            block.__dict__.pop("forward")

    @contextmanager
    def finishing(self, inputs: Iterable[Tensor | None]) -> Iterator[None]:
        """Inside, every run goes through no block; the head gets what the last one has given."""
        last, given = self.model.get_submodule(self.blocks[-1]), iter(inputs)
        last.forward = lambda *_args, **_kwargs: self._output(next(given))  # type: ignore[method-assign, arg-type]
        try:
            yield
        finally:
            last.forward = self._skip  # type: ignore[method-assign]

    @contextmanager
    def all_in_turn(self, progress: Callable[[], None]) -> Iterator[None]:
        """Inside, a run goes through all blocks, each loaded when its turn comes.

        `progress` is called after each.
        """

        def forward_of(path: str) -> Callable[..., Any]:
            block = self.model.get_submodule(path)
            real: Any = type(block).forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                with torch._C.DisableTorchFunction():  # a watched pass would keep all weights alive
                    self._fill(self._large[path])
                output = real(block, *args, **kwargs)
                self._empty(self._large[path])
                self.gives_tuples = isinstance(output, tuple)
                progress()
                return output

            return forward

        blocks = {path: self.model.get_submodule(path) for path in self.blocks}
        for path, block in blocks.items():
            block.forward = forward_of(path)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block in blocks.values():
                block.forward = self._skip  # type: ignore[method-assign]

    def _skip(self, *args: Any, **kwargs: Any) -> Any:
        return self._output(_hidden(args, kwargs))

    def _output(self, hidden: Tensor) -> Any:
        return (hidden,) if self.gives_tuples else hidden

    def _fill(self, names: Iterable[str], *, check: bool = False) -> None:
        for name in names:
            weight = self.weights.read(name, check=check)
            if isinstance(self._meta[name], nn.Parameter):
                weight = nn.Parameter(weight, requires_grad=False)
            for place in (name, *self.weights.tied[name]):
                self._set(place, weight)

    def _empty(self, names: Iterable[str]) -> None:
        for name in names:
            for place in (name, *self.weights.tied[name]):
                self._set(place, self._meta[name])

    def _set(self, name: str, weight: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if isinstance(weight, nn.Parameter):
            module._parameters[leaf] = weight
        else:
            module._buffers[leaf] = weight


def _block_paths(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """The repeated layers: the ModuleList that holds most of the modules.

    Raises:
        UnsupportedModelError: There are none, or Linears that would be quantized lie elsewhere.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of blocks to go through")
    name, layers = max(lists, key=lambda item: sum(1 for _ in item[1].modules()))
    paths = [f"{name}.{index}" for index in range(len(layers))]
    outside = [linear for linear in linears if not linear.startswith(f"{name}.")]
    if outside:
        raise UnsupportedModelError(
            f"{outside[0]!r} belongs to no block: quantize this model in memory"
        )
    return paths


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _with_hidden(
    hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
