"""What is read, what is refused, and that no plan enters the order."""

import json
import threading
import time
from dataclasses import dataclass
from math import log

import numpy as np
import pytest
import torch

from partita.base.errors import DataError, UsageError
from partita.train.data import dataset as data
from partita.train.data import sources
from partita.train.data.sources import open_text
from partita.train.data.tokenizer import open_tokenizer


@dataclass(frozen=True)
class Data:
    """The fields of a job's [data]."""

    source: str
    tokenizer: str = "byte"
    eval_fraction: float = 0.0
    eval_source: str | None = None
    mask: str | None = None
    documents: str | None = None
    mlm_probability: float = 0.0


@dataclass(frozen=True)
class Train:
    """The fields of a job's [train] that data reads."""

    seq_len: int = 8
    global_batch_size: int = 4


def opened(source, *, vocab=256, seed=0, cache=None, train=Train(), **fields):
    return data.open_dataset(
        Data(str(source), **fields), train, vocab=vocab, seed=seed, cache=cache
    )


def tokens(tmp_path, array, name="t.npy"):
    np.save(tmp_path / name, np.asarray(array))
    return f"tokens:{tmp_path / name}"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_tokens_are_read_exactly_as_promised(tmp_path, dtype):
    row = np.arange(50, dtype=dtype)
    held = opened(tokens(tmp_path, row))
    assert held.num_sequences == 6 and held.num_eval_sequences == 0
    for step in range(5):
        batch = held.microbatch(step, range(4))
        for i in range(4):
            k = (step * 4 + i) % ((50 - 1) // 8)
            assert batch.ids[i].tolist() == row[k * 8 : k * 8 + 8].tolist()
            assert batch.targets[i].tolist() == row[k * 8 + 1 : k * 8 + 9].tolist()
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    assert batch.valid.all() and batch.documents is None


def test_masks_documents_and_ignored_ids(tmp_path):
    row = np.arange(17)
    row[3] = -100
    mask = np.ones(17, np.int8)
    mask[6] = 0
    document = np.array([0] * 11 + [1] * 6)
    np.save(tmp_path / "m.npy", mask)
    np.save(tmp_path / "d.npy", document)
    held = opened(
        tokens(tmp_path, row), mask=str(tmp_path / "m.npy"), documents=str(tmp_path / "d.npy")
    )
    batch = held.microbatch(0, [0, 1])
    assert batch.ids[0].tolist() == [0, 1, 2, 0, 4, 5, 6, 7]
    counted = [
        j for k in range(2) for j in range(k * 8 + 1, k * 8 + 9) if batch.valid[k][j - 1 - k * 8]
    ]
    assert counted == [j for j in range(1, 17) if j not in (3, 6, 11)]
    assert batch.targets[0, 2] == 0 and batch.targets[~batch.valid].sum() == 0
    assert batch.documents.tolist() == [[0] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("bad", [-1, 256, 70000, -101])
def test_an_id_out_of_range_is_named_with_its_offset(tmp_path, bad, monkeypatch):
    monkeypatch.setattr("partita.train.data.streams.CHUNK", 7)
    row = np.arange(50)
    row[23] = bad
    with pytest.raises(DataError, match=rf"t\.npy: token 23 is {bad}, outside \[0, 256\)"):
        opened(tokens(tmp_path, row))


def test_bad_token_files(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        opened(f"tokens:{tmp_path / 'none.npy'}")
    for array, message in (
        (np.ones((3, 3), int), "1-D array of integers"),
        (np.ones(30), "1-D array of integers"),
        (np.array([{}], object), "not a readable"),
        (np.arange(8), "8 tokens to train on; one sequence needs train.seq_len \\+ 1 = 9"),
        (np.zeros(0, int), "0 tokens"),
    ):
        with pytest.raises(DataError, match=message):
            opened(tokens(tmp_path, array))
    source = tokens(tmp_path, np.arange(50))
    whole = (tmp_path / "t.npy").read_bytes()
    for raw in (whole[:-9], whole[:20], b"", b"\x80\x04pickle"):
        (tmp_path / "t.npy").write_bytes(raw)
        with pytest.raises(DataError, match=r"t\.npy: not a readable"):
            opened(source)
    (tmp_path / "t.npy").write_bytes(whole)
    np.save(tmp_path / "m.npy", np.ones(49))
    np.save(tmp_path / "m2.npy", np.ones(49, int))
    with pytest.raises(DataError, match="integers"):
        opened(source, mask=str(tmp_path / "m.npy"))
    with pytest.raises(DataError, match="has 49 entries, the tokens 50"):
        opened(source, mask=str(tmp_path / "m2.npy"))


def test_text_is_held_out_at_the_end_and_shuffled_by_epoch(tmp_path):
    letters = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "a.txt").write_text(letters)
    held = opened(tmp_path / "a.txt", eval_fraction=0.1)
    assert bytes(held.train.ids.tolist()).decode() == letters[:900] + "\n"
    assert bytes(held.held_out.ids.tolist()).decode() == letters[900:] + "\n"
    n = held.num_sequences
    assert (n, held.num_eval_sequences) == (112, 12)
    epochs = [[held.sample(0, e * n + i) for i in range(n)] for e in range(2)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != list(range(n))
    other = opened(tmp_path / "a.txt", eval_fraction=0.1, seed=1)
    assert [other.sample(0, i) for i in range(n)] != epochs[0]


def test_the_order_of_samples_does_not_depend_on_how_they_are_asked_for(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(32, 127)) * 20)
    held = opened(tmp_path / "a.txt")
    whole = held.microbatch(3, range(4))
    for cut in ([0, 1], [2], [3, 0]):
        part = held.microbatch(3, cut)
        assert torch.equal(part.ids, whole.ids[cut]) and torch.equal(
            part.targets, whole.targets[cut]
        )


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_the_permutation_is_one(size):
    assert sorted(data.permuted(i, size, "k") for i in range(size)) == list(range(size))


def test_evaluation_covers_the_held_out_sequences_once(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(32, 127)) * 20)
    held = opened(tmp_path / "a.txt", eval_fraction=0.2)
    n = held.num_eval_sequences
    whole = held.held_out.batch(range(n), 8).ids
    rows = {0: [], 1: []}
    for rank, found in rows.items():
        found += [row for b in held.eval_batches(5, part=(rank, 2)) for row in b.ids]
    assert sum(map(len, rows.values())) == n
    assert {tuple(r.tolist()) for f in rows.values() for r in f} == {
        tuple(r.tolist()) for r in whole
    }
    assert sum(len(b.ids) for b in held.eval_batches(5, limit=7)) == 7


def test_unigram_entropy_is_of_the_held_out_text(tmp_path):
    (tmp_path / "a.txt").write_text("z" * 900 + "abcd" * 25)
    held = opened(tmp_path / "a.txt", eval_fraction=0.1)
    assert held.unigram_entropy() == pytest.approx(log(4), rel=1e-3)


def test_jsonl_counts_only_completions(tmp_path):
    lines = [{"prompt": "ask:", "completion": "yes"}, {"text": "plain"}] * 6
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    held = opened(path)
    text = bytes(held.train.ids.tolist()).decode()
    assert text == "ask:yes\nplain\n" * 6
    counted = "".join(c for c, m in zip(text, held.train.mask, strict=True) if m)
    assert counted == "yes\nplain\n" * 6
    batch = held.microbatch(0, [0])
    k = held.sample(0, 0)
    assert batch.valid[0].tolist() == held.train.mask[k * 8 + 1 : k * 8 + 9].tolist()
    half = opened(path, eval_fraction=0.5)
    assert bytes(half.train.ids.tolist()) + bytes(half.held_out.ids.tolist()) == text.encode()
    for line, message in (
        ("{", "line 13"),
        ('{"words": 1}', "none of"),
        ('{"text": 1}', "line 13"),
    ):
        path.write_text("\n".join(map(json.dumps, lines)) + "\n" + line)
        with pytest.raises(DataError, match=message):
            opened(path)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.31, 0.5])
def test_parts_share_no_character_and_lose_none(tmp_path, fraction, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 16)
    monkeypatch.setattr(sources, "LONGEST_LINE", 24)
    texts = ["äöü€𝄞 line\n" * 3, "", "no end of line 𝄞" * 7, "€" * 50]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    source = open_text(str(tmp_path / "*.txt"), key="data.source", eval_fraction=fraction)
    parts = ["".join(p.text for p in source.passages(part)) for part in ("train", "eval")]
    assert "".join(parts) == "".join(texts)
    assert len(parts[1].encode()) == pytest.approx(source.bytes * fraction, abs=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"text" * 10 + b"\0" + b"text", "byte 40 is NUL: a binary file"),
        (b"text\n" * 10 + b"\xff\xfe", r"byte 50 \(0xff\) is not UTF-8"),
        (b"\x80" * 10_000_000, "byte 0 .* not UTF-8"),
        (b"a\n" * 3_000_000 + b"\0", "byte 6000000 is NUL"),
        (b"short", "6 tokens to train on; one sequence needs"),
    ],
)
def test_text_that_is_none_is_refused_quickly(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    start = time.thread_time()
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path / "a.txt")
    assert "a.txt" in caught.value.message or caught.value.file.endswith("a.txt")
    assert time.thread_time() - start < 5  # seconds of work


def test_what_does_not_exist_or_is_not_text_is_a_usage_error(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"")
    for source, message in (
        (tmp_path / "none.txt", "no such file; accepted: python-stdlib"),
        (tmp_path / "*.txt", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "a.npy", r"\.npy is not read as text"),
    ):
        with pytest.raises(UsageError, match=message):
            opened(source)
    with pytest.raises(UsageError, match="go with tokens:"):
        opened(tmp_path / "a.txt", mask="m.npy")


def test_the_standard_library_is_always_at_hand():
    source = open_text("python-stdlib", key="data.source", eval_fraction=0.05)
    assert source.bytes > 5e6 and list(source.files) == sorted(source.files)
    assert not any({"test", "tests", "site-packages"} & set(p.parts) for p in source.files)
    assert any(p.name == "argparse.py" for p in source.files)


def test_a_trained_tokenizer_decodes_everything_and_is_cached(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the cat sat on the mat; " * 400 + "never seen in training: ЖЖЖ" * 20)
    source = open_text(str(path), key="data.source", eval_fraction=0.2)
    made = open_tokenizer("train:280", vocab=300, source=source, cache=tmp_path / "cache")
    assert made.size <= 280 and len(made.encode("the cat")) < 7
    for text in ("the cat", "Ж€𝄞 \t\r\n", "".join(map(chr, range(1, 500)))):
        assert made.decode(made.encode(text)) == text
    (kept,) = (tmp_path / "cache" / "tokenizers").iterdir()
    again = open_tokenizer("train:280", vocab=300, source=source, cache=tmp_path / "cache")
    assert again.fingerprint() == made.fingerprint()
    assert open_tokenizer("train:280", vocab=300, source=source).digest == made.digest
    kept.write_text("{broken")
    repaired = open_tokenizer("train:280", vocab=300, source=source, cache=tmp_path / "cache")
    assert repaired.digest == made.digest
    read = open_tokenizer(str(kept), vocab=300)
    assert read.digest == made.digest and read.end == (0,)


def test_tokenizers_that_cannot_be(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    source = open_text(str(tmp_path / "a.txt"), key="data.source")
    (tmp_path / "bad.json").write_text('{"version": 1')
    for name, kind, message in (
        ("train:1024", UsageError, "has 1024 ids, the model's vocabulary 300"),
        ("train:100", UsageError, "at least 257"),
        ("train:x", UsageError, "N is a number"),
        ("none.json", UsageError, "byte, train:N, a path"),
        (str(tmp_path / "bad.json"), DataError, "not a tokenizer.json"),
    ):
        with pytest.raises(kind, match=message):
            open_tokenizer(name, vocab=300, source=source)
    with pytest.raises(UsageError, match="has 256 ids, the model's vocabulary 255"):
        open_tokenizer("byte", vocab=255)


def test_ranks_share_one_tokenized_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 500)
    calls, work = [], data._tokenized

    def counted(*args):
        calls.append(args[2])
        return work(*args)

    monkeypatch.setattr(data, "_tokenized", counted)
    found = [None] * 4

    def rank(i):
        found[i] = opened(
            tmp_path / "a.txt", tokenizer="train:270", vocab=270, eval_fraction=0.1,
            cache=tmp_path / "cache",
        )  # fmt: skip

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(calls) == ["eval", "train"]
    batches = [f.microbatch(2, range(4)).ids for f in found]
    assert all(torch.equal(b, batches[0]) for b in batches)
    for path in (tmp_path / "cache" / "tokens").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-5])
    rank(0)
    assert torch.equal(found[0].microbatch(2, range(4)).ids, batches[0])


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 50)
    (tmp_path / "cache").write_text("a file where a folder is meant")
    with_cache = opened(tmp_path / "a.txt", cache=tmp_path / "cache")
    without = opened(tmp_path / "a.txt")
    assert torch.equal(with_cache.microbatch(0, [0]).ids, without.microbatch(0, [0]).ids)


def test_a_fingerprint_tells_data_apart(tmp_path):
    (tmp_path / "a.txt").write_text("abc " * 100)
    first = opened(tmp_path / "a.txt").fingerprint()
    assert first == opened(tmp_path / "a.txt").fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert first != opened(tmp_path / "a.txt", eval_fraction=0.5).fingerprint()
    (tmp_path / "a.txt").write_text("abd " * 100)
    assert first != opened(tmp_path / "a.txt").fingerprint()
    row = np.arange(50)
    a = opened(tokens(tmp_path, row)).fingerprint()
    row[7] = 9
    assert a != opened(tokens(tmp_path, row)).fingerprint()


def test_a_separate_source_for_evaluation(tmp_path):
    (tmp_path / "a.txt").write_text("abc " * 100)
    (tmp_path / "b.txt").write_text("xyz " * 100)
    held = opened(tmp_path / "a.txt", eval_source=str(tmp_path / "b.txt"), eval_fraction=0.5)
    assert len(held.train.ids) == 401 and bytes(held.held_out.ids[:4].tolist()) == b"xyz "
    row = tokens(tmp_path, np.arange(50))
    with pytest.raises(UsageError, match="no tokenizer reads it"):
        opened(row, eval_source=str(tmp_path / "b.txt"))
    assert opened(row, eval_source=row).num_eval_sequences == 6
