"""Train, quantize, compress and score a language model in 16,000,000 bytes (Parameter Golf), in one file.

"11L Int4 MLP QAT + BigramHash(10240) + SWA": an 11-layer U-Net-skip transformer of 33,645,677 parameters, whose MLP
ends its training under straight-through fake quantization. All matrices are rounded to grids that fill the limit,
stored in one zstd-22 frame, read back and scored: the last line of the log is the score of the file on disk.

    DEMO=1 python train_gpt.py                              a laptop: no download, a few minutes on 2 CPU cores
    torchrun --standalone --nproc_per_node=8 train_gpt.py   the challenge: 8xH100, FineWeb shards at DATA_PATH
    EVAL_ARTIFACT=logs/RUN.ptz python train_gpt.py          score an artifact again, without training

Settings are environment variables, not arguments: every field of `Config`. logs/RUN_ID.txt is the log of a run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import glob
import hashlib
import inspect
import io
import itertools
import json
import math
import operator
import os
import re
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

try:
    from flash_attn_interface import flash_attn_func  # FlashAttention 3, for Hopper GPUs
except ImportError:
    flash_attn_func = None

CODE_BYTES = Path(__file__).stat().st_size  # now: an edit during a run must not change its artifact

# ---- Config ----------------------------------------------------------------------------------------------------------

CHECKS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
PARSERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: bool(["0", "1"].index(text)), "0 or 1"),
    int: (lambda text: int(text.removesuffix(".0")), "a whole number"),  # MLP_MULT=3.0 is one
    float: (float, "a finite number"),
}


def knob(default: Any, meaning: str, *bounds: str) -> Any:
    """A field, its meaning (for logs/VARIABLES.md) and its bounds, such as ">= 1", or choices, such as "= 0 1"."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "bounds": bounds})


@dataclasses.dataclass(frozen=True)
class Config:
    """All hyperparameters; the environment variable of a field is its name in upper case."""

    # data
    data_path: str = knob("./data/datasets/fineweb10B_sp1024", "folder with fineweb_train_*.bin and fineweb_val_*.bin")
    tokenizer_path: str = knob("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of the shards")
    text_files: str = knob("", "glob of UTF-8 text files: build shards and tokenizer from them instead")
    demo: bool = knob(False, "1: train on the documentation that Python, NumPy and PyTorch ship, at CPU sizes")
    recipe: str = knob("", "small: values for short runs; pr314: those of pull request 314", "= pr314 small")
    sequence_order: str = knob("spread", "spread: each batch covers all data; file: as it stands", "= spread file")
    # run
    run_id: str = knob("", "name of log and artifact in logs/ (default: date, time and a random suffix)")
    dry_run: bool = knob(False, "1: check data and settings, print the plan and stop; on CUDA with the warm-up")
    checkpoint_every: float = knob(0.0, "seconds of training between checkpoints, inside the clock (0 = off)", ">= 0")
    resume: bool = knob(False, "1: continue RUN_ID from its newest checkpoint, or export its .weights, or start it")
    export_from: str = knob("", "path of logs/RUN_ID.weights: export and score these weights, no training")
    eval_artifact: str = knob("", "path of an artifact: score it and stop, no training")
    seed: int = knob(42, "seed of the initial weights", ">= 0")
    attention: str = knob("auto", "auto: FlashAttention 3 where it can run; sdpa: PyTorch's", "= auto sdpa")
    compute_dtype: str = knob("auto", "auto: bfloat16 on a GPU that computes in it", "= auto bfloat16 float32")
    compile: str = knob("auto", "torch.compile: 1, 0, or auto (on CUDA only)", "= auto 0 1")
    # schedule
    iterations: int = knob(20000, "training steps at most", ">= 1")
    max_wallclock_seconds: float = knob(600.0, "training time at most, validation excluded (0 = no cap)", ">= 0")
    warmup_steps: int = knob(20, "untimed steps that compile everything, undone afterwards (with a cap >= 1)", ">= 0")
    warmdown_frac: float = knob(0.6, "share of steps or cap in which the learning rate falls to 0", ">= 0", "<= 1")
    warmdown_iters: int = knob(-1, "the same in steps or their worth of time (-1: WARMDOWN_FRAC counts)", ">= -1")
    train_batch_tokens: int = knob(786432, "tokens per step over all ranks", ">= 1")
    train_seq_len: int = knob(2048, "tokens per sequence, in training and evaluation", ">= 1", "<= 131072")
    micro_batch_tokens: int = knob(0, "tokens per forward and rank at most (0: 98,304 on CUDA, else 16,384)", ">= 0")
    val_batch_size: int = knob(524288, "tokens per batch of validation during training, over all ranks", ">= 1")
    val_loss_every: int = knob(2000, "validate every N steps (0 = at the end only)", ">= 0")
    train_log_every: int = knob(100, "log the training loss every N steps", ">= 1")
    # evaluation
    eval_stride: int = knob(64, "stride of the final sliding window (0 = plain windows)", ">= 0")
    eval_batch_seqs: int = knob(32, "windows per batch and rank in the final evaluation", ">= 1")
    eval_float: bool = knob(False, "1: score the float weights that are exported, too (shows the quantization gap)")
    # model
    num_layers: int = knob(11, "transformer blocks", ">= 1", "<= 1000")
    model_dim: int = knob(512, "width of the residual stream", ">= 1")
    num_heads: int = knob(8, "query heads", ">= 1")
    num_kv_heads: int = knob(4, "key/value heads", ">= 1")
    mlp_mult: int = knob(4, "MLP hidden size over MODEL_DIM", ">= 1")
    relu_slope: float = knob(0.5, "slope of the ReLU below zero, before it is squared", ">= 0", "<= 1")
    xsa_layers: int = knob(11, "last layers with exclusive self-attention, XSA (11: all)", ">= 0")
    value_residual: bool = knob(True, "1: later layers mix the first one's values into their own")
    vocab_size: int = knob(1024, "tokens of the tokenizer", ">= 1", "<= 65536")
    tie_embeddings: bool = knob(True, "1: the output head is the token embedding; there is no other", "= True")
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial token embedding", ">= 0")
    rope_base: float = knob(10000.0, "base of the rotary frequencies", "> 0")
    rope_dims: int = knob(16, "dimensions of each head that RoPE rotates, at most (0: all)", ">= 0")
    ln_scale: bool = knob(True, "1: the norms of a block are scaled by 1 / sqrt(layer + 1)")
    logit_softcap: float = knob(30.0, "logits are c * tanh(x / c)", "> 0")
    qk_gain_init: float = knob(5.0, "initial gain per query head")
    bigram_vocab_size: int = knob(10240, "buckets of the bigram hash embedding", ">= 2")
    bigram_dim: int = knob(128, "width of the bigram hash embedding", ">= 1")
    # optimizers
    tied_embed_lr: float = knob(0.042, "learning rate of the tied token embedding and of the bigram table", ">= 0")
    matrix_lr: float = knob(0.028, "learning rate of Muon (matrices of the blocks, bigram projection)", ">= 0")
    scalar_lr: float = knob(0.028, "learning rate of gains, scales, gates and value mixes", ">= 0")
    weight_decay: float = knob(0.09, "decoupled weight decay of matrices and embeddings", ">= 0")
    scalar_weight_decay: float = knob(0.02, "the same of gains, scales, gates and value mixes", ">= 0")
    muon_momentum: float = knob(0.99, "Nesterov momentum of Muon after its warm-up", ">= 0", "< 1")
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", ">= 1")
    muon_momentum_warmup_start: float = knob(0.92, "momentum of Muon at step 0", ">= 0", "< 1")
    muon_momentum_warmup_steps: int = knob(1500, "steps until MUON_MOMENTUM is reached", ">= 0")
    muon_momentum_end: float = knob(0.85, "momentum of Muon where the warmdown ends", ">= 0", "< 1")
    muon_eq: bool = knob(True, "1: rows of a Muon update get equal norms before Newton-Schulz (MuonEq-R)")
    beta1: float = knob(0.9, "AdamW beta 1", ">= 0", "< 1")
    beta2: float = knob(0.95, "AdamW beta 2", ">= 0", "< 1")
    adam_eps: float = knob(1e-8, "AdamW epsilon", "> 0")
    grad_clip_norm: float = knob(0.3, "global gradient norm limit (0 = off)", ">= 0")
    # weight averaging and quantization
    swa_enabled: bool = knob(True, "1: average weights over the warmdown (SWA)")
    swa_start_frac: float = knob(0.4, "snapshots below this lr_scale; QAT drops older ones", ">= 0", "<= 1")
    swa_every: int = knob(50, "steps between snapshots", ">= 1")
    swa_always: bool = knob(False, "1: export the average, if any; 0: it or the last weights, by their loss")
    qat_start_frac: float = knob(0.8, "share of steps or cap done when QAT starts (1 = never)", ">= 0", "<= 1")
    rate_control: bool = knob(True, "1: one step size for all matrices, such that the limit is filled; 0: fixed bits")
    calibration_tokens: int = knob(65536, "training tokens that weigh errors and choose the weights", ">= 1")
    mlp_bits: int = knob(4, "bits of MLP codes at most (8: free)", ">= 2", "<= 8")
    attn_bits: int = knob(0, "bits of attention codes at most (0: 8, without RATE_CONTROL 5)", "= 2 3 4 5 6 7 8")
    bigram_bits: int = knob(0, "bits of bigram codes at most (0: 8, without RATE_CONTROL 5)", "= 2 3 4 5 6 7 8")
    mlp_prune_frac: float = knob(0.0, "share of smallest MLP weights set to zero before export", ">= 0", "< 1")
    prune_frac: float = knob(0.0, "the same for other matrices of over 65,536 elements", ">= 0", "< 1")
    artifact_limit_bytes: int = knob(16_000_000, "limit for code plus model, decimal bytes", ">= 1")


MODEL_FIELDS = """
    num_layers model_dim num_heads num_kv_heads mlp_mult vocab_size rope_base bigram_dim logit_softcap
    bigram_vocab_size train_seq_len relu_slope xsa_layers value_residual rope_dims ln_scale
""".split()  # what an artifact must know to build its model
MAY_CHANGE_ON_RESUME = """
    resume dry_run checkpoint_every data_path tokenizer_path micro_batch_tokens val_loss_every train_log_every attention
    val_batch_size eval_float eval_batch_seqs text_files demo
""".split()

# RoPE, norms, gain: what short runs say is better (logs/ABLATIONS.md); rates and decay as before.
SMALL = """
    ROPE_DIMS=0 LN_SCALE=0 QK_GAIN_INIT=1.5 TIED_EMBED_LR=0.03 MATRIX_LR=0.02 SCALAR_LR=0.02 WEIGHT_DECAY=0.04
"""
PR314 = f"""
    {SMALL} MLP_BITS=4 ATTN_BITS=6 RELU_SLOPE=0 QAT_START_FRAC=0 RATE_CONTROL=0 SWA_ALWAYS=1 WARMDOWN_ITERS=2500
    PRUNE_FRAC=0.03 MLP_PRUNE_FRAC=0.05 BIGRAM_BITS=6 XSA_LAYERS=0 VALUE_RESIDUAL=0 MUON_EQ=0 MUON_MOMENTUM_END=0.99
    SEQUENCE_ORDER=file MLP_MULT=3 VAL_LOSS_EVERY=500 SCALAR_WEIGHT_DECAY=0.04
"""
DEMO = f"""
    {SMALL} ITERATIONS=260 MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=0 WARMDOWN_ITERS=-1 SWA_EVERY=5 EVAL_FLOAT=1
    ARTIFACT_LIMIT_BYTES=980000 TRAIN_BATCH_TOKENS=2048 TRAIN_SEQ_LEN=256 VAL_BATCH_SIZE=16384 VAL_LOSS_EVERY=100
    NUM_LAYERS=6 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 BIGRAM_DIM=64 TRAIN_LOG_EVERY=20
    MUON_MOMENTUM_WARMUP_STEPS=150 CALIBRATION_TOKENS=16384
"""
PRESETS = {("RECIPE", "small"): SMALL, ("RECIPE", "pr314"): PR314, ("DEMO", "1"): DEMO}  # the later one wins
EXCLUSIVE = """
    DEMO+TEXT_FILES+DATA_PATH DEMO+TEXT_FILES+TOKENIZER_PATH EVAL_ARTIFACT+EXPORT_FROM+RESUME EVAL_ARTIFACT+EVAL_FLOAT
""".split()  # of each group only one may be set
FOREIGN = r"""
    WEIGHT_DECAY=(MUON|ADAMW?|EMBED)_(WD|WEIGHT_DECAY) QAT_START_FRAC=(LATE_)?QAT(_ENABLED|_THRESHOLD|_FRACTION)?
    XSA_LAYERS=XSA_LAST_N MLP_MULT=MLP_HIDDEN RELU_SLOPE=(MLP|LEAKY)\w*_SLOPE SWA_ENABLED=EMA_\w+ DATA_PATH=DATA_DIR
    BIGRAM_VOCAB_SIZE=BIGRAM_\w*BUCKETS TRAIN_SEQ_LEN=EVAL_SEQ_LEN TIED_EMBED_LR=(EMBED|HEAD)_LR EVAL_STRIDE=SLIDING_\w+
    MLP_BITS=(MATRIX|QUANT|QAT|EMBED)_BITS WARMDOWN_ITERS=WARMDOWN_STEPS ROPE_BASE=ROPE_THETA nothing=COMPRESSOR
    nothing=(TTT|VE|LQER|MTP|GPTQ|SMEAR|PLAN)_\w+|\w+_CLIP_SIGMAS|ERROR_FEEDBACK|CALIBRATION_RESERVE|EVAL_MODE
""".split()  # nearest setting here, and the names that other scripts or older versions read


def load_config(environ: Mapping[str, str]) -> tuple[Config, list[str]]:
    """(config, warnings) from environment, DEMO, RECIPE, defaults, in this order. ValueError with all problems."""
    defaults = {f.name.upper(): f.default for f in dataclasses.fields(Config)}
    texts: dict[str, str] = {}
    for (name, text), preset in PRESETS.items():
        if environ.get(name) == text:
            texts |= dict(word.split("=") for word in preset.split())
    texts |= {name: text for name, text in environ.items() if name in defaults}
    values: dict[str, Any] = {}
    problems, warnings = [], []
    for name, text in texts.items():
        parse, expected = PARSERS.get(type(defaults[name]), (str, "text"))
        try:
            values[name.lower()] = value = parse(text)
            if not isinstance(value, str) and not abs(value) < 2**63:  # nan, infinite or absurd
                raise ValueError
        except ValueError:
            problems.append(f"{name}={text!r}: expected {expected}")
    given = {name for name, text in environ.items() if text not in ("", "0")}
    for group in EXCLUSIVE:
        if len(both := given & {*group.split("+")}) > 1:
            problems.append(f"{' and '.join(sorted(both))} exclude each other: remove one")
    if values.get("resume") and not values.get("run_id"):
        problems.append("RESUME=1 needs RUN_ID, the run to continue")
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environ.get(name, "1") != "1" and not ("RANK" in environ or values.get("dry_run")):
            problems.append(f"{name}={environ[name]} without torchrun means several runs of one rank: unset it")
    values["run_id"] = values.get("run_id") or time.strftime("%Y%m%d-%H%M%S-") + os.urandom(2).hex()
    cfg = Config(**values)
    problems += config_problems(cfg)
    for name in sorted(environ.keys() - defaults.keys()):
        if nearest := [group.split("=")[0] for group in FOREIGN if re.fullmatch(group.split("=")[1], name)]:
            warnings.append(f"{name} has no effect here; nearest setting: {nearest[0]}")
        elif close := difflib.get_close_matches(name.upper(), defaults, n=1, cutoff=0.85):
            warnings.append(f"environment variable {name} is not known; did you mean {close[0]}?")
    if cfg.warmdown_iters >= 0 and "WARMDOWN_FRAC" in environ:
        warnings.append(f"WARMDOWN_FRAC has no effect beside WARMDOWN_ITERS={cfg.warmdown_iters}: set that to -1")
    if cfg.warmdown_iters > cfg.iterations:
        warnings.append(f"WARMDOWN_ITERS={cfg.warmdown_iters} is over ITERATIONS: the full rates are never reached")
    if problems:
        raise ValueError("the configuration cannot run:\n  " + "\n  ".join(problems))
    return cfg, warnings


def config_problems(cfg: Config) -> list[str]:
    """Everything that is wrong with a config, each with the value and the remedy; empty when it is sound."""
    wrong = {}
    for f in dataclasses.fields(cfg):
        if type(getattr(cfg, f.name)) is not type(f.default):  # in a forged file
            return [f"{f.name.upper()}={getattr(cfg, f.name)!r} is no {type(f.default).__name__}"]
        for bound in f.metadata["bounds"]:
            sign, *limits = bound.split()
            if sign == "=" and str(getattr(cfg, f.name)) not in (str(f.default), *limits):
                wrong[f.name] = f"is none of {', '.join(limits)}"
            if sign != "=" and not CHECKS[sign](getattr(cfg, f.name), float(limits[0])):
                wrong[f.name] = f"must be {bound}"
    if not re.fullmatch(r"[\w-][\w.-]*", cfg.run_id):
        wrong["run_id"] = "becomes a file name: letters, digits, - _ ."
    if not wrong.keys() & {"num_heads", "num_kv_heads", "train_seq_len"}:  # what follows divides by these
        if cfg.model_dim % (2 * cfg.num_heads):
            wrong["model_dim"] = f"must be a multiple of 2 * NUM_HEADS={cfg.num_heads}"
        if cfg.num_heads % cfg.num_kv_heads:
            wrong["num_heads"] = f"must be a multiple of NUM_KV_HEADS={cfg.num_kv_heads}"
        if cfg.train_batch_tokens % cfg.train_seq_len:
            wrong["train_batch_tokens"] = f"must be a multiple of TRAIN_SEQ_LEN={cfg.train_seq_len}"
        if cfg.eval_stride > cfg.train_seq_len:
            wrong["eval_stride"] = f"is over TRAIN_SEQ_LEN={cfg.train_seq_len}: targets would be skipped"
    return [f"{name.upper()}={getattr(cfg, name)!r} {remedy}" for name, remedy in wrong.items()]


# ---- Runtime ---------------------------------------------------------------------------------------------------------


class Runtime:
    """Device and number format of this process, its log, and what it does together with torchrun's other ranks."""

    def __init__(self, cfg: Config) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))  # without torchrun: what a dry run plans for
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        prefix = "eval-" if cfg.eval_artifact else "plan-" if cfg.dry_run else ""
        self.log_path = Path("logs", f"{prefix}{cfg.run_id}.txt")
        self.log_path.parent.mkdir(exist_ok=True)
        self.log_file: Any = io.StringIO()  # until `open_log`
        if self.rank == 0 and Path("logs", f"{cfg.run_id}.txt").exists() and not (cfg.resume or cfg.eval_artifact):
            raise ValueError(f"RUN_ID={cfg.run_id} has a log: choose another RUN_ID, or go on with RESUME=1")
        if "RANK" in os.environ:
            # gloo sleeps where NCCL would spin; the prefix hides addresses from before a restart (PyTorch issue 135712)
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(restarts, next(dist.rendezvous("env://"))[0])
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size)
        auto = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        self.compute_dtype = {"auto": auto, "bfloat16": torch.bfloat16, "float32": torch.float32}[cfg.compute_dtype]
        self.compiles = {"auto": cuda, "1": True, "0": False}[cfg.compile]
        # Before Inductor is imported: in PyTorch 2.11 this fusion cost 5.9 ms a step (pull request 1420).
        os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")
        hopper = cuda and torch.cuda.get_device_capability()[0] == 9
        fits = hopper and self.compute_dtype == torch.bfloat16 and cfg.model_dim // cfg.num_heads in range(8, 257, 8)
        self.flash3 = cfg.attention == "auto" and flash_attn_func is not None and fits

    def open_log(self, mode: str) -> None:
        """The run can start: write what was logged so far, and all that follows, to a file that it alone may write."""
        if self.rank == 0:
            early, self.log_file = self.log_file, self.log_path.open(mode, encoding="utf-8")
            try:
                fcntl: Any = __import__("fcntl")  # not on Windows
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.log_path} is of a run that is alive: choose another RUN_ID") from None
            except (OSError, ImportError):
                pass  # some file systems have no locks
            self.log_file.write(early.getvalue())

    def log(self, line: str, console: bool = True) -> None:
        """Rank 0: to the log file and the console."""
        if self.rank == 0:
            for file in [self.log_file, sys.stdout][: 1 + console]:
                with contextlib.suppress(OSError):  # a full disk or a closed pipe ends no training
                    print(line, file=file, flush=True)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if dist.is_initialized():
            dist.all_reduce(tensor)
        return tensor

    def from_rank_0(self, make: Callable[[], Any]) -> Any:
        """`make()` run on rank 0 alone; every rank gets its (picklable) result."""
        box = [make() if self.rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]


def write_atomically(path: Path, content: bytes) -> None:
    """Write, fsync, rename: `path` is the old file or the whole new one. Raises OSError when the disk is full."""
    scratch = path.with_name(f"{path.name}.tmp{os.getpid()}")  # other runs may build the same corpus
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise OSError(f"{path} was not written: {error}") from None
    finally:
        scratch.unlink(missing_ok=True)


# ---- Data ------------------------------------------------------------------------------------------------------------

SHARD_HEADER = struct.Struct("<iii1012x")  # magic, version, number of tokens, padding to 1,024 bytes
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
CHECKED_TOKENS = 65536  # at each end of a training shard, at start
DOCUMENT_CHARS = 4096  # of the pieces into which text is cut; smaller ones where it is little
HELD_OUT_CHARS = 100_000  # for validation, or a twentieth of the text where that is less
TOKENIZER_OPTIONS = """
    model_type=bpe byte_fallback=true split_digits=true add_dummy_prefix=false normalization_rule_name=nmt_nfkc pad_id=0
    bos_id=1 eos_id=2 unk_id=3 max_sentence_length=1048576 num_threads=1 minloglevel=2
"""


def open_shard(path: Path) -> np.ndarray:
    """The uint16 tokens of one shard, memory-mapped. Raises ValueError for a header or size that is not a shard's."""
    with path.open("rb") as file:
        header = file.read(SHARD_HEADER.size).ljust(SHARD_HEADER.size, b"\0")
    magic, version, num_tokens = SHARD_HEADER.unpack(header)
    size, expected = path.stat().st_size, SHARD_HEADER.size + 2 * num_tokens
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or num_tokens < 1 or size != expected:
        raise ValueError(f"{path} is damaged, truncated or no token shard: download it again or remove it")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER.size, shape=(num_tokens,))


class TokenShards:
    """Shards as one sequence of tokens; `checked` at both ends of each are read at once. ValueError, OSError."""

    def __init__(self, pattern: str, vocab_size: int, checked: int) -> None:
        self.vocab_size = vocab_size
        self.paths = list(map(Path, sorted(glob.glob(pattern))))
        if not self.paths:
            raise FileNotFoundError(f"no shards match {pattern}: set DATA_PATH")
        if odd := [path for path in self.paths if not re.fullmatch(r"fineweb_(train|val)_\d+\.bin", path.name)]:
            raise ValueError(f"{odd[0]} is no shard by its name: data with byte counts cannot be scored; move others")
        self.shards = list(map(open_shard, self.paths))
        self.starts = np.cumsum([0, *map(len, self.shards)])
        self.total = int(self.starts[-1])
        digest = hashlib.sha256(self.starts.tobytes())
        for start, end in itertools.pairwise(self.starts.tolist()):
            for first in sorted({start, max(start, end - checked)}):
                digest.update(self.read(first, min(checked, end - first)).numpy().data)
        self.sha256 = digest.hexdigest()  # of the lengths and of what was checked

    def read(self, start: int, count: int) -> Tensor:
        """`count` tokens (int64) from position `start` on, wrapping at the end; ValueError for an id that is none."""
        parts = []
        while count > 0:
            start %= self.total
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            part = self.shards[i][start - int(self.starts[i]) :][:count]
            if part.max() >= self.vocab_size:
                raise ValueError(f"{self.paths[i]}: token id {part.max()} is beyond VOCAB_SIZE={self.vocab_size}")
            parts.append(part.astype(np.int64))
            start += len(part)
            count -= len(part)
        return torch.from_numpy(np.concatenate(parts))


def token_bytes(sp: sentencepiece.SentencePieceProcessor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(bytes[is the previous one a boundary, token] (2, V); boundaries (V,): 1 for control, unknown, unused tokens)."""
    sizes = torch.zeros(2, sp.vocab_size(), dtype=torch.long)
    boundary = torch.zeros(sp.vocab_size(), dtype=torch.long)
    for i in range(sp.vocab_size()):
        piece = "?" if sp.is_byte(i) else sp.id_to_piece(i).replace("\u2581", " ")  # any one byte
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            boundary[i] = 1
        else:
            sizes[0, i] = len(piece.encode())
            sizes[1, i] = len(piece.removeprefix(" ").encode())  # a leading space does not count there
    return sizes.to(device), boundary.to(device)


def build_corpus(texts: list[str], folder: Path, vocab_size: int) -> None:
    """Cut the text into documents, hold some out, train a tokenizer; write both shards, then the tokenizer."""
    unique = {" ".join(part.split()): part for text in texts for part in re.split(r"\n\s*\n", text)}
    text = "\n\n".join(unique.values())  # what repeats, but for white space, must not stand on both sides
    size = min(DOCUMENT_CHARS, 200 + len(text) // 50)
    documents = [text[i : i + size] for i in range(0, len(text), size)]
    np.random.default_rng(0).shuffle(documents)
    held_out = max(1, min(HELD_OUT_CHARS // size, len(documents) // 20))
    options: dict[str, Any] = dict(word.split("=") for word in TOKENIZER_OPTIONS.split())
    # A name for the piece that byte fallback never needs makes the tokenizer's sha256 stand for the corpus, too.
    options |= {"unk_piece": f"<unk {folder.name}>", "vocab_size": vocab_size}
    model = io.BytesIO()
    try:
        sentences = iter(documents[held_out:][:1000])
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **options)
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of VOCAB_SIZE={vocab_size} from this text: give more of it ({error})") from None
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", documents[held_out:]), ("val", documents[:held_out])):
        ids = np.concatenate(sp.encode(part, add_bos=True)).astype("<u2")
        header = SHARD_HEADER.pack(SHARD_MAGIC, SHARD_VERSION, len(ids))
        write_atomically(folder / f"fineweb_{split}_000000.bin", header + ids.tobytes())
    write_atomically(folder / "tokenizer.model", model.getvalue())  # last: it marks the corpus as whole


def corpus_paths(cfg: Config, rt: Runtime) -> tuple[str, str]:
    """(data folder, tokenizer path) as configured; those of DEMO and TEXT_FILES are built once, into logs/cache/."""
    if not (cfg.demo or cfg.text_files):
        return cfg.data_path, cfg.tokenizer_path
    found = map(Path, sorted(glob.glob(cfg.text_files, recursive=True)))
    paths = [path for path in found if path.is_file() and path.parts[0] != "logs"]  # those are written here
    if not (cfg.demo or paths):
        raise FileNotFoundError(f"no file matches TEXT_FILES={cfg.text_files!r}: quote the glob; ** reaches subfolders")
    members = filter(callable, [*vars(np).values(), *vars(torch).values()])
    texts = [*topics.values(), *filter(None, map(inspect.getdoc, members))] if cfg.demo else []
    for path in paths:
        try:
            texts.append(path.read_text("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"TEXT_FILES: {path} is not UTF-8 text ({error}); convert or exclude it") from None
    key = hashlib.sha256(json.dumps([cfg.vocab_size, TOKENIZER_OPTIONS, "build 3", texts]).encode()).hexdigest()
    folder = Path("logs", "cache", f"corpus-{key[:16]}")  # other content has another name
    if not (folder / "tokenizer.model").is_file():
        rt.log(f"corpus building:{folder} texts:{len(texts)} characters:{sum(map(len, texts))}")
        build_corpus(texts, folder, cfg.vocab_size)
    return str(folder), str(folder / "tokenizer.model")


class Data:
    """Shards and tokenizer, in the order of training. OSError or ValueError for what would stop a run later."""

    def __init__(self, cfg: Config, rt: Runtime) -> None:
        self.seq_len = cfg.train_seq_len
        data_path, tokenizer_path = rt.from_rank_0(lambda: corpus_paths(cfg, rt))
        try:
            content = Path(tokenizer_path).read_bytes()
            sp = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"TOKENIZER_PATH={tokenizer_path}: {error}; get it, or set DEMO=1 or TEXT_FILES") from None
        if sp.vocab_size() != cfg.vocab_size:
            raise ValueError(f"{tokenizer_path} has {sp.vocab_size()} pieces, VOCAB_SIZE={cfg.vocab_size}: adapt one")
        self.tokenizer_sha256 = hashlib.sha256(content).hexdigest()
        self.bytes_of, self.boundary = token_bytes(sp, rt.device)
        ids = torch.tensor(sp.encode("a b"), dtype=torch.long, device=rt.device)
        counted = int(self.bytes_of[F.pad(self.boundary[ids[:-1]], (1, 0), value=1), ids].sum())
        if counted != 3:
            raise ValueError(f"{tokenizer_path} has no piece for a space: 'a b' counts {counted} bytes. Train another")
        beside = Path(data_path, "tokenizer.model")  # of a built corpus
        if beside.is_file() and beside.read_bytes() != content:
            raise ValueError(f"{data_path} was made with another tokenizer: set TOKENIZER_PATH={beside}")
        self.val = TokenShards(f"{glob.escape(data_path)}/fineweb_val_*.bin", cfg.vocab_size, checked=sys.maxsize)
        self.num_val_targets = (self.val.total - 1) // self.seq_len * self.seq_len  # whole sequences, as the challenge
        if self.num_val_targets < 1:
            raise ValueError(f"{data_path}: {self.val.total} validation tokens are less than TRAIN_SEQ_LEN + 1")
        rt.log(f"data path:{data_path} val_tokens:{self.val.total} val_targets:{self.num_val_targets}")
        if unknown := sum(int((shard == sp.unk_id()).sum()) for shard in self.val.shards):
            rt.log(f"warning: {unknown} validation tokens are unknown ones, which count 0 bytes: bpb is too high")
        if cfg.eval_artifact or cfg.export_from:
            return
        self.train = TokenShards(f"{glob.escape(data_path)}/fineweb_train_*.bin", cfg.vocab_size, CHECKED_TOKENS)
        self.identity = {"data_sha256": self.train.sha256 + self.val.sha256, "tokenizer_sha256": self.tokenizer_sha256}
        self.num_windows = max(1, (self.train.total - 1) // self.seq_len)
        # A stride near the golden share spreads neighbours evenly; coprime to the windows, it meets each of them once.
        golden = round(0.618 * self.num_windows) * (cfg.sequence_order == "spread")
        self.stride = next(n for n in itertools.count(golden or 1) if math.gcd(n, self.num_windows) == 1)
        rt.log(f"data train_shards:{len(self.train.shards)} train_tokens:{self.train.total} windows:{self.num_windows}")

    def train_sequences(self, numbers: Iterable[int]) -> Tensor:
        """Sequences of a run by their numbers, (N, TRAIN_SEQ_LEN + 1) int64: the same on any rank, after any resume."""
        starts = [number * self.stride % self.num_windows * self.seq_len for number in numbers]
        return torch.stack([self.train.read(start, self.seq_len + 1) for start in starts])


# ---- Quantization ----------------------------------------------------------------------------------------------------
# A `Plan` gives each matrix a `Grid`: integers times a scale per row, finer where errors cost more (`calibrate`).
# One step size for all fills the limit. Plans are made at the start of QAT, whose MLP grids stay, and for the export.

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0  # the range of fp16, in which scales are stored
PRUNE_ABOVE_ELEMENTS = 65536
LEAST_COST = 1e-4  # of a row, as a share of the model's mean
SCALES_TRIED = 16  # 8 per octave, from the one that clips nothing down
FINEST, COARSEST, BISECTIONS = -30.0, 10.0, 16  # log2 of the step sizes tried, and how often their range is halved


class Stored(NamedTuple):
    """A tensor as the artifact holds it: int8 codes (R, C) and fp16 scales (R,), or fp16 values without scales."""

    values: Tensor
    scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight that it stands for, fp32."""
        values = self.values.float()
        return values if self.scale is None else values * self.scale.float().unsqueeze(1)

    def num_bytes(self) -> float:
        """Size under an ideal order-0 entropy coder; scales and fp16 values as they are."""
        if self.scale is None:
            return self.values.nbytes
        counts = torch.bincount(self.values.flatten().int() + 128).double()
        nats_per_code = float(torch.special.entr(counts / self.values.numel()).sum())
        return self.values.numel() * nats_per_code / math.log(2) / 8 + self.scale.nbytes


class Grid(NamedTuple):
    """Integers of `bits` bits times a scale per row; weights beyond the largest integer are clipped."""

    bits: int
    scale: Tensor | None = None  # (R,); without it, the largest weight of a row gets the largest integer

    def quantize(self, weight: Tensor) -> Stored:
        """The nearest codes and their scales, in fp16. Not under torch.compile, which drops rounding."""
        largest = 2 ** (self.bits - 1) - 1
        scale = weight.abs().amax(dim=1) / largest if self.scale is None else self.scale.to(weight.device)
        scale = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).half()
        codes = (weight / scale.float().unsqueeze(1)).round().clamp(-largest - 1, largest)
        return Stored(codes.to(torch.int8), scale)


Plan = dict[str, Grid]  # parameter name -> grid; all other parameters are stored as fp16
Tensors = dict[str, Tensor]  # parameter name -> weight, or what an error costs in each of its rows


def category(name: str) -> str:
    """mlp, attn, bigram, embed or small (gains, scales, gates), by name; a matrix of a new kind counts as embed."""
    if not name.endswith(("_proj.weight", "embed.weight")):
        return "small"
    return next((kind for kind in ("mlp", "attn", "bigram") if kind in name), "embed")


def finest_scales(weight: Tensor, bits: int) -> Tensor:
    """Scales (R,) of the least squared error with `bits` bits: finer ones lose more by clipping than they resolve."""
    widest = weight.abs().amax(dim=1) / (2 ** (bits - 1) - 1)  # clips nothing, which suits 255 codes
    tried = torch.stack([widest * 2 ** (-i / 8) for i in range(SCALES_TRIED if bits < 8 else 1)])
    errors = [(Grid(bits, scale).quantize(weight).dequantize() - weight).square().sum(dim=1) for scale in tried]
    return tried.gather(0, torch.stack(errors).argmin(dim=0, keepdim=True))[0].cpu()


def grids_for_bytes(weights: Tensors, costs: Tensors, kept: Plan, cfg: Config, budget: float) -> Plan:
    """Grids at which all weights take `budget` bytes under an ideal order-0 entropy coder; those in `kept` stay.

    An error costs its square times `cost`, the mean squared gradient of its row on training tokens. A step s makes
    errors of s^2 / 12, and doubling it saves a bit: bytes are best spent where s^2 * cost is the same everywhere
    (reverse water-filling, Cover and Thomas 10.3.3). Without RATE_CONTROL or costs, bits are fixed.
    """
    if not (cfg.rate_control and costs):
        fixed = {"mlp": cfg.mlp_bits, "attn": cfg.attn_bits or 5, "bigram": cfg.bigram_bits or 5}
        fp16_key = f"blocks.{cfg.num_layers - 2}.attn.k_proj.weight"  # as in pull request 180; so is the embedding
        return {n: Grid(fixed[category(n)]) for n in weights if category(n) in fixed and n != fp16_key} | kept
    # The mean keeps rows that calibration did not meet from being free, the least cost those behind a zero projection.
    model_mean = torch.stack([cost.mean() for cost in costs.values()]).mean().clamp(min=1e-30)
    free: dict[str, tuple[int, Tensor, Tensor]] = {}
    for name in sorted(costs.keys() - kept.keys()):
        bits = getattr(cfg, f"{category(name)}_bits", 0) or 8  # int8 can hold no more
        relative = ((costs[name] + costs[name].mean()) / model_mean).clamp(min=LEAST_COST)
        free[name] = (bits, finest_scales(weights[name], bits), relative.rsqrt())

    def plan_of(step_size: float) -> Plan:
        plan = {}
        for name, (bits, finest, unit) in free.items():
            # Rounded up to 8 values per octave, scales compress to half their bytes.
            mantissa, exponent = torch.frexp(torch.maximum(finest, step_size * unit))
            plan[name] = Grid(bits, torch.ldexp((16 * mantissa).ceil() / 16, exponent))
        return plan | kept

    fine, coarse = FINEST, COARSEST
    for _ in range(BISECTIONS):
        middle = (fine + coarse) / 2
        if coded_bytes(weights, plan_of(2**middle), cfg) > budget:
            fine = middle
        else:
            coarse = middle
    return plan_of(2**coarse)


def coded_bytes(weights: Tensors, plan: Plan, cfg: Config) -> float:
    """What `weights` take on the grids of a plan under an ideal order-0 entropy coder."""
    return sum(tensor.num_bytes() for tensor in quantize(weights, plan, cfg).values())


def quantize(weights: Tensors, plan: Plan, cfg: Config) -> dict[str, Stored]:
    """Zero the smallest weights and round all. FloatingPointError for one that is not finite or beyond fp16."""
    stored = {}
    for name, weight in weights.items():
        if not torch.isfinite(weight.half()).all():
            raise FloatingPointError(f"{name} is not finite or beyond fp16: training diverged, nothing was exported")
        large = weight.dim() == 2 and weight.numel() > PRUNE_ABOVE_ELEMENTS
        frac = cfg.mlp_prune_frac if category(name) == "mlp" else cfg.prune_frac * large
        count = int(frac * weight.numel())
        if count > 0:
            threshold = weight.abs().flatten().kthvalue(count).values
            weight = weight * (weight.abs() > threshold)
        grid = plan.get(name)
        stored[name] = grid.quantize(weight) if grid else Stored(weight.half())
    return stored


# ---- Model -----------------------------------------------------------------------------------------------------------
# A new layer needs: its settings in MODEL_FIELDS; matrices as CastedLinear with names in _proj; its kind in `category`
# and its fixed bits; initial values by `init_weights` or its constructor. All else follows from its parameters' names.


class CastedLinear(nn.Module):
    """Linear layer without bias: fp32 master weight, cast to the dtype of its input in the forward.

    With `fake_quant` (the MLP, see `Trainer.start_qat`) it can train on a grid: `GPT.refresh` rounds the weight once
    per step, outside of the compiled graph, so that switching quantization on recompiles nothing.
    """

    def __init__(self, in_features: int, out_features: int, fake_quant: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.grid: Grid | None = None  # set while fake quantization is on
        self.rounded: Tensor | None  # what the forward multiplies by: the weight, rounded while `grid` is set
        rounded = torch.full((out_features, in_features), math.nan) if fake_quant else None  # until `refresh`
        self.register_buffer("rounded", rounded, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of x."""
        weight: Tensor = self.weight
        if self.rounded is not None:
            # Straight-through estimator (arXiv:1308.3432): the value is `rounded`, the gradient is that of `weight`.
            weight = self.rounded + (weight - weight.detach())
        return F.linear(x, weight.to(x.dtype))


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without weights (arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate pairs of dimensions of queries or keys (B, T, H, head_dim) by their positions (RoPE, arXiv:2104.09864)."""
    cos, sin = rotary
    pairs = cos.size(-1)
    a, b, rest = x.split((pairs, pairs, x.size(-1) - 2 * pairs), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with RMS-normalised queries and keys, RoPE and a learned gain per query head."""

    def __init__(self, cfg: Config, index: int, flash3: bool) -> None:
        super().__init__()
        self.head_dim = cfg.model_dim // cfg.num_heads
        self.flash3 = flash3
        self.exclusive = index >= cfg.num_layers - cfg.xsa_layers
        kv_dim = cfg.num_kv_heads * self.head_dim
        self.q_proj = CastedLinear(cfg.model_dim, cfg.model_dim)
        self.out_proj = CastedLinear(cfg.model_dim, cfg.model_dim)
        self.k_proj = CastedLinear(cfg.model_dim, kv_dim)
        self.v_proj = CastedLinear(cfg.model_dim, kv_dim)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.value_mix = nn.Parameter(torch.full((2,), 0.5)) if cfg.value_residual and index > 0 else None

    def forward(self, x: Tensor, rotary: Tensor, v0: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, model_dim), first layer's values v0 (B, T, KV, head_dim) -> output, own values."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, head_dim)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, KV, head_dim)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.value_mix is not None and v0 is not None:
            mix = self.value_mix.to(v.dtype)  # value residual (arXiv:2410.17897)
            v = mix[0] * v + mix[1] * v0
        q = apply_rotary(norm(q), rotary) * self.q_gain.to(q.dtype).unsqueeze(-1)
        k = apply_rotary(norm(k), rotary)
        if self.flash3:
            out = flash_attn_func(q, k, v, causal=True)
            out = out[0] if isinstance(out, tuple) else out  # older versions return the log-sum-exp, too
        else:
            q, k, v_heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            out = F.scaled_dot_product_attention(q, k, v_heads, is_causal=True, enable_gqa=True).transpose(1, 2)
        if self.exclusive:  # XSA: drop the part along the position's own value, which the residual stream has anyway
            own = F.normalize(v, dim=-1).unsqueeze(3)  # (B, T, KV, 1, head_dim)
            grouped = out.unflatten(2, (v.size(2), -1))  # (B, T, KV, H / KV, head_dim)
            out = grouped - (grouped * own).sum(dim=-1, keepdim=True) * own
        return self.out_proj(out.reshape(x.shape)), v


class MLP(nn.Module):
    """Two layers with a squared leaky ReLU (Primer, arXiv:2109.08668), which train under fake quantization."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        hidden_dim = cfg.mlp_mult * cfg.model_dim
        self.slope = cfg.relu_slope
        self.up_proj = CastedLinear(cfg.model_dim, hidden_dim, fake_quant=True)
        self.down_proj = CastedLinear(hidden_dim, cfg.model_dim, fake_quant=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, model_dim) -> (B, T, model_dim)."""
        return self.down_proj(F.leaky_relu(self.up_proj(x), self.slope).square())


class Block(nn.Module):
    """Mix with the embedded input x0, then attention and MLP as residuals, each scaled per channel."""

    def __init__(self, cfg: Config, index: int, flash3: bool) -> None:
        super().__init__()
        self.norm_scale = (index + 1) ** (-0.5 * cfg.ln_scale)  # deeper layers change the stream less
        self.attn = CausalSelfAttention(cfg, index, flash3)
        self.mlp = MLP(cfg)
        self.mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))

    def forward(self, x: Tensor, x0: Tensor, rotary: Tensor, v0: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, x0 (B, T, model_dim) -> new x, and the values of this layer's attention."""
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attn_out, v = self.attn(norm(x) * self.norm_scale, rotary, v0)
        x = x + self.attn_scale.to(x.dtype) * attn_out
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x) * self.norm_scale)
        return x, v


class BigramHash(nn.Module):
    """Embedding of hashed token pairs, projected to the model width. Only the table starts at zero, so both learn."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.buckets = cfg.bigram_vocab_size
        self.embed = nn.Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.out_proj = CastedLinear(cfg.bigram_dim, cfg.model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Token ids (B, T) -> (B, T, model_dim) of `dtype`."""
        ids = input_ids.to(torch.int32)
        pairs = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1])  # two odd constants mix the ids
        # The bucket of each token and the one before it; the last bucket for the first position.
        buckets = F.pad(pairs % (self.buckets - 1), (1, 0), value=self.buckets - 1)
        return self.scale.to(dtype) * self.out_proj(self.embed(buckets).to(dtype))


class GPT(nn.Module):
    """U-Net-skip transformer: the first half of the blocks hands its outputs, in reverse, to the second half."""

    def __init__(self, cfg: Config, dtype: torch.dtype, flash3: bool = False) -> None:
        super().__init__()
        self.cfg = cfg
        self.dtype = dtype  # of the residual stream
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.bigram = BigramHash(cfg)
        self.smear_gate = nn.Parameter(torch.zeros(cfg.model_dim))
        self.blocks = nn.ModuleList(Block(cfg, i, flash3) for i in range(cfg.num_layers))
        self.num_skips = cfg.num_layers // 2
        self.skip_scale = nn.Parameter(torch.ones(self.num_skips, cfg.model_dim))
        head_dim = cfg.model_dim // cfg.num_heads
        pairs = min(cfg.rope_dims or head_dim, head_dim) // 2
        frequencies = cfg.rope_base ** (-torch.arange(pairs) / pairs)
        angles = torch.outer(torch.arange(float(cfg.train_seq_len)), frequencies).unsqueeze(1)  # (T, 1, pairs)
        self.rotary: Tensor  # cosines and sines (2, T, 1, pairs)
        self.register_buffer("rotary", torch.stack((angles.cos(), angles.sin())).to(dtype), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Orthogonal matrices, zero residual outputs; the constructors have set gains, scales, gates and mixes."""
        for name, layer in self.named_modules():
            if isinstance(layer, CastedLinear):
                nn.init.orthogonal_(layer.weight)
                if name.startswith("blocks.") and name.endswith(("out_proj", "down_proj")):
                    nn.init.zeros_(layer.weight)
        self.bigram.out_proj.weight.mul_((2 * self.cfg.num_layers) ** -0.5)  # as GPT-2 scales its residual outputs
        nn.init.zeros_(self.bigram.embed.weight)
        nn.init.normal_(self.embed.weight, std=self.cfg.tied_embed_init_std)
        self.refresh()

    @torch.no_grad()
    def refresh(self, plan: Plan | None = None) -> None:
        """After the weights changed: round those that train on a grid. `plan` sets new grids (empty: none)."""
        for name, layer in self.named_modules():
            if isinstance(layer, CastedLinear) and layer.rounded is not None:
                if plan is not None:
                    layer.grid = plan.get(f"{name}.weight")
                # Fake quantization: what storing and loading make of the weight, bit for bit.
                layer.rounded.copy_(layer.grid.quantize(layer.weight).dequantize() if layer.grid else layer.weight)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Token ids (B, T), the tokens that follow them (B, T) -> their negative log-likelihood (B, T), nats, fp32."""
        rotary = self.rotary[:, : input_ids.size(1)]
        skip_scale = self.skip_scale.to(self.dtype)
        skips: list[Tensor] = []
        x = norm(self.embed(input_ids).to(self.dtype) + self.bigram(input_ids, self.dtype))
        # SmearGate blends each position with the one before it.
        gate = torch.sigmoid(self.smear_gate).to(x.dtype)
        x = x0 = (1 - gate) * x + gate * F.pad(x, (0, 0, 1, 0))[:, :-1]
        v0 = None
        for i, block in enumerate(self.blocks):
            if i >= self.num_skips and skips:  # with an odd number of blocks the last one has no skip to take
                x = x + skip_scale[i - self.num_skips] * skips.pop()
            x, v = block(x, x0, rotary, v0)
            v0 = v if v0 is None else v0
            if i < self.num_skips:
                skips.append(x)
        logits = F.linear(norm(x), self.embed.weight.to(x.dtype)).float()
        logits = self.cfg.logit_softcap * torch.tanh(logits / self.cfg.logit_softcap)
        return F.cross_entropy(logits.flatten(0, 1), target_ids.flatten(), reduction="none").view_as(target_ids)


# ---- Optimizers and schedules ----------------------------------------------------------------------------------------


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Approximately orthogonalise a stack of matrices (N, R, C): quintic iteration of Muon (Keller Jordan, 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # the slope at 0 is steep, so that small singular values reach about 1, too
    tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if tall else matrices).to(dtype)  # the smaller Gram matrix is cheaper
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then orthogonalised updates (Keller Jordan, 2024), with decoupled weight decay."""

    def __init__(self, params: list[nn.Parameter], cfg: Config, rt: Runtime) -> None:
        super().__init__(params, {"lr": cfg.matrix_lr, "momentum": cfg.muon_momentum, "weight_decay": cfg.weight_decay})
        self.cfg, self.rt = cfg, rt
        self.by_shape: dict[torch.Size, list[Tensor]] = {}
        for p in params:
            self.by_shape.setdefault(p.shape, []).append(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients in place."""
        group = self.param_groups[0]  # the only one: another would need stacks of its own
        share = slice(self.rt.rank, None, self.rt.world_size)
        for params in self.by_shape.values():  # matrices of one shape as one stack, of which each rank takes a share
            grads = torch.stack([p.grad for p in params])  # type: ignore[misc]
            state = self.state[params[0]]  # of the whole stack
            if not state:
                state["momentum"] = torch.zeros_like(grads)
            momentum = state["momentum"].mul_(group["momentum"]).add_(grads)
            updates = grads.add_(momentum, alpha=group["momentum"])
            if self.cfg.muon_eq:
                updates /= updates.norm(dim=2, keepdim=True) + 1e-12
            orthogonal = torch.zeros_like(updates, dtype=self.rt.compute_dtype)
            orthogonal[share] = newton_schulz(updates[share], self.cfg.muon_backend_steps, self.rt.compute_dtype)
            self.rt.all_reduce(orthogonal)
            # Updates of tall matrices are scaled up, so that they change outputs as much as those of wide ones.
            scale = max(1.0, grads.size(1) / grads.size(2)) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(orthogonal.float().unbind()), alpha=-group["lr"] * scale)


def make_optimizers(model: GPT, cfg: Config, rt: Runtime) -> dict[str, torch.optim.Optimizer]:
    """AdamW for embeddings and small parameters, Muon for matrices; each parameter has exactly one."""
    params = dict(model.named_parameters())
    small = [p for name, p in params.items() if category(name) == "small"]
    tables = [model.embed.weight, model.bigram.embed.weight]
    groups: list[dict[str, Any]] = [
        {"params": tables, "lr": cfg.tied_embed_lr, "weight_decay": cfg.weight_decay},
        {"params": small, "lr": cfg.scalar_lr, "weight_decay": cfg.scalar_weight_decay},
    ]
    adamw = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
    muon = Muon([p for name, p in params.items() if name.endswith("_proj.weight")], cfg, rt)
    owned = [p for group in adamw.param_groups + muon.param_groups for p in group["params"]]
    assert len(owned) == len({*owned}) == len(params), "every parameter needs exactly one optimizer"
    return {"adamw": adamw, "muon": muon}


def lr_scale_at(share_done: float, steps_left: float, cfg: Config) -> float:
    """Learning-rate factor in [0, 1]: constant, then linear to 0 over the warmdown."""
    left, warmdown = 1 - share_done, cfg.warmdown_frac
    if cfg.warmdown_iters >= 0:
        left, warmdown = steps_left, cfg.warmdown_iters
    return min(1.0, max(0.0, left) / warmdown) if warmdown else 1.0


def muon_momentum_at(step: int, lr_scale: float, cfg: Config) -> float:
    """Momentum of Muon: rises over the warm-up steps, falls with the learning rate at the end."""
    warm = min(1.0, step / cfg.muon_momentum_warmup_steps) if cfg.muon_momentum_warmup_steps else 1.0
    rising = (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum
    falling = lr_scale * cfg.muon_momentum + (1 - lr_scale) * cfg.muon_momentum_end
    return min(rising, falling)


# ---- Evaluation ------------------------------------------------------------------------------------------------------

SCORE = "val_loss:{:.8f} val_bpb:{:.8f}"  # of an evaluation, in the log


def scoring_windows(num_targets: int, length: int, stride: int) -> list[tuple[int, int]]:
    """Windows (start, how many of its last targets to score) that score each target of the split exactly once."""
    # The first window scores all its targets, every later one its last `stride`, the last one what is left.
    ends = [*range(length, num_targets, stride), num_targets]
    return [(0, length)] + [(end - length, end - before) for before, end in itertools.pairwise(ends)]


@torch.no_grad()
def evaluate(model: GPT, data: Data, rt: Runtime, stride: int, batch_seqs: int) -> tuple[float, float]:
    """(mean NLL per token in nats, bits per byte of text) of the validation split, by windows shared out over ranks."""
    windows = scoring_windows(data.num_val_targets, data.seq_len, stride)[rt.rank :: rt.world_size]
    compiled = torch.compile(model, fullgraph=True, dynamic=False, disable=not rt.compiles)
    sums = torch.zeros(2, dtype=torch.float64, device=rt.device)  # nats, bytes of text
    to_end = torch.arange(data.seq_len, 0, -1, device=rt.device)  # T to 1, from the left
    for i in range(0, len(windows), batch_seqs):
        starts, counts = zip(*windows[i : i + batch_seqs], strict=True)
        tokens = torch.stack([data.val.read(start, data.seq_len + 1) for start in starts]).to(rt.device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        scored = to_end <= torch.tensor(counts, device=rt.device).unsqueeze(1)  # the last `count` of each window
        forward = compiled if len(starts) == batch_seqs else model  # the last batch is not worth a graph
        sums[0] += (forward(inputs, targets).double() * scored).sum()
        sums[1] += (data.bytes_of[data.boundary[inputs], targets] * scored).sum()
    nats, text_bytes = rt.all_reduce(sums).tolist()
    if not math.isfinite(nats):
        raise FloatingPointError(f"the validation loss is {nats}: the training diverged, or the weights are damaged")
    return nats / data.num_val_targets, nats / math.log(2) / max(text_bytes, 1)


# ---- Artifact --------------------------------------------------------------------------------------------------------

ARTIFACT_MAGIC = b"PGPT" + struct.pack("<I", 4)  # with the version of the format
EXPORT_ROUNDS = 6
AIM, FULL_ENOUGH = 0.998, 0.996  # shares of the limit: what a round aims at, what ends the rounds
Trained = dict[str, Any]  # config, data, weights, grids, costs: what `export` needs, logs/RUN_ID.weights


def encode_artifact(stored: dict[str, Stored], cfg: Config, tokenizer_sha256: str) -> bytes:
    """Magic, then one zstd-22 frame: size of the header, JSON header, all codes, all scales, all fp16 values."""
    coded = [name for name, tensor in stored.items() if tensor.scale is not None]
    # Like codes side by side compress better: sort by their spread.
    coded.sort(key=lambda name: stored[name].values.float().std(correction=0).item())
    fields = {name: getattr(cfg, name) for name in MODEL_FIELDS}
    header = {"config": fields, "coded": coded, "tokenizer_sha256": tokenizer_sha256}
    text = json.dumps(header, separators=(",", ":")).encode()
    arrays: list[Any] = [stored[name].values for name in coded]
    arrays += [stored[name].scale for name in coded]
    arrays += [tensor.values for tensor in stored.values() if tensor.scale is None]
    payload = struct.pack("<I", len(text)) + text + b"".join(array.cpu().numpy().tobytes() for array in arrays)
    # Repeats of these codes cost more than the entropy coder: find hardly any (2% smaller, logs/ABLATIONS.md).
    search = {"window_log": 17, "min_match": 7, "search_log": 1, "chain_log": 6, "hash_log": 6}
    params = zstandard.ZstdCompressionParameters.from_level(22, write_checksum=True, **search)
    return ARTIFACT_MAGIC + zstandard.ZstdCompressor(compression_params=params).compress(payload)


def decode_artifact(content: bytes, path: str, cfg: Config) -> tuple[Config, dict[str, Stored], str]:
    """(`cfg` with the model's sizes, tensors, sha256 of the tokenizer) of an artifact; ValueError for a bad one."""

    def take(dtype: type, shape: torch.Size) -> Tensor:
        content = stream.read(np.dtype(dtype).itemsize * math.prod(shape))
        return torch.from_numpy(np.frombuffer(content, dtype).reshape(shape).copy())

    if not content.startswith(ARTIFACT_MAGIC):
        raise ValueError(f"{path} is not an artifact of this script, or of another version: {content[:8]!r}")
    try:
        payload = zstandard.ZstdDecompressor().decompress(content.removeprefix(ARTIFACT_MAGIC), allow_extra_data=False)
        stream = io.BytesIO(payload)
        header = json.loads(stream.read(*struct.unpack("<I", stream.read(4))))
        cfg = with_model_fields(cfg, header["config"])
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in GPT(cfg, torch.float32).named_parameters()}
        codes = {name: take(np.int8, shapes[name]) for name in header["coded"] if len(shapes[name]) == 2}
        stored = {name: Stored(codes[name], take(np.float16, shapes[name][:1])) for name in codes}
        stored |= {name: Stored(take(np.float16, shape)) for name, shape in shapes.items() if name not in codes}
        if stream.read():
            raise ValueError("it holds more than its header describes")
        return cfg, stored, header["tokenizer_sha256"]
    except Exception as error:  # a forged header may raise anything
        raise ValueError(f"{path} is damaged or cannot be used ({type(error).__name__}: {error})") from None


def export(trained: Trained, cfg: Config, rt: Runtime, tokenizer_sha256: str) -> str:
    """Quantize, compress and write logs/RUN_ID.ptz on rank 0, filling the limit; returns its path."""
    limit = cfg.artifact_limit_bytes - CODE_BYTES
    weights = {name: weight.to(rt.device) for name, weight in trained["weights"].items()}
    # Without costs, as before the calibration: about the same for all; rounded scales of equal steps would jump.
    equal = {name: torch.linspace(1, 1.28, len(w)) for name, w in weights.items() if category(name) != "small"}
    costs = trained["costs"] or equal
    budget = AIM * limit
    # Grids that the MLP trained on stay unless MLP_BITS changed, the limit shrank, or the rest cannot fit beside them.
    kept = {name: Grid(*values) for name, values in trained["grids"].items()}
    least_bytes = coded_bytes(weights, grids_for_bytes(weights, costs, kept, cfg, 0), cfg)
    shrank = cfg.artifact_limit_bytes < trained["config"]["artifact_limit_bytes"] or least_bytes > budget
    if cfg.mlp_bits != trained["config"]["mlp_bits"] or (cfg.rate_control and shrank):
        kept = {}
    best = b""
    for i in range(EXPORT_ROUNDS if cfg.rate_control else 1):
        begun = time.perf_counter()
        plan = grids_for_bytes(weights, costs, kept, cfg, budget)
        content = encode_artifact(quantize(weights, plan, cfg), cfg, tokenizer_sha256)
        rt.log(f"artifact round:{i} model_bytes:{len(content)} time:{1000 * (time.perf_counter() - begun):.0f}ms")
        same = content == best  # so would all further rounds be
        if not best or len(best) < len(content) <= limit or limit < len(best) > len(content):
            best = content  # the fullest that fits, else the least over
        if same or FULL_ENOUGH * limit <= len(best) <= limit:
            break
        budget = AIM * limit * coded_bytes(weights, plan, cfg) / len(content)  # entropy predicts the size within 3%
    write_atomically(Path("logs", f"{cfg.run_id}.ptz"), best)
    return f"logs/{cfg.run_id}.ptz"


def log_artifact(path: str, model_bytes: int, stored: dict[str, Stored], cfg: Config, rt: Runtime) -> bool:
    """Log bytes by an ideal order-0 coder, bits per weight and most codes by category, and whether the file fits."""
    for kind in sorted({*map(category, stored)}):
        tensors = [tensor for name, tensor in stored.items() if category(name) == kind]
        params = sum(tensor.values.numel() for tensor in tensors)
        size = sum(tensor.num_bytes() for tensor in tensors)
        levels = max((len(tensor.values.unique()) for tensor in tensors if tensor.scale is not None), default=0)
        bits = f"bits_per_weight:{8 * size / params:.3f} levels:{levels}"
        rt.log(f"artifact category:{kind} params:{params} bytes:{size:.0f} {bits}")
    headroom = cfg.artifact_limit_bytes - model_bytes - CODE_BYTES
    files = f"model_bytes:{model_bytes} code_bytes:{CODE_BYTES} artifact_bytes:{model_bytes + CODE_BYTES}"
    rt.log(f"artifact path:{path} codec:zstd-22 {files} limit:{cfg.artifact_limit_bytes} headroom_bytes:{headroom}")
    if headroom < 0:
        rt.log(f"error: {-headroom} bytes over ARTIFACT_LIMIT_BYTES: set RATE_CONTROL=1, or train a smaller model")
    return headroom >= 0


def with_model_fields(cfg: Config, stored: dict[str, Any]) -> Config:
    """`cfg` with the sizes of the model from a stored config, all else as given. ValueError if they are bad."""
    fields: dict[str, Any] = {name: stored.get(name) for name in MODEL_FIELDS}
    cfg = dataclasses.replace(cfg, **fields, train_batch_tokens=fields["train_seq_len"])  # a sound multiple of it
    if problems := config_problems(cfg):
        raise ValueError("; ".join(problems))
    return cfg


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Store tensors and plain values behind a sha256 of the rest of the file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, hashlib.sha256(buffer.getbuffer()).digest() + buffer.getvalue())


def load_tensors(path: Path, *needed: str) -> dict[str, Any]:
    """What `save_tensors` stored, on the CPU; runs no code from the file. FileNotFoundError, ValueError if damaged."""
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError(f"{path} is truncated, damaged or not this script's: its checksum does not fit")
    try:
        found = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
        assert found.keys() >= {*needed} and isinstance(found.get("config", {}), dict)
    except Exception:  # a forged file may raise anything
        raise ValueError(f"{path} is of another version of the script, or holds something else") from None
    return found


def checkpoint_paths(run_id: str, end: str = "") -> list[Path]:
    """Oldest first; with `end` .tmp* those that a kill left half-written."""
    return sorted(Path("logs").glob(f"{run_id}.{'[0-9]' * 9}.ckpt{end}"))


def newest_checkpoint(cfg: Config, data: Data, rt: Runtime) -> dict[str, Any]:
    """The newest sound checkpoint of RUN_ID, else its .weights, else {}. ValueError for another config or data."""
    # The .weights come last: `finish` writes them once before it has chosen, and a kill may have left those.
    for path in reversed([*Path("logs").glob(f"{cfg.run_id}.weights"), *checkpoint_paths(cfg.run_id)]):
        try:
            state = load_tensors(path, "config", "data", "step")
        except ValueError as error:
            rt.log(f"warning: skipped a checkpoint: {error}")
            continue
        then, now = state["config"] | state["data"], vars(cfg) | data.identity
        if changed := [name for name in now if name not in MAY_CHANGE_ON_RESUME and now[name] != then.get(name)]:
            listed = ", ".join(f"{name.upper()}={then.get(name)!r} there, {now[name]!r} now" for name in changed)
            raise ValueError(f"{path} is of another config: {listed}; set them back or choose another RUN_ID")
        rt.log(f"resume checkpoint:{path} step:{state['step']} train_time:{1000 * state['elapsed']:.0f}ms")
        return state
    rt.log(f"warning: RUN_ID={cfg.run_id} has no sound checkpoint: it starts from the beginning")
    return {}


# ---- Training --------------------------------------------------------------------------------------------------------

MICRO_BATCH_TOKENS = {"cuda": 98_304, "cpu": 16_384}  # 98,304 is a rank's whole part on 8 GPUs
CALIBRATION_BATCH = 2048  # tokens of one backward; its gradients are squared, so costs depend on it
RECENT_STEPS = 100  # whose times foretell those to come
TIME_MARGIN = 1.5  # what is begun must fit the cap if it takes this many times as long as the longest of its kind


class Trainer:
    """The training loop and all of its state."""

    def __init__(self, model: GPT, data: Data, cfg: Config, rt: Runtime) -> None:
        self.model, self.data, self.cfg, self.rt = model, data, cfg, rt
        self.forward = torch.compile(model, fullgraph=True, dynamic=False, disable=not rt.compiles)
        per_rank, rest = divmod(cfg.train_batch_tokens // cfg.train_seq_len, rt.world_size)
        if rest:
            raise ValueError(f"{rt.world_size} ranks do not divide TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} evenly")
        fitting = (cfg.micro_batch_tokens or MICRO_BATCH_TOKENS[rt.device.type]) // cfg.train_seq_len
        self.micro_seqs = max(n for n in range(1, per_rank + 1) if per_rank % n == 0 and n <= max(1, fitting))
        self.micro_steps = per_rank // self.micro_seqs
        self.optimizers = make_optimizers(model, cfg, rt)
        self.swa: Any = AveragedModel(model)  # SWA (arXiv:1803.05407): fp32 mean of snapshots of the master weights
        self.parts = {"model": model, "swa": self.swa} | self.optimizers  # what has a state of its own
        # All gradients are views of one buffer, which takes one all-reduce.
        sizes = list(map(Tensor.numel, model.parameters()))
        self.flat_grad = torch.zeros(sum(sizes), device=rt.device)
        for p, part in zip(model.parameters(), self.flat_grad.split(sizes), strict=True):
            p.grad = part.view_as(p)
        self.step = 0  # steps done
        self.elapsed = 0.0  # seconds of training, validation excluded, by rank 0's clock
        self.clock_zero = 0.0  # when that clock read 0
        self.saved_at = 0.0  # `elapsed` of the last checkpoint
        self.durations: list[float] = []  # of the recent steps, seconds
        self.seconds = math.inf  # for steps: the cap, less what `finish` takes
        self.end_seconds = 0.0  # of `finish`, rehearsed; stands for a checkpoint, too
        self.grids: Plan = {}  # that the MLP trains on; empty before fake quantization starts
        self.costs: Tensors = {}  # mean squared gradient of each row, see `grids_for_bytes`
        # Training tokens for costs and choices: the last sequences in their order, shared out over the ranks.
        numbers = range(data.num_windows)[-max(1, cfg.calibration_tokens // cfg.train_seq_len) :]
        batch_seqs = max(1, CALIBRATION_BATCH // cfg.train_seq_len)
        self.calibration_batches = data.train_sequences(numbers).split(batch_seqs)[rt.rank :: rt.world_size]

    def common_state(self) -> Trained:
        """What a checkpoint and the weights at the end have in common."""
        grids = {name: tuple(grid) for name, grid in self.grids.items()}
        state = {"config": vars(self.cfg), "data": self.data.identity, "step": self.step, "elapsed": self.elapsed}
        return state | {"durations": self.durations, "costs": self.costs, "grids": grids}

    def save(self) -> None:
        """Write a checkpoint. The last two stay; failing to write ends no run."""
        self.saved_at = self.elapsed
        if self.rt.rank == 0:
            path = Path("logs", f"{self.cfg.run_id}.{self.step:09d}.ckpt")
            try:
                save_tensors(path, self.common_state() | {name: part.state_dict() for name, part in self.parts.items()})
                paths = checkpoint_paths(self.cfg.run_id)
                last_two = paths[: paths.index(path) + 1][-2:]  # later ones are of a run that could not be resumed
                for old in {*paths, *checkpoint_paths(self.cfg.run_id, ".tmp*")}.difference(last_two):
                    old.unlink()
                seconds = time.perf_counter() - self.clock_zero - self.elapsed
                self.rt.log(f"checkpoint path:{path} time:{1000 * seconds:.0f}ms")
            except OSError as error:
                self.rt.log(f"error: no checkpoint at step {self.step}: {error}. Older ones are intact")
        self.elapsed = self.clock()  # counted, but not as part of the next step

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `save` wrote, with any number of ranks."""
        self.step = state["step"]
        self.elapsed = self.saved_at = state["elapsed"]
        self.durations = state["durations"] + self.durations  # the warm-up's, too: this machine may be slower
        self.costs = state["costs"]
        self.grids = {name: Grid(*values) for name, values in state["grids"].items()}
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.model.refresh(self.grids)

    def clock(self) -> float:
        """Seconds of training so far, by rank 0's clock, once the device has done what it was given."""
        if self.rt.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = torch.tensor(time.perf_counter() - self.clock_zero, dtype=torch.float64)
        if dist.is_initialized():
            dist.broadcast(seconds, src=0)
        return seconds.item()

    def fits(self, seconds: float) -> bool:
        """Whether what takes `seconds` can be begun without risk for the cap."""
        return self.elapsed + TIME_MARGIN * seconds <= self.seconds

    def train_step(self, lr_scale: float) -> tuple[float, float]:
        """Forward and backward of all micro-batches, then the update; returns loss and gradient norm over all ranks."""
        self.flat_grad.zero_()
        loss = torch.zeros((), device=self.rt.device)
        per_rank = self.micro_steps * self.micro_seqs
        first = (self.step * self.rt.world_size + self.rt.rank) * per_rank
        sequences = self.data.train_sequences(range(first, first + per_rank)).to(self.rt.device)
        for tokens in sequences.split(self.micro_seqs):
            nll = self.forward(tokens[:, :-1], tokens[:, 1:])
            micro_loss = nll.mean() / (self.micro_steps * self.rt.world_size)
            micro_loss.backward()
            loss += micro_loss.detach()
        self.rt.all_reduce(loss)
        self.rt.all_reduce(self.flat_grad)  # the average over ranks, since each loss is divided by their number
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip_norm or math.inf)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * lr_scale
                group["momentum"] = muon_momentum_at(self.step, lr_scale, self.cfg)  # AdamW does not read it
            optimizer.step()
        self.model.refresh()
        return loss.item(), grad_norm.item()  # waits for the device

    def warm_up(self) -> None:
        """Untimed steps that compile everything, and a rehearsal of the end, to keep its time for it; all is undone."""
        before = copy.deepcopy(self.common_state() | {name: part.state_dict() for name, part in self.parts.items()})
        cap = self.cfg.max_wallclock_seconds
        stamps = [self.clock()]
        for _ in range(self.cfg.warmup_steps or bool(cap)):
            try:
                self.train_step(1.0)
            except torch.OutOfMemoryError:
                tokens = self.micro_seqs * self.cfg.train_seq_len
                raise ValueError(f"{tokens} tokens do not fit the GPU: set MICRO_BATCH_TOKENS={tokens // 2}") from None
            stamps.append(self.clock())
        if cap:
            self.swa.n_averaged.fill_(2)  # so that there is a choice
            scratch = Path("logs", f"{self.cfg.run_id}.weights.tmp{os.getpid()}")
            try:
                self.finish(scratch)
            finally:
                scratch.unlink(missing_ok=True)
            self.end_seconds = self.clock() - stamps[-1]
            self.seconds = cap - TIME_MARGIN * self.end_seconds
        self.restore(before)
        self.durations = np.diff(stamps)[-1:].tolist()
        took = f"time:{1000 * (self.clock() - stamps[0]):.0f}ms peak_memory_bytes:{torch.cuda.max_memory_allocated()}"
        times = f"step_time:{1000 * sum(self.durations):.0f}ms end_time:{1000 * self.end_seconds:.0f}ms"
        self.rt.log(f"warm_up steps:{self.cfg.warmup_steps} {took} {times}")
        if not self.fits(sum(self.durations)):
            raise ValueError(f"MAX_WALLCLOCK_SECONDS={cap} is too short for {times}")

    def calibrate(self) -> None:
        """Find what errors in the rows of all matrices cost: their mean squared gradients on training tokens."""
        squares = torch.zeros_like(self.flat_grad)
        for tokens in self.calibration_batches:
            self.flat_grad.zero_()
            tokens = tokens.to(self.rt.device)
            self.model(tokens[:, :-1], tokens[:, 1:]).mean().backward()  # too few batches to be worth a graph
            squares += self.flat_grad.square()
        self.flat_grad.copy_(self.rt.all_reduce(squares))  # so that p.grad holds the squares
        for name, p in self.model.named_parameters():
            if p.grad is not None and category(name) != "small":
                self.costs[name] = p.grad.mean(dim=1).cpu()

    def plan_for(self, weights: Tensors) -> Plan:
        """Grids for these weights, as the first round of `export` chooses them; those that the MLP trains on stay."""
        budget = AIM * (self.cfg.artifact_limit_bytes - CODE_BYTES)
        return self.rt.from_rank_0(lambda: grids_for_bytes(weights, self.costs, self.grids, self.cfg, budget))

    def start_qat(self) -> None:
        """Switch fake quantization of the MLP on, on the grids of a plan for the weights as they are."""
        if self.cfg.rate_control and self.step > 0:  # before the first step gradients say little: fixed bits
            self.calibrate()
        plan = self.plan_for(self.model.state_dict())
        self.grids = {name: grid for name, grid in plan.items() if category(name) == "mlp"}
        self.swa.n_averaged.zero_()  # starts anew: snapshots from before would not fit those after
        self.model.refresh(self.grids)
        self.rt.log(f"qat active:1 step:{self.step} time:{1000 * (self.clock() - self.elapsed):.0f}ms")
        self.elapsed = self.clock()

    @torch.no_grad()
    def quantized_loss(self, weights: Tensors) -> float:
        """Mean NLL on the calibration tokens of `weights` as they would be stored; overwrites the average."""
        stored = quantize(weights, self.plan_for(weights), self.cfg)
        self.swa.module.load_state_dict({name: tensor.dequantize() for name, tensor in stored.items()})
        self.swa.module.refresh({})
        sums = torch.zeros(2, device=self.rt.device)  # nats, tokens
        for tokens in self.calibration_batches:
            tokens = tokens.to(self.rt.device)
            sums[0] += self.swa.module(tokens[:, :-1], tokens[:, 1:]).sum()
            sums[1] += tokens[:, 1:].numel()
        return (self.rt.all_reduce(sums)[0] / sums[1]).item()

    def finish(self, path: Path) -> tuple[Trained, str]:
        """Write and return the last or the averaged weights, whichever lose less on training tokens once quantized."""
        candidates = {"last": self.model.state_dict()}
        if self.cfg.swa_enabled and self.swa.n_averaged >= 2:
            candidates["swa"] = copy.deepcopy(self.swa.module.state_dict())  # the choice overwrites it
        chosen, losses = list(candidates)[-1 if self.cfg.swa_always else 0], ""  # without a comparison
        trained = self.common_state() | {"weights": candidates[chosen]}
        self.rt.from_rank_0(lambda: save_tensors(path, trained))  # before anything that can fail
        if self.cfg.rate_control and not self.costs:
            self.calibrate()
        if len(candidates) > 1 and not self.cfg.swa_always:
            found = {name: self.quantized_loss(weights) for name, weights in candidates.items()}
            chosen = min(found, key=found.__getitem__)
            losses = "".join(f" {name}_loss:{loss:.5f}" for name, loss in found.items())
        trained |= self.common_state() | {"weights": candidates[chosen]}
        self.rt.from_rank_0(lambda: save_tensors(path, trained))
        return trained, f"weights:{chosen} path:{path} snapshots:{int(self.swa.n_averaged)}{losses}"

    def log_step(self, loss: float, grad_norm: float, lr_scale: float) -> None:
        """Log the step now and then; raise FloatingPointError for a loss or gradient that is not finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(f"step {self.step}: loss {loss}, gradient norm {grad_norm}. Try a lower MATRIX_LR")
        if self.step <= 5 or self.step % self.cfg.train_log_every == 0 or self.step == self.cfg.iterations:
            line = f"step:{self.step}/{self.cfg.iterations} train_loss:{loss:.8f} lr_scale:{lr_scale:.4f}"
            line += f" grad_norm:{grad_norm:.4f} train_time:{1000 * self.elapsed:.0f}ms"
            self.rt.log(f"{line} step_avg:{1000 * self.elapsed / self.step:.2f}ms")

    def validate(self) -> None:
        """Log the score of the current weights in plain windows; the clock stands still."""
        paused = self.clock()
        batch_seqs = max(1, self.cfg.val_batch_size // (self.cfg.train_seq_len * self.rt.world_size))
        score = SCORE.format(*evaluate(self.model, self.data, self.rt, self.cfg.train_seq_len, batch_seqs))
        self.rt.log(f"step:{self.step}/{self.cfg.iterations} {score} train_time:{1000 * self.elapsed:.0f}ms")
        self.clock_zero += self.clock() - paused

    def run(self) -> Trained:
        """Train until steps or wall clock are used up; returns the weights to export."""
        cfg = self.cfg
        self.clock_zero = time.perf_counter() - self.elapsed
        while self.step < cfg.iterations and self.fits(max(self.durations, default=0.0)):
            share_done = max(self.step / cfg.iterations, self.elapsed / self.seconds)
            if not self.grids and share_done >= cfg.qat_start_frac and self.fits(self.end_seconds / 2):  # 1: never
                self.start_qat()
                continue  # it took time: is there some left?
            steps_left: float = cfg.iterations - self.step
            if len(self.durations) >= 5:  # fewer are mostly start-up
                steps_left = min(steps_left, (self.seconds - self.elapsed) / float(np.median(self.durations)))
            lr_scale = lr_scale_at(share_done, steps_left, cfg)
            begun = self.elapsed
            loss, grad_norm = self.train_step(lr_scale)
            self.step += 1
            self.elapsed = self.clock()
            self.durations = [*self.durations, self.elapsed - begun][-RECENT_STEPS:]
            self.log_step(loss, grad_norm, lr_scale)
            if cfg.swa_enabled and lr_scale < cfg.swa_start_frac and self.step % cfg.swa_every == 0:
                self.swa.update_parameters(self.model)
                self.rt.log(f"swa snapshot:{int(self.swa.n_averaged)} step:{self.step} lr_scale:{lr_scale:.4f}")
            if 0 < cfg.checkpoint_every <= self.elapsed - self.saved_at and self.fits(self.end_seconds):
                self.save()
            if cfg.val_loss_every and self.step % cfg.val_loss_every == 0 and self.step < cfg.iterations:
                self.validate()
        if not self.grids and cfg.qat_start_frac < 1:
            self.rt.log(f"warning: no QAT, as QAT_START_FRAC={cfg.qat_start_frac} left no time or step for it")
        trained, chosen = self.finish(Path("logs", f"{cfg.run_id}.weights"))
        self.rt.log(f"export {chosen} time:{1000 * (self.clock() - self.elapsed):.0f}ms")
        self.elapsed = self.clock()
        why = "iterations" if self.step == cfg.iterations else "wallclock_cap"
        self.rt.log(f"training stopped:{why} step:{self.step} train_time:{1000 * self.elapsed:.0f}ms")
        self.validate()  # once the weights are on disk
        for path in checkpoint_paths(cfg.run_id, "*") if self.rt.rank == 0 else []:
            path.unlink()  # of no use now
        return trained


# ---- Main ------------------------------------------------------------------------------------------------------------

BAD_INPUT, OVER_LIMIT, DIVERGED = 2, 3, 4  # exit codes


def log_start(cfg: Config, warnings: list[str], rt: Runtime) -> None:
    """Source, versions, config and overrides: what is needed to run this run again."""
    rt.log(Path(__file__).read_text(encoding="utf-8") + "=" * 100, console=False)
    versions = " ".join(f"{module.__name__}:{module.__version__}" for module in (torch, np, sentencepiece, zstandard))
    rt.log(f"run id:{cfg.run_id} python:{sys.version.split()[0]} {versions}")
    name = torch.cuda.get_device_name() if rt.device.type == "cuda" else f"cpus:{os.cpu_count()}"
    number_format = f"compute_dtype:{str(rt.compute_dtype)[6:]} compile:{int(rt.compiles)} flash3:{int(rt.flash3)}"
    rt.log(f"runtime world_size:{rt.world_size} device:{rt.device.type} name:{name} {number_format}")
    rt.log(f"config {json.dumps(vars(cfg))}", console=False)
    changed = [f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default]
    rt.log("config overrides: " + " ".join(f"{name.upper()}={getattr(cfg, name)}" for name in changed))
    for warning in warnings:
        rt.log(f"warning: {warning}")


def report(weights: Tensors, data: Data, cfg: Config, rt: Runtime, label: str) -> None:
    """Log the score of weights by sliding windows; the artifact's under the name that log readers look for, too."""
    begun = time.perf_counter()
    model = GPT(cfg, rt.compute_dtype, rt.flash3)
    model.load_state_dict(weights)
    model.to(rt.device).refresh({})
    score = SCORE.format(*evaluate(model, data, rt, cfg.eval_stride or cfg.train_seq_len, cfg.eval_batch_seqs))
    rt.log(f"{label}_sliding stride:{cfg.eval_stride} {score} eval_time:{1000 * (time.perf_counter() - begun):.0f}ms")
    if label == "final":
        rt.log(f"final_int8_zlib_roundtrip_exact {score}")


def make_trainer(state: Trained, data: Data, cfg: Config, rt: Runtime) -> Trainer:
    """Model and trainer, warmed up, at the start of the training or where a checkpoint's `state` left it."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, rt.compute_dtype, rt.flash3)
    model.init_weights()
    trainer = Trainer(model.to(rt.device), data, cfg, rt)
    rt.log(f"model params:{sum(map(Tensor.numel, model.parameters()))} seed:{cfg.seed}")
    micro = f"micro_batch_tokens:{trainer.micro_seqs * cfg.train_seq_len} micro_steps:{trainer.micro_steps}"
    rt.log(f"batch tokens:{cfg.train_batch_tokens} ranks:{rt.world_size} {micro}")
    if rt.device.type == "cuda" or not cfg.dry_run:
        trainer.warm_up()
    if state:
        trainer.restore(state)
    return trainer


def main(cfg: Config, warnings: list[str]) -> int:
    """One run: runtime, data, then train, export, reload, evaluate; or the part that is asked for."""
    trained: Trained = {}  # what is exported
    given = cfg
    source, sha256 = cfg.eval_artifact or cfg.export_from, ""
    if cfg.eval_artifact:
        cfg, _, sha256 = decode_artifact(Path(source).read_bytes(), source, cfg)
    elif cfg.export_from:
        trained = load_tensors(Path(source), "config", "data", "weights", "grids", "costs")
        cfg, sha256 = with_model_fields(cfg, trained["config"]), trained["data"]["tokenizer_sha256"]
    ignored = [name for name in MODEL_FIELDS if getattr(given, name) not in (getattr(cfg, name), getattr(Config, name))]
    warnings += [f"{name.upper()} has no effect, {source} has {getattr(cfg, name)}" for name in ignored]
    rt = Runtime(cfg)
    log_start(cfg, warnings, rt)
    data = Data(cfg, rt)
    if source and sha256 != data.tokenizer_sha256:
        raise ValueError(f"{source} needs the tokenizer of sha256 {sha256}: set TOKENIZER_PATH")
    if cfg.resume:
        rt.open_log("a")  # before others can
        trained = rt.from_rank_0(lambda: newest_checkpoint(cfg, data, rt))
    trainer = None
    if not source and "weights" not in trained:  # a run that ended its training left those
        trainer = make_trainer(trained, data, cfg, rt)
    if not cfg.resume:
        rt.open_log("a" if cfg.dry_run or cfg.eval_artifact else "x")
    if cfg.dry_run:
        rt.log("plan: the run can start")
        return 0
    if trainer:
        trained = trainer.run()
    if cfg.eval_float and trained:
        report(trained["weights"], data, cfg, rt, "float")
    artifact = cfg.eval_artifact or rt.from_rank_0(lambda: export(trained, cfg, rt, data.tokenizer_sha256))
    content = rt.from_rank_0(Path(artifact).read_bytes)  # other nodes lack the file
    _, stored, _ = decode_artifact(content, artifact, cfg)
    fits = log_artifact(artifact, len(content), stored, cfg, rt)
    report({name: tensor.dequantize() for name, tensor in stored.items()}, data, cfg, rt, "final")
    return 0 if fits or cfg.eval_artifact else OVER_LIMIT


def end_on_signals(run_id: str, rank: str) -> None:
    """End at once on SIGTERM, SIGHUP and Ctrl-C, even when the main thread waits in C++; rank 0 says how to go on."""

    def end() -> None:
        number = os.read(reading, 1)[0]
        try:
            for scratch in Path("logs").glob(f"**/*.tmp{os.getpid()}"):
                scratch.unlink(missing_ok=True)
            last = max(checkpoint_paths(run_id) or Path("logs").glob(f"{run_id}.weights"), default=None)
            how = f"RESUME=1 RUN_ID={run_id} goes on from {last}" if last else "there is no checkpoint to go on from"
            os.write(2, f"stopped by signal {number}: {how}\n".encode())
        finally:  # the terminal may be gone
            os._exit(128 + number)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    handler = signal.SIG_DFL if rank != "0" else lambda number, frame: time.sleep(60)  # `end` ends it; others just end
    for number in signal.valid_signals() & {1, signal.SIGINT, signal.SIGTERM}:  # 1: SIGHUP, not on Windows
        if signal.getsignal(number) != signal.SIG_IGN or "RANK" in os.environ:  # nohup; torchrun means it
            signal.signal(number, handler)
    threading.Thread(target=end, daemon=True).start()


def command_line() -> int:
    """`main` with readable errors and an exit code: 2 to 4 as above, 128 + n when stopped by signal n."""
    rank = os.environ.get("RANK", "0")
    try:
        if len(sys.argv) > 1:
            print(__doc__)
            return 0 if sys.argv[1] in ("-h", "--help") else BAD_INPUT
        cfg, warnings = load_config(os.environ)
        end_on_signals(cfg.run_id, rank)
        return main(cfg, warnings)
    except (ValueError, OSError, FloatingPointError) as error:
        time.sleep(5 * (rank != "0"))  # rank 0 says the same, and ends the run meanwhile
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr, flush=True)
        return DIVERGED if isinstance(error, FloatingPointError) else BAD_INPUT


if __name__ == "__main__":
    exit_code = command_line()
    if exit_code in (0, OVER_LIMIT) and dist.is_initialized():
        dist.destroy_process_group()  # otherwise other ranks may hang in NCCL
    os._exit(exit_code)  # the interpreter's own way out aborts now and then on threads that gloo leaves (PyTorch 2.13)
