"""edgerazor: compress a Hugging Face causal language model to 1.58-4 bits and measure what it cost.

Importing this package is light: it loads neither torch nor transformers. It makes packed folders loadable with
`transformers.AutoModelForCausalLM.from_pretrained`: at once when transformers is loaded, else when it is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOOKED = "transformers.quantizers.auto"


def load(folder: str | os.PathLike[str], **options: Any) -> Any:
    """Load a packed model to run it: see `edgerazor.runtime.load`."""
    from edgerazor import runtime

    return runtime.load(folder, **options)


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Waits for transformers' table of quantizers to be imported, then adds ours."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _HOOKED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    """A module's own loader, and then our entries in the module."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _add_quantizer(module)


def _add_quantizer(auto: Any) -> None:
    """Enter our classes in transformers' tables, to be imported when a packed folder is loaded."""

    class Lazy:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, attribute: str) -> Any:
            from edgerazor import transformers_plugin

            return getattr(getattr(transformers_plugin, self.name), attribute)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            from edgerazor import transformers_plugin

            return getattr(transformers_plugin, self.name)(*args, **kwargs)

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("edgerazor", Lazy("EdgeRazorConfig"))
    auto.AUTO_QUANTIZER_MAPPING.setdefault("edgerazor", Lazy("EdgeRazorQuantizer"))


if _HOOKED in sys.modules:
    _add_quantizer(sys.modules[_HOOKED])
else:
    sys.meta_path.insert(0, _RegisterOnImport())
