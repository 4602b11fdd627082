"""Where a classifier needs the first token of each text alone: found by a tiny batch and proved.

A classifier of BERT's kind reads `hidden[:, 0]` of its last layer. Keys and values of that layer
need all tokens, but from some module on, its *tail*, one token of each text is enough.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ipex_sq.models.layers import find_layers
from ipex_sq.models.loading import SEQUENCE_CLASSIFICATION, task_of
from ipex_sq.models.running import run_model

logger = logging.getLogger(__name__)

MASK = ((1, 1, 1, 1, 1), (1, 1, 1, 0, 0), (0, 0, 1, 1, 1))
"""Of the tiny batch: a head that looks for the first or last real token is not taken for one that
reads the first."""

LARGE = 1000.0
"""Next to hidden states. NaN alone proves little where it is rounded to int8."""

CLOSE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}
"""Logits without the other rows, by their type, relative and absolute: fewer rows may take other
kernels, and int8 may round another way."""


@dataclass(frozen=True)
class FirstToken:
    """What may run on one token of each text without a change of the logits.

    Attributes:
        layer: The last of the repeated layers.
        path: Of its submodule, the tail, from which on one token is enough.
        linears: All of the model's Linears that run on one token if the tail does.
    """

    layer: nn.Module
    path: str
    linears: tuple[nn.Module, ...]

    @property
    def tail(self) -> nn.Module:
        """It gets two tensors `[batch, tokens, hidden]` or more and gives one."""
        return self.layer.get_submodule(self.path)


def find_first_token(model: nn.Module) -> FirstToken | None:
    """Find and prove the tail of a sequence classifier; None where there is none, or no proof.

    Args:
        model: With its weights, float or int8. A copy is run on a tiny batch a few times.
    """
    layers = find_layers(model)
    if task_of(model) != SEQUENCE_CLASSIFICATION or not layers:
        return None
    try:
        with torch.no_grad():
            copied = copy_modules(model)
            found = _find(copied, find_layers(copied)[-1])
    except Exception as error:  # noqa: BLE001  # of the model's own code, which a real text may not raise
        logger.debug("the last layer runs on all tokens: %r", error)
        return None
    if found is None:
        return None
    of_copy = {id(item): name for name, item in copied.named_modules()}
    linears = [model.get_submodule(of_copy[id(linear)]) for linear in found.linears]
    return FirstToken(layers[-1], found.path, tuple(linears))


def first_tokens(value: Any) -> Any:
    """The first token of each text of a tensor `[batch, tokens, hidden]`; others unchanged."""
    return value[:, :1] if isinstance(value, Tensor) else value


def give_values(model: nn.Module) -> None:
    """Let a model on the meta device run, in place: random weights, in memory one for each shape.

    Embeddings take a row's: each row is a window on the same numbers.
    """
    linears = {item.weight.shape for item in model.modules() if isinstance(item, nn.Linear)}
    made: dict[torch.Size, Tensor] = {}

    def value(tensor: Tensor) -> Tensor:
        shape = tensor.shape
        if tensor.is_meta and shape not in made:
            numbers = torch.randn(sum(shape), generator=torch.Generator().manual_seed(0))
            scaled = numbers / max(1, *shape[-1:]) ** 0.5
            window = scaled.to(tensor.dtype).as_strided(shape, [1] * len(shape))
            made[shape] = window.contiguous() if shape in linears else window
        return made[shape] if tensor.is_meta else tensor

    model._apply(value)


def copy_modules(model: nn.Module) -> nn.Module:
    """Modules of its own with the same tensors: BigBird exchanges modules for a short text."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _find(model: nn.Module, layer: nn.Module) -> FirstToken | None:
    batch, modules = _tiny_batch(model), list(model.modules())
    paths, logits = _candidates(model, layer, batch)
    # Where a short text made another model of it, nothing is proved for a long one.
    if not bool(logits.isfinite().all()) or list(model.modules()) != modules:
        return None
    for path in paths:
        tail = layer.get_submodule(path)
        if _ignores_other_rows(model, batch, tail, logits):
            linears = _linears_without_rows(model, batch, tail, logits)
            return None if linears is None else FirstToken(layer, path, linears)
    return None


def _tiny_batch(model: nn.Module) -> dict[str, Tensor]:
    config: Any = model.config
    mask = torch.tensor(MASK)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(config.vocab_size), mask.shape, generator=generator)
    if config.pad_token_id is not None:
        ids = ids.masked_fill(mask == 0, int(config.pad_token_id))
    return {"input_ids": ids, "attention_mask": mask}


def _candidates(
    model: nn.Module, layer: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[list[str], Tensor]:
    """Paths of what has the form of a tail, in order of execution; the logits."""
    inputs: dict[str, list[list[Tensor]]] = {}
    outputs: dict[str, Any] = {}

    def started(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (*args, *kwargs.values())
        tensors = [value for value in values if isinstance(value, Tensor)]
        inputs.setdefault(path, []).append(tensors)

    with ExitStack() as hooks:
        for path, module in layer.named_modules():
            start = module.register_forward_pre_hook(
                lambda _module, args, kwargs, path=path: started(path, args, kwargs),
                with_kwargs=True,
            )
            end = module.register_forward_hook(
                lambda _module, _args, output, path=path: outputs.update({path: output})
            )
            hooks.enter_context(start)
            hooks.enter_context(end)
        logits = run_model(model, batch)
    output = outputs[""]
    hidden = output if isinstance(output, Tensor) else output[0]
    shape = (*batch["input_ids"].shape, hidden.shape[-1])

    def fits(path: str) -> bool:
        output = outputs.get(path)
        if path == "" or not isinstance(output, Tensor) or len(inputs[path]) != 1:
            return False
        tensors = [*inputs[path][0], output]
        linear = any(_is_linear(module) for module in layer.get_submodule(path).modules())
        return linear and len(tensors) > 2 and all(item.shape == shape for item in tensors)

    return list(filter(fits, inputs)), logits


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


@contextmanager
def _changed(tail: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the block `tail` gets its arguments changed."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(change, args)), {name: change(value) for name, value in kwargs.items()}

    with tail.register_forward_pre_hook(hook, with_kwargs=True):
        yield


def _ignores_other_rows(
    model: nn.Module, batch: Mapping[str, Tensor], tail: nn.Module, logits: Tensor
) -> bool:
    """Whether the logits keep every bit, whatever all rows but the first hold."""
    generator = torch.Generator().manual_seed(0)

    def nan(value: Any) -> Any:
        return _with_rest(value, lambda rest: torch.full_like(rest, torch.nan))

    def noise(value: Any) -> Any:
        return _with_rest(value, lambda rest: LARGE * torch.randn(rest.shape, generator=generator))

    for change in (nan, noise):
        with _changed(tail, change):
            if not torch.equal(run_model(model, batch), logits):
                return False
    return True


def _with_rest(value: Any, fill: Callable[[Tensor], Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    changed = value.clone()
    changed[:, 1:] = fill(value[:, 1:])
    return changed


def _linears_without_rows(
    model: nn.Module, batch: Mapping[str, Tensor], tail: nn.Module, logits: Tensor
) -> tuple[nn.Module, ...] | None:
    """The Linears that get one row of each text, where the logits stay close; else None."""
    found: list[nn.Module] = []

    def hook(linear: nn.Module, _args: Any, output: Tensor) -> None:
        if output.numel() == len(logits) * output.shape[-1]:
            found.append(linear)

    with ExitStack() as hooks, _changed(tail, first_tokens):
        for module in filter(_is_linear, model.modules()):
            hooks.enter_context(module.register_forward_hook(hook))
        got = run_model(model, batch)
    close = CLOSE.get(logits.dtype, CLOSE[torch.float32])
    same = got.shape == logits.shape and torch.allclose(got, logits, rtol=close, atol=close)
    return tuple(found) if same else None
