"""Run the CUDA branch of the full-size model on fake tensors: needs a CUDA build of PyTorch, but no GPU.

    python tests/fake_cuda.py

Checks shapes, formats and devices of forward, evaluation, quantization and optimizer steps; a backward needs a device.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t


def main() -> int:
    """One line per part."""
    if torch.version.cuda is None:
        print(f"PyTorch {torch.__version__} has no CUDA: nothing checked. Run this where a CUDA build is installed")
        return 0
    cfg = t.load_config({})[0]
    plan = {
        n: t.QuantSpec(4)
        for i in range(cfg.num_layers)
        for n in (f"blocks.{i}.mlp.up_proj.weight", f"blocks.{i}.mlp.down_proj.weight")
    }
    rt = t.Runtime(0, 1, torch.device("cuda"), torch.bfloat16, False, "sdpa", t.open_log(None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = t.GPT(cfg, plan, torch.bfloat16)
            ids = torch.zeros(4, cfg.train_seq_len, dtype=torch.int64)
        print("parameters", sum(p.numel() for p in model.parameters()), {p.device.type for p in model.parameters()})
        model.refresh(True)
        layer = model.blocks[0].mlp.up_proj
        print(
            "fake quantization",
            tuple(layer.forward_weight.shape),
            layer.forward_weight.dtype,
            layer.forward_weight.device,
        )
        codes, scale = t.quantize_per_row(layer.weight.detach(), t.QuantSpec(4))
        print("export codes", codes.dtype, "scales", scale.dtype, codes.device)
        t.QuantSpec.__post_init__ = lambda _: None  # it looks at values, which fake tensors do not have
        rows = t.search_rows(layer.weight.detach(), torch.ones(len(scale)))
        scale = t.row_scale(layer.weight.detach(), t.QuantSpec(8, 0.2, rows))
        print("searched scales", tuple(rows.shape), rows.device, "on", scale.dtype, scale.device)
        with torch.no_grad(), rt.autocast():
            loss, rope = model.loss(ids, ids), model.angles[:, : cfg.train_seq_len]
            hidden, past = model.hidden(model.embedded(ids), cfg.train_seq_len, rope)
            x0, rope = model.embedded(ids), model.angles[:, cfg.train_seq_len : 2 * cfg.train_seq_len]
            banded, _ = model.chunk_nll(x0, ids, rope, past)
            span = model.nll(ids, ids[:, -cfg.eval_stride :])
        print("forward", tuple(hidden.shape), hidden.dtype, "loss", loss.dtype, loss.device)
        print("banded evaluation", tuple(banded.shape), banded.dtype, banded.device)
        print("evaluation span", tuple(span.shape), span.dtype, span.device)
        assert (
            hidden.dtype == torch.bfloat16 and loss.dtype == span.dtype == torch.float32 and span.device.type == "cuda"
        )
        optimizers = t.Optimizers(model, cfg, rt)
        metrics = optimizers.step(1.0, 0)
        print(
            "optimizer step",
            tuple(metrics.shape),
            metrics.dtype,
            metrics.device,
            "flat gradient",
            optimizers.flat.numel(),
        )
        stack = t.newton_schulz(torch.empty(22, 512, 1536, device="cuda"), 5, torch.bfloat16)
        print("Newton-Schulz stack", tuple(stack.shape), stack.dtype, stack.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
