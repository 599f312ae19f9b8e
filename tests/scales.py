"""How good are container and scales of a trained run? `python tests/scales.py logs/RUN.weights` prints two tables.

The first quantizes all matrices at 0.57 bytes per parameter and compares the artifact with torch.save and zstd-22 of
the same codes, and with what ideal order-0 coders would make of the codes. The second has, for each matrix, the weighed
error at 4.5 bits a weight (entropy of the codes, plus an fp16 scale a row) with equal steps for all rows and with the
steps of a formula, as multiples of that with the scales that `search_rows` finds: above 1 the search is better. Errors
are weighed by the rows' costs, as in the plan."""

from __future__ import annotations

import argparse
import io
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from tools import t

TARGET_BITS = 4.5


def formula_rows(weight: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """Factors of the step by the formula that the search replaced, its powers tuned on the proxies."""
    size = weight.square().mean(dim=1).sqrt()
    wanted = size.mean() ** 0.7 * size**0.3 * (cost / cost.mean().clamp(min=1e-30) + 0.03) ** -0.35
    return (wanted / weight.square().mean().sqrt()).clamp(min=0.01)


def error_at(weight: torch.Tensor, cost: torch.Tensor, rows: torch.Tensor | None) -> float:
    """Weighed error at TARGET_BITS a weight, between the steps of the menu on either side."""
    sizes, errors = list[float](), list[float]()
    for step in t.STEPS:
        codes, scale = t.quantize_per_row(weight, t.QuantSpec(8, step, rows))
        sizes.append(8 * (t.order0_bytes(codes) + 2 * len(codes)) / weight.numel())
        errors.append(float(((t.dequantize_per_row(codes, scale) - weight).square().sum(dim=1) * cost).sum().log()))
    return math.exp(np.interp(TARGET_BITS, sizes, errors))


def container(trained: dict[str, Any]) -> str:
    """Sizes of one state in several containers, in Markdown."""
    weights = trained["weights"]
    plan = t.allocate(t.rate_table(weights, trained["costs"], {}), 0.57 * sum(w.numel() for w in weights.values()))
    cfg = t.Config(**trained["config"])
    stored = t.quantize_state(weights, plan, cfg, lambda line: None, {})
    size = len(t.encode_artifact(stored, plan, cfg, "f" * 64))
    pickle = io.BytesIO()
    torch.save(stored, pickle)
    compressor = zstandard.ZstdCompressor(level=22)
    streams = defaultdict[int, list[torch.Tensor]](list)
    rest, scales = 0, list[torch.Tensor]()
    for name, (codes, *scale) in stored.items():
        rest += 2 * (scale[0].numel() if scale else codes.numel())
        scales += scale
        if scale:
            streams[max(4, plan[name].bits)].append(codes.flatten())
    raw = torch.cat(scales).numpy().tobytes()
    rows = [("artifact", size), ("torch.save, zstd-22", len(compressor.compress(pickle.getvalue()))),
            ("entropy by stream, the rest raw", sum(t.order0_bytes(torch.cat(s)) for s in streams.values()) + rest),
            ("entropy by matrix, the rest raw", sum(t.order0_bytes(c) for s in streams.values() for c in s) + rest)]
    lines = [f"| {name} | {n:.0f} | {100 * (size / n - 1):+.1f}% |" for name, n in rows]
    bits = 8 * len(compressor.compress(raw)) / (len(raw) / 2)
    return "\n".join(["| container | bytes | artifact against it |", "|---|---|---|", *lines,
                      "", f"Scales by themselves: {bits:.1f} bits a row after zstd-22, 16 before.", ""])  # fmt: skip


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    trained = t.load_tensors(parser.parse_args().weights, "weights", "costs", "config")
    print(container(trained))
    print("| matrix | error with equal steps | with the formula |\n|---|---|---|")
    found = list[list[float]]()
    for name, cost in trained["costs"].items():
        weight = trained["weights"][name].float()
        cost = cost + t.LEAST_COST * cost.mean().clamp(min=1e-30)
        searched = error_at(weight, cost, t.search_rows(weight, cost))
        found.append([error_at(weight, cost, rows) / searched for rows in (None, formula_rows(weight, cost))])
        print(f"| {name} | {found[-1][0]:.3f} | {found[-1][1]:.3f} |", flush=True)
    equal, formula = np.exp(np.log(found).mean(axis=0))
    print(f"| mean of {len(found)} | {equal:.3f} | {formula:.3f} |")


if __name__ == "__main__":
    main()
