"""The page of engines names the exports that exist, with what they hold and refuse."""

from __future__ import annotations

import re

import pytest

from edgerazor import exporters
from edgerazor.exporters.compressed_tensors import CompressedTensors
from edgerazor.exporters.core.grouped import KNOWN_GROUPS, GroupedExporter
from edgerazor.exporters.gguf import Gguf
from edgerazor.exporters.hf import Dequantized
from edgerazor.packed import DTYPE_NAMES
from helpers.places import ROOT

PAGE = (ROOT / "edgerazor" / "exporters" / "README.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the rows under a heading, without its head."""
    lines = [line for line in PAGE.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


WRITTEN = {line[0].strip("`"): line[1:] for line in table("What is written")}


def test_every_export_has_its_row() -> None:
    assert WRITTEN.keys() == exporters.available().keys()


@pytest.mark.parametrize("name", sorted(exporters.available()))
def test_a_row_says_what_the_exporter_holds(name: str) -> None:
    exporter = exporters.find(name)
    widths, groups, inputs, rotated, _ = WRITTEN[name]
    assert rotated == ("rotated back" if exporter.rotated else "refused")
    if isinstance(exporter, GroupedExporter):
        assert widths == ", ".join(map(str, exporter.widths))
        sizes = sorted({*KNOWN_GROUPS, *(size for bits in exporter.widths for size in exporter.known_groups(bits))})
        assert groups == ", ".join([*map(str, sizes), "row"])
        assert inputs == (
            "8 bits, dynamic" if isinstance(exporter, CompressedTensors) and exporter.inputs else "16 bits"
        )
    elif isinstance(exporter, Gguf):
        assert widths == ", ".join(each.type.name for each in exporter.blocks) or not exporter.blocks
        sizes = [block.size for block in exporter.blocks]
        assert groups == (", ".join(map(str, dict.fromkeys(sizes))) or "none")
        assert bool(exporter.blocks) or widths == exporter.floats[0].name
    else:
        assert isinstance(exporter, Dequantized)
        assert widths == ", ".join(DTYPE_NAMES[dtype] for dtype in exporter.dtypes)


def test_engines_are_given_exports_that_exist() -> None:
    named = {name for line in table("Who runs it") for name in re.findall("`([^`]+)`", line[1])}
    assert named == exporters.available().keys()


def test_the_page_is_linked() -> None:
    assert "exporters/README.md" in (ROOT / "edgerazor" / "README.md").read_text(encoding="utf-8")
    assert "exporters/README.md" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
