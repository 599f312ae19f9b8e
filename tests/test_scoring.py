"""Evaluation: every target once, equal to brute force, the same on any number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tools import config, hidden, model_for, runtime, t


@pytest.mark.parametrize("seq_len", [1, 4, 32])
@pytest.mark.parametrize("stride", [1, 3, 4, 32])
def test_windows_score_each_target_once(seq_len: int, stride: int) -> None:
    """For all split lengths; no window leaves the split; all but the first have seq_len - stride of context."""
    if stride > seq_len:
        return
    for count in range(1, 12):
        targets = count * seq_len
        scored = [0] * targets
        for i, (start, new) in enumerate(t.scoring_windows(targets, seq_len, stride)):
            assert start >= 0 and start + seq_len <= targets
            assert new == seq_len if i == 0 else 0 < new <= stride
            for at in range(start + seq_len - new, start + seq_len):
                scored[at] += 1
        assert scored == [1] * targets


def small_data(cfg: t.Config, num_targets: int | None = None) -> t.Data:
    """The tiny corpus, of which `num_targets` count."""
    data = t.Data(cfg, runtime())
    assert data.num_val_targets == (data.val.total - 1) // cfg.train_seq_len * cfg.train_seq_len
    if num_targets is not None:
        assert num_targets < data.num_val_targets
        data.num_val_targets = num_targets
    return data


def brute_force(model: t.GPT, data: t.Data, stride: int) -> tuple[float, float]:
    """(nats per token, bits per byte), each target from its own forward over its own window, without the loss of the
    model. After a target as many follow as its window scores in one go."""
    total, size, done = 0.0, 0, 0
    while done < data.num_val_targets:
        new = data.seq_len if done == 0 else min(stride, data.num_val_targets - done)
        start = done + new - data.seq_len
        for at in range(done, done + new):
            tokens = data.val.read(start, at - start + 2).unsqueeze(0)
            logits = (hidden(model, tokens[:, :-1])[0, -1] @ model.embed.weight.T).double()
            capped = model.cfg.logit_softcap * torch.tanh(logits / model.cfg.logit_softcap)
            total -= float(torch.log_softmax(capped, -1)[tokens[0, -1]])
            size += int(data.bytes_of[data.boundary[tokens[0, -2]], tokens[0, -1]])
        done += new
    return total / data.num_val_targets, total / math.log(2) / size


@pytest.mark.parametrize(("stride", "num_targets"), [(8, 5 * 32), (13, 4 * 32), (32, 5 * 32), (1, 2 * 32), (8, 32)])
@torch.no_grad()
def test_equals_brute_force(stride: int, num_targets: int) -> None:
    """To 1e-6 bpb in fp32: sliding windows, strides that do not divide the window included, plain ones and a single
    one; whatever the size of a batch."""
    cfg = config(num_layers=2)
    data, model = small_data(cfg, num_targets), model_for(cfg, qat=False)
    data.bytes_of, data.boundary = torch.randint(9, (2, 320)), torch.randint(2, (320,))  # so that the two sizes differ
    expected = brute_force(model, data, stride)
    for batch_seqs in (5, 64):
        assert t.evaluate(model, data, runtime(), stride, batch_seqs) == pytest.approx(expected, abs=1e-6)


def test_what_a_run_reports() -> None:
    """Validation scores plain windows, and so does the end with EVAL_STRIDE=0; else the end slides. The last line is
    the one that the challenge's readers look for."""
    cfg, rt = config(), runtime()
    data, model = small_data(cfg, 21 * 32), model_for(cfg, qat=False)
    plain = t.SCORE.format(*t.evaluate(model, data, rt, 32, 8))
    sliding = t.SCORE.format(*t.evaluate(model, data, rt, 8, 8))
    assert plain != sliding
    t.Trainer(model, data, cfg, rt).validate()
    assert plain in rt.lines[-1] and rt.lines[-1].startswith("step:0/6 val_loss:")
    for stride, expected in ((0, plain), (32, plain), (8, sliding)):
        t.report(model.state_dict(), data, config(eval_stride=stride, eval_batch_seqs=8), rt, "final")
        assert rt.lines[-2].startswith(f"final_sliding stride:{stride} {expected} eval_time:")
        assert rt.lines[-1] == f"final_int8_zlib_roundtrip_exact {expected}"
    t.report(model.state_dict(), data, cfg, rt, "float")
    assert rt.lines[-1].startswith("float_sliding stride:8 ")


@pytest.mark.parametrize("compiles", [False, True])
def test_only_whole_batches_are_compiled(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one, if shorter, runs eagerly: it would need a graph of its own. The score is the same."""
    cfg, shapes = config(), []
    data, model = small_data(cfg, 21 * 32), model_for(cfg, qat=False)
    expected = t.evaluate(model, data, runtime(), 32, 21)

    def compile_by_name(module: t.GPT, fullgraph: bool, dynamic: bool, disable: bool) -> object:
        """Note what a graph would get."""
        assert fullgraph and not dynamic and disable != compiles
        return lambda inputs, targets: (shapes.append(len(inputs)), module(inputs, targets))[1]

    monkeypatch.setattr(t.torch, "compile", compile_by_name)
    assert t.evaluate(model, data, runtime(compiles=compiles), 32, 8) == pytest.approx(expected, abs=1e-6)
    assert shapes == [8, 8]


@pytest.mark.parametrize(("stride", "num_targets"), [(8, 11 * 32), (32, None), (8, 2 * 32), (32, 32)])
def test_ranks_agree(stride: int, num_targets: int | None) -> None:
    """The sums of 2 and of 4 ranks are those of one, also where some have no window."""
    cfg = config()
    data, model = small_data(cfg, num_targets), model_for(cfg, qat=False)
    one = t.evaluate(model, data, runtime(), stride, 3)
    for world_size in (2, 4, 8):
        sums = torch.zeros(2, dtype=torch.float64)
        for rank in range(world_size):
            rt = runtime(rank, world_size)
            rt.all_reduce = sums.add_  # type: ignore[method-assign]
            found = t.evaluate(model, data, rt, stride, 3)
        assert found == pytest.approx(one, abs=1e-9)  # the last one sees the sums of all
        assert float(sums[0]) / data.num_val_targets == pytest.approx(one[0], abs=1e-9)


def test_bytes_are_those_of_the_text() -> None:
    """Nats over bits per byte give the bytes of the validation text as the tokenizer decodes it."""
    cfg = config()
    data = t.Data(cfg, runtime())
    loss, bpb = t.evaluate(model_for(cfg, qat=False), data, runtime(), 32, 64)
    size = loss * data.num_val_targets / math.log(2) / bpb
    sp = t.sentencepiece.SentencePieceProcessor(model_file=cfg.tokenizer_path)
    ids = np.asarray(data.val.read(0, data.num_val_targets + 1)).tolist()
    cut = 4  # a character may be cut at the end
    assert abs(size - len(sp.decode(ids).encode())) <= cut and size > 1000
