"""tests/gpu.py, as far as a CPU goes: all of it at toy sizes, stages that fail, and what it reads from a log."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from processes import is_running
from run_log import Run, RunFailed, error_line, numbers, recompiles, step_times
from tools import ROOT, config, corpus, model_for, runtime
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as t


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """`gpu.main` takes signals over; pytest wants them back."""
    numbers_of_signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers_of_signals]
    yield
    for number, handler in zip(numbers_of_signals, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_orphans_for_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest itself shall not become the parent of what other tests leave."""
    monkeypatch.setattr(gpu, "adopt_orphans", lambda: None)


FILES = ["1-ceilings.txt", "2-default.txt", "3-again.txt", "4-pr314.txt", "5-profile.txt", "6-memory.txt", "table.md"]
AFTER_TRAINING = (
    "compile_warm_up_s ms_per_step ms_per_step_qat tflops share_of_ceiling qat_switch_s choice_s steps over_cap_s "
    "artifact_bytes val_bpb quantization_gap eval_tokens_per_s_with_compiling "
    "eval_s_8gpu_with_compiling export_round_0_s"
).split()
FIGURES = {
    "1": ["product_tflops", "copy_gb_per_s"],
    "2": [*AFTER_TRAINING, "end_rehearsed_s"],
    "3": "same_score killed_at_step resumed_at_step ended_at_step steps_trained_twice losses_apart smaller_limit "
    "smaller_bytes smaller_bpb_of_few_windows eval_tokens_per_s eval_s_8gpu".split(),
    "4": AFTER_TRAINING,
    "5": ["ms_per_step", "device_busy_share", "attention_pytorch_choice_ms", "attention_flash_ms"],
    "6": [],
}


def rows(text: str) -> dict[str, list[str]]:
    """The table that a text ends with: by number of the stage, its question, result, seconds and figures."""
    found = [line.strip("| ").split("|") for line in text.splitlines() if re.match(r"\| \d ", line)]
    return {cells[0].split()[0]: [cell.strip() for cell in cells[1:]] for cells in found}


def options(tmp_path: Path, *words: str) -> argparse.Namespace:
    """Options of a call whose files are in a scratch folder."""
    return gpu.arguments(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *words])


PARENT = """
import subprocess, sys
child = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(child, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)
"""
ADOPTER = """
import sys
from pathlib import Path
import gpu, processes
processes.adopt_orphans()
folder = sys.argv[1]
session = gpu.Session(gpu.arguments(["--cpu", "--out", folder, "--work", folder]))
session.log = gpu.StageLog(Path(folder, "stage.txt"), 60)
print(session.launch([sys.executable, "-c", sys.argv[2]], {}).lines[0])
"""


def test_process_that_outlives_its_parent(tmp_path: Path) -> None:
    """A rank whose launcher is gone is ended with the run."""
    command = [sys.executable, "-c", ADOPTER, str(tmp_path), PARENT]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not is_running(int(done.stdout.split()[-1]))


def session_with_log(tmp_path: Path, *words: str) -> gpu.Session:
    """A session in the middle of a stage that has a minute."""
    session = gpu.Session(options(tmp_path, *words))
    session.log = gpu.StageLog(tmp_path / "out/stage.txt", 60)
    return session


def test_all_stages_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All but compiling, in two calls side by side: every stage is ok, all files and figures are there, and the table
    comes last."""
    calls = {}
    for stages in ("2-3", "1,4-6"):  # about as long
        folders = ["--out", str(tmp_path / stages), "--work", str(tmp_path / f"work-{stages}")]
        words = ["--cpu", "--no-compile", "--minutes", "9", "--train-seconds", "60", "--stages", stages, *folders]
        if stages == "2-3":  # what stage 1 of an earlier call leaves
            gpu.Session(gpu.arguments(words)).keep(product_tflops=1.0)
        command = [sys.executable, str(ROOT / "tests/gpu.py"), *words]
        env = os.environ | {"LANG": "C", "OMP_NUM_THREADS": "1"}
        calls[stages] = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out = tmp_path / "out"
    for stages, call in calls.items():
        printed, _ = call.communicate(timeout=600)
        assert call.returncode == 0, printed[-6000:]
        assert printed.endswith((tmp_path / stages / "table.md").read_text())
        shutil.copytree(tmp_path / stages, out, dirs_exist_ok=True)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert gpu.main(["--table", str(out)]) == 0
    table = rows(capsys.readouterr().out)
    assert [table[number][1] for number in "123456"] == ["ok"] * 5 + ["skipped: needs CUDA"]
    for number, names in FIGURES.items():
        text = next(out.glob(f"{number}-*.txt")).read_text()
        assert "\nmachine python:" in text and "\ncard none" in text, number
        assert set(names) <= set(re.findall(r"^figure (\w+):", text, re.M)), number
    again = (out / "3-again.txt").read_text()
    figures = dict(re.findall(r"^figure (\w+):(\S+)", again, re.M))
    assert figures["same_score"] == "1" and figures["losses_apart"] == "0"
    assert int(figures["resumed_at_step"]) < int(figures["killed_at_step"]) < int(figures["ended_at_step"]) == 60
    assert 0.8 * int(figures["smaller_limit"]) < int(figures["smaller_bytes"]) <= int(figures["smaller_limit"])
    profile = (out / "5-profile.txt").read_text()
    assert len(re.findall(r"^\[ *[\d.]+\] \| [\d.]+ \| [\d.]+% \|", profile, re.M)) == 15


def test_docstring_names_the_files() -> None:
    """What the docstring promises under --out is what the stages write."""
    assert gpu.__doc__ is not None
    named = re.findall(r"\b(\d-\w+\.txt|table\.md)\b", gpu.__doc__)
    assert named == FILES == [f"{stage.number}-{stage.name}.txt" for stage in gpu.STAGES] + ["table.md"]


@pytest.mark.parametrize("words", ["--stages 1-3 --minutes 5", "--stages 4-6 --minutes 4", "--cpu --minutes 3", ""])
def test_plan(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--plan prints a limit for each stage; they add up to less than the minutes given."""
    assert gpu.main(["--plan", *words.split()]) == 0
    limits = numbers(capsys.readouterr().out.splitlines(), "stage ", "limit_s")
    chosen = gpu.arguments(["--plan", *words.split()])
    assert len(limits) == len(chosen.stages)
    assert all(limit > 0 for limit in limits)
    assert sum(limits) < 60 * chosen.minutes
    assert max(limits) < 10 * 60


def test_docstring_names_the_seconds_of_training() -> None:
    """Those of a call with stages 1 to 3 and five minutes."""
    first = list(gpu.STAGES[:3])
    trained = gpu.training_seconds(first, gpu.limits(first, 5, cpu=False), cpu=False)
    assert gpu.__doc__ is not None and f"stage 2\n   trains for {trained:.0f} s" in gpu.__doc__


@pytest.mark.parametrize(
    "words, message",
    [
        ("--stages 0", "'0': stages are 1 to 6"),
        ("--stages 2-9", "'2-9': stages are 1 to 6"),
        ("--stages x", "'x': stages are 1 to 6"),
        ("--minutes 0 --out x", "--minutes 0 must be above 0"),
        ("--train-seconds -3 --out x", "--train-seconds -3 must be above 0"),
        ("--data x --out x", "--data 'x' and --tokenizer '' belong together"),
        ("--script gone.py --out x", "--script gone.py is no file"),
        ("--table gone", "--table gone has no stage's file"),
        ("--stages 1", "--out names the folder"),
        (f"--out {__file__}", "test_gpu.py is a file, not a folder"),
    ],
)
def test_bad_options(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and a message with the value and what is wrong with it."""
    with pytest.raises(SystemExit) as error:
        gpu.main(words.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


SLEEPER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("pids", os.getpid(), child.pid, flush=True)
print("step:1/9 train_loss:5.5 train_time:10ms", flush=True)
time.sleep(600)
"""


def sleeping_script(folder: Path) -> Path:
    """A script that starts another process, as torchrun does, says so and never ends."""
    path = folder / "sleeper.py"
    path.write_text(SLEEPER)
    return path


def test_stage_that_fails_or_sleeps_costs_its_own_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages after it run; what it had measured and printed is kept; none of its processes goes on."""
    sleeper = sleeping_script(tmp_path)

    def sleeps(session: gpu.Session) -> None:
        session.log.figure("before", 1)
        time.sleep(600)

    def runs_for_ever(session: gpu.Session) -> None:
        run = session.launch([sys.executable, str(sleeper)], {})
        session.log.figure("first_loss", run.losses()[1])
        run.check()

    def runs_after_the_end(session: gpu.Session) -> None:
        session.launch([sys.executable, "-c", "import time; time.sleep(600)"], {})
        session.launch([sys.executable, "-c", "print('must not run')"], {})

    def takes_a_wrong_path(session: gpu.Session) -> None:
        session.launch([sys.executable, str(tmp_path / "missing.py")], {}).check()

    def has_a_bug(session: gpu.Session) -> None:
        raise KeyError("gone")

    def is_fine(session: gpu.Session) -> None:
        session.log.figure("fine", 7)

    works = [sleeps, runs_for_ever, runs_after_the_end, takes_a_wrong_path, has_a_bug, is_fine]
    shown = "before first_loss fine"
    stages = tuple(gpu.Stage(i, work.__name__, "?", work, 1, 1, shown) for i, work in enumerate(works, 1))
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "machine_lines", lambda session: ["machine none"])
    begun = time.monotonic()
    words = ["--cpu", "--minutes", "0.15", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert gpu.main(words) == 1
    assert time.monotonic() - begun < 9 + 10
    table = rows((tmp_path / "out/table.md").read_text())
    assert [table[n][1] for n in "123"] == ["over time"] * 3
    assert table["4"][1].startswith("failed: exit code 2: ") and "missing.py" in table["4"][1]
    assert table["5"][1] == "failed: KeyError: 'gone'"
    assert "in has_a_bug" in (tmp_path / "out/5-has_a_bug.txt").read_text()
    assert table["6"][1] == "ok"
    assert [table[n][3] for n in "126"] == ["before:1", "first_loss:5.5", "fine:7"]
    text = (tmp_path / "out/2-runs_for_ever.txt").read_text()
    assert not any(is_running(int(pid)) for pid in re.findall(r"pids (\d+) (\d+)", text)[0])
    assert "must not run" not in (tmp_path / "out/3-runs_after_the_end.txt").read_text()


def test_unused_time_goes_to_the_next_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that ends at once leaves its limit to the next one."""
    given: list[float] = []

    def notes_its_limit(session: gpu.Session) -> None:
        given.append(session.log.deadline - session.log.begun)

    stages = tuple(gpu.Stage(i, "notes", "?", notes_its_limit, 1, 1, "") for i in (1, 2))
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "machine_lines", lambda session: [])
    assert gpu.main(["--cpu", "--minutes", "1", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]) == 0
    limit = gpu.limits(list(stages), 1, cpu=True)[0]
    assert given == pytest.approx([limit, 2 * limit], abs=1)


def test_stage_4_trains_as_long_as_stage_2_of_an_earlier_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its own minutes would give it another time; an option of its own comes first."""
    trained: list[float] = []

    def notes_its_seconds(session: gpu.Session) -> None:
        trained.append(session.train_seconds)
        session.keep(default={"train_seconds": session.train_seconds})

    stages = tuple(gpu.Stage(i, "notes", "?", notes_its_seconds, 1, 1, "") for i in (2, 4))
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "machine_lines", lambda session: [])
    for words in ("--stages 2 --minutes 5", "--stages 4 --minutes 2", "--stages 4 --train-seconds 3"):
        gpu.main([*words.split(), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    assert trained == [trained[0], trained[0], 3]
    assert trained[0] > gpu.training_seconds([stages[1]], [2 * 60], cpu=False)


WITHOUT_PYTORCH = """
import sys
import gpu
gpu.machine_lines = lambda session: ["machine none"]
sys.exit(gpu.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_cut_off(number: signal.Signals, tmp_path: Path) -> None:
    """Ended by a signal in mid-stage: the runs end, too, what was printed is on disk, and the table says so."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", WITHOUT_PYTORCH, "--cpu", "--stages", "4", "--out", str(out)]
    command += ["--work", str(tmp_path / "work"), "--script", str(sleeping_script(tmp_path))]
    command += ["--data", str(corpus()), "--tokenizer", str(corpus() / "tokenizer.model")]

    def takes_signals() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest may run under nohup

    silent = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT / "tests", stdout=silent, preexec_fn=takes_signals) as process:
        path = out / "4-pr314.txt"
        found: list[tuple[str, str]] = []
        until = time.monotonic() + 60
        while not found and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
            found = re.findall(r"pids (\d+) (\d+)\n.*step:1", path.read_text()) if path.is_file() else []
        process.send_signal(number)
        assert process.wait(timeout=10) == 128 + number
    assert not any(is_running(int(pid)) for pid in found[0])
    assert rows((out / "table.md").read_text())["4"][1] == "cut off"


def without_card(tmp_path: Path) -> Path:
    """A probe that starts no PyTorch."""
    path = tmp_path / "probe.py"
    path.write_text("print('machine python:3')\nprint('card none, cpus:2')")
    return path


def test_needs_a_gpu_or_cpu_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without CUDA the message names the option that helps."""
    monkeypatch.setattr(gpu, "PROBE", without_card(tmp_path))
    with pytest.raises(SystemExit, match="--cpu"):
        gpu.main(["--stages", "1", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, with where the remedy stands; stages that do without it still run."""
    monkeypatch.setattr(gpu, "PROBE", without_card(tmp_path))
    monkeypatch.setattr(gpu, "PACKAGES", ("torch", "no_such_package"))
    assert gpu.machine_lines(gpu.Session(options(tmp_path, "--cpu"))) == ["machine python:3", "card none, cpus:2"]
    assert "missing packages: no_such_package." in capsys.readouterr().out


def test_card_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch that does not come up ends the program, not the time that is paid for."""
    monkeypatch.setattr(gpu, "PROBE", sleeping_script(tmp_path))
    monkeypatch.setattr(gpu, "START_SECONDS", 1)
    with pytest.raises(SystemExit, match="within 1 s"):
        gpu.machine_lines(gpu.Session(options(tmp_path, "--cpu")))


RECOMPILED = """\
[rank0]:V1127 13:39:21 2891 guards.py:5396] [1/1] [__recompiles] Recompiling function nll in train_gpt.py:776
[rank0]:V1127 13:39:21 2891 guards.py:5396] [1/1] [__recompiles]     triggered by the following guard failure(s):
[rank0]:V1127 13:39:21 2891 guards.py:5396] [1/1] [__recompiles]     - 1/0: tensor 'x0' stride mismatch"""


def test_recompiles_are_those_of_training_steps() -> None:
    """Not those of the warm-up or of the evaluation."""
    warm, first, last = "warm_up steps:20 time:60s", "step:1/9 train_loss:6.0", "step:9/9 train_loss:5.0"
    lines = [*RECOMPILED.splitlines(), warm, first, last, *RECOMPILED.splitlines()]
    assert recompiles(lines) == 0
    assert recompiles([warm, first, *RECOMPILED.splitlines(), last]) == 1


def test_recompiles_as_this_pytorch_reports_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the variable that a session sets has it print is what is counted."""
    double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    monkeypatch.setenv("TORCH_LOGS", gpu.Session(options(tmp_path, "--cpu")).environment["TORCH_LOGS"])
    torch._logging._init_logs()
    try:
        double(torch.ones(3))
        print("warm_up", file=sys.stderr)
        double(torch.ones(4))
        print("step:1/1 train_loss:1", file=sys.stderr)
    finally:
        monkeypatch.delenv("TORCH_LOGS")
        torch._logging._init_logs()
    assert recompiles(capfd.readouterr().err.splitlines()) == 1


def steps(*clock: tuple[int, float]) -> list[str]:
    """Log lines of steps at these milliseconds."""
    return [
        f"step:{step}/99 train_loss:5.0 lr_scale:1.0000 train_time:{ms:.0f}ms step_avg:9.99ms" for step, ms in clock
    ]


def test_step_times() -> None:
    """Medians without the first steps, and without the interval with the switch to fake quantization."""
    before = steps((1, 5000), (5, 5400), (10, 5900), (20, 6900), (30, 9900), (40, 10900))
    after = steps((50, 14400), (60, 15600), (70, 16800))
    assert step_times([*before, "qat active:1 step:45 time:2500ms", *after]) == (100, 120)
    assert step_times(before) == (100, None)
    assert step_times(["qat active:1 step:0 time:9ms", *before]) == (None, 100)
    assert step_times([]) == (None, None)


def test_flops_are_those_that_pytorch_counts() -> None:
    """But for two things: the projection of bigrams, and the half of attention that is masked, which it computes."""
    cfg = config()
    model = model_for(cfg)
    counts: Counter[str] = Counter()
    for name, p in model.named_parameters():
        counts[t.category(name)] += p.numel()
    run = Run([f"artifact category:{kind} params:{count} bytes:1" for kind, count in counts.items()])
    ids = torch.zeros(cfg.train_batch_tokens // cfg.train_seq_len, cfg.train_seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids).mean().backward()
    tflop = gpu.step_tflop(run, vars(cfg))
    masked = cfg.num_layers * cfg.model_dim * cfg.train_seq_len
    left_out = 6 * cfg.train_batch_tokens * (model.bigram.out_proj.weight.numel() + masked)
    assert tflop is not None and 1e12 * tflop + left_out == pytest.approx(counter.get_total_flops())


TORCHRUN = """\
W1127 13:39:21.866000 2891 torch/distributed/run.py:852] Setting OMP_NUM_THREADS
step:3/9 train_loss:5.0
{error}
E1127 13:39:21.866000 2891 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: 1) local_rank: 0
Traceback (most recent call last):
  File "torch/distributed/run.py", line 999, in main
    run(args)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train_gpt.py FAILED
============================================================"""
IN_TRACEBACK = """\
error: no checkpoint at step 3: disk full. Older ones are intact
[rank0]: Traceback (most recent call last):
[rank0]:   File "train_gpt.py", line 9, in main
[rank0]:     loss.backward()
[rank0]: {}"""


@pytest.mark.parametrize(
    "printed, expected",
    [
        ("error: no shards match none/*.bin", "error: no shards match none/*.bin"),
        ("error on rank 1: nothing", "error on rank 1: nothing"),
        (
            IN_TRACEBACK.format("torch.OutOfMemoryError: CUDA out of memory."),
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (
            IN_TRACEBACK.format("torch._dynamo.exc.Unsupported: Graph break"),
            "torch._dynamo.exc.Unsupported: Graph break",
        ),
        (IN_TRACEBACK.format("AssertionError"), "AssertionError"),
        (
            IN_TRACEBACK.format("torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised:")
            + "\n[rank0]: RuntimeError: no Triton",
            "torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised: RuntimeError: no Triton",
        ),
    ],
)
def test_error_line(printed: str, expected: str) -> None:
    """The script's own error, not the launcher's, nor one that it went on after."""
    assert error_line(TORCHRUN.format(error=printed).splitlines()) == expected


def test_few_windows(tmp_path: Path) -> None:
    """The small validation split is a sound shard of whole windows, beside the same training shards."""
    session = gpu.Session(options(tmp_path, "--cpu"))
    session.settings["TRAIN_SEQ_LEN"] = 32
    small = session.with_few_windows(corpus())
    val = t.open_shard(small / "fineweb_val_000000.bin")
    whole = t.open_shard(corpus() / "fineweb_val_000000.bin")
    assert len(val) == 32 * 32 + 1 < len(whole)
    assert (val == whole[: len(val)]).all()
    assert (small / "fineweb_train_000000.bin").resolve() == (corpus() / "fineweb_train_000000.bin").resolve()


class Answers:
    """Stands in for runs on a GPU: gives answers in their order, and keeps what was asked."""

    def __init__(self, session: gpu.Session, *answers: Run) -> None:
        self.session, self.answers, self.asked = session, list(answers), list[dict[str, Any]]()

    def __call__(self, run_id: str, settings: gpu.Settings, *_: Any, **__: Any) -> Run:
        self.asked.append(self.session.settings | dict(settings))
        return self.answers.pop(0)


def on_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *answers: Run) -> tuple[gpu.Session, list[dict[str, Any]]]:
    """A session on a GPU whose runs give these answers; and the settings that it asked for."""
    session = session_with_log(tmp_path)
    session.train_seconds = 44.0
    given = Answers(session, *answers)
    monkeypatch.setattr(session, "run", given)
    monkeypatch.setattr(session, "run_in_probe", given)
    monkeypatch.setattr(session, "probe", lambda part: Run(["attention kernel:flash forward_ms:1.5 both_ms:6.25"], 0))
    return session, given.asked


def figures_of(tmp_path: Path) -> dict[str, str]:
    """What the stage of `session_with_log` has noted."""
    return dict(re.findall(r"^figure (\w+):(\S+)", (tmp_path / "out/stage.txt").read_text(), re.M))


SCORED = "final_sliding stride:64 val_bpb:1.5 eval_time:9ms"
TRAINED = """\
warm_up steps:20 time:21500ms step_time:90ms peak_memory_bytes:30000000000 end_time:1250ms
step:5/400 train_loss:6.0 lr_scale:1.0000 grad_norm:1.0 train_time:450ms step_avg:90.00ms
step:10/400 train_loss:5.9 lr_scale:1.0000 grad_norm:1.0 train_time:900ms step_avg:90.00ms
qat active:1 step:15 time:1750ms
step:20/400 train_loss:5.5 lr_scale:0.5000 grad_norm:1.0 train_time:3600ms step_avg:180.00ms
step:30/400 train_loss:5.4 lr_scale:0.5000 grad_norm:1.0 train_time:4600ms step_avg:153.33ms
export weights:swa path:logs/x.weights snapshots:3 last_loss:5.40000 swa_loss:5.30000 time:2250ms
training stopped:wallclock_cap step:30 train_time:44500ms
artifact round:0 model_bytes:16400000 time:12000ms
artifact round:1 model_bytes:15900000 time:8500ms
artifact path:logs/x.ptz codec:zstd-22 model_bytes:15900000 code_bytes:90000 artifact_bytes:15990000 limit:16000000"""


def test_figures_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are seconds, but for those of a step; memory is in GB."""
    planned = Run([f"{TRAINED.splitlines()[0].replace('21500', '61500')}", "plan: the run can start"], 0)
    session, asked = on_gpu(tmp_path, monkeypatch, planned, Run([*TRAINED.splitlines(), SCORED], 0))
    session.data_path = "/data"
    gpu.default(session)
    assert [settings.get("DRY_RUN") for settings in asked] == [1, None]
    expected = {
        "first_compile_warm_up_s": 61.5,
        "dry_run_peak_gb": 30,
        "compile_warm_up_s": 21.5,
        "ms_per_step": 90,
        "ms_per_step_qat": 100,
        "peak_gb": 30,
        "end_rehearsed_s": 1.25,
        "qat_switch_s": 1.75,
        "choice_s": 2.25,
        "export_round_0_s": 12,
        "export_round_1_s": 8.5,
        "steps": 30,
        "over_cap_s": 0.5,
        "artifact_bytes": 15_990_000,
        "val_bpb": 1.5,
    }
    figures = figures_of(tmp_path)
    assert {name: float(figures[name]) for name in expected} == expected


def test_compiling_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage says so and answers the rest uncompiled; so do later stages of this call, but not of the next."""
    failed = Run(["AssertionError: no Triton"], 1)
    scored = Run([*steps((5, 100), (10, 600)), SCORED], 0)
    session, asked = on_gpu(tmp_path, monkeypatch, failed, scored)
    gpu.train_and_score(session, "default", {})
    assert [settings.get("COMPILE") for settings in asked] == [None, 0]
    assert session.log.problems == ["failed to compile, then tried COMPILE=0: AssertionError: no Triton"]
    assert session.state["default"]["val_bpb"] == "1.5"
    assert session.settings["COMPILE"] == 0
    assert "COMPILE" not in gpu.Session(options(tmp_path)).settings
    assert not gpu.run_stage(session, gpu.Stage(9, "later", "?", lambda session: None, 1, 1, ""), 9)
    assert "failed; not compiled" in (tmp_path / "out/9-later.txt").read_text()


def test_other_failures_are_not_blamed_on_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails for another reason is not tried again, and later stages go on compiled."""
    session, asked = on_gpu(tmp_path, monkeypatch, Run(["error: no shards match"], 1))
    with pytest.raises(RunFailed, match="no shards"):
        gpu.train_and_score(session, "default", {})
    assert len(asked) == 1
    assert "COMPILE" not in session.settings


def test_evaluation_fails_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained weights are scored uncompiled, and the stage says what failed."""
    failed = Run([*steps((5, 100), (10, 600)), "InductorError: no kernel"], 1)
    session, asked = on_gpu(tmp_path, monkeypatch, failed, Run([SCORED], 0))
    monkeypatch.setattr(session, "run_file", lambda run_id, ending: Path(__file__))
    with pytest.raises(RunFailed, match="InductorError: no kernel"):
        gpu.train_and_score(session, "default", {})
    assert asked[1]["EXPORT_FROM"] == Path(__file__)
    assert asked[1]["COMPILE"] == 0
    assert figures_of(tmp_path)["val_bpb"] == "1.5"


def test_run_without_a_score_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0 and nothing printed is not ok."""
    session, _ = on_gpu(tmp_path, monkeypatch, Run([], 0))
    with pytest.raises(RunFailed, match="without its `final_sliding` line"):
        gpu.train_and_score(session, "default", {})


def test_recompiles_fail_the_stage(tmp_path: Path) -> None:
    """All figures stay, but the stage is not ok."""
    log = session_with_log(tmp_path).log
    gpu.note_recompiles(log, Run(["warm_up", *steps((1, 5)), *RECOMPILED.splitlines(), *steps((2, 9))], 0))
    assert log.problems == ["1 recompiles in training steps after the warm-up"]


def resumed(first: int, last: int, loss: float = 5.0) -> Run:
    """A run that logs these steps."""
    return Run([f"step:{step}/40 train_loss:{loss}" for step in range(first, last + 1)], 0)


@pytest.mark.parametrize(
    "after, problem",
    [
        (resumed(8, 40), ""),
        (resumed(1, 40), "resumed run trained steps 1 to 40"),
        (resumed(8, 30), "resumed run trained steps 8 to 30"),
        (resumed(11, 40), "repeated no step"),
        (resumed(8, 40, loss=5.2), "losses of the steps trained twice differ by 4.00%"),
        (resumed(8, 40, loss=float("nan")), "losses of the steps trained twice differ by nan%"),
    ],
)
def test_resume_is_judged(after: Run, problem: str, tmp_path: Path) -> None:
    """It must go on from a checkpoint, to the end, with the losses that the killed run had."""
    log = session_with_log(tmp_path).log
    gpu.note_resume(log, resumed(1, 10).losses(), after, 40)
    assert problem in "; ".join(log.problems)
    assert bool(log.problems) == bool(problem)


def evaluated(targets: int, seconds: float) -> Run:
    """An evaluation of so many targets."""
    score = f"final_sliding stride:64 val_bpb:1.50000001 eval_time:{1000 * seconds:.0f}ms"
    return Run([f"data path:x val_targets:{targets}", score], 0)


def test_another_score_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored model must score what the run said, to the last digit."""
    session, _ = on_gpu(tmp_path, monkeypatch, evaluated(620_000, 30))
    gpu.evaluate_again(session, {"run_id": "x", "val_bpb": "1.50000000"})
    assert session.log.problems == ["EVAL_ARTIFACT scores 1.50000001, the run itself had 1.50000000"]


def test_speed_of_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of two fresh processes with more and fewer windows, without what both spend on starting and compiling."""
    session, asked = on_gpu(tmp_path, monkeypatch, evaluated(620_000, 30), evaluated(20_000, 24))
    monkeypatch.setattr(gpu, "kill_and_resume", lambda session: ("killed", Run()))
    session.keep(default={"run_id": "x", "val_bpb": "1.50000001"})
    session.run_file("x", "ptz").write_bytes(bytes(1000))
    gpu.again(session)
    figures = figures_of(tmp_path)
    assert (figures["eval_tokens_per_s"], figures["eval_s_8gpu"]) == ("1e+05", "77.5")
    assert figures["smaller_limit"] == str(session.script.stat().st_size + 850) == str(asked[1]["ARTIFACT_LIMIT_BYTES"])
    assert not session.log.problems


def probed(setting: str, milliseconds: int) -> Run:
    """A run in the probe: 60 steps, the last of them profiled and so slower."""
    clock = [(step, step * milliseconds) for step in (5, 10, 20, 30, 40)] + [(50, 99999)]
    profile = "profile steps:10 wall_ms_per_step:100 busy_ms_per_step:81 kernels:9"
    return Run([f"probe mix_order_reduction:{setting}", *steps(*clock), profile], 0)


def test_profile_compares_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runs are timed over the same steps, without those that are profiled."""
    session, asked = on_gpu(tmp_path, monkeypatch, probed("1", 90), probed("0", 84))
    gpu.profile(session)
    assert [settings["TORCHINDUCTOR_MIX_ORDER_REDUCTION"] for settings in asked] == [1, 0]
    figures = figures_of(tmp_path)
    assert (figures["ms_per_step"], figures["ms_per_step_without_mix_order"]) == ("90", "84")
    assert (figures["device_busy_share"], figures["attention_flash_ms"]) == ("0.9", "6.25")


@pytest.mark.parametrize("found", [("0", "0"), ("1", "1")])
def test_profile_sees_a_script_that_sets_it_itself(
    found: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs with the same setting are no comparison."""
    session, _ = on_gpu(tmp_path, monkeypatch, probed(found[0], 90), probed(found[1], 84))
    with pytest.raises(RunFailed, match="the script sets it itself"):
        gpu.profile(session)


def test_pytorch_without_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run is enough."""
    session, asked = on_gpu(tmp_path, monkeypatch, probed("none", 90))
    gpu.profile(session)
    assert len(asked) == 1


BATCH = "batch tokens:98304 ranks:1 micro_batch_tokens:98304 micro_steps:1"
ADVICE = "error: 98304 tokens do not fit the GPU: set MICRO_BATCH_TOKENS=32768"
OUT_OF_MEMORY = [BATCH, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"]


def test_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the value that the message names."""
    warmed = "warm_up steps:2 time:9ms peak_memory_bytes:19500000000 step_time:1ms end_time:0ms"
    ended = Run([BATCH.replace("micro_batch_tokens:98304", "micro_batch_tokens:32768"), warmed], 0)
    session, asked = on_gpu(tmp_path, monkeypatch, Run([BATCH, ADVICE], 2), ended)
    gpu.memory(session)
    assert [settings.get("MICRO_BATCH_TOKENS") for settings in asked] == [None, 32768]
    figures = figures_of(tmp_path)
    assert (figures["out_of_memory_with"], figures["micro_batch_tokens"]) == ("98304", "32768")
    assert figures["peak_gb"] == "19.5"
    assert not session.log.problems


def test_less_memory_as_the_script_advises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the script says of memory that its warm-up fills is what the stage reads."""
    cfg, rt = config(warmup_steps=1), runtime()
    trainer = t.Trainer(model_for(cfg), t.Data(cfg, rt), cfg, rt)

    def fills_memory(lr_scale: float) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "train_step", fills_memory)
    with pytest.raises(ValueError) as error:
        trainer.warm_up()
    session, asked = on_gpu(tmp_path, monkeypatch, Run([BATCH, f"error: {error.value}"], 2), Run([BATCH], 0))
    gpu.memory(session)
    assert asked[1]["MICRO_BATCH_TOKENS"] == cfg.train_batch_tokens // 2
    assert not session.log.problems


def test_less_memory_without_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it is tried, and the stage is not ok."""
    ended = Run(["batch tokens:98304 micro_batch_tokens:49152"], 0)
    session, asked = on_gpu(tmp_path, monkeypatch, Run(OUT_OF_MEMORY, 1), ended)
    gpu.memory(session)
    assert [settings.get("MICRO_BATCH_TOKENS") for settings in asked] == [None, 49152]
    assert session.log.problems == ["out of memory with 98304, and no MICRO_BATCH_TOKENS named"]


def test_less_memory_is_not_to_blame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another error fails the stage at once; so does memory that never does."""
    session, asked = on_gpu(tmp_path, monkeypatch, Run(["error: no shards"], 2))
    with pytest.raises(RunFailed, match="exit code 2: error: no shards"):
        gpu.memory(session)
    assert len(asked) == 1
    session, asked = on_gpu(tmp_path, monkeypatch, *[Run(OUT_OF_MEMORY, 1)] * 9)
    with pytest.raises(RunFailed, match="CUDA out of memory"):
        gpu.memory(session)
    assert len(asked) == gpu.MEMORY_TRIES


def test_table_of_a_result_with_bars(tmp_path: Path) -> None:
    """A bar in an error is no new cell; stages of two scripts show both."""
    (tmp_path / "1-ceilings.txt").write_text("script sha256:aa\nresult seconds:1.0 failed: a|b\n")
    (tmp_path / "2-default.txt").write_text("script sha256:bb\nfigure ms_per_step:9\n")
    text = gpu.table(tmp_path)
    assert rows(text)["1"][1] == "failed: a/b"
    assert rows(text)["2"][1:] == ["cut off", "", "ms_per_step:9"]
    assert "sha256:aa" in text and "sha256:bb" in text
