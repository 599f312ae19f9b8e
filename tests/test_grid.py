"""Quantization: training and export share one grid, bit for bit."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from tools import config, model_for, plan_for, t


def weights() -> torch.Tensor:
    """Rows of usual size, zeros, tiny, huge, one-sided and exactly on half steps."""
    torch.manual_seed(0)
    w = torch.randn(40, 48) * 10 ** torch.linspace(-9, 4, 40).unsqueeze(1)
    w[3] = 0
    w[4] = 1e-9
    w[5] = -torch.arange(48) * 0.5
    w[6, 1:] = 0
    return w


@pytest.mark.parametrize("bits", [2, 4, 5, 6, 8])
@pytest.mark.parametrize("compiled", [False, True])
def test_fake_quantization_is_export_and_load(bits: int, compiled: bool) -> None:
    """Same bits (also of the sign of zero), eager and compiled."""
    w, spec = weights(), t.QuantSpec(bits)
    exported = t.dequantize_per_row(*t.quantize_per_row(w, spec))
    fake = torch.compile(t.fake_quantize_per_row, fullgraph=True) if compiled else t.fake_quantize_per_row
    trained = fake(w, t.row_scale(w, spec), spec)
    assert torch.equal(trained.view(torch.int32), exported.view(torch.int32))


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_grid(bits: int) -> None:
    """Codes stay in range, scales are fp16, the error is at most half a step of ordinary rows, zeros stay zeros."""
    w, spec = weights(), t.QuantSpec(bits)
    codes, scale = t.quantize_per_row(w, spec)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float16
    assert codes.min() >= spec.qmin and codes.max() <= spec.qmax == 2 ** (bits - 1) - 1
    error = (t.dequantize_per_row(codes, scale) - w).abs()[20:]
    assert (error <= 0.502 * scale[20:, None].float() + w.abs()[20:] * 1e-3).all()
    assert not t.dequantize_per_row(codes, scale)[3].any()


@pytest.mark.parametrize("step", [0.02, 0.3, 1.5])
def test_scales_of_a_planned_grid(step: float) -> None:
    """At most 8 values per octave, up to 1/8 over what the search found, and never so small that a weight is cut."""
    weight, cost = spread_rows(200, 64)
    factors = t.search_rows(weight, cost)
    spec = t.QuantSpec(8, step, factors)
    scale = t.row_scale(weight, spec)
    mantissa = torch.frexp(scale)[0]
    assert torch.equal(16 * mantissa, (16 * mantissa).round()) and torch.equal(scale, scale.half().float())
    wanted = torch.maximum(step * weight.square().mean().sqrt() * factors, weight.abs().amax(1) / 127)
    assert (scale >= wanted * 0.999999).all() and (scale <= wanted * 1.126).all()
    error = (t.fake_quantize_per_row(weight, scale, spec) - weight).abs()
    assert (error <= scale.unsqueeze(1) / 2 + 1e-6).all()


def spread_rows(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (R, C) of different sizes and what errors in them cost (R,)."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator))
    return weight, torch.rand(rows, generator=generator) ** 4 + 0.01


def test_search_of_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row would do better with another of the 17 factors, given the code table that comes out and the price at equal
    steps: counted row by row from the definition. More rounds change nothing. An error is expected to be a uniform
    one's, or all of a weight that is smaller.
    Units of weights and costs do not matter."""
    weight, cost = spread_rows(12, 40)
    factors = t.search_rows(weight, cost)
    assert factors.dtype == torch.float32 and len(factors.unique()) > 3

    def tried(row: int, factor: float) -> tuple[list[int], float]:
        step = t.SEARCH_STEP * weight.square().mean().sqrt().item() * factor
        exponent = math.floor(math.log2(step)) - 3
        scale = max(math.ceil(step / 2**exponent) * 2**exponent, 0.0)
        scale = max(scale, -(-weight[row].abs().max().item() / 127 // 2**exponent) * 2**exponent)
        codes = [round(x / scale) for x in weight[row].tolist()]
        error = sum(min(x * x, scale * scale / 12) for x in weight[row].tolist())
        return codes, error * cost[row].item()

    chosen = [tried(row, factor) for row, factor in enumerate(factors.tolist())]
    counts = Counter(code for codes, _ in chosen for code in codes)
    total = 480 + 256 * 0.02
    price = 2 * math.log(2) * sum(tried(row, 1.0)[1] for row in range(12)) / 480
    for row, own in enumerate(factors.tolist()):
        value = {}
        for factor in (2 ** (power / 4) for power in range(-8, 9)):
            codes, error = tried(row, factor)
            value[factor] = error + price * sum(math.log2(total / (counts[code] + 0.02)) for code in codes)
        assert min(value.values()) == pytest.approx(value[min(value, key=lambda f: abs(f - own))], rel=1e-3)
    monkeypatch.setattr(t, "SEARCH_ROUNDS", 4 * t.SEARCH_ROUNDS)
    assert torch.equal(t.search_rows(weight, cost), factors)
    for other in (t.search_rows(4 * weight, cost), t.search_rows(weight, 8 * cost)):
        assert torch.equal(other, factors)


def test_search_spends_bytes_where_errors_cost() -> None:
    """At the same bytes the searched scales have less weighed error than equal steps, and dear rows smaller steps."""
    weight, cost = spread_rows(400, 64)
    factors = t.search_rows(weight, cost)
    curves = []
    for rows in (factors, None):
        curve = []
        for step in t.STEPS:
            codes, scale = t.quantize_per_row(weight, t.QuantSpec(8, step, rows))
            error = (t.dequantize_per_row(codes, scale) - weight).square().sum(dim=1) @ cost
            curve.append((t.order0_bytes(codes), math.log(error)))
        curves.append(np.array(curve).T)
    sizes = np.linspace(6000, 14000, 5)
    searched, equal = (np.interp(sizes, *curve) for curve in curves)
    assert (searched < equal - 0.5).all(), (searched, equal)
    assert factors[cost > 0.5].log2().mean() < factors[cost < 0.05].log2().mean() - 1


def test_search_beside_rows_of_zeros() -> None:
    """Buckets that never occur have rows of zeros: what the others get does not run to the edge of the menu."""
    weight, cost = spread_rows(400, 64)
    for dead in (0, 100, 200, 300):
        weight[:dead] = 0
        live = t.search_rows(weight, cost)[dead:]
        assert ((live > 0.26) & (live < 3.9)).float().mean() > 0.7 and live.log2().median().abs() < 1.2, dead


def test_plan_uses_the_search() -> None:
    """The grids of the table have the factors of the search, errors weighed with LEAST_COST of the mean cost; training
    on such a grid is exporting it, bit for bit."""
    weight, cost = spread_rows(64, 48)
    name = "blocks.0.attn.q_proj.weight"
    specs = [spec for _, _, spec in t.rate_table({name: weight}, {name: cost}, {})[name] if spec]
    floored = cost + t.LEAST_COST * cost.mean()
    expected = t.search_rows(weight, floored)
    assert t.LEAST_COST > 0 and all(torch.equal(spec.rows, expected) for spec in specs) and len(expected.unique()) > 3
    for points in t.rate_table({name: weight}, {name: cost}, {})[name][:-1]:
        error = (t.dequantize_per_row(*t.quantize_per_row(weight, points[2])) - weight).square().sum(dim=1) @ floored
        assert points[1] == pytest.approx(float(error), rel=1e-5)
    layer = t.CastedLinear(48, 64, specs[12])
    layer.weight.data.copy_(weight)
    layer.refresh(True)
    stored = t.quantize_state({name: weight}, {name: specs[12]}, config(), print, {})
    assert torch.equal(layer.forward_weight.view(torch.int32), t.dequantize_state(stored)[name].view(torch.int32))


def test_grids_of_an_older_version_are_refused() -> None:
    """Files of before the search hold costs where the factors are now."""
    with pytest.raises(ValueError, match="of an older version"):
        t.QuantSpec(8, 0.2, torch.tensor([1e-8, 2e-7]))


def test_search_of_odd_rows() -> None:
    """Zeros, rows of zeros, huge and tiny ones, no cost at all: finite factors of the menu."""
    for weight, cost in ((weights(), torch.ones(40)), (weights(), torch.zeros(40)), (torch.zeros(3, 5), torch.ones(3))):
        assert (t.search_rows(weight, cost).log2() * 4).abs().le(8).all()


def test_straight_through() -> None:
    """The value is the quantized one, the gradient is the identity."""
    layer = t.CastedLinear(5, 4, t.QuantSpec(4))
    torch.nn.init.normal_(layer.weight)
    layer.refresh(True)
    out = layer(torch.eye(5)).T
    assert torch.equal(out, t.dequantize_per_row(*t.quantize_per_row(layer.weight.detach(), t.QuantSpec(4))))
    out.backward(torch.arange(20.0).view(4, 5))
    assert torch.equal(layer.weight.grad, torch.arange(20.0).view(4, 5))


def test_what_trains_is_what_is_exported() -> None:
    """The MLP weights that the forward uses equal the ones that export stores (without pruning)."""
    cfg = config(mlp_prune_frac=0, prune_frac=0)
    model = model_for(cfg)
    stored = t.quantize_state(dict(model.named_parameters()), plan_for(cfg), cfg, print, {})
    loaded = t.dequantize_state(stored)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, t.CastedLinear) and m.spec]
    assert len(layers) == 2 * cfg.num_layers
    assert all(torch.equal(m.forward_weight, loaded[f"{n}.weight"]) for n, m in layers)


def test_categories_of_the_plan() -> None:
    """int4 MLP, int5 attention and bigram, fp16 for the rest and the second-to-last block's key projection."""
    plan = plan_for(config(num_layers=4))
    assert plan["blocks.0.mlp.up_proj.weight"].bits == 4 and plan["blocks.1.attn.q_proj.weight"].bits == 5
    assert plan["bigram.embed.weight"].bits == plan["bigram.out_proj.weight"].bits == 5
    assert (
        "blocks.2.attn.k_proj.weight" not in plan
        and "blocks.3.attn.k_proj.weight" in plan
        and "embed.weight" not in plan
    )
    assert t.quant_spec_for("blocks.0.attn.q_proj.weight", t.load_config({"RECIPE": "pr314"})[0]) == t.QuantSpec(6)


def test_pruning() -> None:
    """The smallest share becomes zero, everything else stays; the log counts changed codes."""
    w = torch.randn(300, 400)
    pruned = t.prune_smallest(w, 0.05)
    assert int((pruned == 0).sum()) == 6000 and torch.equal(pruned[pruned != 0], w[pruned != 0])
    assert torch.equal(t.prune_smallest(w, 0.0), w)
    lines: list[str] = []
    cfg = config(mlp_prune_frac=0.5)
    t.quantize_state(dict(model_for(cfg).named_parameters()), plan_for(cfg), cfg, lines.append, {})
    assert any(line.startswith("prune category:mlp codes_changed:") for line in lines)


def test_non_finite_weight_is_not_exported() -> None:
    """It is named."""
    state = {"blocks.0.mlp.up_proj.weight": torch.full((2, 2), float("nan"))}
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.up_proj\.weight is not finite"):
        t.quantize_state(state, {}, config(), print, {})


@pytest.mark.parametrize("columns", [12, 300])
def test_error_feedback(columns: int) -> None:
    """Blocked GPTQ equals its definition (one column at a time, the others re-solved), on the same grid, and lowers
    the error of the outputs."""
    torch.manual_seed(0)
    spec, inputs = t.QuantSpec(4), torch.randn(4 * columns, columns) @ torch.randn(columns, columns)
    w, hessian = torch.randn(20, columns), inputs.T @ inputs
    scale = t.row_scale(w, spec)
    codes = t.round_with_feedback(w, scale, spec, hessian)
    h = hessian.double() + torch.eye(columns) * t.HESSIAN_DAMPING * hessian.double().diagonal().mean()
    left, todo = hessian.diagonal().argsort(descending=True).tolist(), w.double().clone()
    expected = torch.empty_like(codes)
    while left:
        at, *left = left
        expected[:, at] = t.round_to_grid(todo[:, at : at + 1].float(), scale, spec)[:, 0]
        error = todo[:, at] - expected[:, at] * scale
        todo[:, left] += error[:, None] * torch.linalg.solve(h[left][:, left], h[left, at])
    assert (codes != expected).float().mean() < 0.002  # a tie may fall either way in fp32
    near = t.round_to_grid(w, scale, spec)
    errors = [((t.dequantize_per_row(c, scale) - w) @ inputs.T).square().sum() for c in (codes, near)]
    assert codes.min() >= spec.qmin and codes.max() <= spec.qmax and errors[0] < 0.7 * errors[1]
