"""Rate control and container: the limit is never broken and is used up, the file is near the entropy of its codes."""

from __future__ import annotations

import io
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from tools import ROOT, config, corpus, model_for, plan_for, runtime, t, values

CODE_BYTES = (ROOT / "train_gpt.py").stat().st_size
SHA256 = "f" * 64
PLANNED: dict[str, Any] = {"run_id": "x", "rate_control": 1, "prune_frac": 0, "mlp_prune_frac": 0}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are written to logs/ of an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("logs").mkdir()


def weights_for(cfg: t.Config, seed: int, tails: float, rows: float) -> t.Tensors:
    """Weights of a model: heavier tails for a larger `tails`, rows whose sizes spread by the factor e^rows."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, p in model_for(cfg, qat=False).named_parameters():
        draw = torch.randn(p.shape, generator=generator)
        draw = draw.sign() * draw.abs() ** (1 + tails)
        if p.dim() == 2:
            draw *= torch.exp(rows * torch.randn(len(draw), 1, generator=generator))
        weights[name] = (0.1 * draw).clamp(-100, 100)
    return weights


def costs_of(weights: t.Tensors) -> t.Tensors:
    """What errors in the rows of the matrices cost."""
    generator = torch.Generator().manual_seed(7)
    return {n: torch.rand(len(w), generator=generator) ** 4 for n, w in weights.items() if t.category(n) != "small"}


def size_of(weights: t.Tensors) -> int:
    """Number of weights."""
    return sum(w.numel() for w in weights.values())


def with_room(cfg: t.Config, free: float) -> t.Config:
    """The config with a limit that leaves `free` bytes to the model."""
    return t.dataclasses.replace(cfg, artifact_limit_bytes=CODE_BYTES + round(free))


def mlp_of(plan: t.Plan) -> t.Plan:
    """Its grids of the MLP."""
    return {name: grid for name, grid in plan.items() if t.category(name) == "mlp"}


def exported(
    cfg: t.Config,
    weights: t.Tensors,
    grids: t.Plan | None = None,
    trained_for: t.Config | None = None,
    calibrated: bool = True,
) -> tuple[bytes, list[str]]:
    """What `export` leaves on disk, and what a run logs; `trained_for`: the config of training, where it is another."""
    trained = {
        "config": vars(trained_for or cfg),
        "weights": weights,
        "costs": costs_of(weights) if calibrated else {},
        "grids": {name: tuple(grid) for name, grid in (grids or {}).items()},
    }
    rt = runtime()
    path = Path(t.export(trained, cfg, rt, SHA256))
    assert path == Path("logs/x.ptz") and list(Path("logs").iterdir()) == [path]
    content = path.read_bytes()
    fits = t.log_artifact(str(path), len(content), t.decode_artifact(content, "x.ptz", cfg)[1], cfg, rt)
    assert fits == (CODE_BYTES + len(content) <= cfg.artifact_limit_bytes)
    return content, rt.lines


def rounds_of(lines: list[str]) -> list[str]:
    """The lines of the rounds."""
    return [line for line in lines if line.startswith("artifact round:")]


def finest(cfg: t.Config, weights: t.Tensors, kept: t.Plan) -> bytes:
    """The file with every matrix at its finest grid, but those in `kept`."""
    plan = t.grids_for_bytes(weights, costs_of(weights), kept, cfg, math.inf)
    return t.encode_artifact(t.quantize(weights, plan, cfg), cfg, SHA256)


@pytest.mark.parametrize("seed", range(30))
def test_limit_is_kept_and_used(seed: int) -> None:
    """Sizes, limits, tails, spread of rows, with and without grids that were trained on: never over the limit, in at
    most 6 rounds, and at least 98% of what the code leaves to the model used (sizes of models as small as these jump
    by a percent), unless every matrix is at its finest grid."""
    rng = random.Random(seed)
    sizes: dict[str, Any] = {
        "model_dim": rng.choice([32, 48, 64]),
        "num_layers": rng.randint(1, 4),
        "num_heads": 4,
        "num_kv_heads": rng.choice([1, 2, 4]),
        "bigram_vocab_size": rng.choice([64, 500, 1000]),
        "bigram_dim": rng.choice([16, 32]),
    }
    cfg = config(**PLANNED, **sizes)
    weights = weights_for(cfg, seed, rng.choice([0.0, 0.3, 0.8]), rng.choice([0.0, 0.5, 1.0]))
    free = 4000 + round(size_of(weights) * rng.uniform(0.35, 0.95))
    kept: t.Plan = {}
    if rng.random() < 0.5:
        kept = mlp_of(t.grids_for_bytes(weights, costs_of(weights), {}, cfg, 0.9 * free))
    content, lines = exported(with_room(cfg, free), weights, kept)
    assert len(content) <= free and len(rounds_of(lines)) <= t.EXPORT_ROUNDS == 6, lines
    assert len(content) >= 0.98 * free or content == finest(cfg, weights, kept), (len(content), free, lines)


@pytest.mark.parametrize("share", [0.35, 0.5, 0.7])
@pytest.mark.parametrize("keeps", [False, True])
def test_limit_is_filled(share: float, keeps: bool) -> None:
    """With a few hundred thousand weights: to 99.5% of what the code leaves to the model."""
    cfg = config(**PLANNED, model_dim=128, num_layers=3, bigram_vocab_size=1000)
    weights = weights_for(cfg, 0, 0.1, 0.5)
    free = share * size_of(weights)
    grids = mlp_of(t.grids_for_bytes(weights, costs_of(weights), {}, cfg, free)) if keeps else {}
    content, lines = exported(with_room(cfg, free), weights, grids)
    assert 0.995 * free <= len(content) <= free and len(rounds_of(lines)) <= 6, lines
    assert exported(with_room(cfg, free), weights, grids)[0] == content


@pytest.mark.parametrize("bits", [8, 4])
def test_limit_just_below_the_finest_grids(bits: int) -> None:
    """Where the finest grids are predicted to fit and do not, the next rounds are coarser."""
    cfg = config(**PLANNED, model_dim=64, mlp_bits=bits)
    weights = weights_for(cfg, 0, 0.3, 0.5)
    most = len(finest(cfg, weights, {}))
    for free in (most - 1, most - 50, 0.997 * most, 0.99 * most, 0.98 * most):
        content, lines = exported(with_room(cfg, free), weights)
        assert 0.98 * free <= len(content) <= free, (most, free, lines)
    content, lines = exported(with_room(cfg, most), weights)
    assert content == finest(cfg, weights, {}) and len(rounds_of(lines)) <= 2


def test_weights_without_costs_fill_the_limit() -> None:
    """Of a run with RATE_CONTROL=0, for example: all rows have nearly the same step, and no limit lies between two
    sizes that differ by more than half a percent, though scales are rounded."""
    cfg = config(**PLANNED, model_dim=128, num_layers=3, vocab_size=1024, bigram_vocab_size=2000)
    weights = weights_for(cfg, 0, 0.1, 0.3)
    for bits in (3.0, 3.6, 4.5):
        room = bits / 8 * size_of(weights)
        content, lines = exported(with_room(cfg, room), weights, calibrated=False)
        assert 0.995 * room <= len(content) <= room, (bits, lines)


def test_limit_just_above_the_trained_grids() -> None:
    """Where the coarsest plan beside the trained grids is predicted to fit and does not, the export goes on without
    them: limits from well below the size of that plan to above it."""
    cfg = config(**PLANNED, num_layers=2, bigram_vocab_size=500)
    weights = weights_for(cfg, 0, 0.1, 0.3)
    grids = mlp_of(t.grids_for_bytes(weights, costs_of(weights), {}, cfg, 0.6 * size_of(weights)))
    coarsest = t.coded_bytes(weights, t.grids_for_bytes(weights, costs_of(weights), grids, cfg, 0), cfg)
    for share in (0.97, 1.0, 1.005, 1.01, 1.02, 1.04, 1.08, 1.2):
        content, lines = exported(with_room(cfg, int(share * coarsest)), weights, grids)
        assert 0.9 * share * coarsest <= len(content) <= share * coarsest, (share, lines)


def test_a_smaller_limit_drops_the_trained_grids() -> None:
    """Grids that the MLP trained on stay for the limit of the run, bit for bit; below it all are planned anew."""
    cfg = config(**PLANNED)
    weights = weights_for(cfg, 0, 0.0, 0.3)
    own = with_room(cfg, 0.6 * size_of(weights))
    grids = mlp_of(t.grids_for_bytes(weights, costs_of(weights), {}, own, 0.55 * size_of(weights)))
    for limit, stay in ((own, True), (with_room(cfg, 0.59 * size_of(weights)), False)):
        content, lines = exported(limit, weights, grids, own)
        stored = t.decode_artifact(content, "x.ptz", limit)[1]
        same = [
            torch.equal(stored[n].dequantize(), grid.quantize(weights[n]).dequantize()) for n, grid in grids.items()
        ]
        assert len(same) == 2 * cfg.num_layers and set(same) == {stay}, lines
        if not stay:
            assert content == exported(limit, weights)[0]


@pytest.mark.parametrize("kind", ["mlp", "attn", "bigram"])
def test_given_bits_cap_the_levels(kind: str) -> None:
    """MLP_BITS=4 under rate control: 16 levels in the MLP at most, and more elsewhere; so for the other kinds."""
    cfg = config(**(PLANNED | {"model_dim": 64, "mlp_bits": 8, f"{kind}_bits": 4}))
    weights = weights_for(cfg, 0, 0.0, 0.3)
    for free in (0.6 * size_of(weights), 2 * size_of(weights)):
        content, lines = exported(with_room(cfg, free), weights)
        levels: dict[str, int] = {}
        for name, (codes, scale) in t.decode_artifact(content, "x.ptz", cfg)[1].items():
            if scale is not None:
                assert t.category(name) != kind or (codes.min() >= -8 and codes.max() <= 7)
                levels[t.category(name)] = max(levels.get(t.category(name), 0), len(codes.unique()))
        assert 8 <= levels.pop(kind) <= 16 and min(levels.values()) > 16, levels
        assert len(content) <= free
        logged = [line for line in lines if line.startswith(f"artifact category:{kind} ")]
        assert len(logged) == 1 and values(logged[0], "levels")[0] <= 16


def test_fixed_grids() -> None:
    """RATE_CONTROL=0: one round, the grids of the bits whatever the limit, and those that the MLP trained on."""
    cfg = config(run_id="x", prune_frac=0, mlp_prune_frac=0)
    weights = weights_for(cfg, 0, 0.0, 0.3)
    grids = {name: t.Grid(3) for name in mlp_of(plan_for(cfg))}
    for kept in ({}, grids):
        content, lines = exported(cfg, weights, kept)
        expected = t.quantize(weights, plan_for(cfg) | kept, cfg)
        assert content == t.encode_artifact(expected, cfg, SHA256) and len(rounds_of(lines)) == 1


def test_log_of_the_sizes() -> None:
    """What it says is on disk; bits per weight of all categories add up to the entropy of the whole."""
    cfg = with_room(config(**PLANNED, model_dim=64), 40_000)
    weights = weights_for(cfg, 0, 0.0, 0.3)
    content, lines = exported(cfg, weights)
    log = "\n".join(lines)
    assert values(log, "model_bytes")[-1] == len(content) and values(log, "code_bytes") == [CODE_BYTES]
    assert values(log, "artifact_bytes") == [len(content) + CODE_BYTES]
    assert values(log, "headroom_bytes") == [40_000 - len(content)] and values(log, "limit") == [CODE_BYTES + 40_000]
    assert lines[-1].startswith("artifact path:logs/x.ptz codec:zstd-22 ")
    assert sorted(re.findall(r"artifact category:(\w+)", log)) == ["attn", "bigram", "embed", "mlp", "small"]
    assert sum(values(log, "params")) == size_of(weights)
    assert sum(values(log, "bytes")) == pytest.approx(len(content), rel=0.03)
    rates = [8 * size / params for size, params in zip(values(log, "bytes"), values(log, "params"), strict=True)]
    assert values(log, "bits_per_weight") == pytest.approx(rates, rel=0.001)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("rate_control", [0, 1])
def test_weights_that_are_not_finite(bad: float, rate_control: int) -> None:
    """They are named, and nothing is written."""
    cfg = config(run_id="x", rate_control=rate_control)
    weights = weights_for(cfg, 0, 0.0, 0.0)
    weights["blocks.0.attn.q_proj.weight"][1, 2] = bad
    with pytest.raises(FloatingPointError, match=r"blocks\.0\.attn\.q_proj\.weight is not finite or beyond fp16"):
        exported(cfg, weights)
    assert not list(Path("logs").iterdir())


def test_too_small_a_limit_is_said() -> None:
    """Where even the coarsest grids do not fit, the smallest file is kept and the log says by how much it is over."""
    cfg = with_room(config(**PLANNED), 900)
    content, lines = exported(cfg, weights_for(cfg, 0, 0.0, 0.0))
    assert len(content) > 900
    assert lines[-1].startswith(f"error: {len(content) - 900} bytes over ARTIFACT_LIMIT_BYTES")


def test_over_the_limit_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way from weights on disk: a file over the limit is scored, exit code 3; scored again it gives the same
    number and 0, and says again that it is over; one that fits gives the number, too. Sizes of another model have no
    effect, which is said. Data with another tokenizer are refused."""
    rt = runtime()
    monkeypatch.setattr(t, "Runtime", lambda cfg: rt)
    cfg = config(run_id="x", artifact_limit_bytes=1000, eval_stride=32)
    sha256 = t.hashlib.sha256((corpus() / "tokenizer.model").read_bytes()).hexdigest()
    weights = model_for(cfg, qat=False).state_dict()
    trained = {"config": vars(cfg), "weights": weights, "costs": {}, "grids": {}, "data": {"tokenizer_sha256": sha256}}
    t.save_tensors(Path("x.weights"), trained)
    scores = []
    for changes, code, is_over in (
        ({"export_from": "x.weights", "num_layers": 2}, t.OVER_LIMIT, True),
        ({"eval_artifact": "logs/x.ptz", "num_layers": 5}, 0, True),
        ({"eval_artifact": "logs/x.ptz", "artifact_limit_bytes": 16_000_000}, 0, False),
        ({"export_from": "x.weights", "artifact_limit_bytes": 16_000_000}, 0, False),
    ):
        rt.lines.clear()
        assert t.main(t.dataclasses.replace(cfg, **changes), []) == code
        over = [line for line in rt.lines if line.startswith("error: ")]
        assert len(over) == is_over and t.OVER_LIMIT == 3
        assert all("bytes over ARTIFACT_LIMIT_BYTES" in line for line in over)
        ignored = [f"warning: NUM_LAYERS has no effect, {next(iter(changes.values()))} has 3"]
        assert [line for line in rt.lines if line.startswith("warning: ")] == ignored * ("num_layers" in changes)
        sizes = [line for line in rt.lines if line.startswith("artifact path:")]
        assert len(sizes) == 1 and values(sizes[0], "model_bytes") == [Path("logs/x.ptz").stat().st_size]
        assert rt.lines[-1].startswith("final_int8_zlib_roundtrip_exact val_loss:")
        scores.append(rt.lines[-1])
    assert len(set(scores)) == 1
    content = t.encode_artifact(t.quantize(weights, plan_for(cfg), cfg), cfg, SHA256)
    Path("other.ptz").write_bytes(content)
    with pytest.raises(ValueError, match=f"other.ptz needs the tokenizer of sha256 {SHA256}"):
        t.main(t.dataclasses.replace(cfg, eval_artifact="other.ptz"), [])
    stored = t.quantize(weights, plan_for(cfg), cfg)
    stored["smear_gate"].values[0] = torch.nan
    Path("nan.ptz").write_bytes(t.encode_artifact(stored, cfg, sha256))
    with pytest.raises(FloatingPointError, match="the validation loss is nan"):  # forged; command_line: exit code 4
        t.main(t.dataclasses.replace(cfg, eval_artifact="nan.ptz"), [])


@pytest.mark.parametrize("rate_control", [False, True])
def test_container(rate_control: bool) -> None:
    """2% smaller than torch.save and zstd-22 of the same codes; within 2.5% of order-0 entropy by matrix plus the
    rest."""
    cfg = config(model_dim=192, mlp_mult=3, bigram_vocab_size=2000, bigram_dim=64, mlp_prune_frac=0)
    weights = weights_for(cfg, 0, 0.1, 0.3)
    plan = plan_for(cfg)
    if rate_control:
        plan = t.grids_for_bytes(weights, costs_of(weights), {}, cfg, 0.57 * size_of(weights))
    stored = t.quantize(weights, plan, cfg)
    size = len(t.encode_artifact(stored, cfg, SHA256))
    buffer = io.BytesIO()
    torch.save({name: tuple(tensor) for name, tensor in stored.items()}, buffer)
    pickled = len(zstandard.ZstdCompressor(level=22).compress(buffer.getvalue()))
    entropy = sum(tensor.num_bytes() for tensor in stored.values())
    assert size < 0.98 * pickled, (size, pickled)
    assert size < 1.025 * entropy, (size, entropy)


def test_full_size() -> None:
    """33.6 million weights whose rows spread as trained ones do: between 15,900,000 and 16,000,000 bytes, with an MLP
    of 3.1 to 3.8 bits a weight."""
    cfg = t.load_config({"RUN_ID": "x"})[0]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in t.GPT(cfg, torch.float32).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        weights[name] = 0.04 * torch.randn(shape, generator=generator)
        if len(shape) == 2:
            weights[name] *= torch.exp(0.3 * torch.randn(shape[0], 1, generator=generator))
    assert size_of(weights) == 33_645_677
    content, lines = exported(cfg, weights)
    assert 15_900_000 <= len(content) + CODE_BYTES <= 16_000_000, lines
    assert len(content) >= 0.995 * (16_000_000 - CODE_BYTES) and len(rounds_of(lines)) <= 6, lines
    assert all(re.search(r" time:\d+ms$", line) for line in rounds_of(lines))
    [mlp] = [line for line in lines if line.startswith("artifact category:mlp")]
    assert 3.1 <= values(mlp, "bits_per_weight")[0] <= 3.8, lines
