"""Importers: other people's quantized models, read into packed ones. Each file here is a format.

Nothing is rounded: weights become codes and scales that stand for exactly the same numbers, or the model is refused
with the name of the first tensor that has none. Read `core/base.py` for what an importer offers; `core/conversion.py`
makes the packed model.
"""

from edgerazor.importers.core.conversion import ImportResult, find_importer, import_model

__all__ = ["ImportResult", "find_importer", "import_model"]
