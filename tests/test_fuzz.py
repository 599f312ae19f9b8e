"""Files from elsewhere: thousands of mutated artifacts, shards, checkpoints and weights, all seeded. Each is read
correctly or refused with a ValueError, in bounded time and memory, and none runs code."""

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
from tools import config, load_artifact, model_for, plan_for, runtime, t, write_shard

SECONDS, MEMORY = 2.0, 1 << 30  # what one file may take; the memory of them all together


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
        except ValueError as error:
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
def artifact() -> tuple[t.Config, bytes, dict[str, t.Stored]]:
    """A sound artifact of a tiny model, and what is in it."""
    cfg = config(num_layers=1)
    stored = t.quantize(model_for(cfg).state_dict(), plan_for(cfg), cfg)
    return cfg, t.encode_artifact(stored, cfg, "f" * 64), stored


def payload_of(content: bytes) -> bytes:
    """The decompressed part of an artifact."""
    return zstandard.ZstdDecompressor().decompress(content[len(t.ARTIFACT_MAGIC) :])


def framed(payload: bytes) -> bytes:
    """An artifact file around a payload."""
    return t.ARTIFACT_MAGIC + zstandard.ZstdCompressor(level=1, write_checksum=True).compress(payload)


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
    """A header with one to three odd values, or names of tensors dropped, doubled, replaced or swapped."""
    forged = json.loads(json.dumps(header))
    for _ in range(rng.choice((1, 1, 2, 3))):
        where, coded = rng.random(), forged.get("coded")
        if where < 0.15:
            forged[rng.choice(("coded", "config", "tokenizer_sha256", "more"))] = rng.choice(ODD_VALUES)
        elif where < 0.65 and isinstance(forged.get("config"), dict):
            forged["config"][rng.choice(list(header["config"]))] = rng.choice(ODD_VALUES)
        elif isinstance(coded, list) and coded:
            i = rng.randrange(len(coded))
            j = rng.randrange(len(coded))
            odd = rng.choice((*ODD_VALUES, "smear_gate", "bigram.scale", "embed.weight", "blocks.0.attn.q_gain"))
            coded[i : i + 1] = rng.choice(([], [coded[i]] * 2, [odd], [coded[j]]))
    return forged


def fitting(header: dict[str, Any], body: bytes, shapes: dict[str, torch.Size], rng: random.Random) -> bytes:
    """A file whose streams have the length that the header's names ask for, as far as these are names of tensors."""
    names = [name for name in header["coded"] if isinstance(name, str) and name in shapes]
    size = sum(shapes[name].numel() + 2 * shapes[name][:1].numel() for name in names)
    size += sum(2 * shape.numel() for name, shape in shapes.items() if name not in names)
    return with_header(header, (body + rng.randbytes(max(0, size - len(body))))[:size])


def forged_frame(content: bytes, rng: random.Random) -> bytes:
    """A frame whose header claims another size of its content: random, huge, or none."""
    payload = payload_of(content)
    if rng.random() < 0.3:
        compressor = zstandard.ZstdCompressor(level=1, write_content_size=False)
        return t.ARTIFACT_MAGIC + compressor.compress(payload)
    frame = bytearray(content[8:])
    assert frame[4] >> 6 in (1, 2), "the content size has 2 or 4 bytes"
    begin = 5 + (0 if frame[4] & 32 else 1)
    size = 2 if frame[4] >> 6 == 1 else 4
    claimed = rng.choice((0, 1, len(payload) - 1, (1 << 30) - 1, 1 << 30, rng.randrange(1 << 32), (1 << 32) - 1))
    frame[begin : begin + size] = claimed.to_bytes(8, "little")[:size]
    return content[:8] + bytes(frame)


def artifact_cases(content: bytes, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, bytes]]:
    """(name, mutated file), 2,000 of them: files, payloads in a sound frame, headers, claimed sizes."""
    rng, payload = random.Random(0), payload_of(content)
    begin = 4 + struct.unpack_from("<I", payload)[0]
    header, body = json.loads(payload[4:begin]), payload[begin:]
    for i in range(600):
        yield f"file {i}", mutated(content, rng)
    for i in range(300):  # of the header's text, in a sound frame
        yield f"text {i}", with_header(mutated(payload[4:begin], rng), body)
    for i in range(200):
        yield f"payload {i}", framed(mutated(payload, rng))
    for i in range(500):
        yield f"header {i}", with_header(forged_header(header, rng), mutated(body, rng) if i % 4 == 0 else body)
    for i in range(200):  # only the names of the tensors are forged, and the rest fits them
        names = list(header["coded"])
        for _ in range(rng.choice((1, 2, 5))):
            names.insert(rng.randrange(len(names) + 1), rng.choice(list(shapes)))
            del names[rng.randrange(len(names))]
        yield f"names {i}", fitting(header | {"coded": names}, body, shapes, rng)
    for i in range(100):
        claimed = rng.choice((0, 1, begin, 1 << 31, (1 << 32) - 1, rng.randrange(9**9)))
        yield f"length {i}", with_header(header, body, claimed)
    for i in range(100):
        yield f"frame {i}", forged_frame(content, rng)


def test_artifacts(artifact: tuple[t.Config, bytes, dict[str, t.Stored]]) -> None:
    """2,000 mutated artifacts, read and, if that works, loaded as the evaluation does; unharmed ones load as before."""
    cfg, content, sound = artifact
    path, rt = Path("a.ptz"), runtime()
    shapes = {name: tensor.values.shape for name, tensor in sound.items()}

    def load(data: bytes) -> None:
        """As every rank does with what rank 0 read."""
        rt.from_rank_0 = lambda make: data  # type: ignore[method-assign]
        try:
            model = load_artifact(path, cfg, rt)
        except ValueError as error:
            assert str(error).startswith(f"{path} "), error
            raise
        assert not t.config_problems(model.cfg)
        if data[8:] == content[8:]:
            assert all(torch.equal(p, sound[name].dequantize()) for name, p in model.named_parameters())

    load(content)  # also loads what PyTorch loads once, for seconds
    cases = ((name, partial(load, data)) for name, data in artifact_cases(content, shapes))
    counts = check(cases, 2000)
    assert counts["refused"] > 1300 and counts["read"] > 20, counts


# ---- shards ----------------------------------------------------------------------------------------------------------
def test_shards(tmp_path: Path) -> None:
    """2,000 mutated shards: refused, or every token that can be read is one of the file's, within the vocabulary."""
    rng, path = random.Random(1), tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.random.default_rng(0).integers(0, 300, 700))
    content = path.read_bytes()

    def mutations() -> Iterator[bytes]:
        """Files, headers alone, forged magic, version and counts, with sizes that fit them or not."""
        for _ in range(900):
            yield mutated(content, rng)
        for _ in range(550):
            yield mutated(content[:1024], rng) + content[1024:]
        for _ in range(550):
            count = rng.choice((-1, 0, 1, 699, 700, 701, 1 << 30, -(1 << 31), (1 << 31) - 1, rng.randrange(1 << 31)))
            magic, version = rng.choice((t.SHARD_MAGIC,) * 9 + (0,)), rng.choice((t.SHARD_VERSION,) * 9 + (2,))
            body = rng.randbytes(max(0, 2 * min(count, 2000) + rng.choice((0, 0, 1, -1, 2))))
            yield struct.pack("<iii", magic, version, count) + bytes(1012) + rng.choice((body, content[1024:], b""))

    def read(data: bytes) -> None:
        """Open, check and read past the end, as a run does."""
        path.write_bytes(data)
        shards = t.TokenShards(str(tmp_path / "fineweb_train_*.bin"), 320, 100)
        tokens = shards.read(shards.total - 5, 10).numpy()
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
        assert isinstance(t.load_tensors(path, "weights"), dict) and sound

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
    with pytest.raises(ValueError, match=r"x\.weights is of another version of the script, or holds something else"):
        t.load_tensors(path)
    assert not created.exists()
    if form == "zip":  # the file is a real attack: without weights_only it works
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        assert created.exists()


def test_other_content(tmp_path: Path) -> None:
    """A sound checksum around something else: nothing, text, a tensor, a list, a state without what is needed."""
    path = tmp_path / "x.weights"
    for state in (torch.zeros(3), [1, 2], {}, {"config": {}}, None):
        t.save_tensors(path, state)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"x\.weights is of another version of the script"):
            t.load_tensors(path, "weights")
    for content in (b"", b"x" * 100, b"PK\3\4"):
        path.write_bytes(signed(content))
        with pytest.raises(ValueError, match=r"x\.weights is of another version of the script"):
            t.load_tensors(path, "weights")
    for content in (b"", b"x" * 31, b"x" * 32, b"x" * 1000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.weights is truncated, damaged or not this script's"):
            t.load_tensors(path)
    with pytest.raises(FileNotFoundError, match=r"none\.weights"):
        t.load_tensors(tmp_path / "none.weights")
