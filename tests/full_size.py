"""Run the default, full-size config for one step on a CPU, with a small validation shard, and print what it took.

    python tests/full_size.py        (72 s and 3 GB on 2 cores with bf16 matrix units; minutes without)

It is the command of the README: `TRAIN_BATCH_TOKENS=16384 WARMUP_STEPS=0 ITERATIONS=1 CALIBRATION_TOKENS=4096 python
train_gpt.py`, on shards made here from the documentation that Python, NumPy and PyTorch ship.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt

VAL_TOKENS = 2 * 2048 + 1


def main() -> int:
    """Build the shards, run the script, print its speed, memory and last lines."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "corpus"
        documents = [d for d in train_gpt.demo_documents() if d][:800]
        train_gpt.build_corpus(documents, folder, 1024, (97_000, 105_000))
        val = folder / "fineweb_val_000000.bin"
        train_gpt.write_shard(val, train_gpt.open_shard(val)[:VAL_TOKENS].copy())
        settings = {
            "DATA_PATH": str(folder),
            "TOKENIZER_PATH": str(folder / "tokenizer.model"),
            "RUN_ID": "full-size",
            "TRAIN_BATCH_TOKENS": "16384",
            "WARMUP_STEPS": "0",
            "ITERATIONS": "1",
            "CALIBRATION_TOKENS": "4096",
        }
        command = [sys.executable, train_gpt.__file__]
        done = subprocess.run(command, cwd=name, env=os.environ | settings, capture_output=True, text=True)
        print(
            *[line for line in done.stdout.splitlines() if re.match(r"(run|model|step|training|artifact|final)", line)],
            sep="\n",
        )
        print(done.stderr, end="")
        sliding = re.search(r"final_sliding stride:64 .* eval_time:(\d+)ms", done.stdout)
        if sliding:
            print(f"sliding evaluation: {1000 * (VAL_TOKENS - 1) / int(sliding[1]):.1f} scored tokens per second")
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
