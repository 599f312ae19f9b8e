"""Data: shard checks, streaming, byte counts, corpora from text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tools import config, corpus, runtime, t


def shard(path: Path, tokens: int = 100, top: int = 300) -> Path:
    """A sound shard of random tokens."""
    t.write_shard(path, np.random.default_rng(0).integers(0, top, tokens))
    return path


def test_round_trip(tmp_path: Path) -> None:
    """What is written is read, memory-mapped."""
    tokens = t.open_shard(shard(tmp_path / "a.bin"))
    assert isinstance(tokens, np.memmap) and len(tokens) == 100


@pytest.mark.parametrize(
    ("offset", "content", "part"),
    [
        (0, b"\1\2\3\4", "magic"),
        (4, b"\7\0\0\0", "version 7"),
        (8, b"\xff\0\0\0", "truncated"),
        (8, b"\5\0\0\0", "longer"),
    ],
)
def test_damaged_header(tmp_path: Path, offset: int, content: bytes, part: str) -> None:
    """Wrong magic, version and sizes are named with the file."""
    path = shard(tmp_path / "a.bin")
    data = bytearray(path.read_bytes())
    data[offset : offset + 4] = content
    path.write_bytes(data)
    with pytest.raises(ValueError, match=part) as error:
        t.open_shard(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("size", [0, 5, 1000, 1025])
def test_cut_shard(tmp_path: Path, size: int) -> None:
    """A shard that was cut anywhere is refused."""
    path = shard(tmp_path / "a.bin")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="no token shard|truncated"):
        t.open_shard(path)


def test_no_shards(tmp_path: Path) -> None:
    """The message says where to get data and that DEMO=1 needs none."""
    with pytest.raises(FileNotFoundError, match="DEMO=1"):
        t.TokenShards(f"{tmp_path}/fineweb_train_*.bin", 320)


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    """At start in the first and last block, later in every read; validation everywhere."""
    tokens = np.zeros(3 * t.CHECK_BLOCK, dtype=np.uint16)
    tokens[t.CHECK_BLOCK + 5] = 999
    t.write_shard(tmp_path / "a.bin", tokens)
    shards = t.TokenShards(f"{tmp_path}/a.bin", 320)
    shards.check(t.CHECK_BLOCK)
    with pytest.raises(ValueError, match="token id 999 is beyond VOCAB_SIZE=320"):
        shards.check(shards.total)
    with pytest.raises(ValueError, match="token id 999"):
        shards.read(t.CHECK_BLOCK, 10)
    t.write_shard(tmp_path / "a.bin", tokens[: t.CHECK_BLOCK + 6])
    with pytest.raises(ValueError, match="token id 999"):
        t.TokenShards(f"{tmp_path}/a.bin", 320).check(t.CHECK_BLOCK)


def test_stream_wraps_over_shards(tmp_path: Path) -> None:
    """Positions run through the shards in order and around."""
    for i in range(3):
        t.write_shard(tmp_path / f"s{i}.bin", np.arange(10 * i, 10 * i + 10))
    shards = t.TokenShards(f"{tmp_path}/s*.bin", 320)
    assert shards.read(8, 5).tolist() == [8, 9, 10, 11, 12]
    assert shards.read(27, 8).tolist() == [27, 28, 29, 0, 1, 2, 3, 4]
    assert shards.read(60 + 1, 65).tolist() == [(1 + i) % 30 for i in range(65)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_read_disjoint_parts(world_size: int) -> None:
    """All ranks together read TRAIN_BATCH_TOKENS + 1 consecutive tokens, each input once, over several steps."""
    cfg = config()
    shards = t.TokenShards(f"{corpus()}/fineweb_train_*.bin", cfg.vocab_size)
    for step in (0, 1, 7):
        parts = [t.BatchLoader(shards, cfg, runtime(r, world_size), 2).batch(step) for r in range(world_size)]
        expected = shards.read(step * cfg.train_batch_tokens, cfg.train_batch_tokens + 1)
        assert torch.cat([inputs.flatten() for inputs, _ in parts]).tolist() == expected[:-1].tolist()
        assert torch.cat([targets.flatten() for _, targets in parts]).tolist() == expected[1:].tolist()


def test_byte_counts_equal_the_text() -> None:
    """Bytes over a document are the UTF-8 length of what the tokenizer decodes, emojis and fallback bytes included."""
    sp, _ = t.load_tokenizer(str(corpus() / "tokenizer.model"), 320)
    counts = t.TokenBytes(sp, torch.device("cpu"))
    for text in ("hello world", "caf\u00e9 \U0001f600 \u4e16\u754c 123  x", "a\tb\nc", "\U00010348"):
        ids = torch.tensor([sp.bos_id(), *sp.encode(text)])
        assert int(counts.count(ids[:-1], ids[1:]).sum()) == len(sp.decode(ids.tolist()).encode())
    val = t.TokenShards(f"{corpus()}/fineweb_val_*.bin", 320)
    ids = torch.from_numpy(val.read(0, val.total))
    assert int(counts.count(ids[:-1], ids[1:]).sum()) == len(sp.decode(ids.tolist()).encode())


def test_boundaries_count_nothing() -> None:
    """Control and unknown tokens are 0 bytes, and a piece after one has no leading space."""
    sp, _ = t.load_tokenizer(str(corpus() / "tokenizer.model"), 320)
    counts = t.TokenBytes(sp, torch.device("cpu"))
    spaced = next(
        i for i in range(sp.vocab_size()) if sp.id_to_piece(i).startswith("\u2581") and len(sp.id_to_piece(i)) == 2
    )
    size = len(sp.id_to_piece(spaced)[1:].encode())
    previous = torch.tensor([0, 1, 2, 3, 300])
    assert counts.count(previous, torch.full((5,), spaced)).tolist() == [size] * 4 + [size + 1]
    assert counts.count(torch.full((4,), 300), torch.arange(4)).tolist() == [0] * 4


def test_tokenizer_errors(tmp_path: Path) -> None:
    """Missing, foreign, other size."""
    with pytest.raises(FileNotFoundError, match="TOKENIZER_PATH"):
        t.load_tokenizer(str(tmp_path / "none.model"), 320)
    (tmp_path / "foreign.model").write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        t.load_tokenizer(str(tmp_path / "foreign.model"), 320)
    with pytest.raises(ValueError, match="320 pieces, VOCAB_SIZE is 1024"):
        t.load_tokenizer(str(corpus() / "tokenizer.model"), 1024)


def test_corpus_is_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TEXT_FILES builds once; changed text builds anew; bad text and no text are errors."""
    monkeypatch.chdir(tmp_path)
    sp, _ = t.load_tokenizer(str(corpus() / "tokenizer.model"), 320)
    val = t.open_shard(corpus() / "fineweb_train_000000.bin")
    for i in range(24):
        Path(f"d{i}.txt").write_text(sp.decode(val[300 * i : 300 * i + 300].astype(int).tolist()), encoding="utf-8")
    lines: list[str] = []
    cfg = config(text_files="*.txt")
    first = t.prepare_corpus(cfg, lines.append)  # type: ignore[arg-type]
    assert t.prepare_corpus(cfg, lines.append) == first and sum("building" in line for line in lines) == 1  # type: ignore[arg-type]
    Path("d0.txt").write_text("something else entirely", encoding="utf-8")
    assert t.prepare_corpus(cfg, lines.append) != first  # type: ignore[arg-type]
    Path("d0.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"d0\.txt is not UTF-8"):
        t.prepare_corpus(cfg, lines.append)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        t.prepare_corpus(config(text_files="*.nothing"), lines.append)  # type: ignore[arg-type]
    assert not list(Path("logs/cache").glob("building-*"))


@pytest.mark.parametrize("lines", [150, 3000])
def test_one_text_file_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int) -> None:
    """A single file, small or large, is cut so that about 5% can be held out; a hopeless one is refused."""
    monkeypatch.chdir(tmp_path)
    sp, _ = t.load_tokenizer(str(corpus() / "tokenizer.model"), 320)
    tokens = t.open_shard(corpus() / "fineweb_train_000000.bin").astype(int).tolist()
    text = "\n".join(sp.decode(tokens[50 * (i % 100) : 50 * (i % 100) + 50]) + f" {i}" for i in range(lines))
    Path("all.txt").write_text(text, encoding="utf-8")
    folder, _ = t.prepare_corpus(config(text_files="all.txt"), print)
    train, val = (t.open_shard(Path(folder) / f"fineweb_{split}_000000.bin") for split in ("train", "val"))
    assert 0.03 < len(val) / (len(train) + len(val)) < 0.12
    Path("all.txt").write_text("one line", encoding="utf-8")
    with pytest.raises(ValueError, match="1 documents are too few to hold some out"):
        t.prepare_corpus(config(text_files="all.txt"), print)


def test_docstrings_and_hold_out() -> None:
    """Docstrings of nested definitions are found, broken source gives none; the split is in bounds."""
    nested = 'class C:\n    """C."""\n    async def g(self):\n        """G."""\n'
    source = '"""M."""\nif 1:\n    def f():\n        """F."""\n' + nested
    assert sorted(t.docstrings(source)) == ["C.", "F.", "G.", "M."]
    assert not list(t.docstrings("def ("))
    documents = [f"{i} " * 50 for i in range(100)]
    train, held = t.hold_out(documents, 1000, 1200)
    assert 1000 <= sum(len(d) for d in held) <= 1200 and sorted(train + held) == sorted(documents)


def test_short_validation_split(tmp_path: Path) -> None:
    """Less than one window is an error that names both lengths."""
    for name in ("fineweb_train_000000.bin", "fineweb_val_000000.bin"):
        shard(tmp_path / name, tokens=20)
    with pytest.raises(ValueError, match="20 validation tokens, a window of TRAIN_SEQ_LEN needs 33"):
        t.open_data(config(data_path=tmp_path), runtime())
