"""logs/VARIABLES.md from the config: `python tests/readme.py --write` makes it, `--check` compares."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

PAGE = ROOT / "logs" / "VARIABLES.md"


def shown(value: object) -> str:
    """A value as one types it into the environment."""
    text = str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    return f"`{text}`" if text else ""


def page() -> str:
    """The page in Markdown."""
    presets = {}
    for condition, preset in train_gpt.PRESETS.items():
        presets[condition] = dict(word.split("=") for word in preset.split())
    rows = [
        "# All variables",
        "",
        "Made by `python tests/readme.py --write` from the fields of `Config`. The environment has precedence over "
        "`DEMO=1`, that over `RECIPE`, that over the default.",
        "",
        "| variable | default | with `DEMO=1` | with `RECIPE=small` | with `RECIPE=pr314` | allowed | meaning |",
        "|---|---|---|---|---|---|---|",
    ]
    for field in dataclasses.fields(train_gpt.Config):
        name = field.name.upper()
        keys = (("DEMO", "1"), ("RECIPE", "small"), ("RECIPE", "pr314"))
        values = [shown(field.default), *(shown(presets[key].get(name, "")) for key in keys)]
        allowed = " and ".join(bound.removeprefix("= ") for bound in field.metadata["bounds"])
        rows.append(f"| `{name}` | {' | '.join(values)} | {allowed} | {field.metadata['meaning']} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """Print, write or check the page."""
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif "--check" in sys.argv:
        if PAGE.read_text(encoding="utf-8") != page():
            print("logs/VARIABLES.md is not the config's: run python tests/readme.py --write")
            return 1
    else:
        print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
