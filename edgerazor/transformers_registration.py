"""Make transformers know our quantizer, without importing transformers or torch.

transformers looks up the quantizer of a checkpoint in two tables of `transformers.quantizers.auto`. Where that module
is loaded already, our entries are added at once, else right behind its import. The entries are proxies that import
`edgerazor.transformers_plugin` when a packed folder is loaded.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

#: The module that holds transformers' tables of quantizers.
TABLES = "transformers.quantizers.auto"
#: The module that holds our classes; its name and not the module, which would import torch.
PLUGIN = "edgerazor.transformers_plugin"


def register_quantizer() -> None:
    """Add our quantizer and its configuration to transformers' tables, now or when transformers is imported."""
    if TABLES in sys.modules:
        _add_entries(sys.modules[TABLES])
    else:
        sys.meta_path.insert(0, _TablesFinder())


class _TablesFinder(importlib.abc.MetaPathFinder):
    """Finds transformers' tables as Python does, but with a loader that adds our entries."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TABLES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _TablesLoader(spec.loader)
        return spec


class _TablesLoader(importlib.abc.Loader):
    """A module's own loader, which adds our entries once the module is executed."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _add_entries(module)


class _LazyClass:
    """Stands for a class of the plugin, which is imported at the first use of the class."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(importlib.import_module(PLUGIN), self.name), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(PLUGIN), self.name)(*args, **kwargs)


def _add_entries(tables: Any) -> None:
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("edgerazor", _LazyClass("EdgeRazorConfig"))
    tables.AUTO_QUANTIZER_MAPPING.setdefault("edgerazor", _LazyClass("EdgeRazorQuantizer"))
