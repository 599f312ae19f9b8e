"""Everything about the script that only a GPU can answer, in one command: does it run, how fast, in how much memory.

    python tests/gpu.py --data DIR --tokenizer FILE --stages 1-3 --minutes 5 --out OUT
    python tests/gpu.py --data DIR --tokenizer FILE --stages 4-6 --minutes 4 --out OUT
    python tests/gpu.py --cpu --minutes 3 --out OUT           all of it at toy sizes on a CPU, to try this program
    python tests/gpu.py --plan --stages 1-3 --minutes 5       only the time limit of each stage
    python tests/gpu.py --table OUT                           the table once more, from the files in OUT

Stages, in the order of their worth:

    1 ceilings   the card alone: a bf16 matrix product and a copy
    2 runs       the full-size default on one GPU under torchrun: compiled, trained, exported, scored
    3 again      the stored model scored in a fresh process; a run killed and resumed; a smaller export
    4 pr314      RECIPE=pr314 for the same seconds on the same data
    5 profile    the most expensive kernels, attention by each kernel, Inductor's mix_order_reduction on and off
    6 memory     a run that may use 20 GB

A stage that fails or runs over its time is a line of the table, and the next one starts; what it does not use is left
to those after it. The exit code is 0 if all stages are ok or skipped, else 1.

Files in OUT, seven at most, each complete as far as the program came:

    1-ceilings.txt 2-runs.txt 3-again.txt 4-pr314.txt 5-profile.txt 6-memory.txt
                 of each stage asked for: machine, commands, their output with seconds since the stage's start, figures
    table.md     the figures of all stages in OUT, and the table, which is also the last thing printed

On a machine rented by the minute:

- It needs `train_gpt.py` and `tests/`; PyTorch 2.9 or newer for CUDA, numpy, sentencepiece and zstandard. Packages that
  are missing where there is no network travel as wheels (`--wheels FOLDER`, installed into the work folder):
      pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \\
          -d data/wheels zstandard==0.25.0
- Data: two training shards, a validation shard and the tokenizer, some 40 MB, so that all of it fits into 64 MiB.
  Without `--data` the script builds a corpus from the Python files of the standard library: enough for every time, but
  its scores compare with nothing else.
- Copy `train_gpt.py`, `tests/` and `data/` there, run stages 1 to 3 and at once 4 to 6 on the same machine: they share
  the compile cache in the work folder (`--work`). Neither takes longer than its `--minutes`; the files of an OUT that
  is emptied in between belong together in one folder afterwards (`--table`).
- In five minutes, stages 1 to 3 train for 44 s (`--train-seconds`); most of the rest is starting and compiling. A stage
  that ran out of time can be run again alone: `--stages 6 --minutes 2`.
- Commit the files as they came, in a folder gpu under logs/.

The script is used through its command line, its files and these parts of its log alone, so that a rewrite that keeps
them needs no change here: `config {JSON}`, `data path: val_targets:`, `model params: attn: mlp: embed:`, `plan
rank_memory_bytes all:` (dry run), `batch micro_batch_tokens:`, `warm_up time:`, `step:N/M train_loss: train_time:`,
`calibration time:`, `plan step: time:`, `qat active step:`, `checkpoint path:`, `resume checkpoint: step:`, `export
weights: time:`, `training stopped step: train_time: peak_memory_bytes:`, `artifact round: plan_time: rounding_time:
zstd_time:`, `artifact artifact_bytes: limit:`, `float_sliding val_bpb:`, `final_sliding val_bpb: eval_time:`. A part
that is gone is a figure less; `tests/test_gpu.py` notices.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from runs import OutOfTime, Run, RunFailed, error_line, kill_all, losses, numbers, recompiles, step_times

ROOT = Path(__file__).resolve().parent.parent
PROBE = Path(__file__).with_name("gpu_probe.py")
PACKAGES = ("torch", "numpy", "sentencepiece", "zstandard")

RANK_TOKENS = 98_304  # of a step of 786,432 on 8 GPUs
FINEWEB_TARGETS = 62_000_000  # of the challenge's validation split
RECORD_GPUS = 8
SMALL_WINDOWS = 32  # of the validation data where the score does not matter
SPENDABLE = 0.97  # of the minutes given; the rest starts and ends the program
WARMDOWN_SHARE = 0.36  # 2,500 of the some 7,000 steps of a full run

GPU_SIZES = {"TRAIN_BATCH_TOKENS": RANK_TOKENS}
TOY_SIZES = {
    "VOCAB_SIZE": 512, "NUM_LAYERS": 2, "MODEL_DIM": 64, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "BIGRAM_VOCAB_SIZE": 512,
    "TRAIN_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 512, "CALIBRATION_TOKENS": 2048, "WARMUP_STEPS": 2, "COMPILE": 0,
}  # fmt: skip
TOY_QAT_START = 0.7  # the last 8% of some seconds would be no step
TOY_MODEL_BYTES = 185_000  # what the fixed bits of RECIPE=pr314 take, and a little more


class StageSkipped(RuntimeError):
    """The stage makes no sense on this machine; the message says why."""


def step_tflop(run: Run, config: dict[str, Any]) -> float | None:
    """TFLOP of a training step: per token 6 for each weight in a product, and 6 * layers * width * length of attention.

    The tied embedding counts as the output head; the lookup of embeddings and the projection of bigrams do not count.
    """
    weights = [run.number("model params", kind) for kind in ("attn", "mlp", "embed")]
    if None in weights or not config:
        return None
    attention = config["num_layers"] * config["model_dim"] * config["train_seq_len"]
    return 6e-12 * config["train_batch_tokens"] * (sum(weight or 0.0 for weight in weights) + attention)


def config_of(log: Path) -> dict[str, Any]:
    """The config that a run's log holds; empty if there is none."""
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    found = re.findall(r"^config (\{.*\})$", text, re.M)
    return json.loads(found[-1]) if found else {}


# ---- One call of this program ----------------------------------------------------------------------------------------


class Bench:
    """Options, folders and files of this call, and what stages leave to later ones, also to those of a later call."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.cpu: bool = options.cpu
        self.compile_on_cpu: bool = options.compile
        self.out = Path(options.out)
        self.folder = Path(options.work).resolve() / ("cpu" if options.cpu else "gpu")
        self.script = Path(options.script).resolve()
        self.data_path, self.tokenizer_path = options.data, options.tokenizer
        self.sizes: dict[str, Any] = dict(TOY_SIZES if options.cpu else GPU_SIZES)
        source = self.script.read_bytes()
        if options.cpu:
            self.sizes["ARTIFACT_LIMIT_BYTES"] = len(source) + TOY_MODEL_BYTES
        self.sha256 = hashlib.sha256(source).hexdigest()
        self.out.mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        # Stages of one script on the same data know of one another.
        key = hashlib.sha256(f"{self.sha256} {self.data_path} {self.tokenizer_path}".encode()).hexdigest()
        self.state_path = self.folder / f"state-{key[:12]}.json"
        self.state: dict[str, Any] = json.loads(self.state_path.read_text()) if self.state_path.is_file() else {}
        self.sizes |= self.state.get("sizes", {})
        self.cap = 0.0  # seconds of training in stages 2 and 4
        self.machine: list[str] = []
        self.environment = dict(os.environ) | {
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "TORCH_LOGS": "recompiles",
            "PYTHONUNBUFFERED": "1",
        }
        if options.cpu:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        self.file: TextIO = sys.stdout  # of the current stage
        self.begun, self.deadline = 0.0, math.inf  # likewise, by time.monotonic()
        self.problems: list[str] = []  # of the current stage, which goes on in spite of them

    def say(self, line: str) -> None:
        """A line of this program's, to the stage's file and the console."""
        print(line, file=self.file, flush=True)
        print(line, flush=True)

    def figure(self, name: str, value: float | str | None) -> None:
        """Note what was measured; None, for what a log does not show, is no figure."""
        if value is not None:
            self.say(f"figure {name}:{value if isinstance(value, str) else format(value, '.5g')}")

    def keep(self, **values: Any) -> None:
        """Leave something to later stages, also to those of a later call with the same script."""
        self.state |= values
        self.state_path.write_text(json.dumps(self.state))

    def log_of(self, run_id: str, ending: str = "txt") -> Path:
        """A file of a run in the work folder."""
        return self.folder / "logs" / f"{run_id}.{ending}"

    def new_run_id(self, name: str) -> str:
        """A name that no run in the work folder has."""
        return f"{name}-{time.strftime('%H%M%S')}-{os.getpid()}"

    def launch(
        self, command: list[str], settings: Mapping[str, Any], until: Callable[[list[str]], bool] | None = None
    ) -> Run:
        """Run a command in the work folder until it ends or `until` holds for the lines that it has printed."""
        if time.monotonic() >= self.deadline:
            raise OutOfTime
        texts = {name: str(value) for name, value in settings.items()}
        words = [f"{name}={value}" for name, value in texts.items()] + command
        print(f"$ {' '.join(map(shlex.quote, words))}", file=self.file, flush=True)
        run, begun = Run(), time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment | texts,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                run.lines.append(line.rstrip("\n"))
                print(f"[{time.monotonic() - self.begun:6.1f}] {run.lines[-1]}", file=self.file, flush=True)
                if until and until(run.lines):
                    break
            else:
                run.code = process.wait()
        except OutOfTime:
            run.out_of_time = True
        finally:
            left, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # no alarm while processes are ended
            kill_all(process)
            signal.setitimer(signal.ITIMER_REAL, left)
        name, seconds = texts.get("RUN_ID", command[-1]), time.monotonic() - begun
        self.say(f"ended {name} exit_code:{run.code} seconds:{seconds:.1f}")
        return run

    def run(
        self,
        run_id: str,
        settings: Mapping[str, Any],
        *,
        small: bool = False,
        until: Callable[[list[str]], bool] | None = None,
        torchrun: bool = True,
        probe: tuple[str, ...] = (),
    ) -> Run:
        """The script as a user starts it; `small`: on little validation data; `probe`: in the probe, these options."""
        command = [sys.executable]
        if probe:
            command += [str(PROBE), "script", str(self.script), *probe]
        elif torchrun:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", str(self.script)]
        else:
            command += [str(self.script)]
        return self.launch(command, self.sizes | self.data(small) | {**settings, "RUN_ID": run_id}, until)

    def data(self, small: bool) -> dict[str, str]:
        """Where shards and tokenizer are; without --data, a corpus that the script builds when it is first asked."""
        if not self.data_path:
            if "corpus" not in self.state:
                self.keep(corpus=self.build_corpus())
            self.data_path = self.state["corpus"]
            self.tokenizer_path = f"{self.data_path}/tokenizer.model"
        folder = Path(self.data_path).resolve()
        if small:
            folder = self.with_few_windows(folder)
        return {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(Path(self.tokenizer_path).resolve())}

    def build_corpus(self) -> str:
        """The folder of a corpus that the script makes of Python files that are here, in a dry run."""
        source = ROOT / "tests" if self.cpu else Path(sysconfig.get_paths()["stdlib"])
        settings = {"TEXT_FILES": f"{source}/*.py", "DRY_RUN": 1, "RUN_ID": self.new_run_id("corpus")}
        run = self.launch([sys.executable, str(self.script)], self.sizes | settings)
        run.check()
        folder = run.text(r"data path:(\S+)")
        if folder is None:
            raise RunFailed("the script's log names no folder behind `data path:`")
        return str(self.folder / folder)

    def with_few_windows(self, folder: Path) -> Path:
        """A copy of a data folder whose validation split has SMALL_WINDOWS windows."""
        small = self.folder / "small"
        shutil.rmtree(small, ignore_errors=True)
        small.mkdir()
        for path in folder.glob("fineweb_train_*.bin"):
            (small / path.name).symlink_to(path)
        for path in sorted(folder.glob("fineweb_val_*.bin"))[:1]:
            header = path.read_bytes()[:1024]
            magic, version, tokens = struct.unpack("<iii", header[:12])
            kept = min(tokens, SMALL_WINDOWS * self.sizes.get("TRAIN_SEQ_LEN", 2048) + 1)
            body = path.read_bytes()[1024 : 1024 + 2 * kept]
            (small / path.name).write_bytes(struct.pack("<iii", magic, version, kept) + header[12:] + body)
        return small

    def probe(self, part: str) -> Run:
        """A part of the probe that needs no script."""
        run = self.launch([sys.executable, str(PROBE), *(["--cpu"] if self.cpu else []), part], {})
        run.check()
        return run


# ---- Stages ----------------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """What no program can beat on this card."""
    run = bench.probe("ceilings")
    product, copy = run.number("ceilings", "product_tflops"), run.number("ceilings", "copy_gb_per_s")
    bench.figure("product_tflops", product)
    bench.figure("copy_gb_per_s", copy)
    bench.keep(product_tflops=product)


def train_and_score(bench: Bench, name: str, torchrun: bool, **settings: Any) -> None:
    """Train for `bench.cap` seconds, export, score; figures of all of it. If nothing compiles, once more without."""
    step_ms = 40 if bench.cpu else 90  # about; only the length of the warmdown depends on it
    settings |= {
        "MAX_WALLCLOCK_SECONDS": bench.cap,
        "WARMDOWN_ITERS": round(WARMDOWN_SHARE * 1000 * bench.cap / step_ms),
        "VAL_LOSS_EVERY": 0,
        "TRAIN_LOG_EVERY": 1 if bench.cpu else 10,
        "EVAL_FLOAT": 1,
    }
    run_id = bench.new_run_id(name)
    run = bench.run(run_id, settings, torchrun=torchrun)
    if run.code and "COMPILE" not in bench.sizes and not losses(run):
        bench.problems.append(f"failed before its first step, then tried COMPILE=0: {error_line(run.lines)}")
        run_id = bench.new_run_id(name)
        run = bench.run(run_id, settings | {"COMPILE": 0}, torchrun=torchrun)
        if losses(run):  # so it was compiling that failed
            bench.sizes["COMPILE"] = 0
            bench.keep(sizes={"COMPILE": 0})
    note_training(bench, run, run_id)
    note_score(bench, run)
    run.check()
    bench.keep(**{name: {"run_id": run_id, "val_bpb": run.text(r"final_sliding .*val_bpb:(\S+)")}})


def note_training(bench: Bench, run: Run, run_id: str) -> None:
    """Figures of a run up to its last step, and of what it did with the weights afterwards."""
    bench.figure("compile_warm_up_s", run.number("warm_up", "time"))
    times = step_times(run.lines)
    milliseconds = times.plain or times.quantized  # only the latter where quantization starts with step 0
    bench.figure("ms_per_step", milliseconds)
    bench.figure("ms_per_step_qat", times.quantized)
    tflop = step_tflop(run, config_of(bench.log_of(run_id)))
    if milliseconds and tflop:
        tflops = 1000 * tflop / milliseconds
        bench.figure("tflops", tflops)
        if bench.state.get("product_tflops"):
            bench.figure("share_of_ceiling", tflops / bench.state["product_tflops"])
    bench.figure("peak_gb", run.number("training stopped", "peak_memory_bytes", 1e-9))
    bench.figure("calibration_s", run.number("calibration", "time"))
    bench.figure("qat_switch_s", times.switch)
    bench.figure("plan_s", run.number("plan step", "time"))
    bench.figure("choice_s", run.number("export weights", "time"))
    rounds = [numbers(run.lines, "artifact round", f"{part}_time") for part in ("plan", "rounding", "zstd")]
    for i, parts in enumerate(zip(*rounds, strict=False)):
        bench.figure(f"export_round_{i}_s", sum(parts) / 1000)
    trained = run.number("training stopped", "train_time", 1e-3)
    bench.figure("steps", run.number("training stopped", "step"))
    bench.figure("over_cap_s", trained and trained - bench.cap)
    if bench.sizes.get("COMPILE") != 0:
        note_recompiles(bench, run)


def note_recompiles(bench: Bench, run: Run) -> None:
    """A training step that compiles again costs the run a minute."""
    if not losses(run):
        return
    repeated = recompiles(run.lines)
    bench.figure("recompiles", repeated)
    if repeated:
        bench.problems.append(f"{repeated} recompiles in training steps after the warm-up")


def note_score(bench: Bench, run: Run) -> None:
    """Figures of the artifact and its evaluation."""
    bench.figure("artifact_bytes", run.text(r"artifact .*artifact_bytes:(\d+) limit:"))
    bench.figure("val_bpb", run.text(r"final_sliding .*val_bpb:(\S+)"))
    final, unrounded = run.number("final_sliding", "val_bpb"), run.number("float_sliding", "val_bpb")
    if final and unrounded:
        bench.figure("quantization_gap", f"{final - unrounded:+.5f}")
    targets, seconds = run.number("data path", "val_targets"), run.number("final_sliding", "eval_time", 1e-3)
    if targets and seconds:
        bench.figure("sliding_tokens_per_s", targets / seconds)
        bench.figure("eval_s_8gpu_compiling", FINEWEB_TARGETS / RECORD_GPUS * seconds / targets)


def runs(bench: Bench) -> None:
    """The default, full-size, as one of 8 ranks has it."""
    planned = bench.run(bench.new_run_id("plan"), {"DRY_RUN": 1}, torchrun=False)
    bench.figure("planned_gb", planned.number("plan rank_memory_bytes", "all", 1e-9))
    if planned.code:
        bench.problems.append(f"dry run: {error_line(planned.lines)}")
    if bench.cpu and bench.compile_on_cpu:
        compiled_on_cpu(bench)
    settings = {"QAT_START_FRAC": TOY_QAT_START} if bench.cpu else {}
    train_and_score(bench, "default", torchrun=True, **settings)


def compiled_on_cpu(bench: Bench) -> None:
    """Compile one layer and train 20 steps, half of them under fake quantization: all that a CPU has time for."""
    settings = {"COMPILE": 1, "NUM_LAYERS": 1, "ITERATIONS": 20, "QAT_START_FRAC": 0.5, "TRAIN_LOG_EVERY": 1}
    run = bench.run(bench.new_run_id("compiled"), settings, until=lambda lines: lines[-1].startswith("step:20/"))
    run.check()
    bench.figure("compile_s", run.number("warm_up", "time"))
    note_recompiles(bench, run)


def again(bench: Bench) -> None:
    """The stored model in a fresh process, a killed run, a smaller file."""
    scored = bench.state.get("default")
    whole = evaluate_again(bench, scored) if scored else None
    resumed = kill_and_resume(bench)
    if not scored:
        evaluate_again(bench, resumed, small=True)
    exported = export_smaller(bench, scored or resumed)
    if whole:
        note_evaluation_rate(bench, whole, exported)


def evaluate_again(bench: Bench, scored: dict[str, str], small: bool = False) -> Run:
    """EVAL_ARTIFACT must give the score that the training run gave, to the last digit."""
    artifact = bench.log_of(scored["run_id"], "ptz")
    settings = {"EVAL_ARTIFACT": artifact}
    run = bench.run(bench.new_run_id("scored"), settings, small=small, torchrun=not bench.cpu)
    run.check()
    found = run.text(r"final_sliding .*val_bpb:(\S+)")
    bench.figure("same_score", int(found == scored["val_bpb"]))
    if found != scored["val_bpb"]:
        bench.problems.append(f"EVAL_ARTIFACT scores {found}, the training run had {scored['val_bpb']}")
    return run


def kill_and_resume(bench: Bench) -> dict[str, str]:
    """Kill a run with SIGKILL, resume it, and compare the losses of the steps that were trained twice."""

    def three_steps_after_a_checkpoint(lines: list[str]) -> bool:
        saved = next((i for i, line in enumerate(lines) if line.startswith("checkpoint path:")), len(lines))
        return sum(line.startswith("step:") for line in lines[saved:]) >= 3

    run_id, iterations = bench.new_run_id("killed"), 40
    settings = {
        "ITERATIONS": iterations,
        "MAX_WALLCLOCK_SECONDS": 0,
        "WARMDOWN_ITERS": iterations // 2,
        "WARMUP_STEPS": 2,
        "CHECKPOINT_EVERY": 0.2 if bench.cpu else 1,
        "TRAIN_LOG_EVERY": 1,
        "VAL_LOSS_EVERY": 0,
    }
    killed = bench.run(run_id, settings, small=True, until=three_steps_after_a_checkpoint)
    killed.check()
    before = losses(killed)
    bench.figure("killed_at_step", max(before, default=0))
    resumed = bench.run(run_id, settings | {"RESUME": 1}, small=True)
    resumed.check()
    after = losses(resumed)
    bench.figure("resumed_at_step", resumed.number("resume checkpoint", "step"))
    bench.figure("ended_at_step", max(after, default=0))
    twice = before.keys() & after.keys()
    bench.figure("steps_trained_twice", len(twice))
    if not twice or min(after) == 1 or max(after) != iterations:
        bench.problems.append(f"resumed run trained steps {min(after, default=0)} to {max(after, default=0)}")
    else:
        bench.figure("losses_apart", max(abs(after[step] / before[step] - 1) for step in twice))
    return {"run_id": run_id, "val_bpb": resumed.text(r"final_sliding .*val_bpb:(\S+)") or "none"}


def export_smaller(bench: Bench, trained: dict[str, str]) -> Run:
    """The same weights with 15% less for the model: EXPORT_FROM keeps to the limit."""
    code_bytes = bench.script.stat().st_size
    limit = code_bytes + round(0.85 * bench.log_of(trained["run_id"], "ptz").stat().st_size)
    settings = {"EXPORT_FROM": bench.log_of(trained["run_id"], "weights"), "ARTIFACT_LIMIT_BYTES": limit}
    run = bench.run(bench.new_run_id("smaller"), settings, small=True, torchrun=not bench.cpu)
    run.check()
    bench.figure("smaller_limit", str(limit))
    bench.figure("smaller_bytes", run.text(r"artifact .*artifact_bytes:(\d+) limit:"))
    bench.figure("smaller_bpb_of_few_windows", run.text(r"final_sliding .*val_bpb:(\S+)"))
    return run


def note_evaluation_rate(bench: Bench, whole: Run, part: Run) -> None:
    """Speed of sliding evaluation without start and compiling, which two evaluations of different sizes share."""
    targets = [run.number("data path", "val_targets") or 0.0 for run in (whole, part)]
    seconds = [run.number("final_sliding", "eval_time", 1e-3) or 0.0 for run in (whole, part)]
    if targets[0] > targets[1] and seconds[0] > seconds[1]:
        rate = (targets[0] - targets[1]) / (seconds[0] - seconds[1])
        bench.figure("sliding_tokens_per_s", rate)
        bench.figure("eval_s_8gpu", FINEWEB_TARGETS / RECORD_GPUS / rate)


def pr314(bench: Bench) -> None:
    """The literal design, for the seconds that the default had."""
    train_and_score(bench, "pr314", torchrun=not bench.cpu, RECIPE="pr314")


def profile(bench: Bench) -> None:
    """Kernels of the training step, attention alone, and one setting of Inductor."""
    warm_up, timed = (2, 20) if bench.cpu else (10, 40)
    settings: dict[str, Any] = {"WARMUP_STEPS": warm_up, "MAX_WALLCLOCK_SECONDS": 0, "TRAIN_LOG_EVERY": 10}
    settings["TORCHINDUCTOR_MIX_ORDER_REDUCTION"] = 1
    watch = ("--profile-after", str(warm_up + timed + 5))
    with_setting = bench.run(bench.new_run_id("profiled"), settings, probe=watch)
    with_setting.check()
    bench.figure("ms_per_step", step_times(with_setting.lines).plain)
    wall, busy = with_setting.number("profile", "wall_ms"), with_setting.number("profile", "busy_ms")
    bench.figure("device_busy_share", wall and busy and busy / wall)
    attention = bench.probe("attention")
    for line in attention.lines:
        if match := re.match(r"attention kernel:(\w+) forward_ms:\S+ both_ms:(\S+)", line):
            bench.figure(f"attention_{match[1]}_ms", match[2])
    if bench.cpu or with_setting.text(r"probe mix_order_reduction:(\w+)") == "none":
        bench.say("mix_order_reduction: no such setting here, or nothing is compiled for it")
        return
    settings["TORCHINDUCTOR_MIX_ORDER_REDUCTION"] = 0

    def timed_out(lines: list[str]) -> bool:
        return lines[-1].startswith(f"step:{timed}/")

    without = bench.run(bench.new_run_id("unmixed"), settings, probe=watch, until=timed_out)
    without.check()
    found = [run.text(r"probe mix_order_reduction:(\w+)") for run in (with_setting, without)]
    if found != ["1", "0"]:
        raise RunFailed(f"mix_order_reduction was {found}, not on and off: the script sets it itself")
    bench.figure("ms_per_step_without_mix_order", step_times(without.lines).plain)


def memory(bench: Bench, gigabytes: int = 20) -> None:
    """A run on a GPU with less memory: it ends, or says which MICRO_BATCH_TOKENS would."""
    if bench.cpu:
        raise StageSkipped("needs CUDA")
    settings = {"ITERATIONS": 6, "WARMUP_STEPS": 2, "MAX_WALLCLOCK_SECONDS": 0, "WARMDOWN_ITERS": 3}
    while True:
        run_id = bench.new_run_id(f"memory{settings.get('MICRO_BATCH_TOKENS', '')}")
        run = bench.run(run_id, settings, small=True, probe=("--memory-gb", str(gigabytes)))
        taken = int(run.number("batch", "micro_batch_tokens") or settings.get("MICRO_BATCH_TOKENS", RANK_TOKENS))
        if run.code == 0 or not any("out of memory" in line.lower() for line in run.lines):
            break
        bench.figure("out_of_memory_with", taken)
        advised = run.text(r"error.*MICRO_BATCH_TOKENS=(\d+)")
        if advised is None:
            bench.problems.append("the message names no MICRO_BATCH_TOKENS that would fit")
        settings["MICRO_BATCH_TOKENS"] = int(advised or taken // 2)
        if not 0 < settings["MICRO_BATCH_TOKENS"] < taken:
            raise RunFailed(f"out of memory with {taken}, and told to take {settings['MICRO_BATCH_TOKENS']}")
    run.check()
    bench.figure("micro_batch_tokens", taken)
    bench.figure("peak_gb", run.number("training stopped", "peak_memory_bytes", 1e-9))


class Stage(NamedTuple):
    """A stage: its time is in proportion to these seconds, with which 5 and 4 minutes (CPU: 3) come out even."""

    number: int
    name: str
    question: str
    work: Callable[[Bench], None]
    gpu_seconds: float
    cpu_seconds: float
    headlines: tuple[str, ...]  # figures that the table shows


TRAINED = (
    "compile_warm_up_s ms_per_step share_of_ceiling peak_gb recompiles over_cap_s val_bpb quantization_gap "
    "artifact_bytes"
)
AGAIN = "same_score killed_at_step resumed_at_step losses_apart smaller_bytes eval_s_8gpu"
PROFILED = "ms_per_step device_busy_share attention_pytorch_choice_ms ms_per_step_without_mix_order"
STAGES = (
    Stage(1, "ceilings", "what the card can do", ceilings, 15, 20, ("product_tflops", "copy_gb_per_s")),
    Stage(2, "runs", "the default runs", runs, 190, 95, tuple(TRAINED.split())),
    Stage(3, "again", "the same score again", again, 95, 45, tuple(AGAIN.split())),
    Stage(4, "pr314", "the literal design beside it", pr314, 135, 15, tuple(TRAINED.split())),
    Stage(5, "profile", "what bounds the step", profile, 60, 20, tuple(PROFILED.split())),
    Stage(6, "memory", "20 GB are enough", memory, 45, 1, ("micro_batch_tokens", "peak_gb")),
)


# ---- Limits and table ------------------------------------------------------------------------------------------------


def limits(stages: list[Stage], minutes: float, cpu: bool) -> list[float]:
    """Seconds of each stage, in all a little less than the minutes given."""
    wanted = [stage.cpu_seconds if cpu else stage.gpu_seconds for stage in stages]
    return [SPENDABLE * 60 * minutes * seconds / sum(wanted) for seconds in wanted]


def training_cap(stages: list[Stage], seconds: list[float], cpu: bool) -> float:
    """Seconds of training in stages 2 and 4: what starting, compiling, exporting and scoring leave of stage 2."""
    share = 0.05 if cpu else 0.24
    given = {stage.number: limit for stage, limit in zip(stages, seconds, strict=True)}
    return round(max(2.0, share * given.get(2, given.get(4, 0.0))), 1)


def print_plan(stages: list[Stage], seconds: list[float], minutes: float, cap: float) -> None:
    """The limits, and until when each stage may run if those before it use all of theirs."""
    until = 0.0
    for stage, limit in zip(stages, seconds, strict=True):
        until += limit
        print(f"stage {stage.number} {stage.name:9} limit_s:{limit:.1f} until_s:{until:.1f} {stage.question}")
    print(f"all limit_s:{until:.1f} of {60 * minutes:g} s; {cap:g} s of training in stages 2 and 4")


def run_stage(bench: Bench, stage: Stage, seconds: float) -> bool:
    """Run one stage within its limit and write its file; whether it is ok or skipped."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    bench.begun, bench.problems = time.monotonic(), []
    bench.deadline = bench.begun + seconds
    with (bench.out / f"{stage.number}-{stage.name}.txt").open("w", encoding="utf-8") as bench.file:
        started = time.strftime("%Y-%m-%dT%H:%M:%S")
        bench.say(
            f"stage:{stage.number} {stage.name} started:{started} script_sha256:{bench.sha256} limit_s:{seconds:.1f}"
        )
        print(*bench.machine, sep="\n", file=bench.file, flush=True)
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
        try:
            stage.work(bench)
            result = f"failed: {'; '.join(bench.problems)}" if bench.problems else "ok"
        except OutOfTime:
            result = "; ".join(["over time", *bench.problems])
        except StageSkipped as reason:
            result = f"skipped: {reason}"
        except Exception as error:
            words = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
            result = f"failed: {'; '.join([words, *bench.problems])}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        bench.say(f"result seconds:{time.monotonic() - bench.begun:.1f} {result}")
    bench.file = sys.stdout
    return result == "ok" or result.startswith("skipped")


def table(out: Path) -> str:
    """Machine, figures and table of all stage files in a folder."""
    machines: dict[str, None] = {}
    sections = []
    rows = ["| stage | question | result | seconds | figures |", "|---|---|---|---:|---|"]
    for stage in STAGES:
        path = out / f"{stage.number}-{stage.name}.txt"
        if not path.is_file():
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        machines |= dict.fromkeys(line for line in lines if line.startswith(("machine ", "card ")))
        figures = dict(line.removeprefix("figure ").split(":", 1) for line in lines if line.startswith("figure "))
        ends = [match for line in lines if (match := re.match(r"result seconds:(\S+) (.*)", line))]
        seconds, result = ends[-1].groups() if ends else ("", "cut off")
        result = result.replace("|", "/")
        shown = " ".join(f"{name}:{figures[name]}" for name in stage.headlines if name in figures)
        rows.append(f"| {stage.number} {stage.name} | {stage.question} | {result} | {seconds} | {shown} |")
        sections += [f"- {stage.number} {stage.name}: " + " ".join(f"{k}:{v}" for k, v in figures.items())]
    return "\n".join(["# tests/gpu.py", "", *machines, "", *sections, "", *rows]) + "\n"


# ---- Main ------------------------------------------------------------------------------------------------------------


def install_missing(bench: Bench, wheels: Path | None) -> None:
    """Install packages that are missing into the work folder; SystemExit for one that no wheel is there for."""
    site = bench.folder / "site"
    sys.path.insert(0, str(site))
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    found = [str(path) for name in missing if wheels for path in sorted(wheels.glob(f"{name}-*.whl"))]
    if found:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
        subprocess.run([*pip, *found], check=True)
        importlib.invalidate_caches()
        missing = [name for name in missing if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"missing packages: {' '.join(missing)}. pip install them, or bring --wheels (see --help)")
    bench.environment["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def machine_lines(bench: Bench) -> list[str]:
    """What is installed and which card is there; SystemExit without a GPU, unless --cpu asks for none."""
    done = subprocess.run([sys.executable, PROBE, "machine"], env=bench.environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"PyTorch does not start:\n{done.stderr[-2000:]}")
    lines = done.stdout.splitlines()
    if "card none" in done.stdout and not bench.cpu:
        raise SystemExit("no CUDA device here; --cpu tries this program at toy sizes")
    if shutil.which("nvidia-smi") and not bench.cpu:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,temperature.gpu,power.draw", "--format=csv"]
        lines += subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return lines


def stage_numbers(text: str) -> list[Stage]:
    """The stages of `4`, `1-3` or `1,3-4`."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        chosen |= set(range(int(first), int(last or first) + 1))
    if not chosen or not chosen <= {stage.number for stage in STAGES}:
        raise argparse.ArgumentTypeError(f"{text}: stages are 1 to {len(STAGES)}, such as 1-3 or 2,4")
    return [stage for stage in STAGES if stage.number in chosen]


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder with fineweb_train_*.bin and fineweb_val_*.bin")
    parser.add_argument("--tokenizer", default="", help="the SentencePiece model of that data")
    parser.add_argument("--stages", type=stage_numbers, default=list(STAGES), help="such as 1-3 or 2,4 (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: 9)")
    parser.add_argument("--train-seconds", type=float, help="in stages 2 and 4 (default: sized to the minutes)")
    parser.add_argument("--out", default="", help="folder of the files")
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir(), "train-gpt-gpu")), help="scratch folder")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of packages that are missing")
    parser.add_argument("--script", default=str(ROOT / "train_gpt.py"), help="the script (default: this repository's)")
    parser.add_argument("--cpu", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="with --cpu: compile nothing")
    parser.add_argument("--plan", action="store_true", help="print the limits of the stages and stop")
    parser.add_argument("--table", type=Path, metavar="OUT", help="print the table of files that are there and stop")
    options = parser.parse_args(words)
    if bool(options.data) != bool(options.tokenizer):
        parser.error("--data and --tokenizer belong together")
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes {options.minutes} must be above 0")
    if not options.out and not options.plan and not options.table:
        parser.error("--out names the folder for the files")
    if not Path(options.script).is_file():
        parser.error(f"--script {options.script} is no file")
    if options.table and not any(options.table.glob("[1-6]-*.txt")):
        parser.error(f"--table {options.table} has no stage's file")
    return options


def main(words: list[str] | None = None) -> int:
    """Run the stages; the exit code is 0 if all are ok or skipped."""
    options = arguments(words)
    if options.table:
        print(table(options.table), end="")
        return 0
    begun = time.monotonic()
    seconds = limits(options.stages, options.minutes, options.cpu)
    cap = options.train_seconds or training_cap(options.stages, seconds, options.cpu)
    print_plan(options.stages, seconds, options.minutes, cap)
    if options.plan:
        return 0
    bench = Bench(options)
    install_missing(bench, options.wheels)
    bench.machine = machine_lines(bench)
    bench.cap = cap
    if any(stage.number == 2 for stage in options.stages):
        bench.keep(cap=cap)
    elif "cap" in bench.state and not options.train_seconds:
        bench.cap = bench.state["cap"]
        print(f"{bench.cap:g} s of training in stage 4, as stage 2 had")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are ended, too
    good = True
    deadline = begun
    for stage, limit in zip(options.stages, seconds, strict=True):
        deadline += limit  # what the stages before did not use is this one's
        good &= run_stage(bench, stage, deadline - time.monotonic())
        (bench.out / "table.md").write_text(table(bench.out), encoding="utf-8")
    print(f"\n{table(bench.out)}", end="")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
