"""Config: parsing, precedence, presets, validation, misspellings, batch arithmetic."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tools import ROOT, batch, config, model_for, runtime, t

PR314: dict[str, Any] = {  # what e735e01 made of RECIPE=pr314, and of the settings that came later
    "data_path": "./data/datasets/fineweb10B_sp1024",
    "tokenizer_path": "./data/tokenizers/fineweb_1024_bpe.model",
    "text_files": "",
    "demo": False,
    "recipe": "pr314",
    "sequence_order": "file",
    "dry_run": False,
    "checkpoint_every": 0.0,
    "resume": False,
    "export_from": "",
    "eval_artifact": "",
    "seed": 42,
    "iterations": 20000,
    "max_wallclock_seconds": 600.0,
    "warmup_steps": 20,
    "warmdown_frac": 0.6,  # later; WARMDOWN_ITERS counts
    "warmdown_iters": 2500,
    "train_batch_tokens": 786432,
    "train_seq_len": 2048,
    "micro_batch_tokens": 0,
    "val_batch_size": 524288,
    "val_loss_every": 500,
    "train_log_every": 100,
    "eval_stride": 64,
    "eval_batch_seqs": 32,
    "eval_float": False,
    "num_layers": 11,
    "model_dim": 512,
    "num_heads": 8,
    "num_kv_heads": 4,
    "mlp_mult": 3,
    "relu_slope": 0.0,
    "xsa_layers": 0,
    "value_residual": False,
    "vocab_size": 1024,
    "tie_embeddings": True,
    "tied_embed_init_std": 0.005,
    "rope_base": 10000.0,
    "rope_dims": 0,
    "ln_scale": False,
    "logit_softcap": 30.0,
    "qk_gain_init": 1.5,
    "bigram_vocab_size": 10240,
    "bigram_dim": 128,
    "tied_embed_lr": 0.03,
    "matrix_lr": 0.02,
    "scalar_lr": 0.02,
    "weight_decay": 0.04,
    "scalar_weight_decay": 0.04,
    "muon_momentum": 0.99,
    "muon_backend_steps": 5,
    "muon_momentum_warmup_start": 0.92,
    "muon_momentum_warmup_steps": 1500,
    "muon_momentum_end": 0.99,
    "muon_eq": False,
    "beta1": 0.9,
    "beta2": 0.95,
    "adam_eps": 1e-8,
    "grad_clip_norm": 0.3,
    "swa_enabled": True,
    "swa_start_frac": 0.4,
    "swa_every": 50,
    "swa_always": True,
    "qat_start_frac": 0.0,
    "rate_control": False,
    "calibration_tokens": 65536,
    "mlp_bits": 4,
    "attn_bits": 6,
    "bigram_bits": 6,
    "mlp_prune_frac": 0.05,
    "prune_frac": 0.03,
    "artifact_limit_bytes": 16_000_000,
    "attention": "auto",
    "compute_dtype": "auto",
    "compile": "auto",
}
CHALLENGE = """
    DATA_PATH TOKENIZER_PATH RUN_ID SEED VAL_BATCH_SIZE VAL_LOSS_EVERY TRAIN_LOG_EVERY ITERATIONS WARMDOWN_ITERS
    WARMUP_STEPS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN MAX_WALLCLOCK_SECONDS QK_GAIN_INIT VOCAB_SIZE NUM_LAYERS NUM_KV_HEADS
    MODEL_DIM NUM_HEADS MLP_MULT ROPE_BASE LOGIT_SOFTCAP TIED_EMBED_LR TIED_EMBED_INIT_STD MATRIX_LR SCALAR_LR
    MUON_MOMENTUM MUON_BACKEND_STEPS MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS BETA1 BETA2 ADAM_EPS
    GRAD_CLIP_NORM WEIGHT_DECAY EVAL_STRIDE EVAL_BATCH_SEQS BIGRAM_VOCAB_SIZE BIGRAM_DIM SWA_ENABLED SWA_START_FRAC
    SWA_EVERY TIE_EMBEDDINGS
""".split()
FIELDS = dataclasses.fields(t.Config)
BOUNDS = [(f, bound) for f in FIELDS for bound in f.metadata["bounds"]]


def refusal(**environ: str) -> str:
    """The message of a configuration that cannot run."""
    with pytest.raises(ValueError) as error:
        t.load_config(environ)
    return str(error.value)


def test_defaults_are_the_submitted_run() -> None:
    """No variable set: the design's defaults."""
    cfg, warnings = t.load_config({})
    assert (cfg.num_layers, cfg.model_dim, cfg.bigram_vocab_size, cfg.iterations) == (11, 512, 10240, 20000)
    assert cfg.rate_control and (cfg.mlp_bits, cfg.attn_bits, cfg.bigram_bits) == (4, 0, 0)
    assert cfg.sequence_order == "spread" and cfg.artifact_limit_bytes == 16_000_000
    assert (cfg.warmdown_frac, cfg.warmdown_iters) == (0.6, -1) and cfg.tie_embeddings
    assert cfg.run_id and not warnings
    assert cfg == dataclasses.replace(t.Config(), run_id=cfg.run_id)


def test_recipe_is_that_of_the_first_edition() -> None:
    """In every field, of the same type, whatever the defaults become."""
    values = vars(t.load_config({"RECIPE": "pr314", "RUN_ID": "a"})[0])
    assert values == PR314 | {"run_id": "a"}
    assert all(type(values[name]) is type(value) for name, value in PR314.items())


def test_recipe_of_short_runs() -> None:
    """RECIPE=small has the demo's values of the recipe, and the default's sizes; the demo has them with and without."""
    small, demo = (t.load_config({name: value})[0] for name, value in (("RECIPE", "small"), ("DEMO", "1")))
    assert (small.model_dim, small.iterations, small.artifact_limit_bytes) == (512, 20000, 16_000_000)
    for name in (word.split("=")[0].lower() for word in t.SMALL.split()):
        assert getattr(small, name) == getattr(demo, name) != getattr(t.Config, name)
    assert t.load_config({"DEMO": "1", "RECIPE": "small"})[0].run_id != demo.run_id
    assert (small.rope_dims, small.ln_scale, small.qk_gain_init) == (0, False, 1.5)


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment over DEMO over RECIPE over default."""
    both = {"DEMO": "1", "RECIPE": "pr314"}
    cfg = t.load_config(both | {"MODEL_DIM": "64", "ATTN_BITS": "7"})[0]
    assert (cfg.model_dim, cfg.attn_bits, cfg.bigram_bits, cfg.train_seq_len, cfg.bigram_vocab_size) == (
        *(64, 7),  # environment
        *(6, 256),  # RECIPE, DEMO
        10240,  # default
    )
    extended = {key: f"{preset} SEED={len(key[0] + key[1])}" for key, preset in t.PRESETS.items()}
    monkeypatch.setattr(t, "PRESETS", extended)
    only = {"RECIPE": "pr314"}
    for environ, seed in ((both, 5), (only, 11), (both | {"SEED": "7"}, 7), ({"DEMO": "0"}, 42)):
        assert t.load_config(environ)[0].seed == seed


@pytest.mark.parametrize("preset", list(t.PRESETS))
def test_presets_set_what_they_say(preset: tuple[str, str]) -> None:
    """Every word is a field, and arrives."""
    words = dict(word.split("=") for word in t.PRESETS[preset].split())
    values = vars(t.load_config(dict([preset]))[0])
    assert words and all(float(values[name.lower()]) == float(x) for name, x in words.items() if x != "file")


def test_warmdown_of_the_presets() -> None:
    """pr314's counts in steps; WARMDOWN_ITERS=-1 beside it lets WARMDOWN_FRAC count, and says nothing of it. The demo's
    is a share of the run, as the default."""
    pr314 = {"RECIPE": "pr314"}
    cfg, warnings = t.load_config(pr314)
    assert cfg.warmdown_iters == 2500 and not warnings
    cfg, warnings = t.load_config(pr314 | {"WARMDOWN_ITERS": "-1", "WARMDOWN_FRAC": "0.5"})
    assert (cfg.warmdown_iters, cfg.warmdown_frac) == (-1, 0.5) and not warnings
    [warning] = t.load_config(pr314 | {"WARMDOWN_FRAC": "0.5"})[1]
    assert warning.startswith("WARMDOWN_FRAC has no effect beside WARMDOWN_ITERS=2500: ")
    for demo in ({"DEMO": "1"}, {"DEMO": "1"} | pr314):
        cfg, warnings = t.load_config(demo)
        assert (cfg.warmdown_iters, cfg.warmdown_frac) == (-1, 0.6) and not warnings


def test_all_problems_in_one_message() -> None:
    """Unparsable and inconsistent values are reported together, each with its value."""
    message = refusal(ITERATIONS="many", NUM_HEADS="0", EVAL_STRIDE="-3", MLP_BITS="9", SEED="-1", TIE_EMBEDDINGS="0")
    for part in ("ITERATIONS='many'", "NUM_HEADS=0", "EVAL_STRIDE=-3", "MLP_BITS=9", "SEED=-1", "TIE_EMBEDDINGS=False"):
        assert part in message
    message = refusal(NUM_HEADS="7", EVAL_STRIDE="4096", TRAIN_BATCH_TOKENS="2049")
    for part in ("MODEL_DIM=512", "NUM_HEADS=7", "EVAL_STRIDE=4096", "TRAIN_BATCH_TOKENS=2049"):
        assert part in message


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("DEMO", "maybe", "expected 0 or 1"),
        ("ITERATIONS", "1.5", "whole number"),
        ("ITERATIONS", "", "whole number"),
        ("ITERATIONS", "1" + 30 * "0", "whole number"),
        ("MLP_MULT", "3.5", "whole number"),
        ("MATRIX_LR", "nan", "finite"),
        ("MATRIX_LR", "inf", "finite"),
        ("MATRIX_LR", "x", "finite number"),
        ("RECIPE", "best", "pr314"),
        ("SEQUENCE_ORDER", "random", "spread, file"),
        ("COMPILE", "yes", "auto"),
        ("RUN_ID", "../x", "file name"),
        ("RUN_ID", ".hidden", "file name"),
        ("COMPUTE_DTYPE", "float16", "bfloat16"),
        ("TRAIN_BATCH_TOKENS", "1000", "multiple"),
        ("MUON_MOMENTUM", "1", "must be < 1"),
        ("VOCAB_SIZE", "70000", "must be <= 65536"),
        ("QAT_START_FRAC", "2", "must be <= 1"),
        ("NUM_KV_HEADS", "3", "multiple of NUM_KV_HEADS=3"),
        ("EVAL_STRIDE", "2049", "targets would be skipped"),
        ("RESUME", "1", "needs RUN_ID"),
    ],
)
def test_bad_values(name: str, value: str, part: str) -> None:
    """Each names the variable, the value and the remedy."""
    message = refusal(**{name: value})
    assert name in message and value in message and part in message


@pytest.mark.parametrize(("field", "bound"), BOUNDS, ids=[f"{f.name} {bound}" for f, bound in BOUNDS])
def test_bounds(field: Any, bound: str) -> None:
    """Nothing beyond a bound is accepted, and what is allowed at the bound is not refused by it."""
    sign, *limits = bound.split()
    name = field.name.upper()
    if sign == "=":
        text, value = {str: ("nonsense", "'nonsense'"), int: ("1", "1"), bool: ("0", "False")}[type(field.default)]
        assert f"{name}={value} is none of {', '.join(limits)}" in refusal(**{name: text})
        return
    offset = {">=": -1, ">": 0, "<=": 1, "<": 0}[sign]
    value = type(field.default)(float(limits[0]) + offset)
    assert f"{name}={value!r} must be {bound}" in refusal(**{name: str(value)})
    at_limit = dataclasses.replace(config(), **{field.name: type(field.default)(float(limits[0]))})
    assert any(f"must be {bound}" in problem for problem in t.config_problems(at_limit)) == (offset == 0)


@pytest.mark.parametrize("name", ["MLP_BITS", "ATTN_BITS", "BIGRAM_BITS"])
def test_one_bit_is_refused(name: str) -> None:
    """The largest code would be 0, and so would all weights; 2 bits are the least."""
    assert vars(t.load_config({name: "2"})[0])[name.lower()] == 2
    assert f"{name}=1" in refusal(**{name: "1"})


def test_what_goes_together() -> None:
    """Paths of shards and tokenizer; floats beside an export; all that the demo's preset sets; three at once are one
    problem."""
    t.load_config({"DATA_PATH": "a", "TOKENIZER_PATH": "b", "RUN_ID": "c", "RESUME": "1", "EVAL_FLOAT": "1"})
    t.load_config({"EXPORT_FROM": "a", "EVAL_FLOAT": "1", "DEMO": "1"})
    t.load_config({"EVAL_ARTIFACT": "a", "DEMO": "1"})
    message = refusal(EVAL_ARTIFACT="a", EXPORT_FROM="b", RESUME="1", RUN_ID="c")
    assert message.count("exclude") == 1 and "EVAL_ARTIFACT and EXPORT_FROM and RESUME exclude each other" in message


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("0", "TIE_EMBEDDINGS=False is none of True"),
        ("0.0", "TIE_EMBEDDINGS='0.0': expected 0 or 1"),
        ("false", "TIE_EMBEDDINGS='false': expected 0 or 1"),
    ],
)
def test_an_untied_head_is_refused_by_name(value: str, part: str) -> None:
    """It does not exist here. Tied is fine."""
    assert part in refusal(TIE_EMBEDDINGS=value)
    assert t.load_config({"TIE_EMBEDDINGS": "1"})[1] == []


def test_names_and_values_of_the_challenge() -> None:
    """Its script's variables are known here, and `MLP_MULT=3.0` is a whole number."""
    assert {name.lower() for name in CHALLENGE} <= {f.name for f in FIELDS}
    cfg = t.load_config({"MLP_MULT": "3.0", "ITERATIONS": "500.0", "MATRIX_LR": "1e-2", "SWA_ENABLED": "0"})[0]
    assert (cfg.mlp_mult, cfg.iterations, cfg.matrix_lr, cfg.swa_enabled) == (3, 500, 0.01, False)
    assert type(cfg.mlp_mult) is int and type(cfg.swa_enabled) is bool


def test_misspelled_variable() -> None:
    """A near miss is reported with the likely name; unrelated variables are not."""
    warnings = t.load_config({"ITERATION": "5", "mlp_bits": "4", "PATH": "/bin", "MASTER_PORT": "1"})[1]
    assert len(warnings) == 2 and "ITERATIONS" in warnings[0] and "MLP_BITS" in warnings[1]


def test_forged_config_of_a_file() -> None:
    """A value of another type is a problem, not a crash."""
    for name, value in (("num_layers", "3"), ("model_dim", 64.0), ("value_residual", 1), ("rope_base", None)):
        [problem] = t.config_problems(dataclasses.replace(config(), **{name: value}))
        assert problem.startswith(f"{name.upper()}={value!r} is no ")


def trainer_for(ranks: int, **changes: Any) -> t.Trainer:
    """A trainer of 8 sequences per step."""
    cfg = config(**changes)
    return t.Trainer(model_for(cfg), t.Data(cfg, runtime()), cfg, runtime(0, ranks))


def test_ranks_that_do_not_divide() -> None:
    """An error with both numbers."""
    with pytest.raises(ValueError, match="3 ranks do not divide TRAIN_BATCH_TOKENS=256"):
        trainer_for(3)


@pytest.mark.parametrize(
    ("ranks", "tokens", "seqs", "steps"),
    [
        (1, 0, 8, 1),
        (2, 0, 4, 1),
        (8, 0, 1, 1),
        (1, 64, 2, 4),
        (1, 96, 2, 4),
        (1, 5, 1, 8),
        (2, 130, 4, 1),
        (1, 250, 4, 2),
    ],
)
def test_micro_batches(ranks: int, tokens: int, seqs: int, steps: int) -> None:
    """As large as MICRO_BATCH_TOKENS allows, cut to a divisor of the rank's part; a sequence is the least."""
    trainer = trainer_for(ranks, micro_batch_tokens=tokens)
    assert (trainer.micro_seqs, trainer.micro_steps) == (seqs, steps)
    assert [part.shape for part in batch(trainer)] == [(seqs, 33)] * steps


@pytest.mark.parametrize(("share_done", "expected"), [(0.0, 1.0), (0.5, 1.0), (0.6, 0.8), (0.75, 0.5), (1.0, 0.0)])
def test_warmdown_by_share(share_done: float, expected: float) -> None:
    """Over the last WARMDOWN_FRAC, whatever the steps left; never below 0. 0 is no warmdown, 1 is nothing else."""
    cfg = config(warmdown_iters=-1, warmdown_frac=0.5)
    for steps_left in (0, 7, 10**6):
        assert t.lr_scale_at(share_done, steps_left, cfg) == pytest.approx(expected)
        assert t.lr_scale_at(share_done, steps_left, dataclasses.replace(cfg, warmdown_frac=0.0)) == 1
        longest = t.lr_scale_at(share_done, steps_left, dataclasses.replace(cfg, warmdown_frac=1.0))
        assert longest == pytest.approx(1 - share_done)
    assert t.lr_scale_at(1.1, 5, cfg) == 0


@pytest.mark.parametrize(
    ("steps_left", "expected"), [(100, 1.0), (50, 1.0), (25, 0.5), (2.5, 0.05), (0, 0.0), (-3, 0.0)]
)
def test_warmdown_in_steps(steps_left: float, expected: float) -> None:
    """Over the last WARMDOWN_ITERS, or what is left of the time in steps, whatever the share; 0 is no warmdown."""
    cfg = config(warmdown_iters=50, warmdown_frac=0.9)
    for share_done in (0.0, 0.5, 1.0):
        assert t.lr_scale_at(share_done, steps_left, cfg) == pytest.approx(expected)
        assert t.lr_scale_at(share_done, steps_left, dataclasses.replace(cfg, warmdown_iters=0)) == 1


class Clock:
    """Time that passes only where a test lets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        """Seconds so far."""
        return self.now

    def wait(self, seconds: float) -> None:
        """Let them pass."""
        self.now += seconds


def rates_of(step_seconds: list[float], cap: float, **changes: Any) -> tuple[list[float], list[float]]:
    """(learning-rate factor, seconds done before it) of each step of a run whose steps take so long; the last value of
    `step_seconds` counts for all later ones."""
    trainer, clock = trainer_for(1, qat_start_frac=1, swa_enabled=0, **changes), Clock()
    rates, times = list[float](), list[float]()

    def train_step(lr_scale: float) -> tuple[float, float]:
        """Nothing but the time that it takes."""
        rates.append(lr_scale)
        times.append(clock.now)
        clock.wait(step_seconds[min(len(rates), len(step_seconds)) - 1])
        return 1.0, 1.0

    trainer.seconds, trainer.clock, trainer.train_step = cap, clock.read, train_step  # type: ignore[method-assign]
    trainer.validate = lambda: None  # type: ignore[method-assign]
    trainer.finish = lambda path: ({}, "")  # type: ignore[method-assign]
    trainer.run()
    assert clock.now <= cap
    return rates, times


def test_warmdown_by_share_of_a_run() -> None:
    """The larger one of the shares of steps and of time counts, at each step."""
    changes: dict[str, Any] = {"warmdown_iters": -1, "warmdown_frac": 0.5}

    def falling(shares: list[float]) -> Any:
        """The factors there."""
        return pytest.approx([min(1, (1 - share) / 0.5) for share in shares])

    rates, _ = rates_of([1.0], math.inf, iterations=20, **changes)  # no cap: steps alone
    assert rates == falling([step / 20 for step in range(20)])
    rates, times = rates_of([1.0], 1000.0, iterations=20, **changes)  # steps are ahead
    assert rates == falling([step / 20 for step in range(20)])
    rates, times = rates_of([5.0], 100.0, iterations=1000, **changes)  # time is ahead
    assert rates == falling([seconds / 100 for seconds in times]) and 17 <= len(rates) < 20 and rates[-1] < 0.3
    rates, times = rates_of([1.0] * 10 + [8.0], 100.0, iterations=40, **changes)  # first steps, then time
    assert rates == falling([max(step / 40, seconds / 100) for step, seconds in enumerate(times)])
    assert times[9] / 100 < 9 / 40 and times[-1] / 100 > len(times) / 40


def test_warmdown_in_steps_of_a_run() -> None:
    """The smaller one of the steps left and of the steps that the time left is worth, by the median of the times so
    far: five of them have to be known."""
    changes: dict[str, Any] = {"warmdown_frac": 0.9}
    rates, _ = rates_of([1.0], math.inf, iterations=20, warmdown_iters=10, **changes)
    assert rates == pytest.approx([min(1, (20 - step) / 10) for step in range(20)])
    rates, _ = rates_of([1.0], 1000.0, iterations=20, warmdown_iters=10, **changes)
    assert rates == pytest.approx([min(1, (20 - step) / 10) for step in range(20)])
    rates, times = rates_of([9.0, 2.0], 100.0, iterations=1000, warmdown_iters=60, **changes)
    assert rates[:5] == [1.0] * 5 and len(rates) > 35
    assert rates[5:] == pytest.approx([(100 - seconds) / 2 / 60 for seconds in times[5:]])
    assert min(rates_of([9.0, 2.0], 100.0, iterations=50, warmdown_iters=0, **changes)[0]) == 1


def test_training_ends_before_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the end takes in a rehearsal, and half as much again; the warmdown ends there, too. Without a cap
    there is no end and no rehearsal. Where not even a step fits, the message has the times."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()

    def warmed_up(cap: float) -> t.Trainer:
        """A trainer whose step takes 2 seconds, and whose end 8."""
        trainer, clock = trainer_for(1, max_wallclock_seconds=cap, run_id="x"), Clock()
        step = trainer.train_step

        def finish(path: Path) -> None:
            """A file, and the time that it takes."""
            path.touch()
            clock.wait(8)

        monkeypatch.setattr(trainer, "clock", clock.read)
        monkeypatch.setattr(trainer, "train_step", lambda lr_scale: (step(lr_scale), clock.wait(2)))
        monkeypatch.setattr(trainer, "finish", finish)
        trainer.warm_up()
        assert not list((tmp_path / "logs").iterdir()) and (trainer.step, trainer.elapsed) == (0, 0)
        return trainer

    trainer = warmed_up(600)
    assert (trainer.end_seconds, trainer.seconds, trainer.durations) == (8, 600 - 1.5 * 8, [2])
    for elapsed, fits in ((584.9, True), (585.1, False), (588.0, False)):
        trainer.elapsed = elapsed
        assert trainer.fits(2.0) == fits
    rates, times = rates_of([6.0], 588.0, iterations=10**6, warmdown_iters=-1, warmdown_frac=0.5)
    assert times[-1] + 6 <= 588 and rates[-1] == pytest.approx((588 - times[-1]) / 588 / 0.5)
    assert warmed_up(15).seconds == 3  # time for just one step
    with pytest.raises(
        ValueError, match=r"MAX_WALLCLOCK_SECONDS=14\.9 is too short for step_time:2000ms end_time:8000ms"
    ):
        warmed_up(14.9)
    trainer = warmed_up(0)
    assert (trainer.end_seconds, trainer.seconds, trainer.fits(1e9)) == (0, math.inf, True)


def test_every_field_has_a_meaning() -> None:
    """logs/VARIABLES.md is made from them."""
    assert all(len(f.metadata["meaning"]) > 10 for f in FIELDS)


def test_problems_of_pairs_beside_others() -> None:
    """Those of single values and those of pairs, unless a pair divides by a value that is bad itself."""
    text = refusal(RECIPE="x", SEED="-1", EVAL_STRIDE="4096", NUM_HEADS="3")
    assert all(f"{name}=" in text for name in ("RECIPE", "SEED", "EVAL_STRIDE", "MODEL_DIM")), text
    text = refusal(NUM_HEADS="0", EVAL_STRIDE="4096")
    assert "NUM_HEADS=0 must be >= 1" in text and "EVAL_STRIDE" not in text


@pytest.mark.parametrize("given", [None, "1"])
def test_slow_fusion_is_off(given: str | None, tmp_path: Path) -> None:
    """Inductor's mix_order_reduction, unless its own variable says otherwise; Inductor is imported later."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt
assert "torch._inductor.config" not in sys.modules
train_gpt.Runtime(train_gpt.load_config({{}})[0])
from torch._inductor import config
print(getattr(config.triton, "mix_order_reduction", None))
"""
    variable = "TORCHINDUCTOR_MIX_ORDER_REDUCTION"
    env = {name: value for name, value in os.environ.items() if name != variable} | ({variable: given} if given else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() in (str(given == "1"), "None"), done
