"""Quantization at int4 size on the long proxy: when QAT starts, on which grids, what rounding and costs are worth.

    python tests/quantized.py --data DIR --tokenizer FILE --work DIR

One training per seed without fake quantization; runs with it go on from its states at 50, 80 and 92% of the steps, so
they differ by nothing else. Sizes are predicted by the order-0 entropy. States and weights stay in --work and scores in
--results, so the script continues where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import ablate
import torch
from tools import SilentRuntime, load_weights, t
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (42, 43)
BITS = (3.4, 3.8, 4.6)  # a weight, over the whole model
PROBES = 2  # random vectors per calibration batch for the Hessian's diagonal
DAMPING = 0.01  # of the mean of the diagonal, in error feedback


class Training(NamedTuple):
    """When QAT starts (a share of the steps; 1: never), the MLP's bits at most (8: free), scales tried, bits a weight,
    whether attention and the bigram projection train on their grids, too."""

    start: float
    mlp_bits: int = 8
    tried: int = t.SCALES_TRIED  # 1: the row's maximum alone, so nothing is clipped
    bits: float = 3.8
    everywhere: bool = False
    again: float = 1.0  # share of the steps at which the grids are planned again
    coarser: float = 1.0  # factor of the MLP's planned scales


NEVER = "never"
TRAININGS = {
    NEVER: Training(1.0),
    "0.92": Training(0.92), "0.8": Training(0.8),
    "0.92, everywhere": Training(0.92, everywhere=True), "0.8, int4": Training(0.8, 4),
    "0.8, everywhere": Training(0.8, everywhere=True), "0.92, int4": Training(0.92, 4),
    "0.8, int4 row maximum": Training(0.8, 4, 1), "0.8, int4 everywhere": Training(0.8, 4, everywhere=True),
    "0.5, int4": Training(0.5, 4), "0.8, int4, again at 0.92": Training(0.8, 4, again=0.92),
    "0.8, int4, scales times 1.25": Training(0.8, 4, coarser=1.25), "0.8, times 1.25": Training(0.8, coarser=1.25),
    "0.8, int4, 3.4 bits": Training(0.8, 4, bits=3.4), "0.8, int4, 4.6 bits": Training(0.8, 4, bits=4.6),
    "0.8, 3.4 bits": Training(0.8, bits=3.4), "0.8, 4.6 bits": Training(0.8, bits=4.6), "0.5": Training(0.5),
}  # fmt: skip
STARTS = sorted({training.start for training in TRAININGS.values()} - {1.0})


def run_id_of(name: str) -> str:
    """The name of a training in file names."""
    return name.replace(", ", "-").replace(" ", "-")


def config_of(seed: int, training: Training, args: argparse.Namespace) -> t.Config:
    """The long proxy's config; the limit leaves `training.bits` a weight for the model."""
    recipe = ablate.settings_of("default", "long", seed, "", args)
    changes = {"QAT_START_FRAC": training.start, "MLP_BITS": training.mlp_bits, "DATA_PATH": args.data}
    cfg = t.load_config({name: str(value) for name, value in (recipe | changes).items()})[0]
    params = sum(p.numel() for p in t.GPT(cfg, torch.float32).parameters())
    return dataclasses.replace(cfg, artifact_limit_bytes=t.CODE_BYTES + round(params * training.bits / 8))


class Everywhere(t.Trainer):
    """A trainer whose linear layers all train on their grids."""

    def start_qat(self) -> None:
        """The MLP's grids stay as the script plans them, the others fill what is left."""
        super().start_qat()
        linear = {f"{name}.weight" for name, layer in self.model.named_modules() if isinstance(layer, t.CastedLinear)}
        self.grids = {name: grid for name, grid in self.plan_for(self.model.state_dict()).items() if name in linear}
        self.model.refresh(self.grids)


class Replanning(t.Trainer):
    """A trainer that plans its grids once more, for the weights as they are then, or coarser ones."""

    again, coarser = 1.0, 1.0

    def start_qat(self) -> None:
        """The script's plan, with other scales."""
        super().start_qat()
        self.grids = {name: t.Grid(bits, scale * self.coarser) for name, (bits, scale) in self.grids.items()}
        self.model.refresh(self.grids)

    def log_step(self, loss: float, grad_norm: float, lr_scale: float) -> None:
        """After a step."""
        super().log_step(loss, grad_norm, lr_scale)
        if self.step == math.ceil(self.again * self.cfg.iterations) < self.cfg.iterations:
            self.grids = {}
            self.start_qat()


class Forking(t.Trainer):
    """A trainer that stores its state where runs with fake quantization begin."""

    def log_step(self, loss: float, grad_norm: float, lr_scale: float) -> None:
        """After a step."""
        super().log_step(loss, grad_norm, lr_scale)
        for start in STARTS:
            if self.step == math.ceil(start * self.cfg.iterations):
                state = self.common_state() | {name: part.state_dict() for name, part in self.parts.items()}
                t.save_tensors(Path(f"{start}.state"), state)


def runtime() -> SilentRuntime:
    """One thread, compiled."""
    torch.set_num_threads(1)
    return SilentRuntime(0, 1, True)


def trained(seed: int, name: str, args: argparse.Namespace) -> None:
    """Train one of TRAININGS in --work/SEED, unless its weights are there."""
    folder = Path(args.work, str(seed))
    Path(folder, "logs").mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    training = TRAININGS[name]
    cfg = dataclasses.replace(config_of(seed, training, args), run_id=run_id_of(name))
    path = Path("logs", f"{cfg.run_id}.weights")
    if path.is_file():
        return
    t.SCALES_TRIED = training.tried
    rt = runtime()
    data = t.Data(cfg, rt)
    data.num_val_targets = cfg.train_seq_len  # scored later
    torch.manual_seed(seed)
    t.CastedLinear.__init__.__defaults__ = (training.everywhere,)  # fake_quant
    model = t.GPT(cfg, rt.compute_dtype)
    model.init_weights()
    kind = {NEVER: Forking}.get(name, Everywhere if training.everywhere else Replanning)
    trainer = kind(model, data, cfg, rt)
    if isinstance(trainer, Replanning):
        trainer.again, trainer.coarser = training.again, training.coarser
    if name != NEVER:
        trainer.restore(t.load_tensors(Path(f"{training.start}.state")))
    trainer.run()
    print(seed, name, *[line for line in rt.lines if line.startswith(("qat", "export"))], flush=True)


def hessian_diagonal(model: t.GPT, batches: list[torch.Tensor]) -> t.Tensors:
    """Row means of the loss's second derivatives (Hutchinson's estimator, 1989), at least 0."""
    params = {name: p for name, p in model.named_parameters() if t.category(name) != "small"}
    sums = {name: torch.zeros(len(p)) for name, p in params.items()}
    generator = torch.Generator().manual_seed(0)
    for tokens in [tokens for tokens in batches for _ in range(PROBES)]:
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            signs = [torch.randint(0, 2, g.shape, generator=generator) * 2.0 - 1 for g in grads]
            product = sum((g * v).sum() for g, v in zip(grads, signs, strict=True))
            seconds = torch.autograd.grad(product, list(params.values()))
        for name, v, second in zip(params, signs, seconds, strict=True):
            sums[name] += (v * second).mean(dim=1)
    return {name: total.clamp(min=0) for name, total in sums.items()}


def input_moments(model: t.GPT, batches: list[torch.Tensor]) -> t.Tensors:
    """Second moments (C, C) of the inputs of all linear layers."""
    moments: t.Tensors = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, t.CastedLinear):

            def note(_: Any, inputs: tuple[torch.Tensor], key: str = f"{name}.weight") -> None:
                """Add one batch."""
                x = inputs[0].detach().flatten(0, -2)
                moments[key] = moments.get(key, 0) + x.T @ x

            hooks.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        for tokens in batches:
            model(tokens[:, :-1], tokens[:, 1:])
    for hook in hooks:
        hook.remove()
    return moments


def fed_back(weight: torch.Tensor, moments: torch.Tensor, grid: t.Grid) -> t.Stored:
    """Codes by error feedback (GPTQ, arXiv:2210.17323): columns yet to come make up for the errors of those before."""
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, rounded = weight.clone(), torch.empty_like(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for i in range(weight.size(1)):
        stored = grid.quantize(left[:, i : i + 1])
        codes[:, i : i + 1], rounded[:, i] = stored.values, stored.dequantize()[:, 0]
        error = (left[:, i] - rounded[:, i]) / upper[i, i]
        left[:, i:] -= torch.outer(error, upper[i, i:])
    return t.Stored(codes, grid.quantize(weight).scale)


def scores(seed: int, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All exports of one training: rows of the results file."""
    training = TRAININGS[name]
    cfg = config_of(seed, training, args)
    content = t.load_tensors(Path(args.work, str(seed), "logs", f"{run_id_of(name)}.weights"))
    weights, costs = content["weights"], content["costs"]
    grids = {key: t.Grid(*values) for key, values in content["grids"].items()}
    rt = SilentRuntime(0, 1, False)
    torch.set_num_threads(1)
    data = t.Data(cfg, rt)
    data.num_val_targets = args.targets // cfg.train_seq_len * cfg.train_seq_len
    model = t.GPT(cfg, torch.float32)
    load_weights(model, weights, {})
    t.SCALES_TRIED = training.tried
    rows: list[dict[str, Any]] = []

    def bits_of(tensors: list[t.Stored]) -> float:
        """Bits a weight, by the entropy."""
        return 8 * sum(tensor.num_bytes() for tensor in tensors) / sum(tensor.values.numel() for tensor in tensors)

    def score(what: str, bits: float, stored: dict[str, t.Stored]) -> None:
        """Evaluate, and keep the row; without tensors, of the float weights."""
        load_weights(model, weights | {key: tensor.dequantize() for key, tensor in stored.items()}, {})
        bpb = t.evaluate(model, data, rt, cfg.train_seq_len, 16)[1]
        found: dict[str, Any] = {"seed": seed, "training": name, "export": what, "bits": bits, "bpb": bpb}
        if stored:
            for kind in ("mlp", "attn", "bigram", "embed"):
                of_kind = [tensor for key, tensor in stored.items() if t.category(key) == kind]
                found[kind] = round(bits_of(of_kind), 3)
            found["total"] = round(bits_of([*stored.values()]), 4)
        rows.append(found)
        print(json.dumps(found), flush=True)

    def plan(bits: float, kept: t.Plan, mlp_bits: int = 8, prices: t.Tensors = costs) -> t.Plan:
        """Grids of `bits` a weight."""
        changed = dataclasses.replace(cfg, mlp_bits=mlp_bits)
        return t.grids_for_bytes(weights, prices, kept, changed, bits / 8 * sum(w.numel() for w in weights.values()))

    def with_feedback(bits: float, kept: t.Plan, mlp_bits: int, kinds: tuple[str, ...]) -> dict[str, t.Stored]:
        """Error feedback in the linear layers of `kinds`, the nearest code elsewhere; its codes need coarser grids."""
        aim = bits
        for _ in range(2):
            chosen = plan(aim, kept, mlp_bits)
            stored = t.quantize(weights, chosen, cfg)
            for key in moments:
                if t.category(key) in kinds:
                    stored[key] = fed_back(weights[key], moments[key], chosen[key])
            aim *= bits / bits_of([*stored.values()])
        return stored

    score("float", 32, {})
    load_weights(model, weights, {})
    batches = list(t.Trainer(model, data, cfg, rt).calibration_batches)
    moments = input_moments(model, batches)
    own = plan(training.bits, grids, training.mlp_bits)
    score("own", training.bits, t.quantize(weights, own, cfg))
    for where, kinds in (("outside the MLP", ("attn", "bigram")), ("everywhere", ("attn", "bigram", "mlp"))):
        stored = with_feedback(training.bits, grids, training.mlp_bits, kinds)
        score(f"own, feedback {where}", training.bits, stored)
    if name == NEVER:
        load_weights(model, weights, {})
        seconds = hessian_diagonal(model, batches)
        for bits in BITS:
            score("free", bits, t.quantize(weights, plan(bits, {}), cfg))
            score("free, feedback", bits, with_feedback(bits, {}, 8, ("attn", "bigram", "mlp")))
            score("free, Hessian", bits, t.quantize(weights, plan(bits, {}, 8, seconds), cfg))
            score("int4", bits, t.quantize(weights, plan(bits, {}, 4), cfg))
            t.SCALES_TRIED = 1
            score("int4 row maximum", bits, t.quantize(weights, plan(bits, {}, 4), cfg))
            t.SCALES_TRIED = training.tried
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """What quantization costs against the float twin that never saw it, mean and by seed, as two Markdown tables."""
    twin = {r["seed"]: r["bpb"] for r in rows if (r["training"], r["export"]) == (NEVER, "float")}

    def gap(training: str, export: str, bits: float) -> str:
        """Of one training and export, where it is there."""
        key = (training, export, bits)
        found = sorted((r["seed"], r["bpb"]) for r in rows if (r["training"], r["export"], r["bits"]) == key)
        gaps = [bpb - twin[seed] for seed, bpb in found if seed in twin]
        return f"{mean(gaps):+.4f} ({', '.join(f'{each:+.4f}' for each in gaps)})" if gaps else ""

    exports = ("own", "own, feedback outside the MLP", "own, feedback everywhere")
    heads = ("QAT from", "bits", "MLP bits", "attention bits", "float", *exports)
    out = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in [r for r in rows if r["export"] == "own" and r["seed"] == SEEDS[0]]:
        cells = [r["training"], r["bits"], r["mlp"], r["attn"], gap(r["training"], "float", 32)]
        cells += [gap(r["training"], export, r["bits"]) for export in exports]
        out.append("| " + " | ".join(map(str, cells)) + " |")
    out += ["", "| without QAT | " + " | ".join(f"{bits} bits" for bits in BITS) + " |", "|---" * (len(BITS) + 1) + "|"]
    for export in ("free", "free, feedback", "free, Hessian", "int4", "int4 row maximum"):
        out.append(f"| {export} | " + " | ".join(gap(NEVER, export, bits) for bits in BITS) + " |")
    return "\n".join(out)


def one_seed(seed: int, args: argparse.Namespace) -> None:
    """All trainings and exports of a seed that are missing."""
    home = Path.cwd()
    for name in TRAININGS:
        trained(seed, name, args)
        os.chdir(home)
        lines = args.results.read_text().splitlines() if args.results.is_file() else []
        if not any((r["seed"], r["training"]) == (seed, name) for r in map(json.loads, lines)):
            text = "".join(json.dumps(row) + "\n" for row in scores(seed, name, args))
            with args.results.open("a") as file:
                file.write(text)


def main() -> None:
    """Run what is missing, two seeds side by side, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of FineWeb shards; without it only the table is printed")
    parser.add_argument("--tokenizer")
    parser.add_argument("--work", type=Path, help="folder for states and weights")
    parser.add_argument("--write", action="store_true", help="put the tables into logs/ABLATIONS.md")
    parser.add_argument("--targets", type=int, default=131_072, help="scored")
    parser.add_argument("--results", type=Path, default=ROOT / "logs" / "quantized.jsonl")
    args = parser.parse_args()
    if args.data:
        if not (args.tokenizer and args.work):
            parser.error("--data needs --tokenizer and --work")
        args.work, args.results = args.work.resolve(), args.results.resolve()
        args.data, args.tokenizer = str(Path(args.data).resolve()), str(Path(args.tokenizer).resolve())
        with ProcessPoolExecutor(len(SEEDS)) as pool:
            list(pool.map(one_seed, SEEDS, [args] * len(SEEDS)))
    lines = args.results.read_text().splitlines() if args.results.is_file() else []
    found = table([json.loads(line) for line in lines])
    print(found)
    if args.write:
        page = ROOT / "logs" / "ABLATIONS.md"
        before, after = re.split(
            r"(?<=<!-- quantized -->\n)(?:.|\n)*(?=\n<!-- /quantized -->)", page.read_text("utf-8")
        )
        page.write_text(before + found + after, encoding="utf-8")


if __name__ == "__main__":
    main()
