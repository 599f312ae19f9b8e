"""README, logs and script say the same; the README's commands run as written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import readme
from tools import ROOT, t

README = (ROOT / "README.md").read_text(encoding="utf-8")
MARK = re.compile(r"\s#\s*(long|gpu|network|data)\b")  # in the comment of a command that a test cannot run


def commands(block: str) -> list[str]:
    """The commands of a block, one a line, with their comments."""
    return [line for line in block.splitlines() if line.strip() and not line.lstrip().startswith("#")]


BLOCKS = [commands(block) for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)]
RUNNABLE = [kept for block in BLOCKS if (kept := [line for line in block if not MARK.search(line)])]


def test_page_of_variables() -> None:
    """It is the config's."""
    assert readme.PAGE.read_text(encoding="utf-8") == readme.page()


def test_named_variables() -> None:
    """Variables and defaults of the README's table are the config's."""
    table = README.split("## Variables that people change\n")[1].split("\n## ")[0]
    for row in re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.M):
        names = re.findall(r"`(\w+)`", row[0])
        values = row[1].split(", ")
        for name, value in zip(names, values * (len(names) // len(values)), strict=False):
            default = getattr(t.Config, name.lower())
            if value not in ("free", "42, date and time") and default != "":
                assert str(default) == value or f"{default:g}" == value, name


def test_quoted_log_lines() -> None:
    """Lines that the README quotes from the demo stand in the committed log."""
    log = (ROOT / "logs/demo.txt").read_text(encoding="utf-8")
    quoted = re.findall(r"^(?:float_sliding|final_|artifact ).*$", README, re.M)
    assert len(quoted) >= 4 and all(line in log for line in quoted)


def test_files_exist() -> None:
    """Files that the README names are there."""
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:tests|logs)/[\w-]+\.\w+)`", README):
        assert (ROOT / path).exists() or "RUN_ID" in path, path


def test_links_to_headings() -> None:
    """Each link within the page has its heading."""
    headings = re.findall(r"^#+ (.+)$", README, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in re.findall(r"\]\(#([^)]+)\)", README):
        assert link in anchors, link


def test_first_screen_has_the_two_commands() -> None:
    """Within the first 40 lines, each setting up all that it needs."""
    top = "\n".join(README.splitlines()[:40])
    for part in ("DEMO=1", "-m pytest"):
        line = next(line for line in top.splitlines() if part in line)
        assert "-m venv" in line and "pip install" in line and "requirements.txt" in line


def test_length_and_sections() -> None:
    """At most 16 kB; the README names the script's sections in their order."""
    assert len(README.encode()) <= 16_000
    script = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    sections = re.findall(r"^# ---- (\w[^-]*?) -+$", script, re.M)
    assert f"as a batch travels: {', '.join(sections)}." in README


def test_packages_of_a_gpu_machine() -> None:
    """The packages to install beside the machine's own PyTorch are those of requirements.txt, in the same versions."""
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    line = next(c for block in BLOCKS for c in block if c.startswith("pip install numpy"))
    assert sorted(line.split("#")[0].split()[2:]) == sorted(p for p in pinned if not p.startswith("torch"))


@pytest.mark.parametrize("block", RUNNABLE, ids=[re.sub(r"\W+", "-", block[-1])[:40] for block in RUNNABLE])
def test_commands_run(block: list[str], tmp_path: Path) -> None:
    """In a copy of the repository, block by block, all commands but those marked long, gpu, network or data."""
    for name in ("logs", "tests"):
        (tmp_path / name).mkdir()
    for pattern in (
        "*.py",
        "*.md",
        "*.json",
        "*.txt",
        "logs/*.py",
        "logs/*.txt",
        "logs/*.md",
        "logs/*.jsonl",
        "tests/*",
    ):
        for path in filter(Path.is_file, ROOT.glob(pattern)):
            shutil.copy(path, tmp_path / path.relative_to(ROOT))
    env = {k: os.environ[k] for k in ("HOME", "LANG", "TMPDIR", "OPENBLAS_CORETYPE") if k in os.environ}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "\n".join(["set -eux", *block])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if scores := re.findall(r"^final_sliding .* val_bpb:(\S+)", done.stdout, re.M):  # "the same number"
        assert len(scores) == 4 and scores[0] == scores[1] == scores[3] != scores[2], scores


def test_marks() -> None:
    """The test command itself and all that needs a GPU or a network are marked; enough is left to run."""
    for line in (line for block in BLOCKS for line in block):
        needs = re.search(r"-m pytest|pip install|^torchrun|cached_challenge_fineweb", line)
        assert bool(needs) <= bool(MARK.search(line)), line
    assert len(RUNNABLE) >= 3 and sum(map(len, RUNNABLE)) >= 9
