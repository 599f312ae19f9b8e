"""What changes of the recipe are worth on CPU proxies: paired runs, one thread each, and their table.

    python tests/ablate.py --data DIR --tokenizer FILE                  run what is missing
    python tests/ablate.py --data DIR --tokenizer FILE --only screen    ... of the rows that match
    python tests/ablate.py --data DIR --tokenizer FILE --time small     time of a step over pr314's, for STEP_TIME
    python tests/ablate.py --table                                      print the table; --write: into ABLATIONS.md

Recipes are compared at the same bytes of model (pr314 gets what its fixed bits take) and the same time: each has as
many steps as take the time of pr314's. A finished run is a line of logs/ablations-2.jsonl, so the script continues
where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from tools import SilentRuntime, t, write_shard

ROOT = Path(__file__).resolve().parent.parent
COMMON = {
    "MAX_WALLCLOCK_SECONDS": 0, "WARMUP_STEPS": 0, "TRAIN_SEQ_LEN": 256, "TRAIN_BATCH_TOKENS": 4096, "NUM_LAYERS": 11,
    "MUON_MOMENTUM_WARMUP_STEPS": 150, "SWA_EVERY": 10, "BIGRAM_DIM": 64, "VAL_LOSS_EVERY": 0, "EVAL_FLOAT": 1,
    "COMPILE": 1, "TRAIN_LOG_EVERY": 10, "EVAL_BATCH_SEQS": 16, "NUM_HEADS": 2, "NUM_KV_HEADS": 1,
    "BIGRAM_VOCAB_SIZE": 2048,
}  # fmt: skip
PROXIES: dict[str, dict[str, Any]] = {  # ITERATIONS: those of pr314
    "small": {"MODEL_DIM": 128, "BIGRAM_VOCAB_SIZE": 10240, "ITERATIONS": 500},
    "long": {"MODEL_DIM": 64, "ITERATIONS": 1500},
    "large": {"MODEL_DIM": 256, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "BIGRAM_VOCAB_SIZE": 10240, "ITERATIONS": 250},
    "tokens": {"MODEL_DIM": 32, "BIGRAM_VOCAB_SIZE": 512, "BIGRAM_DIM": 32, "ITERATIONS": 6700},
    "screen": {"MODEL_DIM": 64, "ITERATIONS": 600, "TRAIN_BATCH_TOKENS": 2048, "EVAL_STRIDE": 0},
}
MODEL_BYTES = {"small": 1385992, "long": 348595, "large": 4126312, "tokens": 80000, "screen": 348595}  # not of pr314
# Time of a step over pr314's (`--time`; not measured yet where nothing stands), by which a recipe has fewer steps; the
# screen's rows have equal steps.
STEP_TIME: dict[str, dict[str, float]] = {
    "default": {},
    "full_size": {},
    "e735e01": {"small": 1.04, "long": 1.04, "large": 1.04},  # that commit's logs/ABLATIONS.md, for 128 and 256
}
QUARTER = "quarter"  # of a head's dimensions
Edits = list[tuple[str, str]]  # (text that occurs in the script, what stands there instead)


class Recipe(NamedTuple):
    """What a row differs in from the default: settings, edits of the script."""

    settings: dict[str, Any]
    edits: Edits = []
    warmdown: float = 0.4  # share of the steps
    commit: str = ""  # whose script runs instead of today's


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
DOCUMENT_STARTS = [  # bigram and smear do not look across a bos token (id 1 in the challenge's tokenizer)
    (
        "        buckets = F.pad(pairs % (self.buckets - 1)",
        "        starts = ids[:, 1:] == 1\n"
        "        pairs = (pairs % (self.buckets - 1)).masked_fill(starts, self.buckets - 1)\n"
        "        buckets = F.pad(pairs",
    ),
    (
        "gate = torch.sigmoid(self.smear_gate).to(x.dtype)\n",
        "gate = torch.sigmoid(self.smear_gate).to(x.dtype) * (input_ids != 1).unsqueeze(-1).to(x.dtype)\n",
    ),
]
SMALL = {"RECIPE": "small"}
WEIGHT_DECAY = {"WEIGHT_DECAY": 0.09}
RATES = {"MATRIX_LR": 0.028, "SCALAR_LR": 0.028, "TIED_EMBED_LR": 0.042}
RECIPES: dict[str, Recipe] = {
    "default": Recipe(SMALL),
    "full_size": Recipe({"ROPE_DIMS": QUARTER}, warmdown=0.6),
    "e735e01": Recipe({}, commit="e735e01"),
    "pr314_spread": Recipe({"RECIPE": "pr314", "SEQUENCE_ORDER": "spread"}),
    "file_order": Recipe({**SMALL, "SEQUENCE_ORDER": "file"}),
    "mlp_3x": Recipe({**SMALL, "MLP_MULT": 3}),
    # the screen: one change each
    "xsa_0": Recipe({**SMALL, "XSA_LAYERS": 0}),
    "xsa_4": Recipe({**SMALL, "XSA_LAYERS": 4}),
    "no_value_residual": Recipe({**SMALL, "VALUE_RESIDUAL": 0}),
    "no_muon_eq": Recipe({**SMALL, "MUON_EQ": 0}),
    "momentum_kept": Recipe({**SMALL, "MUON_MOMENTUM_END": 0.99}),
    "gain_5": Recipe({**SMALL, "QK_GAIN_INIT": 5}),
    "rope_quarter": Recipe({**SMALL, "ROPE_DIMS": QUARTER}),
    "ln_scale": Recipe({**SMALL, "LN_SCALE": 1}),
    "relu": Recipe({**SMALL, "RELU_SLOPE": 0}),
    "average_always": Recipe({**SMALL, "SWA_ALWAYS": 1}),
    "warmdown_0.6": Recipe(SMALL, warmdown=0.6),
    "weight_decay": Recipe(SMALL | WEIGHT_DECAY),
    "package": Recipe({**SMALL, **WEIGHT_DECAY, **RATES, "QK_GAIN_INIT": 5}, warmdown=0.6),
    # changes of the script
    "ema": Recipe({**SMALL, "SWA_ALWAYS": 1}, EMA),
    "average_kept": Recipe({**SMALL, "SWA_ALWAYS": 1}, KEEP_AVERAGE),
    "attention_gate": Recipe(SMALL, ATTENTION_GATE),
    "document_starts": Recipe(SMALL, DOCUMENT_STARTS),
}
REFERENCE, TIMED_STEPS = "pr314_spread", 24
MAIN = (REFERENCE, "e735e01", "default", "full_size")
SCREEN = ("default", "xsa_0", "xsa_4", "no_value_residual", "no_muon_eq", "momentum_kept", "gain_5", "rope_quarter",
          "ln_scale", "relu", "average_always", "warmdown_0.6", "weight_decay", "package", "full_size")  # fmt: skip
ORDER = [(r, "screen", s) for s in (42, 43) for r in SCREEN]
ORDER += [(r, p, s) for s in (42, 43) for r in MAIN for p in ("small", "long")]
ORDER += [(r, "large", 42) for r in MAIN] + [(r, "tokens", 42) for r in ("default", "pr314_spread")]
ORDER += [(r, "screen", 42) for r in RECIPES if r not in (*SCREEN, *MAIN)]
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


def settings_of(name: str, proxy: str, seed: int, script: str, args: argparse.Namespace) -> dict[str, Any]:
    """The environment of a run: proxy, limit, recipe, seed; as many steps as take the time of pr314's."""
    recipe = RECIPES[name]
    settings = COMMON | PROXIES[proxy] | recipe.settings
    if proxy != "screen" and name != REFERENCE:
        settings["ITERATIONS"] = round(settings["ITERATIONS"] / STEP_TIME.get(name, STEP_TIME["default"]).get(proxy, 1))
    settings["WARMDOWN_ITERS"] = round(recipe.warmdown * settings["ITERATIONS"])
    if settings.get("ROPE_DIMS") == QUARTER:
        settings["ROPE_DIMS"] = settings["MODEL_DIM"] // settings["NUM_HEADS"] // 4
    fixed_bits = settings.get("RECIPE") == "pr314"
    settings["ARTIFACT_LIMIT_BYTES"] = 16_000_000 if fixed_bits else len(script.encode()) + MODEL_BYTES[proxy]
    paths = {"DATA_PATH": "data", "TOKENIZER_PATH": Path(args.tokenizer).resolve(), "RUN_ID": "run"}
    return settings | {"SEED": seed} | paths


def edited_script(name: str, script: str) -> str:
    """The script with a recipe's edits; AssertionError where one does not fit it any more."""
    if commit := RECIPES[name].commit:
        return subprocess.check_output(["git", "show", f"{commit}:train_gpt.py"], cwd=ROOT, text=True)
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
    settings = settings_of(name, proxy, seed, script, args)
    with tempfile.TemporaryDirectory() as folder:
        lines = start(script, Path(folder), settings, args)
    milliseconds, steps = timed(lines)
    return {
        "recipe": name, "proxy": proxy, "seed": seed, "params": int(pairs(lines, "model params")["params"]),
        "final_bpb": float(pairs(lines, "final_sliding")["val_bpb"]),
        "float_bpb": float(pairs(lines, "float_sliding")["val_bpb"]),
        "model_bytes": int(pairs([line for line in lines if "model_bytes" in line], "artifact")["model_bytes"]),
        "mlp_bits": pairs(lines, "artifact category:mlp").get("bits_per_weight", ""),
        "step_ms": milliseconds / steps, "export": next(line for line in lines if line.startswith("export weights")),
        "settings": {k: v for k, v in settings.items() if "PATH" not in k},
    }  # fmt: skip


def step_times(proxy: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a compiled training step of today's recipes, one thread, medians of steps taken in turn."""
    torch.set_num_threads(1)
    trainers = {}
    for name in (REFERENCE, "default", "full_size"):
        settings = settings_of(name, proxy, 42, "", args) | {"DATA_PATH": args.data}
        cfg = t.load_config({key: str(value) for key, value in settings.items()})[0]
        rt = SilentRuntime(0, 1, True)
        model = t.GPT(cfg, torch.float32)
        model.init_weights()
        trainer = trainers[name] = t.Trainer(model, t.Data(cfg, rt), cfg, rt)
        if cfg.qat_start_frac == 0:
            trainer.start_qat()
        trainer.train_step(1.0)  # compiles
    found: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(TIMED_STEPS):
        for name, trainer in trainers.items():
            begun = time.perf_counter()
            trainer.train_step(1.0)
            found[name].append(time.perf_counter() - begun)
    return {name: median(seconds) for name, seconds in found.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean, deviation and the differences of runs with the same seed, per proxy and recipe, in Markdown."""
    found = {(r["recipe"], r["proxy"], r["seed"]): r for r in rows}
    heads = ("proxy", "recipe", "seeds", "steps", "float bpb", "final bpb", "std", f"against {REFERENCE}",
             "against default", "MLP bits", "model bytes")  # fmt: skip
    out = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]

    def against(runs: list[dict[str, Any]], other: str) -> str:
        """Differences of the final bpb from another recipe's with the same seed, and their mean."""
        keys = [(other, r["proxy"], r["seed"]) for r in runs]
        differences = [r["final_bpb"] - found[k]["final_bpb"] for r, k in zip(runs, keys, strict=True) if k in found]
        if not differences or runs[0]["recipe"] == other:
            return ""
        by_seed = f" ({', '.join(f'{d:+.4f}' for d in differences)})" if len(differences) > 1 else ""
        return f"{mean(differences):+.4f}{by_seed}"

    for proxy in PROXIES:
        for recipe in RECIPES:
            runs = [r for (a, b, _), r in sorted(found.items()) if (a, b) == (recipe, proxy)]
            if not runs:
                continue
            bpb = [r["final_bpb"] for r in runs]
            cells = [proxy, recipe, ", ".join(str(r["seed"]) for r in runs), str(runs[0]["settings"]["ITERATIONS"]),
                     f"{mean(r['float_bpb'] for r in runs):.4f}", f"{mean(bpb):.4f}",
                     f"{stdev(bpb):.4f}" if len(bpb) > 1 else "", against(runs, REFERENCE),
                     against(runs, "default"), str(runs[0]["mlp_bits"]),
                     f"{mean(r['model_bytes'] for r in runs):.0f}"]  # fmt: skip
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
    parser.add_argument("--time", choices=list(PROXIES), help="only time steps; nothing else may run")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="run nothing; put the table into logs/ABLATIONS.md")
    args = parser.parse_args()
    if not (args.table or args.write or (args.data and args.tokenizer)):
        parser.error("--data and --tokenizer say what to train on; --table and --write need neither")
    if args.time:
        seconds = step_times(args.time, args)
        for name, value in seconds.items():
            print(f"{args.time} {name} {1000 * value:.0f} ms, {value / seconds[REFERENCE]:.3f} of {REFERENCE}")
        return 0
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
        before, after = re.split(r"(?<=<!-- table -->\n)(?:.|\n)*(?=\n<!-- /table -->)", page.read_text("utf-8"))
        page.write_text(before + table(rows) + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
