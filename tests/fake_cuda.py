"""Run the CUDA branch of the full-size model on fake tensors: needs a CUDA build of PyTorch, but no GPU.

    python tests/fake_cuda.py

Checks shapes, formats and devices of forward, quantization and optimizer steps; a backward needs a device.
"""

from __future__ import annotations

import sys

import torch
from tools import SilentRuntime, mlp_grids, t
from torch._subclasses.fake_tensor import FakeTensorMode


def described(tensor: torch.Tensor) -> str:
    """Shape, format and device."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]} {tensor.device}"


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Stands for FlashAttention 3: what it takes, and a result of its shape."""
    heads, kv_heads = q.size(2), k.size(2)
    assert causal and k.shape == v.shape and q.shape[:2] == k.shape[:2] and heads % kv_heads == 0
    assert {each.dtype for each in (q, k, v)} == {torch.bfloat16}
    assert all(each.stride(-1) == 1 for each in (q, k, v))
    return torch.empty_like(q)


def check_model(cfg: t.Config, flash3: bool) -> t.GPT:
    """Forward in training and in evaluation, with and without grids; returns the model."""
    with torch.device("cuda"):
        model = t.GPT(cfg, torch.bfloat16, flash3)
        tokens = torch.zeros(4, cfg.train_seq_len + 1, dtype=torch.int64)
    assert {p.device.type for p in model.parameters()} == {"cuda"} == {b.device.type for b in model.buffers()}
    for grids in ({}, mlp_grids(cfg)):
        model.refresh(grids)
        nll = model(tokens[:, :-1], tokens[:, 1:])
        with torch.no_grad():
            scored = model(tokens[:, :-1], tokens[:, 1:])
        assert nll.dtype == scored.dtype == torch.float32 and nll.shape == scored.shape == (4, cfg.train_seq_len)
        assert nll.device.type == "cuda" and nll.requires_grad and not scored.requires_grad
    print(f"forward flash3:{int(flash3)} nll", described(nll))
    return model


def check_grids(model: t.GPT, cfg: t.Config) -> None:
    """Grids of the least error, whose scales are on the CPU, since they are the same on all ranks."""
    layer = model.get_submodule("blocks.0.mlp.up_proj")
    assert isinstance(layer, t.CastedLinear) and layer.rounded is not None
    print("fake quantization", described(layer.rounded))
    matrices = {name: p.detach() for name, p in model.named_parameters() if t.category(name) != "small"}
    plan = {name: t.Grid(4, t.finest_scales(weight, 4)) for name, weight in matrices.items()}
    model.refresh({name: grid for name, grid in plan.items() if t.category(name) == "mlp"})
    codes, scale = plan["blocks.0.mlp.up_proj.weight"].quantize(layer.weight.detach())
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float16) and codes.device == scale.device
    assert layer.rounded.dtype == torch.float32 and layer.rounded.device == layer.weight.device
    print("codes", described(codes), "scales", described(scale))


def check_optimizers(model: t.GPT, cfg: t.Config) -> None:
    """A step of both from gradients of the buffer that all of them share."""
    rt = SilentRuntime(0, 1, False)
    rt.device, rt.compute_dtype = torch.device("cuda"), torch.bfloat16
    params = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in params), device="cuda")
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p)
    adamw, muon = t.make_optimizers(model, cfg, rt).values()
    adamw.step()
    muon.step()
    momenta = [state["momentum"] for state in muon.state.values()]
    assert {m.device.type for m in momenta} == {"cuda"} and {m.dtype for m in momenta} == {torch.float32}
    print("optimizer step of", len(params), "parameters in", len(momenta), "stacks, gradients", described(flat))
    stack = t.newton_schulz(torch.empty(22, 512, 1536, device="cuda"), 5, torch.bfloat16)
    print("Newton-Schulz", described(stack))


def main() -> int:
    """One line per part."""
    if torch.version.cuda is None:
        print(f"PyTorch {torch.__version__} has no CUDA: nothing checked. Run this where a CUDA build is installed")
        return 0
    cfg = t.load_config({})[0]
    t.flash_attn_func = flash
    with FakeTensorMode(allow_non_fake_inputs=True):
        check_model(cfg, flash3=True)
        model = check_model(cfg, flash3=False)
        check_grids(model, cfg)
        check_optimizers(model, cfg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
