"""Makes transformers know int8 checkpoints as soon as both packages are imported, in either order.

`import ipex_sq` must not import transformers, and transformers has no plug-in mechanism: it knows
what was passed to its registering functions. So the module that holds these is waited for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
QUANTIZER = "ipex_sq.checkpoint.quantizer"


def register_with_transformers() -> None:
    """Register now where transformers is imported, else right after it is."""
    if REGISTRY in sys.modules:
        importlib.import_module(QUANTIZER)
    else:
        sys.meta_path.insert(0, _Waiting())


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds `REGISTRY` once, by the other finders, and adds a step after its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Specification of `REGISTRY`; None of any other module."""
        del path, target
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(QUANTIZER)
