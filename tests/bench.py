"""How long does a user wait? A Markdown table of the times of this script, beside those of another version.

    python tests/bench.py                               some minutes a round on 2 CPU cores
    python tests/bench.py --against old/train_gpt.py    the same runs of both, in turn, and how they compare
    python tests/bench.py --cases demo --rounds 5       the small sizes alone, more often

Each case is one run of the script, as a user starts it: it trains a few steps, exports and scores. All times come from
its console lines. With `--against`, a round runs one version and then the other, and a ratio is the median over the
rounds of (other / this), so that a machine that slows down or is shared slows down both. Both read the same data, made
from Python's language reference. A single thread, and a machine with nothing else to do, make the times repeat better.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tools import write_shard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from run_log import numbers  # noqa: E402

import train_gpt  # noqa: E402

# Quantization that starts at the end would fall into some of the few steps that are timed.
ALL_CASES = {"MAX_WALLCLOCK_SECONDS": 0, "WARMUP_STEPS": 0, "QAT_START_FRAC": 1, "VAL_LOSS_EVERY": 0,
             "TRAIN_LOG_EVERY": 1, "EVAL_FLOAT": 0, "SWA_ENABLED": 0}  # fmt: skip
CHECKPOINT_ALWAYS = 0.001  # seconds: after every step
FIRST_STEPS = 2  # which are slow


class Case(NamedTuple):
    """A run of the script: its settings, and how many tokens it validates on."""

    title: str
    settings: dict[str, Any]
    val_tokens: int


CASES = {
    "demo": Case(
        "the demo's sizes: 6 layers, width 128, sequence 256, 2,048 tokens a step",
        dict(word.split("=") for word in train_gpt.DEMO.split()) | {"ITERATIONS": 30},
        16_385,
    ),
    "full": Case(
        "the default's model: 11 layers, width 512; sequence 512, 2,048 tokens a step",
        {"TRAIN_SEQ_LEN": 512, "TRAIN_BATCH_TOKENS": 2048, "ITERATIONS": 6, "CALIBRATION_TOKENS": 2048},
        2049,
    ),
}


class Line(NamedTuple):
    """A line of the console, and the seconds from the launch to it."""

    seconds: float
    text: str


def run_script(script: Path, settings: dict[str, Any]) -> list[Line]:
    """Run a version of the script in a folder of its own. Raises RuntimeError with its last lines if it fails."""
    environment = os.environ | {name: str(value) for name, value in settings.items()} | {"PYTHONUNBUFFERED": "1"}
    lines = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as folder:
        begun = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, str(script)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for text in process.stdout:
                lines.append(Line(time.perf_counter() - begun, text.rstrip("\n")))
    if process.returncode:
        last = "\n".join(line.text for line in lines[-20:])
        raise RuntimeError(f"{script} ended with exit code {process.returncode}:\n{last}")
    return lines


def step_seconds(texts: Sequence[str]) -> list[float]:
    """Training time from each logged step to the next, without the checkpoints in between."""
    found, before, saving = [], None, 0.0
    for text in texts:
        if text.startswith("checkpoint path:"):
            saving += numbers([text], "checkpoint", "time")[0] / 1000
        elif re.match(r"step:\d+/\d+ train_loss:", text):
            now = numbers([text], "step:", "train_time")[0] / 1000
            if before is not None:
                found.append(now - before - saving)
            before, saving = now, 0.0
    return found


def waits(lines: Sequence[Line]) -> dict[str, float]:
    """What a user waits for in a run, in seconds."""

    def at(start: str) -> float:
        """When the first line that starts so came."""
        return next(line.seconds for line in lines if line.text.startswith(start))

    texts = [line.text for line in lines]
    targets = numbers(texts, "data path:", "val_targets")[-1]
    before_export = next(line for line, after in pairwise(lines) if after.text.startswith("artifact "))
    found = {
        "start, up to the end of step 1": at("step:1/"),
        "training step": median(step_seconds(texts)[FIRST_STEPS - 1 :]),
        "export, up to the file": at("artifact path:") - before_export.seconds,
        "sliding evaluation, 1,000 tokens": numbers(texts, "final_sliding", "eval_time")[-1] / targets,
        "the whole run": lines[-1].seconds,
    }
    if saved := numbers(texts, "checkpoint path:", "time"):
        found["checkpoint"] = median(saved) / 1000
    return found


def run_case(script: Path, case: Case, data: Path) -> dict[str, float]:
    """The waits of a run with checkpoints after each step."""
    paths = {"DATA_PATH": data, "TOKENIZER_PATH": data / "tokenizer.model", "CHECKPOINT_EVERY": CHECKPOINT_ALWAYS}
    return waits(run_script(script, ALL_CASES | case.settings | paths | {"RUN_ID": "bench"}))


def rounds_of(scripts: Sequence[Path], case: Case, data: Path, count: int) -> list[list[dict[str, float]]]:
    """The waits of each script in each round; a round runs one script after the other."""
    found: list[list[dict[str, float]]] = [[] for _ in scripts]
    for _ in range(count):
        for waited, script in zip(found, scripts, strict=True):
            waited.append(run_case(script, case, data))
    return found


def ratio(others: Sequence[float], these: Sequence[float]) -> float:
    """How many times as long the other version took: the median over the rounds."""
    return median(other / this for other, this in zip(others, these, strict=True))


def table(case: Case, found: Sequence[list[dict[str, float]]]) -> str:
    """Medians over the rounds with their range; with another version its medians and the ratio."""
    columns = ["seconds", "lowest", "highest"] + ["other version", "other / this"] * (len(found) > 1)
    lines = [f"### {case.title}", "", f"| {' | '.join(['what', *columns])} |", "|---" + "|---:" * len(columns) + "|"]
    for what in found[0][0]:
        these = [waited[what] for waited in found[0]]
        cells = [f"{seconds:.3g}" for seconds in (median(these), min(these), max(these))]
        for other in found[1:]:
            others = [waited.get(what) for waited in other]
            known = [seconds for seconds in others if seconds is not None]
            compared = len(known) == len(these)
            cells += [f"{median(known):.3g}", f"{ratio(known, these):.2f}"] if compared else ["-", "-"]
        lines.append(f"| {' | '.join([what, *cells])} |")
    return "\n".join([*lines, ""])


def make_data(case: Case, corpus: Path) -> Path:
    """A folder with the training shard and tokenizer of a corpus, and the first tokens of its validation shard."""
    folder = Path(tempfile.mkdtemp(prefix="data-", dir=".")).resolve()
    for path in corpus.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    val = folder / "fineweb_val_000000.bin"
    tokens = train_gpt.open_shard(val)[: case.val_tokens].copy()
    val.unlink()
    write_shard(val, tokens)
    return folder


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="FILE", help="another version of train_gpt.py")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="how often each version runs (default: 3)")
    options = parser.parse_args(words)
    if options.against and not options.against.is_file():
        parser.error(f"--against {options.against} is no file")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be 1 or more")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Print a table for each case."""
    options = arguments(words)
    scripts = [Path(train_gpt.__file__).resolve(), *([options.against.resolve()] if options.against else [])]
    home = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        os.chdir(scratch)
        try:
            corpus = Path("corpus")
            train_gpt.build_corpus(list(train_gpt.topics.values()), corpus, 1024)
            for name in options.cases:
                case = CASES[name]
                found = rounds_of(scripts, case, make_data(case, corpus), options.rounds)
                print(table(case, found), flush=True)
        finally:
            os.chdir(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
