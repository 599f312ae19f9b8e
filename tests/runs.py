"""Runs of the script seen from outside: ending all of their processes, and reading numbers from their log lines.

Nothing here imports PyTorch or the script, so that what drives a run cannot fail as the run does.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple


def descendants(pid: int) -> list[int]:
    """A process and all processes below it, from /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            children.setdefault(int(path.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def kill_all(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """kill -9 the process and what it started, as a machine that goes away would; wait until all are gone.

    A process group would not do: torchrun starts its ranks in sessions of their own.
    """
    pids = descendants(process.pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(is_running(pid) for pid in pids[1:]):
        time.sleep(0.01)


def numbers(lines: Iterable[str], start: str, key: str) -> list[float]:
    """The numbers behind `key:` in the lines that start with `start`; a unit behind a number is left out."""
    number = re.compile(rf"\b{key}:([-+]?(?:nan|inf|[\d.]+(?:e[-+]?\d+)?))")
    found = (number.search(line) for line in lines if line.startswith(start))
    return [float(match[1]) for match in found if match]


class RunFailed(RuntimeError):
    """A run did not end as it was meant to; the message says why."""


class OutOfTime(RuntimeError):
    """The time given is used up."""


@dataclass
class Run:
    """One run of the script, or of the probe."""

    lines: list[str] = field(default_factory=list)
    code: int | None = None  # exit code; None: ended by this program
    out_of_time: bool = False

    def check(self) -> None:
        """Raise RunFailed or OutOfTime unless the run ended as it was meant to."""
        if self.out_of_time:
            raise OutOfTime
        if self.code not in (0, None):
            raise RunFailed(f"exit code {self.code}: {error_line(self.lines)}")

    def number(self, start: str, key: str, unit: float = 1.0) -> float | None:
        """The last number behind `key:` in the lines that begin with `start`, times `unit`; None without any."""
        found = numbers(self.lines, start, key)
        return found[-1] * unit if found else None

    def text(self, pattern: str) -> str | None:
        """The group of the pattern's last match at the beginning of a line, or None."""
        found = [match[1] for line in self.lines if (match := re.match(pattern, line))]
        return found[-1] if found else None


def error_line(lines: list[str]) -> str:
    """What a failed run says of the cause: its first error that is not the launcher's, else its last line."""
    pattern = re.compile(r"(?:\[rank\d+\]: ?)?((?:error\b|[\w.]*(?:Error|Exception)\b)[^:]*: .*)")
    for line in lines:
        if (match := pattern.match(line)) and "ChildFailedError" not in line:
            return match[1][:300]
    return lines[-1][:300] if lines else "no output"


def recompiles(lines: list[str]) -> int:
    """Graphs compiled again between the warm-up and the last training step, as TORCH_LOGS=recompiles reports them."""
    warm = next((i for i, line in enumerate(lines) if line.startswith("warm_up")), 0)
    last = max((i for i, line in enumerate(lines) if re.match(r"step:\d+/\d+ train_loss", line)), default=warm)
    return sum("Recompiling function" in line for line in lines[warm:last])


class StepTimes(NamedTuple):
    """Median milliseconds of a step without and with fake quantization; seconds that the switch took beside its step.

    None for what the log does not show.
    """

    plain: float | None
    quantized: float | None
    switch: float | None


def step_times(lines: list[str]) -> StepTimes:
    """From the training time that the `step:` lines show. The first 5 steps are slow and say nothing."""
    found = (re.match(r"step:(\d+)/\d+ train_loss.* train_time:([\d.]+)ms", line) for line in lines)
    clock = [(int(match[1]), float(match[2])) for match in found if match]
    switched = numbers(lines, "qat active", "step")
    qat_step = switched[0] if switched else math.inf
    plain: list[float] = []
    quantized: list[float] = []
    switch = None
    for (first, begin), (last, end) in zip(clock, clock[1:], strict=False):
        if first < 5:
            continue
        if last <= qat_step:
            plain.append((end - begin) / (last - first))
        elif first > qat_step:
            quantized.append((end - begin) / (last - first))
        elif plain:
            switch = (end - begin - (last - first) * median(plain)) / 1000
    return StepTimes(median(plain) if plain else None, median(quantized) if quantized else None, switch)


def losses(run: Run) -> dict[int, float]:
    """Training loss of each step that the run logged."""
    found = (re.match(r"step:(\d+)/\d+ train_loss:(\S+)", line) for line in run.lines)
    return {int(match[1]): float(match[2]) for match in found if match}
