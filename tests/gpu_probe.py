"""What tests/gpu.py does inside PyTorch, in a process of its own: a card that hangs then costs one stage, not the rest.

python tests/gpu_probe.py machine                         what is installed, and which card is there
python tests/gpu_probe.py ceilings [--cpu]                the fastest matrix product and copy of this machine
python tests/gpu_probe.py attention [--cpu]               kernels for attention, alone, at the shape of one rank
python tests/gpu_probe.py script FILE [--profile-after N] [--memory-gb X]      the script, watched or limited
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook

PRODUCT_SIZE = 8192  # of the square matrices on a GPU: large enough to reach the peak
COPY_BYTES = 4 << 30  # far beyond any cache of a GPU
CPU_PRODUCT_SIZE, CPU_COPY_BYTES = 256, 16 << 20
WARM_UPS, REPEATS = 2, 5
CALLS_PER_MEASUREMENT = 10  # waiting for the device after each call would cost a call of 1 ms some 1%
PROFILED_STEPS, CPU_PROFILED_STEPS = 10, 1  # a CPU has many more events to add up
LISTED_KERNELS = 15
RANK_SHAPE = {"sequences": 48, "length": 2048, "heads": 8, "kv_heads": 4, "head_dim": 64}  # 98,304 tokens
TOY_SHAPE = {"sequences": 2, "length": 64, "heads": 4, "kv_heads": 2, "head_dim": 16}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call of `work`: the median of some measurements."""
    seconds = []
    for _ in range(WARM_UPS + REPEATS):
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(CALLS_PER_MEASUREMENT):
            work()
        synchronize(device)
        seconds.append((time.perf_counter() - begun) / CALLS_PER_MEASUREMENT)
    return median(seconds[WARM_UPS:])


def print_machine() -> None:
    """One line of versions and one of the card; a package that is missing is named so."""
    packages = []
    for name in ("torch", "numpy", "sentencepiece", "zstandard", "triton"):
        try:
            packages.append(f"{name}:{importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            packages.append(f"{name}:missing")
    flash3 = importlib.util.find_spec("flash_attn_interface") is not None
    print(
        f"machine python:{platform.python_version()} {' '.join(packages)} flash_attn_interface:{int(flash3)} "
        f"cuda:{torch.version.cuda}"
    )
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        print(
            f"card memory_gb:{card.total_memory / 1e9:.1f} multiprocessors:{card.multi_processor_count} "
            f"capability:{card.major}.{card.minor} name:{card.name}"
        )
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu", "--format=csv"]
            print("nvidia-smi", *subprocess.run(query, capture_output=True, text=True).stdout.splitlines(), sep=" | ")
    else:
        print(f"card none, cpus:{os.cpu_count()}")


def print_ceilings(device: torch.device) -> None:
    """The rate of a square product of random numbers (zeros run faster), and of a copy, bytes read and written.

    In bf16 on a GPU, in fp32 on a CPU, where few have bf16.
    """
    on_gpu = device.type == "cuda"
    size = PRODUCT_SIZE if on_gpu else CPU_PRODUCT_SIZE
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    flops = 2 * size**3 / seconds_of(lambda: a @ b, device)
    source = torch.randint(0, 255, (COPY_BYTES if on_gpu else CPU_COPY_BYTES,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    bytes_per_second = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)
    print(f"ceilings product_tflops:{flops / 1e12:.4g} copy_gb_per_s:{bytes_per_second / 1e9:.4g}")


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attention_kernels() -> dict[str, Attention]:
    """Causal attention of q (B, T, H, D), k and v (B, T, KV, D) by each kernel that may be there."""

    def by_pytorch(backend: SDPBackend | None, expand: bool) -> Attention:
        """PyTorch's attention; `expand`: keys and values repeated for kernels that know no groups of heads."""

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if expand:
                k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
                v = v.repeat_interleave(q.size(2) // v.size(2), dim=2)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not expand)
            return out.transpose(1, 2)

        return attend

    def flash_attention_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from flash_attn_interface import flash_attn_func

        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return {
        "pytorch_choice": by_pytorch(None, expand=False),
        "flash": by_pytorch(SDPBackend.FLASH_ATTENTION, expand=False),
        "flash_expanded": by_pytorch(SDPBackend.FLASH_ATTENTION, expand=True),
        "cudnn": by_pytorch(SDPBackend.CUDNN_ATTENTION, expand=False),
        "cudnn_expanded": by_pytorch(SDPBackend.CUDNN_ATTENTION, expand=True),
        "flash_attention_3": flash_attention_3,
    }


def print_attention(device: torch.device) -> None:
    """Milliseconds of each kernel, forward and with backward, or why it does not run."""
    on_gpu = device.type == "cuda"
    shape = RANK_SHAPE if on_gpu else TOY_SHAPE
    dtype = torch.bfloat16 if on_gpu else torch.float32
    batch, length, head_dim = shape["sequences"], shape["length"], shape["head_dim"]
    q = torch.randn(batch, length, shape["heads"], head_dim, device=device, dtype=dtype, requires_grad=True)
    k = torch.randn(batch, length, shape["kv_heads"], head_dim, device=device, dtype=dtype, requires_grad=True)
    v = torch.randn_like(k, requires_grad=True)
    out_grad = torch.randn_like(q, requires_grad=False)

    def forward_and_backward(attend: Attention) -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), out_grad)

    # The forward has two products of T x T x D per head and sequence, half of them masked; the backward has five
    # (arXiv:2205.14135).
    product_flops = 2 * batch * shape["heads"] * length**2 * head_dim / 2
    print("attention shape " + " ".join(f"{key}:{value}" for key, value in shape.items()))
    for name, attend in attention_kernels().items():
        try:
            with torch.no_grad():
                forward = seconds_of(partial(attend, q, k, v), device)
            total = seconds_of(partial(forward_and_backward, attend), device)
        except Exception as error:  # whatever a kernel says of a shape that it cannot do
            print(f"attention kernel:{name} error:{type(error).__name__}: {' '.join(str(error).split())[:150]}")
            continue
        tflops = (2 + 5) * product_flops / total / 1e12
        print(
            f"attention kernel:{name} forward_ms:{1000 * forward:.3f} both_ms:{1000 * total:.3f} "
            f"both_tflops:{tflops:.4g}"
        )


def print_kernels(profile: torch.profiler.profile, on_gpu: bool, steps: int, seconds: float) -> None:
    """The most expensive kernels of the profiled steps; on a CPU its operators, by their own time."""
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU

    def milliseconds(event: Any) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000

    events = [event for event in profile.key_averages() if event.device_type == wanted and not event.is_user_annotation]
    events.sort(key=milliseconds, reverse=True)
    total = max(sum(map(milliseconds, events)), 1e-9)  # a profiler that saw nothing shall end in an empty table
    print(
        f"profile steps:{steps} wall_ms_per_step:{1000 * seconds / steps:.3f} "
        f"busy_ms_per_step:{total / steps:.3f} kernels:{len(events)}"
    )
    print("| ms per step | share | calls per step | kernel |")
    print("|---:|---:|---:|---|")
    for event in events[:LISTED_KERNELS]:
        spent = milliseconds(event) / steps
        share = milliseconds(event) / total
        print(f"| {spent:.3f} | {share:.1%} | {event.count / steps:g} | {event.key[:90]} |")


def mix_order_reduction() -> str:
    """Whether Inductor fuses reductions over different axes; "none" if this PyTorch has no such setting.

    It was reported to make a step of PyTorch 2.11 6 ms longer.
    """
    from torch._inductor import config

    value = getattr(config.triton, "mix_order_reduction", None)
    return "none" if value is None else str(int(value))


def profile_after(steps: int) -> None:
    """Profile some optimizer steps of whatever runs in this process, once `steps` are done; then end the process."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities, acc_events=True)
    profiled = PROFILED_STEPS if on_gpu else CPU_PROFILED_STEPS
    done, begun = 0, 0.0

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal done, begun
        if not isinstance(optimizer, torch.optim.AdamW):
            return  # a step of the model is one of AdamW's; Muon's belongs to the same
        done += 1
        if done == 1:  # everything that could set it has run
            print(f"probe mix_order_reduction:{mix_order_reduction()}", flush=True)
        if done == steps:
            synchronize(device)
            profile.start()
            begun = time.perf_counter()
        elif done == steps + profiled:
            synchronize(device)
            seconds = time.perf_counter() - begun
            profile.stop()
            print_kernels(profile, on_gpu, profiled, seconds)
            sys.stdout.flush()
            os._exit(0)  # no exception: the script might catch it

    register_optimizer_step_post_hook(after_step)


def run_script(options: argparse.Namespace) -> None:
    """Run the script in this process as if it had been started by itself."""
    if options.memory_gb:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gb * 1e9 / total))
    if options.profile_after:
        profile_after(options.profile_after)
    sys.argv = [options.file]
    runpy.run_path(options.file, run_name="__main__")


def main() -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("machine")
    for name in ("ceilings", "attention"):
        parts.add_parser(name).add_argument("--cpu", action="store_true")
    script = parts.add_parser("script")
    script.add_argument("file")
    script.add_argument("--profile-after", type=int, default=0, metavar="STEPS", help="optimizer steps, warm-up too")
    script.add_argument("--memory-gb", type=float, default=0.0, help="what PyTorch's allocator may hold")
    options = parser.parse_args()
    if options.part == "machine":
        print_machine()
    elif options.part == "script":
        run_script(options)
    else:
        device = torch.device("cpu" if options.cpu else "cuda")
        measure = print_ceilings if options.part == "ceilings" else print_attention
        measure(device)


if __name__ == "__main__":
    main()
