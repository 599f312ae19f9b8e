"""Data: shard checks, order of reading, byte counts, corpora from text."""

from __future__ import annotations

import inspect
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tools import batch, config, corpus, model_for, runtime, t, write_shard


def shard(path: Path, tokens: int = 100, top: int = 300) -> Path:
    """A sound shard of random tokens."""
    write_shard(path, np.random.default_rng(0).integers(0, top, tokens))
    return path


def tokenizer() -> t.sentencepiece.SentencePieceProcessor:
    """That of the tiny corpus."""
    return t.sentencepiece.SentencePieceProcessor(model_file=str(corpus() / "tokenizer.model"))


def text_of(start: int, count: int) -> str:
    """A part of the text of the tiny corpus, given in tokens."""
    tokens = t.open_shard(corpus() / "fineweb_train_000000.bin")[start : start + count]
    return tokenizer().decode(tokens.astype(int).tolist())


def data_of(folder: Path, *train_shards: np.ndarray, **changes: Any) -> t.Data:
    """Data whose training shards hold these tokens, besides the tiny corpus's validation shard."""
    folder.mkdir(exist_ok=True)
    shutil.copy(corpus() / "fineweb_val_000000.bin", folder)
    for i, tokens in enumerate(train_shards):
        write_shard(folder / f"fineweb_train_{i:06}.bin", tokens)
    return t.Data(config(data_path=folder, **changes), runtime())


# ---- Shards ----------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    """What is written is read, memory-mapped; the header is the challenge's."""
    tokens = t.open_shard(shard(tmp_path / "a.bin"))
    assert isinstance(tokens, np.memmap) and len(tokens) == 100
    assert tokens.tolist() == np.random.default_rng(0).integers(0, 300, 100).tolist()
    header = np.fromfile(tmp_path / "a.bin", dtype="<i4", count=256)
    assert header[:3].tolist() == [20240520, 1, 100] and not header[3:].any()
    assert np.fromfile(tmp_path / "a.bin", dtype="<u2", offset=1024).tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (0, b"\1\2\3\4"),  # magic
        (4, b"\7\0\0\0"),  # version
        (8, b"\xff\0\0\0"),  # 255 tokens
        (8, b"\5\0\0\0"),
        (8, b"\0\0\0\0"),
        (8, b"\xff\xff\xff\xff"),  # -1
    ],
)
def test_damaged_header(tmp_path: Path, offset: int, content: bytes) -> None:
    """Wrong magic, version and sizes are refused with the file's name and what to do."""
    path = shard(tmp_path / "a.bin")
    data = bytearray(path.read_bytes())
    assert data[offset : offset + 4] != content
    data[offset : offset + 4] = content
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        t.open_shard(path)
    assert str(error.value) == f"{path} is damaged, truncated or no token shard: download it again or remove it"


@pytest.mark.parametrize("size", [0, 5, 1000, 1024, 1025, 1223])
def test_cut_shard(tmp_path: Path, size: int) -> None:
    """A shard that was cut anywhere is refused."""
    path = shard(tmp_path / "a.bin")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="truncated or no token shard"):
        t.open_shard(path)


def test_no_shards(tmp_path: Path) -> None:
    """The message says where they were sought and which setting names the place."""
    pattern = f"{tmp_path}/fineweb_train_*.bin"
    with pytest.raises(FileNotFoundError) as error:
        t.TokenShards(pattern, 320, 1)
    assert str(error.value) == f"no shards match {pattern}: set DATA_PATH"


@pytest.mark.parametrize("name", ["fineweb_val_bytes_000000.bin", "fineweb_val_.bin", "fineweb_val_000000_copy.bin"])
def test_file_that_is_not_named_as_a_shard(tmp_path: Path, name: str) -> None:
    """Byte counts beside shards, for example, are not read as tokens: the file is named, sound or not."""
    for good in ("fineweb_val_000000.bin", "fineweb_val_7.bin", "fineweb_train_000000.bin"):
        shard(tmp_path / good)
    assert t.Data(config(data_path=tmp_path), runtime()).val.total == 200
    for size in (100, 0):
        shard(tmp_path / name, tokens=size)
        with pytest.raises(ValueError, match=rf"{name} is no shard by its name: .*move others"):
            t.Data(config(data_path=tmp_path), runtime())


@pytest.mark.parametrize("block", [100, t.CHECKED_TOKENS])
def test_ids_beyond_the_vocabulary(tmp_path: Path, block: int) -> None:
    """At start in the first and last block of each shard, later in every read."""
    one, other, pattern = tmp_path / "fineweb_train_0.bin", tmp_path / "fineweb_train_1.bin", f"{tmp_path}/*.bin"
    tokens = np.zeros(3 * block, dtype=np.uint16)
    tokens[block + 5] = 999
    write_shard(one, tokens)
    write_shard(other, np.zeros(7))
    shards = t.TokenShards(pattern, 320, block)
    with pytest.raises(ValueError, match=r"train_0\.bin.*token id 999 is beyond VOCAB_SIZE=320"):
        shards.read(block, 10)
    with pytest.raises(ValueError, match="token id 999"):
        t.TokenShards(pattern, 320, 3 * block)
    for part in (tokens[: block + 6], tokens[6:], tokens[block + 5 : block + 6]):
        write_shard(other, part)
        with pytest.raises(ValueError, match=r"train_1\.bin.*token id 999"):
            t.TokenShards(pattern, 320, block)


def test_damaged_data_stops_a_run_at_its_start(tmp_path: Path) -> None:
    """Training shards are checked at their ends, the validation shard everywhere."""
    data_of(tmp_path, np.zeros(500))
    with pytest.raises(ValueError, match=r"fineweb_train_000000\.bin.*token id 320"):
        data_of(tmp_path, np.append(np.zeros(500), 320))
    tokens = np.zeros(3 * t.CHECKED_TOKENS)
    tokens[len(tokens) // 2] = 320
    data_of(tmp_path, tokens)
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    with pytest.raises(ValueError, match=r"fineweb_val_000000\.bin.*token id 320"):
        t.Data(config(data_path=tmp_path), runtime())


def test_reading_wraps_over_shards(tmp_path: Path) -> None:
    """Positions run through the shards in order and around."""
    for i in range(3):
        write_shard(tmp_path / f"fineweb_train_{i}.bin", np.arange(10 * i, 10 * i + 10))
    shards = t.TokenShards(f"{tmp_path}/*.bin", 320, 1)
    assert shards.total == 30
    assert shards.read(8, 5).tolist() == [8, 9, 10, 11, 12] and shards.read(8, 5).dtype == torch.int64
    assert shards.read(27, 8).tolist() == [27, 28, 29, 0, 1, 2, 3, 4]
    assert shards.read(60 + 1, 65).tolist() == [(1 + i) % 30 for i in range(65)]


@pytest.mark.parametrize("tokens", [20, 32])
def test_short_validation_split(tmp_path: Path, tokens: int) -> None:
    """Less than one window is an error that names both lengths; one window is enough."""
    for name in ("fineweb_train_000000.bin", "fineweb_val_000000.bin"):
        shard(tmp_path / name, tokens=tokens)
    with pytest.raises(ValueError, match=rf"{tokens} validation tokens are less than TRAIN_SEQ_LEN \+ 1"):
        t.Data(config(data_path=tmp_path), runtime())
    shard(tmp_path / "fineweb_val_000000.bin", tokens=33)
    assert t.Data(config(data_path=tmp_path), runtime()).num_val_targets == 32


def test_identity_of_the_data(tmp_path: Path) -> None:
    """It is the same in another folder, and another one once a token changes that was checked at the start: anywhere in
    the validation split, at the ends of a training shard; or the tokenizer."""
    tokens = np.arange(3 * t.CHECKED_TOKENS) % 300
    same, moved = data_of(tmp_path / "a", tokens), data_of(tmp_path / "b", tokens)
    assert same.identity == moved.identity and same.identity.keys() == {"data_sha256", "tokenizer_sha256"}
    assert (
        same.identity["tokenizer_sha256"] == t.hashlib.sha256((corpus() / "tokenizer.model").read_bytes()).hexdigest()
    )

    def changed(split: str, at: int) -> bool:
        """Whether another token there makes other data."""
        path = tmp_path / "b" / f"fineweb_{split}_000000.bin"
        content = path.read_bytes()
        ids = t.open_shard(path).copy()
        ids[at] ^= 1
        write_shard(path, ids)
        found = t.Data(config(data_path=tmp_path / "b"), runtime()).identity
        path.write_bytes(content)
        assert found["tokenizer_sha256"] == same.tokenizer_sha256
        return found != same.identity

    assert all(changed("val", at) for at in (0, moved.val.total // 2, -1))
    ends = (0, t.CHECKED_TOKENS - 1, 2 * t.CHECKED_TOKENS, -1)
    assert all(changed("train", at) for at in ends)
    assert not any(changed("train", at) for at in (t.CHECKED_TOKENS, 2 * t.CHECKED_TOKENS - 1))
    t.build_corpus([text_of(0, 5000)], tmp_path / "other", 320)
    other = t.Data(config(data_path=tmp_path / "a", tokenizer_path=tmp_path / "other/tokenizer.model"), runtime())
    assert other.identity["data_sha256"] == same.identity["data_sha256"] and other.identity != same.identity


# ---- Order of reading ------------------------------------------------------------------------------------------------


class Positions:
    """Stands in for shards: what is read are the positions."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.shards = [np.arange(total)]
        self.sha256 = ""

    def read(self, start: int, count: int) -> torch.Tensor:
        """Positions, not wrapped."""
        return torch.arange(start, start + count)


def order_of(windows: int, monkeypatch: pytest.MonkeyPatch, order: str = "spread") -> t.Data:
    """Data of so many windows, which read positions."""
    monkeypatch.setattr(t, "TokenShards", lambda *_, **__: Positions(32 * windows + 1))
    data = t.Data(config(sequence_order=order), runtime())
    monkeypatch.undo()
    assert data.num_windows == windows
    return data


COUNTS = [*range(1, 131), 210, 256, 997, 1000, 1024, 2310, 4096, 30030, 65536, 99991]


@pytest.mark.parametrize("order", ["spread", "file"])
def test_every_window_once_before_any_twice(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For many numbers of windows, over two rounds; sequences overlap by their last token alone."""
    for windows in COUNTS[:-3]:
        data = order_of(windows, monkeypatch, order)
        sequences = data.train_sequences(range(2 * windows))
        assert sequences.shape == (2 * windows, 33)
        starts = sequences[:, 0].tolist()
        assert sorted(starts[:windows]) == list(range(0, 32 * windows, 32))
        assert starts[windows:] == starts[:windows] and sequences[:, -1].tolist() == [x + 32 for x in starts]
        assert order == "spread" or starts[:windows] == sorted(starts[:windows])


def test_stride_is_coprime_and_near_the_golden_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next coprime number from 0.618 of the windows on; 1 in file order."""
    for windows in COUNTS:
        data = order_of(windows, monkeypatch)
        assert math.gcd(data.stride, windows) == 1
        nearest = max(1, round(0.618 * windows))
        assert data.stride >= nearest
        assert all(math.gcd(between, windows) > 1 for between in range(nearest, data.stride))
        assert windows < 100 or abs(data.stride / windows - 0.618) < 0.05
        assert [int(x) // 32 for x in data.train_sequences([0, 1, 2])[:, 0]] == [
            n * data.stride % windows for n in range(3)
        ]
        assert order_of(windows, monkeypatch, "file").stride == 1


@pytest.mark.parametrize("windows", [997, 1000, 4096, 30030, 99991])
def test_each_batch_covers_all_data(windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of it is further from a sequence of a batch than a few times their mean distance."""
    data = order_of(windows, monkeypatch)
    for size in (8, 24, 64):
        for first in (0, size, 1000 * size):
            places = sorted(data.train_sequences(range(first, first + size))[:, 0].tolist())
            gaps = np.diff([*places, places[0] + 32 * windows])
            assert gaps.max() < 3.5 * 32 * windows / size


def batches(data: t.Data, ranks: int, steps: int, **changes: Any) -> list[list[list[int]]]:
    """For each step the sequences of all ranks."""
    cfg, found = config(**changes), []
    trainers = [t.Trainer(model_for(cfg), data, cfg, runtime(rank, ranks)) for rank in range(ranks)]
    for step in range(steps):
        for trainer in trainers:
            trainer.step = step
        parts = [batch(trainer) for trainer in trainers]
        for trainer, part in zip(trainers, parts, strict=True):
            assert [len(micro) for micro in part] == [trainer.micro_seqs] * trainer.micro_steps
        found.append(torch.cat([micro for part in parts for micro in part]).tolist())
    return found


@pytest.mark.parametrize("order", ["spread", "file"])
def test_ranks_read_the_same_sequences(order: str) -> None:
    """1, 2 and 4 ranks together, whatever the micro-batches: those of the step, in the order of the run."""
    data = t.Data(config(sequence_order=order), runtime())
    expected = [
        [data.train.read(n * data.stride % data.num_windows * 32, 33).tolist() for n in range(8 * step, 8 * step + 8)]
        for step in range(3)
    ]
    for ranks, micro in ((1, 0), (1, 64), (2, 0), (2, 64), (4, 32)):
        assert batches(data, ranks, 3, sequence_order=order, micro_batch_tokens=micro) == expected
    if order == "file":
        flat = torch.tensor(expected).flatten(0, 1)
        assert flat[:, :-1].flatten().tolist() == data.train.read(0, 768).tolist()
        assert flat[:, 1:].flatten().tolist() == data.train.read(1, 768).tolist()


def test_sequences_run_over_shards(tmp_path: Path) -> None:
    """All shards together are one sequence of tokens: `windows = (tokens - 1) // TRAIN_SEQ_LEN`."""
    tokens = np.arange(300)
    data = data_of(tmp_path, tokens[:50], tokens[50:51], tokens[51:], sequence_order="file")
    assert data.num_windows == 9 and data.train.total == 300
    assert data.train_sequences(range(9))[:, 0].tolist() == list(range(0, 288, 32))
    assert data.train_sequences([1]).tolist() == [list(range(32, 65))]


@pytest.mark.parametrize("order", ["spread", "file"])
@pytest.mark.parametrize("tokens", [1, 20, 33, 64, 65, 100, 200])
def test_corpus_smaller_than_a_batch(tmp_path: Path, tokens: int, order: str) -> None:
    """It repeats; one smaller than a window wraps around its end. Training goes on as usual."""
    ids = np.arange(tokens) + 5
    data = data_of(tmp_path, ids, sequence_order=order)
    windows = max(1, (tokens - 1) // 32)
    assert data.num_windows == windows and 1 <= data.stride <= windows
    found = [sequence for step in batches(data, 2, 2, sequence_order=order) for sequence in step]
    assert {sequence[0] - 5 for sequence in found} == set(range(0, 32 * windows, 32))
    assert all(x == [(x[0] - 5 + i) % tokens + 5 for i in range(33)] for x in found)
    if order == "file":
        assert [sequence[0] - 5 for sequence in found] == [n % windows * 32 for n in range(16)]
    cfg = config(sequence_order=order, num_layers=1)
    trainer = t.Trainer(model_for(cfg), data, cfg, runtime())
    assert math.isfinite(trainer.train_step(1.0)[0])
    trainer.calibrate()
    assert all(cost.isfinite().all() for cost in trainer.costs.values())


# ---- Bytes -----------------------------------------------------------------------------------------------------------


def counted(ids: torch.Tensor) -> list[int]:
    """Bytes of each token but the first, by the tables of the tiny corpus's tokenizer."""
    sizes, boundary = t.token_bytes(tokenizer(), torch.device("cpu"))
    assert sizes.shape == (2, 320) and boundary.shape == (320,)
    return sizes[boundary[ids[:-1]], ids[1:]].tolist()


def test_byte_counts_equal_the_text() -> None:
    """Bytes over a document are the UTF-8 length of what the tokenizer decodes, emojis and fallback bytes included."""
    sp = tokenizer()
    for text in ("hello world", "caf\u00e9 \U0001f600 \u4e16\u754c 123  x", "a\tb\nc", "\U00010348", " leading"):
        ids = torch.tensor([sp.bos_id(), *sp.encode(text)])
        assert sum(counted(ids)) == len(sp.decode(ids.tolist()).encode())
    val = t.TokenShards(f"{corpus()}/fineweb_val_*.bin", 320, 1)
    ids = val.read(0, val.total)
    assert sum(counted(ids)) == len(sp.decode(ids.tolist()).encode())


def test_boundaries_count_nothing() -> None:
    """Control and unknown tokens are 0 bytes, and a piece after one has no leading space."""
    sp = tokenizer()
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    spaced = next(i for i, piece in enumerate(pieces) if piece.startswith("\u2581") and len(piece) == 2)
    size = len(pieces[spaced][1:].encode())
    for previous, expected in ((0, size), (1, size), (2, size), (3, size), (300, size + 1)):
        assert counted(torch.tensor([previous, spaced])) == [expected]
    assert all(counted(torch.tensor([300, i])) == [0] for i in range(4))
    one_byte = next(i for i in range(sp.vocab_size()) if sp.is_byte(i))
    assert counted(torch.tensor([300, one_byte, one_byte])) == [1, 1]


def test_tokenizer_errors(tmp_path: Path) -> None:
    """Missing, foreign, other size: the path, and what to do instead."""
    (tmp_path / "foreign.model").write_bytes(b"not a model at all")
    for name, part in (("none.model", "No such file"), ("foreign.model", ""), (".", "Is a directory")):
        with pytest.raises(ValueError) as error:
            t.Data(config(tokenizer_path=tmp_path / name), runtime())
        assert str(error.value).startswith(f"TOKENIZER_PATH={tmp_path / name}: ") and part in str(error.value)
        assert str(error.value).endswith("; get it, or set DEMO=1 or TEXT_FILES")
    with pytest.raises(ValueError, match="320 pieces, VOCAB_SIZE=1024"):
        t.Data(config(vocab_size=1024), runtime())


def test_tokenizer_without_a_space_is_refused(tmp_path: Path) -> None:
    """It spells a space with the 3 fallback bytes of its sign, which would count as 3 bytes of text."""
    letters = np.random.default_rng(0).choice(list("abcdefghij"), 60_000)
    t.build_corpus(["".join(letters)], tmp_path / "corpus", 320)
    sp = t.sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "corpus" / "tokenizer.model"))
    assert sum(sp.is_byte(i) for i in sp.encode("a b")) == 3
    with pytest.raises(ValueError, match=r"tokenizer\.model has no piece for a space: 'a b' counts 5 bytes\. Train"):
        t.Data(config(data_path=tmp_path / "corpus", tokenizer_path=tmp_path / "corpus" / "tokenizer.model"), runtime())


def test_tokenizer_that_puts_a_space_in_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the challenge's does: at a document's start it counts nothing, and the tokenizer is accepted."""
    options = t.TOKENIZER_OPTIONS.replace("add_dummy_prefix=false", "add_dummy_prefix=true")
    monkeypatch.setattr(t, "TOKENIZER_OPTIONS", options)
    t.build_corpus([text_of(0, 5000)], tmp_path, 320)
    sp = t.sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert sp.id_to_piece(sp.encode("a b")[0]).startswith("\u2581")
    t.Data(config(data_path=tmp_path, tokenizer_path=tmp_path / "tokenizer.model"), runtime())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_unknown_validation_tokens_are_said(tmp_path: Path, count: int) -> None:
    """They count no bytes of the text behind them, so the score is too high. In training text they do no harm."""
    data_of(tmp_path, np.array([3, 5] * 40))
    tokens = np.arange(100) + 4
    tokens[10 : 10 + count] = tokenizer().unk_id()
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    rt = runtime()
    t.Data(config(data_path=tmp_path), rt)
    warnings = [line for line in rt.lines if line.startswith("warning: ")]
    said = f"warning: {count} validation tokens are unknown ones, which count 0 bytes: bpb is too high"
    assert warnings == [said] * (count > 0)


# ---- Corpora from text -----------------------------------------------------------------------------------------------


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def text_config(**changes: Any) -> t.Config:
    """Of a run that builds its corpus."""
    return config(data_path=None, tokenizer_path=None, **changes)


def decoded(folder: str | Path, split: str) -> list[str]:
    """The documents of a split."""
    sp = t.sentencepiece.SentencePieceProcessor(model_file=str(Path(folder, "tokenizer.model")))
    ids = t.open_shard(Path(folder, f"fineweb_{split}_000000.bin")).astype(int)
    assert ids[0] == sp.bos_id() == 1
    return [sp.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == 1))[1:]]


def test_corpus_is_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TEXT_FILES builds once; changed text builds anew; bad text and no text are errors."""
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    for i in range(24):
        Path("sub" if i % 2 else ".", f"d{i}.txt").write_text(text_of(300 * i, 300), encoding="utf-8")
    rt, cfg = runtime(), text_config(text_files="**/*.txt")
    first = t.corpus_paths(cfg, rt)
    assert first[1] == f"{first[0]}/tokenizer.model" and Path(first[0]).parent == Path("logs/cache")
    assert sorted(contents(first[0])) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "tokenizer.model"]
    before = contents(first[0])
    assert t.corpus_paths(cfg, rt) == first and sum("building" in line for line in rt.lines) == 1
    data = t.Data(cfg, rt)
    assert data.train.paths == [Path(first[0], "fineweb_train_000000.bin")] and len(rt.lines) == 3
    Path("copies").mkdir()
    for i in range(24):
        shutil.copy(next(Path().glob(f"**/d{i}.txt")), Path("copies", f"{i:02}"))
    assert t.corpus_paths(text_config(text_files="copies/*"), rt) != first  # another order of the same texts
    Path("d0.txt").write_text(text_of(8000, 300), encoding="utf-8")
    second = t.corpus_paths(cfg, rt)
    assert second != first and contents(first[0]) == before
    Path("d0.txt").write_text(text_of(8000, 300), encoding="utf-8-sig")  # a mark in front, as some editors write it
    assert t.corpus_paths(cfg, rt) == second
    Path("d0.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"d0\.txt is not UTF-8"):
        t.corpus_paths(cfg, rt)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        t.corpus_paths(text_config(text_files="*.nothing"), rt)
    assert not list(Path("logs/cache").glob("building-*")) and len(list(Path("logs/cache").iterdir())) == 3


def test_other_vocabulary_is_another_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the paths of a run without TEXT_FILES and DEMO are those that it was given."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(text_of(0, 6000), encoding="utf-8")
    folders = {t.corpus_paths(text_config(text_files="a.txt", vocab_size=size), runtime())[0] for size in (320, 340)}
    assert len(folders) == 2
    cfg = config()
    assert t.corpus_paths(cfg, runtime()) == (cfg.data_path, cfg.tokenizer_path)


@pytest.mark.parametrize("tokens", [2500, 10**6])
def test_one_text_file_is_enough(tmp_path: Path, tokens: int) -> None:
    """A single text, small or large, is cut into documents of which some are held out: nothing is lost. The same text
    gives the same bytes."""
    text = text_of(0, tokens)
    t.build_corpus([text], tmp_path / "a", 320)
    t.build_corpus([text], tmp_path / "again" / "a", 320)
    assert contents(tmp_path / "a") == contents(tmp_path / "again" / "a")
    train, val = decoded(tmp_path / "a", "train"), decoded(tmp_path / "a", "val")
    assert len(val) == max(1, (len(train) + len(val)) // 20) and len(train) > 10
    assert 0.02 < len("".join(val)) / len("".join(train + val)) < 0.12
    folded = "".join(text.split())
    assert sorted("".join("".join(train + val).split())) == sorted(folded)
    assert all("".join(document.split()) in folded for document in train + val)


def test_much_text_holds_out_a_fixed_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HELD_OUT_CHARS in whole documents, where that is less than a twentieth."""
    monkeypatch.setattr(t, "HELD_OUT_CHARS", 1600)
    monkeypatch.setattr(t, "DOCUMENT_CHARS", 500)
    t.build_corpus([text_of(0, 10**6)], tmp_path / "a", 320)
    train, val = decoded(tmp_path / "a", "train"), decoded(tmp_path / "a", "val")
    assert len(val) == 3 < len(train) // 20 and max(map(len, train + val)) <= 500


@pytest.mark.parametrize("text", ["", "one line", " \n" * 200, "x" * 300])
def test_too_little_text(tmp_path: Path, text: str) -> None:
    """A readable refusal, and nothing is left behind."""
    with pytest.raises(ValueError, match="no tokenizer of VOCAB_SIZE=320 from this text: give more of it"):
        t.build_corpus([text], tmp_path / "cache" / "corpus", 320)
    assert not list(tmp_path.rglob("*corpus*"))


def test_tokenizer_is_that_of_its_corpus(tmp_path: Path) -> None:
    """Of the same text in another folder it differs in the name of its unknown piece alone: so do the sha256 by which
    checkpoints and artifacts know their data, while tokens and bytes are the same."""
    for name in ("a", "b"):
        t.build_corpus([text_of(0, 5000)], tmp_path / name, 320)
    one, other = (contents(tmp_path / name) for name in ("a", "b"))
    assert [name for name in one if one[name] != other[name]] == ["tokenizer.model"]
    sps = [t.sentencepiece.SentencePieceProcessor(model_proto=each["tokenizer.model"]) for each in (one, other)]
    pieces = [[sp.id_to_piece(i) for i in range(320)] for sp in sps]
    unknown = sps[0].unk_id()
    assert [i for i in range(320) if pieces[0][i] != pieces[1][i]] == [unknown]
    assert [each[unknown] for each in pieces] == ["<unk a>", "<unk b>"]


def test_repeats_are_dropped_before_holding_out(tmp_path: Path) -> None:
    """What repeats would stand on both sides. The corpus is that of the texts without repeats; so for paragraphs, which
    blank lines divide, within one text."""
    texts = [text_of(400 * i, 400) for i in range(20)]
    paragraphs = ["\n\n".join(texts + texts[3:7]), "\n\n".join(texts[::-1])]
    for name, given in (("once", texts), ("often", texts + texts[::-1] + texts[:3]), ("within", paragraphs)):
        t.build_corpus(given, tmp_path / name / "corpus", 320)
    assert contents(tmp_path / "once/corpus") == contents(tmp_path / "often/corpus")
    assert contents(tmp_path / "once/corpus") == contents(tmp_path / "within/corpus")
    train = "".join("".join(decoded(tmp_path / "often/corpus", "train")).split())
    for document in decoded(tmp_path / "often/corpus", "val"):
        part = "".join(document.split())
        assert all(part[i : i + 100] not in train for i in range(0, len(part) - 100, 50))


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_corpus_cut_off_is_built_again(tmp_path: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure at any of its files leaves no half file and no corpus that counts as whole; the next run builds it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(text_of(0, 5000))
    write, calls = t.write_atomically, []

    def fail(path: Path, content: bytes) -> None:
        """The disk is full at one of the calls."""
        calls.append(path)
        if len(calls) == fails_at + 1:
            raise OSError("No space left on device")
        write(path, content)

    cfg, rt = text_config(text_files="a.txt"), runtime()
    with monkeypatch.context() as patch:
        patch.setattr(t, "write_atomically", fail)
        with pytest.raises(OSError, match="No space left"):
            t.corpus_paths(cfg, rt)
    folder = next((tmp_path / "logs" / "cache").iterdir())
    assert len(calls) == fails_at + 1 and len(contents(folder)) == fails_at
    assert t.corpus_paths(cfg, rt) == (str(Path("logs/cache", folder.name)), str(calls[-1].parent / "tokenizer.model"))
    assert len(contents(folder)) == 3 and sum("building" in line for line in rt.lines) == 2


def test_another_run_was_faster(tmp_path: Path) -> None:
    """Two runs that build a corpus at once write the same files, each whole at any time."""
    t.build_corpus([text_of(0, 5000)], tmp_path / "corpus", 320)
    theirs = contents(tmp_path / "corpus")
    t.build_corpus([text_of(0, 5000)], tmp_path / "corpus", 320)
    assert contents(tmp_path / "corpus") == theirs and len(theirs) == 3


def test_corpus_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made of what is installed, without a download; its training reads no sequence twice, and none of those that
    weigh errors and choose the weights."""
    monkeypatch.chdir(tmp_path)
    given: list[str] = []
    build = t.build_corpus

    def noted(texts: list[str], folder: Path, vocab_size: int) -> None:
        """Note the texts, and build."""
        given.extend(texts)
        build(texts, folder, vocab_size)

    monkeypatch.setattr(t, "build_corpus", noted)
    cfg, rt = t.load_config({"DEMO": "1"})[0], runtime()
    data = t.Data(cfg, rt)
    assert 1_500_000 < len("".join(set(given))) < 6_000_000
    assert {inspect.getdoc(np.sum), inspect.getdoc(torch.matmul), t.topics["assert"]} <= set(given)
    read = cfg.iterations * cfg.train_batch_tokens + cfg.calibration_tokens
    assert data.num_windows * cfg.train_seq_len >= read == 548_864 and data.num_val_targets > 20_000
    t.Data(cfg, rt)
    assert sum("building" in line for line in rt.lines) == 1


def test_corpus_of_the_demo_is_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other versions of what is installed have another text, and so another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t, "topics", dict(list(t.topics.items())[:30]))
    cfg, rt = text_config(demo=1, vocab_size=512), runtime()
    folder, path = t.corpus_paths(cfg, rt)
    assert Path(folder).parent == Path("logs/cache") and Path(path) == Path(folder, "tokenizer.model")
    assert t.corpus_paths(cfg, rt)[0] == folder and sum("building" in line for line in rt.lines) == 1
    monkeypatch.setattr(np, "another_function", text_of, raising=False)
    assert t.corpus_paths(cfg, rt)[0] != folder
