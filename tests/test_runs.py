"""The command line as its users type it, in subprocesses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tools import ROOT, corpus, environment, run, t, values


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One finished run of 20 steps on one process: its folder and its output."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(folder, run_id="one", iterations=20, warmdown_iters=10, val_loss_every=10, swa_every=2, eval_float=1)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_log_contract(finished: tuple[Path, str]) -> None:
    """The lines of the design, in the log and on the console; the log starts with the source."""
    folder, output = finished
    log = (folder / "logs" / "one.txt").read_text()
    assert log.startswith((ROOT / "train_gpt.py").read_text()) and all(line in log for line in output.splitlines())
    number = r"[0-9.]+"
    for pattern in (
        rf"step:20/20 train_loss:{number} lr_scale:{number} .*step_avg:{number}ms tokens_per_s:\d+ eta:\d+s",
        rf"step:10/20 val_loss:{number} val_bpb:{number} train_time:\d+ms step_avg:{number}ms",
        r"artifact bits:mlp4,attn5,bigram5 codec:zstd-22 model_bytes:\d+ code_bytes:\d+ artifact_bytes:\d+ limit:16",
        rf"float_sliding stride:8 val_loss:{number} val_bpb:{number}",
        rf"final_sliding stride:8 val_loss:{number} val_bpb:{number} eval_time:\d+ms",
        rf"final_int8_zlib_roundtrip_exact val_loss:{number} val_bpb:{number}",
        r"model params:\d+ .*mlp:\d+",
        r"swa snapshot:2 step:",
        r"export weights:swa",
        r"prune category:mlp codes_changed:\d+",
    ):
        assert re.search("^" + pattern, output, re.M), pattern
    size = (folder / "logs" / "one.ptz").stat().st_size
    assert values(output, "model_bytes") == [size] and values(output, "code_bytes") == [
        (ROOT / "train_gpt.py").stat().st_size
    ]
    assert values(output, "artifact_bytes")[0] == size + values(output, "code_bytes")[0]
    assert "final" in output.splitlines()[-1] and "config overrides: " in output


def test_artifact_evaluates_to_the_same_score(finished: tuple[Path, str]) -> None:
    """In a fresh process, on 1 and on 2 ranks, whatever the model variables say."""
    folder, output = finished
    expected = values(output, "val_bpb")[-1]
    for ranks in (0, 2):
        done = run(folder, ranks, eval_artifact="logs/one.ptz", num_layers=5, run_id=f"again{ranks}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert values(done.stdout, "val_bpb")[-1] == pytest.approx(expected, abs=1e-6 if ranks else 0)


@pytest.fixture(scope="module")
def without_qat(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of one process over 20 steps without fake quantization."""
    done = run(tmp_path_factory.mktemp("without"), iterations=20, warmdown_iters=10, qat_start_frac=1)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_alike(finished: tuple[Path, str], without_qat: str, tmp_path: Path, ranks: int) -> None:
    """The same 20 losses, one log, nothing from other ranks. Under QAT a last-bit difference flips codes: 1e-3."""
    for qat_start_frac, reference, tolerance in ((1, without_qat, 1e-5), (0, finished[1], 1e-3)):
        done = run(
            tmp_path,
            ranks,
            iterations=20,
            warmdown_iters=10,
            qat_start_frac=qat_start_frac,
            run_id=f"q{qat_start_frac}",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        losses = values(done.stdout, "train_loss")
        assert len(losses) == 20 and losses == pytest.approx(values(reference, "train_loss"), rel=tolerance)
        assert done.stdout.count("final_sliding stride") == 1
        assert len(list((tmp_path / "logs").glob(f"q{qat_start_frac}.*"))) == 3  # .txt, .weights, .ptz


def test_ranks_plan_and_choose_alike(tmp_path: Path) -> None:
    """With a plan from data, QAT from the middle on, error feedback and a choice of weights: 2 ranks do what 1 does."""
    outputs = []
    for ranks in (0, 2):
        done = run(
            tmp_path,
            ranks,
            run_id=f"r{ranks}",
            iterations=20,
            warmdown_iters=10,
            qat_start_frac=0.5,
            rate_control=1,
            error_feedback=1,
            swa_always=0,
            artifact_limit_bytes=(ROOT / "train_gpt.py").stat().st_size + 45000,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    one, two = outputs
    for key in ("last_nearest_loss", "swa_nearest_loss", "val_loss", "train_loss"):
        assert values(one, key) and values(two, key) == pytest.approx(values(one, key), rel=2e-3), key
    feedback = re.compile(r"(?:last|swa)_feedback(?:_but_mlp)?_loss:([0-9.]+)")
    assert len(feedback.findall(one)) == 2 == len(feedback.findall(two))
    assert re.findall(r"plan step:\d+", one) == re.findall(r"plan step:\d+", two) == ["plan step:10"]
    assert values(two, "artifact_bytes")[-1] == pytest.approx(values(one, "artifact_bytes")[-1], rel=0.004)


def test_two_runs_are_bitwise_equal(finished: tuple[Path, str], tmp_path: Path) -> None:
    """One seed: the same losses and the same artifact; compile warm-up steps leave no trace."""
    done = run(tmp_path, run_id="two", iterations=20, warmdown_iters=10, val_loss_every=10, swa_every=2, warmup_steps=3)
    assert done.returncode == 0 and "warm_up steps:3" in done.stdout
    pick = re.compile(r"(?:train_loss|val_loss|val_bpb):\S+")
    assert pick.findall(done.stdout) == [
        v for line in finished[1].splitlines() if "float_sliding" not in line for v in pick.findall(line)
    ]
    assert (tmp_path / "logs/two.ptz").read_bytes() == (finished[0] / "logs/one.ptz").read_bytes()


def test_two_nodes(tmp_path: Path) -> None:
    """Two torchrun agents that meet over the c10d rendezvous train together."""
    with t.contextlib.closing(__import__("socket").socket()) as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-id=test",
        str(ROOT / "train_gpt.py"),
    ]
    env = t.os.environ | environment(run_id="nodes")
    agents = [
        subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [agent.communicate(timeout=200) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum(out.count("final_sliding stride") for out, _ in outputs) == 1


def test_wall_clock_cap(tmp_path: Path) -> None:
    """Training ends before the cap with the learning rate warmed down, and the run is complete."""
    done = run(tmp_path, iterations=1000000, warmdown_iters=100, max_wallclock_seconds=4, train_log_every=1)
    assert done.returncode == 0, done.stdout + done.stderr
    took = re.search(r"training stopped:wallclock_cap step:(\d+) train_time:(\d+)ms", done.stdout)
    assert took and 3000 < int(took[2]) <= 4200 and int(took[1]) > 20
    scales = values(done.stdout, "lr_scale")
    assert scales[5] == 1.0 and scales[-1] < 0.1 and "swa snapshot:2" in done.stdout


def test_compiled_run(tmp_path: Path) -> None:
    """COMPILE=1 on a CPU: the losses of the eager run to 1e-5 relative, and a final score."""
    outputs = []
    for compiled in (0, 1):
        done = run(tmp_path, compile=compiled, run_id=f"c{compiled}", num_layers=1, iterations=4, qat_start_frac=0.5)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    assert "compile:1" in outputs[1] and "qat active:1 step:2" in outputs[1]
    eager, compiled_losses = (values(output, "train_loss") for output in outputs)
    assert compiled_losses == pytest.approx(eager, rel=1e-5)
    assert values(outputs[1], "val_bpb")[-1] == pytest.approx(values(outputs[0], "val_bpb")[-1], rel=1e-3)


def test_over_the_limit(tmp_path: Path) -> None:
    """The file is kept and scored, the log says by how much and what helps, the exit code is 3."""
    done = run(tmp_path, run_id="big", iterations=2, artifact_limit_bytes=1000)
    assert done.returncode == 3 and (tmp_path / "logs/big.ptz").exists() and "final_sliding" in done.stdout
    over = values(done.stdout, "artifact_bytes")[0] - 1000
    assert f"{over:.0f} bytes over ARTIFACT_LIMIT_BYTES=1000" in done.stdout and "RATE_CONTROL=1" in done.stdout


def test_text_files_and_late_qat(tmp_path: Path) -> None:
    """A run on one's own text; quantization starts half way and says so; a misspelled variable is reported."""
    sp, _ = t.load_tokenizer(str(corpus() / "tokenizer.model"), 320)
    tokens = t.open_shard(corpus() / "fineweb_train_000000.bin")
    for i in range(24):
        (tmp_path / f"d{i}.txt").write_text(
            sp.decode(tokens[300 * i : 300 * i + 300].astype(int).tolist()), encoding="utf-8"
        )
    done = run(tmp_path, text_files="*.txt", data_path=None, tokenizer_path=None, qat_start_frac=0.5, mlp_bit=3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "qat active:1 step:3" in done.stdout
        and "corpus building" in done.stdout
        and "did you mean MLP_BITS?" in done.stdout
    )


@pytest.mark.parametrize(
    ("changes", "code", "part"),
    [
        ({"data_path": "nowhere"}, 2, "DEMO=1"),
        ({"tokenizer_path": "nowhere"}, 2, "TOKENIZER_PATH"),
        ({"iterations": "x", "seed": "y"}, 2, "SEED='y'"),
        ({"eval_artifact": "none.ptz"}, 2, "no artifact at"),
        ({"matrix_lr": 1e30, "scalar_lr": 1e30, "tied_embed_lr": 1e30}, 4, "Try a lower MATRIX_LR"),
    ],
)
def test_errors_end_the_run(tmp_path: Path, changes: dict[str, object], code: int, part: str) -> None:
    """One readable message on stderr, no traceback, the documented exit code."""
    done = run(tmp_path, **changes)
    assert done.returncode == code and part in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_run_id_is_not_overwritten(finished: tuple[Path, str]) -> None:
    """An existing run is refused before anything happens."""
    before = (finished[0] / "logs/one.txt").read_bytes()
    done = run(finished[0], run_id="one")
    assert (
        done.returncode == 2 and "RUN_ID=one" in done.stderr and (finished[0] / "logs/one.txt").read_bytes() == before
    )


def test_ranks_that_do_not_divide(tmp_path: Path) -> None:
    """Under torchrun, before the ranks meet."""
    done = run(tmp_path, 3)
    assert done.returncode != 0 and "use one of 1, 2, 4, 8 ranks" in done.stderr
