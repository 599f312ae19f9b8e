"""The artifact file: its format, round trip, determinism, and every kind of damage."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from tools import config, load_artifact, model_for, plan_for, runtime, t

SHA256 = "f" * 64
SMALL: dict[str, Any] = {"num_layers": 1, "model_dim": 16, "mlp_mult": 1, "bigram_vocab_size": 8, "bigram_dim": 4}


def stored_model(cfg: t.Config) -> dict[str, t.Stored]:
    """The tensors of a tiny model as an artifact holds them."""
    return t.quantize(model_for(cfg).state_dict(), plan_for(cfg), cfg)


def write(path: Path, **changes: Any) -> tuple[t.Config, dict[str, t.Stored]]:
    """An artifact of a tiny model."""
    cfg = config(run_id="some-run", **changes)
    stored = stored_model(cfg)
    path.write_bytes(t.encode_artifact(stored, cfg, SHA256))
    return cfg, stored


def opened(content: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, streams behind it) of an artifact, by the description of the format."""
    assert content[:8] == b"PGPT\4\0\0\0"
    payload = zstandard.ZstdDecompressor().decompress(content[8:])
    (size,) = struct.unpack_from("<I", payload)
    return json.loads(payload[4 : 4 + size]), payload[4 + size :]


def forged(path: Path, header: Any, body: bytes = b"") -> None:
    """A sound frame around a header of one's own."""
    text = json.dumps(header).encode()
    frame = zstandard.ZstdCompressor().compress(struct.pack("<I", len(text)) + text + body)
    path.write_bytes(t.ARTIFACT_MAGIC + frame)


def same_tensors(one: dict[str, t.Stored], other: dict[str, t.Stored]) -> bool:
    """Whether both hold the same names, and the same types and values."""
    if one.keys() != other.keys():
        return False
    for name, stored in one.items():
        for a, b in zip(stored, other[name], strict=True):
            if a is None or b is None:
                if a is not b:
                    return False
            elif a.dtype != b.dtype or not torch.equal(a, b):
                return False
    return True


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_round_trip(tmp_path: Path, bits: int) -> None:
    """Codes, scales and fp16 values come back as they were, whatever the model variables say."""
    cfg, stored = write(tmp_path / "a.ptz", mlp_bits=bits, attn_bits=bits, mlp_mult=3)
    path = tmp_path / "a.ptz"
    other = config(num_layers=2, mlp_mult=1, xsa_layers=0, seed=5)
    found, read, sha256 = t.decode_artifact(path.read_bytes(), str(path), other)
    assert sha256 == SHA256 and same_tensors(read, stored)
    assert all(getattr(found, name) == getattr(cfg, name) for name in t.MODEL_FIELDS) and found.seed == 5
    codes = [tensor.values for name, tensor in read.items() if t.category(name) in ("mlp", "attn") and len(tensor) > 1]
    assert min(int(c.min()) for c in codes) >= -(2 ** (bits - 1)) and max(int(c.max()) for c in codes) < 2 ** (bits - 1)
    model = load_artifact(path, other, runtime())
    assert len(model.blocks) == cfg.num_layers
    assert all(torch.equal(p, stored[name].dequantize()) for name, p in model.named_parameters())


def test_format(tmp_path: Path) -> None:
    """A reader written from the description: header, then all codes, all scales, all fp16 values in the model's order,
    and nothing else. Matrices stand in the order of the spread of their codes."""
    cfg, stored = write(tmp_path / "a.ptz")
    header, body = opened((tmp_path / "a.ptz").read_bytes())
    assert header.keys() == {"config", "coded", "tokenizer_sha256"}
    assert header["config"] == {name: getattr(cfg, name) for name in t.MODEL_FIELDS}
    assert sorted(header["coded"]) == sorted(plan_for(cfg))
    spreads = [stored[name].values.double().std(correction=0).item() for name in header["coded"]]
    assert spreads == sorted(spreads) and len(set(spreads)) > 10
    parts = [(stored[name].values, np.int8) for name in header["coded"]]
    parts += [(stored[name].scale, "<f2") for name in header["coded"]]
    parts += [(tensor.values, "<f2") for name, tensor in stored.items() if name not in header["coded"]]
    at = 0
    for tensor, dtype in parts:
        read = np.frombuffer(body, dtype, tensor.numel(), at)
        assert np.array_equal(read, tensor.flatten().numpy())
        at += read.nbytes
    assert at == len(body)


def test_same_weights_same_bytes(tmp_path: Path) -> None:
    """No time stamp, run id or path is in the file."""
    write(tmp_path / "a.ptz")
    cfg = config(run_id="another-run", data_path="elsewhere", seed=9)
    content = t.encode_artifact(stored_model(cfg), cfg, SHA256)
    assert content == (tmp_path / "a.ptz").read_bytes()
    payload = zstandard.ZstdDecompressor().decompress(content[8:])
    assert b"-run" not in payload and b"elsewhere" not in payload and str(tmp_path).encode() not in payload


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """ValueError that names the file, nothing else."""
    cfg, _ = write(tmp_path / "a.ptz", **SMALL)
    content = (tmp_path / "a.ptz").read_bytes()
    for cut in range(len(content)):
        with pytest.raises(ValueError, match=r"broken\.ptz"):
            t.decode_artifact(content[:cut], "broken.ptz", cfg)
    for more in (b"\0", content, content[8:]):
        with pytest.raises(ValueError, match=r"broken\.ptz"):
            t.decode_artifact(content + more, "broken.ptz", cfg)


def test_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    """One bit of each byte flipped, and every bit of the first 40: ValueError that names the file. A few bits mean
    nothing to zstd (reserved ones, the size of its window): with these the very same model is read."""
    cfg, stored = write(tmp_path / "a.ptz", **SMALL)
    content, rng, harmless = (tmp_path / "a.ptz").read_bytes(), random.Random(0), 0
    flips = [(at, bit) for at in range(40) for bit in range(8)]
    flips += [(at, rng.randrange(8)) for at in range(40, len(content))]
    for at, bit in flips:
        data = bytearray(content)
        data[at] ^= 1 << bit
        try:
            assert same_tensors(t.decode_artifact(bytes(data), "broken.ptz", cfg)[1], stored)
            harmless += 1
            assert 8 <= at < 40
        except ValueError as error:
            assert "broken.ptz" in str(error)
    assert harmless < 32


@pytest.mark.parametrize(
    "header",
    [
        [],
        None,
        {},
        {"config": 3},
        {"config": {}},
        {"config": []},
        {"coded": None},
        {"coded": 3},
        {"coded": [[]]},
        {"coded": [{}]},
        {"coded": ["no such tensor"]},
        {"coded": ["\ud800"]},
        {"coded": "blocks"},
        {"model_dim": 1 << 40},
        {"model_dim": 10**400},
        {"model_dim": -32},
        {"model_dim": 0},
        {"model_dim": 33},
        {"model_dim": 32.0},
        {"num_layers": "three"},
        {"num_layers": True},
        {"num_layers": 2},
        {"num_layers": None},
        {"vocab_size": 1 << 20},
        {"bigram_vocab_size": 1 << 50},
        {"mlp_mult": 1 << 62},
        {"train_seq_len": 1 << 62},
        {"rope_base": float("nan")},
        {"relu_slope": 2.0},
    ],
)
def test_forged_headers(tmp_path: Path, header: Any) -> None:
    """Sizes are checked before anything is allocated; what is not in `header` is as in a sound file."""
    cfg, _ = write(tmp_path / "a.ptz")
    sound, body = opened((tmp_path / "a.ptz").read_bytes())
    if header:
        fields = {name: value for name, value in header.items() if name in sound["config"]}
        sound["config"] |= fields
        header = sound | {name: value for name, value in header.items() if name not in fields}
    forged(tmp_path / "forged.ptz", header, body)
    with pytest.raises(ValueError, match=r"forged\.ptz"):
        load_artifact(tmp_path / "forged.ptz", cfg, runtime())


@pytest.mark.parametrize("name", ["smear_gate", "bigram.scale", "skip_scale", "blocks.0.mix"])
def test_forged_codes(tmp_path: Path, name: str) -> None:
    """Gains, scales and gates that a file claims to be coded, with as many bytes as that takes."""
    cfg, stored = write(tmp_path / "a.ptz")
    header, body = opened((tmp_path / "a.ptz").read_bytes())
    shape = stored[name].values.shape
    header["coded"].append(name)
    more = shape.numel() + 2 * shape[:1].numel() - 2 * shape.numel()
    forged(tmp_path / "forged.ptz", header, body[: len(body) + min(more, 0)] + bytes(max(more, 0)))
    try:  # a matrix of gains can be read as one of codes
        model = load_artifact(tmp_path / "forged.ptz", cfg, runtime())
        assert len(shape) == 2 and all(p.isfinite().all() for p in model.parameters())
    except ValueError as error:
        assert "forged.ptz" in str(error)


def test_payload_that_is_cut_or_too_long(tmp_path: Path) -> None:
    """In a sound frame: streams of another length than the header's tensors have, and no header at all."""
    cfg, _ = write(tmp_path / "a.ptz")
    header, body = opened((tmp_path / "a.ptz").read_bytes())
    for changed in (body[:-1], body[:-2], body[:100], b"", body + b"\0", body + body):
        forged(tmp_path / "forged.ptz", header, changed)
        with pytest.raises(ValueError, match=r"forged\.ptz"):
            load_artifact(tmp_path / "forged.ptz", cfg, runtime())
    deep = b"[" * 100_000
    for payload in (
        b"",
        b"\0",
        b"\4\0\0\0",
        b"\4\0\0\0null",
        b"\xff\xff\xff\xff{}",
        struct.pack("<I", len(deep)) + deep,
    ):
        (tmp_path / "forged.ptz").write_bytes(t.ARTIFACT_MAGIC + zstandard.ZstdCompressor().compress(payload))
        with pytest.raises(ValueError, match=r"forged\.ptz"):
            load_artifact(tmp_path / "forged.ptz", cfg, runtime())


def test_foreign_missing_and_other_version(tmp_path: Path) -> None:
    """Each has its own message."""
    for content in (b"PK\3\4 something", b"", b"PGPT\1\0\0\0rest", b"PGPT\3\0\0\0rest", b"PGPT\5\0\0\0rest"):
        (tmp_path / "x.ptz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.ptz is not an artifact of this script, or of another version"):
            load_artifact(tmp_path / "x.ptz", config(), runtime())
    with pytest.raises(FileNotFoundError, match=r"none\.ptz"):
        load_artifact(tmp_path / "none.ptz", config(), runtime())


def test_nodes_without_the_file(tmp_path: Path) -> None:
    """A rank on another node loads what rank 0 read."""
    cfg, stored = write(tmp_path / "a.ptz")
    content = (tmp_path / "a.ptz").read_bytes()
    rt = runtime(rank=1, world_size=2)
    rt.from_rank_0 = lambda make: content  # type: ignore[method-assign]
    model = load_artifact(tmp_path / "elsewhere.ptz", cfg, rt)
    assert all(torch.equal(p, stored[name].dequantize()) for name, p in model.named_parameters())


def test_sizes_of_the_model() -> None:
    """Those of a file replace those of the environment, all together; a file of another version lacks some."""
    given, cfg = config(seed=9, run_id="x"), config(num_layers=2, train_seq_len=16, xsa_layers=1)
    sizes = {name: getattr(cfg, name) for name in t.MODEL_FIELDS}
    found = t.with_model_fields(given, sizes | {"seed": 3, "run_id": "../other", "more": 1})
    assert all(getattr(found, name) == sizes[name] for name in t.MODEL_FIELDS)
    kept = vars(given).keys() - sizes.keys() - {"train_batch_tokens"}
    assert all(getattr(found, name) == getattr(given, name) for name in kept)
    for name in t.MODEL_FIELDS:
        with pytest.raises(ValueError, match="=None is no"):
            t.with_model_fields(given, {field: value for field, value in sizes.items() if field != name})
