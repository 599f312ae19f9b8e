"""Print the README's table of environment variables from the config; `--write` puts it there, `--check` compares.

python tests/readme.py --check
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

BEGIN, END = "<!-- variables: made by tests/readme.py -->\n", "<!-- end of variables -->"


def shown(value: object) -> str:
    """A value as one types it into the environment."""
    text = str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    return f"`{text}`" if text else ""


def table() -> str:
    """The table in Markdown."""
    rows = ["| variable | default | with `DEMO=1` | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(train_gpt.Config):
        demo = shown(train_gpt.DEMO_SETTINGS[field.name]) if field.name in train_gpt.DEMO_SETTINGS else ""
        rows.append(f"| `{field.name.upper()}` | {shown(field.default)} | {demo} | {field.metadata['meaning']} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """Print, write or check the table."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    if "--write" in sys.argv:
        readme.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
    elif "--check" in sys.argv:
        if old != table():
            print("README.md's table of variables is not the config's: run python tests/readme.py --write")
            return 1
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
