"""Exports of the same trained weights by two versions of the script, and their table.

    git show e735e01:train_gpt.py > /tmp/old.py
    python tests/exports.py --old /tmp/old.py --data DIR --tokenizer FILE WEIGHTS...

WEIGHTS are files that e735e01 left (`logs/RUN_ID.weights`). Each is exported at several sizes of the model, given in
bits per weight: by the old script with and without error feedback, and, after `converted`, by today's. Scored in plain
windows, since only differences matter. A finished export is a line of the results file, so the script continues where
it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tools import t as train_gpt
from tools import write_shard

ROOT = Path(__file__).resolve().parent.parent
COMMON = {"EVAL_STRIDE": "0", "EVAL_BATCH_SEQS": "16", "RUN_ID": "out", "COMPILE": "0"}
KINDS = {"old": {"ERROR_FEEDBACK": "1"}, "old, to nearest": {"ERROR_FEEDBACK": "0"}, "new": {}}


def converted(old: dict[str, Any], tokenizer_sha256: str) -> dict[str, Any]:
    """The same in today's form. A grid of e735e01 has a step in units of the matrix's root mean square, and factors for
    the rows; today's has the product."""
    grids = {}
    for name, (bits, step, rows) in old["grids"].items():
        size = step * old["weights"][name].double().square().mean().sqrt()
        grids[name] = (bits, (size * rows).float() if step else None)
    config = {name: value for name, value in old["config"].items() if hasattr(train_gpt.Config, name)}
    config["mlp_bits"] = 0  # under rate control its 4 meant nothing; another value than the export's drops the grids
    return {
        "config": config,
        "data": {"tokenizer_sha256": tokenizer_sha256},
        "weights": old["weights"],
        "grids": grids,
        "costs": old["costs"],
    }


def one_export(kind: str, weights: Path, bits: float, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Export and score in `folder`; the row of the table."""
    script = args.old if kind.startswith("old") else ROOT / "train_gpt.py"
    shutil.copy(script, folder / "train_gpt.py")
    old = train_gpt.load_tensors(weights, "weights", "costs", "grids", "config")
    params = sum(weight.numel() for weight in old["weights"].values())
    source = weights.resolve()
    if kind == "new":
        sha256 = train_gpt.hashlib.sha256(args.tokenizer.read_bytes()).hexdigest()
        source = folder / "converted.weights"
        train_gpt.save_tensors(source, converted(old, sha256))
    own_bits = 8 * (old["config"]["artifact_limit_bytes"] - args.old.stat().st_size) / params
    budget = round(params * (bits or own_bits) / 8)
    limit = script.stat().st_size + budget
    environment = {**os.environ, **COMMON, **KINDS[kind], "ARTIFACT_LIMIT_BYTES": str(limit)}
    environment |= {"DATA_PATH": str(args.val), "TOKENIZER_PATH": str(args.tokenizer.resolve())}
    environment |= {"EXPORT_FROM": str(source)}
    if kind == "new":  # the limit that the run trained its grids for, in today's bytes of code
        trained = train_gpt.load_tensors(source)
        trained["config"]["artifact_limit_bytes"] = script.stat().st_size + round(params * own_bits / 8)
        train_gpt.save_tensors(source, trained)
    command = [sys.executable, "train_gpt.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{kind} {weights}: {done.stdout[-500:]} {done.stderr[-2000:]}")
    size = [int(n) for n in re.findall(r"model_bytes:(\d+)", done.stdout)][-1]
    score = re.findall(r"^final_int8_zlib_roundtrip_exact .*val_bpb:(\S+)", done.stdout, re.M)
    rounds = len(re.findall(r"^artifact round:", done.stdout, re.M))
    return {"weights": f"{weights.parent.name}/{weights.stem}", "bits": bits, "own_bits": own_bits, "kind": kind,
            "bpb": float(score[-1]), "filled": size / budget, "rounds": rounds}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Old, old to nearest, new and the differences, in Markdown."""
    found = {(row["weights"], row["bits"], row["kind"]): row for row in rows}
    out = ["| weights | bits a weight | old | old, to nearest | new | new - old | nearest - old | filled | rounds |"]
    out.append("|---" * 9 + "|")
    for weights, bits in dict.fromkeys((row["weights"], row["bits"]) for row in rows):
        each = [found.get((weights, bits, kind)) for kind in KINDS]
        if None in each:
            continue
        old, nearest, new = (row["bpb"] for row in each)
        shown = f"{bits:g}" if bits else f"{each[0]['own_bits']:.2f}, its own"
        out.append(
            f"| {weights} | {shown} | {old:.4f} | {nearest:.4f} | {new:.4f} | {new - old:+.4f} | {nearest - old:+.4f} "
            f"| {each[2]['filled']:.2%} | {each[2]['rounds']} |"
        )
    return "\n".join(out)


def main() -> None:
    """Export what is missing, then print the table; without weights, only print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="*", type=Path)
    parser.add_argument("--old", type=Path, required=True, help="train_gpt.py of e735e01")
    parser.add_argument("--data", type=Path, help="folder of shards")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--bits", default="0,3.4,4.6", help="bits per weight; 0 stands for the run's own limit")
    parser.add_argument("--val-tokens", type=int, default=131073)
    parser.add_argument("--results", type=Path, default=ROOT / "logs" / "exports.jsonl")
    args = parser.parse_args()
    args.old = args.old.resolve()
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.is_file() else []
    done = {(row["weights"], row["bits"], row["kind"]) for row in rows}
    if not args.weights:
        print(table(rows))
        return
    with tempfile.TemporaryDirectory() as name:
        args.val = Path(name, "data")
        args.val.mkdir()
        shard = min(args.data.glob("fineweb_val_*.bin"))
        write_shard(args.val / shard.name, np.fromfile(shard, "<u2", args.val_tokens, offset=1024))
        for weights in args.weights:
            for bits in map(float, args.bits.split(",")):
                for kind in KINDS:
                    if (f"{weights.parent.name}/{weights.stem}", bits, kind) in done:
                        continue
                    with tempfile.TemporaryDirectory() as folder:
                        row = one_export(kind, weights, bits, args, Path(folder))
                    rows.append(row)
                    with args.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
