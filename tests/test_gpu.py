"""tests/gpu.py, as far as a CPU goes: all of it at toy sizes, stages that fail, and what it reads from a log."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import gpu
import pytest
import runs
import torch
from tools import ROOT, corpus

import train_gpt as t

FILES = ["1-ceilings.txt", "2-runs.txt", "3-again.txt", "4-pr314.txt", "5-profile.txt", "6-memory.txt", "table.md"]
TRAINED = (
    "compile_warm_up_s ms_per_step ms_per_step_qat tflops share_of_ceiling peak_gb choice_s steps over_cap_s "
    "artifact_bytes val_bpb quantization_gap sliding_tokens_per_s eval_s_8gpu_compiling export_round_0_s"
).split()
FIGURES = {
    "1": ["product_tflops", "copy_gb_per_s"],
    "2": [*TRAINED, "planned_gb", "calibration_s", "plan_s", "qat_switch_s"],
    "3": "same_score killed_at_step resumed_at_step ended_at_step steps_trained_twice losses_apart smaller_limit "
    "smaller_bytes smaller_bpb_of_few_windows sliding_tokens_per_s eval_s_8gpu".split(),
    "4": TRAINED,
    "5": ["ms_per_step", "device_busy_share", "attention_pytorch_choice_ms", "attention_flash_ms"],
    "6": [],
}


def program(*words: Any, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """tests/gpu.py with these options."""
    command = [sys.executable, str(ROOT / "tests/gpu.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | {"LANG": "C"})


def rows(text: str) -> dict[str, list[str]]:
    """The table that a text ends with: by number of the stage, its question, result, seconds and figures."""
    found = [line.strip("| ").split("|") for line in text.splitlines() if re.match(r"\| \d ", line)]
    return {cells[0].split()[0]: [cell.strip() for cell in cells[1:]] for cells in found}


def options(tmp_path: Path, *words: str) -> argparse.Namespace:
    """Options of a call whose files are in a scratch folder."""
    return gpu.arguments(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *words])


def test_all_stages_on_a_cpu(tmp_path: Path) -> None:
    """The whole program but for compiling: every stage is ok, every file and figure is there, the table comes last."""
    out = tmp_path / "out"
    limits = ["--minutes", 20, "--train-seconds", 4]
    done = program("--cpu", "--no-compile", *limits, "--out", out, "--work", tmp_path / "work")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert done.stdout.endswith((out / "table.md").read_text())
    table = rows(done.stdout)
    assert [table[number][1] for number in "123456"] == ["ok"] * 5 + ["skipped: needs CUDA"]
    for number, names in FIGURES.items():
        text = next(out.glob(f"{number}-*.txt")).read_text()
        assert set(names) <= set(re.findall(r"^figure (\w+):", text, re.M)), number
    again = (out / "3-again.txt").read_text()
    figures = dict(re.findall(r"^figure (\w+):(\S+)", again, re.M))
    assert figures["same_score"] == "1" and figures["losses_apart"] == "0"
    assert int(figures["resumed_at_step"]) < int(figures["killed_at_step"]) < int(figures["ended_at_step"]) == 40
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
    lines = capsys.readouterr().out.splitlines()
    limits = runs.numbers(lines, "stage ", "limit_s")
    chosen = gpu.arguments(["--plan", *words.split()])
    assert len(limits) == len(chosen.stages) and all(limit > 0 for limit in limits)
    assert sum(limits) < 60 * chosen.minutes


@pytest.mark.parametrize(
    "words",
    [["--stages", "0"], ["--stages", "2-9"], ["--minutes", "0"], ["--data", "x"], ["--table", "x"], ["--out", ""]],
)
def test_bad_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and a message that names the value."""
    with pytest.raises(SystemExit) as error:
        gpu.main(words)
    assert error.value.code == 2 and words[0].removeprefix("--") in capsys.readouterr().err


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

    def sleeps(bench: gpu.Bench) -> None:
        bench.figure("before", 1)
        time.sleep(600)

    def runs_for_ever(bench: gpu.Bench) -> None:
        run = bench.launch([sys.executable, str(sleeper)], {})
        bench.figure("first_loss", runs.losses(run)[1])
        run.check()

    def runs_after_the_end(bench: gpu.Bench) -> None:
        bench.launch([sys.executable, "-c", "import time; time.sleep(600)"], {})
        bench.launch([sys.executable, "-c", "print('must not run')"], {})

    def takes_a_wrong_path(bench: gpu.Bench) -> None:
        bench.launch([sys.executable, str(tmp_path / "missing.py")], {}).check()

    def has_a_bug(bench: gpu.Bench) -> None:
        raise KeyError("gone")

    def is_fine(bench: gpu.Bench) -> None:
        bench.figure("fine", 7)

    works = [sleeps, runs_for_ever, runs_after_the_end, takes_a_wrong_path, has_a_bug, is_fine]
    shown = ("before", "first_loss", "fine")
    stages = tuple(gpu.Stage(i, work.__name__, "?", work, 1, 1, shown) for i, work in enumerate(works, 1))
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "machine_lines", lambda bench: ["machine none"])
    begun = time.monotonic()
    words = ["--cpu", "--minutes", "0.2", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert gpu.main(words) == 1
    assert time.monotonic() - begun < 12
    table = rows((tmp_path / "out/table.md").read_text())
    assert [table[n][1] for n in "123"] == ["over time"] * 3
    assert table["4"][1].startswith("failed: exit code 2: ") and "missing.py" in table["4"][1]
    assert table["5"][1] == "failed: KeyError: 'gone'"
    assert [table[n][3] for n in "126"] == ["before:1", "first_loss:5.5", "fine:7"] and table["6"][1] == "ok"
    text = (tmp_path / "out/2-runs_for_ever.txt").read_text()
    assert not any(runs.is_running(int(pid)) for pid in re.findall(r"pids (\d+) (\d+)", text)[0])
    assert "must not run" not in (tmp_path / "out/3-runs_after_the_end.txt").read_text()


def test_wrong_data_path(tmp_path: Path) -> None:
    """The stages that need data say what the script says of it; the one that needs none is ok."""
    data = ["--data", tmp_path / "none", "--tokenizer", tmp_path / "none.model"]
    done = program(
        "--cpu", "--stages", "1,5", "--minutes", 5, *data, "--out", tmp_path / "out", "--work", tmp_path / "work"
    )
    table = rows(done.stdout)
    assert done.returncode == 1 and table["1"][1] == "ok"
    assert table["5"][1].startswith("failed: exit code 2: ") and "none.model" in table["5"][1]


def test_cut_off(tmp_path: Path) -> None:
    """Ended by SIGTERM in mid-stage: the runs end, too, what was printed is on disk, and --table shows it."""
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tests/gpu.py"), "--cpu", "--stages", "4", "--out", str(out)]
    command += ["--work", str(tmp_path / "work"), "--script", str(sleeping_script(tmp_path))]
    command += ["--data", str(corpus()), "--tokenizer", str(corpus() / "tokenizer.model")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        path, found = out / "4-pr314.txt", []
        while not found and process.poll() is None:
            time.sleep(0.05)
            found = re.findall(r"pids (\d+) (\d+)\n.*step:1", path.read_text()) if path.is_file() else []
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143
    assert not any(runs.is_running(int(pid)) for pid in found[0])
    done = program("--table", out)
    assert done.returncode == 0 and rows(done.stdout)["4"][1] == "cut off"


def test_needs_a_gpu_or_cpu_option(tmp_path: Path) -> None:
    """On a machine without CUDA the message names the option that helps."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = program("--stages", "1", "--out", tmp_path / "out", "--work", tmp_path / "work")
    assert done.returncode == 1 and "--cpu" in done.stderr


def test_missing_package_comes_from_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, the message names the package and the remedy."""
    monkeypatch.setattr(gpu, "PACKAGES", ("torch", "tiny_package"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    bench = gpu.Bench(options(tmp_path, "--cpu"))
    with pytest.raises(SystemExit, match="missing packages: tiny_package.*--wheels"):
        gpu.install_missing(bench, None)
    with zipfile.ZipFile(tmp_path / "tiny_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_package.py", "answer = 42\n")
        wheel.writestr(
            "tiny_package-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\n"
        )
        wheel.writestr(
            "tiny_package-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_package-1.0.dist-info/RECORD", "")
    gpu.install_missing(bench, tmp_path)
    run = bench.launch([sys.executable, "-c", "import tiny_package; print(tiny_package.answer)"], {})
    assert run.lines == ["42"]


RECOMPILED = """\
[rank0]:V1127 13:39:21 2891 guards.py:5396] [1/1] [__recompiles] Recompiling function nll in train_gpt.py:776
[rank0]:V1127 13:39:21 2891 guards.py:5396] [1/1] [__recompiles]     triggered by the following guard failure(s):
[rank0]:V1127 13:39:21 2891 guards.py:5396] [1/1] [__recompiles]     - 1/0: tensor 'x0' stride mismatch"""


def test_recompiles_are_those_of_training_steps() -> None:
    """Not those of the warm-up or of the evaluation."""
    warm, first, last = "warm_up steps:20 time:60s", "step:1/9 train_loss:6.0", "step:9/9 train_loss:5.0"
    lines = [*RECOMPILED.splitlines(), warm, first, last, *RECOMPILED.splitlines()]
    assert runs.recompiles(lines) == 0
    assert runs.recompiles([warm, first, *RECOMPILED.splitlines(), last]) == 1


def test_recompiles_as_this_pytorch_reports_them(tmp_path: Path) -> None:
    """What TORCH_LOGS=recompiles prints today is what is counted."""
    code = """
import torch
double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
double(torch.ones(3))
print("warm_up", flush=True)
double(torch.ones(4))
print("step:1/1 train_loss:1", flush=True)
"""
    bench = gpu.Bench(options(tmp_path, "--cpu"))
    run = bench.launch([sys.executable, "-c", code], {})
    assert run.code == 0 and runs.recompiles(run.lines) == 1


def steps(*clock: tuple[int, float]) -> list[str]:
    """Log lines of steps at these milliseconds."""
    return [
        f"step:{step}/99 train_loss:5.0 lr_scale:1.0000 train_time:{ms:.0f}ms step_avg:9.99ms" for step, ms in clock
    ]


def test_step_times() -> None:
    """Medians without the first steps; the switch to fake quantization apart from the step that it stands in."""
    before = steps((1, 5000), (5, 5400), (10, 5900), (20, 6900), (30, 9900), (40, 10900))
    after = steps((50, 14400), (60, 15600), (70, 16800))
    assert runs.step_times([*before, "qat active:1 step:45", *after]) == (100, 120, 2.5)
    assert runs.step_times(before) == (100, None, None)
    assert runs.step_times(["qat active:1 step:0 bits:mlp4", *before]) == (None, 100, None)
    assert runs.step_times([]) == (None, None, None)


def test_flops_are_those_of_the_script() -> None:
    """At full size to 0.5%: the script counts the projection of bigrams, too."""
    cfg = t.load_config({})[0]
    with torch.device("meta"):
        model = t.GPT(cfg, {}, torch.float32)
    counts: Counter[str] = Counter()
    for name, p in model.named_parameters():
        counts[t.category(name)] += p.numel()
    run = runs.Run([f"model params:1 attn:{counts['attn']} mlp:{counts['mlp']} embed:{counts['embed']}"])
    assert gpu.step_tflop(run, vars(cfg)) == pytest.approx(t.step_flops(model, cfg) / 1e12, rel=0.005)


TORCHRUN = """\
W1127 13:39:21.866000 2891 torch/distributed/run.py:852] Setting OMP_NUM_THREADS
{error}
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train_gpt.py FAILED"""


@pytest.mark.parametrize(
    "error, expected",
    [
        ("error: no shards match none/*.bin", "error: no shards match none/*.bin"),
        (
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried",
            "torch.OutOfMemoryError: CUDA out of memory. Tried",
        ),
        ("error on rank 1: nothing", "error on rank 1: nothing"),
    ],
)
def test_error_line(error: str, expected: str) -> None:
    """The script's own error, not the launcher's."""
    assert runs.error_line(TORCHRUN.format(error=error).splitlines()) == expected


def test_few_windows(tmp_path: Path) -> None:
    """The small validation split is a sound shard of whole windows, beside the same training shards."""
    bench = gpu.Bench(options(tmp_path, "--cpu"))
    small = bench.with_few_windows(corpus())
    val = t.open_shard(small / "fineweb_val_000000.bin")
    whole = t.open_shard(corpus() / "fineweb_val_000000.bin")
    assert len(val) == min(len(whole), 32 * 64 + 1) and (val == whole[: len(val)]).all()
    assert (small / "fineweb_train_000000.bin").resolve() == (corpus() / "fineweb_train_000000.bin").resolve()


def on_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[runs.Run]
) -> tuple[gpu.Bench, list[dict[str, Any]]]:
    """A bench for a GPU whose runs give these answers; and the settings that it asked for."""
    bench, asked = gpu.Bench(options(tmp_path)), []

    def answer(run_id: str, settings: dict[str, Any], **_: Any) -> runs.Run:
        asked.append(bench.sizes | settings)
        return answers[len(asked) - 1]

    monkeypatch.setattr(bench, "run", answer)
    return bench, asked


def test_compiling_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage says so and still answers the rest, uncompiled; so do later stages."""
    failed = runs.Run(["InductorError: no Triton"], 1)
    scored = runs.Run([*steps((5, 100), (10, 600)), "final_sliding stride:64 val_bpb:1.5 eval_time:9ms"], 0)
    bench, asked = on_gpu(tmp_path, monkeypatch, [failed, scored])
    gpu.train_and_score(bench, "default", torchrun=True)
    assert [settings.get("COMPILE") for settings in asked] == [None, 0]
    assert bench.problems == ["failed before its first step, then tried COMPILE=0: InductorError: no Triton"]
    assert bench.state["default"]["val_bpb"] == "1.5" and gpu.Bench(options(tmp_path)).sizes["COMPILE"] == 0


OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory."
BATCH = "batch tokens:98304 ranks:1 micro_batch_tokens:98304 micro_steps:1"


def test_less_memory_follows_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the value that the message names; without one it halves, and the stage says so."""
    advice = f"error: {OUT_OF_MEMORY} Set MICRO_BATCH_TOKENS=32768"
    ended = runs.Run(["batch micro_batch_tokens:32768"], 0)
    bench, asked = on_gpu(tmp_path, monkeypatch, [runs.Run([BATCH, advice], 2), ended])
    gpu.memory(bench)
    assert asked[1]["MICRO_BATCH_TOKENS"] == 32768 and not bench.problems
    silent = [runs.Run([BATCH, OUT_OF_MEMORY], 1), runs.Run([OUT_OF_MEMORY], 1), ended]
    bench, asked = on_gpu(tmp_path, monkeypatch, silent)
    gpu.memory(bench)
    assert [settings.get("MICRO_BATCH_TOKENS") for settings in asked] == [None, 49152, 24576] and len(
        bench.problems
    ) == 2
    bench, _ = on_gpu(tmp_path, monkeypatch, [runs.Run(["error: no shards"], 2)])
    with pytest.raises(runs.RunFailed, match="no shards"):
        gpu.memory(bench)
