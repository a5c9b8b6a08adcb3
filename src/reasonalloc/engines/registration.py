"""Registers the attention implementation "reasonalloc" with transformers, and never imports transformers for it.

After a mere ``import reasonalloc``, before or behind that of transformers,
``AutoModelForCausalLM.from_pretrained(..., attn_implementation="reasonalloc")`` must work. So where transformers'
models are loaded already, the implementation is registered at once; otherwise a finder at the head of
``sys.meta_path`` waits for the one module that every model needs, lets the others find it, registers as soon as it
has run, and goes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AWAITED = "transformers.modeling_utils"  # no model can be made before it is loaded
REGISTERS = "reasonalloc.engines.transformers.attention"  # importing it registers


def register_attention() -> None:
    """Register now, or as soon as transformers' models are loaded. Imports nothing that is not loaded already.

    What is wrong with an installed transformers (too old, say) shows where transformers is imported.
    """
    if AWAITED in sys.modules:
        import_module(REGISTERS)
    else:
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds ``AWAITED`` as the other finders do, and has its loader register afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        for finder in list(sys.meta_path):
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None


class _RegisteringLoader(Loader):
    """A module's own loader, followed by the registration. In all else it is that loader."""

    def __init__(self, own: Loader, finder: _Waiting) -> None:
        self._own, self._finder = own, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        import_module(REGISTERS)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
