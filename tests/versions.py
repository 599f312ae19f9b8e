"""Runs of the first edition (e735e01) beside today's, at the same settings, seeds and bytes of model, and their table.

    git show e735e01:train_gpt.py > /tmp/old.py
    python tests/versions.py --old /tmp/old.py --corpus DIR --data DIR --tokenizer FILE

The first edition reads in file order. `demo` has the demo's sizes, on the corpus in DIR (`logs/cache/corpus-...`);
`small` and `long` are the proxies of tests/ablate.py at MLP_MULT=4 and 3.8 bits a weight, with shorter runs, scored in
plain windows. A finished run is a line of the results file, so the script continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import ablate
from tools import t as train_gpt

ROOT = Path(__file__).resolve().parent.parent
DEMO = dict(word.split("=") for word in train_gpt.DEMO.split()) | {"ITERATIONS": 320, "WARMDOWN_ITERS": 200}
SHORT = {"TRAIN_BATCH_TOKENS": 4096, "MLP_MULT": 4, "EVAL_FLOAT": 0, "EVAL_STRIDE": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "demo": DEMO,
    "small": {**ablate.COMMON, **ablate.PROXIES["small"], **SHORT, "ITERATIONS": 400, "WARMDOWN_ITERS": 160}
    | {"MUON_MOMENTUM_WARMUP_STEPS": 120, "SWA_EVERY": 8},
    "long": {**ablate.COMMON, **ablate.PROXIES["long"], **SHORT, "ITERATIONS": 1000, "WARMDOWN_ITERS": 400}
    | {"SWA_EVERY": 10},
}
MODEL_BYTES = {"demo": 1_012_909, "small": 1_322_177, "long": 332_293}
VAL_TOKENS = 65537  # of FineWeb; the demo's corpus is scored whole
VERSIONS = {"old": {}, "file": {"SEQUENCE_ORDER": "file"}, "spread": {}}
KEYS = [("demo", version, seed) for seed in (42, 43, 44) for version in ("old", "file")]
KEYS += [(proxy, version, seed) for proxy in ("small", "long") for seed in (42, 43) for version in VERSIONS]


def one_run(proxy: str, version: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a run, on one thread; its weights stay in `args.keep`, if given."""
    script = (args.old if version == "old" else ROOT / "train_gpt.py").read_text(encoding="utf-8")
    settings = SETTINGS[proxy] | VERSIONS[version] | {"SEED": seed, "RUN_ID": "run", "DATA_PATH": "data"}
    settings["ARTIFACT_LIMIT_BYTES"] = len(script.encode()) + MODEL_BYTES[proxy]
    settings["TOKENIZER_PATH"] = (args.corpus / "tokenizer.model" if proxy == "demo" else args.tokenizer).resolve()
    data = argparse.Namespace(data=args.corpus if proxy == "demo" else args.data, val_tokens=VAL_TOKENS)
    with tempfile.TemporaryDirectory() as name:
        lines = ablate.start(script, Path(name), settings, data)
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            shutil.move(f"{name}/logs/run.weights", args.keep / f"{proxy}-{version}-{seed}.weights")
    return row(proxy, version, seed, lines)


def row(proxy: str, version: str, seed: int, lines: list[str]) -> dict[str, Any]:
    """The figures of a run from its console output."""
    return {
        "proxy": proxy, "version": version, "seed": seed,
        "bpb": float(ablate.pairs(lines, "final_sliding stride")["val_bpb"]),
        "model_bytes": int(ablate.pairs([line for line in lines if "model_bytes" in line], "artifact")["model_bytes"]),
        "weights": ablate.pairs(lines, "export weights")["weights"],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """bpb per seed and in the mean, and how much the mean differs from the first edition's with the same seeds."""
    found = {(r["proxy"], r["version"], r["seed"]): r["bpb"] for r in rows}
    out = ["| proxy | version | seeds | bpb | mean | against old |", "|---|---|---|---|---|---|"]
    for proxy in SETTINGS:
        for version in VERSIONS:
            seeds = sorted(seed for p, v, seed in found if (p, v) == (proxy, version))
            if not seeds:
                continue
            bpb = [found[proxy, version, seed] for seed in seeds]
            paired = [found[proxy, version, s] - found[proxy, "old", s] for s in seeds if (proxy, "old", s) in found]
            against = f"{mean(paired):+.4f}" if paired and version != "old" else ""
            shown = ", ".join(f"{value:.4f}" for value in bpb)
            out.append(
                f"| {proxy} | {version} | {', '.join(map(str, seeds))} | {shown} | {mean(bpb):.4f} | {against} |"
            )
    return "\n".join(out)


def main() -> None:
    """Run what is missing and what the given data allow, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="train_gpt.py of e735e01; without it only the table is printed")
    parser.add_argument("--corpus", type=Path, help="folder of a built corpus: run the demo")
    parser.add_argument("--data", type=Path, help="folder of FineWeb shards: run small and long")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the weights, for tests/exports.py")
    parser.add_argument("--results", type=Path, default=ROOT / "logs" / "versions.jsonl")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.is_file() else []
    done = {(r["proxy"], r["version"], r["seed"]) for r in rows}

    def job(key: tuple[str, str, int]) -> None:
        """One run, kept at once."""
        try:
            rows.append(one_run(*key, args))
        except RuntimeError as error:
            print(*key, error, file=sys.stderr, flush=True)
            return
        with args.results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")

    if args.old:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(job, [k for k in KEYS if k not in done and (args.corpus if k[0] == "demo" else args.data)]))
    print(table(rows))


if __name__ == "__main__":
    main()
