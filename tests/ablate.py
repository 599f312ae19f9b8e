"""Paired runs of recipes on the proxies, and their table: `python tests/ablate.py --data DIR --tokenizer FILE`.

Each run is `train_gpt.py` as a user would start it, on one thread, in a scratch folder. A finished run is one line of
the results file (logs/ablations-2.jsonl), so the script goes on where it was stopped; `--table` only prints the table,
`--write` puts it into logs/ABLATIONS.md, `--only REGEX` runs what matches "recipe proxy seed", such as '^default long'.

Ideas that were not kept have no knob: `edits` makes them on a copy of the script. Changes of model and optimizer are
screened in short runs whose default has no value residual, which is one of the changes. The default gets the script's
bytes plus 0.572 bytes per parameter, the ratio of the full-size budget; on the large proxy 0.555, less than pr314
takes, which gets as many as it needs. `noqat` (last weights) and `noqat_swa` (averaged ones) never fake-quantize: the
better of their float scores is what the quantization gap of recipes with the same model is counted from. The rows of
logs/ablations.jsonl are of the first edition (commit e735e01 and before), which read its data in file order; today's go
into logs/ablations-2.jsonl."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from tools import write_shard

ROOT = Path(__file__).resolve().parent.parent
COMMON = {
    "MAX_WALLCLOCK_SECONDS": 0, "WARMUP_STEPS": 0, "TRAIN_SEQ_LEN": 256, "TRAIN_BATCH_TOKENS": 8192, "NUM_LAYERS": 11,
    "MUON_MOMENTUM_WARMUP_STEPS": 300, "SWA_EVERY": 20, "BIGRAM_DIM": 64, "VAL_LOSS_EVERY": 0, "EVAL_FLOAT": 1,
    "COMPILE": 1, "TRAIN_LOG_EVERY": 10,
}  # fmt: skip
PROXIES: dict[str, dict[str, Any]] = {
    "small": {"MODEL_DIM": 128, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "ITERATIONS": 1000, "WARMDOWN_ITERS": 400},
    "long": {"MODEL_DIM": 64, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "BIGRAM_VOCAB_SIZE": 2048, "ITERATIONS": 3000,
             "WARMDOWN_ITERS": 1200},
    "large": {"MODEL_DIM": 256, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "ITERATIONS": 500, "WARMDOWN_ITERS": 200},
    "screen": {"MODEL_DIM": 128, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "ITERATIONS": 200, "WARMDOWN_ITERS": 80,
               "EVAL_STRIDE": 0, "VALUE_RESIDUAL": 0},
}  # fmt: skip
MODEL_BYTES = {"small": 1385992, "long": 348595, "large": 4126312, "screen": 1385992}  # of the default
Edits = list[tuple[str, str]]  # (text that occurs in the script, what stands there instead)


class Recipe(NamedTuple):
    """What a row differs in from the default: settings, edits of the script."""

    settings: dict[str, Any]
    edits: Edits = []


EMA_OF = "torch.optim.swa_utils.get_ema_multi_avg_fn(0.98)"
EMA = [
    ("AveragedModel(model)", f"AveragedModel(model, multi_avg_fn={EMA_OF})"),
    ("and self.step % cfg.swa_every == 0", ""),
]
KEEP_AVERAGE = [("        self.swa.n_averaged.zero_()  # starts", "        # starts")]
Q_GAIN = "self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))"
ATTENTION_GATE = [  # per head, from 12 channels of the layer's input
    (Q_GAIN, Q_GAIN + "\n        self.gate = nn.Parameter(torch.zeros(cfg.num_heads, 12))"),
    (
        "        return self.out_proj(out.reshape(x.shape)), v",
        "        gate = 2 * torch.sigmoid(F.linear(x[..., :12], self.gate.to(x.dtype))).unsqueeze(-1)\n"
        "        out = out.reshape(*x.shape[:2], -1, self.head_dim) * gate\n"
        "        return self.out_proj(out.reshape(x.shape)), v",
    ),
]
PARTIAL_ROPE = [  # a quarter of the head's dimensions
    ("    a, b = x.chunk(2, dim=-1)\n", "    n = 2 * rotary.size(-1)\n    a, b = x[..., :n].chunk(2, dim=-1)\n"),
    ("b * cos - a * sin), dim=-1)", "b * cos - a * sin, x[..., n:]), dim=-1)"),
    ("        frequencies = cfg", "        head_dim = head_dim // 4\n        frequencies = cfg"),
]
DEPTH_NORM = [
    (
        "        self.attn = CausalSelfAttention",
        "        self.depth = (index + 1) ** -0.5\n        self.attn = CausalSelfAttention",
    ),
    ("self.attn(norm(x), rotary", "self.attn(norm(x) * self.depth, rotary"),
    ("self.mlp(norm(x))", "self.mlp(norm(x) * self.depth)"),
]
DOCUMENT_STARTS = [  # bigram and smear do not look across a bos token (id 1 in the challenge's tokenizer)
    (
        "        return F.pad(pairs % (self.buckets - 1)",
        "        starts = ids[:, 1:] == 1\n"
        "        pairs = (pairs % (self.buckets - 1)).masked_fill(starts, self.buckets - 1)\n"
        "        return F.pad(pairs",
    ),
    (
        "gate = torch.sigmoid(self.smear_gate).to(x.dtype)\n",
        "gate = torch.sigmoid(self.smear_gate).to(x.dtype) * (input_ids != 1).unsqueeze(-1).to(x.dtype)\n",
    ),
]
RECIPES: dict[str, Recipe] = {
    "default": Recipe({}),
    "file_order": Recipe({"SEQUENCE_ORDER": "file"}),
    "pr314": Recipe({"RECIPE": "pr314"}),
    "pr314_spread": Recipe({"RECIPE": "pr314", "SEQUENCE_ORDER": "spread"}),
    "noqat": Recipe({"QAT_START_FRAC": 1, "SWA_ENABLED": 0}),
    "noqat_swa": Recipe({"QAT_START_FRAC": 1, "SWA_ALWAYS": 1}),
    "qat_0.95": Recipe({"QAT_START_FRAC": 0.95}),
    "qat_growing": Recipe({}),
    "average_never": Recipe({"SWA_ENABLED": 0}),
    "average_always": Recipe({"SWA_ALWAYS": 1}),
    "average_kept": Recipe({"SWA_ALWAYS": 1}, KEEP_AVERAGE),
    "average_quantized": Recipe({"SWA_ALWAYS": 1}),
    "ema": Recipe({"SWA_ALWAYS": 1}, EMA),
    "nearest": Recipe({}),
    "qat_0.8": Recipe({"QAT_START_FRAC": 0.8}),
    "qat_0.7": Recipe({"QAT_START_FRAC": 0.7}),
    "qat_0.5": Recipe({"QAT_START_FRAC": 0.5}),
    "qat_0": Recipe({"QAT_START_FRAC": 0}),
    "relu": Recipe({"RELU_SLOPE": 0}),
    "no_xsa": Recipe({"XSA_LAYERS": 0}),
    "no_muon_eq": Recipe({"MUON_EQ": 0}),
    "momentum_kept": Recipe({"MUON_MOMENTUM_END": 0.99}),
    "gain_4": Recipe({"QK_GAIN_INIT": 4}),
    "value_residual": Recipe({"VALUE_RESIDUAL": 1}),
    "no_value_residual": Recipe({"VALUE_RESIDUAL": 0}),
    "attention_gate": Recipe({}, ATTENTION_GATE),
    "partial_rope": Recipe({}, PARTIAL_ROPE),
    "depth_norm": Recipe({}, DEPTH_NORM),
    "document_starts": Recipe({}, DOCUMENT_STARTS),
}  # fmt: skip
FIRST_EDITION_ONLY = ("qat_growing", "average_quantized", "nearest")  # rows whose edits have nothing to edit any more
SAME_MODEL = RECIPES.keys() - {"qat_0.8", "qat_0.7", "qat_0.5", "qat_0", "file_order",
    "pr314", "pr314_spread", "relu", "no_xsa", "value_residual", "no_value_residual",
                               "attention_gate", "partial_rope", "depth_norm", "document_starts"}  # fmt: skip
MAIN = ("default", "file_order", "pr314", "pr314_spread")
ORDER = [(r, p, s) for s in (42, 43) for r in MAIN for p in ("small", "long")]
ORDER += [(r, "large", 42) for r in MAIN]
ORDER += [(r, "screen", 42) for r in RECIPES if r not in FIRST_EDITION_ONLY]
ORDER.remove(("no_value_residual", "screen", 42))  # the screen's default
KEYS = r"(\w+):([-+.,\w]+)"


def short_split(args: argparse.Namespace, folder: Path) -> None:
    """A data folder: links to the training shards, and the first tokens of the validation split."""
    folder.mkdir()
    for shard in sorted(Path(args.data).resolve().glob("fineweb_train_*.bin")):
        (folder / shard.name).symlink_to(shard)
    first = min(Path(args.data).glob("fineweb_val_*.bin"))
    write_shard(folder / first.name, np.fromfile(first, "<u2", args.val_tokens, offset=1024))


def start(script: str, folder: Path, settings: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Run `script` in `folder`; returns its console lines."""
    Path(folder, "train_gpt.py").write_text(script)
    short_split(args, Path(folder, "data"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in settings.items()}}
    command = [sys.executable, "train_gpt.py"]
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    if done.returncode != 0:
        raise RuntimeError("\n".join([f"exit code {done.returncode}", *lines[-6:]]))
    return lines


def pairs(lines: list[str], begin: str) -> dict[str, str]:
    """The key:value pairs of the last line that begins so."""
    return dict(re.findall(KEYS, [line for line in lines if line.startswith(begin)][-1]))


def timed(lines: list[str]) -> tuple[float, int]:
    """(milliseconds, steps) between the second logged step that is a multiple of 10 and the last one."""
    steps = [pairs([line], "step:") for line in lines if re.match(r"step:\d+0/\d+ train_loss", line)]
    first, last = ((float(s["train_time"][:-2]), int(s["step"])) for s in (steps[min(1, len(steps) - 1)], steps[-1]))
    return last[0] - first[0], last[1] - first[1]


def settings_of(recipe: Recipe, proxy: str, seed: int, script: str, args: argparse.Namespace) -> dict[str, Any]:
    """The environment of a run: proxy, limit, recipe, seed."""
    limit = len(script.encode()) + MODEL_BYTES[proxy]
    if "RECIPE" in recipe.settings:
        limit = 16_000_000
    return {
        **COMMON, **PROXIES[proxy], "ARTIFACT_LIMIT_BYTES": limit, **recipe.settings, "SEED": seed, "DATA_PATH": "data",
        "TOKENIZER_PATH": Path(args.tokenizer).resolve(), "RUN_ID": "run",
    }  # fmt: skip


def edited_script(name: str, script: str) -> str:
    """The script with a recipe's edits; AssertionError where one does not fit it any more."""
    for old, new in RECIPES[name].edits:
        assert script.count(old) == 1, f"{name}: the script has no {old!r}, or several: bring the edit up to date"
        script = script.replace(old, new)
    return script


def edited_module(name: str, folder: Path) -> ModuleType:
    """A module of the edited script, which is written into `folder`."""
    path = folder / f"edited_{name}.py"
    path.write_text(edited_script(name, (ROOT / "train_gpt.py").read_text("utf-8")), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_run(name: str, proxy: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run the script and read the figures from its console output."""
    script = edited_script(name, args.script.read_text())
    settings = settings_of(RECIPES[name], proxy, seed, script, args)
    with tempfile.TemporaryDirectory() as folder:
        lines = start(script, Path(folder), settings, args)
    milliseconds, steps = timed(lines)
    return {
        "recipe": name, "proxy": proxy, "seed": seed, "params": int(pairs(lines, "model params")["params"]),
        "final_bpb": float(pairs(lines, "final_sliding")["val_bpb"]),
        "float_bpb": float(pairs(lines, "float_sliding")["val_bpb"]),
        "model_bytes": int(pairs(lines, "artifact path")["model_bytes"]),
        "bits": {kind: pairs(lines, f"artifact category:{kind}")["bits_per_weight"] for kind in ("mlp", "attn")},
        "step_ms": milliseconds / steps, "weights": pairs(lines, "export weights")["weights"],
        "settings": {k: v for k, v in settings.items() if "PATH" not in k},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Mean, deviation and the paired differences per proxy and recipe, in Markdown."""
    found = {(r["recipe"], r["proxy"], r["seed"]): r for r in rows}
    heads = ("proxy", "recipe", "seeds", "float bpb", "final bpb", "std", "against pr314", "against default",
             "gap to noqat", "model bytes", "ms a step")  # fmt: skip
    out = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]

    def against(runs: list[dict[str, Any]], *others: str, field: str = "final_bpb") -> str:
        """Mean difference of the final bpb from the best of the others with the same seed, where they are there."""
        keys = [[k for o in others if (k := (o, r["proxy"], r["seed"])) in found] for r in runs]
        best = [min((found[k][field] for k in same_seed), default=None) for same_seed in keys]
        differences = [r["final_bpb"] - b for r, b in zip(runs, best, strict=True) if b is not None]
        count = f" ({len(differences)} of {len(runs)})" if 0 < len(differences) < len(runs) else ""
        return f"{mean(differences):+.4f}{count}" if differences and [*others] != [runs[0]["recipe"]] else ""

    for proxy in PROXIES:
        for recipe in RECIPES:
            runs = [r for (a, b, _), r in sorted(found.items()) if (a, b) == (recipe, proxy)]
            if not runs:
                continue
            bpb = [r["final_bpb"] for r in runs]
            cells = [proxy, recipe, ", ".join(str(r["seed"]) for r in runs),
                     f"{mean(r['float_bpb'] for r in runs):.4f}", f"{mean(bpb):.4f}",
                     f"{stdev(bpb):.4f}" if len(bpb) > 1 else "", against(runs, "pr314"),
                     against(runs, "default"),
                     against(runs, "noqat", "noqat_swa", field="float_bpb") if recipe in SAME_MODEL else "",
                     f"{mean(r['model_bytes'] for r in runs):.0f}",
                     f"{mean(r['step_ms'] for r in runs):.0f}"]  # fmt: skip
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> int:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of shards")
    parser.add_argument("--tokenizer")
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py")
    parser.add_argument("--results", type=Path, default=ROOT / "logs" / "ablations-2.jsonl")
    parser.add_argument("--val-tokens", type=int, default=131073, help="how much of the validation split is scored")
    parser.add_argument("--only", default="", help='regular expression: run only what matches "recipe proxy seed"')
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="run nothing; put the table into logs/ABLATIONS.md")
    args = parser.parse_args()
    if not (args.table or args.write or (args.data and args.tokenizer)):
        parser.error("--data and --tokenizer say what to train on; --table and --write need neither")
    lines = args.results.read_text().splitlines() if args.results.is_file() else []
    rows = [json.loads(line) for line in lines]
    done = {(r["recipe"], r["proxy"], r["seed"]) for r in rows}

    def job(key: tuple[str, str, int]) -> None:
        """One run, kept at once."""
        try:
            row = one_run(*key, args)
        except (RuntimeError, AssertionError) as error:
            print(*key, error, file=sys.stderr, flush=True)
            return
        rows.append(row)
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*key, row["final_bpb"], flush=True)

    if not (args.table or args.write):
        with ThreadPoolExecutor(args.jobs) as pool:
            wanted = [key for key in ORDER if key not in done and re.search(args.only, "{} {} {}".format(*key))]
            list(pool.map(job, wanted))
    print(table(rows))
    if args.write:
        page = ROOT / "logs" / "ABLATIONS.md"
        before, after = re.split(r"(?<=<!-- table 2 -->\n)(?:.|\n)*(?=\n<!-- /table 2 -->)", page.read_text("utf-8"))
        page.write_text(before + table(rows) + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
