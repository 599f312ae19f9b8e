"""Quantization: training and export share one grid, bit for bit; one step size fills the budget."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from tools import config, mlp_grids, model_for, plan_for, t


def weights() -> torch.Tensor:
    """Rows of usual size, zeros, tiny, huge, one-sided and exactly on half steps."""
    torch.manual_seed(0)
    w = torch.randn(40, 48) * 10 ** torch.linspace(-9, 4, 40).unsqueeze(1)
    w[3] = 0
    w[4] = 1e-9
    w[5] = -torch.arange(48) * 0.5
    w[6, 1:] = 0
    return w


def spread_rows(rows: int, columns: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (R, C) of different sizes and what errors in them cost (R,)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator))
    return weight, torch.rand(rows, generator=generator) ** 4 + 0.01


SHAPES = {
    "blocks.0.mlp.up_proj.weight": (300, 64, 1.0, 1.0),
    "blocks.0.attn.q_proj.weight": (100, 64, 0.2, 40.0),
    "bigram.embed.weight": (150, 24, 5.0, 0.001),
    "embed.weight": (120, 64, 0.02, 3.0),
}


def small_model() -> tuple[t.Tensors, t.Tensors]:
    """(weights, costs) of a matrix of each kind, with different sizes and costs; and gains, which stay fp16."""
    state, costs = {}, {}
    for seed, (name, (rows, columns, size, dear)) in enumerate(SHAPES.items()):
        weight, cost = spread_rows(rows, columns, seed)
        state[name], costs[name] = size * weight, dear * cost
    return state | {"blocks.0.mlp_scale": torch.ones(64)}, costs


def entropy_bytes(codes: torch.Tensor) -> float:
    """Order-0 entropy of integer codes, by its definition."""
    counts = Counter(codes.flatten().tolist())
    return sum(-n * math.log2(n / codes.numel()) for n in counts.values()) / 8


def largest_error(weight: torch.Tensor, grid: t.Grid) -> float:
    """The largest error of a weight, in steps of its row."""
    codes, scale = grid.quantize(weight)
    return float(((t.Stored(codes, scale).dequantize() - weight).abs() / scale.float().unsqueeze(1)).max())


@pytest.mark.parametrize("bits", [2, 4, 5, 6, 8])
@pytest.mark.parametrize("step", [None, 0.0007, 3.0])
def test_fake_quantization_is_export_and_load(bits: int, step: float | None) -> None:
    """Same bits (also of the sign of zero), on grids of fixed bits and on those with a step for each row."""
    w = weights()
    grid = t.Grid(bits, None if step is None else step * torch.linspace(0.5, 2, 40))
    layer = t.CastedLinear(w.size(1), w.size(0), fake_quant=True)
    layer.weight.data.copy_(w)
    exported = grid.quantize(w).dequantize()
    t.GPT.refresh(torch.nn.ModuleDict({"a_proj": layer}), {"a_proj.weight": grid})
    assert layer.rounded is not None and torch.equal(layer.rounded.view(torch.int32), exported.view(torch.int32))
    loaded = t.quantize({"a_proj.weight": w}, {"a_proj.weight": grid}, config(prune_frac=0))["a_proj.weight"]
    assert torch.equal(loaded.dequantize().view(torch.int32), exported.view(torch.int32))


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_grid_of_fixed_bits(bits: int) -> None:
    """The largest weight of a row gets the largest code, scales are fp16, the error is at most half a step of ordinary
    rows, zeros stay zeros."""
    w, grid = weights(), t.Grid(bits)
    codes, scale = grid.quantize(w)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float16
    largest = 2 ** (bits - 1) - 1
    exact = (w.abs().amax(dim=1) / largest).clamp(t.SMALLEST_SCALE, t.LARGEST_SCALE)
    assert torch.equal(scale, exact.half())
    assert codes.min() >= -largest - 1 and codes.max() <= largest
    assert (codes[20:].abs().amax(dim=1) == largest).all()
    error = (t.Stored(codes, scale).dequantize() - w).abs()[20:]
    assert (error <= 0.502 * scale[20:, None].float() + w.abs()[20:] * 1e-3).all()
    assert not t.Stored(codes, scale).dequantize()[3].any()


@pytest.mark.parametrize("bits_per_weight", [1.5, 3.0, 4.5])
def test_one_step_size_for_all(bits_per_weight: float) -> None:
    """Steps are size / sqrt(cost), the cost with its matrix's mean added, in shares of the model's mean, with a least
    one, or the finest scale where that is larger. Scales are these, rounded up to one of 8 values per octave."""
    state, costs = small_model()
    costs["bigram.embed.weight"][:] = 1e-12
    budget = bits_per_weight / 8 * sum(weight.numel() for weight in state.values())
    plan = t.grids_for_bytes(state, costs, {}, config(rate_control=True, mlp_bits=8), budget)
    assert plan.keys() == costs.keys()
    mean = sum(float(cost.double().mean()) for cost in costs.values()) / 4
    sizes = []
    for name, (bits, scale) in plan.items():
        assert bits == 8 and scale is not None
        mantissa = torch.frexp(scale)[0]
        assert torch.equal(16 * mantissa, (16 * mantissa).round()) and len(mantissa.unique()) <= 8
        finest = t.finest_scales(state[name], 8)
        assert (scale >= 0.9999 * finest).all()
        relative = [max((x + float(costs[name].mean())) / mean, t.LEAST_COST) for x in costs[name].tolist()]
        sizes.append((scale * torch.tensor(relative).sqrt())[scale > 1.126 * finest])
    size = torch.cat(sizes)
    assert len(size) > 0.5 * sum(map(len, costs.values())) and size.max() <= 1.126 * size.min()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_finest_scales_have_the_least_error(bits: int) -> None:
    """No other scale of the search is better, some rows are clipped, one outlier among small weights is not; zeros and
    tiny rows give finite scales."""
    weight, _ = spread_rows(200, 64)
    weight[7], weight[7, 3] = 0.01 * weight[7], 100.0
    scales = t.finest_scales(weight, bits)
    widest = weight.abs().amax(dim=1) / (2 ** (bits - 1) - 1)

    def errors(scale: torch.Tensor) -> torch.Tensor:
        """Squared error of each row."""
        return (t.Grid(bits, scale).quantize(weight).dequantize() - weight).square().sum(dim=1)

    for i in range(t.SCALES_TRIED):
        assert (errors(scales) <= errors(widest * 2 ** (-i / 8)) * 1.001).all()
    assert (scales < 0.95 * widest).any() and scales[7] >= 0.99 * widest[7]
    assert t.finest_scales(weights(), bits).isfinite().all()
    assert torch.equal(t.finest_scales(weight, 8), weight.abs().amax(dim=1) / 127)  # nothing is clipped


@pytest.mark.parametrize("bits_per_weight", [1.5, 3.0, 4.5, 6.0])
def test_predicted_bytes_meet_the_budget(bits_per_weight: float) -> None:
    """Counted by the definition of entropy, never over, and less than 1% under. Nothing is clipped."""
    state, costs = small_model()
    budget = bits_per_weight / 8 * sum(weight.numel() for weight in state.values())
    cfg = config(rate_control=True, mlp_bits=8, mlp_prune_frac=0, prune_frac=0)
    plan = t.grids_for_bytes(state, costs, {}, cfg, budget)
    assert plan.keys() == costs.keys()
    size = 2.0 * 64
    for name in costs:
        codes, scale = plan[name].quantize(state[name])
        size += entropy_bytes(codes) + 2 * len(scale)
        assert t.Stored(codes, scale).num_bytes() == pytest.approx(entropy_bytes(codes) + 2 * len(scale), rel=1e-6)
        assert largest_error(state[name], plan[name]) < 0.5001
    assert t.coded_bytes(state, plan, cfg) == pytest.approx(size, rel=1e-6)
    assert 0.99 * budget < size <= budget


def test_budgets_out_of_reach() -> None:
    """Too much gives the finest grids, at which each row's largest weight has the largest code; too little gives the
    coarsest."""
    state, costs = small_model()
    plan = t.grids_for_bytes(state, costs, {}, config(rate_control=True, mlp_bits=8), 1e9)
    assert all((grid.quantize(state[name])[0].abs().amax(dim=1) > 110).all() for name, grid in plan.items())
    plan = t.grids_for_bytes(state, costs, {}, config(rate_control=True, mlp_bits=8), 1.0)
    assert all(not grid.quantize(state[name])[0].any() for name, grid in plan.items())


def test_costly_rows_get_finer_steps() -> None:
    """Within a matrix and between matrices, by the root of the cost. Units of the costs do not matter."""
    state, costs = small_model()
    costs["blocks.0.mlp.up_proj.weight"] = torch.cat((torch.full((150,), 1.0), torch.full((150,), 17.0)))
    budget = 3 / 8 * sum(weight.numel() for weight in state.values())
    plan = t.grids_for_bytes(state, costs, {}, config(rate_control=True, mlp_bits=8), budget)
    steps = plan["blocks.0.mlp.up_proj.weight"].scale
    assert steps is not None
    ratios = steps[:150] / steps[150:]  # of scales of 8 values per octave; few rows are on their finest grid
    assert ((ratios / 2.6**0.5 - 1).abs() < 0.13).float().mean() > 0.95
    for other in (1e-9, 1e6):
        scaled = {name: other * cost for name, cost in costs.items()}
        again = t.grids_for_bytes(state, scaled, {}, config(rate_control=True, mlp_bits=8), budget)
        for name, grid in plan.items():
            torch.testing.assert_close(again[name].scale, grid.scale, rtol=0.15, atol=0)


def test_grids_that_are_kept_count() -> None:
    """They stay as they are, and the others fill what they leave."""
    state, costs = small_model()
    name = "blocks.0.mlp.up_proj.weight"
    budget = 4 / 8 * sum(weight.numel() for weight in state.values())
    sizes = []
    for step in (0.1, 2.0):
        kept = {name: t.Grid(8, torch.full((300,), step))}
        plan = t.grids_for_bytes(state, costs, kept, config(rate_control=True, mlp_bits=8), budget)
        assert plan[name] is kept[name] and 0.99 * budget < t.coded_bytes(state, plan, config()) <= budget
        sizes.append(t.coded_bytes(state, plan, config()) - t.coded_bytes({name: state[name]}, plan, config()))
    assert sizes[0] < 0.8 * sizes[1]


@pytest.mark.parametrize("kind", ["mlp", "attn", "bigram"])
def test_given_bits_cap_the_levels(kind: str) -> None:
    """MLP_BITS, ATTN_BITS and BIGRAM_BITS: no more levels there, the other matrices are not capped nor clipped, the
    budget is met."""
    state, costs = small_model()
    budget = 4.5 / 8 * sum(weight.numel() for weight in state.values())
    plan = t.grids_for_bytes(
        state, costs, {}, config(**{"rate_control": True, "mlp_bits": 8, f"{kind}_bits": 4}), budget
    )
    for name, grid in plan.items():
        codes = grid.quantize(state[name])[0]
        levels = int(codes.max()) - int(codes.min()) + 1
        assert levels <= 16 if t.category(name) == kind else levels > 16
        assert grid.bits == (4 if t.category(name) == kind else 8)
        assert grid.bits == 4 or largest_error(state[name], grid) < 0.5001
    assert 0.98 * budget < t.coded_bytes(state, plan, config()) <= budget


def test_one_size_spends_bytes_where_errors_cost() -> None:
    """At the same bytes the plan has less weighed error than equal steps and than steps in units of each matrix."""
    state, costs = small_model()
    state.pop("blocks.0.mlp_scale")

    def curve(steps: dict[str, torch.Tensor]) -> np.ndarray:
        """(bytes, log error) at many sizes of the steps."""
        points = []
        for factor in 2.0 ** torch.arange(-6, 3, 0.5):
            plan = {}
            for name, step in steps.items():
                plan[name] = t.Grid(8, torch.maximum(factor * step, t.finest_scales(state[name], 8)))
            errors = [(plan[n].quantize(w).dequantize() - w).square().sum(dim=1) @ costs[n] for n, w in state.items()]
            points.append((t.coded_bytes(state, plan, config()), math.log(sum(errors))))
        return np.array(points[::-1]).T

    mean = torch.stack([cost.mean() for cost in costs.values()]).mean()
    planned = {name: ((cost + cost.mean()) / mean).clamp(min=t.LEAST_COST).rsqrt() for name, cost in costs.items()}
    equal = {name: torch.ones(len(weight)) for name, weight in state.items()}
    relative = {name: weight.std().expand(len(weight)) for name, weight in state.items()}
    sizes = np.linspace(2.5, 4.5, 5) / 8 * sum(weight.numel() for weight in state.values())
    best, *others = (np.interp(sizes, *curve(steps)) for steps in (planned, equal, relative))
    for other in others:
        assert (best < other - 0.4).all(), (best, other)


def test_odd_weights_and_costs() -> None:
    """Rows of zeros, huge and tiny ones, no cost at all: finite steps, the budget is met."""
    name = "blocks.0.attn.q_proj.weight"
    for weight, cost in ((weights(), torch.ones(40)), (weights(), torch.zeros(40)), (torch.zeros(3, 5), torch.ones(3))):
        plan = t.grids_for_bytes(
            {name: weight}, {name: cost}, {}, config(rate_control=True, mlp_bits=8), weight.numel() / 2
        )
        assert plan[name].scale.isfinite().all() and plan[name].quantize(weight).dequantize().isfinite().all()
        assert t.coded_bytes({name: weight}, plan, config()) <= weight.numel() / 2


def test_straight_through() -> None:
    """The value is the quantized one, the gradient is the identity."""
    layer = t.CastedLinear(5, 4, fake_quant=True)
    torch.nn.init.normal_(layer.weight)
    layer.rounded.copy_(t.Grid(4).quantize(layer.weight.detach()).dequantize())
    out = layer(torch.eye(5)).T
    assert torch.equal(out, t.Grid(4).quantize(layer.weight.detach()).dequantize())
    out.backward(torch.arange(20.0).view(4, 5))
    assert torch.equal(layer.weight.grad, torch.arange(20.0).view(4, 5))


@pytest.mark.parametrize("rate_control", [False, True])
def test_what_trains_is_what_is_exported(rate_control: bool) -> None:
    """The MLP weights that the forward uses equal the ones that export stores (without pruning), also after the plan
    went through a file."""
    cfg = config(mlp_prune_frac=0, prune_frac=0)
    model, plan = model_for(cfg), plan_for(cfg)
    if rate_control:
        costs = {name: torch.rand(len(p)) for name, p in model.named_parameters() if t.category(name) != "small"}
        state = dict(model.state_dict())
        plan = t.grids_for_bytes(state, costs, {}, cfg, sum(w.numel() for w in state.values()) / 2)
    model.refresh({name: grid for name, grid in plan.items() if t.category(name) == "mlp"})
    stored = t.quantize(model.state_dict(), {name: t.Grid(*tuple(grid)) for name, grid in plan.items()}, cfg)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, t.CastedLinear) and m.rounded is not None]
    assert len(layers) == 2 * cfg.num_layers
    for name, layer in layers:
        assert not torch.equal(layer.rounded, layer.weight)
        loaded = stored[f"{name}.weight"].dequantize()
        assert torch.equal(layer.rounded.view(torch.int32), loaded.view(torch.int32))


def test_categories_of_the_fixed_grids() -> None:
    """4 bits for the MLP, 5 for attention and bigram, or as given; fp16 for the rest and the second-to-last block's
    key projection."""
    plan = plan_for(config(num_layers=4))
    assert plan["blocks.0.mlp.up_proj.weight"].bits == 4 and plan["blocks.1.attn.q_proj.weight"].bits == 5
    assert plan["bigram.embed.weight"].bits == plan["bigram.out_proj.weight"].bits == 5
    assert "blocks.2.attn.k_proj.weight" not in plan and "blocks.3.attn.k_proj.weight" in plan
    assert "embed.weight" not in plan and all(grid.scale is None for grid in plan.values())
    assert len(plan) == 4 * 6 - 1 + 2
    pr314 = t.load_config({"RECIPE": "pr314"})[0]
    names = ["blocks.0.attn.q_proj.weight", "blocks.0.mlp.up_proj.weight", "bigram.embed.weight"]
    weights, bits = dict.fromkeys(names, torch.zeros(2, 3)), (6, 4, 6)
    assert t.grids_for_bytes(weights, {}, {}, pr314, 0) == dict(zip(names, map(t.Grid, bits), strict=True))
    kept = {"blocks.0.mlp.up_proj.weight": t.Grid(3)}
    assert t.grids_for_bytes(weights, {}, kept, pr314, 0)["blocks.0.mlp.up_proj.weight"] == t.Grid(3)
    assert {t.category(name) for name in mlp_grids(config())} == {"mlp"}


def test_pruning() -> None:
    """The smallest share of an MLP matrix and of a large other one becomes zero, everything else stays."""
    w = torch.randn(300, 400)
    state = {"blocks.0.mlp.up_proj.weight": w, "blocks.0.attn.q_proj.weight": w, "blocks.0.mlp_scale": w[0]}
    state |= {"bigram.out_proj.weight": w[:, :200]}  # 60,000 elements
    stored = t.quantize(state, {}, config(mlp_prune_frac=0.05, prune_frac=0.1))
    for name, count in zip(state, (6000, 12000, 0, 0), strict=True):
        pruned, kept = stored[name].values, stored[name].values != 0
        assert int((pruned == 0).sum()) == count and torch.equal(pruned[kept], state[name].half()[kept])
        assert count == 0 or state[name][~kept].abs().max() < state[name][kept].abs().min()
    stored = t.quantize(state, {}, config(mlp_prune_frac=0, prune_frac=0))
    assert all(torch.equal(stored[name].values, weight.half()) for name, weight in state.items())
    coded = t.quantize(state, {name: t.Grid(8) for name in state if "proj" in name}, config(mlp_prune_frac=0.5))
    assert int((coded["blocks.0.mlp.up_proj.weight"].values == 0).sum()) >= 60000


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_weight_that_is_not_finite_is_not_exported(value: float) -> None:
    """Nor is one beyond fp16: it is named."""
    state = {"blocks.0.mlp.up_proj.weight": torch.full((2, 2), value)}
    with pytest.raises(FloatingPointError, match=r"blocks\.0\.mlp\.up_proj\.weight is not finite"):
        t.quantize(state, {}, config())
