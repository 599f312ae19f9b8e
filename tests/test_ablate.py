"""tests/ablate.py: edits still fit the script and train, the table pairs by seed, finished runs are not run again."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import ablate
import pytest
import quantized
import torch
from tools import ROOT, SIZES, t


def row(recipe: str, seed: int, final: float, floating: float) -> dict[str, Any]:
    """A finished run."""
    return {"recipe": recipe, "proxy": "small", "seed": seed, "final_bpb": final, "float_bpb": floating,
            "model_bytes": 1000, "mlp_bits": "3.5", "settings": {"ITERATIONS": 500}}  # fmt: skip


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
    """Differences are between runs of one seed, and shown for each."""
    rows = [row("default", 1, 2.0, 1.99), row("default", 2, 2.2, 2.19), row("pr314_spread", 2, 2.5, 2.4),
            row("xsa_0", 1, 2.1, 2.1), row("xsa_0", 2, 2.25, 2.1)]  # fmt: skip
    lines = ablate.table(rows).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["small", "default", "1, 2", "500", "2.0900", "2.1000", "0.1414", "-0.3000", "", "3.5", "1000"]
    assert "| +0.3000 |" in lines[3] and "| -0.2500 | +0.0750 (+0.1000, +0.0500) |" in lines[4]


def test_equal_time_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slower step means fewer steps, the warmdown is a share of them; the same bytes are left to the model."""
    monkeypatch.setitem(ablate.STEP_TIME, "full_size", {"small": 1.25})
    args = argparse.Namespace(tokenizer="t")
    full, pr314 = (ablate.settings_of(name, "small", 1, "x" * 100, args) for name in ("full_size", "pr314_spread"))
    assert (full["ITERATIONS"], full["WARMDOWN_ITERS"], pr314["ITERATIONS"]) == (400, 240, 500)
    assert full["ARTIFACT_LIMIT_BYTES"] == 100 + ablate.MODEL_BYTES["small"] and full["ROPE_DIMS"] == 16
    for name in ablate.RECIPES.keys() - {"e735e01"}:
        settings = ablate.settings_of(name, "screen", 1, "", args)
        cfg, warnings = t.load_config({key: str(value) for key, value in settings.items()})
        assert cfg.iterations == 600 and not warnings


def test_trainings_of_quantized_have_a_config() -> None:
    """Every row's settings are ones that the script takes, and the limit leaves its bits to the model."""
    args = argparse.Namespace(tokenizer="t", data="d")
    for training in quantized.TRAININGS.values():
        cfg = quantized.config_of(42, training, args)
        params = sum(p.numel() for p in t.GPT(cfg, torch.float32).parameters())
        model_bits = 8 * (cfg.artifact_limit_bytes - t.CODE_BYTES) / params
        assert (cfg.mlp_bits, cfg.mlp_mult) == (training.mlp_bits, 4)
        assert model_bits == pytest.approx(training.bits, abs=1e-4)


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the results file are not run again; a run that fails leaves the others."""
    results, calls = tmp_path / "r.jsonl", []
    results.write_text(json.dumps(row("default", 42, 2.0, 1.9)) + "\n")

    def fake(name: str, proxy: str, seed: int, _: Any) -> dict[str, Any]:
        """A run without training."""
        calls.append((name, proxy, seed))
        if name == "pr314_spread":
            raise RuntimeError("no memory")
        return row(name, seed, 2.1, 2.0)

    monkeypatch.setattr(ablate, "one_run", fake)
    monkeypatch.setattr(sys, "argv", ["ablate", "--data", "d", "--tokenizer", "t", "--results", str(results),
                                      "--only", "^(default|pr314_spread|e735e01) small 42"])  # fmt: skip
    assert ablate.main() == 0
    assert set(calls) == {("pr314_spread", "small", 42), ("e735e01", "small", 42)}
    assert [json.loads(line)["recipe"] for line in results.read_text().splitlines()] == ["default", "e735e01"]


def test_ablations_page_has_the_table() -> None:
    """logs/ABLATIONS.md shows what the results hold."""
    page = (ROOT / "logs" / "ABLATIONS.md").read_text(encoding="utf-8")
    for name, mark, table in (("ablations-2", "table", ablate.table), ("quantized", "quantized", quantized.table)):
        results = ROOT / "logs" / f"{name}.jsonl"
        if results.is_file():
            rows = [json.loads(line) for line in results.read_text().splitlines()]
            assert page.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip() == table(rows)
