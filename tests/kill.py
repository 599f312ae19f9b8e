"""Kill a tiny run with kill -9 at seeded random moments, resume it, and compare it with the uninterrupted run.

    python tests/kill.py --kills 20

Prints a Markdown table; the exit code is 0 if every artifact and score is the same and no torn file is left.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from processes import descendants, kill, kill_all
from tools import ROOT, environment

PHASES = ["training", "checkpoint writing", "export", "evaluation"]
ITERATIONS = 24
SETTINGS: dict[str, Any] = {
    "run_id": "run",
    "iterations": ITERATIONS,
    "warmdown_iters": 16,
    "warmup_steps": 1,
    "checkpoint_every": 0.05,
    "rate_control": True,
    "swa_always": False,
    "qat_start_frac": 0.5,
    "swa_every": 2,
    "artifact_limit_bytes": (ROOT / "train_gpt.py").stat().st_size + 25000,
    "calibration_tokens": 512,
    "eval_stride": 1,
    "eval_batch_seqs": 4,
}


def start(folder: Path, ranks: int, log: Path, **changes: Any) -> subprocess.Popen[bytes]:
    """The script in `folder` on so many ranks, its output in the file `log`."""
    env = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "TMPDIR", "OPENBLAS_CORETYPE") if k in os.environ}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, "-u", *launcher, str(ROOT / "train_gpt.py")]
    env |= environment(**SETTINGS | changes) | {"OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=env)


def wait_for(process: subprocess.Popen[bytes], folder: Path, log: Path, phase: str, share: float) -> str:
    """Sleep until a moment of the phase, chosen by `share` in [0, 1); says which. Returns early if the run ends."""
    step, event = 1 + int(share * (ITERATIONS - 1)), re.compile(rb"export weights:")
    if phase in ("training", "checkpoint writing"):
        event = re.compile(rb"step:%d/" % step)
    elif phase == "evaluation":
        event = re.compile(rb"artifact path:")
    elif share < 0.4:  # the choice of what to export
        event = re.compile(rb"step:%d/" % ITERATIONS)
    with log.open("rb") as lines:
        while process.poll() is None and not event.search(lines.readline()):
            time.sleep(0.0002)
    if phase == "checkpoint writing":
        pids = descendants(process.pid)
        while process.poll() is None and not list((folder / "logs").glob("*.ckpt.tmp*")):
            time.sleep(0.0001)
        kill(pids)  # at once: the file is there for a few milliseconds
        return f"a .ckpt.tmp file after step {step}"
    delay = share * (0.03 if phase == "training" else 0.15)
    time.sleep(delay)
    return f"{1000 * delay:.0f} ms after `{event.pattern.decode()}`"


def phase_of(log: str, folder: Path) -> str:
    """Where a killed run was, by its last line and the files that it left."""
    if list((folder / "logs").glob("*.ckpt.tmp*")):
        return "checkpoint writing"
    if "final_sliding" in log:
        return "after the end"
    if "artifact path:" in log:
        return "evaluation"
    return "export" if f"step:{ITERATIONS}/{ITERATIONS} train_loss" in log else "training"


def score(log: str) -> str:
    """The final score in full."""
    found = re.findall(r"^final_int8_zlib_roundtrip_exact (.*)$", log, re.M)
    return found[-1] if found else "none"


def one_kill(work: Path, ranks: int, phase: str, share: float, expected: tuple[bytes, str]) -> tuple[str, bool]:
    """A row of the table, and whether all is the same."""
    folder, log, resumed = work / "folder", work / "killed.txt", work / "resumed.txt"
    for _ in range(5):  # a moment that was missed says nothing
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        process = start(folder, ranks, log)
        moment = wait_for(process, folder, log, phase, share)
        kill_all(process)
        found = phase_of(log.read_text(), folder)
        if found == phase:
            break
        share *= 0.7
    torn = len(list((folder / "logs").glob("*.tmp*")))
    code = start(folder, ranks, resumed, resume=1).wait()
    text = resumed.read_text()
    step = re.search(r"resume checkpoint:\S+ step:(\d+)", text)
    artifact = folder / "logs/run.ptz"
    same = code == 0 and artifact.exists() and artifact.read_bytes() == expected[0]
    bpb = code == 0 and score(text) == expected[1]
    clean = not list((folder / "logs").glob("*.ckpt.tmp*"))
    if not (same and bpb and clean):
        print(text[-3000:], file=sys.stderr)
    found += f" ({torn} torn file)" if torn else ""
    words = [moment, found, str(ranks), step[1] if step else "beginning"]
    words += ["yes" if ok else "NO" for ok in (same, bpb, clean)]
    return "| " + " | ".join(words) + " |", same and bpb and clean


def main() -> int:
    """Reference runs, kills, table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    rng, expected, good = random.Random(options.seed), dict[int, tuple[bytes, str]](), 0
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        work = Path(name)
        for ranks in options.ranks:
            folder, log = work / f"reference{ranks}", work / f"reference{ranks}.txt"
            folder.mkdir()
            code = start(folder, ranks, log).wait()
            if code:
                raise SystemExit(f"the uninterrupted run failed ({code}):\n{log.read_text()[-3000:]}")
            expected[ranks] = (folder / "logs/run.ptz").read_bytes(), score(log.read_text())
        print(
            "| killed | phase found | ranks | resumed from step | artifact identical | bpb identical | no torn file |"
        )
        print("|---" * 7 + "|")
        for i in range(options.kills):
            ranks = options.ranks[i // len(PHASES) % len(options.ranks)]
            phase = PHASES[(i + options.seed) % len(PHASES)]
            row, ok = one_kill(work, ranks, phase, rng.random(), expected[ranks])
            print(row, flush=True)
            good += ok
    print(f"\n{good} of {options.kills} resumed runs ended as the uninterrupted one")
    return int(good != options.kills)


if __name__ == "__main__":
    sys.exit(main())
