"""README, logs and script say the same; the README's commands run as written."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tools import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
MARK = re.compile(r"\s#\s*(long|gpu|network|data)\b")  # in the comment of a command that a test cannot run


def commands(block: str) -> list[str]:
    """The commands of a block, one a line, with their comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


BLOCKS = [commands(block) for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)]
RUNNABLE = [kept for block in BLOCKS if (kept := [line for line in block if not MARK.search(line)])]


def test_table_of_variables() -> None:
    """It is the config's."""
    done = subprocess.run([sys.executable, str(ROOT / "tests/readme.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_quoted_log_lines() -> None:
    """Lines that the README quotes from the demo stand in the committed log."""
    log = (ROOT / "logs/demo.txt").read_text(encoding="utf-8")
    quoted = re.findall(r"^(?:float_sliding|final_sliding|xz -9e|artifact bits).*$", README, re.M)
    assert len(quoted) >= 4 and all(line in log for line in quoted)


def test_files_exist() -> None:
    """Files that the README names are there."""
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:tests|logs)/[\w-]+\.\w+)`", README):
        assert (ROOT / path).exists(), path


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
    """At most 320 lines; the map names the script's sections in their order."""
    assert len(README.splitlines()) <= 320
    sections = re.findall(r"^# ---- (\d+ [^-]+?) -+$", SCRIPT, re.M)
    named = re.findall(r"\*\*(\d+ [^*]+)\*\*", README)
    assert len(sections) == len(named) >= 10
    for section, name in zip(sections, named, strict=True):
        assert section.startswith(name), (section, name)


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
    for pattern in ("*.py", "*.md", "*.json", "*.txt", "logs/*.py", "logs/*.txt", "logs/*.jsonl", "tests/*"):
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


def messages() -> list[list[str]]:
    """The messages of the troubleshooting table, each as its parts between the `...` that stand for values."""
    table = README.split("## Troubleshooting\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    found = [m for cell in cells for m, note in re.findall(r"`([^`]+)`( \(PyTorch's\))?", cell) if not note]
    return [[part.strip() for part in message.split("...") if part.strip()] for message in found]


def text_of(node: ast.AST) -> str:
    """The constant text of an expression, joined where values come between."""
    strings = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return "".join(str(n.value) for n in sorted(strings, key=lambda n: (n.lineno, n.col_offset)))


def test_messages_in_the_script() -> None:
    """Each message of the troubleshooting table is one of the script's."""
    kinds = ast.Raise | ast.Call | ast.JoinedStr
    lines = [text_of(node) for node in ast.walk(ast.parse(SCRIPT)) if isinstance(node, kinds)]
    for parts in messages():
        assert any(all(part in line for part in parts) for line in lines) and len("".join(parts)) > 8, parts


def test_every_error_is_explained() -> None:
    """Each exception that the script raises for its user has a row, by one of its messages or by the one around it."""
    known, inner = messages(), ("expected ", "it claims ")  # parts of messages that have a row
    raised = [node for node in ast.walk(ast.parse(SCRIPT)) if isinstance(node, ast.Raise) and node.exc]
    texts = [text for node in raised if (text := text_of(node))]
    assert len(texts) > 25
    for text in (t for t in texts if not t.startswith(inner)):
        assert any(all(part in text for part in parts) for parts in known), text
