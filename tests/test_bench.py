"""The benchmark: what it reads from a run, and the order in which it runs two versions."""

from __future__ import annotations

from pathlib import Path

import bench
import pytest
from bench import Case, Line, ratio, step_seconds, waits
from tools import SIZES, corpus

LINES = [
    Line(0.5, "data path:x val_tokens:4097 val_targets:4000"),
    Line(2.0, "step:1/5 train_loss:6.0 lr_scale:1.0000 grad_norm:1.0 train_time:1000ms step_avg:1000.00ms"),
    Line(2.5, "checkpoint path:logs/x.000000001.ckpt time:500ms"),
    Line(3.5, "step:2/5 train_loss:6.0 lr_scale:1.0000 grad_norm:1.0 train_time:2500ms step_avg:1250.00ms"),
    Line(3.5, "step:3/5 train_loss:6.0 lr_scale:1.0000 grad_norm:1.0 train_time:2700ms step_avg:900.00ms"),
    Line(3.8, "checkpoint path:logs/x.000000003.ckpt time:300ms"),
    Line(4.0, "step:4/5 train_loss:6.0 lr_scale:1.0000 grad_norm:1.0 train_time:3300ms step_avg:825.00ms"),
    Line(4.2, "step:5/5 train_loss:6.0 lr_scale:1.0000 grad_norm:1.0 train_time:3500ms step_avg:700.00ms"),
    Line(4.5, "step:5/5 val_loss:5.00000000 val_bpb:3.00000000 train_time:4000ms"),
    Line(4.8, "export weights:last path:logs/x.weights snapshots:0 time:250ms"),
    Line(5.0, "training stopped:iterations step:5 train_time:4250ms"),
    Line(6.0, "artifact round:0 model_bytes:9 time:9ms"),
    Line(7.5, "artifact path:logs/x.ptz codec:zstd-22 model_bytes:9 code_bytes:9 artifact_bytes:18 limit:99"),
    Line(9.0, "final_sliding stride:64 val_loss:5.00000000 val_bpb:3.00000000 eval_time:800ms"),
    Line(9.5, "final_int8_zlib_roundtrip_exact val_loss:5.00000000 val_bpb:3.00000000"),
]


def test_ratio_is_of_rounds() -> None:
    """A machine that halves its speed in mid-run changes no ratio."""
    assert ratio([2.0, 4.0, 4.0], [1.0, 2.0, 2.0]) == 2.0


def test_waits() -> None:
    """Checkpoints do not count as steps, nor does the validation after the last one."""
    assert step_seconds([line.text for line in LINES]) == pytest.approx([1.0, 0.2, 0.3, 0.2])
    assert waits(LINES) == pytest.approx({
        "start, up to the end of step 1": 2.0,
        "training step": 0.2,
        "export, up to the file": 2.5,
        "sliding evaluation, 1,000 tokens": 0.2,
        "the whole run": 9.5,
        "checkpoint": 0.4,
    })  # fmt: skip


def test_export_begins_where_the_line_before_ends() -> None:
    """Whatever another version, or a score of the float weights, prints there."""
    at = [line.text[:16] for line in LINES].index("training stopped")
    for text in ("weights path:logs/x.weights (EXPORT_FROM)", "float_sliding stride:64 val_loss:5.00000000"):
        lines = [*LINES[: at + 1], Line(5.75, text), *LINES[at + 1 :]]
        assert waits(lines)["export, up to the file"] == pytest.approx(7.5 - 5.75)


def test_table() -> None:
    """Medians and range of this version; beside them the other one's, or dashes for what its log does not have."""
    these = [{"training step": seconds, "checkpoint": 1.0} for seconds in (1.0, 2.0, 4.0)]
    others = [{"training step": 1.5 * seconds} for seconds in (1.0, 2.0, 4.0)]
    alone = bench.table(Case("T", {}, 9), [these]).splitlines()
    assert alone[0] == "### T" and alone[-2:] == ["| training step | 2 | 1 | 4 |", "| checkpoint | 1 | 1 | 1 |"]
    both = bench.table(Case("T", {}, 9), [these, others]).splitlines()
    assert both[-2:] == ["| training step | 2 | 1 | 4 | 3 | 1.50 |", "| checkpoint | 1 | 1 | 1 | - | - |"]


def test_rounds_run_the_versions_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A B A B, and each version's waits by itself."""
    calls = list[str]()

    def noted(script: Path, case: Case, data: Path) -> dict[str, float]:
        calls.append(script.name)
        return {"step": float(len(calls))}

    monkeypatch.setattr(bench, "run_case", noted)
    found = bench.rounds_of([Path("a"), Path("b")], Case("T", {}, 9), Path("data"), 2)
    assert calls == ["a", "b", "a", "b"]
    assert found == [[{"step": 1.0}, {"step": 3.0}], [{"step": 2.0}, {"step": 4.0}]]


def test_script_and_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script itself at tiny sizes, against a file that prints what a run does; nothing is left behind."""
    text = "\n".join(line.text for line in LINES)
    other = tmp_path / "other.py"
    other.write_text(f"print({text!r})")
    made = corpus()
    sizes = {name.upper(): value for name, value in SIZES.items() if not isinstance(value, bool)}
    monkeypatch.setattr(bench, "CASES", {"tiny": Case("tiny", sizes, 129)})
    monkeypatch.setattr(bench.train_gpt, "build_corpus", lambda texts, folder, size: folder.symlink_to(made))
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--cases", "tiny", "--rounds", "1", "--against", str(other)]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == list(waits(LINES))
    assert all(float(cell) >= 0 for row in rows for cell in row[2:-1])
    assert [path.name for path in tmp_path.iterdir()] == ["other.py"]


def test_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what the script said."""
    script = tmp_path / "fails.py"
    script.write_text("print('error: no shards')\nraise SystemExit(2)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="exit code 2:\nerror: no shards"):
        bench.run_script(script, {})


@pytest.mark.parametrize("words", [["--cases", "gone"], ["--against", "gone.py"], ["--rounds", "0"]])
def test_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be is an error that names it."""
    with pytest.raises(SystemExit):
        bench.main(words)
    assert words[1] in capsys.readouterr().err
