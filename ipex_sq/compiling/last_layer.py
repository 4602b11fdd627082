"""The last layer of a classifier, from its tail on, on the first token of each text.

The classifier's forward says, for its own thread and call, whether one token is enough; the layer,
called outside of the compiled region, picks between two compiled functions.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ipex_sq.compiling.hooks import HOOKS, hooks_of_all_modules, is_awake
from ipex_sq.models.first_token import FirstToken, first_tokens
from ipex_sq.models.layers import find_layers

_ENOUGH: ContextVar[FirstToken | None] = ContextVar("_ENOUGH", default=None)
"""Of the classifier that is running in this thread, if one token is enough for its call."""

KNOWN = frozenset(
    {
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
        *("labels", "return_dict", "use_cache"),
    }
)
"""Arguments that ask for logits alone. Any other one, if given, may ask for more tokens."""

WANTS_MORE = ("output_hidden_states", "output_attentions")


class ClassifierForward:
    """The forward of a classifier that was found to read the first token alone.

    All tokens run to the end where more than the logits could be seen: other outputs are asked for,
    a hook watches the last layer or what follows, the model trains or is no longer what was proved.
    """

    def __init__(self, model: nn.Module, first_token: FirstToken) -> None:
        self._forward = model.forward
        self._model = model
        self._first_token = first_token
        self._names = tuple(inspect.signature(model.forward).parameters)
        functools.update_wrapper(self, model.forward)  # the signature, which transformers reads
        before = {id(item) for layer in find_layers(model)[:-1] for item in layer.modules()}
        watched = [item for item in model.modules() if id(item) not in before]
        self._held = [(item, list(item._modules.values())) for item in watched if item._modules]
        self._hooks = [getattr(item, name) for item in watched[1:] for name in HOOKS]

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; what sets a `ContextVar` is no graph, what it calls may be."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        token = _ENOUGH.set(self._first_token if self._is_enough(named) else None)
        try:
            return self._forward(*args, **kwargs)
        finally:
            _ENOUGH.reset(token)

    def _is_enough(self, arguments: Mapping[str, Any]) -> bool:
        model: Any = self._model
        hooks = (*self._hooks, *hooks_of_all_modules())
        configs = [getattr(item, "config", None) for item in (model, model.base_model)]
        return not (
            model.training
            or any(name not in KNOWN and _is_given(arguments[name]) for name in arguments)
            or any(getattr(config, name, False) for config in configs for name in WANTS_MORE)
            or any(is_awake(hook) for some in hooks if some for hook in some.values())
            or any(list(item._modules.values()) != held for item, held in self._held)
        )


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


class CutLayer:
    """The layer of a `FirstToken` with the rows taken off before its tail."""

    def __init__(self, first_token: FirstToken) -> None:
        self._first_token = first_token
        self._tail = _FirstRows(first_token.tail)
        self._copies: list[_Copy] = []

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a file: it makes its own copies of modules, with its first call."""
        return {**vars(self), "_copies": []}

    def is_enough(self) -> bool:
        """Whether the classifier's call that runs in this thread needs no more than this."""
        return _ENOUGH.get() is self._first_token

    def current(self) -> nn.Module:
        """The layer with all that it has now, but copies of the modules around the tail.

        They are kept until something of theirs changes: Dynamo then knows again what has not.
        """
        copies = self._copies
        if not copies or not all(map(_Copy.is_current, copies)):
            self._copies = copies = self._copy()
        return copies[0].module

    def _copy(self) -> list[_Copy]:
        *around, last = self._first_token.path.split(".")
        copies = [_Copy(self._first_token.layer)]
        for name in around:
            copies.append(_Copy(copies[-1].of.get_submodule(name)))
            copies[-2].module._modules[name] = copies[-1].module
        copies[-1].module._modules[last] = self._tail
        return copies


class _Copy:
    """A module that shares everything with another one, but may have other modules."""

    def __init__(self, module: nn.Module) -> None:
        self.of = module
        self.module = copy.copy(module)
        self._modules = list(module._modules.values())
        vars(self.module)["_modules"] = dict(module._modules)

    def is_current(self) -> bool:
        """Whether the other one still has the same attributes and modules."""
        own, others = vars(self.module), vars(self.of)
        names = others.keys() - {"_modules"}
        same = len(own) == len(others) and all(own.get(name, own) is others[name] for name in names)
        return same and list(self.of._modules.values()) == self._modules


class _FirstRows(nn.Module):
    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.tail = tail
        self.training = tail.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The tail on the first token of each text."""
        kwargs = {name: first_tokens(value) for name, value in kwargs.items()}
        return self.tail(*[first_tokens(value) for value in args], **kwargs)
