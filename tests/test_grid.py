"""Quantization: training and export share one grid, bit for bit."""

from __future__ import annotations

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
    """At most 8 values per octave, no more than 1/8 over the formula's, and never so small that a weight is cut."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(200, 64, generator=generator) * torch.exp(torch.randn(200, 1, generator=generator))
    cost = torch.rand(200, generator=generator) ** 4
    scale = t.row_scale(weight, t.QuantSpec(8, step, cost))
    mantissa = torch.frexp(scale)[0]
    assert torch.equal(16 * mantissa, (16 * mantissa).round()) and torch.equal(scale, scale.half().float())
    size = weight.square().mean(dim=1).sqrt()
    wanted = step * size.mean() ** (1 - t.SIZE_POWER) * size**t.SIZE_POWER
    wanted = torch.maximum(wanted * (cost / cost.mean() + t.LEAST_COST) ** t.COST_POWER, weight.abs().amax(1) / 127)
    assert (scale >= wanted * 0.999999).all() and (scale <= wanted * 1.126).all()
    error = (t.fake_quantize_per_row(weight, scale, t.QuantSpec(8, step, cost)) - weight).abs()
    assert (error <= scale.unsqueeze(1) / 2 + 1e-6).all()


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
