"""Plugins are files: `ls edgerazor/formats` is the list of formats.

A folder of plugins is a package; each module in it is one plugin and offers one object under an agreed attribute
(`FORMAT`, `LOSS`, `FAMILY`, `EXPORTER`, `IMPORTER`). The file name is the name in a recipe. What plugins share lies in
a package of its own, `core`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

from edgerazor.errors import UserError, usage_error

#: what one plugin of a package is called
SINGULAR = {"formats": "format", "losses": "loss", "exporters": "export", "importers": "import", "families": "family"}


def names(package: str) -> list[str]:
    """Names of the plugins in a package of ours (`names("formats")`), sorted. Only the package itself is imported."""
    module = importlib.import_module(f"edgerazor.{package}")
    return sorted(info.name for info in pkgutil.iter_modules(module.__path__) if not info.ispkg)


def find(package: str, name: str, attribute: str) -> Any:
    """The object that a plugin offers under an attribute.

    Raises:
        UserError: there is no such plugin; the message names the closest ones.
    """
    known = names(package)
    if name not in known:
        raise unknown(SINGULAR[package], name, known)
    return getattr(importlib.import_module(f"edgerazor.{package}.{name}"), attribute)


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a list, with the closest names in it."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(known)}."
    return usage_error(f"There is no {what} called {name!r}.", hint)
