"""Everything about the script that only a GPU can answer, in one command: does it run, how fast, in how much memory.

    python tests/gpu.py --data DIR --tokenizer FILE --stages 1-3 --minutes 5 --out OUT
    python tests/gpu.py --data DIR --tokenizer FILE --stages 4-6 --minutes 4 --out OUT
    python tests/gpu.py --cpu --minutes 3 --out OUT           all of it at toy sizes on a CPU, to try this program
    python tests/gpu.py --plan --stages 1-3 --minutes 5       only the time limit of each stage
    python tests/gpu.py --table OUT                           the table once more, from the files in OUT

Stages, in the order of their worth:

    1 ceilings   the card alone: a bf16 matrix product and a copy
    2 default    the full-size default on one GPU under torchrun: compiled, trained, exported, scored
    3 again      the stored model scored in a fresh process; a run killed and resumed; a smaller export
    4 pr314      RECIPE=pr314 for the same seconds on the same data
    5 profile    the most expensive kernels, attention by each kernel, Inductor's mix_order_reduction on and off
    6 memory     a run limited to 20 GB

A stage that fails or runs over its limit costs its own line of the table; the next one starts, and has the time that is
left over, too. The exit code is 0 if all stages are ok or skipped, else 1.

Files in OUT, seven at most, each complete up to where the program stopped:

    1-ceilings.txt 2-default.txt 3-again.txt 4-pr314.txt 5-profile.txt 6-memory.txt
                 of each stage asked for: machine, commands, their output with seconds since the stage's start, figures
    table.md     the figures of all stages in OUT, and the table, which is also the last thing printed

On a machine rented by the minute:

1. Bring `train_gpt.py`, `tests/` and a folder `data` with two training shards, a validation shard and the tokenizer.
   Shards are cut to some 9 million tokens, that for validation to less than a million, so that all of it is 40 MB: the
   header of 1,024 bytes (its third int32 is the number of tokens), then the tokens as uint16. Without `--data` the
   script makes a corpus of the standard library's Python files (with `--cpu`: of `tests/`). That is enough for every
   time, but its scores compare with nothing else.
2. It needs PyTorch 2.9 or newer for CUDA, numpy, sentencepiece and zstandard. Where there is no network, bring what is
   missing as a wheel, and install it there:
       pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \\
           -d data zstandard==0.25.0
       pip install --no-index --no-deps --target site data/*.whl && export PYTHONPATH=$PWD/site
3. Run stages 1 to 3 and right after them 4 to 6 on the same machine: they share the compile cache in the work folder
   (`--work`), and stage 4 trains as long as stage 2 did. A call ends within its `--minutes`; where a command may take
   ten minutes, one can hold both calls, joined by `;` since a failed stage is exit code 1. In five minutes, stage 2
   trains for 24 s (`--train-seconds`); most of the rest is starting and compiling, which nobody has timed yet. A stage
   that ran out of time can run again alone and finds what is compiled; its file is written anew.
4. Bring OUT back and commit its files as they are, in a folder gpu under logs/. If OUT was emptied between the calls,
   put all files into one folder and make the table again with `--table`.

The script is used through its command line, `logs/RUN_ID.txt`, `.ptz` and `.weights`, and these parts of its log:

    config {JSON}                               in the file alone       sizes, for the FLOPs of a step
    artifact category:attn params:, mlp, embed                          likewise
    data path: val_targets:                                             a built corpus; speed of evaluation
    batch micro_batch_tokens:                                           micro-batch that the script took
    warm_up time: peak_memory_bytes: end_time:  in a dry run, too       compile and warm-up seconds, memory, rehearsal
    step:N/M train_loss: train_time:                                    step time, loss
    qat active: step: time:                                             cost of the switch to fake quantization
    checkpoint path:, resume checkpoint: step:                          resume
    export weights: time:                                               choice of weights
    training stopped: step: train_time:                                 clock
    artifact round: time:                                               export
    artifact path: artifact_bytes: limit:                               size
    float_sliding val_bpb:, final_sliding val_bpb: eval_time:           score
    error: ... set MICRO_BATCH_TOKENS=N         out of memory           advice that stage 6 takes; without, half

Times stand there in milliseconds (`time:123ms`). A dry run warms up on CUDA alone, where it compiles all that a run
trains with: what stage 2 trains after its dry run finds that in the compile cache.

A line that a rewrite drops is a figure less. Stage 5 also expects one step of `torch.optim.AdamW` per training step.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
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
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from processes import adopt_orphans, kill_below_this_process
from run_log import OutOfTime, Run, RunFailed, error_line, numbers, recompiles, step_times

ROOT = Path(__file__).resolve().parent.parent
PROBE = Path(__file__).with_name("gpu_probe.py")
PACKAGES = ("torch", "numpy", "sentencepiece", "zstandard")

RANK_TOKENS = 98_304  # of a step of 786,432 on 8 GPUs
FINEWEB_TARGETS = 62_000_000  # of the challenge's validation split
RECORD_GPUS = 8
SMALL_WINDOWS = 32  # of the validation data where the score does not matter
SHARD_HEADER_BYTES = 1024  # of a file of tokens: magic, version and number of tokens as int32, then zeros

USABLE_SHARE = 0.95  # of the minutes given; the rest is for starting and ending the program
GPU_TRAINING_SHARE = 0.125  # of stage 2, a guess: the rest is starting, compiling, exporting and scoring
CPU_TRAINING_SHARE = 0.05  # likewise, measured on 2 cores
LEAST_TRAINING_SECONDS = 2.0
TOY_VOCAB_SIZE = 512  # of a corpus that is built; other data has the default's 1,024
TOY_ITERATIONS = 45  # on a CPU, whatever a step takes there, if the time allows
START_SECONDS = 60  # at most, for PyTorch to start and name the card before the first stage

MEMORY_TRIES = 4  # 98,304 tokens a micro-batch, and the next three halves
SMALLER_MODEL = 0.85  # of the model's bytes, for the second export
LARGEST_LOSS_DIFFERENCE = 0.01  # of a step trained again after a resume; kernels that add in another order do less

# Validation in batches of 2: a split of SMALL_WINDOWS then has the shapes of the whole one and compiles nothing anew.
GPU_SETTINGS = {"TRAIN_BATCH_TOKENS": RANK_TOKENS, "VAL_BATCH_SIZE": 2 * 2048}
TOY_SETTINGS = {
    "NUM_LAYERS": 2, "MODEL_DIM": 64, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "BIGRAM_VOCAB_SIZE": 512,
    "TRAIN_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 256, "CALIBRATION_TOKENS": 2048, "WARMUP_STEPS": 2, "COMPILE": 0,
}  # fmt: skip
# In a short run the defaults (0.92 and 50) would leave few steps under fake quantization, and no average of them.
SHORT_RUN = {"QAT_START_FRAC": 0.75, "SWA_EVERY": 5}
TOY_MODEL_BYTES = 250_000  # RECIPE=pr314, which has fixed bits, takes 170,000, with 1,024 pieces 240,000

Settings = Mapping[str, Any]  # environment variables
Until = Callable[[list[str]], bool]  # whether a run has printed enough


class StageSkipped(RuntimeError):
    """The stage makes no sense on this machine; the message says why."""


class StageLog:
    """The file of a stage, its time limit, and what is wrong with its answers."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.begun = time.monotonic()
        self.deadline = self.begun + seconds
        self.problems: list[str] = []  # the stage goes on in spite of them, but is not ok

    def seconds(self) -> float:
        """Since the stage's start."""
        return time.monotonic() - self.begun

    def set_alarm(self) -> None:
        """Have SIGALRM come at the deadline."""
        signal.setitimer(signal.ITIMER_REAL, max(0.001, self.deadline - time.monotonic()))

    def write(self, line: str) -> None:
        """A line for the file."""
        print(line, file=self.file, flush=True)

    def say(self, line: str) -> None:
        """A line for the file and the console."""
        self.write(line)
        print(line, flush=True)

    def figure(self, name: str, value: float | str | None) -> None:
        """Note what was measured; None, for what a log does not show, is no figure."""
        if value is not None:
            self.say(f"figure {name}:{value if isinstance(value, str) else format(value, '.5g')}")


# ---- One call of this program ----------------------------------------------------------------------------------------


class Session:
    """The script, its data and settings, the folders of this call, and how a run is started."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.cpu: bool = options.cpu
        self.compile_on_cpu: bool = options.compile
        self.train_seconds: float = options.train_seconds  # in stages 2 and 4
        self.script = Path(options.script).resolve()
        self.data_path = str(Path(options.data).resolve()) if options.data else ""
        self.tokenizer_path = str(Path(options.tokenizer).resolve()) if options.tokenizer else ""
        self.out = Path(options.out)
        self.folder = Path(options.work).resolve() / ("cpu" if options.cpu else "gpu")
        self.out.mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        source = self.script.read_bytes()
        self.script_sha256 = hashlib.sha256(source).hexdigest()
        self.settings: dict[str, Any] = dict(TOY_SETTINGS if options.cpu else GPU_SETTINGS)
        if options.cpu:
            self.settings["ARTIFACT_LIMIT_BYTES"] = len(source) + TOY_MODEL_BYTES
        if options.cpu and not options.data:
            self.settings["VOCAB_SIZE"] = TOY_VOCAB_SIZE
        # What stages leave to later ones, also to those of a later call with the same script and data.
        key = hashlib.sha256(f"{self.script_sha256} {self.data_path} {self.tokenizer_path}".encode()).hexdigest()
        self.state_path = self.folder / f"state-{key[:12]}.json"
        self.state: dict[str, Any] = json.loads(self.state_path.read_text()) if self.state_path.is_file() else {}
        if "corpus" in self.state:
            self.use_corpus(self.state["corpus"])
        self.environment = dict(os.environ) | {
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "TORCH_LOGS": "recompiles",
            "PYTHONUNBUFFERED": "1",
        }
        if options.cpu:
            self.environment["CUDA_VISIBLE_DEVICES"] = ""
        self.run_numbers = itertools.count(1)
        self.machine: list[str] = []  # lines on what is installed, and the card
        self.log: StageLog  # of the current stage

    def keep(self, **values: Any) -> None:
        """Leave something to later stages."""
        self.state |= values
        scratch = self.state_path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.state))
        scratch.replace(self.state_path)

    def new_run_id(self, name: str) -> str:
        """A name that no run in the work folder has."""
        return f"{name}-{time.strftime('%H%M%S')}-{os.getpid()}-{next(self.run_numbers)}"

    def run_file(self, run_id: str, ending: str) -> Path:
        """A file that the script writes for a run."""
        return self.folder / "logs" / f"{run_id}.{ending}"

    def launch(self, command: list[str], settings: Settings, until: Until | None = None) -> Run:
        """Run a command in the work folder until it ends, `until` holds for its lines, or the stage's time is up."""
        if time.monotonic() >= self.log.deadline:
            raise OutOfTime
        texts = {name: str(value) for name, value in settings.items()}
        words = [f"{name}={value}" for name, value in texts.items()] + command
        self.log.write(f"$ {' '.join(map(shlex.quote, words))}")
        run = Run()
        begun = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment | texts,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                run.lines.append(line.rstrip("\n"))
                self.log.write(f"[{self.log.seconds():6.1f}] {run.lines[-1]}")
                if until and until(run.lines):
                    break
            else:
                run.code = process.wait()
        except OutOfTime:
            run.out_of_time = True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)  # no alarm while processes are ended
            kill_below_this_process()
            process.poll()
            process.stdout.close()
            if not run.out_of_time:
                self.log.set_alarm()
        name = texts.get("RUN_ID") or next(word for word in reversed(command) if not word.startswith("-"))
        self.log.say(f"ended {name} exit_code:{run.code} seconds:{time.monotonic() - begun:.1f}")
        return run

    def run(
        self,
        run_id: str,
        settings: Settings,
        *,
        torchrun: bool | None = None,
        small: bool = False,
        until: Until | None = None,
    ) -> Run:
        """The script as a user starts it; `small`: on little validation data.

        Under torchrun, except (`torchrun` None) on a CPU: there its start takes as long as a toy run.
        """
        command = [sys.executable]
        if torchrun or (torchrun is None and not self.cpu):
            command += ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", "--nproc_per_node=1"]
        return self.launch([*command, str(self.script)], self.all_settings(run_id, settings, small), until)

    def run_in_probe(
        self, run_id: str, settings: Settings, options: list[str], *, small: bool = False, until: Until | None = None
    ) -> Run:
        """The script inside gpu_probe.py, which profiles or limits it."""
        command = [sys.executable, str(PROBE), "script", str(self.script), *options]
        return self.launch(command, self.all_settings(run_id, settings, small), until)

    def probe(self, part: str) -> Run:
        """A part of the probe that needs no script."""
        run = self.launch([sys.executable, str(PROBE), part, *(["--cpu"] if self.cpu else [])], {})
        run.check()
        return run

    def all_settings(self, run_id: str, settings: Settings, small: bool) -> dict[str, Any]:
        """Sizes, data, what is special about this run, and its name."""
        return self.settings | self.prepare_data(small) | dict(settings) | {"RUN_ID": run_id}

    def prepare_data(self, small: bool) -> dict[str, str]:
        """Where shards and tokenizer are."""
        if not self.data_path:
            self.dry_run({"WARMUP_STEPS": 0})
        folder = self.with_few_windows(Path(self.data_path)) if small else self.data_path
        return {"DATA_PATH": str(folder), "TOKENIZER_PATH": self.tokenizer_path}

    def use_corpus(self, folder: str) -> None:
        """Train on a corpus that the script has built; there is no --data then."""
        self.data_path, self.tokenizer_path = folder, f"{folder}/tokenizer.model"

    def dry_run(self, special: Settings) -> Run:
        """The script's dry run. Where there is no data it builds the corpus, of Python files that are here."""
        run_id = self.new_run_id("plan")
        if self.data_path:
            return self.run(run_id, dict(special) | {"DRY_RUN": 1}, torchrun=False)
        source = ROOT / "tests" if self.cpu else Path(sysconfig.get_paths()["stdlib"])
        settings = {"TEXT_FILES": f"{source}/*.py", "DRY_RUN": 1, "RUN_ID": run_id}
        run = self.launch([sys.executable, str(self.script)], self.settings | dict(special) | settings)
        folder = run.text(r"data path:(\S+)")
        if folder is None:
            run.check()
            raise RunFailed("the script's log names no folder behind `data path:`")
        self.keep(corpus=str(self.folder / folder))
        self.use_corpus(self.state["corpus"])
        return run

    def with_few_windows(self, folder: Path) -> Path:
        """A folder with the same training shards, whose validation split has SMALL_WINDOWS windows."""
        small = self.folder / "small"
        shutil.rmtree(small, ignore_errors=True)
        small.mkdir()
        for path in folder.glob("fineweb_train_*.bin"):
            (small / path.name).symlink_to(path)
        for path in sorted(folder.glob("fineweb_val_*.bin"))[:1]:
            content = path.read_bytes()
            magic, version, tokens = struct.unpack_from("<iii", content)
            kept = min(tokens, SMALL_WINDOWS * self.settings.get("TRAIN_SEQ_LEN", 2048) + 1)
            header = struct.pack("<iii", magic, version, kept).ljust(SHARD_HEADER_BYTES, b"\0")
            body = content[SHARD_HEADER_BYTES : SHARD_HEADER_BYTES + 2 * kept]  # uint16
            (small / path.name).write_bytes(header + body)
        return small


# ---- Stages ----------------------------------------------------------------------------------------------------------


def ceilings(session: Session) -> None:
    """What no program can beat on this card."""
    run = session.probe("ceilings")
    product = run.number("ceilings", "product_tflops")
    session.log.figure("product_tflops", product)
    session.log.figure("copy_gb_per_s", run.number("ceilings", "copy_gb_per_s"))
    session.keep(product_tflops=product)


def default(session: Session) -> None:
    """The full-size default with the tokens that one of 8 ranks gets."""
    session.keep(default=None)  # of an earlier call
    planned = session.dry_run({})
    session.log.figure("first_compile_warm_up_s", planned.number("warm_up", "time", 1e-3))
    session.log.figure("dry_run_peak_gb", planned.number("warm_up", "peak_memory_bytes", 1e-9))
    if planned.code:
        session.log.problems.append(f"dry run: {error_line(planned.lines)}")
    if session.cpu and session.compile_on_cpu:
        compile_on_cpu(session)
    train_and_score(session, "default", SHORT_RUN, torchrun=True)


def compile_on_cpu(session: Session) -> None:
    """Compile one layer and train 20 steps, half of them under fake quantization: all that a CPU has time for."""
    settings = {"COMPILE": 1, "NUM_LAYERS": 1, "ITERATIONS": 20, "QAT_START_FRAC": 0.5, "TRAIN_LOG_EVERY": 1}
    run = session.run(session.new_run_id("compiled"), settings, torchrun=True, until=has_trained(20))
    run.check()
    session.log.figure("compile_s", run.number("warm_up", "time", 1e-3))
    note_recompiles(session.log, run)


def has_trained(step: int) -> Until:
    """Whether the last line is that of this step."""
    return lambda lines: lines[-1].startswith(f"step:{step}/")


def train_and_score(session: Session, name: str, special: Settings, torchrun: bool | None = None) -> None:
    """Train for `train_seconds`, export, score; figures of all of it. What compiling spoils is tried without."""
    settings = {
        "MAX_WALLCLOCK_SECONDS": session.train_seconds,
        "WARMDOWN_ITERS": -1,  # as WARMDOWN_FRAC says
        "VAL_LOSS_EVERY": 0,
        "TRAIN_LOG_EVERY": 1 if session.cpu else 10,
        "EVAL_FLOAT": 1,
    } | dict(special)
    if session.cpu:
        settings["ITERATIONS"] = TOY_ITERATIONS
    run_id = session.new_run_id(name)
    run = session.run(run_id, settings, torchrun=torchrun)
    if not run.losses() and failed_to_compile(session, run):
        session.log.problems.append(f"failed to compile, then tried COMPILE=0: {error_line(run.lines)}")
        session.settings["COMPILE"] = 0  # for later stages, too
        run_id = session.new_run_id(name)
        run = session.run(run_id, settings, torchrun=torchrun)
    note_training(session, run, run_id)
    note_score(session.log, run)
    weights = session.run_file(run_id, "weights")
    if weights.is_file() and failed_to_compile(session, run):
        session.settings["COMPILE"] = 0
        exported = session.run(session.new_run_id(name), {"EXPORT_FROM": weights}, torchrun=torchrun)
        note_score(session.log, exported)
    run.check()
    found = {"run_id": run_id, "val_bpb": score_of(run), "train_seconds": session.train_seconds}
    session.keep(**{name: found})


def failed_to_compile(session: Session, run: Run) -> bool:
    """Whether a compiled run failed, and its output speaks of the compiler, not of memory."""
    if session.settings.get("COMPILE") == 0 or not run.code or is_out_of_memory(run):
        return False
    return any(re.search("dynamo|inductor|triton", line, re.IGNORECASE) for line in run.lines)


def is_out_of_memory(run: Run) -> bool:
    """Whether a failed run says so: PyTorch, or the script, which names a smaller micro-batch."""
    return bool(run.code) and any(re.search("out of memory|set MICRO_BATCH_TOKENS=", line, re.I) for line in run.lines)


def score_of(run: Run) -> str:
    """The final bits per byte as they are printed; RunFailed without any."""
    found = run.text(r"final_sliding .*val_bpb:(\S+)")
    if found is None:
        raise RunFailed("the run ended without its `final_sliding` line")
    return found


def note_training(session: Session, run: Run, run_id: str) -> None:
    """Figures of a run up to its last step, and of what it did with the weights afterwards."""
    log = session.log
    log.figure("compile_warm_up_s", run.number("warm_up", "time", 1e-3))
    times = step_times(run.lines)
    milliseconds = times.plain or times.quantized  # only the latter where quantization starts with step 0
    log.figure("ms_per_step", milliseconds)
    log.figure("ms_per_step_qat", times.quantized)
    tflop = step_tflop(run, config_of(session.run_file(run_id, "txt")))
    if milliseconds and tflop:
        tflops = 1000 * tflop / milliseconds
        log.figure("tflops", tflops)
        ceiling = session.state.get("product_tflops")
        log.figure("share_of_ceiling", tflops / ceiling if ceiling else None)
    log.figure("micro_batch_tokens", run.number("batch", "micro_batch_tokens"))
    note_peak_memory(log, run)
    log.figure("end_rehearsed_s", run.number("warm_up", "end_time", 1e-3))
    log.figure("qat_switch_s", run.number("qat active", "time", 1e-3))
    log.figure("choice_s", run.number("export weights", "time", 1e-3))
    for i, milliseconds in enumerate(numbers(run.lines, "artifact round", "time")):
        log.figure(f"export_round_{i}_s", milliseconds / 1000)
    log.figure("steps", run.number("training stopped", "step"))
    trained = run.number("training stopped", "train_time", 1e-3)
    if trained is not None:
        log.figure("over_cap_s", trained - session.train_seconds)
    if session.settings.get("COMPILE") != 0:
        note_recompiles(log, run)


def note_peak_memory(log: StageLog, run: Run) -> None:
    """The most that PyTorch's allocator has held, which a CPU's log gives as 0."""
    log.figure("peak_gb", run.number("warm_up", "peak_memory_bytes", 1e-9) or None)


def step_tflop(run: Run, config: dict[str, Any]) -> float | None:
    """TFLOP of a training step: per token 6 for each weight in a product, and 6 * layers * width * length of attention.

    The tied embedding counts as the output head; the lookup of embeddings and the projection of bigrams do not count.
    Counted here, so that versions of the script can be compared by it whatever they log themselves.
    """
    attn, mlp, embed = (run.number(f"artifact category:{kind}", "params") for kind in ("attn", "mlp", "embed"))
    if attn is None or mlp is None or embed is None or not config:
        return None
    attention = config["num_layers"] * config["model_dim"] * config["train_seq_len"]
    return 6e-12 * config["train_batch_tokens"] * (attn + mlp + embed + attention)


def config_of(path: Path) -> dict[str, Any]:
    """The config that a run's log file holds; empty if there is none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.findall(r"^config (\{.*\})$", text, re.M)
    return json.loads(found[-1]) if found else {}


def note_recompiles(log: StageLog, run: Run) -> None:
    """There must be none: one that meets a training step costs the run up to a minute."""
    if not run.losses():
        return
    repeated = recompiles(run.lines)
    log.figure("recompiles", repeated)
    if repeated:
        log.problems.append(f"{repeated} recompiles in training steps after the warm-up")


def note_score(log: StageLog, run: Run) -> None:
    """Figures of the artifact and its evaluation, whose time has compiling in it here."""
    log.figure("artifact_bytes", run.text(r"artifact .*artifact_bytes:(\d+) limit:"))
    final, unrounded = run.number("final_sliding", "val_bpb"), run.number("float_sliding", "val_bpb")
    log.figure("val_bpb", run.text(r"final_sliding .*val_bpb:(\S+)"))
    if final is not None and unrounded is not None:
        log.figure("quantization_gap", f"{final - unrounded:+.5f}")
    targets, seconds = run.number("data path", "val_targets"), run.number("final_sliding", "eval_time", 1e-3)
    if targets and seconds:
        log.figure("eval_tokens_per_s_with_compiling", targets / seconds)
        log.figure("eval_s_8gpu_with_compiling", FINEWEB_TARGETS / RECORD_GPUS * seconds / targets)


def again(session: Session) -> None:
    """The stored model in a fresh process, a killed run, a smaller file."""
    scored = session.state.get("default")
    if scored:
        all_windows = evaluate_again(session, scored)
        kill_and_resume(session)
        few_windows = export_smaller(session, scored["run_id"])
        note_evaluation_rate(session.log, all_windows, few_windows)
    else:
        run_id, resumed = kill_and_resume(session)
        evaluate_again(session, {"run_id": run_id, "val_bpb": score_of(resumed)}, small=True)
        export_smaller(session, run_id)


def evaluate_again(session: Session, scored: dict[str, str], small: bool = False) -> Run:
    """EVAL_ARTIFACT must give the score that the training run gave, to the last digit."""
    settings = {"EVAL_ARTIFACT": session.run_file(scored["run_id"], "ptz")}
    run = session.run(session.new_run_id("scored"), settings, small=small, torchrun=False)
    run.check()
    same = score_of(run) == scored["val_bpb"]
    session.log.figure("same_score", int(same))
    if not same:
        session.log.problems.append(f"EVAL_ARTIFACT scores {score_of(run)}, the run itself had {scored['val_bpb']}")
    return run


def kill_and_resume(session: Session) -> tuple[str, Run]:
    """Kill a run with SIGKILL, resume it, and compare the losses of the steps that were trained twice.

    Returns its name and the resumed run, which is exported the quickest way.
    """

    def a_step_after_a_checkpoint(lines: list[str]) -> bool:
        saved = next((i for i, line in enumerate(lines) if line.startswith("checkpoint path:")), len(lines))
        return any(line.startswith("step:") for line in lines[saved:])

    run_id = session.new_run_id("killed")
    iterations = 60 if session.cpu else 40  # about 4 seconds
    settings = {
        "ITERATIONS": iterations,
        "MAX_WALLCLOCK_SECONDS": 0,
        "WARMDOWN_ITERS": iterations // 2,
        "WARMUP_STEPS": 2,
        "CHECKPOINT_EVERY": 0.3 if session.cpu else 1,
        "TRAIN_LOG_EVERY": 1,
        "VAL_LOSS_EVERY": 0,
        "RATE_CONTROL": 0,
    }
    killed = session.run(run_id, settings, small=True, until=a_step_after_a_checkpoint)
    killed.check()
    # Its log has the steps, too, that it did until it was killed.
    before = Run(session.run_file(run_id, "txt").read_text(encoding="utf-8").splitlines()).losses()
    session.log.figure("killed_at_step", max(before, default=0))
    resumed = session.run(run_id, settings | {"RESUME": 1}, small=True)
    resumed.check()
    note_resume(session.log, before, resumed, iterations)
    return run_id, resumed


def note_resume(log: StageLog, before: dict[int, float], resumed: Run, iterations: int) -> None:
    """Figures of a resumed run: it goes on from a checkpoint, with the losses of the run `before`, to the end."""
    log.figure("resumed_at_step", resumed.number("resume checkpoint", "step"))
    after = resumed.losses()
    first, last = min(after, default=0), max(after, default=0)
    log.figure("ended_at_step", last)
    if first <= 1 or last != iterations:
        log.problems.append(f"resumed run trained steps {first} to {last}")
    twice = before.keys() & after.keys()
    log.figure("steps_trained_twice", len(twice))
    if not twice:
        log.problems.append("the resumed run repeated no step, so its losses say nothing")
        return
    difference = max(abs(after[step] / before[step] - 1) for step in twice)
    log.figure("losses_apart", difference)
    if not difference <= LARGEST_LOSS_DIFFERENCE:
        log.problems.append(f"losses of the steps trained twice differ by {difference:.2%}")


def export_smaller(session: Session, run_id: str) -> Run:
    """The weights of a run in a smaller file: EXPORT_FROM keeps to the limit. Scored on few windows."""
    model_bytes = session.run_file(run_id, "ptz").stat().st_size
    limit = session.script.stat().st_size + round(SMALLER_MODEL * model_bytes)
    settings = {"EXPORT_FROM": session.run_file(run_id, "weights"), "ARTIFACT_LIMIT_BYTES": limit}
    run = session.run(session.new_run_id("smaller"), settings, small=True, torchrun=False)
    run.check()
    session.log.figure("smaller_limit", str(limit))
    session.log.figure("smaller_bytes", run.text(r"artifact .*artifact_bytes:(\d+) limit:"))
    session.log.figure("smaller_bpb_of_few_windows", score_of(run))
    return run


def note_evaluation_rate(log: StageLog, all_windows: Run, few_windows: Run) -> None:
    """Speed of sliding evaluation: two fresh processes differ by their windows, not by starting and compiling."""
    targets = [run.number("data path", "val_targets") or 0.0 for run in (all_windows, few_windows)]
    seconds = [run.number("final_sliding", "eval_time", 1e-3) or 0.0 for run in (all_windows, few_windows)]
    if targets[0] > targets[1] and seconds[0] > seconds[1]:
        rate = (targets[0] - targets[1]) / (seconds[0] - seconds[1])
        log.figure("eval_tokens_per_s", rate)
        log.figure("eval_s_8gpu", FINEWEB_TARGETS / RECORD_GPUS / rate)


def pr314(session: Session) -> None:
    """The literal design, for the seconds that the default had."""
    train_and_score(session, "pr314", {"RECIPE": "pr314", "SWA_EVERY": SHORT_RUN["SWA_EVERY"]})


def profile(session: Session) -> None:
    """Kernels of the training step, attention alone, and one setting of Inductor."""
    warm_up, timed = (2, 20) if session.cpu else (10, 40)
    settings = {"WARMUP_STEPS": warm_up, "MAX_WALLCLOCK_SECONDS": 0, "TRAIN_LOG_EVERY": 10, "VAL_LOSS_EVERY": 0}
    options = ["--profile-after", str(warm_up + timed + 1)]  # optimizer steps; the profiler starts in the last of them
    mixed = {"TORCHINDUCTOR_MIX_ORDER_REDUCTION": 1}
    run = session.run_in_probe(session.new_run_id("profiled"), settings | mixed, options)
    run.check()
    milliseconds = step_times(until_step(run.lines, timed)).plain
    session.log.figure("ms_per_step", milliseconds)
    busy = run.number("profile", "busy_ms_per_step")
    if busy and milliseconds:
        session.log.figure("device_busy_share", busy / milliseconds)  # of a step that no profiler slows
    else:
        session.log.problems.append("the profiler saw no kernel")
    for line in session.probe("attention").lines:
        if match := re.match(r"attention kernel:(\w+) forward_ms:\S+ both_ms:(\S+)", line):
            session.log.figure(f"attention_{match[1]}_ms", match[2])
    if session.settings.get("COMPILE") == 0 or mix_order_reduction(run) == "none":
        session.log.say("mix_order_reduction: not compiled, or no such setting in this PyTorch")
        return
    unmixed = {"TORCHINDUCTOR_MIX_ORDER_REDUCTION": 0}
    without = session.run_in_probe(session.new_run_id("unmixed"), settings | unmixed, options, until=has_trained(timed))
    without.check()
    found = [mix_order_reduction(run), mix_order_reduction(without)]
    if found != ["1", "0"]:
        raise RunFailed(f"mix_order_reduction was {found} where 1 and 0 were asked for: the script sets it itself")
    session.log.figure("ms_per_step_without_mix_order", step_times(without.lines).plain)


def until_step(lines: list[str], step: int) -> list[str]:
    """The lines up to that of a step."""
    ends = [i for i, line in enumerate(lines) if line.startswith(f"step:{step}/")]
    return lines[: ends[0] + 1] if ends else lines


def mix_order_reduction(run: Run) -> str:
    """The setting of Inductor that a run had, as the probe saw it."""
    return run.text(r"probe mix_order_reduction:(\w+)") or "unknown"


def memory(session: Session, gigabytes: int = 20) -> None:
    """A run whose allocator may hold 20 GB: it ends with the micro-batch that it took, or was told to take."""
    if session.cpu:
        raise StageSkipped("needs CUDA")
    settings = {"ITERATIONS": 6, "WARMUP_STEPS": 2, "MAX_WALLCLOCK_SECONDS": 0, "WARMDOWN_ITERS": 3}
    settings |= {"RATE_CONTROL": 0}
    options = ["--memory-gb", str(gigabytes)]
    for _ in range(MEMORY_TRIES):
        run = session.run_in_probe(session.new_run_id("memory"), settings, options, small=True)
        taken = run.number("batch", "micro_batch_tokens")
        if taken is None or not is_out_of_memory(run):
            break
        session.log.figure("out_of_memory_with", taken)
        advised = run.text(r"error.*MICRO_BATCH_TOKENS=(\d+)")
        if advised is None:
            session.log.problems.append(f"out of memory with {taken:.0f}, and no MICRO_BATCH_TOKENS named")
        settings["MICRO_BATCH_TOKENS"] = int(advised or taken // 2)
    run.check()
    session.log.figure("micro_batch_tokens", taken)
    note_peak_memory(session.log, run)


class Stage(NamedTuple):
    """A stage, its share of the minutes given (weights; only their ratios count), and the figures in the table."""

    number: int
    name: str
    question: str
    work: Callable[[Session], None]
    gpu_share: float
    cpu_share: float
    headlines: str


TRAINED = (
    "compile_warm_up_s ms_per_step share_of_ceiling peak_gb recompiles over_cap_s val_bpb quantization_gap "
    "artifact_bytes"
)
AGAIN = "same_score killed_at_step resumed_at_step losses_apart smaller_bytes eval_s_8gpu"
PROFILED = "ms_per_step device_busy_share attention_pytorch_choice_ms ms_per_step_without_mix_order"
STAGES = (
    Stage(1, "ceilings", "what the card can do", ceilings, 20, 10, "product_tflops copy_gb_per_s"),
    Stage(2, "default", "the default runs", default, 205, 105, f"first_compile_warm_up_s {TRAINED}"),
    Stage(3, "again", "the same score again", again, 75, 45, AGAIN),
    Stage(4, "pr314", "the literal design beside it", pr314, 160, 14, TRAINED),
    Stage(5, "profile", "what bounds the step", profile, 45, 16, PROFILED),
    Stage(6, "memory", "20 GB are enough", memory, 35, 1, "micro_batch_tokens peak_gb"),
)


# ---- Limits and table ------------------------------------------------------------------------------------------------


def limits(stages: list[Stage], minutes: float, cpu: bool) -> list[float]:
    """Seconds of each stage, in all a little less than the minutes given."""
    shares = [stage.cpu_share if cpu else stage.gpu_share for stage in stages]
    return [USABLE_SHARE * 60 * minutes * share / sum(shares) for share in shares]


def training_seconds(stages: list[Stage], seconds: list[float], cpu: bool) -> float:
    """Of stages 2 and 4: a part of the limit of stage 2, or of stage 4 where that is not asked for."""
    limit_of = {stage.number: limit for stage, limit in zip(stages, seconds, strict=True)}
    share = CPU_TRAINING_SHARE if cpu else GPU_TRAINING_SHARE
    return round(max(LEAST_TRAINING_SECONDS, share * limit_of.get(2, limit_of.get(4, 0.0))), 1)


def print_plan(options: argparse.Namespace, seconds: list[float]) -> None:
    """The limits, and until when each stage may run if those before it use all of theirs."""
    until = 0.0
    for stage, limit in zip(options.stages, seconds, strict=True):
        until += limit
        print(f"stage {stage.number} {stage.name:9} limit_s:{limit:.1f} until_s:{until:.1f} {stage.question}")
    print(f"all limit_s:{until:.1f} of {60 * options.minutes:g} s, {options.train_seconds:g} s of training in a run")


def run_stage(session: Session, stage: Stage, seconds: float) -> bool:
    """Run one stage within its limit and write its file; whether it is ok or skipped."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    session.log = log = StageLog(session.out / f"{stage.number}-{stage.name}.txt", seconds)
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    log.say(f"stage:{stage.number} {stage.name} started:{started} limit_s:{seconds:.1f}")
    for line in (f"script sha256:{session.script_sha256}", *session.machine):
        log.write(line)
    if session.settings.get("COMPILE") == 0 and not session.cpu:
        log.problems.append("not compiled, since an earlier stage's compiling failed")
    signal.signal(signal.SIGALRM, ring)
    log.set_alarm()
    words = []
    try:
        try:
            stage.work(session)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm at this very moment is one more `OutOfTime`
            kill_below_this_process()
    except OutOfTime:
        words = ["over time"]
    except StageSkipped as reason:
        words = [f"skipped: {reason}"]
    except RunFailed as error:
        words = [f"failed: {error}"]
    except Exception as error:
        words = [f"failed: {type(error).__name__}: {error}"]
        traceback.print_exc(file=log.file)
    if log.problems and not words:
        words = ["failed"]
    result = "; ".join([*words, *log.problems]) or "ok"
    log.say(f"result seconds:{log.seconds():.1f} {result}")
    log.file.close()
    return result == "ok" or result.startswith("skipped")


def table(out: Path) -> str:
    """Machine, figures and table of all stage files in a folder."""
    heads: dict[str, None] = {}  # in the order of their first appearance
    figures_of_stages = []
    rows = ["| stage | question | result | seconds | figures |", "|---|---|---|---:|---|"]
    for stage in STAGES:
        path = out / f"{stage.number}-{stage.name}.txt"
        if not path.is_file():
            continue
        lines = path.read_text(encoding="utf-8").split("\n")
        heads |= dict.fromkeys(line for line in lines if line.startswith(("script sha256:", "machine ", "card ")))
        figures = dict(line.removeprefix("figure ").split(":", 1) for line in lines if line.startswith("figure "))
        listed = " ".join(f"{name}:{value}" for name, value in figures.items())
        figures_of_stages.append(f"- {stage.number} {stage.name}: {listed}")
        ends = [match for line in lines if (match := re.match(r"result seconds:(\S+) (.*)", line))]
        seconds, result = ends[-1].groups() if ends else ("", "cut off")
        shown = " ".join(f"{name}:{figures[name]}" for name in stage.headlines.split() if name in figures)
        result = result.replace("|", "/")  # which ends a cell
        rows.append(f"| {stage.number} {stage.name} | {stage.question} | {result} | {seconds} | {shown} |")
    for start in ("script ", "card "):
        if sum(line.startswith(start) for line in heads) > 1:
            heads[f"note: the stages are of more than one {start.strip()}"] = None
    return "\n".join(["# tests/gpu.py", "", *heads, "", *figures_of_stages, "", *rows]) + "\n"


# ---- Main ------------------------------------------------------------------------------------------------------------


def machine_lines(session: Session) -> list[str]:
    """What is installed and which card is there; SystemExit where the stages could not run."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"missing packages: {' '.join(missing)}. What needs them will fail; --help says how to bring them")
    command = [sys.executable, str(PROBE), "machine"]
    try:
        done = subprocess.run(command, env=session.environment, capture_output=True, text=True, timeout=START_SECONDS)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"PyTorch did not name the card within {START_SECONDS} s") from None
    if done.returncode:
        raise SystemExit(f"PyTorch does not start:\n{done.stderr[-2000:]}")
    if "card none" in done.stdout and not session.cpu:
        raise SystemExit("no CUDA device here; --cpu tries this program at toy sizes")
    return done.stdout.splitlines()


def chosen_stages(text: str) -> list[Stage]:
    """The stages of `4`, `1-3` or `1,3-4`."""
    ranges = [re.fullmatch(r"(\d)(?:-(\d))?", part) for part in text.split(",")]
    chosen = {number for found in ranges if found for number in range(int(found[1]), int(found[2] or found[1]) + 1)}
    if None in ranges or not chosen or not chosen <= {stage.number for stage in STAGES}:
        raise argparse.ArgumentTypeError(f"{text!r}: stages are 1 to {len(STAGES)}, such as 1-3 or 2,4")
    return [stage for stage in STAGES if stage.number in chosen]


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder with fineweb_train_*.bin and fineweb_val_*.bin")
    parser.add_argument("--tokenizer", default="", help="the SentencePiece model of that data")
    parser.add_argument("--stages", type=chosen_stages, default=list(STAGES), help="such as 1-3 or 2,4 (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: 9)")
    parser.add_argument("--train-seconds", type=float, help="in stages 2 and 4 (default: sized to the minutes)")
    parser.add_argument("--out", default="", help="folder of the files")
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir(), "train-gpt-gpu")), help="scratch folder")
    parser.add_argument("--script", default=str(ROOT / "train_gpt.py"), help="the script (default: this repository's)")
    parser.add_argument("--cpu", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="with --cpu: compile nothing")
    parser.add_argument("--plan", action="store_true", help="print the limits of the stages and stop")
    parser.add_argument("--table", type=Path, metavar="OUT", help="print the table of files that are there and stop")
    options = parser.parse_args(words)
    if bool(options.data) != bool(options.tokenizer):
        parser.error(
            f"--data {options.data!r} and --tokenizer {options.tokenizer!r} belong together: give both or none"
        )
    for name in ("minutes", "train_seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value:g} must be above 0")
    if not options.out and not options.plan and not options.table:
        parser.error("--out names the folder for the files")
    if Path(options.out).is_file():
        parser.error(f"--out {options.out} is a file, not a folder")
    if not Path(options.script).is_file():
        parser.error(f"--script {options.script} is no file")
    if options.table and not any(options.table.glob("[1-6]-*.txt")):
        parser.error(f"--table {options.table} has no stage's file")
    return options


def main(words: list[str] | None = None) -> int:
    """Run the stages; the exit code is 0 if all are ok or skipped."""
    begun = time.monotonic()
    options = arguments(words)
    if options.table:
        print(table(options.table), end="")
        return 0
    seconds = limits(options.stages, options.minutes, options.cpu)
    asked = options.train_seconds
    options.train_seconds = asked or training_seconds(options.stages, seconds, options.cpu)
    print_plan(options, seconds)
    if options.plan:
        return 0
    session = Session(options)
    earlier = session.state.get("default")
    if asked is None and earlier and all(stage.number != 2 for stage in options.stages):
        session.train_seconds = earlier["train_seconds"]
        print(f"{session.train_seconds:g} s of training instead, as stage 2 had in an earlier call")
    session.machine = machine_lines(session)
    adopt_orphans()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that the runs are ended, too
    good = True
    deadline = time.monotonic()
    left = max(0.0, options.minutes - (deadline - begun) / 60)  # without the time that PyTorch took to start
    try:
        for stage, limit in zip(options.stages, limits(options.stages, left, options.cpu), strict=True):
            deadline += limit  # unused time goes to the next stage
            good &= run_stage(session, stage, deadline - time.monotonic())
            (session.out / "table.md").write_text(table(session.out), encoding="utf-8")
    finally:
        (session.out / "table.md").write_text(table(session.out), encoding="utf-8")
        print(f"\n{table(session.out)}", end="")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
