"""The command line as its users type it: the log, exit codes, ranks, the clock, every error message."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import CODE_BYTES, PLAIN, cli, do_after, fork_ranks, free_port, kill, names, torchrun
from tools import ROOT, config, corpus, run, runtime, t, values, write_shard

LONG: dict[str, Any] = {"iterations": 20, "warmdown_iters": 10, "val_loss_every": 10, "swa_every": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One finished run of 20 steps as a process of its own: its folder and its output."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(folder, run_id="one", eval_float=1, **LONG)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return folder, done.stdout


# ---- one rank --------------------------------------------------------------------------------------------------------
def test_log_contract(finished: tuple[Path, str]) -> None:
    """The lines that log readers parse, in the log and on the console; the log starts with the source."""
    folder, output = finished
    log = (folder / "logs" / "one.txt").read_text()
    source = (ROOT / "train_gpt.py").read_text()
    assert log.startswith(source + "=" * 100 + "\nrun id:one python:") and all(x in log for x in output.splitlines())
    config_line = next(line for line in log[len(source) :].splitlines() if line.startswith("config {"))
    assert t.json.loads(config_line.removeprefix("config "))["iterations"] == 20 and config_line not in output
    n, whole = r"[0-9.]+", r"\d+"
    for pattern in (
        rf"runtime world_size:1 device:cpu name:cpus:{whole} compute_dtype:float32 compile:0 flash3:0",
        r"config overrides: .*\bITERATIONS=20\b",
        rf"data path:\S+ val_tokens:{whole} val_targets:{whole}",
        rf"data train_shards:1 train_tokens:{whole} windows:{whole}",
        rf"model params:{whole} seed:42$",
        r"batch tokens:256 ranks:1 micro_batch_tokens:256 micro_steps:1",
        rf"warm_up steps:0 time:{whole}ms peak_memory_bytes:0 step_time:{whole}ms end_time:0ms$",
        rf"qat active:1 step:0 time:{whole}ms",
        rf"step:20/20 train_loss:{n} lr_scale:{n} grad_norm:{n} train_time:{whole}ms step_avg:{n}ms",
        rf"step:10/20 val_loss:{n} val_bpb:{n} train_time:{whole}ms",
        r"swa snapshot:2 step:",
        rf"export weights:swa path:logs/one.weights snapshots:2 time:{whole}ms",
        rf"training stopped:iterations step:20 train_time:{whole}ms$",
        rf"float_sliding stride:8 val_loss:{n} val_bpb:{n}",
        rf"artifact category:mlp params:{whole} bytes:{whole} bits_per_weight:{n} levels:1[56]$",
        r"artifact path:logs/one.ptz codec:zstd-22 model_bytes:\d+ code_bytes:\d+ artifact_bytes:\d+ limit:16000000 ",
        rf"final_sliding stride:8 val_loss:{n} val_bpb:{n} eval_time:{whole}ms",
    ):
        assert re.search("^" + pattern, output, re.M), pattern
    size = (folder / "logs" / "one.ptz").stat().st_size
    assert values(output, "model_bytes") == [size, size] and values(output, "code_bytes") == [CODE_BYTES]
    assert values(output, "artifact_bytes") == [size + CODE_BYTES]
    assert re.fullmatch(rf"final_int8_zlib_roundtrip_exact val_loss:{n} val_bpb:{n}", output.splitlines()[-1])
    assert names(folder) == ["one.ptz", "one.txt", "one.weights"]


def test_artifact_evaluates_to_the_same_score(finished: tuple[Path, str]) -> None:
    """In another process, whatever the model variables say; into a log of its own."""
    folder, output = finished
    done = cli(folder, {"eval_artifact": "logs/one.ptz", "num_layers": 5, "run_id": "one"})
    assert done.code == 0 and values(done.out, "val_bpb")[-1] == values(output, "val_bpb")[-1], done
    assert not values(done.out, "train_loss") and "eval-one.txt" in names(folder)


def test_two_runs_are_bitwise_equal(finished: tuple[Path, str], tmp_path: Path) -> None:
    """One seed: the same losses and the same artifact; warm-up steps leave no trace."""
    done = cli(tmp_path, LONG, run_id="two", warmup_steps=3)
    assert done.code == 0 and "warm_up steps:3" in done.out, done
    pick = re.compile(r"(?:train_loss|val_loss|val_bpb):\S+")
    expected = "\n".join(line for line in finished[1].splitlines() if "float_sliding" not in line)
    assert pick.findall(done.out) == pick.findall(expected) != []
    assert (tmp_path / "logs/two.ptz").read_bytes() == (finished[0] / "logs/one.ptz").read_bytes()


def test_wall_clock_cap(tmp_path: Path) -> None:
    """Training ends before the cap, warmed down; quantization starts by the clock; the run is complete."""
    changes = {"iterations": 10**6, "warmdown_iters": 20, "qat_start_frac": 0.5}
    done = cli(tmp_path, changes, max_wallclock_seconds=3)
    assert done.code == 0, done
    took = re.search(r"training stopped:wallclock_cap step:(\d+) train_time:(\d+)ms", done.out)
    assert took and 2000 < int(took[2]) <= 3000 and int(took[1]) > 10, done.out
    scales = values(done.out, "lr_scale")
    assert scales[5] == 1.0 and scales[-1] < 0.2 and "swa snapshot:2" in done.out
    before, after = done.out.split("qat active:1")
    assert int(re.findall(r"train_time:(\d+)ms", before)[-1]) >= 1350 and values(before, "train_loss"), before
    assert len(values(after, "train_loss")) > 2


def test_quantization_starts_at_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the steps, at the first one not below it; 1 means never."""
    monkeypatch.setattr(t.Trainer, "finish", kill)
    for frac, expected in ((0.0, ["0"]), (0.34, ["3"]), (0.5, ["3"]), (0.99, []), (1, [])):
        done = cli(tmp_path, PLAIN, run_id=f"q{frac}", qat_start_frac=frac, checkpoint_every=0)
        assert done.code == -9 and re.findall(r"qat active:1 step:(\d+)", done.out) == expected, done


def test_average_starts_anew_with_quantization(tmp_path: Path) -> None:
    """Snapshots from before would not fit those after: the exported mean is that of the last two steps alone."""
    seen: list[t.Tensors] = []
    with pytest.MonkeyPatch.context() as patch:

        def note(_: Any, model: t.GPT) -> None:
            """Keep the weights of a snapshot."""
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

        do_after(patch, t.AveragedModel, "update_parameters", note)
        done = cli(tmp_path, {"run_id": "x", "qat_start_frac": 0.66, "swa_start_frac": 1})
    assert done.code == 0 and len(seen) == 3 and "weights:swa path:logs/x.weights snapshots:2" in done.out, done
    found = re.findall(r"^(?:swa|qat) (\w+:1 step:\d|snapshot:2 step:\d)", done.out, re.M)
    assert found == ["snapshot:1 step:4", "active:1 step:4", "snapshot:1 step:5", "snapshot:2 step:6"]
    kept = t.load_tensors(tmp_path / "logs/x.weights")["weights"]
    for name, weight in kept.items():
        t.torch.testing.assert_close(weight, (seen[-1][name] + seen[-2][name]) / 2)


def test_compiled_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COMPILE=1: whole graphs, captured before QAT and not again; the losses of the eager run. The code that the
    compiler makes is tested in test_network.py, where it takes a minute."""
    changes = {"num_layers": 1, "iterations": 4, "qat_start_frac": 0.5, "warmup_steps": 1, "eval_stride": 0}
    eager = cli(tmp_path, changes, run_id="eager")
    compile_without_codegen = functools.partial(t.torch.compile, backend="eager")
    monkeypatch.setattr(t.torch, "compile", compile_without_codegen)
    graphs: list[int] = []
    do_after(monkeypatch, t.Trainer, "warm_up", lambda _: graphs.append(captured()))
    do_after(monkeypatch, t.Trainer, "log_step", lambda *_: graphs.append(captured()))
    monkeypatch.setattr(t, "export", kill)
    done = cli(tmp_path, changes, run_id="compiled", compile=1)
    assert eager.code == 0 and done.code == -9, done
    assert "compile:1" in done.out and "qat active:1 step:2" in done.out
    assert len(graphs) == 5 and len({*graphs}) == 1 and graphs[0] > 0
    assert values(done.out, "train_loss") == pytest.approx(values(eager.out, "train_loss"), rel=1e-5)
    assert values(done.out, "val_bpb") == pytest.approx(values(eager.out, "val_bpb")[:1], rel=1e-5)


def captured() -> int:
    """How many graphs torch.compile has captured in this process."""
    return int(t.torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_one_layer(tmp_path: Path) -> None:
    """The smallest model has no skips, so that one of its parameters is empty."""
    done = cli(
        tmp_path, {"run_id": "x", "num_layers": 1, "rate_control": 1, "artifact_limit_bytes": CODE_BYTES + 15000}
    )
    assert done.code == 0 and "final_sliding" in done.out, done


def test_over_the_limit(tmp_path: Path) -> None:
    """The file is kept and scored, the log says by how much and what helps, the exit code is 3."""
    done = cli(tmp_path, {"run_id": "big", "iterations": 2, "artifact_limit_bytes": 1000})
    assert done.code == 3 and (tmp_path / "logs/big.ptz").exists() and "final_sliding" in done.out
    over = values(done.out, "artifact_bytes")[0] - 1000
    assert f"error: {over:.0f} bytes over ARTIFACT_LIMIT_BYTES: set RATE_CONTROL=1" in done.out


def test_text_files_and_misspelled_variable(tmp_path: Path) -> None:
    """A run on one's own text; a misspelled variable is reported with the likely name."""
    sp = t.sentencepiece.SentencePieceProcessor(model_file=str(corpus() / "tokenizer.model"))
    tokens = t.open_shard(corpus() / "fineweb_train_000000.bin").astype(int).tolist()
    for i in range(24):
        (tmp_path / f"d{i}.txt").write_text(sp.decode(tokens[300 * i : 300 * i + 300]), encoding="utf-8")
    done = cli(tmp_path, {"run_id": "x"}, text_files="*.txt", data_path=None, tokenizer_path=None, mlp_bit=3)
    assert done.code == 0 and "corpus building" in done.out, done
    assert "warning: environment variable MLP_BIT is not known; did you mean MLP_BITS?" in done.out


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("-h", 0), ("--iterations=5", 2), ("8", 2)])
def test_arguments_start_no_run(tmp_path: Path, argument: str, code: int) -> None:
    """They print the usage, which says that settings are variables; nothing is written. Only help is no error."""
    done = cli(tmp_path, {}, argument)
    assert done.code == code and not done.err, done
    assert "Settings are environment variables, not arguments" in done.out and "DEMO=1 python train_gpt.py" in done.out
    assert not list(tmp_path.iterdir())


# ---- ranks -----------------------------------------------------------------------------------------------------------
RANKS: dict[str, Any] = {
    "run_id": "r",
    "eval_stride": 16,
    "iterations": 20,
    "warmdown_iters": 10,
    "qat_start_frac": 0.9,
    "rate_control": 1,
    "swa_always": 0,
    "calibration_tokens": 6144,  # 3 batches: not the same number for each rank
    "artifact_limit_bytes": CODE_BYTES + 25000,
}
BEFORE_QAT = 18  # steps


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of 20 steps with a plan from data, QAT for the last two and a choice of weights."""
    folder = tmp_path_factory.mktemp("ranks")
    done = cli(folder, RANKS)
    assert done.code == 0, done
    return folder, done.out


def two_machines(folder: Path) -> str:
    """The output of the same under two torchrun agents with a rank each, which share no folder."""
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    folders = folder / "a", folder / "b"
    for each in folders:
        each.mkdir()
    agents = [torchrun(each, *options, "--rdzv-id=test", **RANKS) for each in folders]
    outputs = [agent.end()[1] for agent in agents]
    assert [agent.end()[0] for agent in agents] == [0, 0], outputs
    first = int("world_size" in outputs[1])  # which agent gets rank 0 is chance
    assert "loss:" not in outputs[1 - first] and not names(folders[1 - first])
    shutil.copytree(folders[first] / "logs", folder / "logs")
    return outputs[first]


def four_ranks(folder: Path) -> str:
    """The output of the same on four ranks of one machine."""
    (code, out), *others = (rank.end() for rank in fork_ranks(folder, 4, **RANKS))
    assert code == 0 and others == [(0, "")] * 3, (out, others)
    return out


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_alike(one_rank: tuple[Path, str], tmp_path: Path, ranks: int) -> None:
    """The losses, choices and artifact of one rank; one log, nothing from other ranks. Under QAT a last-bit difference
    flips codes: 1e-3."""
    out, expected = (two_machines if ranks == 2 else four_ranks)(tmp_path), one_rank[1]
    losses = values(out, "train_loss")
    assert len(losses) == 20 and f"world_size:{ranks} " in out
    assert losses[:BEFORE_QAT] == pytest.approx(values(expected, "train_loss")[:BEFORE_QAT], rel=1e-5)
    for key in ("train_loss", "last_loss", "swa_loss", "val_loss"):
        assert values(expected, key) and values(out, key) == pytest.approx(values(expected, key), rel=1e-3), key
    events = re.compile(r"^(?:qat|swa|export) .*?(?= lr_scale| last_loss| time|$)", re.M)
    assert events.findall(out) == events.findall(expected) != []
    assert out.count("final_sliding stride") == 1 and names(tmp_path) == ["r.ptz", "r.txt", "r.weights"]
    assert values(out, "artifact_bytes") == pytest.approx(values(expected, "artifact_bytes"), rel=0.004)
    there, here = (weights_of(folder / "logs/r.ptz") for folder in (one_rank[0], tmp_path))
    assert relative_difference(there, here) < 0.04
    again = cli(tmp_path, {"eval_artifact": "logs/r.ptz", "eval_stride": 16})
    assert again.code == 0 and values(again.out, "val_bpb")[-1] == pytest.approx(values(out, "val_bpb")[-1], abs=1e-6)


def weights_of(path: Path) -> t.Tensors:
    """What an artifact stores."""
    _, stored, _ = t.decode_artifact(path.read_bytes(), str(path), config())
    return {name: tensor.dequantize() for name, tensor in stored.items()}


def relative_difference(a: t.Tensors, b: t.Tensors) -> float:
    """Norm of a - b over that of a."""
    assert a.keys() == b.keys()
    squares = [[float(x.square().sum()) for x in (a[name] - b[name], a[name])] for name in a]
    different, size = np.sum(squares, axis=0)
    return float(np.sqrt(different / size))


# ---- every error: exit code and message ------------------------------------------------------------------------------
Damage = Callable[[Path], dict[str, Any]]  # spoils the data folder it is given; returns the settings of the run


def random_shards(folder: Path, train: int = 2000, val: int = 500) -> Path:
    """A data folder of random tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        write_shard(folder / f"fineweb_{split}_000000.bin", rng.integers(4, 300, count))
    return folder


def spoil(path: Path, at: int, content: bytes) -> None:
    """Overwrite a part of a file."""
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)


def overwritten(name: str, at: int, content: bytes) -> Damage:
    """A part of a shard overwritten."""

    def damage(data: Path) -> dict[str, Any]:
        """Overwrite it."""
        spoil(data / f"fineweb_{name}_000000.bin", at, content)
        return {}

    return damage


def resized(name: str, cut: int, more: bytes = b"") -> Damage:
    """A shard with `cut` bytes less and some more."""

    def damage(data: Path) -> dict[str, Any]:
        """Cut and append."""
        path = data / f"fineweb_{name}_000000.bin"
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut] + more)
        return {}

    return damage


def foreign_tokenizer(data: Path) -> dict[str, Any]:
    """A tokenizer that is none."""
    (data / "foreign.model").write_bytes(b"this is no model")
    return {"tokenizer_path": data / "foreign.model"}


def empty_tokenizer(data: Path) -> dict[str, Any]:
    """A tokenizer whose download broke off at once."""
    (data / "empty.model").write_bytes(b"")
    return {"tokenizer_path": data / "empty.model"}


def short_split(data: Path) -> dict[str, Any]:
    """A validation split of less than one window."""
    write_shard(data / "fineweb_val_000000.bin", np.arange(4, 24))
    return {}


def text(content: bytes) -> Damage:
    """A text file as the corpus."""

    def damage(data: Path) -> dict[str, Any]:
        """Write it."""
        (data / "text.txt").write_bytes(content)
        return {"text_files": data / "text.txt", "data_path": None, "tokenizer_path": None}

    return damage


def settings(**changes: Any) -> Damage:
    """Nothing spoiled, other settings."""
    return lambda data: changes


BAD_SHARD = "bin is damaged, truncated or no token shard: download it again or remove it"
NUMBERED = b"".join(b"%d words\n\n" % i for i in range(900))
INPUT_ERRORS: list[tuple[Damage, list[str]]] = [
    (settings(data_path="nowhere"), ["no shards match nowhere", "set DATA_PATH"]),
    (overwritten("train", 0, b"\1\2"), [f"fineweb_train_000000.{BAD_SHARD}"]),
    (overwritten("val", 4, b"\7"), [f"fineweb_val_000000.{BAD_SHARD}"]),
    (resized("train", 7), [f"fineweb_train_000000.{BAD_SHARD}"]),
    (resized("val", 2020), [f"fineweb_val_000000.{BAD_SHARD}"]),
    (resized("val", 0, b"more"), [f"fineweb_val_000000.{BAD_SHARD}"]),
    (overwritten("val", 1024 + 500, b"\xff\xff"), ["fineweb_val_000000.bin: token id 65535 is beyond VOCAB_SIZE=320"]),
    (overwritten("train", 1024 + 2, b"\x40\1"), ["fineweb_train_000000.bin: token id 320 is beyond VOCAB_SIZE=320"]),
    (short_split, ["20 validation tokens are less than TRAIN_SEQ_LEN + 1"]),
    (settings(tokenizer_path="nowhere"), ["TOKENIZER_PATH=nowhere: [Errno 2] No such file", "DEMO=1"]),
    (foreign_tokenizer, ["TOKENIZER_PATH=", "foreign.model: ", "get it, or set DEMO=1"]),
    (empty_tokenizer, ["empty.model has 0 pieces"]),
    (settings(vocab_size=400), ["tokenizer.model has 320 pieces, VOCAB_SIZE=400"]),
    (settings(iterations="many", num_heads=5, demo="x"), ["ITERATIONS='many'", "NUM_HEADS=5", "DEMO='x'"]),
    (settings(tie_embeddings=0), ["TIE_EMBEDDINGS=False is none of True"]),
    (settings(demo=1, text_files="x"), ["DATA_PATH and DEMO and TEXT_FILES exclude each other: remove one"]),
    (
        settings(text_files="*.nothing", data_path=None, tokenizer_path=None),
        ["no file matches TEXT_FILES='*.nothing'", "quote the glob"],
    ),
    (text(b"\xff\xfe\0"), ["text.txt is not UTF-8 text", "convert or exclude it"]),
    (text(b"one line"), ["no tokenizer of VOCAB_SIZE=320 from this text: give more of it"]),
    (text(NUMBERED), ["no tokenizer of VOCAB_SIZE=320 from this text: give more of it"]),
    (settings(run_id=None, resume=1), ["RESUME=1 needs RUN_ID"]),
    (settings(eval_artifact="none.ptz"), ["none.ptz"]),
    (settings(export_from="none.weights"), ["none.weights"]),
]


@pytest.mark.parametrize(("damage", "parts"), INPUT_ERRORS)
def test_input_errors(tmp_path: Path, damage: Damage, parts: list[str]) -> None:
    """Exit code 2 before any training, one message with value and remedy; a dry run says the same."""
    changes = PLAIN | {"data_path": random_shards(tmp_path / "data")}
    changes |= damage(tmp_path / "data")
    for dry_run in (1, 0):
        done = cli(tmp_path, changes, dry_run=dry_run)
        assert done.code == 2 and done.err.startswith("error: ") and not values(done.out, "train_loss"), done
        assert all(part in done.err for part in parts) and "Traceback" not in done.err, done.err


def test_ranks_that_do_not_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by a dry run for that many ranks, with the value."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = cli(tmp_path, PLAIN, dry_run=1)
    assert done.code == 2 and done.err == "error: 3 ranks do not divide TRAIN_BATCH_TOKENS=256 evenly\n", done


def test_memory_that_does_not_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up finds it, before the clock runs, and says what to set."""

    def full(*_: Any) -> None:
        """Stands for a GPU."""
        raise t.torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(t.Trainer, "train_step", full)
    done = cli(tmp_path, PLAIN, warmup_steps=1)
    assert done.code == 2 and done.err == "error: 256 tokens do not fit the GPU: set MICRO_BATCH_TOKENS=128\n", done


def test_token_in_mid_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token beyond the vocabulary where nothing is read at start: exit code 2 when its batch comes, and before the
    first step where calibration would read it."""
    monkeypatch.setattr(t, "CHECKED_TOKENS", 100)
    data = random_shards(tmp_path / "data", train=140000)
    changes = PLAIN | {"data_path": data, "sequence_order": "file"}
    windows = t.Data(config(**changes), runtime())
    for window, steps in ((21, 2), (windows.num_windows - 1, 0)):
        spoil(data / "fineweb_train_000000.bin", 1024 + 2 * (32 * window + 5), b"\xff\xff")
        done = cli(tmp_path, changes, run_id=f"x{window}")
        assert done.code == 2 and "token id 65535 is beyond VOCAB_SIZE=320" in done.err, done
        assert len(values(done.out, "train_loss")) == steps == len(names(tmp_path, f"x{window}.*.ckpt"))


def test_run_id_is_not_overwritten(finished: tuple[Path, str]) -> None:
    """An existing run is refused before anything happens, with both remedies."""
    before = (finished[0] / "logs/one.txt").read_bytes()
    done = cli(finished[0], {"run_id": "one"})
    assert done.code == 2 and "RUN_ID=one has a log: choose another RUN_ID, or go on with RESUME=1" in done.err
    assert not done.out and (finished[0] / "logs/one.txt").read_bytes() == before


def test_run_id_that_is_taken_fails_a_dry_run(finished: tuple[Path, str]) -> None:
    """What could not start is found."""
    done = cli(finished[0], {"run_id": "one", "dry_run": 1})
    assert done.code == 2 and "RUN_ID=one has a log" in done.err, done


@pytest.mark.parametrize("kind", ["gradient", "learning rate"])
def test_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Exit code 4; the step, its loss and gradient norm, and what to try. Checkpoints from before stay."""
    changes = PLAIN
    if kind == "learning rate":
        changes = PLAIN | {"matrix_lr": 1e18, "scalar_lr": 1e18, "tied_embed_lr": 1e18}
    original = t.Trainer.train_step

    def poisoned(self: t.Trainer, lr_scale: float) -> tuple[float, float]:
        """An infinite gradient in step 4."""
        loss, grad_norm = original(self, lr_scale)
        return loss, float("inf") if self.step == 3 else grad_norm

    monkeypatch.setattr(t.Trainer, "train_step", poisoned)
    done = cli(tmp_path, changes)
    assert done.code == 4 and re.match(r"error: step \d: loss \S+, gradient norm \S+\. Try a lower MATRIX_LR", done.err)
    assert done.err.count("\n") == 1 and not names(tmp_path, "*.ptz")
    steps = len(values(done.out, "train_loss"))
    assert f"step {steps + 1}: " in done.err and len(names(tmp_path, "*.ckpt")) == min(steps, 2)
    if kind == "gradient":
        assert steps == 3 and "gradient norm inf" in done.err


# ---- artifacts that are none -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def artifact(one_rank: tuple[Path, str]) -> bytes:
    """A sound one."""
    return (one_rank[0] / "logs/r.ptz").read_bytes()


def test_bad_artifacts(artifact: bytes, tmp_path: Path) -> None:
    """Truncated, corrupted, foreign, of another format: exit code 2, and which file."""
    flipped = bytearray(artifact)
    flipped[len(flipped) // 2] ^= 4
    cases = {
        "cut": (artifact[:-9], "cut is damaged or cannot be used"),
        "flipped": (bytes(flipped), "flipped is damaged or cannot be used"),
        "longer": (artifact + b"more", "longer is damaged or cannot be used"),
        "foreign": (b"PK\3\4zip", "foreign is not an artifact of this script"),
        "format": (
            artifact[:4] + b"\7\0\0\0" + artifact[8:],
            "format is not an artifact of this script, or of another",
        ),
    }
    for name, (content, part) in cases.items():
        (tmp_path / name).write_bytes(content)
        done = cli(tmp_path, {"eval_artifact": name})
        assert done.code == 2 and done.err.startswith("error: ") and part in done.err, done
    assert not (tmp_path / "logs").exists()
