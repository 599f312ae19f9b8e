"""What the tests share: a tiny config, a tiny corpus, and the script as a subprocess."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt as t  # noqa: E402

SIZES: dict[str, Any] = {
    "num_layers": 3,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 2,
    "vocab_size": 320,
    "bigram_vocab_size": 64,
    "bigram_dim": 16,
    "train_seq_len": 32,
    "train_batch_tokens": 256,
    "iterations": 6,
    "warmdown_iters": 4,
    "warmup_steps": 0,
    "max_wallclock_seconds": 0.0,
    "val_loss_every": 0,
    "train_log_every": 1,
    "val_batch_size": 1024,
    "eval_stride": 8,
    "swa_every": 1,
    "muon_momentum_warmup_steps": 10,
    "compute_dtype": "float32",
    "rate_control": False,
    "calibration_tokens": 2048,
    "swa_always": True,
    "qat_start_frac": 0.0,
    "mlp_prune_frac": 0.05,
    "prune_frac": 0.03,
}


@cache
def corpus() -> Path:
    """A folder with tokenizer.model (320 pieces) and shards of made-up text; the same text every time."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(400)]
    extra = ["caf\u00e9", "\u65e5\u672c", "\U0001f600", "42", "x=1", "\u03b1"]
    documents = [" ".join(rng.choices(words + extra, k=120)) for _ in range(80)]
    folder = Path(tempfile.mkdtemp(prefix="train-gpt-tests-")) / "corpus"
    t.build_corpus(documents, folder, SIZES["vocab_size"])
    return folder


def environment(**changes: Any) -> dict[str, str]:
    """The variables of a tiny run on `corpus()`, with `changes` (in lower case; None removes)."""
    values = SIZES | {"data_path": corpus(), "tokenizer_path": corpus() / "tokenizer.model"} | changes
    return {k.upper(): str(int(v) if isinstance(v, bool) else v) for k, v in values.items() if v is not None}


def config(**changes: Any) -> t.Config:
    """The same as a config."""
    return t.load_config(environment(**changes))[0]


class SilentRuntime(t.Runtime):
    """A CPU runtime without a process group, which keeps its log lines."""

    def __init__(self, rank: int, world_size: int, compiles: bool) -> None:
        self.rank, self.world_size = rank, world_size
        self.device, self.compute_dtype = torch.device("cpu"), torch.float32
        self.compiles, self.flash3 = compiles, False
        self.lines: list[str] = []

    def log(self, line: str, console: bool = True) -> None:
        """Keep the line."""
        self.lines.append(line)

    def open_log(self, mode: str) -> None:
        """There is no file."""


def runtime(rank: int = 0, world_size: int = 1, compiles: bool = False) -> SilentRuntime:
    """A silent CPU runtime without a process group."""
    return SilentRuntime(rank, world_size, compiles)


def plan_for(cfg: t.Config) -> t.Plan:
    """The fixed grids of a config."""
    weights = dict(t.GPT(cfg, torch.float32).named_parameters())
    return t.grids_for_bytes(weights, {}, {}, cfg, 0)  # without costs


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Token ids (N,) as one shard."""
    header = t.SHARD_HEADER.pack(t.SHARD_MAGIC, t.SHARD_VERSION, len(tokens))
    path.write_bytes(header + tokens.astype("<u2").tobytes())


def batch(trainer: t.Trainer) -> list[torch.Tensor]:
    """The micro-batches, (sequences, TRAIN_SEQ_LEN + 1) each, that the next step of a trainer reads."""
    found: list[torch.Tensor] = []
    forward = trainer.forward

    def noted(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The forward, with a note of what it got."""
        found.append(torch.cat((inputs, targets[:, -1:]), dim=1))
        return forward(inputs, targets)

    trainer.forward, trainer.optimizers, optimizers = noted, {}, trainer.optimizers
    trainer.train_step(0.0)
    trainer.forward, trainer.optimizers = forward, optimizers
    return found


def mlp_grids(cfg: t.Config) -> t.Plan:
    """Those that the MLP trains on."""
    return {name: grid for name, grid in plan_for(cfg).items() if t.category(name) == "mlp"}


def model_for(cfg: t.Config, qat: bool = True, seed: int = 0) -> t.GPT:
    """An initialised model whose zero-initialised parts are filled with noise, so that every part matters."""
    torch.manual_seed(seed)
    model = t.GPT(cfg, torch.float32)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.refresh(mlp_grids(cfg) if qat else {})
    return model


def load_weights(model: t.GPT, weights: t.Tensors, grids: t.Plan) -> None:
    """Take over all weights, and the grids that the MLP trains on (empty: none)."""
    model.load_state_dict(weights)
    model.refresh(grids)


def load_artifact(path: Path, cfg: t.Config, rt: t.Runtime) -> t.GPT:
    """The model of an artifact."""
    cfg, stored, _ = t.decode_artifact(rt.from_rank_0(path.read_bytes), str(path), cfg)
    model = t.GPT(cfg, rt.compute_dtype)
    load_weights(model, {name: tensor.dequantize() for name, tensor in stored.items()}, {})
    return model


def run(cwd: Path, ranks: int = 0, **changes: Any) -> subprocess.CompletedProcess[str]:
    """The script in `cwd` with a clean environment; under torchrun where `ranks` is not 0."""
    env = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "TMPDIR", "OPENBLAS_CORETYPE") if k in os.environ}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *launcher, str(ROOT / "train_gpt.py")]
    env |= environment(**changes) | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def values(output: str, key: str) -> list[float]:
    """All numbers that stand behind `key:` in an output, in order."""
    return [float(word.split(":", 1)[1]) for word in output.split() if word.startswith(key + ":")]


def hidden(model: t.GPT, ids: torch.Tensor) -> torch.Tensor:
    """Final hidden states (B, T, model_dim) of token ids (B, T), before the output head."""
    found: list[torch.Tensor] = []
    linear = t.F.linear

    def catch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Note what goes into the head."""
        if weight.shape == model.embed.weight.shape and x.size(-1) == weight.size(1):
            found.append(x)
        return linear(x, weight)

    t.F.linear = catch
    try:
        model(ids, ids)
    finally:
        t.F.linear = linear
    return found[-1]
