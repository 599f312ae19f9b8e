"""Variants of the export on one run's weights, and what each kind of matrix loses (tables in logs/ABLATIONS.md).

    python tests/variants.py exponents WEIGHTS --data DIR --tokenizer FILE --bits 3.2,4
    python tests/variants.py kinds WEIGHTS --data DIR --tokenizer FILE --bits 3.8
    python tests/variants.py zstd WEIGHTS --bits 3.4

`exponents`: of the cost; `kinds`: rounding one kind of matrix alone, on the grids that the MLP trained on, if it did;
`zstd`: settings. WEIGHTS is a file that today's script or e735e01 left (`logs/RUN_ID.weights`).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
import zstandard
from tools import load_weights, runtime, t

ENTROPY_TO_FILE = 1.02  # what level 22 made of the entropy when the exponents were compared
EXPONENTS = (  # within a matrix, between matrices, share of the matrix's mean that is added to the cost of a row
    (0.5, 0.5, 1.0), (0.35, 0.5, 1.0), (0.35, 0.35, 1.0), (0.25, 0.5, 1.0), (0.5, 0.4, 1.0), (0.5, 0.5, 0.3),
)  # fmt: skip
NO_MATCHES = {"search_log": 1, "chain_log": 6, "hash_log": 6}
ZSTD: tuple[dict[str, int], ...] = (
    {"window_log": 14},
    {"window_log": 14, **NO_MATCHES},
    {"window_log": 15, **NO_MATCHES},
    {"window_log": 17, **NO_MATCHES},
)
AIMS = (0.975, 0.9786, 0.98, 0.985, 0.99)  # entropy over the limit


def config_of(trained: dict[str, Any], **changes: Any) -> t.Config:
    """The run's config, as far as today's script knows it, with free bits."""
    fields = {f.name for f in dataclasses.fields(t.Config)} - {"mlp_bits", "attn_bits", "bigram_bits"}
    return t.Config(**({k: v for k, v in trained["config"].items() if k in fields} | {"mlp_bits": 8} | changes))


def scored_on(trained: dict[str, Any], args: argparse.Namespace) -> tuple[t.Config, t.Data]:
    """The run's config and `args.targets` of the given data."""
    changes = {"data_path": args.data, "tokenizer_path": args.tokenizer, "demo": False, "export_from": "x"}
    cfg = config_of(trained, **changes)
    data = t.Data(cfg, runtime())
    data.num_val_targets = min(data.num_val_targets, args.targets // cfg.train_seq_len * cfg.train_seq_len)
    return cfg, data


def bpb_of(weights: t.Tensors, cfg: t.Config, data: t.Data) -> float:
    """Score in plain windows."""
    model = t.GPT(cfg, torch.float32)
    load_weights(model, weights, {})
    return t.evaluate(model, data, runtime(), cfg.train_seq_len, 16)[1]


def kinds(trained: dict[str, Any], bits: float, args: argparse.Namespace) -> None:
    """Print what rounding each kind of matrix alone costs, and all together, at `bits` a weight."""
    cfg, data = scored_on(trained, args)
    weights = trained["weights"]
    kept = {name: t.Grid(*grid) for name, grid in trained["grids"].items()}
    budget = bits / 8 * sum(w.numel() for w in weights.values())
    stored = t.quantize(weights, t.grids_for_bytes(weights, trained["costs"], kept, cfg, budget), cfg)
    before = bpb_of(weights, cfg, data)
    print(f"bits:{bits} float val_bpb:{before:.5f}", flush=True)
    for some in (("mlp",), ("attn",), ("bigram",), ("embed",), ("mlp", "attn", "bigram", "embed")):
        rounded = {name: tensor.dequantize() for name, tensor in stored.items() if t.category(name) in some}
        print(f"bits:{bits} rounded:{','.join(some)} {bpb_of(weights | rounded, cfg, data) - before:+.5f}", flush=True)


def exponents(trained: dict[str, Any], bits: float, args: argparse.Namespace) -> None:
    """Print the score of each variant at the same predicted bytes."""
    cfg, data = scored_on(trained, args)
    weights, costs = trained["weights"], trained["costs"]
    budget = sum(w.numel() for w in weights.values()) * bits / 8 / ENTROPY_TO_FILE
    model_mean = torch.stack([cost.mean() for cost in costs.values()]).mean()

    def plan_of(size: float, within: float, between: float, share: float) -> t.Plan:
        """The plan of `grids_for_bytes` with other exponents, its scales not rounded up."""
        plan = {}
        for name, cost in costs.items():
            matrix = (cost.mean() / model_mean).clamp(min=t.LEAST_COST)
            rows = (cost + share * cost.mean()) / cost.mean().clamp(min=1e-30)
            step = size * matrix.pow(-between) * rows.pow(-within)
            plan[name] = t.Grid(8, torch.maximum(t.finest_scales(weights[name], 8), step))
        return plan

    for variant in EXPONENTS:
        fine, coarse = t.FINEST, t.COARSEST
        for _ in range(t.BISECTIONS):
            middle = (fine + coarse) / 2
            if t.coded_bytes(weights, plan_of(2**middle, *variant), cfg) > budget:
                fine = middle
            else:
                coarse = middle
        stored = t.quantize(weights, plan_of(2**coarse, *variant), cfg)
        bpb = bpb_of({name: tensor.dequantize() for name, tensor in stored.items()}, cfg, data)
        print(f"bits:{bits} within, between, share:{variant} val_bpb:{bpb:.5f}", flush=True)


def zstd(trained: dict[str, Any], bits: float) -> None:
    """Print the size of the streams over the limit for each setting, at several budgets."""
    cfg = config_of(trained)
    weights = trained["weights"]
    limit = sum(w.numel() for w in weights.values()) * bits / 8
    for aim in AIMS:
        plan = t.grids_for_bytes(weights, trained["costs"], {}, cfg, aim * limit)
        stored = t.quantize(weights, plan, cfg)
        coded = [tensor for tensor in stored.values() if tensor.scale is not None]
        coded.sort(key=lambda tensor: tensor.values.float().std(correction=0).item())
        arrays: list[Any] = [tensor.values for tensor in coded] + [tensor.scale for tensor in coded]
        arrays += [tensor.values for tensor in stored.values() if tensor.scale is None]
        payload = b"".join(array.numpy().tobytes() for array in arrays)
        sizes = []
        for settings in ZSTD:
            params = zstandard.ZstdCompressionParameters.from_level(22, write_checksum=True, min_match=7, **settings)
            size = len(zstandard.ZstdCompressor(compression_params=params).compress(payload))
            sizes.append(f"{size / limit:.4f}")
        print(f"bits:{bits} entropy:{aim} sizes:{' '.join(sizes)}", flush=True)


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("exponents", "kinds", "zstd"))
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data", help="folder of shards")
    parser.add_argument("--tokenizer")
    parser.add_argument("--bits", default="3.4", help="bits per weight, separated by commas")
    parser.add_argument("--targets", type=int, default=131_072, help="scored at most")
    args = parser.parse_args()
    trained = t.load_tensors(args.weights, "weights", "costs", "config", "grids")
    for bits in map(float, args.bits.split(",")):
        if args.what == "zstd":
            zstd(trained, bits)
        else:
            {"exponents": exponents, "kinds": kinds}[args.what](trained, bits, args)


if __name__ == "__main__":
    main()
