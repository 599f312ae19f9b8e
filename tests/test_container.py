"""The artifact file: round trip, determinism, and every kind of damage."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
import zstandard
from tools import config, model_for, plan_for, runtime, t


def write(path: Path, **changes: object) -> tuple[t.Config, t.StoredState]:
    """An artifact of a tiny model."""
    cfg = config(run_id="some-run", **changes)
    stored = t.quantize_state(dict(model_for(cfg).named_parameters()), plan_for(cfg), cfg, print, {})
    path.write_bytes(t.encode_artifact(stored, plan_for(cfg), cfg, "f" * 64))
    return cfg, stored


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_round_trip(tmp_path: Path, bits: int) -> None:
    """Codes, scales, plan and header come back as they were."""
    cfg, stored = write(tmp_path / "a.ptz", mlp_bits=bits, attn_bits=bits, mlp_mult=3)
    header, read, plan = t.read_artifact(tmp_path / "a.ptz")
    assert plan == plan_for(cfg) and header["tokenizer_sha256"] == "f" * 64 and header["config"]["model_dim"] == 32
    assert read.keys() == stored.keys()
    for name in stored:
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(stored[name], read[name], strict=True))
    model = t.load_artifact(tmp_path / "a.ptz", cfg, runtime(), "f" * 64)
    assert all(torch.equal(p, t.dequantize_state(stored)[n]) for n, p in model.named_parameters())


def test_odd_nibbles() -> None:
    """An odd number of codes."""
    codes = torch.tensor([-8, 7, 0, -1, 3], dtype=torch.int8)
    packed = t.np.frombuffer(t.pack_nibbles(codes), dtype=t.np.uint8)
    assert len(packed) == 3 and t.unpack_nibbles(packed, 5).tolist() == codes.tolist()


def test_same_weights_same_bytes(tmp_path: Path) -> None:
    """No time stamp, run id or path is in the file."""
    write(tmp_path / "a.ptz")
    write(tmp_path / "b.ptz")
    content = (tmp_path / "a.ptz").read_bytes()
    assert content == (tmp_path / "b.ptz").read_bytes()
    payload = t.artifact_payload(tmp_path / "a.ptz")
    assert b"some-run" not in payload and str(tmp_path).encode() not in payload and not list(tmp_path.glob("*.tmp"))


def test_truncated_or_changed_files_are_refused(tmp_path: Path) -> None:
    """Cut anywhere, or with one bit flipped anywhere: ValueError that names the file, nothing else."""
    path, broken = tmp_path / "a.ptz", tmp_path / "broken.ptz"
    write(path)
    content, rng = path.read_bytes(), random.Random(0)
    for cut in [0, 3, 4, 7, 8, 12, len(content) // 2, len(content) - 1]:
        broken.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"broken\.ptz"):
            t.read_artifact(broken)
    for _ in range(200):
        data = bytearray(content)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        broken.write_bytes(data)
        with pytest.raises(ValueError, match=r"broken\.ptz"):
            t.read_artifact(broken)


def forged(path: Path, header: object, body: bytes = b"") -> None:
    """A sound frame around a header of one's own."""
    text = json.dumps(header).encode()
    frame = zstandard.ZstdCompressor().compress(struct.pack("<I", len(text)) + text + body)
    path.write_bytes(t.ARTIFACT_HEAD + frame)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {},
        {"tensors": 3},
        {"tensors": [{}]},
        {"tensors": [{"name": "a", "shape": [1 << 40, 1 << 40], "bits": 4}]},
        {"tensors": [{"name": "a", "shape": [-1, 2], "bits": 4}]},
        {"tensors": [{"name": "a", "shape": [4], "bits": 99}]},
        {"tensors": [{"name": "a", "shape": "x", "bits": 4}], "config": {}, "tokenizer_sha256": ""},
    ],
)
def test_forged_headers(tmp_path: Path, header: object) -> None:
    """Sizes are checked before anything is allocated."""
    forged(tmp_path / "forged.ptz", header)
    with pytest.raises(ValueError, match=r"forged\.ptz"):
        t.read_artifact(tmp_path / "forged.ptz")


def test_foreign_missing_and_other_version(tmp_path: Path) -> None:
    """Each has its own message."""
    (tmp_path / "x.ptz").write_bytes(b"PK\3\4 something")
    with pytest.raises(ValueError, match="not an artifact of this script"):
        t.read_artifact(tmp_path / "x.ptz")
    (tmp_path / "x.ptz").write_bytes(b"PGPT\1\0\0\0rest")
    with pytest.raises(ValueError, match="artifact format"):
        t.read_artifact(tmp_path / "x.ptz")
    with pytest.raises(FileNotFoundError, match="no artifact at"):
        t.read_artifact(tmp_path / "none.ptz")


def test_nodes_without_the_file(tmp_path: Path) -> None:
    """A rank on another node loads what rank 0 read."""
    cfg, stored = write(tmp_path / "a.ptz")
    content = (tmp_path / "a.ptz").read_bytes()
    rt = runtime(rank=1, world_size=2)
    rt.from_rank_0 = lambda make: content  # type: ignore[method-assign]
    model = t.load_artifact(tmp_path / "elsewhere.ptz", cfg, rt, "f" * 64)
    assert all(torch.equal(p, t.dequantize_state(stored)[n]) for n, p in model.named_parameters())


def test_wrong_tokenizer_config_or_tensors(tmp_path: Path) -> None:
    """A file that does not belong to the data or to itself is refused."""
    path = tmp_path / "a.ptz"
    cfg, _ = write(path)
    with pytest.raises(ValueError, match="needs the tokenizer of sha256"):
        t.load_artifact(path, cfg, runtime(), "0" * 64)
    with pytest.raises(ValueError, match="other tensors"):
        t.load_artifact(path, config(num_layers=2), runtime(), "f" * 64)
    header, _, _ = t.read_artifact(path)
    header["config"]["num_heads"] = "four"
    forged(tmp_path / "b.ptz", {"tensors": [], "config": header["config"], "tokenizer_sha256": ""})
    with pytest.raises(ValueError, match="config is not of this model"):
        t.with_model_fields(config(), t.read_artifact(tmp_path / "b.ptz")[0]["config"], "b.ptz")
    with pytest.raises(ValueError, match="of another version"):
        t.with_model_fields(config(), {n: getattr(cfg, n) for n in t.MODEL_FIELDS[1:]}, "older.weights")
