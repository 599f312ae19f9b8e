"""What a run of the script prints, and what it says. Nothing here imports PyTorch or the script."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import NamedTuple

SLOW_STEPS = 5  # the first steps of a run are slow, and the script logs each of them


def numbers(lines: Iterable[str], start: str, key: str) -> list[float]:
    """The numbers after `key:` in the lines that start with `start`; the unit behind a number is left out."""
    number = re.compile(rf"\b{key}:([-+]?(?:nan|inf|\d+(?:\.\d+)?(?:e[-+]?\d+)?))")
    found = (number.search(line) for line in lines if line.startswith(start))
    return [float(match[1]) for match in found if match]


class RunFailed(RuntimeError):
    """A run did not end as it was meant to; the message says why."""


class OutOfTime(RuntimeError):
    """The time given is used up."""


@dataclass
class Run:
    """The output of a run, and how it ended."""

    lines: list[str] = field(default_factory=list)
    code: int | None = None  # exit code; None: ended from outside
    out_of_time: bool = False

    def check(self) -> None:
        """Raise RunFailed or OutOfTime unless the run ended as it was meant to."""
        if self.out_of_time:
            raise OutOfTime
        if self.code not in (0, None):
            raise RunFailed(f"exit code {self.code}: {error_line(self.lines)}")

    def number(self, start: str, key: str, unit: float = 1.0) -> float | None:
        """The last number after `key:` in the lines that begin with `start`, times `unit`; None without any."""
        found = numbers(self.lines, start, key)
        return found[-1] * unit if found else None

    def text(self, pattern: str) -> str | None:
        """The group of the pattern's last match at the beginning of a line, or None."""
        found = [match[1] for line in self.lines if (match := re.match(pattern, line))]
        return found[-1] if found else None

    def losses(self) -> dict[int, float]:
        """Training loss of each step that is logged, in nats."""
        found = (re.match(r"step:(\d+)/\d+ train_loss:(\S+)", line) for line in self.lines)
        return {int(match[1]): float(match[2]) for match in found if match}


def error_line(lines: list[str]) -> str:
    """What a failed run says of the cause.

    That is its last `error:` line, or the last line of its last traceback if that comes later; torchrun's own
    traceback says nothing. Without either it is the last line.
    """
    found, in_traceback = "", False
    for line in lines:
        line = re.sub(r"^\[rank\d+\]: ?", "", line)
        if line.startswith("Traceback (most recent call last)"):
            in_traceback = True
        elif in_traceback and line and not line[0].isspace():
            in_traceback = False
            if "ChildFailedError" not in line:
                found = line
        elif found.endswith("raised:") and line:
            found += f" {line}"  # the compiler's error names that of its backend in the next line
        elif re.match(r"error\b", line):
            found = line
    return (found or (lines[-1] if lines else "no output"))[:300]


def recompiles(lines: list[str]) -> int:
    """Graphs compiled again between the warm-up and the last training step, as TORCH_LOGS=recompiles reports them."""
    warm = next((i for i, line in enumerate(lines) if line.startswith("warm_up")), 0)
    last = max((i for i, line in enumerate(lines) if re.match(r"step:\d+/\d+ train_loss", line)), default=warm)
    return sum("Recompiling function" in line for line in lines[warm:last])


class StepTimes(NamedTuple):
    """How long a training step takes: median milliseconds, or None for what the log does not show."""

    plain: float | None  # without fake quantization
    quantized: float | None  # with it


def step_times(lines: list[str]) -> StepTimes:
    """From the training time that the `step:` lines show; the interval with the switch to fake quantization is out."""
    found = (re.match(r"step:(\d+)/\d+ train_loss.* train_time:(\d+(?:\.\d+)?)ms", line) for line in lines)
    clock = [(int(match[1]), float(match[2])) for match in found if match]
    switched = numbers(lines, "qat active", "step")
    qat_step = switched[0] if switched else math.inf
    plain: list[float] = []
    quantized: list[float] = []
    for (first, begin), (last, end) in pairwise(clock):
        if first < SLOW_STEPS:
            continue
        if last <= qat_step:
            plain.append((end - begin) / (last - first))
        elif first > qat_step:
            quantized.append((end - begin) / (last - first))
    return StepTimes(median(plain) if plain else None, median(quantized) if quantized else None)
