"""How fast is it, and what does it cost? Markdown tables of everything that a user waits for.

    python tests/bench.py                          all sections, about 20 minutes on 2 idle CPU cores
    python tests/bench.py eval train --compiled    some: eval muon train recipes scale startup export compile paper

It needs no data: speed is measured on random tokens, bits per byte on the demo corpus, or with --data and --tokenizer
on shards (--artifact scores a trained artifact, too). Every ratio is the median over rounds that run one variant after
the other in the same process (A B A B ...), so that a machine that slows down or is shared slows down both. Peak
memory is that of a fresh process that does nothing else, less what it held before the work began.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ablate  # noqa: E402
from run_log import numbers  # noqa: E402

import train_gpt as t  # noqa: E402

PEAK_SHAPE = (2048, 512, 1536)  # the product that stands for the machine's peak
H100_FLOPS, H100_BYTES, NVLINK_BYTES = 989e12, 3.35e12, 450e9  # dense bf16, HBM3, NVLink 4 in one direction
LOGGED_STEPS = "logged by others: 83-87 ms with FlashAttention 3, 94-110 ms with SDPA"  # FIELD_NOTES
HEADS = {128: (8, 4), 512: (8, 4)}  # the defaults of the script; other widths get heads of 32
SECONDS_PER_PEAK = 0.25  # how long a round of peak products runs
Row = Sequence[Any]
Work = Callable[[], Any]


# ---- Measuring -------------------------------------------------------------------------------------------------------
def alternating(repeats: int, *works: Work) -> list[list[float]]:
    """Seconds of each of `works` in each of `repeats` rounds that run them one after the other, after one warm-up."""
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for taken, work in zip(seconds, works, strict=True):
            begun = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begun)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times as fast `fast` was: the median over the rounds."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def peak_bytes() -> int:
    """Largest resident set of this process so far. Not `ru_maxrss` on Linux: that is inherited from the parent."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    usage = t.resource.getrusage(t.resource.RUSAGE_SELF).ru_maxrss
    return usage * (1 if sys.platform == "darwin" else 1024)


def isolated(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a top-level function that runs in a fresh process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def markdown(title: str, header: str, rows: Iterable[Row], note: str = "") -> str:
    """A Markdown table; `header`: the columns, with | between them."""
    columns = [column.strip() for column in header.split("|")]
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *cells]]
    return "\n".join([f"### {title}", "", *lines, *(["", note] if note else []), ""])


# ---- What is measured ------------------------------------------------------------------------------------------------
def config(**changes: Any) -> t.Config:
    """The script's config with `changes`, under a run name of its own."""
    fixed: dict[str, Any] = {"max_wallclock_seconds": 0, "warmup_steps": 0, "train_batch_tokens": 8192, "compile": 0}
    return t.load_config({name.upper(): str(value) for name, value in (fixed | changes).items()})[0]


def sized(width: int, seq_len: int, **changes: Any) -> t.Config:
    """A config of 11 layers of this width."""
    heads, kv_heads = HEADS.get(width, (max(2, width // 32), max(1, width // 64)))
    sizes = {"model_dim": width, "train_seq_len": seq_len, "num_heads": heads, "num_kv_heads": kv_heads}
    return config(**sizes | changes)


def runtime(cfg: t.Config) -> t.Runtime:
    """The script's own runtime (number format, kernel, allocator), under a new name, that logs nothing."""
    named = dataclasses.replace(cfg, run_id=f"bench-{os.getpid()}-{time.perf_counter_ns()}")
    return dataclasses.replace(t.Runtime.start(named), logger=t.open_log(None))


@cache
def tokenizer(vocab_size: int) -> Any:
    """A SentencePiece model of made-up words."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(2, 9)))) for _ in range(2000)]
    documents = [" ".join(rng.choice(words, 200)) for _ in range(100)]
    return t.sentencepiece.SentencePieceProcessor(model_proto=t.train_tokenizer(documents, vocab_size))


def random_data(cfg: t.Config, val_tokens: int, train_tokens: int = 1 << 17) -> t.Data:
    """Shards of random tokens in the current folder."""
    folder, rng = Path(tempfile.mkdtemp(prefix="shards-", dir=".")), np.random.default_rng(0)
    for split, count in (("train", train_tokens), ("val", val_tokens)):
        tokens = rng.integers(4, cfg.vocab_size, count)
        t.write_shard(folder / f"fineweb_{split}_000000.bin", tokens)
    train, val = (t.TokenShards(f"{folder}/fineweb_{split}_*.bin", cfg.vocab_size) for split in ("train", "val"))
    val_targets = (val.total - 1) // cfg.train_seq_len * cfg.train_seq_len
    return t.Data(train, val, val_targets, tokenizer(cfg.vocab_size), "")


def model_for(cfg: t.Config, rt: t.Runtime, trains: bool, script: Any = t) -> t.GPT:
    """A model with random weights in all of its parts; with the buffers of fake quantization if it `trains`. `script`:
    whose model, this one's or an edited one's."""
    torch.manual_seed(0)
    plan = t.starting_plan(script.GPT(cfg, {}, rt.compute_dtype).state_dict(), cfg) if trains else {}
    model: t.GPT = script.GPT(cfg, plan, rt.compute_dtype, rt.attention)
    model.init_weights(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.refresh(False)
    return model.to(rt.device)


def trainer_for(cfg: t.Config, compiled: bool = False, script: Any = t) -> t.Trainer:
    """A trainer on random tokens."""
    rt = dataclasses.replace(runtime(cfg), compile=compiled)
    data = random_data(cfg, cfg.train_seq_len + 1, max(1 << 17, 2 * cfg.train_batch_tokens))
    return t.Trainer(model_for(cfg, rt, True, script), data, cfg, rt)


def name_of(cfg: t.Config) -> str:
    """Sizes of a model, for the first column."""
    heads = f"{cfg.num_heads}/{cfg.num_kv_heads} heads"
    return f"{cfg.num_layers} layers, width {cfg.model_dim}, {heads}, sequence {cfg.train_seq_len}"


# ---- eval ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def exact_row(cfg: t.Config, batch: int, repeats: int) -> Row:
    """Windows whose scored span alone goes through the last block, head and loss, against all positions."""
    rt = runtime(cfg)
    model, span = model_for(cfg, rt, trains=False), cfg.eval_stride
    ids = torch.randint(4, cfg.vocab_size, (batch, cfg.train_seq_len + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    scored = targets[:, -span:].contiguous()
    with rt.autocast():
        difference = (model.nll(inputs, scored) - model.nll(inputs, targets)[:, -span:]).mean().abs()
        everything, alone = alternating(
            repeats, lambda: model.nll(inputs, targets)[:, -span:], lambda: model.nll(inputs, scored)
        )
    rates = [batch * span / median(seconds) for seconds in (everything, alone)]
    return name_of(cfg), *(f"{rate:.0f}" for rate in rates), ratio(everything, alone), f"{float(difference):.1e}"


def banded_row(cfg: t.Config, segments: int, repeats: int) -> Row:
    """The whole evaluation of one split by sliding windows and in one banded pass."""
    rt = runtime(cfg)
    data = random_data(cfg, (1 + segments * t.BAND_CHUNKS) * cfg.train_seq_len + 1)
    evaluator, model = t.Evaluator(data, cfg, rt), model_for(cfg, rt, trains=False)
    sliding, banded = alternating(
        repeats,
        lambda: evaluator.run(model, "sliding", cfg.eval_batch_seqs, "bench"),
        lambda: evaluator.run(model, "banded", cfg.eval_batch_seqs, "bench"),
    )
    rates = [f"{data.val_targets / median(seconds):.0f}" for seconds in (sliding, banded)]
    return name_of(cfg), data.val_targets, *rates, ratio(sliding, banded)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where text comes from: a folder of shards and a tokenizer; without them the demo corpus."""

    data: str = ""
    tokenizer: str = ""

    def changes(self) -> dict[str, Any]:
        """The config's fields for it."""
        return {"data_path": self.data, "tokenizer_path": self.tokenizer} if self.data else {"demo": 1}

    def config(self, **changes: Any) -> t.Config:
        """A config on this text; sizes that `changes` leaves out are the script's, not the demo's."""
        names = ("num_layers", "eval_batch_seqs", "bigram_dim")
        defaults = {name: getattr(t.Config, name) for name in names}
        return config(**self.changes() | defaults | {"val_loss_every": 0, "artifact_limit_bytes": 10**9} | changes)


def train_briefly(source: Source, sizes: dict[str, Any], path: str) -> int:
    """Train a model of these sizes on the text, store its weights at `path`; returns its parameter count."""
    cfg = source.config(**sizes)
    rt = runtime(cfg)
    data, model = t.open_data(cfg, rt), model_for(cfg, rt, trains=True)
    model.init_weights(cfg)
    model.refresh(False)
    trainer = t.Trainer(model, data, cfg, rt)
    for step in range(cfg.iterations):
        trainer.train_step(t.lr_scale_at(step, 0.0, 0.0, cfg), step)
    torch.save({name: p.detach() for name, p in model.named_parameters()}, path)
    return sum(p.numel() for p in model.parameters())


def score(source: Source, sizes: dict[str, Any], path: str, mode: str) -> tuple[float, float, int, int]:
    """(bpb, targets per second, targets, peak memory) of stored weights, or of an artifact (.ptz), in one mode."""
    cfg = source.config(**sizes)
    artifact = path.endswith(".ptz")
    if artifact:
        cfg = t.with_model_fields(cfg, t.read_artifact(Path(path))[0]["config"], path)
    cfg = dataclasses.replace(cfg, eval_artifact=path)
    rt = runtime(cfg)
    data = t.open_data(cfg, rt)
    if artifact:
        model = t.load_artifact(Path(path), cfg, rt, data.tokenizer_sha256)
    else:
        model = t.GPT(cfg, {}, rt.compute_dtype, rt.attention)
        model.load_state_dict(torch.load(path, weights_only=True))
    before = peak_bytes()
    result = t.Evaluator(data, cfg, rt).run(model, mode, cfg.eval_batch_seqs, "bench")
    return result.val_bpb, data.val_targets / result.seconds, data.val_targets, peak_bytes() - before


def modes_rows(source: Source, sizes: Sequence[dict[str, Any]], artifact: str = "") -> Iterator[Row]:
    """Both modes at several sizes: models trained here for a short time, and an artifact if there is one."""
    models: list[tuple[str, dict[str, Any], str]] = []
    for i, each in enumerate(sizes):
        path = str(Path(f"weights-{i}.pt").resolve())
        params = isolated(train_briefly, source, each, path)
        models.append((f"{each['model_dim']} wide, {params} parameters, {each['iterations']} steps", each, path))
    for name, each, path in [*models, *([(Path(artifact).name, {}, artifact)] if artifact else [])]:
        for mode in ("sliding", "banded"):
            bpb, rate, targets, memory = isolated(score, source, each, path, mode)
            yield name, mode, f"{bpb:.5f}", targets, f"{rate:.0f}", f"{memory / 1e6:.0f}"


def section_eval(args: argparse.Namespace) -> Iterator[str]:
    """Evaluation: exact against all positions, banded against exact, both modes on text."""
    cases = [(width, seq_len) for width in (128, 512) for seq_len in (256, 1024)]
    yield markdown(
        "Exact sliding window: scored span alone against all positions in last block, head and loss (stride 64)",
        "model | all: scored tokens/s | span: scored tokens/s | ratio | difference of mean NLL",
        (exact_row(sized(w, n), 8192 // n, 2 * args.repeats) for w, n in cases),
        "Targets: 1.12 at width 128, 1.08 at width 512.",
    )
    yield markdown(
        "Banded pass against the exact sliding window (stride 64)",
        "model | targets | sliding: tokens/s | banded: tokens/s | ratio",
        (banded_row(sized(128, n), segments, (args.repeats + 1) // 2) for n, segments in ((1024, 4), (256, 32))),
        "Targets: 7 at sequence 1024, 2 at sequence 256.",
    )
    sizes = [
        {"model_dim": w, "num_heads": w // 32, "num_kv_heads": w // 64, "train_seq_len": 256, "iterations": args.steps,
         "warmdown_iters": args.steps // 2, "train_batch_tokens": 4096, "num_layers": 11}
        for w in (64, 128, 256)
    ]  # fmt: skip
    source = Source(args.data, args.tokenizer)
    yield markdown(
        f"Both modes on {'the shards of --data' if args.data else 'the demo corpus'} (11 layers, sequence 256)",
        "model | mode | bpb | targets | tokens/s | peak memory, MB over the loaded model",
        modes_rows(source, sizes, args.artifact),
    )


# ---- muon ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def one_by_one(muon: t.Muon) -> None:
    """`Muon.step` of a single rank, without stacks: every matrix by itself, as the textbook has it."""
    group = muon.param_groups[0]
    for p in group["params"]:
        buffer = muon.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.mul_(group["momentum"]).add_(p.grad)
        update = p.grad.add(buffer, alpha=group["momentum"])
        if muon.equal_rows:
            update = update / (update.norm(dim=1, keepdim=True) + 1e-12)
        done = t.newton_schulz(update.unsqueeze(0), muon.steps, muon.rt.compute_dtype)[0]
        p.mul_(1 - group["lr"] * muon.decay)
        p.add_(done.to(p.dtype), alpha=-group["lr"] * max(1.0, p.size(0) / p.size(1)) ** 0.5)


def muon_row(cfg: t.Config, repeats: int) -> Row:
    """Muon on all matrices of a model: batched stacks against the loop, from the same weights and gradients."""
    rt = runtime(cfg)
    optimizers: list[t.Muon] = []
    for _ in range(2):
        named = model_for(cfg, rt, trains=False).named_parameters()
        params = [p for n, p in named if n.endswith("_proj.weight")]
        torch.manual_seed(1)
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        optimizers.append(t.Muon(params, cfg, rt))
    batched, looped = optimizers
    before = [p.detach().clone() for p in batched.param_groups[0]["params"]]
    batched.step()
    one_by_one(looped)
    pairs = list(zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True))
    moved = max(float((a - b).detach().abs().max()) for (a, _), b in zip(pairs, before, strict=True))
    apart = max(float((a - b).detach().abs().max()) for a, b in pairs)
    loop, stacks = alternating(repeats, lambda: one_by_one(looped), batched.step)
    times = [f"{1000 * median(seconds):.1f}" for seconds in (loop, stacks)]
    return f"{name_of(cfg)}: {len(pairs)} matrices", *times, ratio(loop, stacks), f"{apart:.1e}", f"{moved:.1e}"


def section_muon(args: argparse.Namespace) -> Iterator[str]:
    """Muon: stacks against the loop."""
    yield markdown(
        "Muon: batched stacks against one matrix after the other (the whole optimizer step)",
        "model | loop, ms | stacks, ms | ratio | largest difference | largest update",
        (muon_row(sized(width, 256), 2 * args.repeats) for width in (128, 512)),
        "Target: 1.5 at width 128.",
    )


# ---- train -----------------------------------------------------------------------------------------------------------
class Peak:
    """The machine's own peak: products of PEAK_SHAPE in the compute format, as many as take SECONDS_PER_PEAK."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Find out how many products a round needs."""
        m, k, n = PEAK_SHAPE
        self.a, self.b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        self.count = 1
        while (seconds := min(alternating(2, self)[0])) < SECONDS_PER_PEAK / 4:
            self.count *= 2
        self.count = max(1, round(self.count * SECONDS_PER_PEAK / seconds))
        self.flops = 2.0 * m * k * n * self.count

    def __call__(self) -> None:
        """One round."""
        for _ in range(self.count):
            self.a @ self.b


def train_rows(cfg: t.Config, repeats: int, compiled: bool) -> Iterator[Row]:
    """Training steps, alternating with products at the machine's peak: eager, and compiled if that is asked for."""
    trainers = [trainer_for(cfg, flag) for flag in ((False, True) if compiled else (False,))]
    peak = Peak(trainers[0].rt.compute_dtype)
    begun = time.perf_counter()
    for trainer in trainers:
        step(trainer)
    first = time.perf_counter() - begun
    top, *steps = alternating(repeats, peak, *(partial(step, trainer) for trainer in trainers))
    for trainer, seconds in zip(trainers, steps, strict=True):
        share = trainer.rank_flops / peak.flops * ratio(top, seconds)
        speeds = cfg.train_batch_tokens / median(seconds), trainer.rank_flops / median(seconds) / 1e12
        yield (name_of(cfg), "compiled" if trainer.rt.compile else "eager", f"{1000 * median(seconds):.0f}",
               f"{speeds[0]:.0f}", speeds[1], peak.flops / median(top) / 1e12, f"{share:.1%}")  # fmt: skip
    if compiled:
        print(f"(the first steps took {first:.1f} s, compilation included)", file=sys.stderr)


def step(trainer: t.Trainer) -> None:
    """One training step, at a learning rate that keeps the weights as they are for all purposes."""
    trainer.train_step(1e-3, trainer.step).tolist()
    trainer.step += 1


class Clock(TorchDispatchMode):
    """Seconds and calls of every operator, by its name and by name and shapes of its inputs. Used in place of
    torch.profiler, under which large tensors come from fresh memory in every step: it would measure page faults."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[tuple[str, str], float] = t.defaultdict(float)
        self.calls: dict[tuple[str, str], int] = t.defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and take its time."""
        begun = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        taken = time.perf_counter() - begun
        shapes = ", ".join(f"{tuple(x.shape)} {str(x.dtype)[6:]}" for x in args if isinstance(x, Tensor))
        for key in {(str(func), ""), (str(func), shapes)}:
            self.seconds[key] += taken
            self.calls[key] += 1
        return result


def profile(cfg: t.Config, rows: int = 20) -> Iterator[str]:
    """The operators that take most of an eager training step, forward and backward (which share a thread on a CPU)."""
    trainer = trainer_for(cfg)
    for _ in range(3):
        step(trainer)
    with Clock() as clock:
        step(trainer)
    by_name = {name: seconds for (name, shapes), seconds in clock.seconds.items() if not shapes}
    total = sum(by_name.values())
    for title, chosen in (
        ("operators", {(name, ""): seconds for name, seconds in by_name.items()}),
        ("operators and shapes", {key: seconds for key, seconds in clock.seconds.items() if key[1]}),
    ):
        slowest = sorted(chosen, key=lambda key: -chosen[key])[:rows]
        yield markdown(
            f"One eager step, {title}: {name_of(cfg)}, {1000 * total:.0f} ms in operators",
            "operator | inputs | calls | ms | share",
            ((*key, clock.calls[key], f"{1000 * chosen[key]:.1f}", f"{chosen[key] / total:.1%}") for key in slowest),
        )


def section_train(args: argparse.Namespace) -> Iterator[str]:
    """Training: share of the machine's own peak."""
    cases = [
        (sized(128, 256), 3 * args.repeats),
        (sized(128, 256, num_heads=2, num_kv_heads=1), 3 * args.repeats),
        (sized(512, 1024), args.repeats),
    ]
    yield markdown(
        f"Training, {8192} tokens a step: share of the machine's own peak",
        "model | mode | ms a step | tokens/s | TFLOP/s | peak TFLOP/s | share of the peak",
        (row for cfg, repeats in cases for row in train_rows(cfg, repeats, args.compiled)),
        f"Peak: products of {' x '.join(map(str, PEAK_SHAPE))}, alternating with the steps; "
        "FLOPs by `step_flops`. Targets: 35% at width 128, 55% at width 512.",
    )
    if args.profile:
        yield from profile(sized(128, 256))


# ---- scale -----------------------------------------------------------------------------------------------------------
def scale_config(base: t.Config, factor: int) -> t.Config:
    """`base` with `factor` times the tokens in a step, in as many more micro-batches."""
    batch = base.train_batch_tokens
    return dataclasses.replace(base, train_batch_tokens=factor * batch, micro_batch_tokens=batch)


def evaluation(cfg: t.Config, factor: int, mode: str) -> Work:
    """An evaluation of `factor` times 4 segments of the banded pass, 4 segments or EVAL_BATCH_SEQS windows a batch."""
    rt = runtime(cfg)
    data = random_data(cfg, (1 + 4 * factor * t.BAND_CHUNKS) * cfg.train_seq_len + 1)
    evaluator, model = t.Evaluator(data, cfg, rt), model_for(cfg, rt, trains=False)
    return lambda: evaluator.run(model, mode, cfg.eval_batch_seqs if mode == "sliding" else 4, "bench")


def work_of(base: t.Config, kind: str, factor: int) -> Work:
    """The work that is scaled: a training step, or an evaluation."""
    if kind == "training step":
        return partial(step, trainer_for(scale_config(base, factor)))
    return evaluation(base, factor, kind)


def memory_of(base: t.Config, kind: str, factor: int) -> int:
    """Peak memory of the work in this process, over what it held before."""
    work = work_of(base, kind, factor)
    before = peak_bytes()
    work()
    work()
    return peak_bytes() - before


def scale_rows(base: t.Config, factors: Sequence[int], repeats: int) -> Iterator[Row]:
    """Time and memory of more and more tokens."""
    for kind in ("training step", "sliding", "banded"):
        seconds = alternating(repeats, *(work_of(base, kind, factor) for factor in factors))
        for i, factor in enumerate(factors):
            grown = ratio(seconds[i], seconds[i - 1]) if i else "-"
            memory = isolated(memory_of, base, kind, factor)
            yield kind, f"{factor}x", f"{1000 * median(seconds[i]):.0f}", grown, f"{memory / 1e6:.0f}"


def section_scale(args: argparse.Namespace) -> Iterator[str]:
    """Twice the tokens: time and memory."""
    base = sized(128, 256)
    yield markdown(
        f"More tokens: {name_of(base)}; 8192 tokens a micro-batch, {4 * t.BAND_CHUNKS * 256} scored tokens at 1x",
        "work | tokens | ms | time over the row before | peak memory, MB over the start",
        scale_rows(base, (1, 2, 4, 8), args.repeats),
        "Target: 2.1 times the time for twice the tokens, and no more memory.",
    )


# ---- startup ---------------------------------------------------------------------------------------------------------
def corpus_seconds() -> list[float]:
    """Seconds to build the demo corpus, and to find it in its cache."""
    cfg, seconds = config(demo=1), list[float]()
    for _ in range(2):
        begun = time.perf_counter()
        t.prepare_corpus(cfg, lambda line: None)
        seconds.append(time.perf_counter() - begun)
    return seconds


def watched(settings: dict[str, Any], until: str) -> tuple[float, list[str]]:
    """Run the script; seconds from its launch to the first console line that starts with `until`, and all lines.
    Raises RuntimeError with what it said when it fails or never prints such a line."""
    values = {name.upper(): str(value) for name, value in settings.items()}
    command = [sys.executable, t.__file__]
    begun, seen, lines = time.perf_counter(), 0.0, list[str]()
    with subprocess.Popen(
        command, env=os.environ | values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not seen and line.startswith(until):
                seen = time.perf_counter() - begun
            lines.append(line.rstrip())
    if process.returncode or not seen:
        raise RuntimeError("\n".join([f"exit code {process.returncode}", *lines[-20:]]))
    return seen, lines


def section_startup(args: argparse.Namespace) -> Iterator[str]:
    """From the command to the first training step."""
    build, cached = isolated(corpus_seconds)
    settings = {"demo": 1, "iterations": 1, "eval_mode": "banded", "rate_control": 0, "error_feedback": 0}
    first = [watched(settings | {"run_id": f"startup-{i}"}, "step:1/")[0] for i in range(args.repeats)]
    rows: list[Row] = [
        ("demo corpus, the first time", build, 45),
        ("demo corpus, from its cache", cached, 2),
        ("DEMO=1 from launch to the end of step 1, corpus cached (median)", median(first), 10),
    ]
    yield markdown("Start-up", "what | seconds | target: at most", rows)


# ---- export ----------------------------------------------------------------------------------------------------------
def trained_like(cfg: t.Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, costs) with the statistics of trained ones: Gaussian rows whose sizes and costs vary."""
    torch.manual_seed(0)
    weights, costs = dict[str, Tensor](), dict[str, Tensor]()
    with FakeTensorMode():
        shapes = {name: tuple(p.shape) for name, p in t.GPT(cfg, {}, torch.float32).named_parameters()}
    for name, shape in shapes.items():
        sizes = 0.1 * torch.exp(0.3 * torch.randn((*shape[:1], *[1] * (len(shape) - 1))))
        weights[name], costs[name] = sizes * torch.randn(shape), torch.exp(torch.randn(shape[:1]))
    return weights, costs


def export_rows(cfg: t.Config, threads: Sequence[int]) -> Iterator[Row]:
    """The parts of an export, and the compression of its payload with different numbers of threads."""
    (weights, costs), path = trained_like(cfg), Path(f"{cfg.run_id}.ptz")
    marks = [time.perf_counter()]
    table = t.rate_table(weights, costs, {})
    plan = t.allocate(table, cfg.artifact_limit_bytes)
    marks.append(time.perf_counter())
    stored = t.quantize_state(weights, plan, cfg, lambda line: None, {})
    marks.append(time.perf_counter())
    path.write_bytes(t.encode_artifact(stored, plan, cfg, ""))
    size = path.stat().st_size
    marks.append(time.perf_counter())
    t.load_artifact(path, cfg, runtime(cfg), "")
    marks.append(time.perf_counter())
    steps = ("rate table and plan", "quantize", "write (pack, zstd-22 as the script does it)", "read again")
    for name, begin, end in zip(steps, marks, marks[1:], strict=False):
        yield name, end - begin, size if name.startswith("write") else "-"
    payload = t.artifact_payload(path)
    for number in threads:
        level = t.zstandard.ZstdCompressionParameters.from_level(
            t.ZSTD_LEVEL, write_checksum=True, min_match=7, window_log=14, threads=number  # as `encode_artifact` has it
        )  # fmt: skip
        begun = time.perf_counter()
        packed = t.zstandard.ZstdCompressor(compression_params=level).compress(payload)
        yield f"zstd-22 of {len(payload)} bytes, threads={number}", time.perf_counter() - begun, len(packed) + 8


def section_export(args: argparse.Namespace) -> Iterator[str]:
    """The full-size artifact, from random weights."""
    cfg = config(train_batch_tokens=2048 * 4, eval_artifact="-")
    yield markdown(
        f"Export of {name_of(cfg)} (random weights with the row statistics of trained ones)",
        "what | seconds | bytes of the file",
        export_rows(cfg, sorted({0, 1, 2, os.cpu_count() or 1})),
        "threads=0 is the single-threaded compressor, 1 the multi-threaded one with one worker.",
    )


# ---- compile ---------------------------------------------------------------------------------------------------------
def compile_rows(settings: dict[str, Any]) -> Iterator[Row]:
    """Start-up and losses: eager, compiled, and eager in float32, which shows how much rounding to bf16 does."""
    kinds: dict[str, dict[str, Any]] = {"eager": {"compile": 0}, "compiled": {"compile": 1},
                                        "eager, float32": {"compute_dtype": "float32"}}  # fmt: skip
    losses: dict[str, list[float]] = {}
    for kind, changes in kinds.items():
        settings = {**settings, "compile": 0, **changes, "run_id": re.sub(r"\W+", "-", f"compile {kind}")}
        begun, lines = watched(settings, "start_up")
        losses[kind] = numbers(lines, "step:", "train_loss")
        apart = max(abs(a - b) for a, b in zip(losses[kind], losses["eager"], strict=True))
        times = numbers(lines, "step:", "train_time")
        average = (times[-1] - times[0]) / max(1, len(times) - 1)
        yield kind, begun, f"{average:.0f}", " ".join(f"{x:.5f}" for x in losses[kind]), f"{apart:.1e}"


def section_compile(args: argparse.Namespace) -> Iterator[str]:
    """COMPILE=1 on a CPU: what it costs at the start, what it gains, whether the losses are the same."""
    source = random_data(sized(128, 256), 257)
    assert source.train is not None
    path = Path("compile.model").resolve()
    path.write_bytes(source.tokenizer.serialized_model_proto())
    settings = {
        "train_seq_len": 256, "num_layers": 11, "model_dim": 128, "train_batch_tokens": 8192, "iterations": 5,
        "data_path": source.train.paths[0].parent.resolve(), "tokenizer_path": path, "train_log_every": 1,
        "rate_control": 0, "error_feedback": 0, "eval_mode": "banded", "warmup_steps": 1, "val_loss_every": 0,
        "max_wallclock_seconds": 0,
    }  # fmt: skip
    yield markdown(
        "COMPILE=1 with TRAIN_SEQ_LEN=256 NUM_LAYERS=11 MODEL_DIM=128 TRAIN_BATCH_TOKENS=8192 WARMUP_STEPS=1",
        "mode | seconds from launch to the first timed step | ms a step | losses of 5 steps | largest difference",
        compile_rows(settings),
        "Targets: 60 s; a difference of the size that rounding to bf16 makes anyway (the row in float32).",
    )


# ---- paper -----------------------------------------------------------------------------------------------------------
class Traffic(TorchDispatchMode):
    """Bytes that operators read and write when none of them is fused with another; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count."""
        result = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [x for x in tree_leaves(values) if isinstance(x, Tensor)] for values in ((args, kwargs), result)
        )
        known = {x.untyped_storage()._cdata for x in inputs}
        fresh = [x for x in outputs if x.untyped_storage()._cdata not in known]
        if fresh or func._schema.is_mutable:
            moved = inputs + (fresh or outputs)
            self.bytes += sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in moved)
        return result


def counted(cfg: t.Config, seqs: int, kernel: str) -> tuple[dict[str, int], int]:
    """(FLOPs per operator, bytes that unfused operators move) of forward and backward of `seqs` sequences, counted on
    fake tensors: nothing is computed."""
    rt = dataclasses.replace(runtime(cfg), device=torch.device("cpu"), compute_dtype=torch.bfloat16, attention=kernel)
    with FakeTensorMode():
        model = t.GPT(cfg, {}, rt.compute_dtype, kernel)
        ids = torch.zeros(seqs, cfg.train_seq_len, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, Traffic() as traffic:
            with rt.autocast():
                loss = model.loss(ids, ids)
            loss.backward()
    return {str(op): int(flops) for op, flops in counter.get_flop_counts()["Global"].items()}, traffic.bytes


def saved_bytes(cfg: t.Config, rt: t.Runtime, seqs: int) -> int:
    """Bytes that the uncompiled forward keeps for the backward of `seqs` sequences, counted on fake tensors: nothing is
    computed. What is kept twice counts once, weights do not count."""
    kept: dict[int, tuple[int, Tensor]] = {}

    def note(x: Tensor) -> Tensor:
        """Count the memory behind a saved tensor."""
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes(), x
        return x

    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model = t.GPT(cfg, {}, rt.compute_dtype, rt.attention)
        own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        ids = torch.zeros(seqs, cfg.train_seq_len, dtype=torch.int64)
        with rt.autocast():
            loss = model.loss(ids, ids)
    assert loss.requires_grad
    return sum(size for key, (size, _) in kept.items() if key not in own)


def visible_keys(cfg: t.Config) -> float:
    """Mean keys per query whose scores `attend_in_chunks` computes; the formula counts half of the sequence."""
    length, chunk = cfg.train_seq_len, t.ATTENTION_CHUNK
    return sum(min(at + chunk, length) * min(chunk, length - at) for at in range(0, length, chunk)) / length


def counted_by_formula(cfg: t.Config) -> tuple[float, float]:
    """FLOPs per token by `step_flops`, and with the masked scores that whole chunks compute on top."""
    with FakeTensorMode():
        formula = t.step_flops(t.GPT(cfg, {}, torch.float32), cfg) / cfg.train_batch_tokens
    extra = 12.0 * cfg.num_layers * cfg.model_dim * (visible_keys(cfg) - cfg.train_seq_len / 2)
    return formula, formula + extra


def muon_flops(cfg: t.Config) -> int:
    """FLOPs of one Muon step over all matrices, counted on fake tensors."""
    with FakeTensorMode():
        named = t.GPT(cfg, {}, torch.float32).named_parameters()
        params = [p.detach() for n, p in named if n.endswith("_proj.weight")]
        with FlopCounterMode(display=False) as counter:
            for p in params:
                t.newton_schulz(p.unsqueeze(0), cfg.muon_backend_steps, torch.bfloat16)
    return counter.get_total_flops()


def paper_rows(cfg: t.Config, ranks: int) -> Iterator[Row]:
    """What one step asks of each of the ranks, and the time that it implies at an H100's ceilings."""
    tokens, length = cfg.train_batch_tokens // ranks, cfg.train_seq_len
    rt = dataclasses.replace(
        runtime(cfg), device=torch.device("cpu"), compute_dtype=torch.bfloat16, attention="sdpa"
    )
    with FakeTensorMode():
        params = sum(p.numel() for p in t.GPT(cfg, {}, torch.float32).parameters())
    formula, chunks = counted_by_formula(cfg)
    flops = sum(counted(cfg, 1, "chunks")[0].values()) / length
    one, two = (counted(cfg, seqs, "sdpa")[1] for seqs in (1, 2))
    saved_one, saved_two = (saved_bytes(cfg, rt, seqs) for seqs in (1, 2))
    yield "FLOPs, `step_flops`", tokens * formula, 1e3 * tokens * formula / H100_FLOPS
    yield ("FLOPs, `FlopCounterMode` (attention by chunks: masked scores count)", tokens * flops,
           1e3 * tokens * flops / H100_FLOPS)  # fmt: skip
    yield "FLOPs, the formula with the same masked scores", tokens * chunks, 1e3 * tokens * chunks / H100_FLOPS
    newton = muon_flops(cfg) / ranks
    yield "FLOPs of Newton-Schulz, a rank's share", float(newton), 1e3 * newton / H100_FLOPS
    for name, moved in {
        "bytes, no operator fused": (two - one) * tokens / length + 2 * one - two,
        "bytes, all fused: saved activations written and read once": 2.0 * (saved_two - saved_one) * tokens / length,
        "bytes of weights, gradients and optimizers (fp32: read 4, written 3)": 28.0 * params,
    }.items():
        yield name, float(moved), 1e3 * moved / H100_BYTES
    reduced = 2 * 4.0 * params * (ranks - 1) / ranks
    yield "bytes of the gradient all-reduce (ring, fp32)", reduced, 1e3 * reduced / NVLINK_BYTES


def section_paper(args: argparse.Namespace) -> Iterator[str]:
    """8xH100 on paper."""
    cfg, ranks = config(train_batch_tokens=t.Config.train_batch_tokens), 8
    yield markdown(
        f"8xH100 on paper: one step of {cfg.train_batch_tokens} tokens, {name_of(cfg)}, per GPU",
        "what | amount | ms at the ceiling",
        paper_rows(cfg, ranks),
        f"Computed, not measured, from fake tensors. Ceilings: {H100_FLOPS / 1e12:.0f} TFLOP/s dense bf16, "
        f"{H100_BYTES / 1e12:.2f} TB/s HBM, {NVLINK_BYTES / 1e9:.0f} GB/s NVLink. A step, {LOGGED_STEPS}.",
    )


# ---- recipes ---------------------------------------------------------------------------------------------------------
def recipe_row(sizes: dict[str, Any], repeats: int) -> Row:
    """A compiled step of the default, without and with fake quantization, against one of pr314; 8% of the default's
    steps are fake-quantized, all of pr314's."""
    sizes = sizes | {"bigram_dim": 64, "calibration_tokens": 4096, "artifact_limit_bytes": 10**7}
    default = trainer_for(config(**sizes), True)
    literal = trainer_for(config(recipe="pr314", **sizes), True)
    for trainer in (default, literal):
        trainer.step = 1
        trainer.start_qat()

    def step(trainer: t.Trainer, quantized: bool) -> None:
        """One step with a learning rate that changes next to nothing."""
        trainer.qat_active = quantized
        trainer.train_step(1e-6, 10)

    plain, late, other = alternating(
        repeats, lambda: step(default, False), lambda: step(default, True), lambda: step(literal, True)
    )
    share = 1 - default.cfg.qat_start_frac
    whole = [(1 - share) * a + share * b for a, b in zip(plain, late, strict=True)]
    times = (f"{1000 * median(seconds):.0f}" for seconds in (plain, late, other))
    return f"11 layers, width {sizes['model_dim']}", *times, ratio(whole, other)


def edited_row(sizes: dict[str, Any], name: str, repeats: int) -> Row:
    """A compiled step with the edits that a recipe of tests/ablate.py makes in the model, against the default's."""
    cfg = config(**sizes | {"bigram_dim": 64})
    works = (trainer_for(cfg, True, script) for script in (ablate.edited_module(name, Path(".")), t))
    edited, default = alternating(repeats, *(partial(trainer.train_step, 1e-6, 10) for trainer in works))
    times = (f"{1000 * median(seconds):.0f}" for seconds in (edited, default))
    return f"11 layers, width {sizes['model_dim']}", *times, f"{ratio(edited, default):.3f}"


def section_recipes(args: argparse.Namespace) -> Iterator[str]:
    """The default recipe's step against the literal design's, or an edited model's against the default's."""
    small = {"train_seq_len": 256, "model_dim": 128, "num_heads": 2, "num_kv_heads": 1}
    large = {"train_seq_len": 256, "model_dim": 256, "num_heads": 4, "num_kv_heads": 2}
    if args.edited:
        yield markdown(
            f"A training step with {args.edited} and without (8,192 tokens, compiled)",
            "model | edited, ms | default, ms | edited / default",
            (edited_row(sizes, args.edited, 4 * args.repeats) for sizes in (small, large)),
        )
        return
    yield markdown(
        "A training step of the default and of RECIPE=pr314 (8,192 tokens, compiled)",
        "model | default, ms | with fake quantization, ms | pr314, ms | default / pr314",
        (recipe_row(sizes, 4 * args.repeats) for sizes in (small, large)),
        "Target: at most 1.05.",
    )


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "eval": section_eval,
    "muon": section_muon,
    "train": section_train,
    "recipes": section_recipes,
    "scale": section_scale,
    "startup": section_startup,
    "export": section_export,
    "compile": section_compile,
    "paper": section_paper,
}


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; paths become absolute, because the work is done in a scratch folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"some of: {' '.join(SECTIONS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the long comparisons (short ones: more)")
    parser.add_argument("--compiled", action="store_true", help="train: COMPILE=1 beside eager")
    edits = [name for name, recipe in ablate.RECIPES.items() if recipe.edits and not recipe.forks]
    parser.add_argument("--edited", default="", choices=["", *edits], help="recipes: a change of tests/ablate.py")
    parser.add_argument("--profile", action="store_true", help="train: time by operator, too")
    parser.add_argument("--steps", type=int, default=150, help="eval: training steps of the models to score")
    parser.add_argument("--data", default="", help="eval: folder of shards instead of the demo corpus")
    parser.add_argument("--tokenizer", default="", help="eval: their SentencePiece model")
    parser.add_argument("--artifact", default="", help="eval: an artifact (.ptz) to score, too")
    args = parser.parse_args(words)
    if unknown := set(args.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    if bool(args.data) != bool(args.tokenizer):
        parser.error("--data and --tokenizer belong together")
    for name in ("data", "tokenizer", "artifact"):
        value = getattr(args, name)
        setattr(args, name, str(Path(value).resolve()) if value else "")
    return args


def main() -> int:
    """Print the tables of the chosen sections."""
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        os.chdir(folder)
        rt = runtime(config())
        print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs, "
              f"{rt.compute_dtype}, attention by {rt.attention}, medians of {args.repeats} rounds\n")  # fmt: skip
        for name in args.sections or SECTIONS:
            begun = time.perf_counter()
            for text in SECTIONS[name](args):
                print(text, flush=True)
            print(f"({name}: {time.perf_counter() - begun:.0f} s)\n", flush=True)
        os.chdir(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
