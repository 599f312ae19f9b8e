"""Paired runs of recipes on the proxies, and their table: `python tests/ablate.py --data DIR --tokenizer FILE`.

Each run is `train_gpt.py` as a user would start it, on one thread, in a scratch folder. A finished run is one line of
the results file (logs/ablations.jsonl), so the script goes on where it was stopped; `--table` only prints the table.
The default recipe gets the script's bytes plus 0.572 bytes per parameter, the ratio of the full-size budget; pr314 gets
as many as it needs. `noqat` is the default recipe in float, without QAT: the reference of the quantization gap."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMON = {
    "MAX_WALLCLOCK_SECONDS": 0, "WARMUP_STEPS": 0, "TRAIN_SEQ_LEN": 256, "TRAIN_BATCH_TOKENS": 8192, "NUM_LAYERS": 11,
    "MUON_MOMENTUM_WARMUP_STEPS": 300, "SWA_EVERY": 20, "BIGRAM_DIM": 64, "VAL_LOSS_EVERY": 0, "EVAL_FLOAT": 1,
    "COMPILE": 1,
}  # fmt: skip
PROXIES: dict[str, dict[str, Any]] = {
    "small": {"MODEL_DIM": 128, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "ITERATIONS": 1000, "WARMDOWN_ITERS": 400},
    "long": {"MODEL_DIM": 64, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "BIGRAM_VOCAB_SIZE": 2048, "ITERATIONS": 3000,
             "WARMDOWN_ITERS": 1200},
    "large": {"MODEL_DIM": 256, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "ITERATIONS": 500, "WARMDOWN_ITERS": 200},
    "screen": {"MODEL_DIM": 128, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "ITERATIONS": 400, "WARMDOWN_ITERS": 160,
               "EVAL_STRIDE": 0},
}  # fmt: skip
PARAMETERS = {"small": 2423063, "long": 609431, "large": 7434797, "screen": 2423063}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "pr314": {"RECIPE": "pr314"},
    "noqat": {"QAT_START_FRAC": 1, "SWA_ENABLED": 0},
    "qat_0.9": {"QAT_START_FRAC": 0.9},
    "qat_0.5": {"QAT_START_FRAC": 0.5},
    "qat_0": {"QAT_START_FRAC": 0},
    "nearest": {"ERROR_FEEDBACK": 0},
    "relu": {"RELU_SLOPE": 0},
    "no_xsa": {"XSA_LAYERS": 0},
    "no_muon_eq": {"MUON_EQ": 0},
    "momentum_kept": {"MUON_MOMENTUM_END": 0.99},
    "gain_4": {"QK_GAIN_INIT": 4},
}  # fmt: skip
PAIR = ("default", "pr314")
ORDER = [(r, "small", 42) for r in (*PAIR, "noqat")] + [(r, "small", s) for s in (43, 44) for r in (*PAIR, "noqat")]
ORDER += [(r, p, s) for s in (42, 43) for p in ("long", "large") for r in PAIR]
ORDER += [("noqat", "long", 42), ("noqat", "long", 43)] + [(r, "screen", 42) for r in RECIPES]
KEYS = r"(\w+):([-+.,\w]+)"


def short_split(source: Path, folder: Path, tokens: int) -> None:
    """A data folder with links to the training shards and the first `tokens` of the first validation shard."""
    folder.mkdir()
    for shard in source.resolve().glob("fineweb_train_*.bin"):
        (folder / shard.name).symlink_to(shard)
    shard = min(source.glob("fineweb_val_*.bin"))
    content = bytearray(shard.read_bytes()[: 1024 + 2 * tokens])
    content[8:12] = ((len(content) - 1024) // 2).to_bytes(4, "little")
    (folder / shard.name).write_bytes(content)


def one_run(recipe: str, proxy: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run the script and read the figures from its console output."""
    limit = args.script.stat().st_size + round(0.572 * PARAMETERS[proxy])
    settings = COMMON | PROXIES[proxy] | {"ARTIFACT_LIMIT_BYTES": limit} | RECIPES[recipe]
    if recipe == "pr314":
        settings["ARTIFACT_LIMIT_BYTES"] = 16_000_000
    settings |= {"SEED": seed, "DATA_PATH": "data", "TOKENIZER_PATH": Path(args.tokenizer).resolve(), "RUN_ID": "run"}
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in settings.items()}}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(args.script, folder)
        short_split(Path(args.data), Path(folder, "data"), args.val_tokens)
        done = subprocess.run(
            [sys.executable, args.script.name], cwd=folder, env=env, capture_output=True, text=True, check=False
        )
    if done.returncode:
        tail = done.stdout[-800:] + done.stderr[-800:]
        raise RuntimeError(f"{recipe} {proxy} {seed}: exit code {done.returncode}\n{tail}")
    lines = done.stdout.splitlines()

    def last(start: str) -> dict[str, str]:
        """The pairs of the last line that starts so."""
        return dict(re.findall(KEYS, [line for line in lines if line.startswith(start)][-1]))

    steps = [dict(re.findall(KEYS, line)) for line in lines if re.match(r"step:\d+/\d+ train_loss", line)]
    total = float(steps[-1]["train_time"][:-2]) - float(steps[5]["train_time"][:-2])  # steps 1 to 5, then every 100th
    artifact = last("artifact bits:")
    return {
        "recipe": recipe, "proxy": proxy, "seed": seed, "params": int(last("model params")["params"]),
        "final_bpb": float(last("final_sliding")["val_bpb"]), "float_bpb": float(last("float_sliding")["val_bpb"]),
        "model_bytes": int(artifact["model_bytes"]), "bits": artifact["bits"],
        "step_ms": total / (PROXIES[proxy]["ITERATIONS"] - 100),
        "weights": last("export weights")["weights"], "rounding": last("export weights")["rounding"],
        "settings": {k: v for k, v in settings.items() if "PATH" not in k},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Mean, deviation and the paired difference from pr314 per proxy and recipe, in Markdown."""
    found = {(r["recipe"], r["proxy"], r["seed"]): r for r in rows}
    out = [
        "| proxy | recipe | seeds | final bpb | std | against pr314 (same seeds) | gap to noqat float | model bytes "
        "| ms a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for proxy in PROXIES:
        for recipe in RECIPES:
            runs = [r for (a, b, _), r in sorted(found.items()) if (a, b) == (recipe, proxy)]
            if not runs:
                continue
            bpb = [r["final_bpb"] for r in runs]
            pairs = [r["final_bpb"] - found["pr314", proxy, r["seed"]]["final_bpb"] for r in runs
                     if ("pr314", proxy, r["seed"]) in found]  # fmt: skip
            gaps = [r["final_bpb"] - found["noqat", proxy, r["seed"]]["float_bpb"] for r in runs
                    if ("noqat", proxy, r["seed"]) in found]  # fmt: skip
            cells = [proxy, recipe, ", ".join(str(r["seed"]) for r in runs), f"{mean(bpb):.4f}",
                     f"{stdev(bpb):.4f}" if len(bpb) > 1 else "", f"{mean(pairs):+.4f}" if pairs else "",
                     f"{mean(gaps):+.4f}" if gaps else "", f"{mean(r['model_bytes'] for r in runs):.0f}",
                     f"{mean(r['step_ms'] for r in runs):.0f}"]  # fmt: skip
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> int:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of shards")
    parser.add_argument("--tokenizer")
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py")
    parser.add_argument("--results", type=Path, default=ROOT / "logs" / "ablations.jsonl")
    parser.add_argument("--val-tokens", type=int, default=131073, help="how much of the validation split is scored")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    lines = args.results.read_text().splitlines() if args.results.is_file() else []
    rows = [json.loads(line) for line in lines]
    done = {(r["recipe"], r["proxy"], r["seed"]) for r in rows}

    def job(key: tuple[str, str, int]) -> None:
        """One run, kept at once."""
        try:
            row = one_run(*key, args)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            return
        rows.append(row)
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*key, row["final_bpb"], flush=True)

    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(job, [key for key in ORDER if key not in done]))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
