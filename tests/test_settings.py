"""Config: parsing, precedence, validation, misspellings, batch arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
from tools import config, t


def test_defaults_are_the_submitted_run() -> None:
    """No variable set: the design's defaults."""
    cfg, origin, warnings = t.load_config({})
    assert (cfg.num_layers, cfg.model_dim, cfg.bigram_vocab_size, cfg.mlp_bits, cfg.iterations) == (
        11,
        512,
        10240,
        4,
        20000,
    )
    assert cfg.run_id and not origin and not warnings


def test_precedence() -> None:
    """Environment over RECIPE over DEMO over default."""
    cfg, origin, _ = t.load_config({"DEMO": "1", "RECIPE": "pr314", "MODEL_DIM": "64", "ATTN_BITS": "7"})
    assert (cfg.model_dim, cfg.attn_bits, cfg.bigram_bits, cfg.train_seq_len) == (64, 7, 6, 256)
    assert (origin["model_dim"], origin["bigram_bits"], origin["train_seq_len"]) == ("environment", "RECIPE", "DEMO")


def test_all_problems_in_one_message() -> None:
    """Unparsable and inconsistent values are reported together, each with its value."""
    with pytest.raises(ValueError) as error:
        t.load_config({"ITERATIONS": "many", "NUM_HEADS": "7", "EVAL_STRIDE": "4096", "MLP_BITS": "9", "SEED": "-1"})
    for part in ("ITERATIONS='many'", "NUM_HEADS=7", "EVAL_STRIDE=4096", "MLP_BITS=9", "SEED=-1", "MODEL_DIM=512"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("DEMO", "maybe", "expected 0 or 1"),
        ("ITERATIONS", "1.5", "whole number"),
        ("MATRIX_LR", "nan", "finite"),
        ("MATRIX_LR", "x", "finite number"),
        ("RECIPE", "best", "pr314"),
        ("COMPILE", "yes", "auto"),
        ("RUN_ID", "../x", "file name"),
        ("COMPUTE_DTYPE", "float16", "bfloat16"),
        ("TRAIN_BATCH_TOKENS", "1000", "multiple"),
        ("MUON_MOMENTUM", "1", "below 1"),
        ("MICRO_BATCH_TOKENS", "5", "multiple"),
        ("VOCAB_SIZE", "70000", "at most 65536"),
        ("QAT_START_FRAC", "2", "at most 1"),
    ],
)
def test_bad_values(name: str, value: str, part: str) -> None:
    """Each names the variable, the value and the remedy."""
    with pytest.raises(ValueError) as error:
        t.load_config({name: value})
    assert name in str(error.value) and part in str(error.value)


def test_misspelled_variable() -> None:
    """A near miss is reported with the likely name; unrelated variables are not."""
    warnings = t.load_config({"ITERATION": "5", "mlp_bits": "4", "PATH": "/bin", "MASTER_PORT": "1"})[2]
    assert len(warnings) == 2 and "ITERATIONS" in warnings[0] and "MLP_BITS" in warnings[1]


def test_ranks_that_do_not_divide() -> None:
    """The message lists the numbers of ranks that work."""
    with pytest.raises(ValueError, match=r"3 ranks .* use one of 1, 2, 4, 8 ranks"):
        t.batch_plan(config(), 3, 1e9)


def test_micro_batches() -> None:
    """From memory, or as asked for; a size that does not divide is an error with the choices."""
    assert t.batch_plan(config(), 2, 1e12) == (4, 1)
    assert t.batch_plan(config(), 2, 0.0) == (1, 4)
    assert t.batch_plan(config(micro_batch_tokens=64), 1, 0.0) == (2, 4)
    with pytest.raises(ValueError, match="use 32, 64, 128, 256"):
        t.batch_plan(config(micro_batch_tokens=96), 1, 0.0)


@pytest.mark.parametrize(
    ("step", "elapsed", "seconds", "expected"),
    [
        (0, 0.0, 0.0, 1.0),
        (75, 0.0, 0.0, 0.5),
        (100, 0.0, 0.0, 0.0),
        (10, 95.0, 0.2, 0.5),
        (10, 5.0, 90.0, 95 / 4500),
        (10, 99.0, 0.0, 1.0),
    ],
)
def test_lr_scale(step: int, elapsed: float, seconds: float, expected: float) -> None:
    """The smaller of the step rule and the clock rule; the clock rule waits for a known step time."""
    cfg = config(iterations=100, warmdown_iters=50, max_wallclock_seconds=100.0, calibration_reserve=0)
    assert t.lr_scale_at(step, elapsed, seconds, cfg) == pytest.approx(expected)


def test_every_field_has_a_meaning() -> None:
    """The README's table is made from them."""
    fields: Any = t.dataclasses.fields(t.Config)
    assert all(len(f.metadata["meaning"]) > 10 for f in fields)
