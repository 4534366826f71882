"""Exporters: other people's files, written from codes and scales. Each file here is a format, or several of one kind.

An export is lossless or refused by name: it says which tensors its format cannot hold exactly, and `--allow-lossy` is
the only way around. Read `core/base.py` for what an exporter offers; `core/writing.py` writes all that were asked for.
"""

from edgerazor.exporters.core.base import (
    Exporter,
    ExportPlan,
    ExportResult,
    PlannedTensor,
    refuse_lossy,
    refuse_rotated,
)
from edgerazor.exporters.core.writing import available, check, find, plan_all, write_all

__all__ = [
    "ExportPlan",
    "ExportResult",
    "Exporter",
    "PlannedTensor",
    "available",
    "check",
    "find",
    "plan_all",
    "refuse_lossy",
    "refuse_rotated",
    "write_all",
]
