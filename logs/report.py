"""Logs of `train_gpt.py`, or of the challenge's older scripts, as tables, a verdict, a figure and submission.json.

python logs/report.py logs/*.txt                       the whole report: runs, seeds of one config, comparison, warnings
python logs/report.py logs/*.txt --markdown            the results part alone, as the README holds it
python logs/report.py logs/*.txt --readme              write that part between the README's <!-- results --> markers
python logs/report.py logs/*.txt --baseline 'records/*.log'    compare with other logs, taken as one group
python logs/report.py logs/*.txt --figure logs/runs.svg --submission

The format is found out from the lines. Runs that differ in seed and name alone are the seeds of one config (a letter
each): same settings, script, data, ranks and hardware. A run counts if its log has training steps and a final score;
every other file is reported by name and left out. The verdict is Welch's t-test on val_loss in nats per token. The
challenge asks that an improvement of at least 0.005 nats be shown at p < 0.01, so that is tested (one-sided), beside
plain difference (two-sided).

Results go to submission.json only from runs on the challenge's data that keep its rules: DEMO and TEXT_FILES off, the
data's folder is named fineweb10B_sp1024, its validation split has at least 50,000,000 targets (the challenge's has some
62 million, a development slice far fewer), at most 16,000,000 bytes, 600 s of training and 600 s of evaluation.
Otherwise the fields stay null and the reason is printed.

Exit codes: 0 done; 1 no complete run in the files; 2 bad usage, or a file that can't be read or written.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT_BYTES, LIMIT_SECONDS = 16_000_000, 600.0  # the rules, whatever a log's own limit was
REQUIRED_NATS, REQUIRED_P = 0.005, 0.01
CHALLENGE_DATASET, CHALLENGE_VAL_TARGETS = "fineweb10B_sp1024", 50_000_000
MAX_LOG_BYTES = 64 << 20
MARKERS = ("<!-- results -->\n", "<!-- /results -->")
AUTHOR_FIELDS = ("author", "github_id", "name", "blurb", "date")
RESULT_FIELDS = (
    "val_loss", "val_bpb", "val_loss_std", "val_bpb_std", "seeds", "seed_results",
    "bytes_total", "bytes_model", "bytes_code", "hardware", "versions",
)  # fmt: skip
# What the runs of one config may differ in; instead of the paths, the data set's name is compared.
PER_RUN_SETTINGS = {"run_id", "seed", "resume", "data_path", "tokenizer_path"}
HARDWARE = ("world_size", "device", "name")
OLD_SETTINGS = {  # what the older scripts log under the name that the setting has here
    "world_size", "num_heads", "num_kv_heads", "tie_embeddings", "matrix_lr", "scalar_lr", "train_batch_tokens",
    "train_seq_len", "iterations", "warmup_steps", "max_wallclock_seconds", "model_params",
}  # fmt: skip


class LogError(ValueError):
    """A file that is no usable log; the message is the reason."""


# ---- Reading ---------------------------------------------------------------------------------------------------------
@dataclass
class Score:
    """One evaluation of the whole split: `loss` in nats per token, `bpb` in bits per byte."""

    name: str
    loss: float
    bpb: float
    width: int | None = None  # stride of the sliding window, or band
    seconds: float | None = None
    exact: bool = False

    @property
    def mode(self) -> str:
        """How it was scored, as logged: `sliding 64`, `banded 2048`, or the line's own name."""
        if self.width == 0:
            return "plain"
        return self.name if self.width is None else f"{self.name} {self.width}"


@dataclass
class Run:
    """What one log says. Times are milliseconds of training; a resumed run has one curve, since points are by step."""

    path: Path
    name: str = ""
    own: bool = False
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    whole_config: bool = False
    runtime: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    dataset: str = ""
    val_targets: int | None = None
    seed: int | None = None
    step: int = 0
    planned: int | None = None
    train_ms: float | None = None
    times: dict[int, float] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)
    val_bpb: dict[int, float] = field(default_factory=dict)
    swa_start: int | None = None
    float_score: Score | None = None
    scores: list[Score] = field(default_factory=list)
    old_mode: str = ""
    categories: dict[str, float] = field(default_factory=dict)
    model_bytes: int | None = None
    code_bytes: int | None = None
    artifact_bytes: int | None = None
    limit: int | None = None
    stopped: str = ""
    diverged: str = ""
    messages: list[str] = field(default_factory=list)

    @property
    def final(self) -> Score | None:
        """The score of the stored model: the last line with all digits, named after the evaluation that made it."""
        if not self.scores:
            return None
        best = next((s for s in reversed(self.scores) if s.exact), self.scores[-1])
        named = [s for s in self.scores if not s.exact]
        maker = next((s for s in reversed(named) if s.name == best.name), None)
        if self.own and (modes := [s for s in named if s.name != "int8_zlib_roundtrip"]):
            maker = modes[-1]
        if maker is None:
            return best
        name, width = maker.name, maker.width
        if not self.own:
            found = re.match(r"(\w+?)(?:_window)?(?: stride:(\d+))?$", self.old_mode)
            if "sliding" in name:
                name = "sliding"
            elif found:
                name, width = found[1], int(found[2]) if found[2] else None
        return Score(name, best.loss, best.bpb, width, maker.seconds, best.exact)

    @property
    def gap(self) -> float | None:
        """Bits per byte that quantization costs; None unless both scores come from the same evaluation."""
        final, floats = self.final, self.float_score
        if not final or not floats or final.name != floats.name or floats.width not in (None, final.width):
            return None
        return final.bpb - floats.bpb

    @property
    def ms_per_step(self) -> float | None:
        """Training time per step, up to the last logged one: what comes after it, the choice of weights, is no step."""
        step = max(self.times.keys() & self.losses.keys() if self.own else self.times, default=0)
        return self.times[step] / step if step else None

    @property
    def batch_tokens(self) -> int | None:
        """Tokens per step over all ranks."""
        value = self.settings.get("train_batch_tokens")
        return int(value) if isinstance(value, (int, float)) and value else None

    def problem(self) -> str:
        """Why the run does not count, or nothing."""
        at = f"step {self.step}" + (f" of {self.planned}" if self.planned else "")
        if self.diverged:
            return f"diverged at {at}: {self.diverged}"
        if self.final is None:
            last = f", last training loss {list(self.losses.values())[-1]:.4f}" if self.losses else ""
            where = "before the final score" if self.stopped else "in training"
            return f"unfinished: the log ends at {at}, {where}{last}"
        if not self.step:
            again = self.settings.get("eval_artifact") or self.settings.get("export_from") or "a stored model"
            return f"no training in it: an evaluation of {again}, val_bpb {self.final.bpb:.5f}"
        return ""


PAIR = re.compile(r"(\w+):\s?(.*?)(?=\s+\w+:|$)")
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)", re.I)


def number(text: str | None) -> float | None:
    """The number that a value begins with (`42303ms` is 42303)."""
    found = NUMBER.match(text or "")
    return float(found[0]) if found else None


def whole(text: str | None) -> int | None:
    """The same as an integer."""
    value = number(text)
    return int(value) if value is not None and math.isfinite(value) else None


def plain_value(text: str) -> Any:
    """A setting of an older log as the value that JSON would give."""
    if text in ("True", "False"):
        return text == "True"
    if not NUMBER.fullmatch(text):
        return text
    value = float(text)
    return int(value) if value.is_integer() else value


def read_step(run: Run, line: str, pairs: dict[str, str]) -> None:
    """`step:100/20000 train_loss:...` or `... val_loss:... val_bpb:...`."""
    found = re.match(r"(\d+)(?:/(\d+))?", pairs["step"])
    loss, bpb, time = number(pairs.get("train_loss")), number(pairs.get("val_bpb")), number(pairs.get("train_time"))
    if not found or (loss is None and bpb is None):
        return
    step = int(found[1])
    run.step, run.planned = max(run.step, step), int(found[2]) if found[2] else run.planned
    if time is not None:
        run.train_ms = time
        if loss is not None or step not in run.times:  # the last validation comes after the choice of weights
            run.times[step] = time
    for value, points in ((loss, run.losses), (bpb, run.val_bpb), (number(pairs.get("lr_scale")), run.scales)):
        if value is not None and math.isfinite(value):
            points[step] = value
        elif value is not None and not run.diverged:
            run.diverged = f"a loss of {value}"


def read_score(run: Run, line: str, pairs: dict[str, str]) -> None:
    """`final_sliding stride:64 val_loss:... val_bpb:...`, `float_sliding ...`, or the older `final_eval_mode:...`."""
    if line.startswith("final_eval_mode:"):
        run.old_mode = line.split(":", 1)[1].split(" batch_seqs")[0]
    found = re.match(r"(final|float)_(\w+?)(_exact)?\s", line)
    loss, bpb = number(pairs.get("val_loss")), number(pairs.get("val_bpb"))
    if not found or loss is None or bpb is None:
        return
    if not (math.isfinite(loss) and math.isfinite(bpb)):
        run.diverged = f"a final score of {loss} nats"
        return
    time = number(pairs.get("eval_time"))
    seconds = time / 1000 if time is not None else None
    width = whole(pairs.get("stride", pairs.get("band")))
    score = Score(found[2], loss, bpb, width, seconds, bool(found[3]))
    if found[1] == "float":
        run.float_score = score
    else:
        run.scores.append(score)


def read_artifact(run: Run, line: str, pairs: dict[str, str]) -> None:
    """`artifact path:... model_bytes:...` (older: `artifact bits:...`), `artifact category:...`. Rounds are trials."""
    if "category" in pairs:
        keys = ("bytes", "compressed_bytes", "order0_entropy_bytes", "raw_bytes")
        sizes = [size for key in keys if (size := number(pairs.get(key))) is not None]
        if sizes:
            run.categories[pairs["category"]] = sizes[0]
    if "model_bytes" in pairs and "round" not in pairs:
        for key in ("model_bytes", "code_bytes", "artifact_bytes", "limit"):
            setattr(run, key, whole(pairs.get(key)))


def read_old_size(run: Run, line: str, pairs: dict[str, str]) -> None:
    """`Total submission size int8+zlib: N bytes` and its parts; the same without a codec is the uncompressed model."""
    found = re.match(r"(Total submission size|Serialized model|Code size)( \S+)?: (\d+) bytes", line)
    if found and found[1] == "Code size":
        run.code_bytes = int(found[3])
    elif found and found[2]:
        setattr(run, "artifact_bytes" if found[1].startswith("Total") else "model_bytes", int(found[3]))


def set_config(run: Run, settings: dict[str, Any], complete: bool) -> None:
    """Note the settings of a start, unless all that it does is to export what this run has trained."""
    if not (run.step and settings.get("export_from")):
        run.own, run.whole_config, run.settings = True, complete, settings
        run.seed = whole(str(settings.get("seed")))


def read_about(run: Run, line: str, pairs: dict[str, str]) -> None:
    """Config, versions, hardware and data of this script's logs."""
    if line.startswith("config {"):
        try:
            settings = json.loads(line[7:])
        except json.JSONDecodeError:
            return
        set_config(run, settings, complete=True)
    elif line.startswith("config overrides: "):
        run.own = True
        if not run.whole_config:  # the console's copy of a log lacks the config line
            changed = re.findall(r"(\w+)=(.*?) \(\w+\)(?:, |$)", line[18:])  # of older logs: NAME=value (source), ...
            changed = changed or re.findall(r"([A-Z]\w*)=(.*?)(?= [A-Z]\w*=|$)", line[18:])
            set_config(run, {name.lower(): plain_value(value) for name, value in changed}, complete=False)
    elif line.startswith("run id:"):
        run.own, run.versions = True, {k: v for k, v in pairs.items() if k != "id"}
    elif line.startswith("runtime "):
        run.runtime = pairs
    elif line.startswith("data path:"):
        run.dataset, run.val_targets = (
            re.split(r"[\\/]", pairs["path"].rstrip("\\/"))[-1],
            whole(pairs.get("val_targets")),
        )


def read_old_about(run: Run, line: str, pairs: dict[str, str]) -> None:
    """Settings, data and versions of an older script's logs (and the seed of a console log)."""
    if found := re.match(r"Running (Python|PyTorch) (\S+)", line):
        run.versions[{"Python": "python", "PyTorch": "torch"}[found[1]]] = found[2]
    elif found := re.match(r"\|\s+\d+\s+(NVIDIA .*?)\s+(?:On|Off)\s+\|", line):
        run.runtime |= {"device": "cuda", "name": found[1]}
    elif found := re.match(r"train_loader:dataset:(\S+)", line):
        run.dataset = found[1]
    elif line.startswith("val_loader:") and "tokens" in pairs:
        run.val_targets = whole(pairs["tokens"])
    elif not run.step and not line.startswith("warmup_step"):
        if "seed" in pairs and run.seed is None:
            run.seed = whole(pairs["seed"])
            if line.startswith("seed:") and "tokens" in pairs and not run.whole_config:
                run.settings["train_batch_tokens"] = whole(pairs["tokens"])
        if not run.own:
            run.settings |= {k: plain_value(v) for k, v in pairs.items() if k in OLD_SETTINGS}
            run.runtime |= {k: v for k, v in pairs.items() if k == "world_size"}


def go_back(run: Run, step: int) -> None:
    """A run goes on from its checkpoint at `step`: what was logged of later steps, and its end, happens again."""
    for points in (run.times, run.losses, run.scales, run.val_bpb):
        for later in [s for s in points if s > step]:
            del points[later]
    run.step, run.train_ms, run.stopped, run.diverged = step, run.times.get(step), "", ""
    run.scores, run.float_score, run.categories = [], None, {}
    run.model_bytes = run.code_bytes = run.artifact_bytes = run.limit = None
    if (run.swa_start or 0) > step:
        run.swa_start = None


def read_event(run: Run, line: str, pairs: dict[str, str]) -> None:
    """Averaging (the last start counts: fake quantization begins anew), resuming, the end, warnings, errors."""
    if line.startswith(("swa snapshot:1 ", "swa:start ")):
        run.swa_start = whole(pairs.get("step"))
    elif line.startswith("resume checkpoint:"):
        go_back(run, whole(pairs.get("step")) or 0)
        run.train_ms = number(pairs.get("train_time"))
    elif line.startswith(("training stopped:", "stopping_early:")):
        run.stopped = pairs.get("stopped") or pairs.get("stopping_early", "")
        run.step = max(run.step, whole(pairs.get("step")) or 0)
        run.train_ms = number(pairs.get("train_time")) or run.train_ms
        if "diverged" in run.stopped:
            run.diverged = run.diverged or "not finite"
    elif line.startswith(("error", "warning: ")):
        run.messages.append(line[:300])
        if "has no sound checkpoint: it starts from the beginning" in line:
            go_back(run, 0)
        if line.startswith("error") and re.search(r"not finite|diverged|(loss|norm) -?(nan|inf)", line):
            run.diverged = run.diverged or line.split(": ", 1)[-1][:120]


READERS: tuple[tuple[tuple[str, ...], Callable[[Run, str, dict[str, str]], None]], ...] = (
    (("step:",), read_step),
    (("final_", "float_"), read_score),
    (("artifact ",), read_artifact),
    (("Total submission size", "Serialized model", "Code size"), read_old_size),
    (("config ", "run id:", "runtime ", "data path:"), read_about),
    (("swa", "resume ", "training stopped:", "stopping_early:", "error", "warning: "), read_event),
)


def log_lines(data: bytes) -> tuple[list[str], str]:
    """Lines after the script's source, and the source. Raises LogError for what is no text.

    A last line without an end may be cut in the middle of a number, so it counts only with all 8 digits of a score.
    A resumed run repeats the source: it is left out again.
    """
    if not data.strip():
        raise LogError("empty")
    if len(data) > MAX_LOG_BYTES:
        raise LogError(f"foreign: {len(data)} bytes, more than a log has")
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", errors="replace")
    if "\0" in text:
        raise LogError("foreign: not text")
    lines = [re.sub(r"^\[\w+\]:\s?", "", line.rstrip("\r")) for line in text.split("\n")]
    if not re.search(r"val_bpb:\d+\.\d{8}$", last := lines[-1]):
        lines.pop()
        if last.startswith(("final_", "step:")):
            lines.append("warning: (report) the last line of the log is cut off and not read")
    rule = "=" * 100
    if rule not in lines:
        return lines, ""
    end = lines.index(rule)
    source, kept, skipping = lines[:end], [], False
    for line in lines[end + 1 :]:
        skipping = (skipping or bool(source[:1]) and line == source[0] != "") and line != rule
        if not skipping and line != rule:
            kept.append(line)
    return kept, "\n".join(source)


def read_log(path: Path) -> Run:
    """Parse one log. Raises LogError with the reason where it is empty, foreign or cut before the first result."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LOG_BYTES + 1)
    except OSError as error:
        raise LogError(f"not readable: {error.strerror}") from error
    lines, source = log_lines(data)
    run = Run(path, path.stem, source=hashlib.sha256(source.encode()).hexdigest()[:8] if source else "")
    for line in lines:
        pairs = dict(PAIR.findall(line)) if len(line) < 2000 else {}
        reader = next((read for starts, read in READERS if line.startswith(starts)), read_old_about)
        reader(run, line, pairs)
    if run.step or (run.scores and run.own):
        return run
    if run.settings.get("dry_run"):
        raise LogError("a dry run: the plan of a run")
    if run.own or run.dataset or run.diverged:
        raise LogError(
            f"truncated or stopped at once: no training step in it{': ' if run.diverged else ''}{run.diverged}"
        )
    if source or b"import torch" in data:
        raise LogError("truncated or foreign: a script's source without a run")
    raise LogError("foreign: no line of this script's or the challenge's logs")


def read_all(paths: Iterable[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """All runs with at least one step or score, and (file, reason) of what was skipped."""
    runs: list[Run] = []
    skipped: list[tuple[str, str]] = []
    seen: dict[tuple[Any, ...], Path] = {}
    for path in paths:
        try:
            run = read_log(path)
        except LogError as error:
            skipped.append((str(path), str(error)))
            continue
        same = (run.seed, run.step, run.train_ms, tuple(run.losses.items()), repr(run.scores))
        if same in seen and run.scores:
            skipped.append((str(path), f"the same run as {seen[same]}"))
        else:
            seen[same] = path
            runs.append(run)
    stems = [run.name for run in runs]
    for run in runs:
        if stems.count(run.name) > 1:
            run.name = f"{run.path.resolve().parent.name}/{run.path.stem}"
    return runs, skipped


# ---- Seeds of one config ---------------------------------------------------------------------------------------------
@dataclass
class Group:
    """Complete runs that differ in seed and name alone (or the logs named with --baseline)."""

    letter: str
    runs: list[Run]

    def values(self, what: Callable[[Run], float | None]) -> list[float]:
        """A figure of every run that has it."""
        return [value for run in self.runs if (value := what(run)) is not None]

    @property
    def losses(self) -> list[float]:
        """Final losses in nats per token."""
        return self.values(lambda run: run.final.loss if run.final else None)

    @property
    def bpbs(self) -> list[float]:
        """Final bits per byte."""
        return self.values(lambda run: run.final.bpb if run.final else None)


def facts(run: Run) -> dict[str, Any]:
    """What makes the config of a run: settings without what names the run, script, data and hardware."""
    settings = {k: v for k, v in run.settings.items() if k not in PER_RUN_SETTINGS}
    if not run.own and not run.source:
        settings["folder"] = str(run.path.resolve().parent)
    keys = (*HARDWARE, "compute_dtype", "compile", "attention", "flash3")
    mode = run.final.mode if run.final else ""
    about = {"script": run.source, "data": run.dataset, "val_targets": run.val_targets, "evaluation": mode}
    return settings | about | {k: run.runtime[k] for k in keys if k in run.runtime}


def group_runs(runs: Sequence[Run], baseline: Sequence[Run]) -> list[Group]:
    """Groups in the order of the files; the runs of --baseline are one group, the first."""
    keyed: dict[str, list[Run]] = {"baseline": list(baseline)} if baseline else {}
    for run in runs:
        keyed.setdefault(json.dumps(facts(run), sort_keys=True, default=str), []).append(run)
    groups = []
    for i, members in enumerate(keyed.values()):
        members.sort(key=lambda run: (run.seed is None, run.seed or 0, run.name))
        groups.append(Group(chr(ord("A") + i) if i < 26 else f"G{i + 1}", members))
    return groups


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (None for fewer than two values)."""
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def p_text(p: float) -> str:
    """A p-value with two digits."""
    return f"{p:.2g}" if p >= 1e-12 else "< 1e-12"


def verdict(base: Group, other: Group) -> str:
    """Welch's t-test of `other` against `base` on val_loss, in words."""
    name, first, second = f"**{other.letter} against {base.letter}**", base.runs[0], other.runs[0]
    ratio = (first.val_targets or 0) / max(second.val_targets or 0, 1)
    if first.dataset != second.dataset or (ratio and abs(ratio - 1) > 0.01):
        sets = [f"{run.dataset or 'unknown data'} ({run.val_targets or '?'} targets)" for run in (first, second)]
        return f"{name}: not comparable, validated on {sets[1]} and {sets[0]}."
    old, new = base.losses, other.losses
    gain, bits = (
        statistics.fmean(old) - statistics.fmean(new),
        statistics.fmean(base.bpbs) - statistics.fmean(other.bpbs),
    )
    size = f"{abs(gain):.5f} nats per token ({abs(bits):.5f} bpb)"
    way = "lower" if gain > 0 else "higher"
    if min(len(old), len(new)) < 2:
        return f"{name}: mean loss {way} by {size}; no test, which needs two seeds or more of each."
    if max(statistics.stdev(old), statistics.stdev(new)) == 0:
        return f"{name}: mean loss {way} by {size}; no test, since no run differs from the others of its config."
    try:
        from scipy import stats  # only needed here
    except ImportError:
        return f"{name}: mean loss {way} by {size}; no test, which needs scipy (tests/requirements.txt)."
    two = stats.ttest_ind(old, new, equal_var=False)
    bar = stats.ttest_ind([x - REQUIRED_NATS for x in old], new, equal_var=False, alternative="greater").pvalue
    low, high = two.confidence_interval(0.95)
    test = (
        f"Welch's t = {two.statistic:.2f}, {two.df:.1f} degrees of freedom, p = {p_text(two.pvalue)}; "
        f"95% interval of the gain {low:.5f} to {high:.5f}"
    )
    if two.pvalue >= REQUIRED_P:
        text = f"{name}: no difference shown at p < {REQUIRED_P}. Mean loss {way} by {size} ({test})."
    else:
        text = f"{name}: {'better' if gain > 0 else 'worse'} by {size} ({test})."
    met = "met" if bar < REQUIRED_P else "not met"
    text += f" The challenge's bar, {REQUIRED_NATS} nats better at p < {REQUIRED_P}, is {met} (p = {p_text(bar)})."
    modes = [sorted({run.final.mode for run in group.runs if run.final}) for group in (other, base)]
    if modes[0] != modes[1]:
        text += f" Scored differently ({', '.join(modes[0])} and {', '.join(modes[1])}): the gain includes that."
    if broken := [run.name for run in other.runs if rule_breaks(run)]:
        text += f" But {', '.join(broken)} broke the challenge's rules (see the warnings): no valid entry."
    return text


# ---- Tables ----------------------------------------------------------------------------------------------------------
def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table with aligned columns; all but the first `left` columns flush right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return [line(cells[0]), rule, *map(line, cells[1:])]


def shown(value: float | int | None, form: str = "") -> str:
    """A figure, or a dash where the log has none."""
    return "-" if value is None else format(value, form)


RUN_HEADER = ("run", "config", "seed", "steps", "ms/step", "float bpb", "final bpb", "gap", "artifact bytes",
              "headroom", "training s", "evaluation s", "evaluation")  # fmt: skip


def run_row(run: Run, letter: str) -> list[str]:
    """A complete run under RUN_HEADER."""
    final, floats, size = run.final, run.float_score, run.artifact_bytes
    assert final is not None, "groups hold complete runs"
    steps = f"{run.step}/{run.planned}" if run.planned else str(run.step)
    return [
        run.name, letter, shown(run.seed), steps, shown(run.ms_per_step, ".2f"),
        shown(floats.bpb if floats else None, ".5f"), f"{final.bpb:.5f}", shown(run.gap, "+.5f"),
        shown(size, ",d"), shown(None if size is None else (run.limit or LIMIT_BYTES) - size, ",d"),
        shown(None if run.train_ms is None else run.train_ms / 1000, ".1f"), shown(final.seconds, ".1f"), final.mode,
    ]  # fmt: skip


def group_table(groups: Sequence[Group]) -> list[str]:
    """Mean and sample standard deviation over the seeds of each config."""
    header = ["config", "seeds", "val_bpb", "std", "val_loss", "std", "gap", "ms/step", "largest artifact"]
    rows = []
    for group in groups:
        (bpb, bpb_std), (loss, loss_std) = mean_std(group.bpbs), mean_std(group.losses)
        seeds = ", ".join(shown(run.seed) for run in group.runs)
        gap, speed = mean_std(group.values(lambda r: r.gap))[0], mean_std(group.values(lambda r: r.ms_per_step))[0]
        size = max(group.values(lambda r: r.artifact_bytes), default=None)
        rows.append([group.letter, seeds, shown(bpb, ".5f"), shown(bpb_std, ".5f"), shown(loss, ".5f"),
                     shown(loss_std, ".5f"), shown(gap, "+.5f"), shown(speed, ".2f"), shown(size, ",.0f")])  # fmt: skip
    return table(header, rows, left=2)


def difference_table(groups: Sequence[Group]) -> list[str]:
    """Settings in which the configs differ; where a log without a config is among them, those that every group logs."""
    columns = [facts(group.runs[0]) for group in groups]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    if not all(group.runs[0].whole_config for group in groups):
        keys = [key for key in keys if all(key in column for column in columns)]
    rows = []
    for key in keys:
        values = [column.get(key) for column in columns]
        typed = [plain_value(str(v)) for v in values]
        if any(value != typed[0] for value in typed):
            rows.append([f"`{key}`", *("-" if value in (None, "") else str(value) for value in values)])
    return table(["differs", *(group.letter for group in groups)], rows) if rows else []


def results(groups: Sequence[Group]) -> str:
    """The results part in Markdown: what the README holds between its markers."""
    rows = [run_row(run, group.letter) for group in groups for run in group.runs]
    parts = [table(RUN_HEADER, rows, left=2), group_table(groups)]
    if len(groups) > 1:
        parts += [difference_table(groups), [f"- {verdict(groups[0], group)}" for group in groups[1:]]]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def rule_breaks(run: Run) -> list[str]:
    """What the challenge's rules forbid in a run."""
    found, final = [], run.final
    if run.artifact_bytes is not None and run.artifact_bytes > LIMIT_BYTES:
        over = run.artifact_bytes - LIMIT_BYTES
        found.append(f"{run.artifact_bytes:,} bytes of code and model, {over:,} over the {LIMIT_BYTES:,} allowed")
    for what, seconds in (("training", (run.train_ms or 0) / 1000), ("evaluation", (final and final.seconds) or 0)):
        if seconds > LIMIT_SECONDS:
            found.append(
                f"{what} took {seconds:.3f} s, {seconds - LIMIT_SECONDS:.3f} s over the {LIMIT_SECONDS:.0f} s allowed"
            )
    return found


def warnings(groups: Sequence[Group]) -> list[str]:
    """Broken rules, figures that contradict each other, and what the logs themselves warn of."""
    found = []
    for group in groups:
        seeds = [run.seed for run in group.runs if run.seed is not None]
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            found.append(
                f"config {group.letter}: seed {', '.join(map(str, twice))} more than once: not independent runs"
            )
        for package in sorted({p for run in group.runs for p in run.versions}):
            if len(kinds := sorted({run.versions.get(package, "?") for run in group.runs})) > 1:
                found.append(f"config {group.letter}: runs with different versions of {package}: {', '.join(kinds)}")
        for run in group.runs:
            found += [f"{run.name}: forbidden by the rules: {text}" for text in rule_breaks(run)]
            if run.limit is not None and (run.artifact_bytes or 0) > run.limit != LIMIT_BYTES:
                found.append(f"{run.name}: {run.artifact_bytes:,} bytes, over its own limit of {run.limit:,}")
            parts = (run.model_bytes, run.code_bytes, run.artifact_bytes)
            if None not in parts and sum(parts[:2]) != parts[2]:  # type: ignore[arg-type]
                found.append(f"{run.name}: model and code bytes do not add up to the artifact's {parts[2]:,}")
            if run.own and len({s.bpb for s in run.scores[-2:]}) > 1:
                found.append(f"{run.name}: its last two final lines are not the same score")
            found += [f"{run.name}: logged: {message}" for message in run.messages]
    return found


def notes(groups: Sequence[Group], left_out: Sequence[tuple[str, str]]) -> str:
    """Hardware, warnings and the files that do not count."""
    lines = []
    for group in groups:
        run = group.runs[0]
        where = " ".join(f"{k}:{run.runtime[k]}" for k in (*HARDWARE, "cpus", "threads") if k in run.runtime)
        lines.append(f"config {group.letter} ran on {where or '?'}, "
                     + (" ".join(f"{k}:{v}" for k, v in run.versions.items()) or "versions not logged"))  # fmt: skip
    lines += [f"warning: {text}" for text in warnings(groups)]
    lines += [f"not counted: {name}: {reason}" for name, reason in left_out]
    return "\n".join(lines) + "\n"


# ---- submission.json and README --------------------------------------------------------------------------------------
def write_atomic(path: Path, text: str) -> None:
    """Replace a file as a whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def not_for_submission(run: Run) -> str:
    """Why a run's result must not go into submission.json, or nothing."""
    final = run.final
    if not run.whole_config:
        return "its log has no config line of this script"
    if run.settings.get("demo"):
        return "a demo run (DEMO=1), not on the challenge's data"
    if run.settings.get("text_files"):
        return "trained and scored on TEXT_FILES, not on the challenge's data"
    if run.dataset != CHALLENGE_DATASET:
        return f"data folder {run.dataset or 'not logged'}, not the challenge's {CHALLENGE_DATASET}"
    if (run.val_targets or 0) < CHALLENGE_VAL_TARGETS:
        return f"{run.val_targets or 0:,} validation targets: not the challenge's whole split"
    if run.artifact_bytes is None or run.train_ms is None or final is None or final.seconds is None or run.seed is None:
        return "its log lacks the seed, the artifact's size or a time"
    return "; ".join(rule_breaks(run))


def submission_results(group: Group) -> dict[str, Any]:
    """The result fields from the seeds of one config; bytes are those of the largest artifact."""
    largest = max(group.runs, key=lambda run: run.artifact_bytes or 0)
    (bpb, bpb_std), (loss, loss_std) = mean_std(group.bpbs), mean_std(group.losses)
    per_seed = {}
    for run in group.runs:
        assert run.final and run.train_ms is not None, "checked by not_for_submission"
        per_seed[str(run.seed)] = {
            "val_loss": run.final.loss, "val_bpb": run.final.bpb, "bytes_total": run.artifact_bytes, "steps": run.step,
            "train_seconds": run.train_ms / 1000, "eval_seconds": run.final.seconds, "eval_mode": run.final.mode,
        }  # fmt: skip
    first, packages = group.runs[0], dict.fromkeys(p for run in group.runs for p in run.versions)
    kinds = {p: sorted({run.versions[p] for run in group.runs if p in run.versions}) for p in packages}
    fields: dict[str, Any] = {
        "val_loss": loss, "val_bpb": bpb, "val_loss_std": loss_std, "val_bpb_std": bpb_std,
        "seeds": [run.seed for run in group.runs], "seed_results": per_seed,
        "bytes_total": largest.artifact_bytes, "bytes_model": largest.model_bytes, "bytes_code": largest.code_bytes,
        "hardware": {k: plain_number(first.runtime[k]) for k in HARDWARE if k in first.runtime} or None,
        "versions": {p: versions[0] if len(versions) == 1 else versions for p, versions in kinds.items()} or None,
    }  # fmt: skip
    return {k: round(v, 8) if isinstance(v, float) else v for k, v in fields.items()}


def plain_number(text: str) -> int | str:
    """A count as a number, anything else as it was logged."""
    return int(text) if text.isdigit() else text


def submission(groups: Sequence[Group], present: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The content of submission.json, and why its results are null where they are."""
    author = {k: present.get(k) for k in (*AUTHOR_FIELDS, *present) if k not in RESULT_FIELDS}
    reasons, fit = [], []
    for (
        group
    ) in groups:  # a config with a run that can't be submitted is left out as a whole: no choosing among its seeds
        found = [f"{run.name}: {reason}" for run in group.runs if (reason := not_for_submission(run))]
        reasons += found
        fit += [] if found else [group]
    chosen = fit[0] if len(fit) == 1 else None
    if len(fit) > 1:
        reasons.append(f"logs of {len(fit)} configs could be submitted: name those of one alone")
    elif chosen and len({run.seed for run in chosen.runs}) < len(chosen.runs):
        reasons.append("two logs of one seed: name one alone")
        chosen = None
    elif chosen and len(chosen.runs) == 1:
        reasons.append(f"{chosen.runs[0].name}: one seed has no standard deviation")
    return author | dict.fromkeys(RESULT_FIELDS) | (submission_results(chosen) if chosen else {}), reasons


def submission_text(groups: Sequence[Group], path: Path) -> tuple[str, list[str]]:
    """The new text of a submission.json whose author fields are kept. Raises ValueError if it is no JSON object."""
    present: Any = {}
    if path.exists():
        try:
            present = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON, so its author fields can't be kept: {error}") from error
        if not isinstance(present, dict):
            raise ValueError(f"{path}: not a JSON object, so its author fields can't be kept")
    fields, reasons = submission(groups, present)
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n", reasons


def readme_text(text: str, block: str, path: Path) -> str:
    """The README with the results between its markers. Raises ValueError if they are not there once each."""
    if text.count(MARKERS[0]) != 1 or text.count(MARKERS[1]) != 1 or text.index(MARKERS[0]) > text.index(MARKERS[1]):
        raise ValueError(f"{path}: needs the lines {MARKERS[0].strip()} and {MARKERS[1]} once each, in this order")
    before, rest = text.split(MARKERS[0])
    return before + MARKERS[0] + block + MARKERS[1] + rest.split(MARKERS[1])[1]


# ---- Figure ----------------------------------------------------------------------------------------------------------
INK = "#7d8590"  # text, axes; every colour here has a contrast of 3 or more on white and on GitHub's dark #0d1117
COLOURS = ("#2f81f7", "#d9730d", "#2f9e55", "#a568e8", "#e0484d", "#0f97a5", "#d3499b", "#98753a")
CATEGORIES = {
    "mlp": COLOURS[0], "attn": COLOURS[1], "bigram": COLOURS[2], "embed": COLOURS[3], "model": COLOURS[5],
    "small": COLOURS[6], "container": COLOURS[7], "code": INK,
}  # fmt: skip
STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)))


@dataclass
class Curve:
    """How one run is drawn."""

    run: Run
    label: str
    colour: str
    style: Any
    order: int

    def at(self, step: int, clock: bool) -> float:
        """Position of a step on the x axis: seconds of training, or millions of tokens."""
        import numpy as np

        if clock:
            steps = sorted(self.run.times)
            return float(np.interp(step, steps, [self.run.times[s] for s in steps])) / 1000
        return step * (self.run.batch_tokens or 0) / 1e6

    def xy(self, points: dict[int, float], clock: bool) -> tuple[list[float], list[float]]:
        """A curve in the order of its steps; empty where the log lacks what the axis needs."""
        if not (self.run.times if clock else self.run.batch_tokens):
            return [], []
        steps = sorted(points)
        return [self.at(step, clock) for step in steps], [points[step] for step in steps]

    def mark_swa(self, axes: Any, x: Sequence[float], y: Sequence[float], clock: bool) -> None:
        """A triangle on the curve where averaging starts."""
        import numpy as np

        if x and self.run.swa_start is not None:
            start = self.at(self.run.swa_start, clock)
            axes.plot([start], [np.interp(start, x, y)], "v", color=self.colour, markeredgecolor="white",
                      markersize=9, zorder=4)  # fmt: skip


def curves(groups: Sequence[Group], unfinished: Sequence[Run]) -> list[Curve]:
    """A colour per config and a line style per seed; with a single config, a colour per run."""
    one = len(groups) < 2
    drawn: list[Curve] = []
    for i, group in enumerate(groups):
        for j, run in enumerate(group.runs):
            colour, style = COLOURS[(j if one else i) % len(COLOURS)], STYLES[0 if one else j % len(STYLES)]
            label = run.name if one else f"{group.letter}: {run.name}"
            drawn.append(Curve(run, label, colour, style, len(drawn)))
    for i, run in enumerate(unfinished):
        colour = COLOURS[(len(groups[0].runs if one else groups) + i) % len(COLOURS)]
        label = f"{run.name} ({'diverged' if run.diverged else 'unfinished'})"
        drawn.append(Curve(run, label, colour, STYLES[2], len(drawn)))
    return drawn


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving mean over up to 5 points."""
    most, end = 2 if len(values) >= 20 else 0, len(values) - 1
    reaches = [min(most, i, end - i) for i in range(len(values))]
    return [statistics.fmean(values[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]


def fit_height(axes: Any, series: Sequence[tuple[list[float], list[float]]]) -> None:
    """Set the y range by all but the first 4% of each run, where the loss falls from that of random weights."""
    seen = [v for x, y in series for u, v in zip(x, y, strict=True) if u >= 0.04 * max(x)]
    if seen and max(seen) > min(seen):
        room = 0.06 * (max(seen) - min(seen))
        axes.set_ylim(min(seen) - room, max(seen) + room)


def explain(axes: Any, marks: Sequence[tuple[str, str, str]]) -> None:
    """A legend of markers (label, marker, face colour) in the colour of the text."""
    for label, mark, face in marks:
        axes.plot([], [], mark, color=INK, markerfacecolor=face, label=label, markersize=10 if mark == "*" else 7)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[-len(marks) :], labels[-len(marks) :], loc="lower left")


def draw_loss(axes: Any, drawn: Sequence[Curve], clock: bool) -> None:
    """Training loss: the logged points faintly, their moving mean on top."""
    series = []
    for curve in drawn:
        x, y = curve.xy(curve.run.losses, clock)
        if len(y) >= 20:
            axes.plot(x, y, color=curve.colour, linewidth=0.7, alpha=0.35)
        axes.plot(x, smooth(y), color=curve.colour, linestyle=curve.style, linewidth=1.7, label=curve.label)
        curve.mark_swa(axes, x, smooth(y), clock)
        series.append((x, y))
    fit_height(axes, series)


def draw_bpb(axes: Any, drawn: Sequence[Curve], clock: bool) -> None:
    """Validation bpb in training; beside its end the scores of the float weights and of the stored model."""
    from matplotlib.transforms import offset_copy

    series = []
    for curve in drawn:
        run, final, floats = curve.run, curve.run.final, curve.run.float_score
        x, y = curve.xy(run.val_bpb, clock)
        axes.plot(x, y, color=curve.colour, linestyle=curve.style, linewidth=1.5, marker=".", markersize=6)
        scores = [(s, mark, by) for s, mark, by in ((floats, "o", 9), (final, "*", 21)) if s and run.step and x]
        for score, mark, by in scores:
            beside = offset_copy(axes.transData, axes.figure, x=by, units="points")
            face = "none" if mark == "o" else curve.colour
            axes.plot([curve.at(run.step, clock)], [score.bpb], mark, color=curve.colour, markerfacecolor=face,
                      clip_on=False, markersize=7 if mark == "o" else 11, markeredgewidth=1.3, zorder=5,
                      transform=beside)  # fmt: skip
        series.append((x + [max(x, default=0.0)] * len(scores), y + [score.bpb for score, *_ in scores]))
    fit_height(axes, series)


def draw_scale(axes: Any, drawn: Sequence[Curve]) -> None:
    """Learning-rate scale over tokens; equal schedules lie on each other, the first the widest."""
    for curve in drawn:
        x, y = curve.xy(curve.run.scales, clock=False)
        width = 1.5 + 2.2 * max(0, min(3, len(drawn)) - 1 - curve.order)
        axes.plot(x, y, color=curve.colour, linewidth=width, solid_capstyle="butt")
        curve.mark_swa(axes, x, y, clock=False)
    if not any(curve.run.scales for curve in drawn):
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center")
    axes.set_ylim(0, 1.08)


def byte_parts(run: Run) -> dict[str, float]:
    """Bytes of an artifact per category, which add up to it.

    A log that gives the entropy of each category's codes (what zstd comes close to) instead of compressed bytes leaves
    a rest, shown as container; where the entropies are more than the file, they are scaled down to it.
    """
    code, model, total = run.code_bytes or 0, run.model_bytes, run.artifact_bytes or 0
    size = float(model if model is not None else total - code)
    logged = sum(run.categories.values())
    if not logged:
        return {"code": float(code), "model": size}
    scale = min(1.0, size / logged)
    parts = sorted(((name, scale * value) for name, value in run.categories.items()), key=lambda part: -part[1])
    return {"code": float(code)} | dict(parts) | {"container": size - scale * logged}


def draw_bar(axes: Any, row: int, run: Run, widest: float, named: set[str]) -> None:
    """One artifact as a stacked bar with its size above it; `named` collects what the legend has already."""
    left, total = 0.0, run.artifact_bytes or 1
    for name, size in byte_parts(run).items():
        colour = CATEGORIES.get(name) or COLOURS[sum(map(ord, name)) % len(COLOURS)]
        label = None if name in named or size < 1 else name
        axes.barh(row, size / 1e6, left=left / 1e6, height=0.5, color=colour, edgecolor="none", label=label)
        named |= {name} if size >= 1 else set()
        if size > 0.08 * widest:
            axes.text((left + size / 2) / 1e6, row, f"{size / total:.0%}", ha="center", va="center", color="white",
                      fontsize=8.5, fontweight="bold")  # fmt: skip
        left += size
    room = (limit := run.limit or LIMIT_BYTES) - total
    text = f"{total:,} bytes, {abs(room):,} {'below' if room >= 0 else 'OVER'} the limit of {limit:,}"
    axes.text(0, row - 0.29, text, ha="left", va="bottom", fontsize=8.5)


def draw_bytes(axes: Any, groups: Sequence[Group]) -> None:
    """A stacked bar for the largest artifact of each config, and the limit where it is near."""
    sized = [g for g in groups if g.values(lambda r: r.artifact_bytes)][:8]
    runs = [max(g.runs, key=lambda r: r.artifact_bytes or 0) for g in sized]
    widest = max((run.artifact_bytes or 1 for run in runs), default=1)
    named: set[str] = set()
    for row, run in enumerate(runs):
        draw_bar(axes, row, run, widest, named)
    if near := widest > 0.5 * LIMIT_BYTES:
        axes.axvline(LIMIT_BYTES / 1e6, color=COLOURS[4], linewidth=1.4, linestyle=(0, (4, 2)))
    axes.set_xlim(0, 1.03 * max(widest, LIMIT_BYTES if near else 0) / 1e6)
    axes.set_yticks(range(len(runs)), [run.name for run in runs] if len(groups) < 2 else [g.letter for g in sized])
    axes.set_ylim(len(runs) - 0.5 + 0.5 * max(1, len(runs) / 3), -0.7)
    axes.grid(False)
    if runs:
        axes.legend(loc="lower center", ncol=5, columnspacing=1.2, handlelength=1.2)
    else:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center")


def figure_style() -> dict[Any, Any]:
    """One mid grey for text and axes on a transparent ground; ids in the SVG that are the same each time."""
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return dict.fromkeys((*inks, "grid.color"), INK) | {
        "svg.hashsalt": "report.py", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 10,
        "axes.titlesize": 11, "axes.titlelocation": "left", "axes.facecolor": "none", "figure.facecolor": "none",
        "savefig.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.25, "grid.linewidth": 0.7, "legend.framealpha": 0, "legend.facecolor": "none",
        "legend.edgecolor": "none", "legend.fontsize": 8.5,
    }  # fmt: skip


def save_figure(figure: Any, path: Path) -> None:
    """Write .svg or .png without date or version, as a whole or not at all."""
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        figure.savefig(name, metadata=metadata, dpi=110)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def draw_figure(groups: Sequence[Group], unfinished: Sequence[Run], path: Path) -> None:
    """Loss and bpb over tokens and over wall clock, learning-rate scale, bytes per category."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = curves(groups, [run for run in unfinished if run.losses or run.val_bpb])
    columns = min(5, len(drawn) if len(groups) < 2 else len(groups))
    with matplotlib.rc_context(figure_style()):
        height = 10.5 + 0.22 * math.ceil(len(drawn) / columns)
        figure, axes = plt.subplots(3, 2, figsize=(10.5, height), constrained_layout=True)
        for column, clock in enumerate((False, True)):
            (over, unit) = ("wall clock", "seconds of training") if clock else ("tokens", "million tokens")
            draw_loss(axes[0, column], drawn, clock)
            draw_bpb(axes[1, column], drawn, clock)
            axes[0, column].set(title=f"Training loss over {over} (nats per token)", xlabel=unit)
            axes[1, column].set(title=f"Validation over {over} (bits per byte)", xlabel=unit)
            ends = [x for curve in drawn for x in curve.xy(curve.run.losses | curve.run.val_bpb, clock)[0]]
            for axis in (axes[0, column], axes[1, column], *((axes[2, 0],) if not clock else ())):
                axis.set_xlim(0, 1.1 * max(ends, default=1.0))
        draw_scale(axes[2, 0], drawn)
        axes[2, 0].set(title="Learning-rate scale over tokens", xlabel="million tokens")
        draw_bytes(axes[2, 1], groups)
        axes[2, 1].set(title="Where the artifact's bytes go (largest of each config)", xlabel="million bytes")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncol=columns, fontsize=9.5)
        if any(curve.run.swa_start is not None for curve in drawn):
            explain(axes[0, 0], [("weight averaging (SWA) starts", "v", INK)])
        explain(axes[1, 0], [("in training", ".", INK), ("float weights before export", "o", "none"),
                             ("stored model: the score", "*", INK)])  # fmt: skip
        save_figure(figure, path)
        plt.close(figure)


# ---- Command line ----------------------------------------------------------------------------------------------------
def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a log that follows --submission or --readme is a log, not the file to write."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", help="log files")
    parser.add_argument(
        "--baseline", action="append", default=[], metavar="GLOB", help="logs to compare with, one group"
    )
    parser.add_argument("--markdown", action="store_true", help="print the results part alone")
    parser.add_argument("--figure", type=Path, metavar="FILE.svg", help="draw the runs (.svg or .png)")
    parser.add_argument(
        "--submission", nargs="?", const="submission.json", metavar="FILE.json", help="write the results"
    )
    parser.add_argument(
        "--readme", nargs="?", const="README.md", metavar="FILE.md", help="write the results part into it"
    )
    args = parser.parse_args(words)
    for option, ending in (("submission", ".json"), ("readme", ".md")):
        value = getattr(args, option)
        if value in ("submission.json", "README.md"):
            setattr(args, option, ROOT / value)
        elif value and not value.endswith(ending):
            args.logs.insert(0, value)
            setattr(args, option, ROOT / ("submission.json" if option == "submission" else "README.md"))
        elif value:
            setattr(args, option, Path(value))
    if not args.logs and not args.baseline:
        parser.error("no log files given")
    if args.figure and args.figure.suffix not in (".svg", ".png"):
        parser.error(f"--figure {args.figure}: must end in .svg or .png")
    return args


def expand(patterns: Iterable[str]) -> list[Path]:
    """Files of names and globs (which not every shell expands), each once, in order."""
    names = [
        n for p in patterns for n in (sorted(glob.glob(p)) if not os.path.exists(p) and glob.has_magic(p) else [p])
    ]
    return [Path(name) for name in dict.fromkeys(names)]


def write_outputs(args: argparse.Namespace, groups: Sequence[Group], others: Sequence[Run]) -> list[str]:
    """Figure, submission.json and README, as asked for; what to tell the user about them."""
    said = []
    if args.figure:
        draw_figure(groups, others, args.figure)
        said.append(f"wrote {args.figure}")
    if args.submission:
        text, reasons = submission_text(groups[1:] if args.baseline else groups, args.submission)
        write_atomic(args.submission, text)
        state = "without results, which stay null" if json.loads(text)["val_bpb"] is None else "with results"
        said += [f"wrote {args.submission} {state}", *(f"submission: {reason}" for reason in reasons)]
    if args.readme:
        text = args.readme.read_text(encoding="utf-8")
        write_atomic(args.readme, readme_text(text, results(groups), args.readme))
        said.append(f"wrote the results into {args.readme}")
    return said


def main(words: Sequence[str] | None = None) -> int:
    """Read, group, print, write."""
    args = parse_arguments(words)
    baseline_paths = expand(args.baseline)
    known = {path.resolve() for path in baseline_paths}
    paths = [path for path in expand(args.logs) if path.resolve() not in known]
    runs, skipped = read_all([*baseline_paths, *paths])
    others = [run for run in runs if run.problem()]
    left_out = [*skipped, *((str(run.path), run.problem()) for run in others)]
    complete = [run for run in runs if not run.problem()]
    if not complete:
        for name, reason in left_out:
            print(f"not counted: {name}: {reason}", file=sys.stderr)
        print(f"error: no complete run in {len(left_out)} files", file=sys.stderr)
        return 1
    first = [run for run in complete if run.path.resolve() in known]
    if args.baseline and not first:
        print(f"error: no complete run in --baseline {' '.join(args.baseline)}", file=sys.stderr)
        return 1
    groups = group_runs([run for run in complete if run.path.resolve() not in known], first)
    print(results(groups), end="")
    print(
        ("" if args.markdown else "\n") + notes(groups, left_out),
        end="",
        file=sys.stderr if args.markdown else sys.stdout,
    )
    try:
        said = write_outputs(args, groups, others)
    except (OSError, ValueError, ImportError) as error:
        needs = " (pip install -r tests/requirements.txt)" if isinstance(error, ImportError) else ""
        print(f"error: {error}{needs}", file=sys.stderr)
        return 2
    for line in said:
        print(line, file=sys.stderr if args.markdown else sys.stdout)
    return 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
