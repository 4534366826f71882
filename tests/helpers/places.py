"""Where the repository is, and the models and texts beside it that some tests read where they are there."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Models, texts and items of tasks that are not in the repository.
SHARED = ROOT.parent / "shared" / "data"
