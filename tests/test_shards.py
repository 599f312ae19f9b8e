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
from tools import config, corpus, model_for, runtime, t


def shard(path: Path, tokens: int = 100, top: int = 300) -> Path:
    """A sound shard of random tokens."""
    t.write_shard(path, np.random.default_rng(0).integers(0, top, tokens))
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
        t.write_shard(folder / f"fineweb_train_{i:06}.bin", tokens)
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
    ("offset", "content", "part"),
    [
        (0, b"\1\2\3\4", "magic 67305985"),
        (4, b"\7\0\0\0", "version 7"),
        (8, b"\xff\0\0\0", "1224 bytes where 255 tokens need 1534"),
        (8, b"\5\0\0\0", "1224 bytes where 5 tokens need 1034"),
        (8, b"\0\0\0\0", "0 tokens"),
        (8, b"\xff\xff\xff\xff", "-1 tokens"),
    ],
)
def test_damaged_header(tmp_path: Path, offset: int, content: bytes, part: str) -> None:
    """Wrong magic, version and sizes are named with the file."""
    path = shard(tmp_path / "a.bin")
    data = bytearray(path.read_bytes())
    data[offset : offset + 4] = content
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged, truncated or no token shard") as error:
        t.open_shard(path)
    assert str(path) in str(error.value) and part in str(error.value)


@pytest.mark.parametrize("size", [0, 5, 1000, 1024, 1025, 1223])
def test_cut_shard(tmp_path: Path, size: int) -> None:
    """A shard that was cut anywhere is refused."""
    path = shard(tmp_path / "a.bin")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="truncated or no token shard"):
        t.open_shard(path)


def test_no_shards(tmp_path: Path) -> None:
    """The message says where to get data and that DEMO=1 needs none."""
    with pytest.raises(FileNotFoundError, match="DEMO=1"):
        t.TokenShards(f"{tmp_path}/fineweb_train_*.bin", 320, 1)


@pytest.mark.parametrize("block", [100, t.CHECKED_TOKENS])
def test_ids_beyond_the_vocabulary(tmp_path: Path, block: int) -> None:
    """At start in the first and last block of each shard, later in every read."""
    tokens = np.zeros(3 * block, dtype=np.uint16)
    tokens[block + 5] = 999
    t.write_shard(tmp_path / "a.bin", tokens)
    t.write_shard(tmp_path / "b.bin", np.zeros(7))
    shards = t.TokenShards(f"{tmp_path}/?.bin", 320, block)
    with pytest.raises(ValueError, match=r"a\.bin.*token id 999 is beyond VOCAB_SIZE=320"):
        shards.read(block, 10)
    with pytest.raises(ValueError, match="token id 999"):
        t.TokenShards(f"{tmp_path}/?.bin", 320, 3 * block)
    for part in (tokens[: block + 6], tokens[6:], tokens[block + 5 : block + 6]):
        t.write_shard(tmp_path / "b.bin", part)
        with pytest.raises(ValueError, match=r"b\.bin.*token id 999"):
            t.TokenShards(f"{tmp_path}/?.bin", 320, block)


def test_damaged_data_stops_a_run_at_its_start(tmp_path: Path) -> None:
    """Training shards are checked at their ends, the validation shard everywhere."""
    data_of(tmp_path, np.zeros(500))
    with pytest.raises(ValueError, match=r"fineweb_train_000000\.bin.*token id 320"):
        data_of(tmp_path, np.append(np.zeros(500), 320))
    tokens = np.zeros(3 * t.CHECKED_TOKENS)
    tokens[len(tokens) // 2] = 320
    data_of(tmp_path, tokens)
    t.write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    with pytest.raises(ValueError, match=r"fineweb_val_000000\.bin.*token id 320"):
        t.Data(config(data_path=tmp_path), runtime())


def test_reading_wraps_over_shards(tmp_path: Path) -> None:
    """Positions run through the shards in order and around."""
    for i in range(3):
        t.write_shard(tmp_path / f"s{i}.bin", np.arange(10 * i, 10 * i + 10))
    shards = t.TokenShards(f"{tmp_path}/s*.bin", 320, 1)
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


# ---- Order of reading ------------------------------------------------------------------------------------------------


class Positions:
    """Stands in for shards: what is read are the positions."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.shards = [range(total)]

    def read(self, start: int, count: int) -> torch.Tensor:
        """Positions, not wrapped."""
        return torch.arange(start, start + count)


def order_of(windows: int, monkeypatch: pytest.MonkeyPatch) -> t.Data:
    """Data of so many windows, which read positions."""
    monkeypatch.setattr(t, "TokenShards", lambda *_, **__: Positions(32 * windows + 1))
    monkeypatch.setattr(t, "token_bytes", lambda *_: (torch.zeros(2, 320), torch.zeros(320)))
    data = t.Data(config(), runtime())
    monkeypatch.undo()
    assert data.num_windows == windows
    return data


COUNTS = [*range(1, 131), 210, 256, 997, 1000, 1024, 2310, 4096, 30030, 65536, 99991]


def test_every_window_once_before_any_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """For many numbers of windows, over two rounds, in both orders; sequences overlap by their last token alone."""
    for windows in COUNTS[:-3]:
        data = order_of(windows, monkeypatch)
        for spread in (False, True):
            sequences = data.train_sequences(range(2 * windows), data.stride if spread else 1)
            assert sequences.shape == (2 * windows, 33)
            starts = sequences[:, 0].tolist()
            assert sorted(starts[:windows]) == list(range(0, 32 * windows, 32))
            assert starts[windows:] == starts[:windows] and sequences[:, -1].tolist() == [x + 32 for x in starts]
            assert spread or starts[:windows] == sorted(starts[:windows])


def test_stride_is_coprime_and_near_the_golden_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next coprime number from 0.618 of the windows on."""
    for windows in COUNTS:
        data = order_of(windows, monkeypatch)
        assert math.gcd(data.stride, windows) == 1
        nearest = max(1, round(0.618 * windows))
        assert data.stride >= nearest
        assert all(math.gcd(between, windows) > 1 for between in range(nearest, data.stride))
        assert windows < 100 or abs(data.stride / windows - 0.618) < 0.05
        assert [int(x) // 32 for x in data.train_sequences([0, 1, 2], data.stride)[:, 0]] == [
            n * data.stride % windows for n in range(3)
        ]


@pytest.mark.parametrize("windows", [997, 1000, 4096, 30030, 99991])
def test_each_batch_covers_all_data(windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of it is further from a sequence of a batch than a few times their mean distance."""
    data = order_of(windows, monkeypatch)
    for batch in (8, 24, 64):
        for first in (0, batch, 1000 * batch):
            numbers = range(first, first + batch)
            places = sorted(data.train_sequences(numbers, data.stride)[:, 0].tolist())
            gaps = np.diff([*places, places[0] + 32 * windows])
            assert gaps.max() < 3.5 * 32 * windows / batch


def batches(data: t.Data, ranks: int, steps: int, **changes: Any) -> list[list[list[int]]]:
    """For each step the sequences of all ranks."""
    cfg, found = config(**changes), []
    trainers = [t.Trainer(model_for(cfg), data, cfg, runtime(rank, ranks)) for rank in range(ranks)]
    for step in range(steps):
        for trainer in trainers:
            trainer.step = step
        parts = [trainer.batch() for trainer in trainers]
        assert all(part.shape[:2] == (tr.micro_steps, tr.micro_seqs) for part, tr in zip(parts, trainers, strict=True))
        found.append(torch.cat([part.flatten(0, 1) for part in parts]).tolist())
    return found


@pytest.mark.parametrize("order", ["spread", "file"])
def test_ranks_read_the_same_sequences(order: str) -> None:
    """1, 2 and 4 ranks together, whatever the micro-batches: those of the step, in the order of the run."""
    data = t.Data(config(sequence_order=order), runtime())
    stride = data.spread_stride if order == "spread" else 1
    assert stride == data.stride
    expected = [
        [data.train.read(n * stride % data.num_windows * 32, 33).tolist() for n in range(8 * step, 8 * step + 8)]
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
    assert data.num_windows == 9 and data.identity["train_tokens"] == 300
    assert data.train_sequences(range(9), data.stride)[:, 0].tolist() == list(range(0, 288, 32))
    assert data.train_sequences([1], data.stride).tolist() == [list(range(32, 65))]


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
    """Missing, foreign, other size."""
    with pytest.raises(FileNotFoundError, match="TOKENIZER_PATH"):
        t.Data(config(tokenizer_path=tmp_path / "none.model"), runtime())
    (tmp_path / "foreign.model").write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        t.Data(config(tokenizer_path=tmp_path / "foreign.model"), runtime())
    with pytest.raises(ValueError, match="320 pieces, VOCAB_SIZE=1024"):
        t.Data(config(vocab_size=1024), runtime())


def test_tokenizer_without_a_space_is_refused(tmp_path: Path) -> None:
    """It spells a space with the 3 fallback bytes of its sign, which would count as 3 bytes of text."""
    letters = np.random.default_rng(0).choice(list("abcdefghij"), 60_000)
    t.build_corpus(["".join(letters)], tmp_path / "corpus", 320)
    sp = t.sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "corpus" / "tokenizer.model"))
    assert sum(sp.is_byte(i) for i in sp.encode("a b")) == 3
    with pytest.raises(ValueError, match="space"):
        t.Data(config(data_path=tmp_path / "corpus", tokenizer_path=tmp_path / "corpus" / "tokenizer.model"), runtime())


# ---- Corpora from text -----------------------------------------------------------------------------------------------


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


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
    rt, cfg = runtime(), config(text_files="**/*.txt")
    first = t.corpus_paths(cfg, rt)
    assert first[1] == f"{first[0]}/tokenizer.model" and Path(first[0]).parent == Path("logs/cache")
    assert sorted(contents(first[0])) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "tokenizer.model"]
    before = contents(first[0])
    assert t.corpus_paths(cfg, rt) == first and sum("building" in line for line in rt.lines) == 1
    assert t.Data(cfg, rt).train.total == t.Data(cfg, rt).identity["train_tokens"] and len(rt.lines) == 5
    Path("copies").mkdir()
    for i in range(24):
        shutil.copy(next(Path().glob(f"**/d{i}.txt")), Path("copies", f"{i:02}"))
    assert t.corpus_paths(config(text_files="copies/*"), rt) != first  # another order of the same texts
    Path("d0.txt").write_text(text_of(8000, 300), encoding="utf-8")
    second = t.corpus_paths(cfg, rt)
    assert second != first and contents(first[0]) == before
    Path("d0.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"d0\.txt is not UTF-8"):
        t.corpus_paths(cfg, rt)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        t.corpus_paths(config(text_files="*.nothing"), rt)
    assert not list(Path("logs/cache").glob("building-*")) and len(list(Path("logs/cache").iterdir())) == 3


def test_other_vocabulary_is_another_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the paths of a run without TEXT_FILES and DEMO are those that it was given."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(text_of(0, 6000), encoding="utf-8")
    folders = {t.corpus_paths(config(text_files="a.txt", vocab_size=size), runtime())[0] for size in (320, 340)}
    assert len(folders) == 2
    cfg = config()
    assert t.corpus_paths(cfg, runtime()) == (cfg.data_path, cfg.tokenizer_path)


@pytest.mark.parametrize("tokens", [2500, 10**6])
def test_one_text_file_is_enough(tmp_path: Path, tokens: int) -> None:
    """A single text, small or large, is cut into documents of which some are held out: nothing is lost. The same text
    gives the same bytes."""
    text = text_of(0, tokens)
    t.build_corpus([text], tmp_path / "a", 320)
    t.build_corpus([text], tmp_path / "b", 320)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
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


def test_repeats_are_dropped_before_holding_out(tmp_path: Path) -> None:
    """A text that repeats would stand on both sides: the corpus is that of the texts without repeats."""
    texts = [text_of(400 * i, 400) for i in range(20)]
    t.build_corpus(texts, tmp_path / "once", 320)
    t.build_corpus(texts + texts[::-1] + texts[:3], tmp_path / "often", 320)
    assert contents(tmp_path / "once") == contents(tmp_path / "often")
    train = "".join("".join(decoded(tmp_path / "often", "train")).split())
    for document in decoded(tmp_path / "often", "val"):
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

    cfg, rt = config(text_files="a.txt"), runtime()
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
    """It is made of what is installed, without a download, enough for some 800,000 tokens; cached by content, too."""
    texts = t.read_texts(config(demo=1))
    assert 2_500_000 < len("".join(set(texts))) < 6_000_000
    assert {inspect.getdoc(np.linalg.svd), inspect.getdoc(torch.nn.Linear), t.topics["assert"]} <= set(texts)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(t, "topics", dict(list(t.topics.items())[:30]))
    monkeypatch.setattr(t, "DOCUMENTED", (np.linalg,))
    cfg, rt = config(demo=1, vocab_size=512), runtime()
    folder, _ = t.corpus_paths(cfg, rt)
    assert t.corpus_paths(cfg, rt)[0] == folder and sum("building" in line for line in rt.lines) == 1
    assert t.Data(cfg, rt).num_val_targets > 1000
    monkeypatch.setattr(t, "DOCUMENTED", ())  # another version of NumPy
    assert t.corpus_paths(cfg, rt)[0] != folder
