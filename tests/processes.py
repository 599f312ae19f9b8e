"""Ending a run with all of its processes, as a machine that goes away would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path


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
    """kill -9 a process that runs, and all below it; wait until they are gone. One that has ended is left alone.

    A process group would not do: torchrun starts its ranks in sessions of their own.
    """
    if process.poll() is not None:
        return
    pids = descendants(process.pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(is_running(pid) for pid in pids[1:]):
        time.sleep(0.01)
