"""lm-eval without its bars and advice: stderr is ours, and stdout holds results only."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

#: Packages whose warnings say nothing that our notes do not say.
LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "transformers")


def _without_bar(bar: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return bar(*arguments, **(options | {"disable": True}))


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Errors only on stderr, nothing on stdout, no progress bars."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task

    modules = [lm_eval.api.task, lm_eval.api.model]
    if huggingface := sys.modules.get("lm_eval.models.huggingface"):
        modules.append(huggingface)
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    bars = [module.tqdm for module in modules]
    datasets_bars = datasets.are_progress_bars_disabled()
    try:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = functools.partial(_without_bar, bar)
        datasets.disable_progress_bars()
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar
        if not datasets_bars:
            datasets.enable_progress_bars()
