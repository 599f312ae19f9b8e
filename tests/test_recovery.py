"""Nothing that was paid for is lost: checkpoints, resuming, signals, full disks, dry runs, and every error's exit code.
Most runs are made inside the test process; those that get signals or have several ranks are processes of their own."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools import ROOT, corpus, environment, t, values

STEPS = 12
CODE_BYTES = (ROOT / "train_gpt.py").stat().st_size
# Everything that a checkpoint has to carry: quantization that starts in mid-run on a plan made from data, snapshots
# from step 10 on, a choice of weights and rounding, a checkpoint after each step.
FULL: dict[str, Any] = {
    "run_id": "x",
    "iterations": STEPS,
    "warmdown_iters": 8,
    "warmup_steps": 1,
    "checkpoint_every": 1e-9,
    "rate_control": True,
    "swa_always": False,
    "qat_start_frac": 0.5,
    "artifact_limit_bytes": CODE_BYTES + 45000,
    "calibration_tokens": 512,
}
PLAIN: dict[str, Any] = {"qat_start_frac": 1, "error_feedback": False, "checkpoint_every": 1e-9, "run_id": "x"}
Outcome = namedtuple("Outcome", "code out err")


class Killed(BaseException):
    """Stands for kill -9: nothing in the script catches it."""


def do_after(patch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[..., Any]) -> None:
    """Let `action` follow each call of `owner.name`, with the arguments of that call."""
    original = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        """The call, then the action."""
        result = original(*args, **kwargs)
        action(*args, **kwargs)
        return result

    patch.setattr(owner, name, both)


def do_at(patch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    """Let `action` follow a step of the training (before that step's snapshot and checkpoint)."""
    do_after(patch, t.Trainer, "absorb", lambda trainer, *_: action() if trainer.step == step else None)


def kill(*_: Any) -> None:
    """End the run without a trace of an ending."""
    raise Killed


def cli(folder: Path, changes: dict[str, Any], **more: Any) -> Outcome:
    """The command line in `folder`, inside this process: exit code (-9: killed), standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in t.STOP_SIGNALS}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        for name, value in environment(**changes | more).items():
            patch.setenv(name, value)
        try:
            code = t.command_line()
        except Killed:
            code = -9
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Outcome(code, out.getvalue(), err.getvalue())


def start(folder: Path, *options: str, **changes: Any) -> subprocess.Popen[str]:
    """The script as a process in `folder`, under torchrun if there are `options` for it; errors go to its output."""
    env = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "TMPDIR", "OPENBLAS_CORETYPE") if k in os.environ}
    launcher = ["-m", "torch.distributed.run", "--standalone", *options] if options else []
    command = [sys.executable, "-u", *launcher, str(ROOT / "train_gpt.py")]
    env |= environment(**changes) | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def read_until(process: subprocess.Popen[str], part: str) -> str:
    """The output up to the first line that contains `part`; fails if the process ends before."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if part in line:
            return "".join(lines)
    raise AssertionError(f"ended without {part!r}:\n" + "".join(lines))


def rest(process: subprocess.Popen[str]) -> str:
    """The rest of the output, once the process has ended."""
    return process.communicate(timeout=300)[0]


def worker(launcher: int, rank: int) -> int:
    """The process id of a rank under torchrun."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher and f"\0RANK={rank}\0".encode() in b"\0" + path.with_name("environ").read_bytes():
                return int(path.parent.name)
    raise AssertionError(f"no rank {rank} under process {launcher}")


def names(folder: Path, pattern: str = "*") -> list[str]:
    """The files in logs/ that match."""
    return sorted(path.name for path in (folder / "logs").glob(pattern))


def copied(source: Path, folder: Path) -> Path:
    """`folder` with a copy of the logs/ of `source`."""
    shutil.copytree(source / "logs", folder / "logs")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing interrupts: its folder and its output."""
    folder = tmp_path_factory.mktemp("whole")
    done = cli(folder, FULL)
    assert done.code == 0, done
    return folder, done.out


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of 12 plain steps on one rank."""
    done = cli(tmp_path_factory.mktemp("straight"), PLAIN, iterations=STEPS, checkpoint_every=0)
    assert done.code == 0, done
    return values(done.out, "train_loss")


# ---- checkpoints and resuming ----------------------------------------------------------------------------------------
def assert_same_end(folder: Path, out: str, whole: tuple[Path, str]) -> None:
    """The artifact, the later losses and the final score are those of the uninterrupted run, bit for bit."""
    assert (folder / "logs/x.ptz").read_bytes() == (whole[0] / "logs/x.ptz").read_bytes()
    losses = values(out, "train_loss")
    assert losses == values(whole[1], "train_loss")[STEPS - len(losses) :]
    pick = re.compile(r"^final_.*?(val_loss:\S+ val_bpb:\S+)", re.M)
    assert pick.findall(out) == pick.findall(whole[1]) != []


@pytest.mark.parametrize(
    ("owner", "name", "step", "begins"),
    [
        (t.Trainer, "absorb", 3, 2),  # before quantization starts
        (t.Trainer, "start_qat", 6, 6),
        (t.Trainer, "absorb", 8, 7),  # between that and the first snapshot
        (t.Trainer, "absorb", 11, 10),  # between snapshots
        (t.Trainer, "save", 11, 11),
        (t.Trainer, "quantized_loss", 12, 12),  # while the weights are chosen
        (t, "save_tensors", 12, 12),  # the weights are on disk, nothing is exported
        (t, "export", 12, 12),
    ],
)
def test_resumed_equals_uninterrupted(
    whole: tuple[Path, str], tmp_path: Path, owner: Any, name: str, step: int, begins: int
) -> None:
    """Killed anywhere, a run ends as if it had not been; the same log goes on."""
    seen: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        do_after(patch, t.Trainer, "absorb", lambda trainer, *_: seen.update(step=trainer.step))

        def die(*args: Any, **_: Any) -> None:
            """Kill at the step, and not while one of its checkpoints is written."""
            if seen.get("step") == step and not str(args[0]).endswith(".ckpt"):
                kill()

        do_after(patch, owner, name, die)
        killed = cli(tmp_path, FULL)
    assert killed.code == -9 and not values(killed.out, "final_sliding")
    before = (tmp_path / "logs/x.txt").read_text()
    done = cli(tmp_path, FULL, resume=1)
    assert done.code == 0 and f"resume checkpoint:logs/x.{begins:09d}.ckpt step:{begins} " in done.out, done
    assert_same_end(tmp_path, done.out, whole)
    log = (tmp_path / "logs/x.txt").read_text()
    assert log.startswith(before) and log.endswith(done.out[-1000:]) and log.count("def command_line") == 1


def test_kept_checkpoints(whole: tuple[Path, str]) -> None:
    """The last two stay, nothing half-written does; a run without CHECKPOINT_EVERY writes none."""
    expected = ["x.000000011.ckpt", "x.000000012.ckpt", "x.ptz", "x.txt", "x.weights"]
    assert names(whole[0]) == expected
    assert whole[1].count("checkpoint path:") == STEPS and "(inside the clock)" in whole[1]


def test_leftovers_of_a_kill_are_removed(whole: tuple[Path, str], tmp_path: Path) -> None:
    """A file that was half-written when the machine went away does not stay for ever."""
    copied(whole[0], tmp_path)
    (tmp_path / "logs/x.000000012.ckpt").rename(tmp_path / "logs/x.000000013.ckpt.tmp")
    (tmp_path / "logs/other.000000013.ckpt.tmp").write_bytes(b"of another run")
    assert cli(tmp_path, FULL, resume=1).code == 0
    assert names(tmp_path, "*.tmp") == ["other.000000013.ckpt.tmp"]


def test_seldom_checkpoints(tmp_path: Path) -> None:
    """CHECKPOINT_EVERY counts seconds: with a large value there is one, at the end."""
    assert cli(tmp_path, PLAIN, checkpoint_every=10000).out.count("checkpoint path:") == 1
    assert names(tmp_path, "*.ckpt") == ["x.000000006.ckpt"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_checkpoint_is_skipped(whole: tuple[Path, str], tmp_path: Path, damage: str) -> None:
    """The one before it is used, with a warning."""
    newest = copied(whole[0], tmp_path) / "logs/x.000000012.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"cut": bytes(content[: len(content) // 3]), "flipped": bytes(content), "empty": b""}[damage])
    done = cli(tmp_path, FULL, resume=1)
    assert done.code == 0 and "warning: skipped a checkpoint: logs/x.000000012.ckpt is truncated" in done.out
    assert "resume checkpoint:logs/x.000000011.ckpt" in done.out
    assert_same_end(tmp_path, done.out, whole)


def test_no_sound_checkpoint(tmp_path: Path) -> None:
    """A warning, and the run starts from the beginning, with the source in its log."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/x.000000004.ckpt").write_bytes(b"x" * 100)
    done = cli(tmp_path, PLAIN, resume=1)
    assert done.code == 0 and "warning: skipped a checkpoint" in done.out
    assert "warning: RUN_ID=x has no sound checkpoint: it starts from the beginning" in done.out
    assert len(values(done.out, "train_loss")) == 6
    assert "def command_line" in (tmp_path / "logs/x.txt").read_text()


def test_checkpoint_of_an_older_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose config lacks a setting that there is now cannot be set back: another version wrote it."""
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()
    cfg = t.load_config({"RUN_ID": "x"})[0]
    then = {name: value for name, value in t.dataclasses.asdict(cfg).items() if name != "value_residual"}
    t.save_tensors(Path("logs/x.000000004.ckpt"), {"config": then, "model": {}, "step": 4, "elapsed": 0.0})
    with pytest.raises(ValueError, match="VALUE_RESIDUAL=None there, True now; use the version of the script"):
        t.newest_checkpoint(cfg, lambda line: None)


def test_other_config_is_refused(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Naming the fields and both values; settings that change no result may differ."""
    copied(whole[0], tmp_path)
    done = cli(tmp_path, FULL, resume=1, matrix_lr=0.5, seed=7)
    assert done.code == 2 and "x.000000012.ckpt is of another config" in done.err, done
    listed = ("MATRIX_LR=0.02 there, 0.5 now", "SEED=42 there, 7 now", "; set them back, or")
    assert all(words in done.err for words in listed), done.err
    assert "ITERATIONS" not in done.err and not values(done.out, "train_loss")
    assert names(tmp_path, "*.ckpt") == names(whole[0], "*.ckpt")
    done = cli(tmp_path, FULL, resume=1, train_log_every=3, checkpoint_every=0, micro_batch_tokens=64)
    assert done.code == 0, done


def test_resume_needs_a_name(tmp_path: Path) -> None:
    """Without RUN_ID there is nothing to continue."""
    done = cli(tmp_path, PLAIN, run_id=None, resume=1)
    assert done.code == 2 and "needs RUN_ID" in done.err and not (tmp_path / "logs").exists()


def test_one_rank_resumes_on_two(straight: list[float], tmp_path: Path) -> None:
    """The losses are those of the run that stayed on one rank, to 1e-5."""
    with pytest.MonkeyPatch.context() as patch:
        do_at(patch, 5, kill)
        assert cli(tmp_path, PLAIN, iterations=STEPS).code == -9
    process = start(tmp_path, "--nproc_per_node=2", **PLAIN | {"iterations": STEPS, "resume": 1})
    out = rest(process)
    assert process.returncode == 0 and "resume checkpoint:logs/x.000000004.ckpt" in out, out
    assert values(out, "train_loss") == pytest.approx(straight[4:], rel=1e-5)


# ---- signals and ranks that die --------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run(tmp_path: Path, number: signal.Signals) -> None:
    """The step is finished, a checkpoint written, the way to go on said; the exit code is 128 + signal."""
    changes = PLAIN | {"iterations": 100000, "train_batch_tokens": 1024}
    process = start(tmp_path, **changes | {"checkpoint_every": 10000})
    out = read_until(process, "step:3/")
    process.send_signal(number)
    out += rest(process)
    assert process.returncode == 128 + number, out
    found = re.search(r"stopped by a signal after step (\d+); RESUME=1 RUN_ID=x", out)
    assert found and "Traceback" not in out, out
    assert f"step:{found[1]}/100000 " in out and names(tmp_path, "*.ckpt") == [f"x.{int(found[1]):09d}.ckpt"]
    with pytest.MonkeyPatch.context() as patch:
        do_at(patch, int(found[1]) + 1, lambda: os.kill(os.getpid(), number))
        again = cli(tmp_path, changes, resume=1)
    assert f"resume checkpoint:logs/x.{int(found[1]):09d}.ckpt" in again.out
    assert again.code == 128 + number and f"after step {int(found[1]) + 2}; RESUME=1" in again.err, again


def test_signal_without_checkpoints(tmp_path: Path) -> None:
    """Without CHECKPOINT_EVERY it says that nothing is there to resume from."""
    with pytest.MonkeyPatch.context() as patch:
        do_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        done = cli(tmp_path, PLAIN, checkpoint_every=0)
    assert done.code == 143 and "after step 3; CHECKPOINT_EVERY" in done.err and "RESUME" not in done.err
    assert names(tmp_path) == ["x.txt"]


def test_signal_during_the_last_step(tmp_path: Path) -> None:
    """The machine is about to vanish: no export is begun; it comes when the run is resumed."""
    with pytest.MonkeyPatch.context() as patch:
        do_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        done = cli(tmp_path, PLAIN)
    assert done.code == 143 and "after step 6; RESUME=1 RUN_ID=x" in done.err and not names(tmp_path, "*.ptz"), done
    done = cli(tmp_path, PLAIN, resume=1)
    assert done.code == 0 and not values(done.out, "train_loss") and names(tmp_path, "*.ptz") == ["x.ptz"]


def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    """Even in the middle of a step that would take minutes."""
    process = start(tmp_path, **PLAIN | {"train_batch_tokens": 32 * 65536, "micro_batch_tokens": 32})
    out = read_until(process, "start_up time:")
    time.sleep(2)  # the handlers are set after that line
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None, rest(process)
    process.send_signal(signal.SIGTERM)
    out += rest(process)
    assert process.returncode == -signal.SIGTERM and "train_loss" not in out and not names(tmp_path, "*.ckpt")


def test_signal_under_torchrun(tmp_path: Path) -> None:
    """SIGTERM to torchrun ends 2 ranks within a step and 5 seconds; one rank goes on, with equal losses."""
    changes = PLAIN | {"iterations": 100000, "train_batch_tokens": 1024}
    for attempt in range(3):  # the limit is the issue's; a busy machine gets three tries
        changes["run_id"] = f"x{attempt}"
        process = start(tmp_path, "--nproc_per_node=2", **changes)
        out = read_until(process, "step:4/")
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out += rest(process)
        took = time.monotonic() - begun
        if took < 5 + max(float(ms) for ms in re.findall(r"step_avg:([\d.]+)ms", out)) / 1000:
            break
    else:
        raise AssertionError(f"SIGTERM took {took} s:\n{out}")
    assert process.returncode != 0
    found = re.search(r"stopped by a signal after step (\d+); RESUME=1 RUN_ID=x\d", out)
    assert found, out
    step = int(found[1])
    with pytest.MonkeyPatch.context() as patch:
        do_at(patch, step + 5, kill)
        whole = cli(tmp_path, changes, run_id="y", checkpoint_every=0)
        resumed = cli(tmp_path, changes, resume=1)
    assert f"resume checkpoint:logs/{changes['run_id']}.{step:09d}.ckpt" in resumed.out, resumed
    losses = values(whole.out, "train_loss")
    assert values(out, "train_loss") == pytest.approx(losses[:step], rel=1e-5)
    assert len(losses) == step + 5 and values(resumed.out, "train_loss") == pytest.approx(losses[step:], rel=1e-5)


def test_restart_by_torchrun(tmp_path: Path) -> None:
    """--max-restarts=1: one rank dies, torchrun starts all again, the run goes on from its checkpoint and ends."""
    process = start(
        tmp_path, "--nproc_per_node=2", "--max-restarts=1", **PLAIN | {"run_id": None, "iterations": 200}
    )
    out = read_until(process, "step:5/")
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    out += rest(process)
    assert process.returncode == 0 and out.count("final_sliding stride") == 1, out
    resumed = re.findall(r"resume checkpoint:logs/run-[\w-]+\.0*(\d+)\.ckpt", out)
    assert len(resumed) == 1 and int(resumed[0]) >= 4 and out.count("step:200/200 train_loss") == 1
    assert len(names(tmp_path, "run-*.txt")) == 1 == len(names(tmp_path, "run-*.ptz"))


def random_shards(folder: Path, train: int = 2000, val: int = 500) -> Path:
    """A data folder of random tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        t.write_shard(folder / f"fineweb_{split}_000000.bin", rng.integers(4, 300, count))
    return folder


def spoil(path: Path, at: int, content: bytes) -> None:
    """Overwrite a part of a file."""
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)


def test_one_rank_fails(tmp_path: Path) -> None:
    """Only rank 1 meets a token beyond the vocabulary: torchrun ends within a minute, and says why."""
    data = random_shards(tmp_path / "data", train=200000)
    spoil(data / "fineweb_train_000000.bin", 1024 + 2 * 90000, b"\xff\xff")
    changes = PLAIN | {"data_path": data, "train_batch_tokens": 32768, "val_batch_size": 1024}
    process = start(tmp_path, "--nproc_per_node=2", **changes)
    out = read_until(process, "step:2/")
    begun = time.monotonic()
    out += rest(process)
    assert process.returncode != 0 and time.monotonic() - begun < 60
    assert "error on rank 1:" in out and "token id 65535 is beyond VOCAB_SIZE=320" in out, out


# ---- disks and folders -----------------------------------------------------------------------------------------------
@contextlib.contextmanager
def file_size_limit() -> Iterator[int]:
    """Puts the limit for the size of files back; gives the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full_during_a_checkpoint(whole: tuple[Path, str], tmp_path: Path) -> None:
    """No room from step 9 on: an error in the log, older ones stay, the run ends well, and could be resumed."""
    limit = (whole[0] / "logs/x.000000012.ckpt").stat().st_size - 5000
    with file_size_limit() as hard, pytest.MonkeyPatch.context() as patch:
        do_at(patch, 9, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
        done = cli(tmp_path, FULL)
    assert done.code == 0 and done.out.count("error: no checkpoint at step ") == 4 and "make room" in done.out, done
    assert os.strerror(errno.EFBIG) in done.out
    assert names(tmp_path) == ["x.000000007.ckpt", "x.000000008.ckpt", "x.ptz", "x.txt", "x.weights"]
    assert_same_end(tmp_path, done.out, whole)
    done = cli(tmp_path, FULL, resume=1)
    assert "resume checkpoint:logs/x.000000008.ckpt" in done.out
    assert_same_end(tmp_path, done.out, whole)


@pytest.mark.parametrize(("nth", "name"), [(STEPS + 1, "x.weights"), (STEPS + 3, "x.ptz")])
def test_disk_full_during_the_export(whole: tuple[Path, str], tmp_path: Path, nth: int, name: str) -> None:
    """A clear error that names the file, nothing half-written, checkpoints intact; with room again the run ends."""
    calls: list[int] = []

    def full(*_: Any) -> None:
        """The disk is full at the nth file."""
        calls.append(1)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        do_after(patch, t.os, "fsync", full)
        done = cli(tmp_path, FULL)
    assert done.code == 2 and os.strerror(errno.ENOSPC) in done.err and "Traceback" not in done.err, done
    assert name in done.err and not (tmp_path / "logs" / name).exists() and not names(tmp_path, "*.tmp")
    assert names(tmp_path, "*.ckpt") == ["x.000000011.ckpt", "x.000000012.ckpt"]
    done = cli(tmp_path, FULL, resume=1)
    assert done.code == 0
    assert_same_end(tmp_path, done.out, whole)


def test_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file named logs: found before training, and by a dry run."""
    (tmp_path / "logs").write_text("a file")
    for dry_run in (0, 1):
        done = cli(tmp_path, PLAIN, dry_run=dry_run)
        assert done.code == 2 and "logs" in done.err and not done.out and "Traceback" not in done.err, done


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before training, and by a dry run; the message says how much there is and how much it takes."""
    monkeypatch.setattr(t.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 12345))  # type: ignore[attr-defined]
    for dry_run in (1, 0):
        done = cli(tmp_path, PLAIN, dry_run=dry_run)
        found = re.search(r"logs/ has 12345 bytes free, this run may write (\d+): make room", done.err)
        assert done.code == 2 and found and int(found[1]) > 16_000_000, done
        assert not values(done.out, "train_loss") and "the run can start" not in done.out


def test_existing_run_is_refused(whole: tuple[Path, str], tmp_path: Path) -> None:
    """With both remedies; its files stay as they are. A dry run finds it, too."""
    copied(whole[0], tmp_path)
    before = (tmp_path / "logs/x.txt").read_bytes()
    for dry_run in (0, 1):
        done = cli(tmp_path, PLAIN, dry_run=dry_run)
        assert done.code == 2 and "RUN_ID=x has a log" in done.err and not values(done.out, "train_loss"), done
    assert (tmp_path / "logs/x.txt").read_bytes() == before
    assert "RESUME=1" in cli(tmp_path, PLAIN).err


def test_a_restart_does_not_take_over_another_run(
    whole: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN_ID was taken, so the first start was refused; torchrun's restart leaves the finished run alone, too."""
    copied(whole[0], tmp_path)
    for name in names(tmp_path, "*.ckpt"):
        (tmp_path / "logs" / name).unlink()
    restart = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "0123456789"}
    cfg = t.load_config(environment(run_id=None) | restart)[0]
    assert cfg.resume and cfg.run_id == "run-01234567"
    assert not t.load_config(environment() | restart | {"TORCHELASTIC_RESTART_COUNT": "0"})[0].resume
    before = (tmp_path / "logs/x.ptz").read_bytes()
    for name, value in restart.items():
        monkeypatch.setenv(name, value)
    done = cli(tmp_path, FULL, seed=7)
    assert done.code == 2, done
    assert all(part in done.err for part in ("logs/x.weights", "EXPORT_FROM", "another RUN_ID")), done.err
    assert (tmp_path / "logs/x.ptz").read_bytes() == before and not values(done.out, "train_loss")


def test_runs_at_once(tmp_path: Path) -> None:
    """Two runs in one folder, one name a prefix of the other's, on one text: neither touches the other's files."""
    sp, _ = t.load_tokenizer(str(corpus() / "tokenizer.model"), 320)
    tokens = t.open_shard(corpus() / "fineweb_train_000000.bin").astype(int).tolist()
    (tmp_path / "all.txt").write_text("\n".join(sp.decode(tokens[i : i + 40]) for i in range(0, 6000, 40)))
    common = FULL | {"text_files": "all.txt", "data_path": None, "tokenizer_path": None, "warmup_steps": 0}
    processes = {name: start(tmp_path, **common | {"run_id": name}) for name in ("a", "a.b")}
    for name, process in processes.items():
        out = rest(process)
        assert process.returncode == 0, out
        assert set(re.findall(r"logs/([\w.]+?)\.(?:\d{9}\.ckpt|ptz|weights|txt)", out)) == {name}
        log = (tmp_path / f"logs/{name}.txt").read_text()
        assert log.count("step:12/12 train_loss") == 1 == log.count("\nrun id:")
    ends = ["000000011.ckpt", "000000012.ckpt", "ptz", "txt", "weights"]
    assert names(tmp_path) == sorted([f"{name}.{end}" for name in processes for end in ends] + ["cache"])
    assert (tmp_path / "logs/a.ptz").read_bytes() == (tmp_path / "logs/a.b.ptz").read_bytes()
    assert len(list((tmp_path / "logs/cache").iterdir())) == 1


# ---- exports again ---------------------------------------------------------------------------------------------------
def test_export_again(whole: tuple[Path, str], tmp_path: Path) -> None:
    """The same settings give the same bytes and score, without training; other settings give another artifact."""
    copied(whole[0], tmp_path)
    again = FULL | {"export_from": "logs/x.weights", "checkpoint_every": 0}
    done = cli(tmp_path, again, run_id="again", num_layers=5)
    assert done.code == 0 and not values(done.out, "train_loss"), done
    assert (tmp_path / "logs/again.ptz").read_bytes() == (tmp_path / "logs/x.ptz").read_bytes()
    assert values(done.out, "val_bpb")[-1] == values(whole[1], "val_bpb")[-1]
    small = cli(tmp_path, again, run_id="small", artifact_limit_bytes=CODE_BYTES + 35000)
    assert small.code == 0 and values(small.out, "model_bytes")[0] < 35000 < values(done.out, "model_bytes")[0]
    bits = cli(tmp_path, again, run_id="bits", rate_control=0, mlp_bits=6, attn_bits=3, bigram_bits=7)
    assert bits.code == 0 and "artifact bits:mlp6,attn3,bigram7 " in bits.out, bits
    nearest, pruned = (cli(tmp_path, again, rate_control=0, **change) for change in (
        {"run_id": "nearest", "error_feedback": 0}, {"run_id": "pruned", "error_feedback": 0, "mlp_prune_frac": 0.5}))
    assert nearest.code == 0 == pruned.code
    assert values(pruned.out, "val_bpb")[-1] != values(nearest.out, "val_bpb")[-1]


def test_error_feedback_can_be_left_out_later(tmp_path: Path) -> None:
    """ERROR_FEEDBACK=0 holds for weights that were stored with their Hessians, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "quantized_loss", lambda self, weights, hessians: -len(hessians))  # feedback wins
        assert cli(tmp_path, PLAIN, error_feedback=1).code == 0
    again = PLAIN | {"export_from": "logs/x.weights"}
    for feedback in (0, 1):
        assert cli(tmp_path, again, run_id=f"e{feedback}", error_feedback=feedback).code == 0
    same = [(tmp_path / f"logs/e{i}.ptz").read_bytes() == (tmp_path / "logs/x.ptz").read_bytes() for i in (0, 1)]
    assert same == [False, True]


def test_export_from_bad_files(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Missing, damaged, a checkpoint, an artifact, others with a sound checksum: exit code 2, and which file."""
    copied(whole[0], tmp_path)
    (tmp_path / "cut").write_bytes((tmp_path / "logs/x.weights").read_bytes()[:-5])
    t.save_tensors(tmp_path / "list", [1, 2])  # type: ignore[arg-type]
    sound = t.load_tensors(tmp_path / "logs/x.weights")
    t.save_tensors(tmp_path / "shapes", sound | {"weights": {}})
    cases = {"none": "no file none", "cut": "cut is truncated, damaged or not", "logs/x.000000012.ckpt": "ckpt",
             "logs/x.ptz": "x.ptz is truncated, damaged or not", "list": "list", "shapes": "shapes"}
    for i, (path, part) in enumerate(cases.items()):
        done = cli(tmp_path, PLAIN, run_id=f"r{i}", export_from=path)
        assert done.code == 2 and part in done.err, (path, done)


# ---- dry runs --------------------------------------------------------------------------------------------------------
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of 8 ranks, on a machine with none of them: exit code 0, nothing trained, nothing left but its log."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    done = cli(tmp_path, PLAIN, dry_run=1, max_wallclock_seconds=100, plan_step_ms=50, train_batch_tokens=1024)
    assert done.code == 0 and done.out.rstrip().endswith("the run can start"), done
    n = r"\d+"
    for pattern in (
        rf"model params:{n} .*mlp:{n}",
        rf"data path:\S+ val_shards:1 val_tokens:{n} val_targets:{n}",
        rf".*tokens:1024\b.* micro_batch_tokens:128 micro_steps:1 step_tflop_per_rank:{n}",
        rf"plan rank_memory_bytes all:{n} weights:{n} gradients:{n} optimizer:{n} swa:{n} activations:{n} logits:{n}",
        rf"plan artifact_bytes .*mlp:{n}.* all:{n} limit:16000000",
        rf"plan iterations:6 .*steps_that_fit:1960 warmdown:4.*windows:{n}",
        r".*\branks:8\b",
        r".*per_rank:\d+",
    ):
        assert re.search(f"^{pattern}", done.out, re.M), pattern
    assert names(tmp_path) == ["plan-x.txt"] and not values(done.out, "train_loss")
    assert cli(tmp_path, PLAIN, dry_run=1).code == 0  # again, and with one more rank than divides
    monkeypatch.setenv("WORLD_SIZE", "7")
    done = cli(tmp_path, PLAIN, dry_run=1)
    assert done.code == 2 and "7 ranks do not divide" in done.err
    assert "use one of 1, 2, 4, 8 ranks" in done.err


def test_dry_run_checks_the_checkpoint(whole: tuple[Path, str], tmp_path: Path) -> None:
    """RESUME=1 of another config could not start, so the dry run fails; with the same one it may plan freely."""
    copied(whole[0], tmp_path)
    done = cli(tmp_path, FULL, resume=1, dry_run=1, plan_step_ms=20)
    assert done.code == 0 and "the run can start" in done.out, done
    done = cli(tmp_path, FULL, resume=1, dry_run=1, matrix_lr=0.5)
    assert done.code == 2 and "MATRIX_LR=0.02 there, 0.5 now" in done.err, done


# ---- every error: exit code and message ------------------------------------------------------------------------------
Damage = Callable[[Path], dict[str, Any]]  # spoils the data folder it is given; returns the settings of the run


def overwritten(name: str, at: int, content: bytes) -> Damage:
    """A part of a shard overwritten."""
    return lambda data: spoil(data / f"fineweb_{name}_000000.bin", at, content) or {}  # type: ignore[func-returns-value]


def resized(name: str, cut: int, more: bytes = b"") -> Damage:
    """A shard with `cut` bytes less and some more."""

    def damage(data: Path) -> dict[str, Any]:
        """Cut and append."""
        path = data / f"fineweb_{name}_000000.bin"
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut] + more)
        return {}

    return damage


def foreign_tokenizer(data: Path) -> dict[str, Any]:
    """A tokenizer that is none."""
    (data / "foreign.model").write_bytes(b"this is no model")
    return {"tokenizer_path": data / "foreign.model"}


def short_split(data: Path) -> dict[str, Any]:
    """A validation split of less than one window."""
    t.write_shard(data / "fineweb_val_000000.bin", np.arange(4, 24))
    return {}


def text(content: bytes) -> Damage:
    """A text file as the corpus."""

    def damage(data: Path) -> dict[str, Any]:
        """Write it."""
        (data / "text.txt").write_bytes(content)
        return {"text_files": data / "text.txt"}

    return damage


def settings(**changes: Any) -> Damage:
    """Nothing spoiled, other settings."""
    return lambda data: changes


INPUT_ERRORS: list[tuple[Damage, list[str]]] = [
    (settings(data_path="nowhere"), ["no shards match nowhere", "cached_challenge_fineweb.py", "DEMO=1"]),
    (overwritten("train", 0, b"\1\2"), ["fineweb_train_000000.bin is no token shard (magic", "version 1"]),
    (overwritten("val", 4, b"\7"), ["fineweb_val_000000.bin is no token shard", "version 7"]),
    (resized("train", 7), ["fineweb_train_000000.bin is truncated: 5017 bytes, 2000 tokens need 5024"]),
    (resized("val", 2020), ["fineweb_val_000000.bin is no token shard (magic 20240520, version 0"]),
    (resized("val", 0, b"more"), ["fineweb_val_000000.bin is longer than its header says"]),
    (overwritten("val", 1024 + 500, b"\xff\xff"), ["val_000000.bin, from token 0: token id 65535", "VOCAB_SIZE=320"]),
    (overwritten("train", 1024 + 2, b"\x40\1"), ["train_000000.bin, from token 0: token id 320 is beyond VOCAB_SIZE"]),
    (short_split, ["has 20 ", "a window of TRAIN_SEQ_LEN needs 33", "add text"]),
    (settings(tokenizer_path="nowhere"), ["no tokenizer at TOKENIZER_PATH=nowhere"]),
    (foreign_tokenizer, ["foreign.model is not a SentencePiece model"]),
    (settings(vocab_size=400), ["tokenizer.model has 320 pieces, VOCAB_SIZE is 400"]),
    (settings(iterations="many", num_heads=5, demo="x"), ["ITERATIONS='many'", "NUM_HEADS=5", "DEMO='x'"]),
    (settings(micro_batch_tokens=96), ["MICRO_BATCH_TOKENS=96 does not divide", "use 32, 64, 128, 256"]),
    (settings(demo=1, text_files="x"), ["TEXT_FILES both name a corpus"]),
    (settings(text_files="*.nothing"), ["no file matches TEXT_FILES='*.nothing'", "quote the glob"]),
    (text(b"\xff\xfe\0"), ["text.txt is not UTF-8 text", "convert or exclude it"]),
    (text(b"one line"), ["1 documents"]),
    (text(b"".join(b"%d words\n" % i for i in range(900))), ["no tokenizer of VOCAB_SIZE=320 from this text: give"]),
]


@pytest.mark.parametrize(("damage", "parts"), INPUT_ERRORS)
def test_input_errors(tmp_path: Path, damage: Damage, parts: list[str]) -> None:
    """Exit code 2 before any training, one message with value and remedy; a dry run says the same."""
    changes = PLAIN | {"data_path": random_shards(tmp_path / "data")}
    changes |= damage(tmp_path / "data")
    for dry_run in (1, 0):
        done = cli(tmp_path, changes, dry_run=dry_run)
        assert done.code == 2 and done.err.startswith("error: ") and not values(done.out, "train_loss"), done
        assert all(part in done.err for part in parts) and "Traceback" not in done.err, done.err


def test_ranks_that_do_not_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the ranks meet."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = cli(tmp_path, PLAIN)
    assert done.code == 2 and "error: 3 ranks do not divide" in done.err and "use one of 1, 2, 4, 8 ranks" in done.err


def test_token_in_mid_shard(tmp_path: Path) -> None:
    """A token beyond the vocabulary where no block is read at start: exit code 2 when its batch comes, and before the
    first step where calibration would read it."""
    data = random_shards(tmp_path / "data", train=140000)
    for position, steps in ((700, (1, 2)), (70000, (0, 0))):
        spoil(data / "fineweb_train_000000.bin", 1024 + 2 * position, b"\xff\xff")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(t, "CHECK_BLOCK", 100)
            done = cli(tmp_path, {**PLAIN, "run_id": f"x{position}"}, data_path=data)
        assert done.code == 2 and "token id 65535 is beyond VOCAB_SIZE=320" in done.err
        assert steps[0] <= len(values(done.out, "train_loss")) <= steps[1]
        assert bool(names(tmp_path, f"x{position}*.ckpt")) == bool(steps[1])


def test_misspelled_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning with the likely name; the run goes on."""
    monkeypatch.setenv("CHECKPOINT_EVRY", "5")
    done = cli(tmp_path, PLAIN, dry_run=1)
    assert done.code == 0 and "CHECKPOINT_EVRY is not known; did you mean CHECKPOINT_EVERY?" in done.out


def test_bad_artifacts(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Missing, truncated, corrupted, foreign, of another format or tokenizer: exit code 2, and what to do."""
    content = (whole[0] / "logs/x.ptz").read_bytes()
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 4
    files = {"cut": content[:-9], "flipped": bytes(flipped), "foreign": b"PK\3\4zip",
             "format": content[:4] + b"\7\0\0\0rest", "sound": content}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    shutil.copytree(corpus(), tmp_path / "data")
    other = t.train_tokenizer([f"quite another text {i} " * 20 + chr(97 + i % 26) * i for i in range(90)], 320)
    (tmp_path / "other.model").write_bytes(other)
    cases = {"none": "no artifact at none", "cut": "cut is truncated or damaged", "flipped": "flipped is truncated or",
             "foreign": "foreign is not an artifact of this script", "format": "another artifact format"}
    for i, (name, part) in enumerate(cases.items()):
        done = cli(tmp_path, FULL, eval_artifact=name, run_id=f"r{i}")
        assert done.code == 2 and part in done.err and done.err.startswith("error: "), done
    done = cli(tmp_path, FULL, eval_artifact="sound", run_id="r", tokenizer_path="other.model")
    assert done.code == 2 and "sound " in done.err and "sha256" in done.err and "set TOKENIZER_PATH" in done.err, done


def test_forged_artifact_config(whole: tuple[Path, str], tmp_path: Path) -> None:
    """A header whose config asks for a model of terabytes is refused before one is built."""
    header, _, _ = t.read_artifact(whole[0] / "logs/x.ptz")
    payload = t.artifact_payload(whole[0] / "logs/x.ptz")
    body = payload[4 + int.from_bytes(payload[:4], "little") :]
    for i, forged in enumerate(({"bigram_vocab_size": 1 << 28, "bigram_dim": 1 << 8}, {"num_layers": 10**9},
                                {"mlp_mult": 1 << 40})):
        head = t.json.dumps(header | {"config": header["config"] | forged}).encode()
        frame = t.zstandard.ZstdCompressor().compress(len(head).to_bytes(4, "little") + head + body)
        (tmp_path / "forged").write_bytes(t.ARTIFACT_HEAD + frame)
        begun = time.monotonic()
        done = cli(tmp_path, FULL, eval_artifact="forged", run_id=f"f{i}")
        assert done.code == 2 and "forged" in done.err and time.monotonic() - begun < 60, done


def test_divergence(tmp_path: Path) -> None:
    """Exit code 4; the step, the last good losses, the last checkpoint, and what to try."""
    with pytest.MonkeyPatch.context() as patch:
        original = t.Optimizers.step

        def poisoned(self: t.Optimizers, lr_scale: float, step: int) -> Any:
            """An infinite gradient in step 4."""
            if step == 3:
                self.grad[5] = float("inf")
            return original(self, lr_scale, step)

        patch.setattr(t.Optimizers, "step", poisoned)
        done = cli(tmp_path, PLAIN)
    assert done.code == 4 and "step 4: " in done.err and "gradient norm inf" in done.err, done
    losses = values(done.out, "train_loss")
    assert all(f"{loss:.4f}" in done.err for loss in losses) and len(losses) == 3
    assert "Try a lower MATRIX_LR" in done.err and "logs/x.000000003.ckpt" in done.err
    assert names(tmp_path, "*.ckpt") == ["x.000000002.ckpt", "x.000000003.ckpt"]


def test_cap_that_is_too_short_is_warned_about(tmp_path: Path) -> None:
    """At step 5, when the time of a step is first known."""
    with pytest.MonkeyPatch.context() as patch:
        do_at(patch, 5, kill)
        done = cli(tmp_path, PLAIN, max_wallclock_seconds=60, iterations=10**9, warmdown_iters=10**8)
    assert re.search(r"warning: about \d+ steps fit.*, not WARMDOWN_ITERS", done.out), done


def test_ownership() -> None:
    """A parameter without an optimizer, or with two, is an error at start."""
    from tools import config, model_for, runtime

    cfg = config()
    model = model_for(cfg)
    params = dict(model.named_parameters())
    optimizers = t.Optimizers(model, cfg, runtime()).all
    with pytest.raises(ValueError, match="exactly one optimizer.*'embed.weight': 2"):
        t.check_ownership(params, [*optimizers, t.torch.optim.SGD([model.embed.weight])])
    with pytest.raises(ValueError, match="exactly one optimizer"):
        t.check_ownership(params, optimizers[:1])


# ---- kill -9, for real -----------------------------------------------------------------------------------------------
def test_killed_for_real(tmp_path: Path) -> None:
    """The short version of tests/kill.py: one rank, in evaluation, training and while a checkpoint is written."""
    command = [sys.executable, str(ROOT / "tests/kill.py"), "--kills", "3", "--ranks", "1", "--seed", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.count("| yes | yes |") == 3, done.stdout + done.stderr
