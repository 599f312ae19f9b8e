"""The benchmark runs, and what it and the script count - FLOPs, activation memory - is what PyTorch counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ablate
import bench
import pytest
import torch

import train_gpt as t

TINY: dict[str, Any] = {
    "num_layers": 3, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 320, "bigram_vocab_size": 64,
    "bigram_dim": 16, "train_seq_len": 32, "train_batch_tokens": 64, "eval_stride": 8, "eval_batch_seqs": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs and shards go into a scratch folder; a round of peak products is short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "SECONDS_PER_PEAK", 1e-3)


def test_ratio_is_of_rounds() -> None:
    """A machine that halves its speed in mid-run changes no ratio."""
    assert bench.ratio([2.0, 4.0, 4.0], [1.0, 2.0, 2.0]) == 2.0
    calls: list[str] = []
    seconds = bench.alternating(2, lambda: calls.append("a"), lambda: calls.append("b"))
    assert "".join(calls) == "ababab" and [len(s) for s in seconds] == [2, 2]


def test_evaluation_rows() -> None:
    """Both comparisons of evaluations run; the scored span alone gives the same loss as all positions."""
    cfg = bench.config(**TINY | {"compute_dtype": "float32"})
    *_, speedup, difference = bench.exact_row(cfg, 4, 1)
    assert speedup > 0 and float(difference) < 1e-6
    assert bench.banded_row(cfg, 1, 1)[1] == (1 + t.BAND_CHUNKS) * cfg.train_seq_len


def test_weights_are_trained_and_scored() -> None:
    """The table of both modes: trained here, scored from the file, the same score by plain and sliding windows."""
    cfg = bench.config(**TINY)
    data = bench.random_data(cfg, 161)
    assert data.train is not None
    Path("made.model").write_bytes(data.tokenizer.serialized_model_proto())
    source, sizes = bench.Source(str(data.train.paths[0].parent), "made.model"), TINY | {"iterations": 2}
    assert bench.train_briefly(source, sizes, "weights.pt") > 0
    scores = {mode: bench.score(source, sizes, "weights.pt", mode) for mode in ("sliding", "banded")}
    assert scores["sliding"][2] == scores["banded"][2] == 160
    assert scores["sliding"][0] == pytest.approx(scores["banded"][0], rel=0.02)


def test_muon_row() -> None:
    """Batched stacks and the loop give the same update to rounding."""
    *_, apart, moved = bench.muon_row(bench.config(**TINY | {"compute_dtype": "float32"}), 1)
    assert float(apart) < 1e-3 * float(moved)


def test_train_and_scale_rows() -> None:
    """A share of the peak comes out; the scaled works run."""
    cfg = bench.config(**TINY)
    (row,) = bench.train_rows(cfg, 1, compiled=False)
    assert row[-1].endswith("%")
    trained = bench.scale_config(cfg, 2)
    assert t.batch_plan(trained, 1, 99.0) == (2, 2)
    for kind in ("training step", "sliding", "banded"):
        assert bench.memory_of(cfg, kind, 1) >= 0
    assert all("aten.mm.default" in table for table in bench.profile(cfg))


def test_edited_models_step() -> None:
    """A recipe's edits are in the model that is timed."""
    cfg = bench.config(**TINY)
    trainer = bench.trainer_for(cfg, script=ablate.edited_module("attention_gate", Path(".")))
    assert sum(name.endswith(".gate") for name, _ in trainer.model.named_parameters()) == cfg.num_layers
    assert torch.isfinite(trainer.train_step(1e-6, 10)).all()


def test_export_rows() -> None:
    """Every number of threads is tried, and writes a frame of about the same size."""
    cfg = bench.config(**TINY | {"artifact_limit_bytes": 20_000, "eval_artifact": "-"})
    rows = list(bench.export_rows(cfg, (0, 1)))
    sizes = [int(row[2]) for row in rows if row[2] != "-"]
    assert len(rows) == 6 and max(sizes) < 1.05 * min(sizes)


def test_numbers_in_log_lines() -> None:
    """They are read from the lines that start as asked."""
    lines = ["step:1/5 train_loss:6.25 train_time:12ms", "final train_loss:9", "step:2/5 train_loss:1e-3"]
    assert bench.numbers(lines, "step:", "train_loss") == [6.25, 0.001]
    assert bench.markdown("T", "a | b", [(1, 0.25)]) == "### T\n\n| a | b |\n| --- | --- |\n| 1 | 0.25 |\n"


def test_command_line() -> None:
    """Unknown sections are an error."""
    assert bench.arguments(["muon"]).sections == ["muon"]
    with pytest.raises(SystemExit):
        bench.arguments(["moun"])


@pytest.mark.parametrize("changes", [{}, {"train_seq_len": 512, "num_layers": 4}, {"tie_embeddings": 0}])
def test_flops_formula_is_what_is_computed(changes: dict[str, Any]) -> None:
    """`step_flops` and `FlopCounterMode` differ by one term: attention by chunks computes masked scores too,
    for up to ATTENTION_CHUNK keys more per query than a causal mask shows."""
    cfg = bench.config(**TINY | {"train_batch_tokens": 1024} | changes)
    _, computed = bench.counted_by_formula(cfg)
    operators, traffic = bench.counted(cfg, 2, "chunks")
    assert sum(operators.values()) / (2 * cfg.train_seq_len) == pytest.approx(computed, rel=1e-6)
    assert traffic > 0


def test_flops_at_full_size() -> None:
    """At the default sizes the formula is within 4% of what is computed (all of it masked scores)."""
    cfg = bench.config(train_batch_tokens=t.Config.train_batch_tokens)
    formula, computed = bench.counted_by_formula(cfg)
    operators, _ = bench.counted(cfg, 1, "chunks")
    assert sum(operators.values()) / cfg.train_seq_len == pytest.approx(computed, rel=1e-6)
    assert formula == pytest.approx(computed, rel=0.04)


@pytest.mark.parametrize("attention", ["chunks", "sdpa"])
@pytest.mark.parametrize(
    "changes, seqs",
    [({}, 3), ({"model_dim": 64, "train_seq_len": 128}, 2), ({"num_layers": 5, "train_seq_len": 320}, 1)],
)
def test_activation_bytes_are_those_of_a_real_forward(changes: dict[str, Any], seqs: int, attention: str) -> None:
    """What is kept for the backward by count on fake tensors is what a real forward keeps, to 5%."""
    cfg = bench.config(**TINY | {"train_batch_tokens": 640, "compute_dtype": "bfloat16"} | changes)
    rt = dataclasses.replace(bench.runtime(cfg), attention=attention)
    model, kept = bench.model_for(cfg, rt, trains=False), dict[int, torch.Tensor]()
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}

    def note(x: torch.Tensor) -> torch.Tensor:
        """Remember the memory behind a saved tensor."""
        kept[x.untyped_storage()._cdata] = x
        return x

    ids = torch.randint(4, cfg.vocab_size, (seqs, cfg.train_seq_len))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), rt.autocast():
        loss = model.loss(ids, ids)
    assert loss.requires_grad
    real = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)
    assert bench.saved_bytes(cfg, rt, seqs) == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("attention", ["chunks", "sdpa"])
@pytest.mark.parametrize("width, seq_len", [(128, 256), (256, 512), (512, 1024)])
def test_activation_formula(width: int, seq_len: int, attention: str) -> None:
    """`activation_bytes` is what one more sequence keeps, to 5%."""
    cfg = bench.sized(width, seq_len, compute_dtype="bfloat16")
    rt = dataclasses.replace(bench.runtime(cfg), attention=attention)
    one, two = (bench.saved_bytes(cfg, rt, seqs) for seqs in (1, 2))
    assert t.activation_bytes(cfg, rt) * seq_len == pytest.approx(two - one, rel=0.05)
