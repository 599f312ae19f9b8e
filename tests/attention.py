"""PyTorch's flash kernel for CPUs against plain products: the tables of logs/SPEED.md.

    python tests/attention.py [--threads 2]

Both take turns within one process, on the demo's corpus, which is built in a temporary folder; nothing else should run.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from tools import runtime, t

KINDS = {"products": False, "flash": True}
SIZES: dict[str, dict[str, str]] = {
    "the demo's": {},
    "11 layers, width 128": {"NUM_LAYERS": "11", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "TRAIN_BATCH_TOKENS": "4096"},
}
TOKENS, HEADS, KV_HEADS, HEAD_DIM = 2048, 4, 2, 32  # of the attention that is timed alone


def by_turns(action: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median milliseconds of `action` with each kind, after one untimed round."""
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):
        for kind, flash in KINDS.items():
            torch.backends.cuda.enable_flash_sdp(flash)  # a CPU's switch, too
            begun = time.perf_counter()
            action()
            if number > 0:
                times[kind].append(1000 * (time.perf_counter() - begun))
    return {kind: median(each) for kind, each in times.items()}


def shown(times: dict[str, float]) -> str:
    """For a line of the output."""
    return " ".join(f"{kind}:{milliseconds:.0f}ms" for kind, milliseconds in times.items())


def whole_steps() -> None:
    """A training step, and the evaluation of 4,096 targets at stride 64."""
    for name, changes in SIZES.items():
        cfg = t.load_config({"DEMO": "1", "COMPUTE_DTYPE": "float32", **changes})[0]
        rt = runtime()
        data = t.Data(cfg, rt)
        data.num_val_targets = 4096
        model = t.GPT(cfg, torch.float32)
        model.init_weights()
        trainer = t.Trainer(model, data, cfg, rt)
        steps = by_turns(lambda trainer=trainer: trainer.train_step(1.0), 5)
        scores = by_turns(lambda model=model, data=data, rt=rt: t.evaluate(model, data, rt, 64, 32), 3)
        print(f"{name}: step {shown(steps)} evaluation {shown(scores)}", flush=True)


def attention_alone() -> None:
    """Forward and backward of one layer's attention, always of as many tokens."""
    for length in (256, 1024, 2048):
        shape = (TOKENS // length, HEADS, length, HEAD_DIM)
        kv_shape = (TOKENS // length, KV_HEADS, length, HEAD_DIM)
        q = torch.randn(shape, requires_grad=True)
        k = torch.randn(kv_shape, requires_grad=True)
        v = torch.randn(kv_shape, requires_grad=True)

        def both(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            """Gradients of all three."""
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()

        print(f"attention alone, sequences of {length} tokens: {shown(by_turns(both, 7))}", flush=True)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        t.Runtime(t.Config(run_id="attention"))  # so that freed memory is kept
        attention_alone()
        whole_steps()


if __name__ == "__main__":
    main()
