"""README, logs and script say the same."""

from __future__ import annotations

import re
import subprocess
import sys

from tools import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_first_screen_has_the_two_commands() -> None:
    """Within the first 40 lines, each setting up all that it needs."""
    top = "\n".join(README.splitlines()[:40])
    for part in ("DEMO=1", "-m pytest"):
        line = next(line for line in top.splitlines() if part in line)
        assert "-m venv" in line and "pip install" in line and "requirements.txt" in line
