"""Paired runs of recipes on the proxies, and their table: `python tests/ablate.py --data DIR --tokenizer FILE`.

Each run is `train_gpt.py` as a user would start it, on one thread, in a scratch folder. A finished run is one line of
the results file (logs/ablations.jsonl), so the script goes on where it was stopped; `--table` only prints the table,
`--write` puts it into logs/ABLATIONS.md, `--only REGEX` runs what matches "recipe proxy seed", such as '^default long'.

Recipes that differ only in how a run ends (fake quantization, averaging) go on from one run of the default that is
stopped at 90% of its steps: a resumed run ends as if it had not stopped (tests/test_recovery.py). Ideas that were not
kept have no knob: `edits` makes them on a copy of the script. Changes of model and optimizer are screened in short
runs whose default has no value residual, which is one of the changes. The default gets the script's bytes plus 0.572
bytes per parameter, the ratio of the full-size budget; on the large proxy 0.555, less than pr314 takes, which gets as
many as it needs. `noqat` (last weights) and `noqat_swa` (averaged ones) never fake-quantize: the better of their float
scores is what the quantization gap of recipes with the same model is counted from."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from tools import t as train_gpt

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
TRAINED_TOKENS = 24_600_000  # at most, by a proxy
MODEL_BYTES = {"small": 1385992, "long": 348595, "large": 4126312, "screen": 1385992}  # of the default
Edits = list[tuple[str, str]]  # (text that occurs in the script, what stands there instead)


class Recipe(NamedTuple):
    """What a row differs in from the default: settings, edits of the script; `forks`: only after 90% of the steps."""

    settings: dict[str, Any]
    edits: Edits = []
    forks: bool = False


FORK_AT = 0.9
UPDATE = "                self.swa.update_parameters(self.model)\n"
EMA = [("AveragedModel(model)", "AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98))"),
       ("AveragedModel(self.model)",
        "AveragedModel(self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98))"),
       ("and self.step % cfg.swa_every == 0", "")]  # fmt: skip
KEEP_AVERAGE = [("self.qat_active, self.swa = True, AveragedModel(self.model)", "self.qat_active = True")]
AVERAGE_QUANTIZED = [(UPDATE, """                masters = copy.deepcopy(weights_of(self.model))
                for layer in self.model.modules():
                    if self.qat_active and getattr(layer, "spec", None): layer.weight.data.copy_(layer.forward_weight)
                self.swa.update_parameters(self.model)
                self.model.load_state_dict(masters, strict=False)
""")]  # fmt: skip
GRID = "fake_quantize_per_row(self.weight, scale, self.spec)"
GROWING = [(f"{GRID} if quantize else self.weight", f"torch.lerp(self.weight, {GRID}, float(quantize))"),
           ("        self.model.refresh(self.qat_active)\n        return metrics",
            "        start, end = self.cfg.qat_start_frac * self.cfg.iterations, 0.98 * self.cfg.iterations\n"
            "        self.model.refresh(self.qat_active and min(1.0, (step + 1 - start) / (end - start)))\n"
            "        return metrics")]  # fmt: skip
Q_GAIN = "self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))"
ATTENTION_GATE = [  # per head, from 12 channels of the layer's input
    (Q_GAIN, Q_GAIN + "\n        self.gate = nn.Parameter(torch.zeros(cfg.num_heads, 12))"),
    ("        return self.out_proj(out.reshape(batch, span, -1))",
     "        gate = 2 * torch.sigmoid(F.linear(x[:, length - span :, :12], self.gate.to(x.dtype))).unsqueeze(-1)\n"
     "        out = out.reshape(batch, span, -1, self.head_dim) * gate\n"
     "        return self.out_proj(out.reshape(batch, span, -1))"),
]  # fmt: skip
PARTIAL_ROPE = [  # a quarter of the head's dimensions
    ("(a, b), (cos, sin) = x.chunk(2, dim=-1), rope", "n = 2 * rope.size(-1)\n"
     "    (a, b), (cos, sin) = x[..., :n].chunk(2, dim=-1), rope"),
    ("b * cos - a * sin), dim=-1)", "b * cos - a * sin, x[..., n:]), dim=-1)"),
    ("head_dim, positions = cfg.model_dim // cfg.num_heads", "head_dim, positions = cfg.model_dim // cfg.num_heads"
     " // 4"),
]  # fmt: skip
DEPTH_NORM = [
    ("self.attn, self.mlp = CausalSelfAttention", "self.depth = (index + 1) ** -0.5\n"
     "        self.attn, self.mlp = CausalSelfAttention"),
    ("self.attn(norm(x), span", "self.attn(norm(x) * self.depth, span"),
    ("self.mlp(norm(x))", "self.mlp(norm(x) * self.depth)"),
]  # fmt: skip
DOCUMENT_STARTS = [  # bigram and smear do not look across a bos token (id 1 in the challenge's tokenizer)
    ("        return F.pad(pair, (1, 0)", "        pair = pair.masked_fill(ids[:, 1:] == 1, self.buckets - 1)\n"
     "        return F.pad(pair, (1, 0)"),
    ("gate = torch.sigmoid(self.smear_gate).to(x.dtype)\n", "gate = torch.sigmoid(self.smear_gate).to(x.dtype) * "
     "(input_ids != 1).unsqueeze(-1).to(x.dtype)\n"),
]  # fmt: skip
RECIPES: dict[str, Recipe] = {
    "default": Recipe({}, forks=True),
    "pr314": Recipe({"RECIPE": "pr314"}),
    "noqat": Recipe({"QAT_START_FRAC": 1, "SWA_ENABLED": 0}, forks=True),
    "noqat_swa": Recipe({"QAT_START_FRAC": 1, "SWA_ALWAYS": 1}, forks=True),
    "qat_0.95": Recipe({"QAT_START_FRAC": 0.95}, forks=True),
    "qat_growing": Recipe({}, GROWING, forks=True),
    "average_never": Recipe({"SWA_ENABLED": 0}, forks=True),
    "average_always": Recipe({"SWA_ALWAYS": 1}, forks=True),
    "average_kept": Recipe({"SWA_ALWAYS": 1}, KEEP_AVERAGE, forks=True),
    "average_quantized": Recipe({"SWA_ALWAYS": 1}, AVERAGE_QUANTIZED, forks=True),
    "ema": Recipe({"SWA_ALWAYS": 1}, EMA, forks=True),
    "nearest": Recipe({"ERROR_FEEDBACK": 0}, forks=True),
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
MAIN = ("default", "pr314", "noqat", "noqat_swa")
ORDER = [(r, p, 42) for p in ("long", "small") for r in MAIN]
ORDER += [(r, p, s) for s in (43, 44) for r in MAIN for p in ("small", "long") if s == 43 or p == "small"]
ORDER += [(r, "large", s) for s in (42, 43) for r in MAIN[:2]]
ORDER += [(r, p, 42) for p in ("small", "long") for r, recipe in RECIPES.items() if recipe.forks and r not in MAIN]
ORDER += [("ema", p, 43) for p in ("small", "long")]
ORDER += [(r, p, 42) for p in ("small", "long") for r in ("qat_0.8", "qat_0.5", "qat_0.7")]
ORDER += [(r, p, s) for r in ("no_value_residual", "attention_gate") for name, p, s in ORDER if name == "default"]
ORDER += [(r, "screen", 42) for r, recipe in RECIPES.items() if r == "default" or not recipe.forks]
ORDER.remove(("no_value_residual", "screen", 42))  # the screen's default
KEYS = r"(\w+):([-+.,\w]+)"


def short_split(args: argparse.Namespace, folder: Path) -> None:
    """A data folder: links to the training shards, and as validation split the first tokens of the first shard, or, to
    tune on, as many of the training split that no step of a proxy reads: windows spread over all from token 24.6
    million on (under 1% of them are calibration's, too)."""
    folder.mkdir()
    shards = sorted(Path(args.data).resolve().glob("fineweb_train_*.bin"))
    for shard in shards:
        (folder / shard.name).symlink_to(shard)
    first = min(Path(args.data).glob("fineweb_val_*.bin"))
    tokens = np.fromfile(first, "<u2", args.val_tokens, offset=1024)
    if args.held_back:
        unread = np.concatenate([np.fromfile(shard, "<u2", offset=1024) for shard in shards])[TRAINED_TOKENS:]
        starts = np.linspace(0, len(unread) - 256, args.val_tokens // 256).astype(int)
        tokens = np.concatenate([*(unread[at : at + 256] for at in starts), unread[:1]])
    train_gpt.write_shard(folder / first.name, tokens)


def start(script: str, folder: Path, settings: dict[str, Any], args: argparse.Namespace, stop_at: int = 0) -> list[str]:
    """Run `script` in `folder`; returns its console lines. `stop_at`: end it by SIGTERM when that step is logged."""
    Path(folder, args.script.name).write_text(script)
    if not Path(folder, "data").exists():
        short_split(args, Path(folder, "data"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in settings.items()}}
    command, lines = [sys.executable, args.script.name], list[str]()
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            lines.append(line.rstrip("\n"))
            if stop_at and line.startswith(f"step:{stop_at}/") and "train_loss" in line:
                run.send_signal(signal.SIGTERM)
    if run.returncode != (128 + signal.SIGTERM if stop_at else 0):
        raise RuntimeError("\n".join([f"exit code {run.returncode}", *lines[-6:]]))
    return lines


def pairs(lines: list[str], begin: str) -> dict[str, str]:
    """The key:value pairs of the last line that begins so."""
    return dict(re.findall(KEYS, [line for line in lines if line.startswith(begin)][-1]))


def timed(lines: list[str]) -> tuple[float, int]:
    """(milliseconds, steps) between the second logged step that is a multiple of 10 and the last one."""
    steps = [pairs([line], "step:") for line in lines if re.match(r"step:\d+0/\d+ train_loss", line)]
    first, last = ((float(s["train_time"][:-2]), int(s["step"])) for s in (steps[min(1, len(steps) - 1)], steps[-1]))
    return last[0] - first[0], last[1] - first[1]


BASES: dict[tuple[str, int], Any] = defaultdict(threading.Lock)


def base_run(proxy: str, seed: int, args: argparse.Namespace) -> tuple[Path, list[str]]:
    """(checkpoint, console lines) of the default, stopped at `FORK_AT` of its steps; made when there is none."""
    kept = Path(args.forks, f"{proxy}-{seed}.ckpt")
    with BASES[proxy, seed]:
        if not kept.exists():
            with tempfile.TemporaryDirectory() as name:
                settings = settings_of(RECIPES["default"], proxy, seed, args.script.read_text(), args)
                stop_at = round(FORK_AT * PROXIES[proxy]["ITERATIONS"])
                lines = start(args.script.read_text(), Path(name), {**settings, "CHECKPOINT_EVERY": 1e9}, args, stop_at)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.with_suffix(".log").write_text("\n".join(lines))
                shutil.move(max(Path(name, "logs").glob("*.ckpt")), kept)
    return kept, kept.with_suffix(".log").read_text().splitlines()


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
    recipe, script, earlier = RECIPES[name], edited_script(name, args.script.read_text()), list[str]()
    settings = settings_of(recipe, proxy, seed, script, args)
    with tempfile.TemporaryDirectory() as folder:
        if recipe.forks:
            checkpoint, earlier = base_run(proxy, seed, args)
            state = train_gpt.load_tensors(checkpoint)
            config, _, _ = train_gpt.load_config({k: str(v) for k, v in settings.items()})
            state["config"] = dataclasses.asdict(config)  # else the checkpoint would be refused
            if not state["config"]["swa_enabled"]:
                state["swa"]["n_averaged"].zero_()
            Path(folder, "logs").mkdir()
            train_gpt.save_tensors(Path(folder, "logs", f"run.{state['step']:09d}.ckpt"), state)
            settings["RESUME"] = 1
        lines = start(script, Path(folder), settings, args)
    times = [timed(part) for part in (earlier, lines) if part]
    artifact, weights = pairs(lines, "artifact bits:"), pairs(lines, "export weights")
    return {
        "recipe": name, "proxy": proxy, "seed": seed, "params": int(pairs(lines, "model params")["params"]),
        "final_bpb": float(pairs(lines, "final_sliding")["val_bpb"]),
        "float_bpb": float(pairs(lines, "float_sliding")["val_bpb"]),
        "model_bytes": int(artifact["model_bytes"]), "bits": artifact["bits"],
        "step_ms": sum(ms for ms, _ in times) / sum(steps for _, steps in times), "weights": weights["weights"],
        "rounding": weights["rounding"], "settings": {k: v for k, v in settings.items() if "PATH" not in k},
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
                     against(runs, "noqat", "noqat_swa", field="float_bpb") if RECIPES[recipe].forks else "",
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
    parser.add_argument("--results", type=Path, help="logs/ablations.jsonl, with --held-back logs/tuning.jsonl")
    parser.add_argument("--val-tokens", type=int, default=131073, help="how much of the validation split is scored")
    parser.add_argument("--forks", type=Path, default=ROOT / "logs" / "cache" / "forks", help="keeps stopped runs")
    parser.add_argument("--only", default="", help='regular expression: run only what matches "recipe proxy seed"')
    parser.add_argument("--held-back", action="store_true", help="score training tokens that no step reads")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="run nothing; put the table into logs/ABLATIONS.md")
    args = parser.parse_args()
    args.results = args.results or ROOT / "logs" / ("tuning.jsonl" if args.held_back else "ablations.jsonl")
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
        before, after = re.split(r"(?<=<!-- table -->\n)(?:.|\n)*(?=\n<!-- /table -->)", page.read_text("utf-8"))
        page.write_text(before + table(rows) + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
