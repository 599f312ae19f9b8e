"""Evaluation: every target once, equal to brute force, the same on any number of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from tools import config, hidden, model_for, runtime, t


@pytest.mark.parametrize("seq_len", [4, 32])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_windows_score_each_target_once(seq_len: int, stride: int) -> None:
    """For all split lengths; no window leaves the split; later ones give at least seq_len - stride of context."""
    for count in range(1, 12):
        targets = count * seq_len
        scored = [0] * targets
        for i, (start, first, last) in enumerate(t.scoring_windows(targets, seq_len, stride)):
            assert start >= 0 and start + seq_len <= targets and (i == 0 or first >= seq_len - stride)
            for at in range(start + first, start + last):
                scored[at] += 1
        assert scored == [1] * targets


def final(data: t.Data, cfg: t.Config, model: t.GPT) -> t.EvalResult:
    """The score as a run ends with it."""
    return t.Evaluator(data, cfg, runtime()).run(model, cfg.eval_mode, cfg.eval_batch_seqs, "x")


def brute_force(model: t.GPT, data: t.Data, cfg: t.Config) -> float:
    """Bits per byte, each target from its own forward over its own window."""
    counts = t.TokenBytes(data.tokenizer, torch.device("cpu"))
    total, size, done = 0.0, 0, 0
    while done < data.val_targets:
        new = cfg.train_seq_len if done == 0 else min(cfg.eval_stride or cfg.train_seq_len, data.val_targets - done)
        start = done + new - cfg.train_seq_len
        for at in range(done, done + new):
            tokens = torch.from_numpy(data.val.read(start, at - start + 2)).unsqueeze(0)
            logits = model.logits(hidden(model, tokens[:, :-1]))[0, -1].double()
            total -= float(torch.log_softmax(logits, -1)[tokens[0, -1]])
            size += int(counts.count(tokens[0, -2], tokens[0, -1]))
        done += new
    return total / math.log(2) / size


@pytest.mark.parametrize("stride", [8, 13, 0])
@torch.no_grad()
def test_equals_brute_force(stride: int) -> None:
    """To 1e-6 bpb in fp32, strides that do not divide the window included."""
    cfg = config(eval_stride=stride, eval_batch_seqs=5)
    data, model = t.open_data(cfg, runtime()), model_for(cfg, qat=False)
    assert final(data, cfg, model).val_bpb == pytest.approx(brute_force(model, data, cfg), abs=1e-6)


def test_stride_of_a_window_is_plain() -> None:
    """EVAL_STRIDE = TRAIN_SEQ_LEN and EVAL_STRIDE=0 agree."""
    model = model_for(config(), qat=False)
    results = []
    for stride in (32, 0):
        cfg = config(eval_stride=stride)
        evaluator = t.Evaluator(t.open_data(cfg, runtime()), cfg, runtime())
        results.append(evaluator.run(model, "sliding", 8, "x").val_bpb)
    assert results == pytest.approx([results[0]] * 2, abs=1e-9)


def dense_band(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, kernel: str) -> torch.Tensor:
    """Attention by its definition: full scores, everything outside the band masked."""
    k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.size(-1) ** 0.5
    distance = torch.arange(q.size(1))[:, None] - torch.arange(k.size(1))[None]
    scores[..., (distance < 0) | (distance >= window)] = -math.inf
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@pytest.mark.parametrize(("targets", "batch"), [(32, 1), (64, 4), (17 * 32, 2), (18 * 32, 2), (40 * 32, 2)])
@torch.no_grad()
def test_banded_equals_brute_force(targets: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each segment as one dense banded forward, its first chunk unscored unless the split starts there."""
    cfg = config(eval_mode="banded", eval_batch_seqs=batch)
    data, model = t.open_data(cfg, runtime()), model_for(cfg, qat=False)
    assert data.val_targets >= targets
    data.val_targets = targets
    result = final(data, cfg, model)
    monkeypatch.setattr(t, "attend", dense_band)
    counts = t.TokenBytes(data.tokenizer, torch.device("cpu"))
    total, size, length = 0.0, 0, t.BAND_CHUNKS * 32
    for start in range(0, max(targets - 32, 1), length):
        tokens = torch.from_numpy(data.val.read(start, min(length + 32, targets - start) + 1)).unsqueeze(0)
        ids, following = tokens[:, :-1], tokens[:, 1:]
        logits = model.logits(hidden(model, ids)).double()
        nll = torch.nn.functional.cross_entropy(logits[0], following[0], reduction="none")
        begin = 32 if start else 0
        total += float(nll[begin:].sum())
        size += int(counts.count(ids, following)[0, begin:].sum())
    assert result.text_bytes == size
    assert result.val_bpb == pytest.approx(total / math.log(2) / size, abs=1e-6)


def test_banded_is_close_to_sliding() -> None:
    """Same targets, same bytes."""
    cfg = config()
    model, evaluator = model_for(cfg, qat=False), t.Evaluator(t.open_data(cfg, runtime()), cfg, runtime())
    sliding, banded = evaluator.run(model, "sliding", 8, "x"), evaluator.run(model, "banded", 8, "x")
    assert banded.text_bytes == sliding.text_bytes
    assert banded.val_bpb == pytest.approx(sliding.val_bpb, abs=0.02)


@pytest.mark.parametrize(("mode", "stride"), [("sliding", 8), ("sliding", 0), ("banded", 8)])
def test_ranks_agree(mode: str, stride: int) -> None:
    """The sums of 2 and of 4 ranks are those of one."""
    cfg = config(eval_mode=mode, eval_stride=stride, eval_batch_seqs=3)
    model = model_for(cfg, qat=False)
    one = final(t.open_data(cfg, runtime()), cfg, model)
    for world_size in (2, 4):
        sums = torch.zeros(2, dtype=torch.float64)

        class Rank(t.Runtime):
            """A rank whose all-reduce only notes its part."""

            def all_reduce(self, tensor: torch.Tensor, sums: torch.Tensor = sums) -> torch.Tensor:
                """Add to the total of all ranks."""
                sums.add_(tensor)
                return tensor

        for rank in range(world_size):
            rt = Rank(**vars(runtime(rank, world_size)))
            t.Evaluator(t.open_data(cfg, runtime()), cfg, rt).run(model, mode, 3, "x")
        assert sums[1] == one.text_bytes
        assert float(sums[0]) / math.log(2) / one.text_bytes == pytest.approx(one.val_bpb, abs=1e-9)
