"""Train, quantize, compress and score a language model in 16,000,000 bytes: one file for the Parameter Golf challenge.
"11L Int4 MLP QAT + BigramHash(10240) + SWA": a U-Net-skip transformer of 27,878,509 parameters whose MLP weights end
their training under straight-through fake quantization (grids of 2 to 8 bits that fill the file best). The last or
the averaged weights are stored in one zstd-22 frame, read back and scored: the last log line is about the file on disk.
    DEMO=1 python train_gpt.py                              a laptop: no download, a few minutes on 2 CPU cores
    torchrun --standalone --nproc_per_node=8 train_gpt.py   the challenge: 8xH100, FineWeb shards at DATA_PATH
    EVAL_ARTIFACT=logs/RUN.ptz python train_gpt.py          score an artifact again, without training
Every hyperparameter is an environment variable (section 1). logs/<run_id>.txt holds source, config and log."""
from __future__ import annotations
# ruff: noqa: E401, I001  (grouped imports keep the preamble on one screen)
import ast, contextlib, copy, ctypes, dataclasses, difflib, glob, hashlib, importlib.util, io, itertools, json
import logging, lzma, math, operator, os, platform, random, re, resource, shutil, signal, struct, sys
import sysconfig, tempfile, time, zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
# ---- 1 Config: one frozen dataclass; the environment variable of a field is its name in upper case -------------------
LIMITS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "least": (operator.ge, "at least"), "most": (operator.le, "at most"), "above": (operator.gt, "above"),
    "below": (operator.lt, "below"), "choices": (lambda value, bound: value in bound, "one of")}
def knob(default: Any, meaning: str, **limits: Any) -> Any:  # a field, its meaning (for the README), its `LIMITS`
    return field(default=default, metadata={"meaning": meaning, "limits": limits})
@dataclass(frozen=True)
class Config:
    """All hyperparameters. Types are parsed from the defaults; `problems` validates them together."""
    data_path: str = knob("./data/datasets/fineweb10B_sp1024", "folder with fineweb_train_*.bin and fineweb_val_*.bin")
    tokenizer_path: str = knob("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of the shards")
    text_files: str = knob("", "glob of UTF-8 text files: build shards and tokenizer from them instead")
    demo: bool = knob(False, "1: train on the documentation that Python, NumPy and PyTorch ship, at CPU sizes")
    recipe: str = knob("", "named set of settings: pr314 (the literal design of pull request 314) or empty")
    run_id: str = knob("", "name of log and artifact in logs/ (default: date, time and a random suffix)")
    dry_run: bool = knob(False, "1: check everything, print the plan of the run for WORLD_SIZE ranks and stop")
    plan_step_ms: float = knob(0.0, "DRY_RUN: expected ms per step, to tell how many fit (0 = unknown)", least=0)
    plan_memory_gb: float = knob(80.0, "DRY_RUN: memory of a rank's device, where there is none to ask", above=0)
    checkpoint_every: float = knob(0.0, "seconds of training between checkpoints, inside the clock (0 = off)", least=0)
    resume: bool = knob(False, "1: continue RUN_ID from its newest sound checkpoint")
    export_from: str = knob("", "path of logs/<run_id>.weights: export and score these weights, no training")
    seed: int = knob(42, "seed of the initial weights", least=0, most=2**63 - 1)
    eval_artifact: str = knob("", "path of an artifact: evaluate it and stop, no training")
    iterations: int = knob(20000, "training steps at most", least=1)
    max_wallclock_seconds: float = knob(600.0, "training time at most, validation excluded (0 = no cap)", least=0)
    warmup_steps: int = knob(20, "untimed compile warm-up steps, undone afterwards", least=0)
    warmdown_iters: int = knob(2500, "steps of linear warmdown at the end, or their worth of wall clock", least=0)
    train_batch_tokens: int = knob(786432, "tokens per step over all ranks", least=1)
    train_seq_len: int = knob(2048, "tokens per sequence, in training and evaluation", least=1, most=131072)
    micro_batch_tokens: int = knob(0, "tokens per forward and rank (0 = what fits the memory)", least=0)
    val_batch_size: int = knob(524288, "tokens per batch of the validation during training, over all ranks", least=1)
    val_loss_every: int = knob(500, "validate every N steps (0 = at the end only)", least=0)
    train_log_every: int = knob(100, "log the training loss every N steps", least=1)
    eval_mode: str = knob("sliding", "final score by windows or in one pass", choices=("sliding", "banded"))
    eval_stride: int = knob(64, "stride of the final sliding window (0 = plain windows)", least=0)
    eval_batch_seqs: int = knob(32, "windows per batch and rank in the final evaluation", least=1)
    eval_float: bool = knob(False, "1: score the float weights that are exported, too (shows the quantization gap)")
    num_layers: int = knob(11, "transformer blocks", least=1)
    model_dim: int = knob(512, "width of the residual stream", least=1)
    num_heads: int = knob(8, "query heads", least=1)
    num_kv_heads: int = knob(4, "key/value heads", least=1)
    mlp_mult: int = knob(3, "MLP hidden size over model_dim", least=1)
    relu_slope: float = knob(0.5, "slope of the squared ReLU below zero", least=0, most=1)
    xsa_layers: int = knob(4, "last layers with exclusive self-attention (XSA)", least=0)
    value_residual: bool = knob(True, "1: later layers mix the first one's values into their own")
    vocab_size: int = knob(1024, "tokens of the tokenizer", least=1, most=65536)
    tie_embeddings: bool = knob(True, "1: the output head is the token embedding")
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial token embedding", least=0)
    rope_base: float = knob(10000.0, "base of the rotary frequencies", above=0)
    logit_softcap: float = knob(30.0, "logits are c * tanh(x / c)", above=0)
    qk_gain_init: float = knob(1.5, "initial gain per query head")
    bigram_vocab_size: int = knob(10240, "buckets of the bigram hash embedding", least=2)
    bigram_dim: int = knob(128, "width of the bigram hash embedding", least=1)
    embed_lr: float = knob(0.6, "learning rate of an untied token embedding", least=0)
    head_lr: float = knob(0.008, "learning rate of an untied output head (Adam, no decay)", least=0)
    tied_embed_lr: float = knob(0.03, "learning rate of the tied token embedding and of the bigram table", least=0)
    matrix_lr: float = knob(0.02, "learning rate of Muon (matrices of the blocks, bigram projection)", least=0)
    scalar_lr: float = knob(0.02, "learning rate of gains, scales, gates and value mixes", least=0)
    weight_decay: float = knob(0.04, "decoupled weight decay of Muon and AdamW", least=0)
    muon_momentum: float = knob(0.99, "final Nesterov momentum of Muon", least=0, below=1)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", least=1)
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at step 0", least=0, below=1)
    muon_momentum_end: float = knob(0.85, "Muon momentum where the warmdown ends", least=0, below=1)
    muon_eq: bool = knob(True, "1: rows of a Muon update get equal norms before Newton-Schulz (MuonEq-R)")
    muon_momentum_warmup_steps: int = knob(1500, "steps until muon_momentum is reached", least=0)
    beta1: float = knob(0.9, "AdamW beta 1", least=0, below=1)
    beta2: float = knob(0.95, "AdamW beta 2", least=0, below=1)
    adam_eps: float = knob(1e-8, "AdamW epsilon", above=0)
    grad_clip_norm: float = knob(0.3, "global gradient norm limit (0 = off)", least=0)
    swa_enabled: bool = knob(True, "1: average weights over the warmdown (SWA)")
    swa_start_frac: float = knob(0.4, "collect snapshots once lr_scale is below this", least=0, most=1)
    swa_every: int = knob(50, "steps between snapshots", least=1)
    qat_start_frac: float = knob(0.92, "progress at which fake quantization starts (1 = never)", least=0, most=1)
    swa_always: bool = knob(False, "1: export the average; 0: it or the last weights, by the loss on training tokens")
    error_feedback: bool = knob(True, "1: round with error feedback (GPTQ) where that helps on training tokens")
    rate_control: bool = knob(True, "1: choose every matrix's grid so that the limit is filled, instead of fixed bits")
    calibration_tokens: int = knob(65536, "training tokens that the plan and the choice of weights look at", least=1)
    calibration_reserve: float = knob(0.02, "share of the cap kept for the choice of weights", least=0, below=1)
    mlp_bits: int = knob(4, "bits of the MLP weights without RATE_CONTROL, or with QAT from step 0", least=2, most=8)
    attn_bits: int = knob(5, "bits of the attention weights without RATE_CONTROL", least=2, most=8)
    bigram_bits: int = knob(5, "bits of the bigram table and projection, likewise", least=2, most=8)
    mlp_prune_frac: float = knob(0.0, "share of smallest MLP weights set to zero before export", least=0, below=1)
    prune_frac: float = knob(0.0, "the same for other matrices of over 65,536 elements", least=0, below=1)
    artifact_limit_bytes: int = knob(16_000_000, "limit for code plus model, decimal bytes", least=1)
    compute_dtype: str = knob("auto", "auto: float32 on a CPU without bf16", choices=("auto", "bfloat16", "float32"))
    compile: str = knob("auto", "torch.compile: 1, 0, or auto (on CUDA only)", choices=("auto", "0", "1"))
MODEL_FIELDS = "num_layers model_dim num_heads num_kv_heads mlp_mult vocab_size tie_embeddings rope_base bigram_dim " \
    "logit_softcap bigram_vocab_size train_seq_len relu_slope xsa_layers value_residual".split()
RECIPES: dict[str, dict[str, Any]] = {"pr314": {
    "mlp_bits": 4, "attn_bits": 6, "bigram_bits": 6, "qat_start_frac": 0.0, "rate_control": False, "swa_enabled": True,
    "swa_start_frac": 0.4, "swa_always": True, "error_feedback": False, "calibration_reserve": 0.0, "prune_frac": 0.03,
    "mlp_prune_frac": 0.05, "qk_gain_init": 1.5, "relu_slope": 0.0, "xsa_layers": 0, "value_residual": False,
    "muon_eq": False, "muon_momentum_end": 0.99}}
MAY_CHANGE_ON_RESUME = set("resume checkpoint_every data_path tokenizer_path micro_batch_tokens dry_run plan_step_ms " \
    "plan_memory_gb val_loss_every train_log_every eval_float eval_batch_seqs val_batch_size".split())
DEMO_SETTINGS: dict[str, Any] = {
    "iterations": 320, "max_wallclock_seconds": 0.0, "warmup_steps": 0, "warmdown_iters": 200, "swa_every": 5,
    "train_batch_tokens": 2048, "train_seq_len": 256, "val_batch_size": 16384, "val_loss_every": 100, "num_layers": 6,
    "model_dim": 128, "num_heads": 4, "num_kv_heads": 2, "bigram_dim": 64, "train_log_every": 20, "eval_float": True,
    "muon_momentum_warmup_steps": 150, "calibration_tokens": 16384, "artifact_limit_bytes": 1_100_000}
def config_problems(cfg: Config) -> list[str]:
    """Everything that is wrong with a config, each with the value and the remedy; empty when it is sound."""
    problems: list[str] = []
    def need(name: str, sound: bool, remedy: str) -> None:
        """Note the field if its value is not `sound`."""
        problems.extend([] if sound else [f"{name.upper()}={getattr(cfg, name)!r} {remedy}"])
    for f in dataclasses.fields(cfg):
        for limit, bound in f.metadata["limits"].items():
            need(f.name, LIMITS[limit][0](getattr(cfg, f.name), bound), f"must be {LIMITS[limit][1]} {bound}")
    seq_len, heads, kv_heads = cfg.train_seq_len, cfg.num_heads, cfg.num_kv_heads
    if min(seq_len, heads, kv_heads) > 0:
        need("model_dim", cfg.model_dim % (2 * heads) == 0, f"must be a multiple of 2 * NUM_HEADS={heads}")
        need("num_heads", heads % kv_heads == 0, f"must be a multiple of NUM_KV_HEADS={kv_heads}")
        for name in ("train_batch_tokens", "micro_batch_tokens"):
            need(name, getattr(cfg, name) % seq_len == 0, f"must be a multiple of TRAIN_SEQ_LEN={seq_len}")
        need("eval_stride", cfg.eval_stride <= seq_len, f"is over TRAIN_SEQ_LEN={seq_len}: targets would be skipped")
    need("recipe", cfg.recipe in ("", *RECIPES), f"is not one of {', '.join(RECIPES)} or empty")
    need("demo", not (cfg.demo and cfg.text_files), "and TEXT_FILES both name a corpus: set one of them")
    need("run_id", bool(re.fullmatch(r"[\w-][\w.-]*", cfg.run_id)), "becomes a file name: letters, digits, - _ .")
    return problems
def parse_value(text: str, default: Any) -> Any:
    """`text` as the type of `default`; raises ValueError naming the type that was expected."""
    if isinstance(default, str): return text
    words = {"0": False, "1": True, "false": False, "true": True}
    with contextlib.suppress(ValueError, KeyError):
        value = words[text.lower()] if isinstance(default, bool) else type(default)(text)
        if math.isfinite(value): return value
    raise ValueError(f"expected {({bool: '0 or 1', int: 'a whole number', float: 'a finite number'})[type(default)]}")
def load_config(environ: Mapping[str, str]) -> tuple[Config, dict[str, str], list[str]]:
    """(config, where its non-default values came from, warnings); or ValueError with all problems in one message."""
    fields = {f.name.upper(): f for f in dataclasses.fields(Config)}
    problems, given, values, origin = [], {}, {}, {}
    for name in sorted(fields.keys() & environ.keys()):
        try: given[name.lower()] = parse_value(environ[name], fields[name].default)
        except ValueError as error: problems.append(f"{name}={environ[name]!r}: {error}")
    if environ.get("TORCHELASTIC_RUN_ID", "none") != "none":  # the same name after a restart by torchrun
        given.setdefault("run_id", "run-" + environ["TORCHELASTIC_RUN_ID"][:8])
    if environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0": given["resume"] = True
    if given.get("resume") and not given.get("run_id"): problems.append("RESUME=1 needs RUN_ID, the run to continue")
    demo, recipe = DEMO_SETTINGS if given.get("demo") else {}, RECIPES.get(given.get("recipe", ""), {})
    for layer, settings in (("DEMO", demo), ("RECIPE", recipe), ("environment", given)):
        values.update(settings)
        origin.update(dict.fromkeys(settings, layer))
    if not values.get("run_id"):
        values["run_id"] = time.strftime("%Y%m%d-%H%M%S-") + f"{random.SystemRandom().randrange(16**4):04x}"
    cfg = Config(**values)
    if problems := problems + config_problems(cfg):
        raise ValueError("the configuration cannot run:\n  " + "\n  ".join(problems))
    close = {n: difflib.get_close_matches(n.upper(), fields, n=1, cutoff=0.85) for n in sorted({*environ} - {*fields})}
    return cfg, origin, [f"environment variable {n} is not known; did you mean {m[0]}?" for n, m in close.items() if m]
def batch_plan(cfg: Config, world_size: int, most: float) -> tuple[int, int]:
    """(sequences per micro-batch, micro-batches per step) of a rank, where `most` fit at once; or ValueError."""
    batch, seq_len, total = cfg.train_batch_tokens, cfg.train_seq_len, cfg.train_batch_tokens // cfg.train_seq_len
    if world_size < 1 or total % world_size:
        ok = ", ".join(str(n) for n in range(1, min(total, 128) + 1) if total % n == 0)
        raise ValueError(f"{world_size} ranks do not divide TRAIN_BATCH_TOKENS={batch}: use one of {ok} ranks")
    per_rank, wanted = total // world_size, cfg.micro_batch_tokens // seq_len
    divisors = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
    if wanted and wanted not in divisors:
        fits = ", ".join(str(n * seq_len) for n in divisors)
        raise ValueError(f"MICRO_BATCH_TOKENS={cfg.micro_batch_tokens} does not divide a rank's batch: use {fits}")
    micro = wanted or max(n for n in divisors if n == 1 or n <= most)
    return micro, per_rank // micro
# ---- 2 Runtime: ranks, device, logging -------------------------------------------------------------------------------
Log = Callable[[str], None]
def open_log(path: Path | None, append: bool = False) -> logging.Logger:
    """A logger to console and a new file at `path` (None: to neither); `debug` lines go to the file alone."""
    logger = logging.Logger("train_gpt")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try: logger.addHandler(logging.FileHandler(path, "a" if append else "x", encoding="utf-8"))
        except FileExistsError:
            raise ValueError(f"RUN_ID={path.stem} has a log: choose another RUN_ID, or go on with RESUME=1") from None
        logger.addHandler(console := logging.StreamHandler(sys.stdout))
        console.setLevel(logging.INFO)
    return logger
@dataclass
class Runtime:
    """Where this process runs: rank, device, number format, attention kernel; and what ranks do together."""
    rank: int
    world_size: int
    device: torch.device
    compute_dtype: torch.dtype
    compile: bool
    attention: str  # kernel, see `attend`
    logger: logging.Logger
    @classmethod
    def start(cls, cfg: Config) -> Runtime:
        """Read torchrun's variables, choose the device and join the process group (gloo, plus NCCL on CUDA)."""
        rank, distributed = int(os.environ.get("RANK", "0")), "RANK" in os.environ and not cfg.dry_run
        world_size = int(os.environ.get("WORLD_SIZE", "1")) if distributed or cfg.dry_run else 1
        if not (cfg.eval_artifact or cfg.export_from):
            batch_plan(cfg, world_size, 0.0)  # raises before the ranks wait for one another
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda: torch.cuda.set_device(device)
        elif sys.platform == "linux":
            # Keep freed memory: glibc would return every large tensor to the system and fault its pages in again.
            for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
                getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(option, value)
        if distributed:
            # Ranks that only wait (for rank 0 to compress, say) wait on gloo, which sleeps; NCCL would spin.
            # After a restart, torchrun's store still holds the addresses of the ranks before (PyTorch issue 135712).
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(start, next(dist.rendezvous("env://"))[0])
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", None, None, world_size, rank, store)
        native = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu._is_avx512_bf16_supported()
        dtype = getattr(torch, {"auto": "bfloat16" if native else "float32"}.get(cfg.compute_dtype, cfg.compute_dtype))
        flash3 = cuda and torch.cuda.get_device_capability()[0] == 9 and dtype == torch.bfloat16
        flash3 = flash3 and importlib.util.find_spec("flash_attn_interface") is not None
        compiled = cuda if cfg.compile == "auto" else cfg.compile == "1"
        attention = "flash3" if flash3 else "sdpa" if cuda or cfg.dry_run else "chunks"
        path = Path("logs") / f"{'eval-' if cfg.eval_artifact else 'plan-' if cfg.dry_run else ''}{cfg.run_id}.txt"
        logger = open_log(path if rank == 0 else None, cfg.resume or cfg.dry_run)
        return cls(rank, world_size, device, dtype, compiled, attention, logger)
    def log(self, line: str) -> None:  # one event, to the console and the log file of rank 0
        self.logger.info("%s", line)
    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:  # as one static-shape graph, if on
        return torch.compile(function, fullgraph=True, dynamic=False) if self.compile else function
    def autocast(self) -> contextlib.AbstractContextManager[Any]:  # bf16, where the model computes in it
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)
    def all_reduce(self, tensor: Tensor) -> Tensor:  # sums over ranks, in place
        if dist.is_initialized(): dist.all_reduce(tensor)
        return tensor
    def from_rank_0(self, make: Callable[[], Any]) -> Any:
        """`make()` run on rank 0 alone; every rank gets its (picklable, trusted) result while sleeping on gloo."""
        box = [make() if self.rank == 0 else None]
        if dist.is_initialized(): dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]
    def peak_memory_bytes(self) -> int:
        """Peak memory of this process: device memory on CUDA, resident set on a CPU."""
        if self.device.type == "cuda": return torch.cuda.max_memory_allocated()
        if (status := Path("/proc/self/status")).is_file():  # getrusage would count what the parent process had
            return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
# ---- 3 Data: shards, loader, text to shards, token bytes -------------------------------------------------------------
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
MAY_HOLD_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENT_CHARS = 32768  # a long text file is cut into documents of about this size, a small corpus into smaller ones
CHECK_BLOCK = 65536  # tokens read at each end of a training shard at start
HOW_TO_GET_DATA = ("Get the challenge's data with its own script (python data/cached_challenge_fineweb.py --variant "
                   "sp1024 in a checkout of openai/parameter-golf), or set DATA_PATH; DEMO=1, TEXT_FILES need none")
Tokens = np.ndarray[Any, Any]
def open_shard(path: Path) -> np.memmap[Any, np.dtype[np.uint16]]:
    """The uint16 tokens of one shard, memory-mapped. Raises ValueError for a header or size that is not a shard's."""
    size = path.stat().st_size
    with path.open("rb") as file: magic, version, tokens = struct.unpack("<iii", file.read(12).ljust(12, b"\0"))
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise ValueError(f"{path} is no token shard (magic {magic}, version {version}): download it again or remove it")
    expected = SHARD_HEADER_BYTES + 2 * tokens
    if tokens < 1 or size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise ValueError(f"{path} is {state}: {size} bytes, {tokens} tokens need {expected}; download it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(tokens,))
def write_shard(path: Path, tokens: Tokens) -> None:
    """Write token ids (N,) in the challenge's shard format."""
    header = struct.pack("<iii", SHARD_MAGIC, SHARD_VERSION, len(tokens)).ljust(SHARD_HEADER_BYTES, b"\0")
    path.write_bytes(header + np.asarray(tokens, dtype="<u2").tobytes())
class TokenShards:
    """Shards as one long sequence of tokens, read by position. Nothing is held in memory."""
    def __init__(self, pattern: str, vocab_size: int) -> None:
        """Open every shard that matches. Raises FileNotFoundError without any, ValueError for a bad one."""
        self.vocab_size, self.paths = vocab_size, [Path(p) for p in sorted(glob.glob(pattern))]
        if not self.paths: raise FileNotFoundError(f"no shards match {pattern}. {HOW_TO_GET_DATA}")
        self.shards = [open_shard(path) for path in self.paths]
        self.starts = np.cumsum([0] + [len(s) for s in self.shards])
        self.total = int(self.starts[-1])
    def check(self, block: int) -> None:
        """Raise ValueError for token ids beyond the vocabulary in the first and last `block` tokens of each shard."""
        for start, end in itertools.pairwise(map(int, self.starts)):
            for begin in {start, max(start, end - block)}:
                for at in range(begin, min(begin + block, end), 1 << 24):
                    self.read(at, min(1 << 24, begin + block - at, end - at))
    def read(self, start: int, count: int) -> Tokens:
        """`count` tokens (int64) from position `start` on, wrapping at the end; raises ValueError for a bad id."""
        parts: list[Tokens] = []
        while count > 0:
            start %= self.total
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            parts.append(self.shards[i][(at := start - int(self.starts[i])) : at + count].astype(np.int64))
            if (largest := int(parts[-1].max())) >= self.vocab_size:
                raise ValueError(f"{self.paths[i]}, from token {at}: token id {largest} is beyond VOCAB_SIZE="
                                 f"{self.vocab_size}; the shard is damaged, or of another tokenizer")
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)
class BatchLoader:
    """Batches fetched one step ahead by a thread: step s reads tokens [s * B, (s + 1) * B], rank r the r-th part."""
    def __init__(self, shards: TokenShards, cfg: Config, rt: Runtime, micro_seqs: int) -> None:
        self.shards, self.rt, self.shape = shards, rt, (-1, micro_seqs, cfg.train_seq_len)
        self.step_tokens, self.rank_tokens = cfg.train_batch_tokens, cfg.train_batch_tokens // rt.world_size
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.ahead: tuple[int, Any] = (-1, None)
    def _fetch(self, step: int) -> Tensor:  # the tokens of a step, where CUDA copies from asynchronously
        start = step * self.step_tokens + self.rt.rank * self.rank_tokens
        host = torch.from_numpy(self.shards.read(start, self.rank_tokens + 1))
        return host.pin_memory() if self.rt.device.type == "cuda" else host
    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(input_ids, target_ids) of a step, each (micro-batches, sequences, TRAIN_SEQ_LEN) int64 on the device."""
        fetched = self.ahead[1] if self.ahead[0] == step else None
        tokens = (fetched or self.pool.submit(self._fetch, step)).result().to(self.rt.device, non_blocking=True)
        self.ahead = (step + 1, self.pool.submit(self._fetch, step + 1))
        return tokens[:-1].view(self.shape), tokens[1:].view(self.shape)
class TokenBytes:
    """How many bytes of text each token stands for: a table (2, VOCAB_SIZE), row 1 for tokens after a boundary."""
    def __init__(self, sp: sentencepiece.SentencePieceProcessor, device: torch.device) -> None:
        """Count from the pieces; control, unknown and unused ones are boundaries: 0 bytes, no space after them."""
        ids = range(sp.vocab_size())
        pieces = [sp.id_to_piece(i).replace("\u2581", " ") for i in ids]
        edge = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids]
        sizes = [[0 if e else 1 if sp.is_byte(i) else len(s.encode()) for i, s, e in zip(ids, row, edge, strict=True)]
                 for row in (pieces, [text.removeprefix(" ") for text in pieces])]
        self.table, self.boundary = torch.tensor(sizes, device=device), torch.tensor(edge, device=device).long()
    def count(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:  # bytes of each target, given the token before
        return self.table[self.boundary[input_ids], target_ids]
def load_tokenizer(path: str, vocab_size: int) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """The tokenizer and the sha256 of its file. Raises for a missing, foreign or differently sized one."""
    if not Path(path).is_file(): raise FileNotFoundError(f"no tokenizer at TOKENIZER_PATH={path}. {HOW_TO_GET_DATA}")
    sp, content = sentencepiece.SentencePieceProcessor(), Path(path).read_bytes()
    try: sp.LoadFromSerializedProto(content)
    except RuntimeError: raise ValueError(f"TOKENIZER_PATH={path} is not a SentencePiece model") from None
    if sp.vocab_size() != vocab_size:
        raise ValueError(f"{path} has {sp.vocab_size()} pieces, VOCAB_SIZE is {vocab_size}: set one to match the other")
    return sp, hashlib.sha256(content).hexdigest()
def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, its classes and its functions; nothing if it does not parse."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, MAY_HOLD_DOCSTRINGS) and (text := ast.get_docstring(node)): yield text
def demo_documents() -> Iterator[str]:
    """The docstrings of each module of Python, NumPy, PyTorch; the language reference. Folded space, no repeats."""
    seen, skipped = {""}, {"test", "tests", "testing", "_internal", "site-packages", "idlelib", "lib2to3"}
    roots = Path(sysconfig.get_paths()["stdlib"]), Path(np.__file__).parent, Path(torch.__file__).parent
    sources = (p for root in roots for p in sorted(root.rglob("*.py")) if skipped.isdisjoint(p.relative_to(root).parts))
    groups = (docstrings(path.read_text("utf-8", errors="ignore")) for path in sources)
    for texts in itertools.chain(groups, ([text] for _, text in sorted(topics.items()))):
        folded = dict.fromkeys(" ".join(text.split()) for text in texts)
        yield " ".join(text for text in folded if text not in seen)
        seen.update(folded)
def text_documents(paths: list[str]) -> Iterator[str]:
    """One document per text file, or several of a long one. Raises ValueError if one is not UTF-8."""
    size = min(DOCUMENT_CHARS, 200 + sum(Path(path).stat().st_size for path in paths) // 50)
    for path in paths:
        try: text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"TEXT_FILES: {path} is not UTF-8 text ({error}); convert or exclude it") from None
        yield from (text[at : at + size] for at in range(0, len(text), size))
def hold_out(documents: list[str], low: int, high: int) -> tuple[list[str], list[str]]:
    """(training, validation) documents; the latter as they come while they fit, of `low` to `high` bytes."""
    train, val, held = list[str](), list[str](), 0
    for document in documents:
        takes = held < low and held + (size := len(document.encode())) <= high
        (val if takes else train).append(document)
        held += size * takes if held < low else 0
    return train, val
def train_tokenizer(documents: list[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model from the first 4 MB of the documents; ValueError when they are too few for it."""
    pieces, model = (d[at : at + 4000] for d in documents for at in range(0, len(d), 4000)), io.BytesIO()
    try: sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.islice(pieces, 1000), model_writer=model, vocab_size=vocab_size, pad_id=0,
            bos_id=1, eos_id=2, unk_id=3, model_type="bpe", byte_fallback=True, split_digits=True, num_threads=1,
            normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, max_sentence_length=1 << 20, minloglevel=2)
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of VOCAB_SIZE={vocab_size} from this text: give more of it ({error})") from None
    return model.getvalue()
def build_corpus(documents: list[str], folder: Path, vocab_size: int, val_bytes: tuple[int, int]) -> None:
    """Train a tokenizer on the training documents and write tokenizer and shards into `folder`, all or nothing."""
    train, val = hold_out(random.Random(0).sample(documents, len(documents)), *val_bytes)
    if not train or not val: raise ValueError(f"{len(documents)} documents are too few to hold some out: add text")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as name:
        scratch, model = Path(name) / "corpus", train_tokenizer(train, vocab_size)
        scratch.mkdir()
        (scratch / "tokenizer.model").write_bytes(model)
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        for split, texts in (("train", train), ("val", val)):
            ids = [np.array([sp.bos_id(), *encoded], dtype=np.uint16) for encoded in sp.encode(texts)]
            write_shard(scratch / f"fineweb_{split}_000000.bin", np.concatenate(ids))
        with contextlib.suppress(OSError): scratch.rename(folder)  # another run was faster: its result is the same
def prepare_corpus(cfg: Config, log: Log) -> tuple[str, str]:
    """(data folder, tokenizer path) as configured; builds them once for DEMO and TEXT_FILES, into logs/cache/."""
    if not (cfg.demo or cfg.text_files): return cfg.data_path, cfg.tokenizer_path
    paths = sorted(p for p in glob.glob(cfg.text_files, recursive=True) if Path(p).is_file())
    if not (cfg.demo or paths):
        raise FileNotFoundError(f"no file matches TEXT_FILES={cfg.text_files!r}: quote the glob; ** reaches subfolders")
    versions = f"{platform.python_version()} {np.__version__} {torch.__version__}" if cfg.demo else ""
    key = hashlib.sha256(f"corpus format 3, vocabulary {cfg.vocab_size} {versions}".encode())
    for path in paths: key.update(hashlib.sha256(Path(path).read_bytes()).digest())
    folder = Path("logs", "cache", f"{'demo' if cfg.demo else 'text'}-{key.hexdigest()[:16]}")
    if not folder.is_dir():
        log(f"corpus building:{folder} (once; later runs find it there)")
        started = time.monotonic()
        documents = [d for d in (demo_documents() if cfg.demo else text_documents(paths)) if d.strip()]
        size = sum(len(d.encode()) for d in documents)
        build_corpus(documents, folder, cfg.vocab_size, (97_000, 105_000) if cfg.demo else (size // 20, size // 10))
        log(f"corpus documents:{len(documents)} bytes:{size} build_time:{1000 * (time.monotonic() - started):.0f}ms")
    return str(folder), str(folder / "tokenizer.model")
@dataclass
class Data:
    """Checked shards and tokenizer of a run."""
    train: TokenShards | None
    val: TokenShards
    val_targets: int  # the split is the first ((n - 1) // seq_len) * seq_len targets
    tokenizer: sentencepiece.SentencePieceProcessor
    tokenizer_sha256: str
def open_data(cfg: Config, rt: Runtime) -> Data:
    """Open and check shards and tokenizer; FileNotFoundError or ValueError before anything has been trained."""
    data_path, tokenizer_path = rt.from_rank_0(lambda: prepare_corpus(cfg, rt.log))
    sp, sha256 = load_tokenizer(tokenizer_path, cfg.vocab_size)
    val, train = TokenShards(f"{glob.escape(data_path)}/fineweb_val_*.bin", cfg.vocab_size), None
    val.check(val.total)
    val_targets = (val.total - 1) // cfg.train_seq_len * cfg.train_seq_len
    if val_targets < 1:
        raise ValueError(f"{data_path} has {val.total} validation tokens, a window of TRAIN_SEQ_LEN needs "
                         f"{cfg.train_seq_len + 1}: lower it or add text")
    rt.log(f"data path:{data_path} val_shards:{len(val.shards)} val_tokens:{val.total} val_targets:{val_targets}")
    if not (cfg.eval_artifact or cfg.export_from):
        train = TokenShards(f"{glob.escape(data_path)}/fineweb_train_*.bin", cfg.vocab_size)
        train.check(CHECK_BLOCK)
        rt.log(f"data train_shards:{len(train.shards)} train_tokens:{train.total}")
        if train.total <= cfg.train_batch_tokens:
            rt.log(f"warning: {train.total} training tokens are less than one step's TRAIN_BATCH_TOKENS: they repeat")
    return Data(train, val, val_targets, sp, sha256)
# ---- 4 Quantization: one grid for training, export and loading -------------------------------------------------------
@dataclass(frozen=True)
class QuantSpec:
    """2^bits integer levels [qmin, qmax], a scale per row apart: row maximum / qmax, or, with a `step`, that times the
    root mean square of the matrix times the factor that a search found for the row (`rows` (R,), `search_rows`)."""
    bits: int
    step: float = 0.0
    rows: Tensor | None = field(default=None, compare=False, repr=False)
    def __post_init__(self) -> None:  # older versions stored costs there, which are far smaller than factors
        if self.rows is not None and self.rows.min() < 0.01: raise ValueError("grids of an older version: use that one")
    qmin = property(lambda self: -(1 << (self.bits - 1)))
    qmax = property(lambda self: (1 << (self.bits - 1)) - 1)
QuantPlan = dict[str, QuantSpec]  # parameter name -> grid; parameters that it does not name are stored as fp16
def plain(plan: QuantPlan) -> dict[str, tuple[int, float, Tensor | None]]:  # for files; QuantSpec(*values) is back
    return {name: (spec.bits, spec.step, spec.rows) for name, spec in plan.items()}
StoredState = dict[str, tuple[Tensor, ...]]  # name -> (codes int8, scale fp16) or (values fp16,)
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0  # what fp16 can store
PRUNE_ABOVE_ELEMENTS, FEEDBACK_BLOCK = 65536, 128  # block: columns whose errors are passed on together
HESSIAN_DAMPING, SEARCH_STEP, SEARCH_ROUNDS, LEAST_COST = 0.01, 0.2, 8, 0.3  # first and last: share of the mean
STEPS = [1.5 * 2 ** (-i / 6) for i in range(34)]  # the menu for rate control
def category(name: str) -> str:  # the kind of a parameter: mlp, attn, bigram, embed or small (gains, scales, gates)
    if not name.endswith(("_proj.weight", "embed.weight", "lm_head.weight")): return "small"
    return next((kind for kind in ("mlp", "attn", "bigram") if kind in name), "embed")
def quant_spec_for(name: str, cfg: Config) -> QuantSpec | None:
    """The grid that a parameter starts with; None for fp16: embeddings, small ones, one key projection (as in #180)."""
    if name == f"blocks.{cfg.num_layers - 2}.attn.k_proj.weight": return None
    bits = {"mlp": cfg.mlp_bits, "attn": cfg.attn_bits, "bigram": cfg.bigram_bits}.get(category(name))
    return QuantSpec(bits) if bits else None
def starting_plan(state: Iterable[str], cfg: Config) -> QuantPlan:  # of parameter names
    return {name: spec for name in state if (spec := quant_spec_for(name, cfg))}
def row_scale(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Scale per row of `weight` (R, C), an fp16 value as fp32 (R,); not for compiled code, which drops the rounding."""
    scale = weight.abs().amax(dim=1) / spec.qmax  # a smaller one would cut the row's largest weights
    if spec.step:
        wanted = spec.step * weight.double().square().mean().sqrt()
        if spec.rows is not None: wanted = wanted * spec.rows.to(wanted, non_blocking=True)
        mantissa, exponent = torch.frexp(torch.maximum(wanted, scale))
        scale = torch.ldexp((16 * mantissa).ceil() / 16, exponent)  # 8 values per octave take half the bytes
    return scale.float().clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16).float()
def round_to_grid(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:  # (R, C), (R,) -> int8 codes (R, C)
    return torch.clamp(torch.round(weight / scale.unsqueeze(1)), spec.qmin, spec.qmax).to(torch.int8)
def dequantize_per_row(codes: Tensor, scale: Tensor) -> Tensor:  # codes (R, C), scales (R,) -> fp32 (R, C)
    return codes.float() * scale.float().unsqueeze(1)
def quantize_per_row(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(codes int8 (R, C), scale fp16 (R,)) of a finite `weight` (R, C), as they are stored."""
    scale = row_scale(weight, spec)
    return round_to_grid(weight, scale, spec), scale.to(torch.float16)
def search_rows(weight: Tensor, cost: Tensor) -> Tensor:
    """Factors (R,) of the step for the rows of `weight` (R, C), the best of 17 each: least expected error (the lucky
    roundings of one step are not those of another), weighed by `cost` (R,), plus the price of the codes' bits, whose
    table follows the choice (Chou, Lookabaugh and Gray, 1989)."""
    factors, rows = 2.0 ** (torch.arange(-8, 9, device=weight.device) / 4), torch.arange(len(weight))
    scales, spec = [row_scale(weight, QuantSpec(8, SEARCH_STEP, factor)) for factor in factors], QuantSpec(8)
    empty, ones, cost = weight.new_zeros(len(weight), 256), torch.ones_like(weight), cost.to(weight)
    errors = torch.stack([cost * torch.minimum(weight.square(), s.square().unsqueeze(1) / 12).sum(1) for s in scales])
    counts = torch.stack([empty.scatter_add(1, round_to_grid(weight, s, spec).long() + 128, ones) for s in scales])
    best, price = torch.full_like(rows, 8), 2 * math.log(2) * errors[8].sum() / weight.numel()  # what a bit saves there
    for _ in range(SEARCH_ROUNDS):
        used = counts[best, rows].sum(dim=0) + 0.02
        best = (errors + price * (counts @ (used.sum() / used).log2())).argmin(dim=0).cpu()
    return factors.cpu()[best]
def round_with_feedback(weight: Tensor, scale: Tensor, spec: QuantSpec, hessian: Tensor) -> Tensor:
    """`round_to_grid` in which later columns take up the errors of earlier ones (GPTQ, arXiv:2210.17323). `hessian`
    (C, C): sum of the products of the layer's inputs. Its diagonal orders the columns, its inverse the shares."""
    order = hessian.diagonal().argsort(descending=True)
    h = hessian[order][:, order].double()
    h.diagonal().add_(HESSIAN_DAMPING * h.diagonal().mean().clamp(min=1e-12))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    w, codes = weight[:, order].clone(), torch.empty_like(weight, dtype=torch.int8)
    for begin in range(0, w.size(1), FEEDBACK_BLOCK):
        block, errors = w[:, begin : begin + FEEDBACK_BLOCK], []
        for i in range(block.size(1)):
            at, column = begin + i, block[:, i : i + 1]
            codes[:, at : at + 1] = done = round_to_grid(column, scale, spec)
            errors.append((column - dequantize_per_row(done, scale)) / upper[at, at])
            block[:, i + 1 :] -= errors[-1] * upper[at, at + 1 : begin + block.size(1)]
        w[:, at + 1 :] -= torch.cat(errors, dim=1) @ upper[begin : at + 1, at + 1 :]
    return codes[:, order.argsort()]
def fake_quantize_per_row(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:  # what export and load give
    return dequantize_per_row(round_to_grid(weight, scale, spec), scale)
def prune_smallest(weight: Tensor, frac: float) -> Tensor:  # its share `frac` of smallest magnitudes set to zero
    count = int(frac * weight.numel())
    return weight * (weight.abs() > weight.abs().flatten().kthvalue(count).values) if count else weight
def quantize_state(state: Mapping[str, Tensor], plan: QuantPlan, cfg: Config, log: Log,
                   hessians: Mapping[str, Tensor], share: Runtime | None = None) -> StoredState:
    """Prune and round: (codes, scale) where the plan has a grid, else (fp16 values,), on the CPU. Those in `hessians`
    are rounded with error feedback, with `share` each by one rank for all."""
    stored, changed = StoredState(), defaultdict[str, list[int]](lambda: [0, 0])
    for i, (name, value) in enumerate(state.items()):
        full, spec, kind = value.detach().float(), plan.get(name), category(name)
        if not torch.isfinite(full.to(torch.float16)).all():
            raise ValueError(f"{name} is not finite or beyond fp16: the training diverged, nothing was exported")
        large = full.dim() == 2 and full.numel() > PRUNE_ABOVE_ELEMENTS
        frac = cfg.mlp_prune_frac if kind == "mlp" else cfg.prune_frac if large else 0.0
        weight = prune_smallest(full, frac)
        scale, codes = row_scale(weight, spec) if spec else None, weight.to(torch.float16)
        if spec is not None and scale is not None:
            codes = round_to_grid(weight, scale, spec)
            if name in hessians and (share is None or i % share.world_size == share.rank):
                codes = round_with_feedback(weight, scale, spec, hessians[name].to(weight.device))
            if name in hessians and share: codes = share.all_reduce(codes * (i % share.world_size == share.rank))
        stored[name] = (codes.cpu(),) if scale is None else (codes.cpu(), scale.to(torch.float16).cpu())
        if frac:
            unpruned = full if spec is None or scale is None else round_to_grid(full, scale, spec)
            changed[kind][0] += int((unpruned[weight == 0] != 0).sum())
            changed[kind][1] += weight.numel()
    for kind, (count, of) in changed.items(): log(f"prune category:{kind} codes_changed:{count} of:{of}")
    return stored
def dequantize_state(stored: StoredState) -> dict[str, Tensor]:  # fp32 weights, as they are loaded
    return {name: dequantize_per_row(*parts) if len(parts) == 2 else parts[0].float() for name, parts in stored.items()}
def order0_bytes(codes: Tensor) -> float:  # size of integer codes under an ideal order-0 entropy coder, bytes
    counts = torch.bincount(codes.flatten().int() + 128).double()
    return float(torch.xlogy(counts, counts.sum() / counts.clamp(min=1)).sum()) / (8 * math.log(2))
RateTable = dict[str, list[tuple[float, float, QuantSpec | None]]]  # of each parameter: (bytes, expected loss, grid)
def rate_table(state: Mapping[str, Tensor], costs: Mapping[str, Tensor], kept: QuantPlan) -> RateTable:
    """What grids from coarse to fine make of each matrix of `state`, fp16 at the end (not for MLPs, which train on a
    grid); those in `kept` stay on theirs. `costs`: mean squared gradient of each row (R,), which weighs errors, with
    LEAST_COST of the mean for rows that the tokens did not use."""
    table: RateTable = {}
    for name, value in sorted(state.items()):
        weight, kind, grids = value.detach().float(), category(name), list[QuantSpec]()
        cost = costs.get(name, torch.ones(len(weight) if weight.dim() else 1))  # on the CPU, as plans go to all ranks
        cost = cost + LEAST_COST * cost.mean().clamp(min=1e-30)
        rows = search_rows(weight, cost) if kind != "small" and name not in kept else None
        for step in STEPS if rows is not None else ():
            scale = row_scale(weight, QuantSpec(8, step, rows))
            reach = float((weight.abs().amax(dim=1) / scale).max())  # rare levels cost little: cut none
            grids.append(QuantSpec(min(8, max(2, 1 + math.ceil(math.log2(reach + 0.5)))), step, rows))
        table[name] = []
        for spec in [kept[name]] if name in kept else grids:
            codes, stored_scale = quantize_per_row(weight, spec)
            error = float((weight - dequantize_per_row(codes, stored_scale)).square().sum(dim=1).cpu() @ cost)
            table[name].append((order0_bytes(codes) + 2 * len(codes), error, spec))
        if kind != "mlp" and name not in kept: table[name].append((2.0 * weight.numel(), 0.0, None))
    return table
def allocate(table: RateTable, budget: float) -> QuantPlan:
    """Spend `budget` predicted bytes: always on the finer grid that lowers the expected loss most per byte and fits."""
    level, left = dict.fromkeys(table, 0), budget - sum(points[0][0] for points in table.values())
    while True:
        steps = [(table[n][i + 1][0] - table[n][i][0], table[n][i][1] - table[n][i + 1][1], n)
                 for n, i in level.items() if i + 1 < len(table[n])]
        moves = [(gain / max(size, 1e-9), n, size) for size, gain, n in steps if size <= left]
        if not moves: return {name: spec for name, i in level.items() if (spec := table[name][i][2])}
        _, name, size = max(moves)
        level[name], left = level[name] + 1, left - size
# ---- 5 Model ---------------------------------------------------------------------------------------------------------
def norm(x: Tensor) -> Tensor:  # RMS norm over the last dimension, without weights (arXiv:1910.07467)
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)
KeyValue = tuple[Tensor, Tensor]  # keys and values of one layer, each (B, T, KV, head_dim)
Kept = list[KeyValue]  # of the layers so far
ATTENTION_CHUNK, BAND_CHUNKS = 128, 16  # queries at a time in `attend_in_chunks`; chunks in an evaluated segment
class CastedLinear(nn.Module):
    """Linear layer without bias: fp32 master weight, cast to the format of its input in the forward. With a `spec` it
    trains under fake quantization: once per optimizer step `refresh` rounds the weight into `forward_weight`, which the
    forward uses. Quantization is a matter of values, not of the graph: switching it on recompiles nothing."""
    forward_weight: Tensor
    def __init__(self, in_features: int, out_features: int, spec: QuantSpec | None = None) -> None:
        super().__init__()
        self.weight, self.spec = nn.Parameter(torch.empty(out_features, in_features)), spec
        self.trains_on_grid = spec is not None  # unlike `spec`, nothing that changes during a run
        if spec: self.register_buffer("forward_weight", torch.empty_like(self.weight.data), persistent=False)
    @torch.no_grad()
    def refresh(self, quantize: bool) -> None:
        """Set the weight that the forward uses: fake-quantized, or the master weight itself."""
        if self.spec is not None:
            scale = row_scale(self.weight, self.spec)
            self.forward_weight.copy_(fake_quantize_per_row(self.weight, scale, self.spec) if quantize else self.weight)
    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if not self.trains_on_grid: return F.linear(x, self.weight.to(x.dtype))
        # Straight-through estimator (arXiv:1308.3432): the difference is exactly 0, its gradient the weight's.
        return F.linear(x, (self.forward_weight + (self.weight - self.weight.detach())).to(x.dtype))
def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the split halves of queries or keys (B, T, H, head_dim) by cosines and sines (2, T, head_dim / 2)."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope.to(x.dtype).unsqueeze(2)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
def visible(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Mask (queries, keys): a query, counted from the end as the keys are, sees itself and `window - 1` keys before."""
    own, key = torch.arange(keys - queries, keys, device=device).unsqueeze(1), torch.arange(keys, device=device)
    return (key <= own) & (key > own - window)
def attend(q: Tensor, k: Tensor, v: Tensor, window: int, kernel: str) -> Tensor:
    """Causal attention (B, S, H, D); queries q (B, S, H, D) are the last S of the T positions of k, v (B, T, KV, D) and
    see `window` positions each. `kernel`: "flash3" (package flash_attn_interface), "sdpa" (PyTorch) or "chunks"."""
    if kernel == "chunks": return attend_in_chunks(q, k, v, window)
    span, length = q.size(1), k.size(1)
    if kernel == "flash3":
        from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]
        out = flash_attn_func(q, k, v, causal=True, window_size=(window - 1 if length > window else -1, -1))
        return out[0] if isinstance(out, tuple) else out
    mask = visible(span, length, window, q.device) if span < length or length > window else None
    k, v = (x if mask is None else x.repeat_interleave(q.size(2) // x.size(2), 2) for x in (k, v))  # mask or groups
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, mask is None, enable_gqa=mask is None).transpose(1, 2)
def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """What `attend` computes, chunk of queries by chunk: faster than PyTorch's kernel on a CPU (tests/bench.py)."""
    (batch, span, heads, dim), (_, length, kv_heads, _) = q.shape, k.shape
    q = (q * dim**-0.5).view(batch, span, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)  # (B, KV, H / KV, S, D)
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()  # or every chunk would copy its part
    outs: list[Tensor] = []
    chunk = ATTENTION_CHUNK * (2 if torch.compiler.is_compiling() else 1)  # fewer of them are faster to compile
    for part in q.split(chunk, dim=3):
        rows, end = part.size(3), length - span + len(outs) * chunk + part.size(3)
        first = max(0, end - rows - window + 1)
        scores = part.reshape(batch, kv_heads, -1, dim) @ k[:, :, first:end].mT
        bias = torch.where(visible(rows, end - first, window, q.device), 0.0, -math.inf).to(q.dtype)
        weights = torch.softmax(scores.view(batch, kv_heads, -1, rows, end - first) + bias, -1)
        out = weights.view(batch, kv_heads, -1, end - first) @ v[:, :, first:end]
        outs.append(out.view(batch, kv_heads, -1, rows, dim))
    return torch.cat(outs, 3).permute(0, 3, 1, 2, 4).reshape(batch, span, heads, dim)
class CausalSelfAttention(nn.Module):
    """Grouped-query attention with RMS-normalised queries and keys, RoPE and a learned gain per query head."""
    def __init__(self, cfg: Config, index: int, kernel: str) -> None:
        super().__init__()
        dim, self.head_dim = cfg.model_dim, cfg.model_dim // cfg.num_heads
        self.window, self.kernel, self.exclusive = cfg.train_seq_len, kernel, index >= cfg.num_layers - cfg.xsa_layers
        kv_dim = cfg.num_kv_heads * self.head_dim
        self.q_proj, self.out_proj = CastedLinear(dim, dim), CastedLinear(dim, dim)
        self.k_proj, self.v_proj = CastedLinear(dim, kv_dim), CastedLinear(dim, kv_dim)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.value_mix = nn.Parameter(torch.full((2,), 0.5)) if cfg.value_residual and index else None
    def forward(self, x: Tensor, span: int, rope: Tensor, past: KeyValue | None, kept: Kept) -> Tensor:
        """x (B, T, D) -> output of its last `span` positions (B, span, D); `past`: its keys and values from before;
        `kept`: those of the layers below, where its own are appended. Value residual (arXiv:2410.17897): values of the
        first layer are mixed into its own."""
        batch, length, _ = x.shape
        k, v = (f(x).view(batch, length, -1, self.head_dim) for f in (self.k_proj, self.v_proj))
        q = self.q_proj(x[:, length - span :]).view(batch, span, -1, self.head_dim)
        q = rotate(norm(q), rope[:, length - span :]) * self.q_gain.to(q.dtype).unsqueeze(-1)
        if self.value_mix is not None: v = self.value_mix[0] * v + self.value_mix[1] * kept[0][1]
        k, own = rotate(norm(k), rope), v[:, length - span :]
        kept.append((k, v))
        if past is not None: k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        out = attend(q, k, v, self.window, self.kernel)  # (B, span, H, head_dim)
        if self.exclusive:  # XSA: drop the part along the position's own value, which the residual stream has anyway
            value = F.normalize(own, dim=-1).unsqueeze(3)  # (B, span, KV, 1, head_dim)
            out = out.view(batch, span, value.size(2), -1, self.head_dim)
            out = out - (out * value).sum(dim=-1, keepdim=True) * value
        return self.out_proj(out.reshape(batch, span, -1))
class MLP(nn.Module):
    """Two layers with squared (leaky) ReLU (Primer, arXiv:2109.08668)."""
    def __init__(self, cfg: Config, plan: QuantPlan, prefix: str) -> None:
        super().__init__()
        hidden, self.slope = cfg.mlp_mult * cfg.model_dim, cfg.relu_slope
        self.up_proj = CastedLinear(cfg.model_dim, hidden, plan.get(f"{prefix}.up_proj.weight"))
        self.down_proj = CastedLinear(hidden, cfg.model_dim, plan.get(f"{prefix}.down_proj.weight"))
    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        hidden = F.leaky_relu(self.up_proj(x), self.slope)
        return self.down_proj(hidden * hidden)
class Block(nn.Module):
    """Residual mix with the embedded input, then attention and MLP, each scaled per channel."""
    def __init__(self, cfg: Config, plan: QuantPlan, index: int, kernel: str) -> None:
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(cfg, index, kernel), MLP(cfg, plan, f"blocks.{index}.mlp")
        self.mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(cfg.model_dim)) for _ in range(2))
    def forward(self, x: Tensor, x0: Tensor, span: int, rope: Tensor, past: KeyValue | None, kept: Kept) -> Tensor:
        """x, x0 (B, T, D) -> the last `span` positions (B, span, D); earlier ones only give what goes to `kept`."""
        mix, length = self.mix.to(x.dtype), x.size(1)
        x = mix[0] * x + mix[1] * x0
        x = x[:, length - span :] + self.attn_scale.to(x.dtype) * self.attn(norm(x), span, rope, past, kept)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x))
class BigramHash(nn.Module):
    """Embedding of hashed token pairs, projected to the model width. Only the table starts at zero: both learn."""
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.buckets, self.embed = cfg.bigram_vocab_size, nn.Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.out_proj, self.scale = CastedLinear(cfg.bigram_dim, cfg.model_dim), nn.Parameter(torch.tensor(0.05))
    def bucket(self, input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T), of a token and the one before
        ids = input_ids.to(torch.int32)
        pair = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % (self.buckets - 1)
        return F.pad(pair, (1, 0), value=self.buckets - 1)
    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:  # (B, T) -> (B, T, model_dim)
        return self.out_proj(self.embed(self.bucket(input_ids)).to(dtype)) * self.scale.to(dtype)
class GPT(nn.Module):
    """The whole model. One forward path: `embedded` -> `hidden` -> `logits` -> `nll`."""
    angles: Tensor  # cosines and sines (2, positions, head_dim / 2)
    def __init__(self, cfg: Config, plan: QuantPlan, dtype: torch.dtype, kernel: str = "sdpa") -> None:
        """`plan`: grids that the MLP trains on (empty: none); `dtype`: of the forward; `kernel`: see `attend`."""
        super().__init__()
        self.dtype, self.softcap = dtype, cfg.logit_softcap
        self.embed = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.bigram, self.smear_gate = BigramHash(cfg), nn.Parameter(torch.zeros(cfg.model_dim))
        self.blocks = nn.ModuleList(Block(cfg, plan, i, kernel) for i in range(cfg.num_layers))
        self.num_skips = cfg.num_layers // 2
        self.skip_scale = nn.Parameter(torch.ones(self.num_skips, cfg.model_dim))
        self.lm_head = None if cfg.tie_embeddings else CastedLinear(cfg.model_dim, cfg.vocab_size)
        head_dim, positions = cfg.model_dim // cfg.num_heads, torch.arange((1 + BAND_CHUNKS) * cfg.train_seq_len)
        angles = torch.outer(positions.float(), cfg.rope_base ** (-torch.arange(0, head_dim, 2).float() / head_dim))
        self.register_buffer("angles", torch.stack((angles.cos(), angles.sin())), persistent=False)  # arXiv:2104.09864
    @torch.no_grad()
    def init_weights(self, cfg: Config) -> None:
        """Initial weights; gains, scales, gates and mixes have theirs from their constructors."""
        for name, module in self.named_modules():
            if isinstance(module, CastedLinear):
                nn.init.orthogonal_(module.weight)
                if name.startswith("blocks.") and name.endswith(("out_proj", "down_proj")): module.weight.zero_()
        self.bigram.out_proj.weight.mul_((2 * cfg.num_layers) ** -0.5)
        self.bigram.embed.weight.zero_()
        nn.init.normal_(self.embed.weight, std=cfg.tied_embed_init_std if cfg.tie_embeddings else 1.0)
    def refresh(self, quantize: bool, plan: QuantPlan | None = None) -> None:
        """After the weights changed: fake-quantize the layers that train so, or not; `plan`: new grids."""
        for name, module in self.named_modules():
            if isinstance(module, CastedLinear):
                if plan and module.spec: module.spec = plan[f"{name}.weight"]
                module.refresh(quantize)
    def embedded(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T) -> x0 (B, T, D): embeddings; SmearGate blends in the predecessor (modded-nanogpt)."""
        x = norm(self.embed(input_ids).to(self.dtype) + self.bigram(input_ids, self.dtype))
        gate = torch.sigmoid(self.smear_gate).to(x.dtype)
        return (1 - gate) * x + gate * F.pad(x, (0, 0, 1, 0))[:, :-1]
    def hidden(self, x0: Tensor, span: int, rope: Tensor, past: Kept | None = None) -> tuple[Tensor, Kept]:
        """x0 (B, T, D) -> hidden states of the last `span` positions, keys and values (`past` of the next)."""
        x, skip_scale = x0, self.skip_scale.to(self.dtype)
        skips: list[Tensor] = []
        kept: Kept = []
        for i, block in enumerate(self.blocks):
            if i >= self.num_skips and skips:  # with an odd number of blocks the last one has no skip to take
                x = x + skip_scale[i - self.num_skips] * skips.pop()
            x = block(x, x0, span if block is self.blocks[-1] else x.size(1), rope, past[i] if past else None, kept)
            if i < self.num_skips: skips.append(x)
        return norm(x), kept
    def logits(self, hidden: Tensor) -> Tensor:
        """(B, S, D) -> soft-capped logits (B, S, VOCAB_SIZE), fp32."""
        raw = F.linear(hidden, self.embed.weight.to(hidden.dtype)) if self.lm_head is None else self.lm_head(hidden)
        return self.softcap * torch.tanh(raw.float() * (1 / self.softcap))
    def chunk_nll(self, x0: Tensor, target_ids: Tensor, rope: Tensor, past: Kept | None) -> tuple[Tensor, Kept]:
        """NLL (B, S), fp32 nats, of the targets (B, S) of x0's last S positions, and what `hidden` keeps."""
        hidden, kept = self.hidden(x0, target_ids.size(1), rope, past)
        nll = F.cross_entropy(self.logits(hidden).flatten(0, 1), target_ids.flatten(), reduction="none")
        return nll.view_as(target_ids), kept
    def nll(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:  # of token ids (B, T) that start a sequence
        return self.chunk_nll(self.embedded(input_ids), target_ids, self.angles[:, : input_ids.size(1)], None)[0]
    def loss(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:  # mean NLL of a training batch, nats per token
        return self.nll(input_ids, target_ids).mean()
def activation_bytes(cfg: Config, rt: Runtime) -> float:
    """Bytes per token that the forward keeps for the backward: a count of saved tensors (compiled graphs keep less)."""
    size, dim, kv = rt.compute_dtype.itemsize, cfg.model_dim, cfg.model_dim * cfg.num_kv_heads // cfg.num_heads
    block = (12 + size * (8 + 3 * cfg.mlp_mult)) * dim + (4 + size * (2 + cfg.value_residual)) * kv + 9 * cfg.num_heads
    if rt.attention == "chunks":  # scores of every query with the keys of its chunk
        block += size * cfg.num_heads * (cfg.train_seq_len + min(ATTENTION_CHUNK, cfg.train_seq_len)) // 2
    exclusive = min(cfg.xsa_layers, cfg.num_layers) * size * (dim + kv)
    return cfg.num_layers * block + exclusive + (8 + 5 * size) * dim + 8 * cfg.vocab_size
# ---- 6 Optimizers ----------------------------------------------------------------------------------------------------
def newton_schulz(grads: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Approximately orthogonalise a stack of matrices (N, R, C): quintic iteration of Muon (Keller Jordan, 2024)."""
    (a, b, c), tall = (3.4445, -4.7750, 2.0315), grads.size(1) > grads.size(2)
    x = (grads.mT if tall else grads).to(dtype)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x.mT if tall else x
class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then orthogonalised updates (Keller Jordan, 2024), with decoupled weight decay.
    Matrices of one shape are orthogonalised as one stack, shared out over the ranks by work; momentum is on all."""
    def __init__(self, params: list[nn.Parameter], cfg: Config, rt: Runtime) -> None:
        super().__init__(params, {"lr": cfg.matrix_lr, "momentum": cfg.muon_momentum})
        self.decay, self.steps, self.rt, self.equal_rows = cfg.weight_decay, cfg.muon_backend_steps, rt, cfg.muon_eq
        work = [2.0 * min(p.shape) ** 2 * max(p.shape) + min(p.shape) ** 3 for p in params]
        turns = enumerate(sorted(range(len(params)), key=lambda i: -work[i]))
        self.mine = sorted(i for turn, i in turns if turn % rt.world_size == rt.rank)
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients in place."""
        group = self.param_groups[0]
        params, grads = group["params"], [p.grad for p in group["params"]]
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        updates = torch._foreach_add(grads, buffers, alpha=group["momentum"])
        flat = torch.zeros(sum(p.numel() for p in params), dtype=self.rt.compute_dtype, device=params[0].device)
        views = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]
        stacks: dict[torch.Size, list[int]] = defaultdict(list)
        for i in self.mine: stacks[params[i].shape].append(i)
        for members in stacks.values():
            stack = torch.stack([updates[i] for i in members])
            if self.equal_rows: stack /= stack.norm(dim=2, keepdim=True) + 1e-12  # MuonEq-R
            orthogonal = newton_schulz(stack, self.steps, self.rt.compute_dtype)
            torch._foreach_copy_([views[i] for i in members], list(orthogonal))
        self.rt.all_reduce(flat)  # each rank filled in its own matrices
        torch._foreach_mul_(params, 1 - group["lr"] * self.decay)
        for p, update in zip(params, views, strict=True):
            p.add_(update.to(p.dtype), alpha=-group["lr"] * max(1.0, p.size(0) / p.size(1)) ** 0.5)
class Optimizers:
    """All optimizers of a run over one flat gradient: one all-reduce, one clip, one schedule."""
    def __init__(self, model: GPT, cfg: Config, rt: Runtime) -> None:
        """Give every parameter to exactly one optimizer; raises ValueError when that fails."""
        self.cfg, self.rt = cfg, rt
        params = dict(model.named_parameters())
        groups = [{"params": [model.embed.weight], "lr": cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr},
                  {"params": [model.bigram.embed.weight], "lr": cfg.tied_embed_lr},
                  {"params": [p for n, p in params.items() if category(n) == "small"], "lr": cfg.scalar_lr}]
        if model.lm_head is not None:
            groups.append({"params": [model.lm_head.weight], "lr": cfg.head_lr, "weight_decay": 0.0})
        adam = torch.optim.AdamW(groups, 1e-3, (cfg.beta1, cfg.beta2), cfg.adam_eps, cfg.weight_decay, fused=True)
        self.muon = Muon([p for n, p in params.items() if n.endswith("_proj.weight")], cfg, rt)
        self.all: list[torch.optim.Optimizer] = [adam, self.muon]
        check_ownership(params, self.all)
        self.base_lr = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.all]
        # Gradients are views of one buffer that ends with what ranks must agree on: loss, rank 0's clock, stop signal.
        sizes = [p.numel() for p in params.values()]
        self.flat = torch.zeros(sum(sizes) + 3, device=rt.device)
        for p, view in zip(params.values(), self.flat.split([*sizes, 3]), strict=False): p.grad = view.view_as(p)
        self.grad, self.shared = self.flat[:-3], self.flat[-3:]
    def step(self, lr_scale: float, step: int) -> Tensor:
        """Sum the gradient over ranks, clip, update; returns loss, rank 0's clock (s), stop signal, gradient norm."""
        self.rt.all_reduce(self.flat)
        grad_norm = self.grad.norm()
        if self.cfg.grad_clip_norm > 0: self.grad.mul_((self.cfg.grad_clip_norm / (grad_norm + 1e-6)).clamp(max=1.0))
        for optimizer, rates in zip(self.all, self.base_lr, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True): group["lr"] = rate * lr_scale
        warm = min(1.0, step / self.cfg.muon_momentum_warmup_steps) if self.cfg.muon_momentum_warmup_steps else 1.0
        first, last = self.cfg.muon_momentum_warmup_start, self.cfg.muon_momentum
        momentum, end = (1 - warm) * first + warm * last, self.cfg.muon_momentum_end
        self.muon.param_groups[0]["momentum"] = min(momentum, lr_scale * last + (1 - lr_scale) * end)
        for optimizer in self.all: optimizer.step()
        metrics = torch.cat((self.shared, grad_norm.view(1)))
        self.flat.zero_()
        return metrics
def step_flops(model: GPT, cfg: Config) -> float:
    """FLOPs of a step: per token 6 for each weight in a product, and 6 * num_layers * model_dim * T of attention."""
    products = [p.numel() for n, p in model.named_parameters() if n.endswith(("_proj.weight", "lm_head.weight"))]
    head = model.embed.weight.numel() if cfg.tie_embeddings else 0
    return 6.0 * cfg.train_batch_tokens * (sum(products) + head + cfg.num_layers * cfg.model_dim * cfg.train_seq_len)
def check_ownership(params: Mapping[str, Tensor], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise ValueError unless every parameter is owned by exactly one optimizer."""
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    wrong = {name: owned.count(id(p)) for name, p in params.items() if owned.count(id(p)) != 1}
    if wrong or len(owned) != len(params):
        raise ValueError(f"every parameter needs exactly one optimizer; owners counted: {wrong or len(owned)}")
# ---- 7 Schedules -----------------------------------------------------------------------------------------------------
def training_seconds(cfg: Config) -> float:  # the cap (0: none) less what is kept to choose what is exported
    return cfg.max_wallclock_seconds * (1 - cfg.calibration_reserve)
def lr_scale_at(step: int, elapsed: float, step_seconds: float, cfg: Config) -> float:
    """Learning-rate factor in [0, 1]: constant, then linear to 0 over the last `warmdown_iters` steps or their worth of
    wall clock, whichever gives less (`step_seconds`: of a recent step, 0 while unknown)."""
    scale, cap = 1.0, training_seconds(cfg)
    if cfg.warmdown_iters > 0:
        scale = min(scale, (cfg.iterations - step) / cfg.warmdown_iters)
        if cap and step_seconds > 0: scale = min(scale, (cap - elapsed) / (cfg.warmdown_iters * step_seconds))
    return max(scale, 0.0)
# ---- 8 Evaluation ----------------------------------------------------------------------------------------------------
class EvalResult(NamedTuple):
    """Scores of one evaluation: mean NLL per token in nats, bits per byte of text, bytes of text, seconds taken."""
    val_loss: float
    val_bpb: float
    text_bytes: int
    seconds: float
    def __str__(self) -> str:
        return f"val_loss:{self.val_loss:.8f} val_bpb:{self.val_bpb:.8f}"
def scoring_windows(targets: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows (start, first, last) that score targets [first, last) from `start` on: the first window all its targets,
    every later one its last `stride`, the last one what is left over: each of the `targets` exactly once."""
    windows, done = [(0, 0, seq_len)], seq_len
    while done < targets:
        new = min(stride, targets - done)
        windows.append((done + new - seq_len, seq_len - new, seq_len))
        done += new
    return windows
class Evaluator:
    """Bits per byte of a model on the validation split, on all ranks, through fixed-shape compiled graphs."""
    def __init__(self, data: Data, cfg: Config, rt: Runtime) -> None:
        self.data, self.cfg, self.rt, self.token_bytes = data, cfg, rt, TokenBytes(data.tokenizer, rt.device)
    @torch.no_grad()
    def run(self, model: GPT, mode: str, batch: int, label: str) -> EvalResult:
        """Score every target once; `batch`: windows or segments per forward and rank. Compiled where that is on."""
        started, rt = time.monotonic(), self.rt
        sums, shown, begun = torch.zeros(2, dtype=torch.float64, device=rt.device), started, -1.0
        for share, scores in (self.sliding if mode == "sliding" else self.banded)(model, batch):
            sums += scores
            begun = time.monotonic() if begun < 0 else begun  # the first batch compiles: no measure of speed
            if (now := time.monotonic()) > shown + 10:
                shown = now
                rt.log(f"{label} done:{share:.1%} eta:{(now - begun) * (1 - share) / share:.0f}s")
        total, text_bytes = rt.all_reduce(sums).tolist()
        bpb = total / math.log(2) / max(text_bytes, 1)
        return EvalResult(total / self.data.val_targets, bpb, round(text_bytes), time.monotonic() - started)
    def sliding(self, model: GPT, batch: int) -> Iterator[tuple[float, Tensor]]:
        """(share of this rank's work that is done, `_sums`) of batches of windows, see `scoring_windows`."""
        seq_len, stride, rank = self.cfg.train_seq_len, self.cfg.eval_stride or self.cfg.train_seq_len, self.rt.rank
        windows = scoring_windows(self.data.val_targets, seq_len, stride)
        nll, slot = self.rt.compiled(model.nll), torch.arange(seq_len, device=self.rt.device)
        batches = [(1, seq_len, windows[:1])] if stride < seq_len and rank == 0 else []  # the first: another shape
        mine = windows[stride < seq_len :][rank :: self.rt.world_size]
        batches += [(batch, stride, mine[at : at + batch]) for at in range(0, len(mine), batch)]
        for done, (size, span, part) in enumerate(batches, 1):
            part = part + [(part[0][0], seq_len, seq_len)] * (size - len(part))  # padding scores nothing
            tokens = self._tokens([start for start, _, _ in part], seq_len + 1)
            first = torch.tensor([first for _, first, _ in part], device=self.rt.device)
            inputs, targets = tokens[:, :-1].contiguous(), tokens[:, -span:].contiguous()
            with self.rt.autocast(): losses = (model.nll if span > stride else nll)(inputs, targets)
            yield done / len(batches), self._sums(losses, inputs[:, -span:], targets, slot[-span:] >= first[:, None])
    def banded(self, model: GPT, batch: int) -> Iterator[tuple[float, Tensor]]:
        """The same from one pass, in which a position attends to itself and the seq_len - 1 positions before; segments
        of BAND_CHUNKS chunks, each after the last chunk of the one before, unscored; the chunk before is `past`."""
        seq_len, rt = self.cfg.train_seq_len, self.rt
        chunks = self.data.val_targets // seq_len
        mine = range(0, max(chunks - 1, 1), BAND_CHUNKS)[rt.rank :: rt.world_size]
        step = rt.compiled(model.chunk_nll)
        for at in range(0, len(mine), batch):
            starts = list(mine[at : at + batch])
            starts += [chunks] * (min(batch, len(mine)) - len(starts))  # padding scores nothing
            tokens = self._tokens([start * seq_len for start in starts], (1 + BAND_CHUNKS) * seq_len + 1)
            past = None
            for i, begin in enumerate(range(0, min(1 + BAND_CHUNKS, chunks - starts[0]) * seq_len, seq_len)):
                inputs, targets = tokens[:, begin : begin + seq_len], tokens[:, begin + 1 : begin + seq_len + 1]
                x0 = model.embedded(tokens[:, max(0, begin - 2) : begin + seq_len])[:, -seq_len:]  # it looks back by 2
                with rt.autocast(): losses, past = step(x0, targets, model.angles[:, begin : begin + seq_len], past)
                scored = torch.tensor([[start + i < chunks and (i > 0 or start == 0)] for start in starts])
                done = (at + len(starts) * (i + 1) / (1 + BAND_CHUNKS)) / len(mine)
                yield min(done, 1.0), self._sums(losses, inputs, targets, scored.to(rt.device))
    def _tokens(self, starts: Iterable[int], count: int) -> Tensor:  # (len(starts), count), on the device
        return torch.from_numpy(np.stack([self.data.val.read(start, count) for start in starts])).to(self.rt.device)
    def _sums(self, losses: Tensor, inputs: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
        """(NLL, bytes) summed in float64 over the targets that are `scored`; all (B, S) or broadcast to it."""
        counts = self.token_bytes.count(inputs, targets)
        return torch.stack(((losses.double() * scored).sum(), (counts * scored).sum().double()))
    def report(self, model: GPT, label: str) -> None:
        """Score `model` by EVAL_MODE; as "final" (read from an artifact) print the run's last lines."""
        cfg = self.cfg
        result = self.run(model, cfg.eval_mode, cfg.eval_batch_seqs, f"{label}_{cfg.eval_mode}")
        how = f"stride:{cfg.eval_stride}" if cfg.eval_mode == "sliding" else f"band:{cfg.train_seq_len}"
        rate = f"eval_time:{1000 * result.seconds:.0f}ms tokens_per_s:{self.data.val_targets / result.seconds:.0f}"
        self.rt.log(f"{label}_{cfg.eval_mode} {how} {result} {rate}")
        if label == "final": self.rt.log(f"final_int8_zlib_roundtrip_exact {result}")  # log readers look for it
# ---- 9 Artifact: header and flat streams in one zstd frame -----------------------------------------------------------
ARTIFACT_HEAD = b"PGPT" + struct.pack("<I", 2)  # magic and format version
ZSTD_LEVEL, MAX_PAYLOAD_BYTES = 22, 1 << 27
STREAMS = ("int4", "int5", "int6", "int7", "int8", "scale", "fp16")  # int4: codes of 2 to 4 bits, two to a byte
EXPORT_ROUNDS, FULL_ENOUGH, AIM = 5, 0.996, 0.998  # compressions at most; shares of what is free: done, aimed at
def write_atomically(path: Path, content: bytes) -> None:
    """Write, fsync, rename: `path` is the old file or the whole new one. Raises OSError when the disk is full."""
    scratch = path.with_name(f"{path.name}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error: raise OSError(f"{path} was not written ({error}): make room") from None
    finally: scratch.unlink(missing_ok=True)
def pack_nibbles(codes: Tensor) -> bytes:
    """Codes of at most 4 bits (N,), two to a byte, low nibble first; an odd end is filled with 0."""
    flat = F.pad(codes.flatten(), (0, codes.numel() % 2)).numpy().view(np.uint8) & 15
    return (flat[0::2] | flat[1::2] << 4).tobytes()
def unpack_nibbles(packed: Tokens, count: int) -> Tokens:
    """The inverse of `pack_nibbles`: `count` int8 codes."""
    return (np.stack((packed & 15, packed >> 4), axis=1).reshape(-1)[:count].astype(np.int8) ^ 8) - 8
def stream_sizes(shape: tuple[int, ...], bits: int) -> dict[str, int]:
    """Bytes that a tensor of this shape has in each of the streams; 16 bits stand for fp16 values, without scales."""
    numel = math.prod(shape)
    codes = {f"int{max(bits, 4)}": (numel + 1) // 2 if bits <= 4 else numel, "scale": 2 * next(iter(shape), 1)}
    return {"fp16": 2 * numel} if bits == 16 else codes
def encode_artifact(stored: StoredState, plan: QuantPlan, cfg: Config, tokenizer_sha256: str) -> bytes:
    """The artifact that holds what `quantize_state` returned: the same bytes for the same weights, config and plan."""
    tensors, streams = [], {kind: bytearray() for kind in STREAMS}
    grids = {n: (plan[n].bits, -plan[n].step, n) if n in plan else (16, 0.0, n) for n in stored}
    for name in sorted(stored, key=grids.__getitem__):  # like grids side by side
        (values, *scale), bits = stored[name], grids[name][0]
        entry = {"name": name, "shape": list(values.shape), "bits": bits, "dtype": f"int{bits}" if scale else "float16"}
        tensors.append(entry)
        parts = [pack_nibbles(values) if bits <= 4 else values.contiguous().numpy().tobytes()]
        parts += [s.numpy().tobytes() for s in scale]
        for kind, part in zip(stream_sizes(tuple(values.shape), bits), parts, strict=True): streams[kind] += part
    contents = {"config": {name: getattr(cfg, name) for name in MODEL_FIELDS}, "tensors": tensors}
    header = json.dumps(contents | {"tokenizer_sha256": tokenizer_sha256}, separators=(",", ":")).encode()
    payload = struct.pack("<I", len(header)) + header + b"".join(streams.values())
    # Short matches in codes cost more than the entropy coder would take for them: 5% of the file with the level's own.
    level = zstandard.ZstdCompressionParameters.from_level(ZSTD_LEVEL, write_checksum=True, min_match=7, window_log=14)
    return ARTIFACT_HEAD + zstandard.ZstdCompressor(compression_params=level).compress(payload)
def artifact_payload(path: Path, content: bytes | None = None) -> bytes:
    """The decompressed artifact. Raises FileNotFoundError, or ValueError for a foreign or damaged one."""
    if content is None and not path.is_file():
        raise FileNotFoundError(f"no artifact at {path}: a finished run leaves logs/<run_id>.ptz")
    content = path.read_bytes() if content is None else content
    if content[:8] != ARTIFACT_HEAD:
        raise ValueError(f"{path} is not an artifact of this script, or of another artifact format: {content[:8]!r}")
    try:
        size = zstandard.get_frame_parameters(content[8:]).content_size
        if not 4 <= size <= MAX_PAYLOAD_BYTES: raise zstandard.ZstdError(f"it claims {size} bytes of content")
        return zstandard.ZstdDecompressor().decompress(content[8:], max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); copy it again") from None
def read_artifact(path: Path, content: bytes | None = None) -> tuple[dict[str, Any], StoredState, QuantPlan]:
    """(header, tensors, plan) of the artifact at `path`, or of `content`; FileNotFoundError or ValueError if bad."""
    payload = artifact_payload(path, content)
    begin = 4 + struct.unpack_from("<I", payload)[0]
    try:
        header = json.loads(payload[4:begin])
        entries = [(str(t["name"]), tuple(map(int, t["shape"])), int(t["bits"])) for t in header["tensors"]]
        sound = all(min(s, default=0) >= 0 and (b == 16 or 2 <= b <= 8 and len(s) == 2) for _, s, b in entries)
        sound = sound and len({n for n, _, _ in entries}) == len(entries) and "config" in header
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} has a damaged header ({type(error).__name__}: {error})") from None
    sizes = [stream_sizes(shape, bits) for _, shape, bits in entries]
    ends = list(itertools.accumulate((sum(size.get(k, 0) for size in sizes) for k in STREAMS), initial=begin))
    offset, end = dict(zip(STREAMS, ends, strict=False)), ends[-1]
    if not sound or end != len(payload):
        raise ValueError(f"{path} is damaged: its header describes {end} bytes, it holds {len(payload)}")
    stored: StoredState = {}
    for (name, shape, bits), size in zip(entries, sizes, strict=True):
        parts = [np.frombuffer(payload, np.uint8, n, offset[kind]) for kind, n in size.items()]
        offset.update({kind: offset[kind] + n for kind, n in size.items()})
        dtype = "<f2" if bits == 16 else np.int8
        values = unpack_nibbles(parts[0], math.prod(shape)) if bits <= 4 else parts[0].view(dtype)
        arrays = [values.reshape(shape), *(p.view("<f2") for p in parts[1:])]
        stored[name] = tuple(torch.from_numpy(array.copy()) for array in arrays)
    return header, stored, {name: QuantSpec(bits) for name, _, bits in entries if bits < 16}
def check_shapes(found: Mapping[str, Tensor], cfg: Config, path: Any) -> None:
    """Raise ValueError unless `found` are the tensors of the model of `cfg`, before memory is taken for one."""
    with torch.device("meta"), contextlib.suppress(RuntimeError, TypeError, OverflowError):  # forged sizes
        state = GPT(cfg, {}, torch.float32).state_dict() if cfg.num_layers <= len(found) else {}
        if state and {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in state.items()}: return
    raise ValueError(f"{path} holds other tensors than its config needs")
def load_artifact(path: Path, cfg: Config, rt: Runtime, tokenizer_sha256: str) -> GPT:
    """The model of an artifact, on the device; ValueError when its tensors or tokenizer are not those of `cfg`."""
    header, stored, plan = read_artifact(path, rt.from_rank_0(path.read_bytes))  # other nodes may not have the file
    if header.get("tokenizer_sha256") != tokenizer_sha256:
        raise ValueError(f"{path} needs the tokenizer of sha256 {header.get('tokenizer_sha256')}: set TOKENIZER_PATH")
    check_shapes({name: parts[0] for name, parts in stored.items()}, cfg, path)
    model = GPT(cfg, {}, rt.compute_dtype, rt.attention)
    model.load_state_dict(dequantize_state(stored))
    rt.log(f"artifact loaded:{path} tensors:{len(stored)} bits:{bits_of(plan)}")
    return model.to(rt.device)
def with_model_fields(cfg: Config, stored: Any, path: str) -> Config:
    """`cfg` with the model's fields as a file at `path` gives them; everything else as given."""
    if not isinstance(stored, dict) or any(type(stored.get(n)) is not type(getattr(cfg, n)) for n in MODEL_FIELDS):
        raise ValueError(f"{path} has a damaged header, or is of another version: its config is not of this model")
    fields = {name: stored[name] for name in MODEL_FIELDS} | {"train_batch_tokens": stored["train_seq_len"]}
    found = dataclasses.replace(cfg, **fields, micro_batch_tokens=0)
    if not (problems := config_problems(found)): return found
    raise ValueError(f"{path} cannot be used with these settings:\n  " + "\n  ".join(problems))
def bits_of(plan: QuantPlan) -> str:  # which bits a plan has in each category: mlp4,mlp5,attn5
    found = {f"{category(name)}{spec.bits}" for name, spec in plan.items()}
    return ",".join(sorted(found, key=lambda kind: ("mabe".index(kind[0]), kind)))
def log_sizes(stored: StoredState, state: Mapping[str, Tensor], plan: QuantPlan, log: Log) -> None:
    """What each matrix and category takes under an ideal order-0 coder, bytes, and the relative error of rounding."""
    sizes: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
    for name, (codes, *scale) in stored.items():
        size, spec = order0_bytes(codes) + 2 * scale[0].numel() if scale else 2.0 * codes.numel(), plan.get(name)
        raw = sum(stream_sizes(tuple(codes.shape), spec.bits if spec else 16).values())
        sizes[category(name)] = [a + b for a, b in zip(sizes[category(name)], (codes.numel(), raw, size), strict=True)]
        grid = f"bits:{spec.bits} step:{spec.step:.4g}" if spec else "bits:16"
        error = (dequantize_state({name: stored[name]})[name] - state[name].cpu()).norm() / state[name].norm().cpu()
        log(f"quant tensor:{name} {grid} bytes:{size:.0f} error:{float(error.nan_to_num()):.5f}")
    for kind, (count, stream_bytes, coded) in sizes.items():
        log(f"artifact category:{kind} params:{count} raw_bytes:{stream_bytes} order0_entropy_bytes:{coded:.0f}")
Trained = dict[str, Any]  # weights to export, costs of errors in their rows, grids trained on, Hessians to round with
def export(trained: Trained, cfg: Config, log: Log, tokenizer: str) -> tuple[Path, bool]:
    """Quantize, compress, write `logs/<run_id>.ptz`, filling the limit by its real size; (path, whether it fits)."""
    started, path, code_bytes = time.monotonic(), Path("logs", f"{cfg.run_id}.ptz"), Path(__file__).stat().st_size
    state, costs, limit = trained["weights"], trained["costs"], cfg.artifact_limit_bytes
    kept = {name: QuantSpec(*values) for name, values in trained["grids"].items()}
    plan, packed = starting_plan(state, cfg) | kept, started
    tried: list[tuple[bool, int, QuantPlan, StoredState, bytes]] = []
    quantize_state(state, {}, cfg, lambda line: None, {})  # raises for weights that are not finite
    for grids in (kept, {}):  # without the trained grids where nothing fits beside them
        table, budget = rate_table(state, costs, grids) if cfg.rate_control else {}, AIM * (limit - code_bytes)
        for _ in range(EXPORT_ROUNDS):
            plan, begun, planned = allocate(table, budget) if cfg.rate_control else plan, packed, time.monotonic()
            if any(plan == earlier for _, _, earlier, _, _ in tried): break  # all that the menu of grids offers
            stored, rounded = quantize_state(state, plan, cfg, log, trained["hessians"]), time.monotonic()
            content, packed = encode_artifact(stored, plan, cfg, tokenizer), time.monotonic()
            total = code_bytes + len(content)
            log(f"artifact round:{len(tried)} artifact_bytes:{total} plan_time:{1000 * (planned - begun):.0f}ms "
                f"rounding_time:{1000 * (rounded - planned):.0f}ms zstd_time:{1000 * (packed - rounded):.0f}ms")
            tried.append((total <= limit, total, plan, stored, content))
            if FULL_ENOUGH * (limit - code_bytes) <= len(content) <= limit - code_bytes: break
            used = sum(size for n, points in table.items() for size, _, spec in points if spec == plan.get(n))
            budget = (budget if total <= limit else min(budget, used) * AIM) * AIM * (limit - code_bytes) / len(content)
        if any(fits for fits, *_ in tried): break
    _, total, plan, stored, content = max(tried, key=lambda trial: (trial[0], trial[1] if trial[0] else -trial[1]))
    write_atomically(path, content)
    log_sizes(stored, state, plan, log)
    log(f"artifact bits:{bits_of(plan)} codec:zstd-{ZSTD_LEVEL} model_bytes:{total - code_bytes} "
        f"code_bytes:{code_bytes} artifact_bytes:{total} limit:{limit}")
    log(f"artifact path:{path} headroom_bytes:{limit - total} export_time:{1000 * (time.monotonic() - started):.0f}ms")
    if total > limit:
        log(f"error: code plus model are {total - limit} bytes over ARTIFACT_LIMIT_BYTES={limit}. The file is kept and "
            "scored, but no valid entry: set RATE_CONTROL=1 (without it, ATTN_BITS counts), or train a smaller model")
    return path, total <= limit
# ---- 10 Files that are written whole or not at all -------------------------------------------------------------------
def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Store tensors and plain values behind a sha256 of the rest of the file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, hashlib.sha256(buffer.getbuffer()).digest() + buffer.getvalue())
def load_tensors(path: Path, *needed: str) -> dict[str, Any]:
    """What `save_tensors` stored, on the CPU; runs no code from the file. FileNotFoundError, ValueError if damaged."""
    if not path.is_file(): raise FileNotFoundError(f"no file {path}: a trained run leaves logs/<run_id>.weights")
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError(f"{path} is truncated, damaged or not this script's: its checksum does not fit")
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(content[32:])) as parts:  # forged: anything
        if sum(part.file_size for part in parts.infolist()) <= len(content):  # neither packed nor overlapping
            found = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
            tensors = [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, Tensor)]
            honest = all(x.nbytes <= x.untyped_storage().nbytes() for x in tensors)
            if honest and {*needed} <= found.keys(): return found
    raise ValueError(f"{path} holds no tensors of this script, or not {' '.join(needed)}")
def checkpoint_paths(run_id: str, end: str = "") -> list[Path]:  # oldest first; `end` .tmp: torn ones, after a kill
    return sorted(Path("logs").glob(f"{run_id}.{'[0-9]' * 9}.ckpt{end}"))
def newest_checkpoint(cfg: Config, log: Log) -> dict[str, Any] | None:
    """The newest sound checkpoint of RUN_ID, if any. Raises ValueError for another config, naming what differs."""
    for path in reversed(checkpoint_paths(cfg.run_id)):
        try: state = load_tensors(path, "config", "model", "step")
        except ValueError as error:
            log(f"warning: skipped a checkpoint: {error}")
            continue
        now, then = dataclasses.asdict(cfg), state["config"]
        if differ := [n for n in now if n not in MAY_CHANGE_ON_RESUME and now[n] != then.get(n)]:
            listed = ", ".join(f"{n.upper()}={then.get(n)!r} there, {now[n]!r} now" for n in differ)
            cure = "set them back" if then.keys() >= now.keys() else "use the version of the script that wrote it"
            raise ValueError(f"{path} is of another config: {listed}; {cure}, or choose another RUN_ID")
        log(f"resume checkpoint:{path} step:{state['step']} train_time:{1000 * state['elapsed']:.0f}ms")
        return state
    if (done := Path("logs", f"{cfg.run_id}.weights")).exists():
        raise ValueError(f"RUN_ID={cfg.run_id} has no sound checkpoint, but {done}: use EXPORT_FROM, or another RUN_ID")
    log(f"warning: RUN_ID={cfg.run_id} has no sound checkpoint: it starts from the beginning")
    return None
# ---- 11 Training -----------------------------------------------------------------------------------------------------
CALIBRATION_BATCH, STOP_SIGNALS = 2048, (signal.SIGTERM, signal.SIGINT)  # tokens per backward of `measure`
class RunEnded(RuntimeError):
    """The training cannot go on (message, exit code): diverged, or stopped by a signal."""
def log_model(model: GPT, cfg: Config, rt: Runtime) -> tuple[int, int]:
    """Log sizes; `batch_plan`'s answer for the memory at hand. Raises ValueError for bad ranks or too full a disk."""
    counts: dict[str, int] = defaultdict(int)
    for name, p in model.named_parameters(): counts[category(name)] += p.numel()
    params = sum(counts.values())
    rt.log(" ".join([f"model params:{params} seed:{cfg.seed}", *(f"{kind}:{n}" for kind, n in counts.items())]))
    gb = torch.cuda.mem_get_info()[0] / 1e9 if rt.device.type == "cuda" else cfg.plan_memory_gb if cfg.dry_run else 3.0
    micro, steps = batch_plan(cfg, rt.world_size, 6e8 * gb / (activation_bytes(cfg, rt) * cfg.train_seq_len))
    rt.log(f"batch tokens:{cfg.train_batch_tokens} ranks:{rt.world_size} micro_batch_tokens:{micro * cfg.train_seq_len}"
           f" micro_steps:{steps} step_tflop_per_rank:{step_flops(model, cfg) / rt.world_size / 1e12:.4g}")
    copies = 3 + (15 if cfg.checkpoint_every else 0)  # weights, Hessians; 3 checkpoints of weights, optimizers, average
    need, free = 4 * params * copies + cfg.artifact_limit_bytes, shutil.disk_usage("logs").free
    if free < need: raise ValueError(f"logs/ has {free} bytes free, this run may write {need}: make room first")
    return micro, steps
def weights_of(model: nn.Module) -> dict[str, Tensor]:  # the master weights, by name
    return {name: p.detach() for name, p in model.named_parameters()}
STATE = ("step", "elapsed", "qat_active", "costs", "durations", "recent_losses")  # what a checkpoint holds as it is
class Trainer:
    """The training loop and all of its state."""
    def __init__(self, model: GPT, data: Data, cfg: Config, rt: Runtime) -> None:
        """Checks the batch arithmetic and the ownership of parameters; trains nothing yet."""
        assert data.train is not None, "a run that trains has training shards"
        self.model, self.shards, self.cfg, self.rt = model, data.train, cfg, rt
        self.evaluator, self.loss = Evaluator(data, cfg, rt), rt.compiled(model.loss)
        micro_seqs, self.micro_steps = log_model(model, cfg, rt)
        self.loader, self.optimizers = BatchLoader(data.train, cfg, rt, micro_seqs), Optimizers(model, cfg, rt)
        self.rank_flops = step_flops(model, cfg) / rt.world_size
        self.step, self.elapsed, self.qat_active, self.clock_zero = 0, 0.0, False, 0.0
        self.swa = AveragedModel(model)  # SWA (arXiv:1803.05407): fp32 mean of snapshots of the master weights
        self.costs, self.products = dict[str, Tensor](), dict[str, Tensor]()
        self.plan = starting_plan(model.state_dict(), cfg)
        self.durations, self.recent_losses, self.stop_signal, self.saved_at = list[float](), list[float](), 0, 0.0
    @property
    def grids(self) -> QuantPlan:  # the part of the plan that is trained on, and so must not change any more
        return {n: spec for n, spec in self.plan.items() if self.qat_active and category(n) == "mlp"}
    def save(self) -> None:
        """Write a checkpoint: all that `restore` needs. The last two stay; failing to write ends no run."""
        begun, path = time.perf_counter(), Path("logs", f"{self.cfg.run_id}.{self.step:09d}.ckpt")
        self.saved_at = self.elapsed
        if self.rt.rank != 0: return
        state = {name: getattr(self, name) for name in STATE} | {
            "config": dataclasses.asdict(self.cfg), "model": weights_of(self.model), "swa": self.swa.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers.all], "random_state": torch.get_rng_state(),
            "plan": plain(self.plan)}
        try: save_tensors(path, state)
        except OSError as error:
            return self.rt.log(f"error: no checkpoint at step {self.step}: {error}. Older ones are intact")
        for old in checkpoint_paths(self.cfg.run_id)[:-2] + checkpoint_paths(self.cfg.run_id, ".tmp"): old.unlink(True)
        self.rt.log(f"checkpoint path:{path} time:{1000 * (time.perf_counter() - begun):.0f}ms (inside the clock)")
    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `save` was called; also with another number of ranks."""
        for name in STATE: setattr(self, name, state[name])
        self.model.load_state_dict(state["model"], strict=False)
        for optimizer, saved in zip(self.optimizers.all, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.swa.load_state_dict(state["swa"])
        self.plan, self.saved_at = {n: QuantSpec(*values) for n, values in state["plan"].items()}, self.elapsed
        torch.set_rng_state(state["random_state"])
        self.model.refresh(self.qat_active, self.plan)
    def on_signal(self, number: int, _: Any) -> None:
        """SIGTERM and SIGINT end the run after the current step; a second one ends it at once."""
        self.stop_signal = number
        for each in STOP_SIGNALS: signal.signal(each, signal.SIG_DFL)
    def train_step(self, lr_scale: float, step: int) -> Tensor:
        """Forward and backward of all micro-batches, then the update; returns `Optimizers.step`'s metrics."""
        shared = self.optimizers.shared
        for input_ids, target_ids in zip(*self.loader.batch(step), strict=True):
            with self.rt.autocast(): loss = self.loss(input_ids, target_ids) / (self.micro_steps * self.rt.world_size)
            loss.backward()
            shared[0] += loss.detach()
        if self.rt.rank == 0: shared[1] = time.perf_counter() - self.clock_zero
        shared[2] = self.stop_signal
        metrics = self.optimizers.step(lr_scale, step)
        self.model.refresh(self.qat_active)
        return metrics
    def warm_up(self) -> None:
        """Untimed steps on the first batch that compile and autotune everything; all state is put back afterwards."""
        started, before = time.monotonic(), copy.deepcopy(weights_of(self.model))
        states = [optimizer.state_dict() for optimizer in self.optimizers.all]
        for _ in self.calibration_batches(): pass  # a damaged shard, even one that no step reads, shall show up now
        for _ in range(self.cfg.warmup_steps): self.train_step(1.0, 0).tolist()
        self.model.load_state_dict(before, strict=False)
        for optimizer, state in zip(self.optimizers.all, states, strict=True): optimizer.load_state_dict(state)
        self.model.refresh(False)
        self.rt.log(f"warm_up steps:{self.cfg.warmup_steps} time:{time.monotonic() - started:.3g}s (undone)")
    def calibration_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(input_ids, target_ids) of this rank's share of CALIBRATION_TOKENS: sequences spread evenly over the data."""
        rt, seq_len = self.rt, self.cfg.train_seq_len
        n = max(1, self.cfg.calibration_tokens // (seq_len * rt.world_size))
        starts = (i * self.shards.total // (n * rt.world_size) for i in range(rt.rank * n, (rt.rank + 1) * n))
        tokens = torch.from_numpy(np.stack([self.shards.read(at, seq_len + 1) for at in starts])).to(rt.device)
        yield from ((x[:, :-1], x[:, 1:]) for x in tokens.split(max(1, CALIBRATION_BATCH // seq_len)))
    def measure(self) -> None:
        """From calibration tokens: `costs` of errors in rows (mean squared gradients), `products` (C, C) of inputs."""
        begun, costs, products = time.perf_counter(), defaultdict[str, Any](float), defaultdict[str, Any](float)
        def note(name: str, x: Tensor) -> None:
            """Add a layer's inputs (B, T, C)."""
            x = x.detach().flatten(0, -2).float()
            with torch.autocast(x.device.type, enabled=False): products[name] = products[name] + x.T @ x
        layers = [(n, m) for n, m in self.model.named_modules() if isinstance(m, CastedLinear)]
        hooks = [m.register_forward_pre_hook(lambda _, args, n=n: note(n, args[0]))
                 for n, m in layers if self.cfg.error_feedback and not n.endswith(("k_proj", "v_proj"))]
        for input_ids, target_ids in self.calibration_batches():
            self.optimizers.flat.zero_()
            with self.rt.autocast(): self.model.loss(input_ids, target_ids).backward()
            for name, p in self.model.named_parameters():
                if category(name) != "small" and p.grad is not None: costs[name] += p.grad.square().mean(dim=1)
        for hook in hooks: hook.remove()
        self.optimizers.flat.zero_()
        self.costs = {name: self.rt.all_reduce(total).cpu() for name, total in costs.items()}
        for total in products.values(): self.rt.all_reduce(total)
        self.products = {f"{n}.weight": products[re.sub("[kv]_proj$", "q_proj", n)] for n, _ in layers if products}
        self.rt.log(f"calibration step:{self.step} time:{time.perf_counter() - begun:.3g}s")
    def choose_grids(self) -> None:
        """Make the plan that spends ARTIFACT_LIMIT_BYTES, weighing errors by their costs on training tokens."""
        begun, weights = time.perf_counter(), weights_of(self.model)
        self.measure()
        budget = AIM * (self.cfg.artifact_limit_bytes - Path(__file__).stat().st_size)
        self.plan = self.rt.from_rank_0(lambda: allocate(rate_table(weights, self.costs, self.grids), budget))
        self.rt.log(f"plan step:{self.step} bits:{bits_of(self.plan)} time:{time.perf_counter() - begun:.3g}s")
    def start_qat(self) -> None:
        """Switch fake quantization on, on the grids of the plan; snapshots from before would not fit those after."""
        if self.cfg.rate_control and self.step: self.choose_grids()
        self.qat_active, self.swa = True, AveragedModel(self.model)
        self.model.refresh(True, self.plan)
        self.rt.log(f"qat active:1 step:{self.step} bits:{bits_of(self.grids)}")
    @torch.no_grad()
    def quantized_loss(self, weights: dict[str, Tensor], hessians: dict[str, Tensor]) -> float:
        """Mean NLL on the calibration tokens of weights as the plan would store them; puts the weights back."""
        before, sums = copy.deepcopy(weights_of(self.model)), torch.zeros(2, device=self.rt.device)
        stored = quantize_state(weights, self.plan, self.cfg, lambda line: None, hessians, self.rt)
        for state, active in ((dequantize_state(stored), False), (before, self.qat_active)):
            self.model.load_state_dict(state, strict=False)
            self.model.refresh(active)
            for batch in self.calibration_batches() if state is not before else ():
                with self.rt.autocast(): sums += torch.stack((self.model.loss(*batch), sums.new_ones(())))
        return float(torch.divide(*self.rt.all_reduce(sums)))
    def choose_weights(self) -> Trained:
        """Average (of two snapshots or more) or last weights, nearest or error feedback: what does best in training."""
        cfg, begun, weights = self.cfg, time.perf_counter(), {"last": weights_of(self.model)}
        if self.swa.n_averaged > 1: weights["swa"] = weights_of(self.swa.module)
        def keep(weights: dict[str, Tensor], hessians: dict[str, Tensor]) -> Trained:  # what `export` needs, on disk
            trained = {"weights": weights, "costs": self.costs, "hessians": hessians, "grids": plain(self.grids),
                       "config": dataclasses.asdict(cfg)}
            if self.rt.rank == 0: save_tensors(Path("logs", f"{cfg.run_id}.weights"), trained)
            return trained
        keep(weights[[*weights][-1]], {})  # before anything of what follows can fail
        if cfg.rate_control and not self.costs: self.choose_grids()
        elif cfg.error_feedback: self.measure()
        if cfg.swa_always: weights = dict([weights.popitem()])
        found = self.products
        hessians: dict[str, dict[str, Tensor]] = {"nearest": {}} | ({"feedback": found} if found else {})
        if found and self.grids: hessians["feedback_but_mlp"] = {n: h for n, h in found.items() if n not in self.grids}
        losses = {(w, "nearest"): self.quantized_loss(weights[w], {}) for w in weights if len(weights) > 1 or found}
        chosen = min(losses, key=losses.__getitem__, default=([*weights][-1], ""))[0]
        losses |= {(chosen, h): self.quantized_loss(weights[chosen], hessians[h]) for h in [*hessians][1:]}
        how = min(hessians, key=lambda h: losses.get((chosen, h), 0.0))
        out = [f"{w}_{h}_loss:{x:.5f}" for (w, h), x in losses.items()] + [f"time:{time.perf_counter() - begun:.3g}s"]
        self.rt.log(" ".join([f"export weights:{chosen} rounding:{how} snapshots:{int(self.swa.n_averaged)}", *out]))
        return keep(weights[chosen], hessians[how])
    def step_seconds(self) -> float:  # median of the recent ones; 0 before there are 5, since the first are slow
        return float(np.median(self.durations)) if len(self.durations) >= 5 else 0.0
    def absorb(self, metrics: list[float], lr_scale: float) -> None:
        """Take in what all ranks agree on about the step just done: clock and health; log it."""
        (loss, elapsed, _, grad_norm), step, cfg = metrics, self.step, self.cfg
        self.durations, self.elapsed = [*self.durations[-99:], elapsed - self.elapsed], elapsed
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            last, saved = [f"{x:.4f}" for x in self.recent_losses], [str(p) for p in checkpoint_paths(cfg.run_id)][-1:]
            raise RunEnded(f"step {step}: loss {loss}, gradient norm {grad_norm}; last losses {last}, saved {saved}. "
                           "Try a lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR, or COMPUTE_DTYPE=float32", 4)
        self.recent_losses = [*self.recent_losses[-4:], loss]
        if step <= 5 or step % cfg.train_log_every == 0 or step == cfg.iterations:
            average, cap = elapsed / step, training_seconds(cfg)
            left = (cfg.iterations - step) * (self.step_seconds() or average)
            left = min(left, max(0.0, cap - elapsed)) if cap else left
            self.rt.log(f"step:{step}/{cfg.iterations} train_loss:{loss:.8f} lr_scale:{lr_scale:.4f} "
                        f"grad_norm:{grad_norm:.4f} train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * average:.2f}ms "
                        f"tokens_per_s:{cfg.train_batch_tokens / average:.0f} eta:{left:.0f}s "
                        f"rank_tflops:{self.rank_flops / average / 1e12:.4g}")
            if step == 5 and cap and cfg.warmdown_iters * self.step_seconds() > cap:
                self.rt.log(f"warning: about {cap / self.step_seconds():.0f} steps fit the cap, not WARMDOWN_ITERS")
    def out_of_time(self) -> bool:
        """Whether the next step might end after the wall-clock cap (the same answer on every rank)."""
        cap, slowest = training_seconds(self.cfg), max(self.durations[-20:], default=0.0)
        return cap > 0 and self.elapsed + 1.5 * max(slowest, self.step_seconds()) >= cap
    def validate(self) -> None:
        """Score the current weights; the clock stands still."""
        paused, cfg = time.perf_counter(), self.cfg
        elapsed, batch = paused - self.clock_zero, cfg.val_batch_size // cfg.train_seq_len // self.rt.world_size
        result = self.evaluator.run(self.model, "banded", max(1, min(batch, cfg.eval_batch_seqs)), "validation")
        self.rt.log(f"step:{self.step}/{cfg.iterations} {result} train_time:{1000 * elapsed:.0f}ms "
                    f"step_avg:{1000 * elapsed / max(1, self.step):.2f}ms mode:banded")
        self.clock_zero += time.perf_counter() - paused
    def run(self) -> Trained:
        """Train until steps or wall clock are used up; returns the weights to export."""
        cfg, handlers = self.cfg, [signal.signal(number, self.on_signal) for number in STOP_SIGNALS]
        self.clock_zero = time.perf_counter() - self.elapsed
        while self.step < cfg.iterations and not self.out_of_time():
            progress = max(self.step / cfg.iterations, self.elapsed / (training_seconds(cfg) or math.inf))
            if starts := not self.qat_active and progress >= cfg.qat_start_frac < 1: self.start_qat()
            lr_scale = lr_scale_at(self.step, self.elapsed, self.step_seconds(), cfg)
            metrics = self.train_step(lr_scale, self.step).tolist()  # waits for the device
            self.step += 1
            self.absorb(metrics, lr_scale)
            if starts: self.durations.pop()  # it has the time of the plan: no measure of a step
            if cfg.swa_enabled and lr_scale < cfg.swa_start_frac and self.step % cfg.swa_every == 0:
                self.swa.update_parameters(self.model)
                self.rt.log(f"swa snapshot:{int(self.swa.n_averaged)} step:{self.step} lr_scale:{lr_scale:.4f}")
            ends = self.step == cfg.iterations or self.out_of_time()
            if cfg.val_loss_every and self.step % cfg.val_loss_every == 0 and not ends: self.validate()
            if cfg.checkpoint_every and (ends or metrics[2] or self.elapsed - self.saved_at >= cfg.checkpoint_every):
                self.save()
            if metrics[2] and (cfg.checkpoint_every or not ends):
                how = f"RESUME=1 RUN_ID={cfg.run_id} goes on" if cfg.checkpoint_every else "CHECKPOINT_EVERY is 0"
                raise RunEnded(f"stopped by a signal after step {self.step}; {how}", 128 + (self.stop_signal or 15))
        for number, handler in zip(STOP_SIGNALS, handlers, strict=True): signal.signal(number, handler)
        trained, took = self.choose_weights(), time.perf_counter() - self.clock_zero
        self.validate()
        self.rt.log(f"training stopped:{'iterations' if self.step == cfg.iterations else 'wallclock_cap'} "
                    f"step:{self.step} train_time:{1000 * took:.0f}ms peak_memory_bytes:{self.rt.peak_memory_bytes()}")
        return trained
# ---- 12 Main ---------------------------------------------------------------------------------------------------------
def log_start(cfg: Config, origin: Mapping[str, str], warnings: Iterable[str], rt: Runtime) -> None:
    """Source, versions, config and overrides: what is needed to run this run again."""
    if all(os.path.getsize(h.baseFilename) == 0 for h in rt.logger.handlers if isinstance(h, logging.FileHandler)):
        rt.logger.debug("%s", Path(__file__).read_text(encoding="utf-8") + "=" * 100)
    name = torch.cuda.get_device_name() if rt.device.type == "cuda" else f"{platform.machine()} cpus:{os.cpu_count()}"
    versions = " ".join(f"{module.__name__}:{module.__version__}" for module in (torch, np, sentencepiece, zstandard))
    rt.log(f"run id:{cfg.run_id} python:{platform.python_version()} {versions}")
    rt.log(f"runtime world_size:{rt.world_size} device:{rt.device.type} name:{name} threads:{torch.get_num_threads()} "
           f"compute_dtype:{str(rt.compute_dtype)[6:]} compile:{int(rt.compile)} attention:{rt.attention}")
    rt.logger.debug("config %s", json.dumps(dataclasses.asdict(cfg)))
    changed = [f"{name.upper()}={getattr(cfg, name)} ({source})" for name, source in origin.items()]
    rt.log("\n".join(["config overrides: " + (", ".join(changed) or "none"), *(f"warning: {w}" for w in warnings)]))
def log_xz(data: Data, log: Log) -> None:  # what `xz -9e` makes of the validation text by itself: the demo's mark
    text = "".join(data.tokenizer.decode(part.tolist()) for part in data.val.shards).encode()
    packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    log(f"xz -9e of the validation text: text_bytes:{len(text)} xz_bytes:{packed} xz_bpb:{8 * packed / len(text):.4f}")
def train(cfg: Config, data: Data, rt: Runtime, started: float) -> Trained:
    """Build the model, train it, put the weights that will be exported on disk and return them."""
    torch.manual_seed(cfg.seed)
    shapes = GPT(cfg, {}, rt.compute_dtype).state_dict()
    model = GPT(cfg, starting_plan(shapes, cfg), rt.compute_dtype, rt.attention)
    model.init_weights(cfg)
    trainer = Trainer(model.to(rt.device), data, cfg, rt)
    trainer.warm_up()
    if cfg.resume and (state := rt.from_rank_0(lambda: newest_checkpoint(cfg, rt.log))): trainer.restore(state)
    rt.log(f"start_up time:{1000 * (time.monotonic() - started):.0f}ms")
    try: trained = trainer.run()
    except RunEnded as error:
        rt.logger.debug("error: %s", error.args[0])  # for the file; the console gets it from `command_line`
        raise
    rt.log(f"weights path:logs/{cfg.run_id}.weights (EXPORT_FROM exports them again)")
    if cfg.eval_float:
        model.load_state_dict(trained["weights"])
        model.refresh(False)
        trainer.evaluator.report(model, "float")
    return trained
def dry_run(cfg: Config, rt: Runtime, data: Data) -> int:
    """Log the plan of a run for rt.world_size ranks, computing nothing; raises ValueError for what would stop it."""
    if cfg.resume: newest_checkpoint(cfg, rt.log)  # raises for one that does not fit
    elif Path("logs", f"{cfg.run_id}.txt").exists(): raise ValueError(f"RUN_ID={cfg.run_id} has a log: choose another")
    with torch.device("meta"): model = GPT(cfg, {}, rt.compute_dtype)
    tokens, cap = log_model(model, cfg, rt)[0] * cfg.train_seq_len, training_seconds(cfg)
    sizes, logits = {name: p.numel() for name, p in model.named_parameters()}, tokens * cfg.vocab_size * 8
    params, matrices = sum(sizes.values()), sum(n for name, n in sizes.items() if name.endswith("_proj.weight"))
    mlp, kept = sum(n for name, n in sizes.items() if category(name) == "mlp"), tokens * activation_bytes(cfg, rt)
    parts = {"weights": 4 * (params + mlp), "gradients": 4 * params, "optimizer": 8 * params + 2 * matrices,
             "swa": 4 * (params + mlp), "activations": kept - logits, "logits": logits}
    rt.log(f"plan rank_memory_bytes all:{sum(parts.values()):.0f}" + "".join(f" {k}:{n:.0f}" for k, n in parts.items()))
    rows, estimate = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), defaultdict[str, float](float)
    estimate["code"] = Path(__file__).stat().st_size
    for name, n in sizes.items():
        spec = quant_spec_for(name, cfg)
        bits = (8 * order0_bytes(quantize_per_row(rows, spec)[0]) + 16 * 64) / rows.numel() if spec else 16.0
        estimate[category(name)] += n * bits / 8
    estimate |= {"all": sum(estimate.values()), "limit": cfg.artifact_limit_bytes}
    rt.log("plan artifact_bytes" + "".join(f" {kind}:{n:.0f}" for kind, n in estimate.items()))
    fit = f"{1000 * cap / cfg.plan_step_ms:.0f}" if cap and cfg.plan_step_ms else "see PLAN_STEP_MS" if cap else "all"
    windows = len(scoring_windows(data.val_targets, cfg.train_seq_len, cfg.eval_stride or cfg.train_seq_len))
    rt.log(f"plan iterations:{cfg.iterations} seconds:{cap:g} steps_that_fit:{fit} warmdown:{cfg.warmdown_iters} "
           f"evaluation_windows:{windows} per_rank:{-(-windows // rt.world_size)}; the run can start")
    return 0
def main() -> int:
    """One run: config, runtime, data, then train, export, reload, evaluate, report - or the part that is asked for."""
    started = time.monotonic()
    cfg, origin, warnings = load_config(os.environ)
    trained = None
    if cfg.export_from:
        trained = load_tensors(Path(cfg.export_from), "weights", "costs", "hessians", "grids", "config")
        cfg = with_model_fields(cfg, trained["config"], cfg.export_from)
        check_shapes(trained["weights"], cfg, cfg.export_from)
        if "mlp_bits" in origin and cfg.mlp_bits != trained["config"].get("mlp_bits"): trained["grids"] = {}
        if not cfg.error_feedback: trained["hessians"] = {}
    elif cfg.eval_artifact:
        cfg = with_model_fields(cfg, read_artifact(Path(cfg.eval_artifact))[0]["config"], cfg.eval_artifact)
    rt = Runtime.start(cfg)
    log_start(cfg, origin, warnings, rt)
    data = open_data(cfg, rt)
    if cfg.dry_run: return dry_run(cfg, rt, data)
    if cfg.eval_artifact:
        Evaluator(data, cfg, rt).report(load_artifact(Path(cfg.eval_artifact), cfg, rt, data.tokenizer_sha256), "final")
        return 0
    trained = trained or train(cfg, data, rt, started)
    path, fits = rt.from_rank_0(lambda: export(trained, cfg, rt.log, data.tokenizer_sha256))
    stored_model = load_artifact(path, cfg, rt, data.tokenizer_sha256)
    if cfg.demo and rt.rank == 0: log_xz(data, rt.log)
    Evaluator(data, cfg, rt).report(stored_model, "final")
    return 0 if fits else 3
def command_line() -> int:
    """`main` with readable errors; exit codes: 2 bad input, 3 over the limit, 4 diverged, 128 + n signal n."""
    try: return main()
    except (ValueError, OSError, RunEnded) as error:
        rank = os.environ.get("RANK", "0")
        message, code = error.args if isinstance(error, RunEnded) else (error, 2)
        time.sleep(5 * (rank != "0" and code < 128))  # rank 0 says the same, and ends the run meanwhile
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {message}", file=sys.stderr, flush=True)
        return code
    except KeyboardInterrupt:
        print("interrupted; what was written before is in logs/", file=sys.stderr)
        return 130
if __name__ == "__main__":
    exit_code = command_line()
    if exit_code in (0, 3) and dist.is_initialized(): dist.destroy_process_group()  # else other ranks may hang in NCCL
    sys.stdout.flush()
    os._exit(exit_code)  # the interpreter's own way out aborts now and then on threads that gloo leaves (PyTorch 2.13)
