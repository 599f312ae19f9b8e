"""Files from elsewhere: thousands of mutated artifacts, shards, checkpoints and weights, all seeded. Each is read
correctly or refused with the documented errors, in bounded time and memory, and none runs code."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from tools import config, model_for, plan_for, runtime, t

SECONDS, MEMORY = 2.0, 1 << 30  # what one file may take; the memory of them all together
REFUSED = (ValueError, FileNotFoundError)


def peak_memory() -> int:
    """Peak resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, the end cut off, bytes inserted, deleted, doubled or overwritten; sometimes several of these."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 100))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(size)
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data[at:at] = data[at : at + size]
        else:
            data[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f", rng.randbytes(1))) * size
    return bytes(data)


def check(cases: Iterator[tuple[str, Callable[[], Any]]], at_least: int) -> dict[str, int]:
    """Run the cases; each returns or is refused, soon and without much memory. Returns how many of each there were."""
    counts, before = {"read": 0, "refused": 0}, peak_memory()
    for name, read in cases:
        begun = time.process_time()
        try:
            read()
            counts["read"] += 1
        except REFUSED as error:
            assert str(error), name
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"case {name} ended with {type(error).__name__}: {error}") from error
        assert time.process_time() - begun < SECONDS, name
    assert sum(counts.values()) >= at_least
    assert peak_memory() - before < MEMORY
    return counts


# ---- artifacts -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def artifact() -> tuple[t.Config, bytes]:
    """A sound artifact of a tiny model."""
    cfg = config()
    stored = t.quantize_state(dict(model_for(cfg).named_parameters()), plan_for(cfg), cfg, lambda _: None, {})
    return cfg, t.encode_artifact(stored, plan_for(cfg), cfg, "f" * 64)


def payload_of(content: bytes) -> bytes:
    """The decompressed part of an artifact."""
    return t.artifact_payload(Path("a.ptz"), content)


def framed(payload: bytes, level: int = 1) -> bytes:
    """An artifact file around a payload."""
    return t.ARTIFACT_HEAD + zstandard.ZstdCompressor(level=level, write_checksum=True).compress(payload)


def with_header(header: Any, body: bytes, claimed: int | None = None) -> bytes:
    """A file around a header of one's own; `claimed`: the header's length as the file says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return framed(struct.pack("<I", (len(text) if claimed is None else claimed) & 0xFFFFFFFF) + text + body)


ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2, 3, 16, 1 << 20, 1 << 31, 1 << 40, 1 << 63, 1 << 64, 10**400, 0.5, 1e308, float("inf"),
    float("nan"), "", "x", "\ud800", "blocks.0.mix", [], [[]], [1] * 100, [0, 1 << 62], [1 << 20], [1 << 16, 1 << 16],
    [3, 5, 7], [-1, -1], [float("inf")], {}, {"a": 1},
]  # fmt: skip


def forged_header(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A header with one to three odd values, dropped, doubled or swapped entries."""
    forged = json.loads(json.dumps(header))
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not isinstance(forged.get("tensors"), list) or not forged["tensors"] or rng.random() < 0.15:
            forged[rng.choice(("tensors", "config", "tokenizer_sha256", "more"))] = rng.choice(ODD_VALUES)
            continue
        if rng.random() < 0.35 and isinstance(forged.get("config"), dict) and forged["config"]:
            forged["config"][rng.choice(list(forged["config"]))] = rng.choice(ODD_VALUES)
            continue
        i, kind = rng.randrange(len(forged["tensors"])), rng.randrange(4)
        if kind == 0:
            del forged["tensors"][i]
        elif kind == 1:
            forged["tensors"].insert(rng.randrange(len(forged["tensors"])), forged["tensors"][i])
        elif isinstance(forged["tensors"][i], dict):
            forged["tensors"][i][rng.choice(("name", "shape", "bits", "dtype"))] = rng.choice(ODD_VALUES)
    return forged


def forged_frame(content: bytes, rng: random.Random) -> bytes:
    """A frame whose header claims another size of its content: random, huge, or none."""
    payload = payload_of(content)
    if rng.random() < 0.3:
        compressor = zstandard.ZstdCompressor(level=1, write_content_size=False)
        return t.ARTIFACT_HEAD + compressor.compress(payload)
    frame = bytearray(content[8:])
    assert frame[4] >> 6 in (1, 2), "the content size has 2 or 4 bytes"
    begin = 5 + (0 if frame[4] & 32 else 1)
    size = 2 if frame[4] >> 6 == 1 else 4
    claimed = rng.choice((0, 1, len(payload) - 1, (1 << 30) - 1, 1 << 30, rng.randrange(1 << 32), (1 << 32) - 1))
    frame[begin : begin + size] = claimed.to_bytes(8, "little")[:size]
    return content[:8] + bytes(frame)


def artifact_cases(content: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, mutated file), 2,200 of them: files, payloads in a sound frame, headers, claimed sizes."""
    rng, payload = random.Random(0), payload_of(content)
    begin = 4 + struct.unpack_from("<I", payload)[0]
    header, body = json.loads(payload[4:begin]), payload[begin:]
    for i in range(700):
        yield f"file {i}", mutated(content, rng)
    for i in range(400):  # of the header's text, in a sound frame
        yield f"text {i}", with_header(mutated(payload[4:begin], rng), body)
    for i in range(300):
        yield f"payload {i}", framed(mutated(payload, rng))
    for i in range(600):
        yield f"header {i}", with_header(forged_header(header, rng), mutated(body, rng) if i % 4 == 0 else body)
    for i in range(100):
        claimed = rng.choice((0, 1, begin, 1 << 31, (1 << 32) - 1, rng.randrange(9**9)))
        yield f"length {i}", with_header(header, body, claimed)
    for i in range(100):
        yield f"frame {i}", forged_frame(content, rng)


def test_artifacts(artifact: tuple[t.Config, bytes], tmp_path: Path) -> None:
    """2,200 mutated artifacts, read and, if that works, loaded as the evaluation does; unharmed ones load as before."""
    cfg, content = artifact
    path, rt = tmp_path / "a.ptz", runtime()
    path.write_bytes(content)
    sound = t.load_artifact(path, cfg, rt, "f" * 64).state_dict()

    def load(data: bytes) -> None:
        """As `main` does for EVAL_ARTIFACT."""
        path.write_bytes(data)
        header, stored, _ = t.read_artifact(path)
        with_fields = t.with_model_fields(cfg, header["config"], str(path))
        if header.get("tokenizer_sha256") == "f" * 64:
            model = t.load_artifact(path, with_fields, rt, "f" * 64)
            assert model.state_dict().keys() == stored.keys()
            if data[8:] == content[8:]:
                assert all(torch.equal(p, sound[n]) for n, p in model.state_dict().items())

    cases = ((name, partial(load, data)) for name, data in artifact_cases(content))
    counts = check(cases, 2000)
    assert counts["refused"] > 1500 and counts["read"] > 0, counts


def test_bombs(artifact: tuple[t.Config, bytes], tmp_path: Path) -> None:
    """Small files that unpack to the most that is allowed, or claim to: refused or read within time and memory."""
    cfg, content = artifact
    header = json.loads(payload_of(content)[4 : 4 + struct.unpack_from("<I", payload_of(content))[0]])
    path, most = tmp_path / "bomb.ptz", t.MAX_PAYLOAD_BYTES

    def file(shape: list[int], bits: int) -> bytes:
        """One tensor of zeros."""
        tensors = [{"name": "a", "shape": shape, "bits": bits}]
        return with_header(header | {"tensors": tensors}, bytes(sum(t.stream_sizes(tuple(shape), bits).values())))

    def load(data: bytes) -> None:
        """Read and load."""
        path.write_bytes(data)
        found = t.read_artifact(path)[0]
        t.load_artifact(path, t.with_model_fields(cfg, found["config"], str(path)), runtime(), "f" * 64)

    side = 1 << 12
    wide = most // side - 64
    files = [file([100_000], 4), file([100_000], 8), file([side, wide], 8), file([side, 2 * wide], 4),
             file([side, wide // 2], 16), framed(bytes(most + 1))]  # fmt: skip
    before = peak_memory()
    for i, data in enumerate(files):
        assert len(data) < 4 << 20
        begun = time.process_time()
        with pytest.raises(ValueError, match=r"bomb\.ptz"):
            load(data)
        assert time.process_time() - begun < SECONDS, i
    assert peak_memory() - before < 12 * most


# ---- shards ----------------------------------------------------------------------------------------------------------
def test_shards(tmp_path: Path) -> None:
    """2,200 mutated shards: refused, or every token that can be read is one of the file's, within the vocabulary."""
    rng, path = random.Random(1), tmp_path / "fineweb_train_000000.bin"
    t.write_shard(path, np.random.default_rng(0).integers(0, 300, 700))
    content = path.read_bytes()

    def mutations() -> Iterator[bytes]:
        """Files, headers alone, forged magic, version and counts, with sizes that fit them or not."""
        for _ in range(1000):
            yield mutated(content, rng)
        for _ in range(600):
            yield mutated(content[:1024], rng) + content[1024:]
        for _ in range(600):
            count = rng.choice((-1, 0, 1, 699, 700, 701, 1 << 30, -(1 << 31), (1 << 31) - 1, rng.randrange(1 << 31)))
            magic, version = rng.choice((t.SHARD_MAGIC,) * 9 + (0,)), rng.choice((1,) * 9 + (2,))
            body = rng.randbytes(max(0, 2 * min(count, 2000) + rng.choice((0, 0, 1, -1, 2))))
            yield struct.pack("<iii", magic, version, count) + bytes(1012) + rng.choice((body, content[1024:], b""))

    def read(data: bytes) -> None:
        """Open, check and read past the end, as a run does."""
        path.write_bytes(data)
        shards = t.TokenShards(str(tmp_path / "fineweb_train_*.bin"), 320)
        shards.check(100)
        tokens = shards.read(shards.total - 5, 10)
        assert len(tokens) == 10 and 0 <= tokens.min() <= tokens.max() < 320
        expected = np.frombuffer(data, "<u2", offset=1024).astype(np.int64)
        assert shards.total == len(expected) and np.array_equal(tokens, np.resize(np.roll(expected, 5), 10))

    cases = ((f"shard {i}", partial(read, data)) for i, data in enumerate(mutations()))
    counts = check(cases, 2000)
    assert counts["refused"] > 1000 and counts["read"] > 100, counts


# ---- checkpoints and weights -----------------------------------------------------------------------------------------
def signed(content: bytes) -> bytes:
    """A file with the right checksum, whatever it holds."""
    return hashlib.sha256(content).digest() + content


@pytest.fixture(scope="module")
def weights() -> bytes:
    """What `save_tensors` stores of a small state, without the checksum."""
    buffer = io.BytesIO()
    state = {"weights": {f"w{i}": torch.randn(8, 4 + i) for i in range(6)}, "step": 5, "grids": {"w0": (4, 0.5, None)}}
    torch.save(state, buffer)
    return buffer.getvalue()


def repacked(content: bytes, rng: random.Random) -> bytes:
    """The zip archive of a file written anew, its pickle mutated, some entries packed or missing."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                data = mutated(data, rng)
            elif rng.random() < 0.05:
                continue
            new.writestr(info.filename, data, zipfile.ZIP_DEFLATED if rng.random() < 0.3 else zipfile.ZIP_STORED)
    return result.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_checkpoints(weights: bytes, tmp_path: Path) -> None:
    """450 mutated files of tensors: 150 with a checksum that does not fit any more, all refused; 300 with one."""
    rng, path = random.Random(2), tmp_path / "x.weights"

    def load(data: bytes, sound: bool) -> None:
        """Read a file; without a sound checksum nothing may be read."""
        path.write_bytes(data)
        found = t.load_tensors(path)
        assert sound and isinstance(found, dict)
        for leaf in torch.utils._pytree.tree_leaves(found):
            assert not isinstance(leaf, torch.Tensor) or leaf.nbytes < 1 << 20

    def cases() -> Iterator[tuple[str, Callable[[], None]]]:
        """Mutated with and without the checksum, and with mutated pickles."""
        for i in range(150):
            data = mutated(signed(weights), rng)
            yield f"file {i}", partial(load, data, data == signed(weights))
        for i in range(150):
            data = signed(mutated(weights, rng))
            yield f"signed {i}", partial(load, data, True)
        for i in range(150):
            data = signed(repacked(weights, rng))
            yield f"repacked {i}", partial(load, data, True)

    counts = check(cases(), 450)
    assert counts["refused"] > 200, counts


class Malicious:
    """Pickles into a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_is_not_run(tmp_path: Path, form: str) -> None:
    """A pickle that would create a file is refused, in every format that torch.load knows."""
    created, path, buffer = tmp_path / "created", tmp_path / "x.weights", io.BytesIO()
    state = {"weights": Malicious(created)}
    if form == "pickle":
        buffer.write(pickle.dumps(state))
    else:
        torch.save(state, buffer, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(signed(buffer.getvalue()))
    with pytest.raises(ValueError, match=r"x\.weights holds no tensors of this script"):
        t.load_tensors(path)
    assert not created.exists()
    if form == "zip":  # the file is a real attack: without weights_only it works
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        assert created.exists()


def test_forged_tensor_sizes(tmp_path: Path) -> None:
    """A tensor that claims more than its storage, by stride 0 or in a packed archive, is refused before it is used."""
    path, buffer = tmp_path / "x.weights", io.BytesIO()
    t.save_tensors(path, {"weights": {"a": torch.zeros(1).expand(1 << 40)}})
    with pytest.raises(ValueError, match=r"x\.weights holds no tensors"):
        t.load_tensors(path)
    torch.save({"weights": {"a": torch.zeros(1 << 25)}}, buffer)
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert len(packed.getvalue()) < 1 << 20
    path.write_bytes(signed(packed.getvalue()))
    with pytest.raises(ValueError, match=r"x\.weights holds no tensors"):
        t.load_tensors(path)
