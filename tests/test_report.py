"""logs/report.py: both log formats, groups, the verdict, warnings, what is skipped, figure, submission.json, README."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tools import ROOT, corpus, environment, t, values

sys.path.insert(0, str(ROOT / "logs"))
import report  # noqa: E402

CATEGORIES = {"small", "embed", "bigram", "attn", "mlp"}

BYTES_PER_TOKEN = 2.4  # of the made-up text: bpb = loss / ln 2 / 2.4
H100 = "world_size:8 device:cuda name:NVIDIA H100 80GB HBM3 compute_dtype:bfloat16 compile:1 flash3:1"


def bpb(loss: float) -> float:
    """Bits per byte of a loss in nats per token."""
    return loss / math.log(2) / BYTES_PER_TOKEN


def own_log(seed: int, loss: float, **changes: Any) -> str:
    """A log as train_gpt.py writes it. `changes`: settings, or total_bytes, train_ms, eval_ms, val_targets."""
    facts = {"total_bytes": 15_900_000, "train_ms": 599_000, "eval_ms": 71_000, "val_targets": 62_021_632} | changes
    total, train_ms, eval_ms, targets = (facts.pop(k) for k in ("total_bytes", "train_ms", "eval_ms", "val_targets"))
    config = {"data_path": "/data/fineweb10B_sp1024", "text_files": "", "demo": False, "run_id": f"r{seed}"}
    config |= {"seed": seed, "train_batch_tokens": 1000, "matrix_lr": 0.02, "eval_artifact": "", "export_from": ""}
    config |= {"resume": False} | facts
    lines = ['"""A script."""', 'log(f"step:{step}/9 train_loss:1")', "step:7/9 train_loss:1 in a string", "=" * 100]
    lines += [
        f"run id:r{seed} python:3.12.3 torch:2.9.1 numpy:2.4.6",
        f"runtime {H100}",
        "config " + json.dumps(config),
        f"config overrides: SEED={seed} DEMO={config['demo']}",
        f"data path:{config['data_path']} val_tokens:{targets + 1} val_targets:{targets}",
        "data train_shards:80 train_tokens:8000000000 windows:3906249",
        f"model params:10 seed:{seed}",
        "batch tokens:1000 ranks:8 micro_batch_tokens:125 micro_steps:1",
        "warm_up steps:20 time:31200ms peak_memory_bytes:1 step_time:90ms end_time:900ms",
    ]
    train_ms = train_ms - 1000  # the rest is the choice of weights
    for step in (1, 50, 80, 100):
        done = train_ms * step / 100
        time = f"train_time:{done:.0f}ms"
        lines.append(
            f"step:{step}/100 train_loss:{loss + 1 / step:.8f} lr_scale:0.5000 grad_norm:0.3 {time} "
            f"step_avg:{train_ms / 100:.2f}ms"
        )
        if step == 80:
            lines += ["swa snapshot:1 step:70 lr_scale:0.3", "qat active:1 step:75 time:2100ms"]
            lines += [f"checkpoint path:logs/r{seed}.000000080.ckpt time:90ms"]
            lines += ["swa snapshot:1 step:80 lr_scale:0.2", "swa snapshot:2 step:90 lr_scale:0.1"]
        if step > 1:
            at = loss + 1 / step
            lines.append(f"step:{step}/100 val_loss:{at:.8f} val_bpb:{bpb(at):.8f} {time}")
    chosen = f"weights:swa path:logs/r{seed}.weights snapshots:2 last_loss:1.95000 swa_loss:1.90000"
    lines.append(f"export {chosen} time:1000ms")
    lines.append(f"training stopped:iterations step:100 train_time:{train_ms + 1000:.0f}ms")
    floats = loss - 0.01
    sizes = f"model_bytes:{total - 90000} code_bytes:90000 artifact_bytes:{total} limit:16000000"
    return "\n".join(lines + [
        f"float_sliding stride:64 val_loss:{floats:.8f} val_bpb:{bpb(floats):.8f} eval_time:9ms",
        "artifact round:0 model_bytes:16310000 time:18000ms",
        f"artifact round:1 model_bytes:{total - 90000} time:9900ms",
        "artifact category:mlp params:5 bytes:8000000 bits_per_weight:3.500 levels:15",
        "artifact category:embed params:5 bytes:2000000 bits_per_weight:6.100 levels:70",
        f"artifact path:logs/r{seed}.ptz codec:zstd-22 {sizes} headroom_bytes:{16_000_000 - total}",
        f"final_sliding stride:64 val_loss:{loss:.8f} val_bpb:{bpb(loss):.8f} eval_time:{eval_ms}ms",
        f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb(loss):.8f}",
    ]) + "\n"  # fmt: skip


FIRST_EDITION = {  # how its lines were
    r" compute_dtype:bfloat16 compile:1 flash3:1$": " threads:8 compute_dtype:bfloat16 compile:1 attention:flash3",
    r"^config overrides: SEED=(\d+) DEMO=(\w+)$": r"config overrides: SEED=\1 (environment), DEMO=\2 (environment)",
    r"^warm_up steps:20 .*$": "warm_up steps:20 time:31.2s (undone)",
    r"^(step:.* step_avg:\S+)$": r"\1 tokens_per_s:9 eta:1s rank_tflops:3",
    r"^(step:.* val_bpb:.*)$": r"\1 step_avg:9.99ms mode:banded",
    r"^qat .*$": "qat active:1 step:75 bits:mlp4",
    r"^export .*$": "export weights:swa rounding:feedback snapshots:2 last_nearest_loss:1.95 swa_nearest_loss:1.9",
    r"^(\w+_sliding stride.*)$": r"\1 tokens_per_s:9",
    r"^artifact (round:\d) model_bytes:(\d+)": r"artifact \1 artifact_bytes:\2 rounding_time:3000ms",
    r"^artifact (category:\w+ params:5) bytes:(\d+).*$": r"artifact \1 raw_bytes:9000000 order0_entropy_bytes:\2",
    r"^artifact (path:\S+) codec:zstd-22 (.*) (headroom_bytes:\S+)$": r"artifact bits:mlp4,attn5 codec:zstd-22 \2\n"
    r"artifact \1 \3 export_time:60001ms\nartifact loaded:logs/x.ptz tensors:2 bits:mlp4,attn5",
}


def in_edition(edition: int, text: str) -> str:
    """A log of `own_log` as this edition of the script wrote it."""
    for now, before in FIRST_EDITION.items() if edition == 1 else ():
        text, count = re.subn(now, before, text, flags=re.M)
        assert count, f"no line has {now}"
    return text


def old_log(seed: int, loss: float) -> str:
    """A log as the challenge's older scripts write it (all values made up)."""
    lines = ["import torch", "=" * 100, "Running Python 3.12.3 (main) [GCC]", "Running PyTorch 2.9.1+cu128"]
    lines += ["|   0  NVIDIA H100 80GB HBM3          On  |   00000000:1B:00.0 Off |                  Off |", "=" * 100]
    lines += ["train_loader:dataset:fineweb10B_sp1024 train_shards:80"]
    lines += ["val_loader:shards pattern=./data/fineweb_val_*.bin tokens:62021632", "world_size:8 grad_accum_steps:1"]
    lines += ["train_batch_tokens:786432 train_seq_len:2048 iterations:20000 warmup_steps:20", f"seed:{seed}"]
    lines += ["warmup_step:20/20", "step:0/20000 val_loss:6.9370 val_bpb:4.0978 train_time:0ms step_avg:0.01ms"]
    lines += ["step:1000/20000 train_loss:2.3000 train_time:89400ms step_avg:89.40ms", "swa:start step:5000"]
    lines += ["step:6500/20000 val_loss:1.9431 val_bpb:1.1508 train_time:581110ms step_avg:89.40ms"]
    lines += ["stopping_early: wallclock_cap train_time:581110ms step:6500/20000", "Serialized model: 98437419 bytes"]
    lines += ["Code size: 50000 bytes", "Total submission size: 98487419 bytes"]
    lines += ["Serialized model int6+zstd: 15915978 bytes", "Total submission size int8+zlib: 15965978 bytes"]
    lines += ["final_eval_mode:sliding_window stride:64 batch_seqs:32"]
    lines += [f"final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bpb(loss):.4f} eval_time:168000ms"]
    lines += [f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb(loss):.8f}"]
    return "\n".join(lines) + "\n"


def write(folder: Path, **logs: str) -> list[str]:
    """Write logs by name; their paths."""
    folder.mkdir(exist_ok=True)
    for name, text in logs.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return [str(folder / f"{name}.txt") for name in logs]


def seeds(folder: Path, prefix: str, losses: dict[int, float], **changes: Any) -> list[str]:
    """Logs of one config."""
    return write(folder, **{f"{prefix}{seed}": own_log(seed, loss, **changes) for seed, loss in losses.items()})


def command(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The report as a user runs it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "logs/report.py"), *words], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def cells(output: str, name: str) -> list[str]:
    """The table row that begins with a name."""
    row = next(line for line in output.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("edition", [1, 2])
def test_own_format(tmp_path: Path, edition: int) -> None:
    """Every column, and none of the source's lines taken for results."""
    (path,) = write(tmp_path, one=in_edition(edition, own_log(7, 1.9)))
    found = report.read_log(Path(path))
    assert report.run_row(found, "A") == [
        "one", "A", "7", "100/100", "5980.00", f"{bpb(1.89):.5f}", f"{bpb(1.9):.5f}", f"{bpb(0.01):+.5f}", "15,900,000",
        "100,000", "599.0", "71.0", "sliding 64",
    ]  # fmt: skip
    assert found.final and found.final.loss == 1.9 and found.swa_start == 80 and found.dataset == "fineweb10B_sp1024"
    assert found.versions == {"python": "3.12.3", "torch": "2.9.1", "numpy": "2.4.6"}
    assert found.runtime["name"] == "NVIDIA H100 80GB HBM3" and sorted(found.losses) == [1, 50, 80, 100]
    assert found.categories == {"mlp": 8_000_000, "embed": 2_000_000} and found.model_bytes == 15_810_000


def resumed_log(seed: int, loss: float) -> str:
    """Two starts in one file: the first got to step 95, with losses of its own, its checkpoint to 80."""
    text = own_log(seed, loss)
    head, tail = text.split("=" * 100 + "\n")
    cut, again = text.index("step:100/100 train"), tail.index("swa snapshot:1 step:80")
    lost = "step:90/100 train_loss:9.90000000 lr_scale:0.1 train_time:700000ms step_avg:7000.00ms\n"
    lost += "step:95/100 train_loss:nan lr_scale:0.1 train_time:800000ms step_avg:7000.00ms\n"
    start = tail[: tail.index("step:")].replace('"resume": false', '"resume": true')
    start += f"resume checkpoint:logs/r{seed}.000000080.ckpt step:80 train_time:478400ms\n"
    return text[:cut] + lost + start + tail[again:]


@pytest.mark.parametrize("edition", [1, 2])
def test_resumed(tmp_path: Path, edition: int) -> None:
    """One curve and one run: what the first start did after its checkpoint does not count. It has its config."""
    logs = {"whole": own_log(7, 1.9), "resumed": resumed_log(7, 1.91), "other": own_log(8, 1.9)}
    paths = write(tmp_path, **{name: in_edition(edition, text) for name, text in logs.items()})
    whole, found, other = (report.read_log(Path(path)) for path in paths)
    assert not found.problem() and found.final and found.final.loss == 1.91 and found.gap is not None
    assert found.times == whole.times and found.swa_start == 80 and report.run_row(found, "A")[4] == "5980.00"
    assert sorted(found.losses) == [1, 50, 80, 100] and 9.9 not in found.losses.values()
    assert len(report.group_runs([found, other], [])) == 1
    for cut in ("step:100/100 train", "training stopped", "artifact ", "final_int8"):  # cut and resumed at the end
        text = in_edition(edition, own_log(7, 1.9))
        first = text[: text.index(cut)] + "resume checkpoint:logs/r7.000000080.ckpt step:80 train_time:478400ms\n"
        paths = write(tmp_path, cut=first + text[text.index("swa snapshot:1 step:80") :], half=first)
        assert report.run_row(report.read_log(Path(paths[0])), "A")[1:] == report.run_row(whole, "A")[1:]
        assert "unfinished: the log ends at step 80 of 100" in report.read_log(Path(paths[1])).problem()
    none = in_edition(edition, own_log(7, 1.9))
    begin = none.index("step:1/100 train")
    again = none + "warning: RUN_ID=r7 has no sound checkpoint: it starts from the beginning\n" + none[begin:]
    assert report.read_log(Path(write(tmp_path, none=again)[0])).times == whole.times


def test_exported_by_a_later_start(tmp_path: Path) -> None:
    """RESUME=1 after a failed export has `export_from` in its config, and a batch of one sequence: not the run's."""
    text = own_log(7, 1.9)
    head, tail = text.split("=" * 100 + "\n")
    again = tail[: tail.index("data train_shards")]
    for now in ('"resume": false', '"export_from": ""', '"train_batch_tokens": 1000'):
        assert now in again
    again = again.replace('"export_from": ""', '"export_from": "logs/r7.weights"').replace(
        'tokens": 1000', 'tokens": 9'
    )
    cut = text.index("artifact round:1")
    text = text[:cut] + head + "=" * 100 + "\n" + again + text[cut:]
    whole, found = (report.read_log(Path(path)) for path in write(tmp_path, whole=own_log(8, 1.9), found=text))
    assert not found.problem() and found.batch_tokens == 1000 and found.final and found.final.loss == 1.9
    assert len(report.group_runs([whole, found], [])) == 1


def test_own_format_of_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What train_gpt.py logs today is read, from its file and from a copy of the console."""
    monkeypatch.chdir(tmp_path)
    changes = {"run_id": "now", "eval_float": True, "rate_control": True, "artifact_limit_bytes": 150_000}
    assert t.main(*t.load_config(environment(**changes))) == 0
    console = capsys.readouterr().out
    Path("console.txt").write_text(console)
    for path in (tmp_path / "logs/now.txt", tmp_path / "console.txt"):
        found = report.read_log(path)
        assert not found.problem() and found.final and found.ms_per_step and found.gap is not None
        assert found.final.bpb == values(console, "val_bpb")[-1] and found.final.seconds is not None
        assert found.artifact_bytes == values(console, "artifact_bytes")[-1] and found.step == 6 and found.versions
        assert sum(report.byte_parts(found).values()) == found.artifact_bytes and set(found.categories) == CATEGORIES
        assert found.scales and found.runtime["device"] == "cpu" and found.val_targets and found.seed == 42
        assert found.whole_config == (path.name == "now.txt") and found.settings["val_loss_every"] == 0
        assert found.settings["data_path"] == str(corpus()) and found.settings["swa_always"] is True


@pytest.mark.parametrize("edition", [1, 2])
@pytest.mark.parametrize("change", ["console", "utf-16", "crlf", "prefix", "resumed", "banded"])
def test_variants_of_own_format(tmp_path: Path, change: str, edition: int) -> None:
    """The console's copy, other encodings, torchrun's prefixes, a resumed run's second header, the other evaluation."""
    text, path = in_edition(edition, own_log(7, 1.9, demo=True)), tmp_path / "log.txt"
    head, tail = text.split("=" * 100 + "\n")
    if change == "console":
        text = re.sub(r"config \{.*\n", "", tail)
    elif change == "prefix":
        text = "".join(f"[rank0]:{line}\n" for line in tail.splitlines())
    elif change == "resumed":
        middle = tail.index("step:80/100 train")
        text = (
            text[: text.index("step:80/100 train")]
            + head
            + "=" * 100
            + "\n"
            + tail[: tail.index("step:")]
            + tail[middle:]
        )
    elif change == "banded":
        text = text.replace("final_sliding stride:64", "final_banded band:2048")
    path.write_bytes(
        text.replace("\n", "\r\n" if change == "crlf" else "\n").encode("utf-16" if change == "utf-16" else "utf-8")
    )
    found = report.read_log(path)
    assert (
        not found.problem() and found.seed == 7 and found.final and found.final.loss == 1.9 and len(found.losses) == 4
    )
    assert found.final.mode == ("banded 2048" if change == "banded" else "sliding 64")
    assert (found.gap is None) == (change == "banded")  # never the difference of two kinds of evaluation
    assert found.final.seconds == 71
    assert found.settings["demo"] is True and found.whole_config == (change != "console")


def test_old_format(tmp_path: Path) -> None:
    """The challenge's older logs, without naming a format; the uncompressed size is not the artifact's."""
    found = report.read_log(Path(write(tmp_path, old=old_log(1337, 1.9294))[0]))
    assert report.run_row(found, "A") == [
        "old", "A", "1337", "6500/20000", "89.40", "-", f"{bpb(1.9294):.5f}", "-", "15,965,978", "34,022", "581.1",
        "168.0", "sliding 64",
    ]  # fmt: skip
    assert (found.model_bytes, found.code_bytes, found.swa_start) == (15915978, 50000, 5000)
    assert found.versions == {"python": "3.12.3", "torch": "2.9.1+cu128"} and found.batch_tokens == 786432
    two = old_log(1, 1.93) + "final_int6_sliding_window val_loss:1.9 val_bpb:1.1 stride:64 eval_time:68826ms\n"
    two += "final_int6_sliding_window_exact val_loss:1.91389421 val_bpb:1.13351895\n"
    final = report.read_log(Path(write(tmp_path, two=two)[0])).final
    assert final and (final.loss, final.bpb, final.mode, final.seconds) == (
        1.91389421,
        1.13351895,
        "sliding 64",
        68.826,
    )


def test_groups_and_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seeds of one config share a letter; what differs between configs is shown, what names a run is not."""
    logs = seeds(tmp_path, "a", {1: 1.92, 2: 1.94}) + seeds(
        tmp_path, "b", {2: 1.9, 1: 1.88}, matrix_lr=0.03, data_path="/x/fineweb10B_sp1024"
    )
    assert report.main([*logs, "--markdown"]) == 0
    out = capsys.readouterr().out
    assert [cells(out, name)[1] for name in ("a1", "a2", "b1", "b2")] == ["A", "A", "B", "B"]
    assert cells(out, "A")[1:6] == ["1, 2", f"{bpb(1.93):.5f}", f"{bpb(0.02) / math.sqrt(2):.5f}", "1.93000", "0.01414"]
    assert re.findall(r"^\| `(\w+)` +\| +(\S+) \| +(\S+) \|$", out, re.M) == [("matrix_lr", "0.02", "0.03")]
    other_script = own_log(3, 1.9).replace("A script", "Another script")
    assert report.main([*logs[:2], *write(tmp_path, c=other_script), "--markdown"]) == 0
    assert cells(capsys.readouterr().out, "c")[1] == "B", "another script is another config"


def student_tail(t: float, df: int) -> float:
    """P(T > t) for 4 degrees of freedom, in closed form."""
    assert df == 4
    return 0.5 - 0.375 * t / math.sqrt(1 + t * t / 4) * (1 - t * t / (12 * (1 + t * t / 4)))


@pytest.mark.parametrize(
    ("gain", "words"),
    [(0.060, "better by"), (0.02635, "better by"), (0.002, "no difference shown"), (-0.06, "worse by")],
)
def test_verdict_by_hand(tmp_path: Path, gain: float, words: str) -> None:
    """Three seeds each, spread 0.01 both: standard error sqrt(2 * 0.01^2 / 3), 4 degrees of freedom."""
    spread = (-0.007, 0.0, 0.007)
    groups = []
    for name, mean in (("a", 2.0), ("b", 2.0 - gain)):
        logs = seeds(tmp_path, name, {i: mean + d for i, d in enumerate(spread)})
        groups.append(report.Group(name.upper(), [report.read_log(Path(log)) for log in logs]))
    error = math.sqrt(2 * 0.007**2 / 3)
    t, bar = gain / error, student_tail((gain - 0.005) / error, 4)
    text = report.verdict(*groups)
    assert f"{words}" in text and f"{abs(gain):.5f} nats" in text and f"({bpb(abs(gain)):.5f} bpb)" in text
    assert f"Welch's t = {t:.2f}, 4.0 degrees of freedom, p = {2 * student_tail(abs(t), 4):.2g};" in text
    assert text.endswith(f"{'met' if bar < 0.01 else 'not met'} (p = {bar:.2g}).") and ("is met" in text) == (
        gain == 0.06
    )


def test_verdict_unequal_spread_and_no_test(tmp_path: Path) -> None:
    """Welch's degrees of freedom by his formula; one seed, no spread and other data give no test."""

    def group(letter: str, losses: list[float], **changes: Any) -> report.Group:
        logs = seeds(tmp_path, letter, dict(enumerate(losses)), **changes)
        return report.Group(letter, [report.read_log(Path(log)) for log in logs])

    one, two = [1.90, 1.91, 1.95, 1.96], [1.80, 1.8001]
    a, b = (sum((x - sum(v) / len(v)) ** 2 for x in v) / (len(v) - 1) / len(v) for v in (one, two))
    df = (a + b) ** 2 / (a * a / 3 + b * b / 1)
    text = report.verdict(group("A", one), group("B", two))
    assert f"t = {(1.93 - 1.80005) / math.sqrt(a + b):.2f}, {df:.1f} degrees" in text
    assert "no test, which needs two seeds" in report.verdict(group("C", one), group("D", [1.8]))
    assert "no test, since no run differs" in report.verdict(group("E", [1.9, 1.9]), group("F", [1.8, 1.8]))
    other = report.verdict(group("G", one), group("H", two, data_path="/data/demo-1", val_targets=41984))
    assert "not comparable" in other and "demo-1 (41984 targets)" in other and "Welch" not in other


def test_baseline_of_old_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Public records as one group against own runs, named by a glob; scored differently is said."""
    write(tmp_path / "records", **{f"s{i}": old_log(i, 1.93 + i / 10000) for i in range(3)})
    own = seeds(tmp_path, "own", {i: 1.91 + i / 10000 for i in range(3)})
    assert report.main([*own, "--baseline", str(tmp_path / "records/*.txt")]) == 0
    out = capsys.readouterr().out
    assert cells(out, "s0")[1] == "A" and cells(out, "own0")[1] == "B"
    assert "**B against A**: better by 0.02000 nats" in out and "is met" in out and "Scored differently" not in out
    assert "`train_batch_tokens`" in out and "`matrix_lr`" not in out  # the older log names only one of the two


def test_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the rules forbid, contradictions, and the log's own warnings."""
    bad = own_log(1, 1.9, total_bytes=16_000_001, train_ms=600_500, eval_ms=700_000) + "warning: something\n"
    again = own_log(1, 1.91, train_ms=600_000).replace("code_bytes:90000", "code_bytes:90001")
    odd = re.sub(r"(final_int8.*val_bpb:)\S+", r"\g<1>1.00000000", own_log(2, 1.9, matrix_lr=0.5))
    report.main(write(tmp_path, bad=bad, again=again, odd=odd))
    out = capsys.readouterr().out
    for text in (
        "bad: forbidden by the rules: 16,000,001 bytes of code and model, 1 over the 16,000,000 allowed",
        "bad: forbidden by the rules: training took 600.500 s, 0.500 s over",
        "bad: forbidden by the rules: evaluation took 700.000 s, 100.000 s over",
        "bad: logged: warning: something",
        "config A: seed 1 more than once",
        "again: model and code bytes do not add up",
        "odd: its last two final lines are not the same score",
    ):
        assert text in out, text
    assert "again: forbidden" not in out and cells(out, "bad")[9] == "-1"


def skipped_files(folder: Path) -> dict[str, tuple[str, str]]:
    """Files that do not count: name -> (content, what is said of it)."""
    log, error = own_log(7, 1.9), "error: step 81: loss nan, gradient norm 1; last losses []\n"
    midnumber = old_log(2, 1.9).split("final_int8")[0] + "final_int8_zlib_roundtrip val_loss:1.9 val_bpb:1.1"
    again = re.sub(r"step:.*\n", "", log).replace('"eval_artifact": ""', '"eval_artifact": "logs/x.ptz"')
    diverged = old_log(3, 1.9).split("step:6500")[0] + "step:1200/20000 train_loss:nan train_time:1ms step_avg:1.00ms\n"
    return {
        "empty": ("", "empty"),
        "binary": ("\0\1\2" * 99, "foreign: not text"),
        "prose": ("# Notes\n\nstep by step, val_bpb:1.1\nseed: 3\n", "foreign: no line of"),
        "pytest": ("Running Pytest\n", "foreign: no line of"),
        "python": ("Running Python\n", "foreign: no line of"),
        "loader": ("train_loader:dataset:\n", "foreign: no line of"),
        "insource": ("import torch\n" + log[:60], "truncated or foreign: a script's source"),
        "nostep": (log[: log.index("step:1/100 train")], "truncated or stopped at once: no training step"),
        "half": (log[: log.index("training stopped")], "unfinished: the log ends at step 100 of 100, in training"),
        "unscored": (log[: log.index("final_sliding")], "unfinished: the log ends at step 100 of 100, before the"),
        "plan": (log[: log.index("step:1/100")].replace('"demo"', '"dry_run": true, "demo"'), "a dry run: the plan"),
        "midnumber": (midnumber, "unfinished: the log ends at step 6500 of 20000, before the final score"),
        "diverged": (diverged, "diverged at step 1200 of 20000: a loss of nan"),
        "stopped": (log[: log.index("step:80/100 val")] + error, "diverged at step 80 of 100: step 81: loss nan"),
        "again": (again.replace("training stopped:iterations ", ""), "no training in it: an evaluation of logs/x.ptz"),
    }  # fmt: skip


def test_files_that_do_not_count(tmp_path: Path) -> None:
    """Each is reported by name with the reason; exit code 1 where nothing is left, 0 beside a complete run."""
    files = skipped_files(tmp_path)
    paths = write(tmp_path / "odd", **{name: text for name, (text, _) in files.items()})
    alone = command(*paths, str(tmp_path / "missing.txt"))
    assert alone.returncode == 1 and not alone.stdout and "error: no complete run in 16 files" in alone.stderr
    good = write(tmp_path, good=own_log(1, 1.9), copy=own_log(1, 1.9))
    beside = command(*good, *paths, "--figure", str(tmp_path / "figure.svg"))
    assert beside.returncode == 0 and cells(beside.stdout, "good")[1] == "A", beside.stderr
    for name, (_, reason) in files.items():
        line = f"not counted: {tmp_path / 'odd' / name}.txt: {reason}"
        assert line in alone.stderr and line in beside.stdout, name
    assert "missing.txt: not readable: No such file" in alone.stderr
    assert f"copy.txt: the same run as {good[0]}" in beside.stdout and (tmp_path / "figure.svg").stat().st_size > 10000


def test_no_crash_on_cut_logs(tmp_path: Path) -> None:
    """Cut anywhere, a log gives its own score or none."""
    text, path = own_log(7, 1.9) + old_log(8, 1.93).split("=" * 100 + "\n")[-1], tmp_path / "log.txt"
    for end in range(0, len(text), 37):
        path.write_text(text[:end])
        try:
            final = report.read_log(path).final
        except report.LogError:
            continue
        assert final is None or final.loss in (1.9, 1.93) and final.bpb == pytest.approx(bpb(final.loss), abs=5e-5)


def submission_of(tmp_path: Path, logs: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """submission.json from logs, with author fields that were there before, and what was printed."""
    path = tmp_path / "submission.json"
    path.write_text(json.dumps({"author": "\u00c5sa", "blurb": "b", "extra": 1, "val_bpb": 9.9, "bytes_total": 5}))
    assert report.main([*logs, "--submission", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8")), capsys.readouterr().out


def test_submission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss and bpb in their own fields, deviations, seeds, the largest artifact, hardware; author fields kept."""
    logs = seeds(tmp_path, "a", {42: 1.90, 7: 1.92}) + write(tmp_path, big=own_log(9, 1.94, total_bytes=15_999_999))
    found, out = submission_of(tmp_path, logs, capsys)
    assert (found["author"], found["blurb"], found["extra"], found["github_id"]) == ("\u00c5sa", "b", 1, None)
    assert found["val_loss"] == 1.92 and found["val_bpb"] == pytest.approx(bpb(1.92), abs=1e-8)
    assert found["val_loss_std"] == 0.02 and found["val_bpb_std"] == pytest.approx(bpb(0.02), abs=1e-7)
    assert found["seeds"] == [7, 9, 42] and found["seed_results"]["42"]["val_loss"] == 1.9
    assert found["seed_results"]["42"]["eval_seconds"] == 71 and found["seed_results"]["9"]["bytes_total"] == 15_999_999
    assert (found["bytes_total"], found["bytes_model"], found["bytes_code"]) == (15_999_999, 15_909_999, 90000)
    assert found["hardware"] == {"world_size": 8, "device": "cuda", "name": "NVIDIA H100 80GB HBM3"}
    assert found["versions"]["torch"] == "2.9.1" and "with results" in out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"demo": True}, "a demo run (DEMO=1)"),
        ({"text_files": "*.txt"}, "TEXT_FILES"),
        ({"data_path": "/data/mine"}, "data folder mine, not the challenge's"),
        ({"val_targets": 1_000_000}, "1,000,000 validation targets: not the challenge's whole split"),
        ({"total_bytes": 16_000_001}, "1 over the 16,000,000 allowed"),
        ({"eval_ms": 600_001}, "evaluation took"),
    ],
)
def test_submission_stays_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], reason: str
) -> None:
    """One run that may not count empties its whole config: nobody chooses among seeds. The reason is printed."""
    logs = write(tmp_path, r1=own_log(1, 1.9, **changes), r2=own_log(2, 1.9))
    found, out = submission_of(tmp_path, logs[:1], capsys)
    assert all(found[field] is None for field in report.RESULT_FIELDS) and "results, which stay null" in out
    assert re.search(f"submission: r1: .*{re.escape(reason)}", out) and found["author"] == "\u00c5sa"
    if {"total_bytes", "eval_ms"} & set(changes):  # the others are other configs
        assert submission_of(tmp_path, logs, capsys)[0]["val_bpb"] is None


def test_submission_needs_one_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two configs, one seed twice, an older log and a file that is no JSON."""
    logs = write(tmp_path, a=own_log(1, 1.9), b=own_log(1, 1.91), c=own_log(1, 1.92, matrix_lr=1), old=old_log(1, 1.93))
    for chosen, reason in (((0, 2), "logs of 2 configs"), ((0, 1), "two logs of one seed"), ((3,), "no config line")):
        found, out = submission_of(tmp_path, [logs[i] for i in chosen], capsys)
        assert found["val_loss"] is None and reason in out
    found, out = submission_of(tmp_path, logs[:1], capsys)
    assert found["val_loss"] == 1.9 and found["val_loss_std"] is None and "one seed has no standard deviation" in out
    (tmp_path / "bad.json").write_text("{")
    done = command("--submission", str(tmp_path / "bad.json"), logs[0])
    assert done.returncode == 2 and "bad.json: not JSON" in done.stderr and (tmp_path / "bad.json").read_text() == "{"


def test_options_do_not_swallow_a_log(tmp_path: Path) -> None:
    """`--submission logs/*.txt` takes the logs for logs and writes the default file."""
    args = report.parse_arguments(["--submission", "a.txt", "b.txt", "--readme"])
    assert args.logs == ["a.txt", "b.txt"] and args.submission == ROOT / "submission.json"
    assert args.readme == ROOT / "README.md"
    for words in ((), ("a.txt", "--figure", "x.jpeg")):
        assert command(*words).returncode == 2
    log = write(tmp_path, one=own_log(1, 1.9))[0]
    assert "No such file" in command(log, "--figure", str(tmp_path / "no/x.svg")).stderr


def test_figure(tmp_path: Path) -> None:
    """The same bytes each time, no date, no opaque ground; PNG too; logs of both formats together."""
    logs = seeds(tmp_path, "a", {1: 1.92, 2: 1.94}) + write(tmp_path, old=old_log(1, 1.93))
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    done = command(*logs, "--figure", str(one))
    assert done.returncode == 0 and f"wrote {one}" in done.stdout, done.stderr
    assert report.main([*logs, "--figure", str(two)]) == 0
    picture = one.read_bytes()
    assert picture == two.read_bytes() and picture.startswith(b"<?xml") and b"<dc:date>" not in picture
    for colour in (report.COLOURS[0], report.COLOURS[1], report.INK):
        assert colour.encode() in picture
    assert report.main([*logs, "--figure", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_colours_on_light_and_dark() -> None:
    """Contrast of at least 3 on white and on GitHub's dark ground."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colour in (*report.COLOURS, *report.CATEGORIES.values(), report.INK):
        here = luminance(colour) + 0.05
        assert (luminance("#ffffff") + 0.05) / here >= 3 and here / (luminance("#0d1117") + 0.05) >= 3, colour


def test_bytes_add_up(tmp_path: Path) -> None:
    """The parts of the bar are the artifact: with and without categories, and with entropies over the file."""
    for total in (15_900_000, 5_000_000):
        run_of = report.read_log(Path(write(tmp_path, one=own_log(1, 1.9, total_bytes=total))[0]))
        parts = report.byte_parts(run_of)
        assert sum(parts.values()) == pytest.approx(total) and min(parts.values()) >= 0 and parts["code"] == 90000
    assert report.byte_parts(report.read_log(Path(write(tmp_path, old=old_log(1, 1.9))[0])))["model"] == 15915978


def committed_logs() -> list[str]:
    """The logs that the README's results table names; where git is at hand, they are those that it holds."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(marker in readme for marker in report.MARKERS), f"README.md lacks {report.MARKERS}"
    block = readme.split(report.MARKERS[0])[1].split(report.MARKERS[1])[0]
    table = block.split("\n\n")[0].splitlines()[2:]
    names = sorted(f"logs/{line.split('|')[1].strip()}.txt" for line in table)
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "logs/*.txt"], cwd=ROOT, capture_output=True, text=True)
        assert listed.returncode != 0 or sorted(listed.stdout.split()) == names, "logs in git and in the README's table"
    return names


def test_readme_has_the_markers() -> None:
    """Once each, in order: `<!-- results -->` and `<!-- /results -->` around what `report.py --markdown` prints."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [text.count(marker) for marker in report.MARKERS] == [1, 1]
    assert report.readme_text(text, "x\n", Path("README.md")).count("x\n" + report.MARKERS[1]) == 1


def test_readme_is_the_report_of_the_logs() -> None:
    """Byte for byte; after a change: `python logs/report.py logs/*.txt --readme`."""
    done = command("--markdown", *committed_logs())
    assert done.returncode == 0, done.stderr
    block = (ROOT / "README.md").read_text(encoding="utf-8").split(report.MARKERS[0])[1].split(report.MARKERS[1])[0]
    assert block == done.stdout


def test_submission_is_that_of_the_logs(tmp_path: Path) -> None:
    """Byte for byte; after a change: `python logs/report.py logs/*.txt --submission`."""
    present = ROOT / "submission.json"
    copy = tmp_path / "submission.json"
    shutil.copy(present, copy)
    done = command(*committed_logs(), "--submission", str(copy))
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == present.read_bytes()
    assert list(tmp_path.iterdir()) == [copy]


def test_readme_writer_refuses_without_markers(tmp_path: Path) -> None:
    """A README without the markers stays as it is."""
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    done = command(*write(tmp_path, one=own_log(1, 1.9)), "--readme", str(readme))
    assert done.returncode == 2 and "README.md: needs the lines" in done.stderr and readme.read_text() == "no markers\n"
    readme.write_text(f"a\n{report.MARKERS[0]}old\n{report.MARKERS[1]}\nb\n")
    done = command(*write(tmp_path, one=own_log(1, 1.9)), "--markdown", "--readme", str(readme))
    assert done.returncode == 0 and readme.read_text() == f"a\n{report.MARKERS[0]}{done.stdout}{report.MARKERS[1]}\nb\n"
