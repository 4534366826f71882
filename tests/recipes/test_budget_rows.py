"""The table of budgets: how rows become a page, and that the stored ones hold what the page says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.benchmarks import budget
from recipes.benchmarks.folders import RESULTS

ROWS = RESULTS / "rows-of-budget"


def row(name: str, kl: float, **values: Any) -> dict[str, Any]:
    made = {"teacher": "tiny", "tokens": 1000, "name": name, "kl": kl, "machine": "a machine", "commit": "abc"}
    return {**made, "learning_rate": 1e-3, "step_tokens": 512, "fingerprint": "x", **values}


def test_rows_become_a_table(tmp_path: Path) -> None:
    rows = [
        row("fixed_0.001_512", 0.5),
        row("fixed_2e-05_1024", 1.0),
        row("gptq_0.001_512", 0.45),
        row("automatic", 0.51, learning_rate=5e-4, step_tokens=256),
    ]
    (tmp_path / "tiny").mkdir()
    for each in rows:
        (tmp_path / "tiny" / f"{each['name']}.json").write_text(json.dumps(each))
    text = budget.table(tmp_path)
    assert "| tiny | 1,000 | 0.001, 512 tokens a step | 0.5000 | 0.0005, 256 | 0.5100 | +2.0 % |" in text
    assert "| 2e-05 |  | 1.0000 |" in text
    assert "- gptq (0.001, 512): 0.4500, -10.0 % of the fixed row" in text


def test_an_automatic_choice_is_hardly_worse_than_the_best_of_the_sweep() -> None:
    groups: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for file in ROWS.glob("*/*.json"):
        stored = json.loads(file.read_text(encoding="utf-8"))
        groups.setdefault((stored["teacher"], stored["tokens"]), {})[stored["name"]] = stored
    compared = {key: rows for key, rows in groups.items() if "automatic" in rows and budget.fixed_rows(rows)}
    assert compared
    for key, rows in compared.items():
        best = min(fixed["kl"] for fixed in budget.fixed_rows(rows).values())
        assert rows["automatic"]["kl"] <= budget.BOUND * best, key
