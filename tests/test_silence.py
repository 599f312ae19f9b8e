"""Nothing goes wrong in silence: inputs that gave a wrong number, or lost work, without a word.

Each test is named after what its user sees. tests/reports.py says which public reports they come from. Signals, locks
and torchrun's restarts are in test_recovery.py, error messages in test_runs.py.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reports
import sentencepiece
from launch import CODE_BYTES, FULL, PLAIN, Outcome, cli, do_after, kill, names
from tools import config, corpus, runtime, t, values, write_shard

NO_PATHS: dict[str, Any] = {"data_path": None, "tokenizer_path": None}
WORDS = np.array([a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "en", "ist", "ou", "elm", "ark", "y")])


def paragraphs(seed: int, count: int = 60) -> list[str]:
    """Made-up text."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 40)) for _ in range(count)]


def texts_of(folder: Path, split: str) -> str:
    """The text of a split of the only built corpus in `folder`."""
    (built,) = (folder / "logs/cache").iterdir()
    sp = sentencepiece.SentencePieceProcessor(model_file=str(built / "tokenizer.model"))
    return str(sp.decode(t.open_shard(built / f"fineweb_{split}_000000.bin").tolist()))


def tokenizer(path: Path, texts: list[str], **options: Any) -> Path:
    """A trained tokenizer of 320 pieces."""
    known = {"model_type": "bpe", "vocab_size": 320, "byte_fallback": True, "minloglevel": 2, "num_threads": 1}
    with path.open("wb") as file:
        known |= {"sentence_iterator": iter(texts), "model_writer": file} | options
        sentencepiece.SentencePieceTrainer.train(**known)
    return path


def shards_alone(folder: Path) -> Path:
    """The shards of `corpus()` without their tokenizer beside them, as the challenge has them."""
    return Path(shutil.copytree(corpus(), folder / "shards", ignore=lambda *_: ["tokenizer.model"], dirs_exist_ok=True))


# ---- 1: stages that do not belong together ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, artifact and a checkpoint of one run."""
    folder = tmp_path_factory.mktemp("trained")
    shards_alone(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "finish", kill)
        assert cli(folder, PLAIN, data_path="shards", run_id="stopped").code == -9
    assert cli(folder, PLAIN, data_path="shards").code == 0
    return folder


STAGES: dict[str, dict[str, Any]] = {
    "export": {"export_from": "logs/x.weights", "run_id": "again"},
    "evaluate": {"eval_artifact": "logs/x.ptz", "run_id": "eval"},
    "resume a checkpoint": {"resume": 1, "run_id": "stopped"},
    "resume the weights": {"resume": 1},
    "plan to resume": {"resume": 1, "dry_run": 1},
}


@pytest.mark.parametrize("stage", STAGES)
def test_another_tokenizer_of_the_same_size_is_refused(trained: Path, tmp_path: Path, stage: str) -> None:
    """In every stage that takes up another's file, naming the file and a hash; the right tokenizer works after that."""
    other = tokenizer(tmp_path / "other.model", paragraphs(7, 300), add_dummy_prefix=False)
    before = {name: (trained / "logs" / name).read_bytes() for name in names(trained) if not name.endswith(".txt")}
    done = cli(trained, PLAIN | STAGES[stage], data_path="shards", tokenizer_path=other)
    assert done.code == 2 and "logs/" in done.err and "sha256" in done.err.lower(), done
    assert {name: (trained / "logs" / name).read_bytes() for name in before} == before
    assert "val_bpb" not in done.out and not values(done.out, "train_loss")
    if stage in ("export", "evaluate"):
        assert cli(trained, PLAIN | STAGES[stage], run_id=f"right-{stage}").code == 0


def test_shards_and_tokenizer_of_two_corpora_are_refused(trained: Path, tmp_path: Path) -> None:
    """In training as in all other stages: the tokens would stand for other text, and their bytes be counted wrong."""
    other = tokenizer(tmp_path / "other.model", paragraphs(7, 300), add_dummy_prefix=False)
    for stage in ({"run_id": "new"}, {"run_id": "new", "dry_run": 1}, *STAGES.values()):
        done = cli(trained, PLAIN | stage, tokenizer_path=other)
        assert done.code == 2 and f"{corpus()} was made with another tokenizer: set TOKENIZER_PATH=" in done.err, done


def exchanged(data: Path) -> None:
    """Other training tokens, as many of them."""
    tokens = np.array(t.open_shard(data / "fineweb_train_000000.bin"))
    write_shard(data / "fineweb_train_000000.bin", np.roll(tokens, 7))


def renamed(data: Path) -> None:
    """Two shards in the other order."""
    first, second = (data / f"fineweb_train_{i:06d}.bin" for i in range(2))
    first.rename(data / "x")
    second.rename(first)
    (data / "x").rename(second)


def other_validation(data: Path) -> None:
    """Another validation split of the same length."""
    tokens = np.array(t.open_shard(data / "fineweb_val_000000.bin"))
    write_shard(data / "fineweb_val_000000.bin", np.roll(tokens, 1))


@pytest.mark.parametrize("change", [exchanged, renamed, other_validation])
def test_resume_with_other_data_of_the_same_size_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """As many tokens, of other text or in another order: the run would go on with what it has not been trained on."""
    tokens, data = np.array(t.open_shard(corpus() / "fineweb_train_000000.bin")), tmp_path / "data"
    data.mkdir()
    for name, part in (
        ("train_000000", tokens[:3000]),
        ("train_000001", tokens[3000:6000]),
        ("val_000000", tokens[-900:]),
    ):
        write_shard(data / f"fineweb_{name}.bin", part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "finish", kill)
        assert cli(tmp_path, PLAIN, data_path=data).code == -9
    change(data)
    done = cli(tmp_path, PLAIN, data_path=data, resume=1)
    assert done.code == 2 and "is of another config: DATA_SHA256=" in done.err, done


def test_text_that_changed_is_another_corpus(tmp_path: Path) -> None:
    """Even where the tokenizer is trained on the same part of it: what is held out now was trained on then."""
    text = paragraphs(1, 8000)  # over 1,000 documents, of which the tokenizer sees 1,000
    changes = PLAIN | NO_PATHS | {"text_files": "a.txt"}
    (tmp_path / "a.txt").write_text("\n\n".join(text))
    assert cli(tmp_path, changes).code == 0
    (tmp_path / "a.txt").write_text("\n\n".join([*text, "One paragraph more."]))
    for stage in ("export", "evaluate", "resume the weights"):
        done = cli(tmp_path, changes | STAGES[stage])
        assert done.code == 2 and "sha256" in done.err.lower() and "val_bpb" not in done.out, done
    (tmp_path / "a.txt").write_text("\n\n".join(text))
    assert cli(tmp_path, changes | STAGES["evaluate"]).code == 0


# ---- 2: files that merely match --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["val_bytes_000000", "val_000000 (1)", "val_000000.bak", "val_old_000000", "train_000000_copy", "val_"]
)
def test_files_that_merely_match_are_no_shards(tmp_path: Path, name: str) -> None:
    """Byte counts of re-tokenized data have a shard's header, copies its text: refused by name, never scored."""
    tokens, data = np.array(t.open_shard(corpus() / "fineweb_val_000000.bin")), tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        write_shard(data / f"fineweb_{split}_000000.bin", tokens)
    write_shard(data / f"fineweb_{name}.bin", tokens % 7)
    for stage in ({}, {"dry_run": 1}):
        done = cli(tmp_path, PLAIN | stage, data_path=data)
        assert done.code == 2 and f"fineweb_{name}.bin is no shard by its name" in done.err, done
        assert "data with byte counts cannot be scored" in done.err and "val_bpb" not in done.out
    (data / f"fineweb_{name}.bin").unlink()
    assert cli(tmp_path, PLAIN, data_path=data).code == 0


# ---- 3: tokenizers whose bytes cannot be counted ---------------------------------------------------------------------
SPACELESS = ["".join(text.split()) for text in paragraphs(2, 300)]


@pytest.mark.parametrize(
    ("texts", "options", "counted"),
    [
        (SPACELESS, {"add_dummy_prefix": False}, 5),  # byte fallback: a space is three byte tokens
        (SPACELESS, {"add_dummy_prefix": False, "byte_fallback": False}, 2),  # a space is an unknown token
        (paragraphs(2, 300), {"treat_whitespace_as_suffix": True}, 4),  # each document would count one space too many
    ],
)
def test_tokenizer_that_miscounts_spaces(
    tmp_path: Path, texts: list[str], options: dict[str, Any], counted: int
) -> None:
    """Refused at start, with the count: bpb would be too low or too high by a third."""
    path = tokenizer(tmp_path / "x.model", texts, **options)
    done = cli(tmp_path, PLAIN, data_path=shards_alone(tmp_path), tokenizer_path=path)
    assert done.code == 2 and f"'a b' counts {counted} bytes. Train another" in done.err, done
    assert not names(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"model_type": "unigram"},
        {"split_by_whitespace": False},
        {"byte_fallback": False},
    ],
)
def test_tokenizers_that_count_right(tmp_path: Path, options: dict[str, Any]) -> None:
    """With and without a space before the first word, of any kind: a text has as many bytes as it has."""
    texts = paragraphs(2, 300)
    path = tokenizer(tmp_path / "x.model", texts, **options)
    data = t.Data(config(data_path=shards_alone(tmp_path), tokenizer_path=path), runtime())
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in texts[:20]:
        ids = t.torch.tensor([sp.bos_id(), *sp.encode(text)])
        assert int(data.bytes_of[data.boundary[ids[:-1]], ids[1:]].sum()) == len(text.encode())


def test_unknown_tokens_are_told(tmp_path: Path) -> None:
    """They count no bytes, so the score is too high by their share: a warning with their number."""
    tokens = np.array(t.open_shard(corpus() / "fineweb_val_000000.bin"))
    tokens[5:305] = 3
    for split in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", tokens)
    done = cli(tmp_path, PLAIN, data_path=tmp_path)
    assert done.code == 0 and "warning: 300 validation tokens are unknown ones, which count 0 bytes" in done.out, done
    assert "unknown" not in cli(tmp_path, PLAIN, run_id="y").out


# ---- 4: the same text on both sides ----------------------------------------------------------------------------------
def copies(folder: Path, text: list[str]) -> None:
    """8 copies of one file."""
    for i in range(8):
        (folder / f"{i}.txt").write_text("\n\n".join(text))


def nearly_copies(folder: Path, text: list[str]) -> None:
    """A copy with a paragraph more, one with Windows' line ends, one with a byte order mark, one in another order."""
    (folder / "a.txt").write_text("\n\n".join(text))
    (folder / "b.txt").write_text("\n\n".join([*text, "More of it."]))
    (folder / "c.txt").write_bytes("\r\n\r\n".join(text).encode())
    (folder / "d.txt").write_text("\n\n".join(text), encoding="utf-8-sig")
    (folder / "e.txt").write_text("\n\n".join(reversed(text)))


def without_blank_lines(folder: Path, text: list[str]) -> None:
    """Copies of files of lines, as logs and poems are, with other white space at their ends."""
    for i in range(3):
        for part in range(6):
            (folder / f"{i}{part}.txt").write_text(" " * i + "\n".join(text[10 * part :][:10]) + "\n" * i)


def parts_and_whole(folder: Path, text: list[str]) -> None:
    """Files, and one that holds all of them."""
    for i in range(6):
        (folder / f"{i}.txt").write_text("\n\n".join(text[10 * i : 10 * i + 10]))
    (folder / "all.txt").write_text("\n\n".join(text))


def links(folder: Path, text: list[str]) -> None:
    """A folder that is reached by two paths."""
    (folder / "real").mkdir()
    (folder / "real/a.txt").write_text("\n\n".join(text))
    (folder / "linked").symlink_to("real")


@pytest.mark.parametrize("write", [copies, nearly_copies, without_blank_lines, parts_and_whole, links])
def test_repeated_text_is_not_scored_and_trained(tmp_path: Path, write: Callable[[Path, list[str]], None]) -> None:
    """No stretch of 100 characters of what is held out stands in training, and none is lost but the repeats."""
    text = paragraphs(3)
    write(tmp_path, text)
    done = cli(tmp_path, PLAIN | NO_PATHS, text_files="**/*.txt")
    assert done.code == 0, done
    train, val = texts_of(tmp_path, "train"), texts_of(tmp_path, "val")
    assert len(val) > 300 and not any(val[i : i + 100] in train for i in range(0, len(val) - 100, 10))
    assert len("\n\n".join(text)) * 0.98 < len(train) + len(val) < len("\n\n".join(text)) * 1.05


# ---- 5: settings without effect --------------------------------------------------------------------------------------
NEAREST = {
    "MUON_WD": "WEIGHT_DECAY",
    "ADAM_WD": "WEIGHT_DECAY",
    "MUON_WEIGHT_DECAY": "WEIGHT_DECAY",
    "XSA_LAST_N": "XSA_LAYERS",
    "EMA_DECAY": "SWA_ENABLED",
    "EMA_ENABLED": "SWA_ENABLED",
    "MLP_HIDDEN": "MLP_MULT",
    "LATE_QAT": "QAT_START_FRAC",
    "LATE_QAT_THRESHOLD": "QAT_START_FRAC",
    "QAT_ENABLED": "QAT_START_FRAC",
    "EVAL_SEQ_LEN": "TRAIN_SEQ_LEN",
    "DATA_DIR": "DATA_PATH",
    "TTT_ENABLED": "nothing",
    "VE_LAYERS": "nothing",
    "GPTQ_RESERVE_SECONDS": "nothing",
    "SLIDING_WINDOW_ENABLED": "EVAL_STRIDE",
    "BIGRAM_HASH_BUCKETS": "BIGRAM_VOCAB_SIZE",
    "MATRIX_CLIP_SIGMAS": "nothing",
    "WARMDOWN_STEPS": "WARMDOWN_ITERS",
    "LEAKY_RELU_SLOPE": "RELU_SLOPE",
    "MATRIX_BITS": "MLP_BITS",
    "ROPE_THETA": "ROPE_BASE",
    "COMPRESSOR": "nothing",
    # of earlier versions of this script
    "EMBED_LR": "TIED_EMBED_LR",
    "HEAD_LR": "TIED_EMBED_LR",
    "EVAL_MODE": "nothing",
    "ERROR_FEEDBACK": "nothing",
    "PLAN_STEP_MS": "nothing",
    "PLAN_MEMORY_GB": "nothing",
    "CALIBRATION_RESERVE": "nothing",
}


@pytest.mark.parametrize("name", NEAREST)
def test_names_of_other_scripts_are_reported(name: str) -> None:
    """One warning each, with what comes nearest here."""
    _, warnings = t.load_config({name: "1"})
    assert warnings == [f"{name} has no effect here; nearest setting: {NEAREST[name]}"]


def test_our_own_names_are_not_foreign() -> None:
    """No field of the config matches, whatever patterns the table has; nor does what a machine sets by itself."""
    fields = [f.name.upper() for f in t.dataclasses.fields(t.Config)]
    for group in t.FOREIGN:
        nearest, pattern = group.split("=")
        assert nearest in {*fields, "nothing"} & {*NEAREST.values()}
        assert [name for name in fields if re.fullmatch(pattern, name)] == []
    machine = {"PATH": "/bin", "USE_LIBUV": "0", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0", "LANG": "C"}
    assert t.load_config(machine)[1] == [] and "ROPE_BASE?" in t.load_config({"ROPE_BAES": "9"})[1][0]


@pytest.mark.parametrize(
    ("given", "both"),
    [
        ({"DEMO": "1", "DATA_PATH": "d"}, "DATA_PATH and DEMO"),
        ({"DEMO": "1", "TOKENIZER_PATH": "t"}, "DEMO and TOKENIZER_PATH"),
        ({"TEXT_FILES": "*", "TOKENIZER_PATH": "t"}, "TEXT_FILES and TOKENIZER_PATH"),
        ({"TEXT_FILES": "*", "DATA_PATH": "d"}, "DATA_PATH and TEXT_FILES"),
        ({"DEMO": "1", "TEXT_FILES": "*"}, "DEMO and TEXT_FILES"),
        ({"EXPORT_FROM": "w", "RESUME": "1", "RUN_ID": "x"}, "EXPORT_FROM and RESUME"),
        ({"EVAL_ARTIFACT": "a", "EXPORT_FROM": "w"}, "EVAL_ARTIFACT and EXPORT_FROM"),
        ({"EVAL_ARTIFACT": "a", "EVAL_FLOAT": "1"}, "EVAL_ARTIFACT and EVAL_FLOAT"),
        ({"EVAL_ARTIFACT": "a", "RESUME": "1", "RUN_ID": "x"}, "EVAL_ARTIFACT and RESUME"),
    ],
)
def test_settings_that_would_be_ignored_beside_others(given: dict[str, str], both: str) -> None:
    """One of them would have no effect: refused, naming both."""
    with pytest.raises(ValueError, match=f"{both} exclude each other: remove one"):
        t.load_config(given)
    switched_off = {name: "0" if name in ("DEMO", "RESUME", "EVAL_FLOAT") else "" for name in given}
    for name, value in given.items():
        t.load_config(switched_off | {name: value} | {"RUN_ID": "x"})
    assert t.load_config({"DEMO": "1", "EVAL_ARTIFACT": "a"})[0].eval_float, (
        "the demo's own setting is no contradiction"
    )


@pytest.mark.parametrize("stage", ["export", "evaluate"])
def test_sizes_that_a_file_brings_itself(trained: Path, stage: str) -> None:
    """Given beside it they change nothing, which a warning says; sizes that are the file's own pass without a word."""
    path = STAGES[stage].get("export_from") or STAGES[stage]["eval_artifact"]
    done = cli(trained, PLAIN | STAGES[stage], run_id=f"sizes-{stage}", num_layers=5, relu_slope=0.25)
    assert done.code == 0 and f"warning: NUM_LAYERS has no effect, {path} has 3\n" in done.out, done
    assert f"warning: RELU_SLOPE has no effect, {path} has 0.5\n" in done.out and done.out.count("warning") == 2
    assert "warning" not in cli(trained, PLAIN | STAGES[stage], run_id=f"own-{stage}").out


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_without_torchrun(name: str) -> None:
    """srun, mpirun or a habit would start so many runs of one rank: refused. Under torchrun it means nothing."""
    with pytest.raises(ValueError, match=f"{name}=2 without torchrun means several runs of one rank"):
        t.load_config({name: "2"})
    for fine in ({name: "1"}, {name: "2", "RANK": "0"}, {name: "2", "DRY_RUN": "1"}):
        assert t.load_config(fine)[1] == []


# ---- 6: schedules that cannot work -----------------------------------------------------------------------------------
def test_a_short_run_reaches_the_full_learning_rate(tmp_path: Path) -> None:
    """By default, whatever ITERATIONS is: the warmdown is a share of the run."""
    for iterations in (3, 10, 25):
        done = cli(tmp_path, PLAIN, run_id=f"x{iterations}", iterations=iterations, warmdown_iters=None)
        scales = values("\n".join(re.findall("^step:.*", done.out, re.M)), "lr_scale")
        expected = [min(1.0, (1 - step / iterations) / 0.6) for step in range(iterations)]
        assert done.code == 0 and scales == pytest.approx(expected, abs=1e-4) and "warning" not in done.out, done


@pytest.mark.parametrize(
    ("given", "warning"),
    [
        (
            {"ITERATIONS": "200", "WARMDOWN_ITERS": "2500"},
            "WARMDOWN_ITERS=2500 is over ITERATIONS: the full rates",
        ),
        ({"ITERATIONS": "200", "RECIPE": "pr314"}, "WARMDOWN_ITERS=2500 is over ITERATIONS: the full rates"),
        ({"WARMDOWN_FRAC": "0.5", "WARMDOWN_ITERS": "100"}, "WARMDOWN_FRAC has no effect beside WARMDOWN_ITERS=100"),
        ({"WARMDOWN_FRAC": "0.5", "RECIPE": "pr314"}, "WARMDOWN_FRAC has no effect beside WARMDOWN_ITERS=2500"),
        ({"WARMDOWN_FRAC": "0.5", "DEMO": "1"}, None),
        ({"WARMDOWN_FRAC": "0.5", "WARMDOWN_ITERS": "-1", "RECIPE": "pr314"}, None),
        ({"ITERATIONS": "200"}, None),
        ({"ITERATIONS": "200", "WARMDOWN_ITERS": "200"}, None),
        ({"WARMDOWN_ITERS": "0"}, None),
    ],
)
def test_warmdown_longer_than_the_run(given: dict[str, str], warning: str | None) -> None:
    """A warning at start, before the run is paid for; none where all is well."""
    _, warnings = t.load_config(given)
    assert [text[: len(warning or "")] for text in warnings] == [warning] * (warning is not None), warnings


def test_quantization_that_cannot_start_is_told(tmp_path: Path) -> None:
    """QAT_START_FRAC=0.92 of 6 steps is after the last one: the run exports what was not trained for its grids."""
    done = cli(tmp_path, PLAIN, qat_start_frac=0.92)
    assert done.code == 0 and "warning: no QAT, as QAT_START_FRAC=0.92 left no time or step for it" in done.out, done
    assert "no QAT" not in cli(tmp_path, PLAIN, run_id="y", qat_start_frac=0.5).out


# ---- 7: the clock ----------------------------------------------------------------------------------------------------
class Clock:
    """Stands for time.perf_counter: only what is told to takes time, so that a busy machine changes nothing."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.now = patch, 100.0
        patch.setattr(t.time, "perf_counter", lambda: self.now)

    def takes(self, owner: Any, name: str, seconds: Callable[[], float]) -> None:
        """Let each call of `owner.name` take so long."""

        def advance(*_: Any, **__: Any) -> None:
            """Time goes by."""
            self.now += seconds()

        do_after(self.patch, owner, name, advance)


CAPPED: dict[str, Any] = FULL | {"iterations": 10**6, "warmdown_iters": None, "max_wallclock_seconds": 600}
CAPPED |= {"train_log_every": 50, "checkpoint_every": 0, "warmup_steps": 2, "val_loss_every": 20}
RECIPE = [word.split("=")[0].lower() for word in t.PR314.split()]  # what a recipe sets must not be given beside it
SLOW: dict[str, tuple[dict[tuple[Any, str], float], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "writing the weights, pr314": ({(t, "save_tensors"): 90}, {"recipe": "pr314", "artifact_limit_bytes": None}),
    "calibration": ({(t.Trainer, "calibrate"): 60}, {"qat_start_frac": 0.92}),
    "the choice of weights": ({(t.Trainer, "quantized_loss"): 60}, {"qat_start_frac": 0.92}),
    "calibration without QAT": ({(t.Trainer, "calibrate"): 100}, {"qat_start_frac": 1}),
    "checkpoints": ({(t, "save_tensors"): 50}, {"checkpoint_every": 60}),
    "validation, which is not on the clock": ({(t, "evaluate"): 1000}, {}),
    "steps": ({(t.Trainer, "train_step"): 100}, {"train_log_every": 1}),
}


@pytest.mark.parametrize("what", SLOW)
def test_a_run_ends_under_its_cap(tmp_path: Path, what: str) -> None:
    """Whatever is slow on a machine, by its own measured time; the rest of the cap is used."""
    slowed, changes = SLOW[what]
    settings = {
        name: value for name, value in (CAPPED | changes).items() if not ("recipe" in changes and name in RECIPE)
    }
    jitter = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        for (owner, name), seconds in ({(t.Trainer, "train_step"): 10} | slowed).items():
            clock.takes(owner, name, lambda seconds=seconds: seconds * jitter.uniform(1, 1.4))
        done = cli(tmp_path, settings)
    assert done.code == 0, done
    stopped = re.search(r"training stopped:wallclock_cap step:\d+ train_time:(\d+)ms", done.out)
    kept = 1.5 * values(done.out.replace("ms", ""), "end_time")[0]
    longest = 1.5 * 1.4 * (sum(slowed.values()) or 10)
    assert stopped and 600_000 - kept - 2000 * longest < int(stopped[1]) <= 600_000, done.out
    assert all(x <= 600_000 for x in values(done.out.replace("ms", ""), "train_time")), done.out
    assert (what != "nothing" or values(done.out, "lr_scale")[-1] < 0.25) and not names(tmp_path, "*.tmp*")


def test_a_run_that_goes_on_elsewhere_ends_under_its_cap(tmp_path: Path) -> None:
    """On a machine with slower steps: those of the warm-up count beside those in the checkpoint."""
    settings = CAPPED | {"checkpoint_every": 1}
    for seconds in (10, 95):
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock(patch)
            clock.takes(t.Trainer, "train_step", lambda seconds=seconds: seconds)
            if seconds == 10:
                do_after(patch, t.Trainer, "save", lambda trainer: kill() if trainer.step == 48 else None)
            done = cli(tmp_path, settings, resume=1)
    assert "resume checkpoint:logs/x.000000048.ckpt" in done.out and "training stopped:wallclock_cap" in done.out, done
    assert values(done.out.replace("ms", ""), "train_time")[-1] <= 600_000


def test_a_cap_that_holds_no_step(tmp_path: Path) -> None:
    """Said before the clock runs, with what a step and the end take; no weights of nothing are exported."""
    with pytest.MonkeyPatch.context() as patch:
        Clock(patch).takes(t.Trainer, "train_step", lambda: 500.0)
        done = cli(tmp_path, CAPPED)
    assert done.code == 2 and "MAX_WALLCLOCK_SECONDS=600.0 is too short for step_time:500000ms" in done.err, done
    assert not names(tmp_path)


def test_the_stamp_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every time of the training is read after the GPU has done what it was given."""
    waited: list[int] = []
    cfg, rt = config(), runtime()
    trainer = t.Trainer(t.GPT(cfg, t.torch.float32), t.Data(cfg, rt), cfg, rt)
    trainer.clock()
    assert not waited
    monkeypatch.setattr(t.torch.cuda, "synchronize", lambda: waited.append(1))
    rt.device = type("Device", (), {"type": "cuda"})()
    trainer.clock()
    assert waited == [1]


# ---- 9: a start that was refused -------------------------------------------------------------------------------------
FAILED_STARTS: dict[str, dict[str, Any]] = {
    "a typo in TEXT_FILES": NO_PATHS | {"text_files": "*.txxt"},
    "a typo in DATA_PATH": {"data_path": "nowhere"},
    "no tokenizer": {"tokenizer_path": "nowhere"},
    "ranks that do not divide": {"train_batch_tokens": 96, "eval_stride": 99},
    "a cap that is too short": {"max_wallclock_seconds": 0.001},
}


@pytest.mark.parametrize("kind", FAILED_STARTS)
def test_the_corrected_command_runs(tmp_path: Path, kind: str) -> None:
    """With the same RUN_ID: a start that failed leaves no log behind."""
    failed = cli(tmp_path, PLAIN, **FAILED_STARTS[kind])
    assert failed.code == 2 and not names(tmp_path), failed
    done: Outcome = cli(tmp_path, PLAIN)
    assert done.code == 0, done
    log = (tmp_path / "logs/x.txt").read_text()
    assert log.startswith('"""Train') and log.count("\nrun id:x ") == 1 and log.endswith(done.out[-300:])
    assert all(line in log for line in done.out.splitlines()) and f"code_bytes:{CODE_BYTES}" in log


def test_memory_that_does_not_suffice_leaves_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the warm-up finds is a start that failed, too."""

    def full(*_: Any) -> None:
        """Stands for a GPU."""
        raise t.torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "train_step", full)
        assert cli(tmp_path, PLAIN, warmup_steps=1).code == 2 and not names(tmp_path)
    assert cli(tmp_path, PLAIN, warmup_steps=1).code == 0


# ---- the table of reports --------------------------------------------------------------------------------------------
def test_reports_name_tests_that_exist() -> None:
    """A reader who asks whether something was ever tried finds the test."""
    named = {report.test for kind in reports.REPORTS.values() for report in kind}
    assert sum(map(len, reports.REPORTS.values())) >= 27 and named <= reports.named_tests(), (
        named - reports.named_tests()
    )
    assert reports.table().count("\n") == 1 + sum(map(len, reports.REPORTS.values()))


def test_folders_with_odd_names(tmp_path: Path) -> None:
    """Characters of patterns in DATA_PATH are characters: it is this folder that is read, and no other."""
    for name, count in (("data[1]", 900), ("data1", 800), ("data*", 700)):
        for split in ("train", "val"):
            (tmp_path / name).mkdir(exist_ok=True)
            write_shard(tmp_path / name / f"fineweb_{split}_000000.bin", np.arange(count) % 300)
        assert t.Data(config(data_path=tmp_path / name), runtime()).val.total == count


def test_own_logs_are_no_text(tmp_path: Path) -> None:
    """TEXT_FILES='**/*.txt' matches the log of the run itself: it must not change the corpus."""
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs(4)))
    changes = PLAIN | NO_PATHS | {"text_files": "**/*.txt"}
    assert cli(tmp_path, changes).code == 0
    done = cli(tmp_path, changes | STAGES["evaluate"])
    assert done.code == 0 and len(list((tmp_path / "logs/cache").iterdir())) == 1, done


def test_console_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed terminal, `| head`, a full disk: a line that cannot be written ends no training."""

    class Gone(io.StringIO):
        """Nobody reads it."""

        def write(self, _: str) -> int:
            """As a closed pipe does."""
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.chdir(tmp_path)
    rt = t.Runtime(config(run_id="x"))
    monkeypatch.setattr(t.sys, "stdout", Gone())
    rt.log("in the file")
    rt.open_log("x")
    rt.log("there, too")
    assert Path("logs/x.txt").read_text() == "in the file\nthere, too\n"
    rt.log_file = Gone()
    rt.log("nowhere")
