"""Runs of the script for tests: inside the test process, as forks that can get signals or be ranks, under torchrun."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import multiprocessing.context
import multiprocessing.forkserver
import os
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import processes
import pytest
import torch.distributed.run
from tools import ROOT, environment, t

CODE_BYTES = (ROOT / "train_gpt.py").stat().st_size
LIMIT_SECONDS = 240  # for a run in another process
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Without fake quantization and choices.
PLAIN: dict[str, Any] = {"qat_start_frac": 1, "checkpoint_every": 1e-9, "run_id": "x", "eval_stride": 0}
# All that a run can do: quantization starts in mid-run on a plan made from data, snapshots from step 10 on, a choice of
# weights, a limit that counts, a checkpoint after each step.
STEPS, FULL_MODEL_BYTES = 12, 20000
FULL: dict[str, Any] = {
    "run_id": "x",
    "num_layers": 2,
    "eval_stride": 16,
    "iterations": STEPS,
    "warmdown_iters": 8,
    "warmup_steps": 1,
    "checkpoint_every": 1e-9,
    "rate_control": True,
    "swa_always": False,
    "qat_start_frac": 0.5,
    "artifact_limit_bytes": CODE_BYTES + FULL_MODEL_BYTES,
    "calibration_tokens": 512,
}


class Outcome(NamedTuple):
    """Exit code (-9: killed), standard output and error of a run."""

    code: int
    out: str
    err: str


class Killed(BaseException):
    """Stands for kill -9: nothing in the script catches it."""


def kill(*_: Any, **__: Any) -> None:
    """End the run without a trace of an ending."""
    raise Killed


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
    do_after(patch, t.Trainer, "log_step", lambda trainer, *_: action() if trainer.step == step else None)


def cli(folder: Path, settings: dict[str, Any], *arguments: str, **more: Any) -> Outcome:
    """The command line in `folder`, inside this process and on one thread, without its answer to signals."""
    out, err = io.StringIO(), io.StringIO()
    threads = t.torch.get_num_threads()
    t.torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train_gpt.py", *arguments])
        patch.setattr(t, "end_on_signals", lambda *_: None)
        for name, value in environment(**settings | more).items():
            patch.setenv(name, value)
        try:
            code = t.command_line()
        except Killed:
            code = -9
        finally:
            t.torch.set_num_threads(threads)
    return Outcome(code, out.getvalue(), err.getvalue())


class Forked:
    """A forked process with the face of a Popen."""

    def __init__(
        self, folder: Path, output: Path, env: dict[str, str], become: Callable[[], None] | None = None
    ) -> None:
        args = (folder, output, env, become or become_the_script)
        self.process = forks().Process(target=with_output, args=args, daemon=True)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.process.exitcode

    def wait(self) -> int:
        """The exit code, once it has ended."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


@functools.cache
def forks() -> multiprocessing.context.ForkServerContext:
    """Forks of a process that has imported all: an interpreter's start takes longer than a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launch", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


def with_output(folder: Path, output: Path, env: dict[str, str], become: Callable[[], None]) -> None:
    """In a forked process: `become` with this folder and environment, output to a file, its signals not ignored."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for number in STOP_SIGNALS:  # pytest may run under nohup
        signal.signal(number, signal.SIG_DFL)
    t.torch.set_num_threads(1)
    become()


def become_the_script() -> None:
    """What `python train_gpt.py` does."""
    sys.argv = ["train_gpt.py"]
    runpy.run_path(str(ROOT / "train_gpt.py"), run_name="__main__")


def become_the_launcher(options: tuple[str, ...]) -> None:
    """What torchrun does with these options and the script."""
    torch.distributed.run.main([*options, str(ROOT / "train_gpt.py")])


def become_the_stopped(number: int, owner: str, name: str, call: int, ignored: bool, err: Path | None) -> None:
    """The command line, which gets a signal; standard error to a file, or to a pipe that nobody reads."""
    if err:
        pipe = os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    else:
        reading, pipe = os.pipe()
        os.close(reading)
    os.dup2(pipe, 2)
    if ignored:
        signal.signal(number, signal.SIG_IGN)
    calls = itertools.count(1)

    def send(*_: Any, **__: Any) -> None:
        """The signal, after the right call."""
        if next(calls) == call:
            os.kill(os.getpid(), number)

    do_after(pytest.MonkeyPatch(), getattr(t, owner) if owner else t, name, send)
    sys.argv = ["train_gpt.py"]
    os._exit(t.command_line())


class Started:
    """A run in another process. A test that waits for it fails after `LIMIT_SECONDS`."""

    def __init__(self, process: Forked, output: Path) -> None:
        self.process, self.output = process, output
        self.deadline = time.monotonic() + LIMIT_SECONDS

    def until(self, pattern: str) -> None:
        """Wait until the output has a match; fails if the run ends without."""
        ended = False
        while not re.search(pattern, self.output.read_text(), re.S):
            assert not ended and time.monotonic() < self.deadline, f"no {pattern!r}:\n{self.output.read_text()}"
            ended = self.process.poll() is not None
            time.sleep(0.002)

    def send(self, number: int) -> None:
        """A signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        """Exit code and output, once it has ended."""
        while self.process.poll() is None:
            if time.monotonic() > self.deadline:
                processes.kill(processes.descendants(self.process.pid or 0))
                raise AssertionError(f"it did not end:\n{self.output.read_text()}")
            time.sleep(0.002)
        return self.process.wait(), self.output.read_text()


def clean_environment(settings: dict[str, Any]) -> dict[str, str]:
    """The variables of a run, and of this process what it needs."""
    env = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "TMPDIR", "OPENBLAS_CORETYPE") if k in os.environ}
    return env | environment(**settings) | {"OMP_NUM_THREADS": "1"}


def fork(folder: Path, name: str = "output", become: Callable[[], None] | None = None, **settings: Any) -> Started:
    """The script, or what else it shall become, in `folder` as a forked process."""
    output = folder / f"{name}.txt"
    output.touch()
    return Started(Forked(folder, output, clean_environment(settings), become), output)


def torchrun(folder: Path, *options: str, **settings: Any) -> Started:
    """The script under torchrun in `folder`."""
    return fork(folder, "torchrun", functools.partial(become_the_launcher, options), **settings)


def stopped(
    folder: Path,
    settings: dict[str, Any],
    number: int,
    name: str = "log_step",
    call: int = 4,
    owner: str = "Trainer",  # "" is the script itself
    ignored: bool = False,  # as nohup starts it
    unheard: bool = False,  # its standard error is a pipe that nobody reads
    **more: Any,
) -> Outcome:
    """The command line in a process of its own that gets a signal after so many calls of `owner.name`."""
    err = None if unheard else folder / "stopped_err.txt"
    become = functools.partial(become_the_stopped, number, owner, name, call, ignored, err)
    code, out = fork(folder, "stopped", become, **settings | more).end()
    return Outcome(code, out, err.read_text() if err else "")


def free_port() -> int:
    """A port for ranks to meet at."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def fork_ranks(folder: Path, count: int, **settings: Any) -> list[Started]:
    """So many ranks of one run, with the variables that any launcher sets, and not those of torchrun alone."""
    settings |= {"world_size": count, "master_addr": "localhost", "master_port": free_port()}
    return [fork(folder, f"rank{rank}", rank=rank, local_rank=rank, **settings) for rank in range(count)]


def names(folder: Path, pattern: str = "*") -> list[str]:
    """The files in logs/ that match."""
    return sorted(path.name for path in (folder / "logs").glob(pattern))
