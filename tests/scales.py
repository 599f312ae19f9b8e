"""How good are container and scales of a trained run? `python tests/scales.py logs/RUN.weights` prints two tables.

The first quantizes all matrices at 0.57 bytes per parameter and compares the artifact with torch.save and zstd-22 of
the same codes, and with what ideal order-0 coders would make of the codes. The second asks whether a search per row
would beat the formula of `row_scale`. For each matrix: the grid of the formula nearest to 4.5 bits a weight, against
scales that are searched row by row for the least error + price * bits (17 candidates a row, four rounds in which the
code table follows the choice). Errors are weighed by the rows' costs, as in the plan; the search's error is brought to
the formula's number of bytes along the slope of the rate table. Below 1 the search is better."""

from __future__ import annotations

import argparse
import io
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import zstandard
from tools import t

TARGET_BITS, ROUNDS = 4.5, 4


def search(weight: torch.Tensor, cost: torch.Tensor, step: float, price: float) -> tuple[float, float]:
    """(bytes, weighed error) with the scales that a search per row finds; `price`: error that a bit may save."""
    base = step * weight.square().mean().sqrt()
    widest = weight.abs().amax(dim=1) / 127
    codes, errors = [], []
    for power in range(-8, 9):
        scale = torch.maximum(base * 2.0 ** (power / 4), widest).half().float()
        codes.append(t.round_to_grid(weight, scale, t.QuantSpec(8)).long() + 128)
        errors.append((weight - (codes[-1] - 128) * scale.unsqueeze(1)).square().sum(dim=1) * cost)
    stacked, error, rows = torch.stack(codes), torch.stack(errors), torch.arange(len(weight))
    pick = torch.full((len(weight),), 8)
    for _ in range(ROUNDS):
        counts = torch.bincount(stacked[pick, rows].flatten(), minlength=256) + 0.02
        bits = -(counts / counts.sum()).log2()
        pick = (error + price * bits[stacked].sum(dim=2)).argmin(dim=0)
    return t.order0_bytes(stacked[pick, rows] - 128) + 2 * len(weight), float(error[pick, rows].sum())


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
    print("| matrix | bits | error of the search / of the formula |\n|---|---|---|")
    ratios = list[float]()
    for name, cost in trained["costs"].items():
        weight = trained["weights"][name].float()
        points = [p for p in t.rate_table({name: weight}, {name: cost}, {})[name] if p[2] is not None]
        at = min(range(1, len(points) - 1), key=lambda i: abs(8 * points[i][0] / weight.numel() - TARGET_BITS))
        (less, worse, _), (size, formula, grid), (more, better, _) = points[at - 1 : at + 2]
        found = list[float]()
        for factor in (0.7, 0.85, 1.0, 1.2):  # of the price, so that one of them comes out near the formula's bytes
            got, error = search(weight, cost, grid.step, factor * (worse - better) / (8 * (more - less)))
            found.append(error * math.exp(math.log(worse / better) / (more - less) * (got - size)))
        ratios.append(min(found) / formula)
        print(f"| {name} | {8 * size / weight.numel():.2f} | {ratios[-1]:.3f} |", flush=True)
    print(f"| mean of {len(ratios)} | | {sum(ratios) / len(ratios):.3f} |")


if __name__ == "__main__":
    main()
