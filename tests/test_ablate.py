"""tests/ablate.py: edits still fit the script and train, the table pairs by seed, finished runs are not run again."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ablate
import pytest
import torch
import versions
from tools import ROOT, SIZES


def row(recipe: str, seed: int, final: float, floating: float) -> dict[str, Any]:
    """A finished run."""
    return {"recipe": recipe, "proxy": "small", "seed": seed, "final_bpb": final, "float_bpb": floating,
            "model_bytes": 1000, "step_ms": 10.0}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, recipe in ablate.RECIPES.items() if recipe.edits])
def test_edited_scripts_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text to replace occurs once; the edited model takes steps, also with fake quantization and averaging."""
    module = ablate.edited_module(name, tmp_path)
    (tmp_path / "text.txt").write_text("how much wood would a woodchuck chuck if a woodchuck could chuck wood. " * 600)
    for n, value in (SIZES | {"vocab_size": 300, "text_files": "text.txt", "run_id": "edited"}).items():
        monkeypatch.setenv(n.upper(), str(int(value) if isinstance(value, bool) else value))
    monkeypatch.chdir(tmp_path)
    assert module.main(*module.load_config(os.environ)) == 0
    trained = module.load_tensors(Path("logs/edited.weights"))
    assert all(torch.isfinite(value).all() for value in trained["weights"].values())


def test_table_pairs_seeds() -> None:
    """Differences are between runs of one seed; the gap counts from the better of the two float references."""
    rows = [row("default", 1, 2.0, 1.99), row("default", 2, 2.2, 2.19), row("pr314", 2, 2.5, 2.4),
            row("noqat", 1, 9.0, 1.995), row("noqat_swa", 1, 9.0, 1.97)]  # fmt: skip
    lines = ablate.table(rows).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["small", "default", "1, 2", "2.0900", "2.1000", "0.1414", "-0.3000 (1 of 2)", "",
                     "+0.0300 (1 of 2)", "1000", "10"]  # fmt: skip
    assert "+0.3000" in lines[3]


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the results file are not run again; a run that fails leaves the others."""
    results, calls = tmp_path / "r.jsonl", []
    results.write_text(json.dumps(row("default", 42, 2.0, 1.9)) + "\n")

    def fake(name: str, proxy: str, seed: int, _: Any) -> dict[str, Any]:
        """A run without training."""
        calls.append((name, proxy, seed))
        if name == "pr314":
            raise RuntimeError("no memory")
        return row(name, seed, 2.1, 2.0)

    monkeypatch.setattr(ablate, "one_run", fake)
    monkeypatch.setattr(sys, "argv", ["ablate", "--data", "d", "--tokenizer", "t", "--results", str(results),
                                      "--only", "^(default|pr314|file_order) small 42"])  # fmt: skip
    assert ablate.main() == 0
    assert set(calls) == {("pr314", "small", 42), ("file_order", "small", 42)}
    assert [json.loads(line)["recipe"] for line in results.read_text().splitlines()] == ["default", "file_order"]


def test_table_of_versions() -> None:
    """Differences are between runs of one seed, and the page shows what the results hold."""
    keys = (("old", 1, 2.0), ("old", 2, 2.2), ("file", 2, 2.1))
    rows = [{"proxy": "small", "version": version, "seed": seed, "bpb": bpb} for version, seed, bpb in keys]
    assert versions.table(rows).splitlines()[2:] == [
        "| small | old | 1, 2 | 2.0000, 2.2000 | 2.1000 |  |",
        "| small | file | 2 | 2.1000 | 2.1000 | -0.1000 |",
    ]
    rows = [json.loads(line) for line in (ROOT / "logs" / "versions.jsonl").read_text().splitlines()]
    assert versions.table(rows) in (ROOT / "logs" / "ABLATIONS.md").read_text(encoding="utf-8")


def test_ablations_page_has_the_table() -> None:
    """logs/ABLATIONS.md shows what the results of both editions hold."""
    page = (ROOT / "logs" / "ABLATIONS.md").read_text(encoding="utf-8")
    for name, mark in (("ablations.jsonl", "table"), ("ablations-2.jsonl", "table 2")):
        results = ROOT / "logs" / name
        if results.is_file():
            rows = [json.loads(line) for line in results.read_text().splitlines()]
            assert page.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip() == ablate.table(rows)
