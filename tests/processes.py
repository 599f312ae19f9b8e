"""Ending a run with all of its processes, as a machine that goes away would."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

WAIT_SECONDS = 10
PR_SET_CHILD_SUBREAPER = 36  # of Linux' prctl.h


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


def kill(pids: list[int]) -> None:
    """kill -9, and wait until they are gone, at most WAIT_SECONDS: one that hangs in a driver cannot be ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + WAIT_SECONDS
    while any(is_running(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.01)


def kill_all(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Kill a process that runs, and all below it. One that has ended is left alone.

    A process group would not do: torchrun starts its ranks in sessions of their own.
    """
    if process.poll() is None:
        kill(descendants(process.pid))
        process.wait()


def adopt_orphans() -> None:
    """From now on, a process whose parent ends before it becomes a child of this one, not of init (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_below_this_process() -> None:
    """Kill all that this process started, directly or not."""
    for _ in range(3):  # what was forked while the first ones were killed comes next
        kill([pid for pid in descendants(os.getpid())[1:] if is_running(pid)])
