"""Where the benchmarks find what they read, and where they leave what they make."""

from __future__ import annotations

from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
RECIPES = BENCHMARKS.parent
WORLD = RECIPES / "world"
RESULTS = RECIPES / "results"
CHECKOUT = RECIPES.parent
#: Not in the repository: models, environments and unfinished work.
BUILD = CHECKOUT / "build"
