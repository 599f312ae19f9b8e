"""Nothing that was paid for is lost: checkpoints, resuming, stop signals, full disks, exports again, dry runs.
Most runs are made inside the test process; those that are killed or have several ranks are processes of their own."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kill as kill_script
import pytest
from launch import (
    CODE_BYTES,
    FULL,
    FULL_MODEL_BYTES,
    PLAIN,
    STEPS,
    STOP_SIGNALS,
    Forked,
    clean_environment,
    cli,
    do_after,
    do_at,
    fork,
    fork_ranks,
    forks,
    free_port,
    kill,
    names,
    stopped,
    torchrun,
)
from processes import descendants
from tools import config, corpus, runtime, t, values, write_shard

Run = tuple[Path, str]  # folder and output


def copied(source: Path, folder: Path) -> Path:
    """`folder` with a copy of the logs/ of `source`."""
    shutil.copytree(source / "logs", folder / "logs")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupts."""
    forks()  # it gets ready meanwhile
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        do_after(patch, t.Trainer, "save", lambda trainer: trainer.step == STEPS and copied(Path(), Path("late")))
        done = cli(folder, FULL)
    assert done.code == 0, done
    return folder, done.out


@pytest.fixture(scope="module")
def late(whole: Run) -> Path:
    """A folder with what a kill right after the last checkpoint of that run would have left."""
    return whole[0] / "late"


# ---- checkpoints and resuming ----------------------------------------------------------------------------------------
def assert_same_end(folder: Path, out: str, whole: Run) -> None:
    """The artifact, the later losses and the final score are those of the uninterrupted run, bit for bit."""
    assert (folder / "logs/x.ptz").read_bytes() == (whole[0] / "logs/x.ptz").read_bytes()
    losses = values(out, "train_loss")
    assert losses == values(whole[1], "train_loss")[STEPS - len(losses) :]
    pick = re.compile(r"^final_.*?(val_loss:\S+ val_bpb:\S+)", re.M)
    assert pick.findall(out) == pick.findall(whole[1]) != []


def test_the_uninterrupted_run_does_all(whole: Run) -> None:
    """What the tests below compare with has a calibration, a plan that counts, snapshots and a choice."""
    out = whole[1]
    assert "qat active:1 step:6" in out and "swa snapshot:3 step:12" in out
    assert values(out, "last_loss") and values(out, "swa_loss")
    costs = t.load_tensors(whole[0] / "logs/x.weights")["costs"]
    assert len(costs) == len([name for name in costs if costs[name].sum() > 0]) > 10
    assert 0.99 * FULL_MODEL_BYTES < values(out, "model_bytes")[-1] <= FULL_MODEL_BYTES


KILLS: list[tuple[Any, str, int, int]] = [  # where, after which step, and the step of the checkpoint that is left
    (t.Trainer, "log_step", 3, 2),  # before quantization starts
    (t.Trainer, "start_qat", 6, 6),
    (t.Trainer, "log_step", 8, 7),  # between that and the first snapshot
    (t.Trainer, "log_step", 11, 10),  # between snapshots
    (t.Trainer, "save", 11, 11),
    (t.Trainer, "quantized_loss", 12, 12),  # while the weights are chosen
    (t, "save_tensors", 12, 12),  # the weights are on disk, not yet chosen
    (t.Trainer, "finish", 12, 12),  # the checkpoints are of no use any more, but still there
    (t, "export", 12, 12),  # they are gone
]


def killed(folder: Path, owner: Any, name: str, step: int) -> str:
    """The output of a run that is started or resumed, and killed after a call at a step of the training."""
    seen: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        for noted in ("log_step", "restore"):
            do_after(patch, t.Trainer, noted, lambda trainer, *_: seen.update(step=trainer.step))

        def die(*args: Any, **_: Any) -> None:
            """Kill at the step, and not while one of its checkpoints is written."""
            if seen.get("step") == step and not str(args[0]).endswith(".ckpt"):
                kill()

        do_after(patch, owner, name, die)
        done = cli(folder, FULL, resume=1)
    assert done.code == -9, done
    return done.out


def test_resumed_equals_uninterrupted(whole: Run, tmp_path: Path) -> None:
    """Killed and resumed again and again, a run ends as if it had not been; the same log goes on."""
    log, out, losses, begun, source = "", "", values(whole[1], "train_loss"), 0, ""
    for owner, name, step, begins in KILLS:
        out = killed(tmp_path, owner, name, step)
        assert values(out, "train_loss") == losses[begun:step] and "final_sliding" not in out
        assert begun == 0 or f"resume checkpoint:logs/{source} step:{begun} " in out
        left = [*names(tmp_path, "*.weights"), *names(tmp_path, "*.ckpt")]
        source, begun = left[-1], begins
        assert source == ("x.weights" if name == "export" else f"x.{begins:09d}.ckpt"), left
        before, log = log, (tmp_path / "logs/x.txt").read_text()
        assert log.startswith(before) and log.endswith(out[-500:])
    done = cli(tmp_path, FULL, resume=1)
    assert done.code == 0 and "resume checkpoint:logs/x.weights step:12 " in done.out, done
    assert_same_end(tmp_path, done.out, whole)


def test_kept_checkpoints(whole: Run, late: Path) -> None:
    """The last two stay, nothing half-written does; each holds what `restore` needs. After the end none is kept."""
    assert names(whole[0]) == ["x.ptz", "x.txt", "x.weights"]
    assert names(late) == ["x.000000011.ckpt", "x.000000012.ckpt", "x.txt"]
    assert whole[1].count("checkpoint path:") == STEPS
    state = t.load_tensors(late / "logs/x.000000012.ckpt")
    parts = ["model", "swa", "adamw", "muon"]
    assert [*state] == ["config", "data", "step", "elapsed", "durations", "costs", "grids", *parts]
    assert state["step"] == STEPS == len(state["durations"]) - 1 and state["elapsed"] > sum(state["durations"][1:]) > 0
    assert {*state["data"]} == {"data_sha256", "tokenizer_sha256"} and state["config"]["run_id"] == "x"
    assert state["swa"]["n_averaged"] == 3 and {t.category(name) for name in state["grids"]} == {"mlp"}


def test_finished_run_is_exported_again(whole: Run, tmp_path: Path) -> None:
    """RESUME of a run that is done trains no step and ends as it did."""
    copied(whole[0], tmp_path)
    (tmp_path / "logs/x.ptz").unlink()
    done = cli(tmp_path, FULL, resume=1)
    assert done.code == 0 and "resume checkpoint:logs/x.weights step:12 " in done.out, done
    assert not values(done.out, "train_loss") and "warm_up" not in done.out
    assert_same_end(tmp_path, done.out, whole)
    assert names(tmp_path) == names(whole[0])


def test_trained_grids_are_exported(whole: Run) -> None:
    """What the MLP trained on, for the run's own limit."""
    trained = t.load_tensors(whole[0] / "logs/x.weights")
    _, stored, _ = t.decode_artifact((whole[0] / "logs/x.ptz").read_bytes(), "x.ptz", config(**FULL))
    assert len(trained["grids"]) == 4
    for name, values_of_grid in trained["grids"].items():
        scale = t.Grid(*values_of_grid).quantize(trained["weights"][name]).scale
        assert scale is not None and scale.equal(stored[name].scale)


@pytest.mark.parametrize("newest", [11, 12])
def test_leftovers_of_a_kill_are_removed(late: Path, tmp_path: Path, newest: int) -> None:
    """A file that was half-written when the machine went away does not stay for ever, whether or not others follow."""
    copied(late, tmp_path)
    if newest == 11:
        (tmp_path / "logs/x.000000012.ckpt").unlink()
    for run_id in ("x", "other"):
        (tmp_path / f"logs/{run_id}.0000000{newest + 1}.ckpt.tmp1234").write_bytes(b"half")
    assert cli(tmp_path, FULL, resume=1).code == 0
    assert names(tmp_path, "*.tmp*") == [f"other.0000000{newest + 1}.ckpt.tmp1234"]


def test_seldom_checkpoints(tmp_path: Path) -> None:
    """CHECKPOINT_EVERY counts seconds of training, from the last one on; 0 means none."""
    steps: dict[float, list[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "clock", lambda trainer: 1.01 * trainer.step)  # a step takes a second
        for every in (0, 2.5, 10000):
            done = cli(tmp_path, PLAIN, run_id=f"x{every}", checkpoint_every=every)
            assert done.code == 0, done
            steps[every] = re.findall(r"checkpoint path:logs/x\S*\.0+(\d)\.ckpt", done.out)
    assert steps == {0: [], 2.5: ["3", "6"], 10000: []}


def test_damaged_checkpoint_is_skipped(whole: Run, late: Path, tmp_path: Path) -> None:
    """Cut, empty or with a flipped bit: the one before it is used, with a warning."""
    newest = copied(late, tmp_path) / "logs/x.000000012.ckpt"
    content = newest.read_bytes()
    middle = len(content) // 2
    for damaged in (b"", content[:middle], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        newest.write_bytes(damaged)
        done = cli(tmp_path, FULL, resume=1, dry_run=1)
        assert done.code == 0 and "warning: skipped a checkpoint: logs/x.000000012.ckpt is truncated" in done.out
        assert "resume checkpoint:logs/x.000000011.ckpt" in done.out
    done = cli(tmp_path, FULL, resume=1)
    assert done.code == 0 and "resume checkpoint:logs/x.000000011.ckpt" in done.out
    assert_same_end(tmp_path, done.out, whole)


def test_no_sound_checkpoint(tmp_path: Path) -> None:
    """A warning, and the run starts from the beginning, with the source in its log; so it does without any."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/x.000000004.ckpt").write_bytes(b"x" * 100)
    for run_id in ("x", "y"):
        done = cli(tmp_path, PLAIN, resume=1, run_id=run_id)
        assert done.code == 0 and ("warning: skipped a checkpoint" in done.out) == (run_id == "x"), done
        assert f"warning: RUN_ID={run_id} has no sound checkpoint: it starts from the beginning" in done.out
        assert len(values(done.out, "train_loss")) == 6
        assert "def command_line" in (tmp_path / f"logs/{run_id}.txt").read_text()


def test_damaged_later_checkpoints_cost_no_new_ones(tmp_path: Path) -> None:
    """They make way: a run that started anew beside them is resumed from its own newest checkpoint."""
    (tmp_path / "logs").mkdir()
    for step in (5, 6):
        (tmp_path / f"logs/x.00000000{step}.ckpt").write_bytes(b"x" * 100)
    with pytest.MonkeyPatch.context() as patch:
        do_at(patch, 4, kill)
        assert cli(tmp_path, PLAIN, resume=1).code == -9
    assert names(tmp_path) == ["x.000000002.ckpt", "x.000000003.ckpt", "x.txt"]
    assert "resume checkpoint:logs/x.000000003.ckpt step:3 " in cli(tmp_path, PLAIN, resume=1).out


def test_resume_exports_the_weights(whole: Run, tmp_path: Path) -> None:
    """A run without checkpoints that got as far as its weights: the stop says so, and nothing is trained again."""
    first = stopped(tmp_path, FULL, signal.SIGTERM, "encode_artifact", call=1, owner="", checkpoint_every=0)
    line = "stopped by signal 15: RESUME=1 RUN_ID=x goes on from logs/x.weights\n"
    assert (first.code, first.err) == (143, line), first
    assert names(tmp_path) == ["x.txt", "x.weights"]
    done = cli(tmp_path, FULL, checkpoint_every=0, resume=1)
    assert done.code == 0 and "resume checkpoint:logs/x.weights step:12 " in done.out, done
    assert not values(done.out, "train_loss")
    assert_same_end(tmp_path, done.out, whole)
    other = cli(tmp_path, FULL, checkpoint_every=0, resume=1, seed=7)
    assert other.code == 2 and "logs/x.weights is of another config: SEED=42 there, 7 now" in other.err, other


def test_weights_without_costs_can_be_exported(tmp_path: Path) -> None:
    """They are stored before the calibration, which may fail: then all errors weigh the same."""
    changes = FULL | {"qat_start_frac": 1, "checkpoint_every": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "calibrate", kill)
        assert cli(tmp_path, changes).code == -9
    done = cli(tmp_path, changes, resume=1)
    assert done.code == 0 and not values(done.out, "train_loss"), done
    assert 0.97 * FULL_MODEL_BYTES < values(done.out, "model_bytes")[-1] <= FULL_MODEL_BYTES


def test_weights_beside_damaged_checkpoints(whole: Run, tmp_path: Path) -> None:
    """RESUME exports them: a finished training is not begun again."""
    copied(whole[0], tmp_path)
    for step in (11, 12):
        (tmp_path / f"logs/x.0000000{step}.ckpt").write_bytes(b"damaged")
    done = cli(tmp_path, FULL, resume=1)
    assert done.code == 0 and not values(done.out, "train_loss"), done.out
    assert done.out.count("warning: skipped a checkpoint: ") == 2
    assert_same_end(tmp_path, done.out, whole)


def test_checkpoint_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose config lacks a setting that there is now is of another config."""
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    cfg = config(run_id="x")
    data = t.Data(cfg, runtime())
    then = {name: value for name, value in vars(cfg).items() if name != "value_residual"}
    state = {"config": then, "data": data.identity, "model": {}, "step": 4, "elapsed": 0.0}
    t.save_tensors(Path("logs/x.000000004.ckpt"), state)
    with pytest.raises(ValueError, match="x.000000004.ckpt is of another config: VALUE_RESIDUAL=None there, True now"):
        t.newest_checkpoint(cfg, data, runtime())


def test_other_config_is_refused(late: Path, tmp_path: Path) -> None:
    """Naming the fields and both values; settings that change no result may differ."""
    copied(late, tmp_path)
    done = cli(tmp_path, FULL, resume=1, matrix_lr=0.5, seed=7)
    assert done.code == 2 and "x.000000012.ckpt is of another config" in done.err, done
    listed = ("MATRIX_LR=0.028 there, 0.5 now", "SEED=42 there, 7 now", "; set them back or choose another RUN_ID")
    assert all(words in done.err for words in listed), done.err
    assert "ITERATIONS" not in done.err and not values(done.out, "train_loss")
    assert names(tmp_path) == names(late)
    done = cli(tmp_path, FULL, resume=1, train_log_every=3, checkpoint_every=0, micro_batch_tokens=64)
    assert done.code == 0, done


def test_other_data_is_refused(late: Path, tmp_path: Path) -> None:
    """More or other tokens, or another tokenizer, under the same or another path. The same data may move."""
    copied(late, tmp_path)
    (tmp_path / "logs/x.000000012.ckpt").unlink()
    moved = shutil.copytree(corpus(), tmp_path / "moved")
    paths = {"data_path": moved, "tokenizer_path": moved / "tokenizer.model"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "run", kill)
        assert cli(tmp_path, FULL, resume=1, **paths).code == -9
    tokens = {split: t.open_shard(corpus() / f"fineweb_{split}_000000.bin").copy() for split in ("train", "val")}
    for part in tokens.values():
        part[-1] ^= 1
    for name, others in (
        ("fineweb_train_000001.bin", tokens["train"][:100]),
        ("fineweb_train_000000.bin", tokens["train"]),
        ("fineweb_val_000000.bin", tokens["val"]),
    ):
        write_shard(moved / name, others)
        done = cli(tmp_path, FULL, resume=1, **paths)
        assert done.code == 2 and "DATA_SHA256='" in done.err and "TOKENIZER" not in done.err, (name, done)
        (moved / name).unlink()
        if (corpus() / name).exists():
            shutil.copy(corpus() / name, moved)
    t.build_corpus([f"quite another text {i} " * 20 + chr(97 + i % 26) * i for i in range(90)], tmp_path / "other", 320)
    (moved / "tokenizer.model").unlink()  # beside the shards it would be missed first
    done = cli(tmp_path, FULL, resume=1, **paths | {"tokenizer_path": tmp_path / "other/tokenizer.model"})
    assert done.code == 2 and "TOKENIZER_SHA256='" in done.err and "DATA_SHA256" not in done.err, done
    assert not values(done.out, "train_loss")


# ---- stop signals and ranks that die ---------------------------------------------------------------------------------
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_ends_the_run(tmp_path: Path, number: signal.Signals) -> None:
    """At once: one line that names the last checkpoint, no further one, exit code 128 + n."""
    done = stopped(tmp_path, PLAIN, number)
    line = f"stopped by signal {int(number)}: RESUME=1 RUN_ID=x goes on from logs/x.000000003.ckpt\n"
    assert (done.code, done.err) == (128 + number, line) and len(values(done.out, "train_loss")) == 4, done
    assert names(tmp_path) == ["x.000000002.ckpt", "x.000000003.ckpt", "x.txt"]


def test_signal_unheard(tmp_path: Path) -> None:
    """A terminal that is gone, so that the line cannot be printed, keeps no run alive."""
    assert stopped(tmp_path, PLAIN, signal.SIGHUP, unheard=True).code == 129
    assert names(tmp_path, "*.ckpt") == ["x.000000002.ckpt", "x.000000003.ckpt"]


def test_stopped_run_goes_on(whole: Run, tmp_path: Path) -> None:
    """Stopped between snapshots, and again while a checkpoint is written: no torn file, the end of an unstopped run."""
    assert stopped(tmp_path, FULL, signal.SIGTERM, call=10).code == 143
    again = stopped(tmp_path, FULL, signal.SIGTERM, "fsync", call=1, owner="os", resume=1)
    assert again.code == 143 and "goes on from logs/x.000000009.ckpt" in again.err, again
    assert len(values(again.out, "train_loss")) == 1
    assert names(tmp_path) == ["x.000000008.ckpt", "x.000000009.ckpt", "x.txt"]
    done = cli(tmp_path, FULL, resume=1)
    assert done.code == 0, done
    assert_same_end(tmp_path, done.out, whole)


def test_signal_without_checkpoints(tmp_path: Path) -> None:
    """It says that nothing is there to go on from."""
    done = stopped(tmp_path, PLAIN, signal.SIGTERM, call=2, checkpoint_every=0)
    assert done.code == 143 and done.err == "stopped by signal 15: there is no checkpoint to go on from\n", done
    assert names(tmp_path) == ["x.txt"]


def test_nohup(tmp_path: Path) -> None:
    """A signal that the caller ignores stays ignored, but for ranks of torchrun, which counts on their end."""
    rank: dict[str, Any] = {"rank": 0, "world_size": 1, "master_addr": "localhost", "master_port": free_port()}
    for more, code in (({}, 0), (rank, 129)):
        done = stopped(tmp_path, PLAIN, signal.SIGHUP, ignored=True, run_id=f"x{code}", checkpoint_every=0, **more)
        assert done.code == code, done


def test_signal_in_a_long_step(tmp_path: Path) -> None:
    """In the middle of a step that would take minutes, in another process: at once, with the exit code."""
    run = fork(tmp_path, **PLAIN | {"train_batch_tokens": 32 * 65536, "micro_batch_tokens": 32})
    run.until("warm_up")
    time.sleep(0.3)
    begun = time.monotonic()
    run.send(signal.SIGTERM)
    code, out = run.end()
    assert code == 143 and time.monotonic() - begun < 10, out
    assert out.endswith("\nstopped by signal 15: there is no checkpoint to go on from\n") and "train_loss" not in out


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_to_all_ranks(tmp_path: Path, number: signal.Signals) -> None:
    """As torchrun does: both end at once, one line says how to go on."""
    ranks = fork_ranks(tmp_path, 2, **PLAIN | {"iterations": 100000})
    ranks[0].until("x.000000002.ckpt")
    for rank in reversed(ranks):
        rank.send(number)
    (code, out), (other_code, other_out) = (rank.end() for rank in ranks)
    last = names(tmp_path, "*.ckpt")[-1]
    line = f"stopped by signal {int(number)}: RESUME=1 RUN_ID=x goes on from logs/{last}\n"
    assert code == 128 + number and out.endswith("\n" + line) and out.count("stopped by") == 1, out
    assert (other_code, other_out) == (-number, ""), other_out


def test_signal_to_a_rank_that_waits(tmp_path: Path) -> None:
    """Rank 0 waits inside gloo for a rank that stands still: it ends all the same, with its line."""
    ranks = fork_ranks(tmp_path, 2, **PLAIN | {"iterations": 100000})
    try:
        ranks[0].until("x.000000002.ckpt")
        ranks[1].send(signal.SIGSTOP)
        time.sleep(0.5)
        before, last = ranks[0].output.read_text(), names(tmp_path, "*.ckpt")[-1]
        begun = time.monotonic()
        ranks[0].send(signal.SIGTERM)
        code, out = ranks[0].end()
        assert code == 143 and time.monotonic() - begun < 2
        assert out == f"{before}stopped by signal 15: RESUME=1 RUN_ID=x goes on from logs/{last}\n"
    finally:
        ranks[1].send(signal.SIGKILL)


def worker(launcher: int, rank: int) -> int:
    """The process id of a rank under torchrun."""
    for pid in descendants(launcher):
        with contextlib.suppress(OSError):
            if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                return pid
    raise AssertionError(f"no rank {rank} under process {launcher}")


def test_a_run_under_torchrun(tmp_path: Path) -> None:
    """Two ranks go on from one rank's checkpoint; one dies, torchrun starts both again, and they go on from their own.
    SIGTERM to torchrun ends them; one rank goes on to the end. All losses are those of an undisturbed rank."""
    changes = PLAIN | {"iterations": 60}
    with pytest.MonkeyPatch.context() as patch:
        do_at(patch, 5, kill)
        assert cli(tmp_path, changes).code == -9
    run = torchrun(tmp_path, "--standalone", "--nproc_per_node=2", "--max-restarts=1", **changes | {"resume": 1})
    expected = values(cli(tmp_path, changes, run_id="straight", checkpoint_every=0).out, "train_loss")
    run.until("step:10/")
    assert run.process.pid is not None
    os.kill(worker(run.process.pid, 1), signal.SIGKILL)
    run.until("(resume checkpoint:.*?){2}checkpoint path:.*?checkpoint path:")
    begun = time.monotonic()
    run.send(signal.SIGTERM)
    code, out = run.end()
    assert code != 0 and time.monotonic() - begun < 25, "torchrun kills what is there after 30 s"
    _, first, second = re.split(r"resume checkpoint:.*", out)
    begins = [int(step) for step in re.findall(r"resume checkpoint:\S+ step:(\d+)", out)]
    last = names(tmp_path, "*.ckpt")[-1]
    assert begins[0] == 4 and 9 <= begins[1] < 60 and out.count(f"goes on from logs/{last}\n") == 1, out
    for begin, part in zip(begins, (first, second), strict=True):
        losses = values(part, "train_loss")
        assert losses == pytest.approx(expected[begin : begin + len(losses)], rel=1e-5) and len(losses) >= 2
    done = cli(tmp_path, changes, resume=1)
    step = int(last.split(".")[1])
    assert done.code == 0 and f"resume checkpoint:logs/{last} step:{step} " in done.out, done
    assert values(done.out, "train_loss") == pytest.approx(expected[step:], rel=1e-5)


def test_one_rank_fails(tmp_path: Path) -> None:
    """Only rank 1 meets a token beyond the vocabulary: it says why, and rank 0 does not wait for it for ever."""
    tokens = t.np.random.default_rng(0).integers(4, 300, 200000)
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data/fineweb_val_000000.bin", tokens[:500])
    # In file order a step takes the first 131,072 tokens; rank 1 has the second half, which is not checked at start.
    tokens[t.CHECKED_TOKENS + 32 * 50 + 5] = 65535
    write_shard(tmp_path / "data/fineweb_train_000000.bin", tokens)
    changes = PLAIN | {"data_path": tmp_path / "data", "sequence_order": "file", "train_batch_tokens": 131072}
    ranks = fork_ranks(tmp_path, 2, **changes)
    ranks[0].until("warm_up")
    begun = time.monotonic()
    code, out = ranks[1].end()
    assert code == 2 and out.startswith("error on rank 1: ") and "token id 65535 is beyond VOCAB_SIZE=320" in out, out
    assert ranks[0].end()[0] != 0 and time.monotonic() - begun < 60


def test_restart_without_resume(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of torchrun's restarts changes nothing: the run is refused, and its files stay as they are."""
    copied(whole[0], tmp_path)
    before = {name: (tmp_path / "logs" / name).read_bytes() for name in names(tmp_path)}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0123456789")
    done = cli(tmp_path, FULL)
    assert done.code == 2 and "RUN_ID=x has a log" in done.err and not done.out, done
    assert {name: (tmp_path / "logs" / name).read_bytes() for name in names(tmp_path)} == before


def test_a_run_that_is_alive(whole: Run, tmp_path: Path) -> None:
    """It is not touched by RESUME, nor by a start under torchrun, which tries again; RESUME goes on once it is dead."""
    alive = fork(tmp_path, **FULL | {"resume": 1})
    alive.until("checkpoint path:logs/x.000000005.ckpt")
    alive.send(signal.SIGSTOP)
    before = {name: (tmp_path / "logs" / name).read_bytes() for name in names(tmp_path)}
    start = torchrun(tmp_path, "--standalone", "--nproc_per_node=1", "--max-restarts=1", **FULL)
    second = cli(tmp_path, FULL, resume=1)
    assert second.code == 2 and not values(second.out, "train_loss"), second
    assert second.err == "error: logs/x.txt is of a run that is alive: choose another RUN_ID\n"
    code, out = start.end()
    assert code == 1 and out.count("error: RUN_ID=x has a log: choose another RUN_ID") == 2, out
    assert {name: (tmp_path / "logs" / name).read_bytes() for name in names(tmp_path)} == before
    alive.send(signal.SIGKILL)
    assert alive.end()[0] == -9
    done = cli(tmp_path, FULL, resume=1)
    assert done.code == 0 and re.search("resume checkpoint:logs/x.00000000[5-9].ckpt", done.out), done
    assert_same_end(tmp_path, done.out, whole)


# ---- disks and folders -----------------------------------------------------------------------------------------------
@contextlib.contextmanager
def file_size_limit() -> Iterator[int]:
    """Puts the limit for the size of files back; gives the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full_during_a_checkpoint(whole: Run, late: Path, tmp_path: Path) -> None:
    """No room from step 9 on: an error in the log, older ones stay; from those the run is resumed, and ends well."""
    limit = (late / "logs/x.000000012.ckpt").stat().st_size - 5000
    with file_size_limit() as hard:
        with pytest.MonkeyPatch.context() as patch:
            do_at(patch, 9, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
            do_at(patch, 12, kill)
            failed = cli(tmp_path, FULL)
        assert failed.code == -9 and failed.out.count("error: no checkpoint at step ") == 3, failed
        assert os.strerror(errno.EFBIG) in failed.out and failed.out.count("Older ones are intact") == 3
        assert names(tmp_path) == ["x.000000007.ckpt", "x.000000008.ckpt", "x.txt"]
        done = cli(tmp_path, FULL, resume=1)
    assert done.code == 0 and done.out.count("error: no checkpoint at step ") == 4, done
    assert "resume checkpoint:logs/x.000000008.ckpt" in done.out
    assert names(tmp_path) == names(whole[0])
    assert_same_end(tmp_path, done.out, whole)


def fail_at(patch: pytest.MonkeyPatch, nth: int) -> None:
    """The disk is full at the nth file."""
    calls = itertools.count(1)

    def full(*_: Any) -> None:
        """No room."""
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    do_after(patch, t.os, "fsync", full)


@pytest.mark.parametrize(("nth", "name"), [(STEPS + 1, "x.weights"), (STEPS + 3, "x.ptz")])
def test_disk_full_during_the_export(whole: Run, tmp_path: Path, nth: int, name: str) -> None:
    """A clear error that names the file, nothing half-written; checkpoints stay until the weights are there, those
    until the artifact is. With room again the run ends."""
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, nth)
        failed = cli(tmp_path, FULL)
    assert failed.code == 2 and os.strerror(errno.ENOSPC) in failed.err and "Traceback" not in failed.err, failed
    checkpoints = ["x.000000011.ckpt", "x.000000012.ckpt", "x.txt"]
    assert names(tmp_path) == (checkpoints if name == "x.weights" else ["x.txt", "x.weights"])
    done = cli(tmp_path, FULL, resume=1)
    assert done.code == 0
    assert_same_end(tmp_path, done.out, whole)
    assert name in failed.err, failed.err


def test_rehearsal_of_the_end(tmp_path: Path) -> None:
    """It leaves no file, whether it succeeds, is stopped, or finds the disk full at its first or second file."""
    left: list[list[str]] = []
    capped = FULL | {"max_wallclock_seconds": 1000}
    with pytest.MonkeyPatch.context() as patch:
        do_after(patch, t.Trainer, "warm_up", lambda _: left.append(names(tmp_path)))
        done = cli(tmp_path, capped)
    assert done.code == 0 and left == [[]] and names(tmp_path) == ["x.ptz", "x.txt", "x.weights"], done
    done = stopped(tmp_path, capped, signal.SIGTERM, "finish", call=1, run_id="y")
    assert done.code == 143 and done.err == "stopped by signal 15: there is no checkpoint to go on from\n", done
    for nth in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, nth)
            done = cli(tmp_path, capped, run_id="y")
        assert done.code == 2 and os.strerror(errno.ENOSPC) in done.err and not values(done.out, "train_loss"), done
    assert names(tmp_path) == ["x.ptz", "x.txt", "x.weights"]


def test_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file named logs: found before training, and by a dry run."""
    (tmp_path / "logs").write_text("a file")
    for dry_run in (0, 1):
        done = cli(tmp_path, PLAIN, dry_run=dry_run)
        assert done.code == 2 and "logs" in done.err and not done.out and "Traceback" not in done.err, done


def test_runs_at_once(tmp_path: Path) -> None:
    """Two runs in one folder, one name a prefix of the other's, on one text: neither touches the other's files."""
    sp = t.sentencepiece.SentencePieceProcessor(model_file=str(corpus() / "tokenizer.model"))
    tokens = t.open_shard(corpus() / "fineweb_train_000000.bin").astype(int).tolist()
    (tmp_path / "all.txt").write_text("\n".join(sp.decode(tokens[i : i + 40]) for i in range(0, 6000, 40)))
    common = FULL | {"text_files": "all.txt", "data_path": None, "tokenizer_path": None, "warmup_steps": 0}
    processes = {name: fork(tmp_path, name, **common | {"run_id": name}) for name in ("a", "a.b")}
    for name, process in processes.items():
        code, out = process.end()
        assert code == 0, out
        assert set(re.findall(r"logs/([\w.]+?)\.(?:\d{9}\.ckpt|ptz|weights|txt)", out)) == {name}
        log = (tmp_path / f"logs/{name}.txt").read_text()
        assert log.count("step:12/12 train_loss") == 1 == log.count("\nrun id:")
    ends = ["ptz", "txt", "weights"]
    assert names(tmp_path) == sorted([f"{name}.{end}" for name in processes for end in ends] + ["cache"])
    assert (tmp_path / "logs/a.ptz").read_bytes() == (tmp_path / "logs/a.b.ptz").read_bytes()
    assert len(list((tmp_path / "logs/cache").iterdir())) == 1


# ---- exports again ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stored(whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of the uninterrupted run."""
    return copied(whole[0], tmp_path_factory.mktemp("stored"))


AGAIN = FULL | {"export_from": "logs/x.weights", "checkpoint_every": 0}


def test_export_again(whole: Run, stored: Path) -> None:
    """The same settings give the same bytes and score, without training; another limit gives another size."""
    done = cli(stored, AGAIN, run_id="again", num_layers=5)
    assert done.code == 0 and not values(done.out, "train_loss"), done
    assert (stored / "logs/again.ptz").read_bytes() == (whole[0] / "logs/x.ptz").read_bytes()
    assert values(done.out, "val_bpb")[-1] == values(whole[1], "val_bpb")[-1]
    small = cli(stored, AGAIN, run_id="small", artifact_limit_bytes=CODE_BYTES + 17000)
    assert small.code == 0 and 0.98 * 17000 < values(small.out, "model_bytes")[-1] <= 17000


def test_export_again_with_fixed_grids(stored: Path) -> None:
    """Bits that are given hold, for the MLP, too, and so does pruning."""
    fixed = AGAIN | {"rate_control": 0, "artifact_limit_bytes": 10**6}
    bits = cli(stored, fixed, run_id="bits", mlp_bits=6, attn_bits=3, bigram_bits=7)
    assert bits.code == 0, bits
    levels = dict(re.findall(r"artifact category:(\w+) .*levels:(\d+)", bits.out))
    assert {kind: int(n).bit_length() for kind, n in levels.items() if kind in ("attn", "bigram")} == {
        "attn": 3,
        "bigram": 7,
    }
    assert levels["mlp"] == "63", "MLP_BITS=6 is given"
    pruned = cli(stored, fixed, run_id="pruned", mlp_prune_frac=0.5)
    plain = cli(stored, fixed, run_id="plain")
    assert pruned.code == 0 == plain.code and values(pruned.out, "model_bytes") < values(plain.out, "model_bytes")


def test_export_from_bad_files(stored: Path, late: Path) -> None:
    """Missing, damaged, a checkpoint, an artifact, weights of another model: exit code 2, and which file."""
    (stored / "cut").write_bytes((stored / "logs/x.weights").read_bytes()[:-5])
    shutil.copy(late / "logs/x.000000012.ckpt", stored)
    sound = t.load_tensors(stored / "logs/x.weights")
    t.save_tensors(stored / "older", {name: sound[name] for name in sound if name != "data"})
    t.save_tensors(stored / "sizes", sound | {"config": sound["config"] | {"num_heads": 5}})
    cases = {
        "none": "none",
        "cut": "cut is truncated, damaged or not this script's",
        "x.000000012.ckpt": "x.000000012.ckpt is of another version of the script, or holds something else",
        "logs/x.ptz": "x.ptz is truncated, damaged or not",
        "older": "older is of another version of the script",
        "sizes": "NUM_HEADS=5",
    }
    for i, (path, part) in enumerate(cases.items()):
        done = cli(stored, PLAIN, run_id=f"r{i}", export_from=path)
        assert done.code == 2 and part in done.err and done.err.count("\n") == 1, (path, done)


# ---- dry runs --------------------------------------------------------------------------------------------------------
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of 8 ranks, on a CPU with none of them: exit code 0, nothing run, nothing left but its log."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    for _ in range(2):
        done = cli(tmp_path, PLAIN, dry_run=1, train_batch_tokens=1024, warmup_steps=3)
        assert done.code == 0 and done.out.endswith("\nplan: the run can start\n"), done
    for pattern in (
        r"runtime world_size:8 device:cpu ",
        r"model params:\d+ seed:\d+$",
        r"data path:\S+ val_tokens:\d+ val_targets:\d+",
        r"data train_shards:1 train_tokens:\d+ windows:\d+",
        r"batch tokens:1024 ranks:8 micro_batch_tokens:128 micro_steps:1$",
    ):
        assert re.search(f"^{pattern}", done.out, re.M), pattern
    assert names(tmp_path) == ["plan-x.txt"] and "warm_up" not in done.out and not values(done.out, "train_loss")


@pytest.mark.parametrize(("device", "expected"), [("cuda", ["warm_up"]), ("cpu", [])])
def test_dry_run_uses_the_device(monkeypatch: pytest.MonkeyPatch, device: str, expected: list[str]) -> None:
    """On a GPU it does the warm-up of the run, which shows memory and time of a step, and no more."""
    calls: list[str] = []

    class Trainer:
        """Stands for the real one, which would need the GPU."""

        micro_seqs = micro_steps = 1

        def __init__(self, *_: Any) -> None: ...

        def __getattr__(self, name: str) -> Any:
            return lambda *_: calls.append(name)

    rt = runtime()
    rt.device = SimpleNamespace(type=device)  # type: ignore[assignment]
    for owner, name, value in (
        (t, "Trainer", Trainer),
        (t.GPT, "to", lambda self, device: self),
        (t, "Runtime", lambda _: rt),
        (rt, "open_log", lambda mode: None),
        (t, "log_start", lambda *_: None),
        (t, "Data", lambda *_: None),
    ):
        monkeypatch.setattr(owner, name, value)
    assert t.main(config(dry_run=1), []) == 0 and calls == expected
    assert rt.lines[-1] == "plan: the run can start"


def test_dry_run_checks_the_checkpoint(late: Path, tmp_path: Path) -> None:
    """RESUME=1 of another config could not start, so the dry run fails; with the same one it may."""
    copied(late, tmp_path)
    done = cli(tmp_path, FULL, resume=1, dry_run=1)
    assert done.code == 0 and "resume checkpoint:" in done.out and done.out.endswith("the run can start\n"), done
    done = cli(tmp_path, FULL, resume=1, dry_run=1, matrix_lr=0.5)
    assert done.code == 2 and "MATRIX_LR=0.028 there, 0.5 now" in done.err, done
    assert names(tmp_path) == sorted([*names(late), "plan-x.txt"])


# ---- kill -9, for real -----------------------------------------------------------------------------------------------
def test_killed_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kill of tests/kill.py, on forks, while a checkpoint is written; the reference is made inside this process."""

    def forked(folder: Path, ranks: int, log: Path, **changes: Any) -> Forked:
        """As kill.py starts a run, without waiting for an interpreter."""
        assert ranks == 1
        log.touch()
        return Forked(folder, log, clean_environment(kill_script.SETTINGS | quick | changes))

    quick = {"eval_stride": 16}
    monkeypatch.setattr(kill_script, "start", forked)
    done = cli(tmp_path, kill_script.SETTINGS | quick)
    assert done.code == 0, done
    expected = (tmp_path / "logs/run.ptz").read_bytes(), kill_script.score(done.out)
    row, _ = kill_script.one_kill(tmp_path, 1, "checkpoint writing", 0.5, expected)
    assert "| checkpoint writing (1 torn file) |" in row and "| yes | yes | yes |" in row, row
