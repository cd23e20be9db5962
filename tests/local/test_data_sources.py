"""Tables, Megatron's token files and chats: read as jsonl is, refused in one line with file and place."""

import json
import struct
import sys

import numpy as np
import pyarrow as arrow
import pytest
import tokenizers
from pyarrow import ipc, parquet
from test_data import opened

from partita.base.errors import DataError, UsageError
from partita.train.data import megatron
from partita.train.data.chat import chat_beside

ROWS = [
    {"text": "plain words", "prompt": None, "completion": None},
    {"text": None, "prompt": "ask:", "completion": "yes 𝄞"},
] * 5
CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]


def write_table(path, rows, extra=True):
    table = arrow.Table.from_pylist(rows)
    if extra:
        table = table.append_column("number", arrow.array(range(len(rows))))
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=3)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file, ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    return path


def same(a, b):
    for one, other in ((a.train, b.train), (a.held_out, b.held_out)):
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.mask, other.mask)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_is_read_as_the_jsonl_of_its_rows(tmp_path, suffix):
    plain = [{k: v for k, v in row.items() if v is not None} for row in ROWS]
    lines = [json.dumps(x, ensure_ascii=False, separators=(",", ":")) for x in plain]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    path = write_table(tmp_path / f"a{suffix}", ROWS)
    found = opened(path, eval_fraction=0.3)
    same(found, opened(tmp_path / "a.jsonl", eval_fraction=0.3))
    half = [write_table(tmp_path / f"{i}{suffix}", ROWS[5 * i : 5 * i + 5]) for i in (0, 1)]
    same(found, opened(tmp_path / f"[01]{suffix}", eval_fraction=0.3))
    assert len(half) == 2


def test_a_table_that_is_none_is_refused_with_its_place(tmp_path):
    whole = write_table(tmp_path / "a.parquet", ROWS).read_bytes()
    for raw in (b"PAR1", whole[:-9], whole[9:], b""):
        (tmp_path / "a.parquet").write_bytes(raw)
        with pytest.raises(DataError, match=r"a\.parquet: row 1: cannot be read: ") as caught:
            opened(tmp_path / "a.parquet")
        assert "\n" not in caught.value.message and caught.value.exit_code == 65
    (tmp_path / "b.arrow").write_bytes(b"ARROW1" + bytes(30))
    with pytest.raises(DataError, match=r"b\.arrow: row 1: cannot be read"):
        opened(tmp_path / "b.arrow")
    for rows, message in (
        ([{"words": "a"}], "its columns are words, number; wanted: "),
        ([{"text": "a"}, {"text": None}], "row 2 holds none of"),
        ([{"text": 3}], "row 1: Expected"),
        ([{"text": b"\xff\xfe"}], "row 1: "),
    ):
        path = write_table(tmp_path / "c.parquet", rows)
        with pytest.raises(DataError, match=message):
            opened(path)


def test_pyarrow_is_asked_for_by_name(tmp_path, monkeypatch):
    path = write_table(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'partita\[hf\]'"):
        opened(path)


def test_a_cached_data_set_is_found_by_name_config_and_split(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    place = tmp_path / "owner___small-talk" / "default" / "0.0.0" / "0a1b"
    for i, rows in enumerate((ROWS[:4], ROWS[4:])):
        write_table(place / f"small-talk-train-0000{i}-of-00002.arrow", rows)
    write_table(place / "small-talk-test.arrow", ROWS[:1])
    write_table(place / "cache-0123.arrow", ROWS[:1])
    whole = write_table(tmp_path / "whole.parquet", ROWS)
    same(
        opened("hf:owner/small-talk", eval_fraction=0.3),
        opened(whole, eval_fraction=0.3),
    )
    ids = opened("hf:owner/small-talk:default/test").train.ids
    assert bytes(ids.tolist()) == b"plain words\n"
    for source, message in (
        ("hf:owner/other", r"no such data set in .* holds owner/small-talk; load it once: "),
        ("hf:owner/small-talk:dev", "holds hf:owner/small-talk:default/test, hf:owner/small"),
        ("hf:", "no such data set"),
    ):
        with pytest.raises(UsageError, match=message):
            opened(source)


DOCUMENTS = [[1, 2, 3, 4, 5], [], [6, 7], list(range(10, 40))]


@pytest.mark.parametrize(("vocab", "dtype"), [(300, np.uint16), (70000, np.int32)])
def test_megatron_files_are_written_byte_by_byte_as_specified_and_read(tmp_path, vocab, dtype):
    assert megatron.write(tmp_path / "my.text", DOCUMENTS, vocab=vocab) == 37
    lengths, size = [5, 0, 2, 30], np.dtype(dtype).itemsize
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, {2: 8, 4: 4}[size], 4, 5)
    expected += struct.pack("<4i", *lengths)
    expected += struct.pack("<4q", *(size * n for n in (0, 5, 5, 7))) + struct.pack(
        "<5q", *range(5)
    )
    assert (tmp_path / "my.text.idx").read_bytes() == expected
    row = np.concatenate([np.asarray(d, dtype) for d in DOCUMENTS])
    assert (tmp_path / "my.text.bin").read_bytes() == row.tobytes()
    for name in ("my.text", "my.text.bin", "my.text.idx"):
        held = opened(tmp_path / name, vocab=vocab, documents="idx")
        assert np.array_equal(held.train.ids, row) and held.held_out is None and held.shuffled
    starts = np.repeat([1, 3, 4], [5, 2, 30])
    assert held.train.documents[np.arange(37)].tolist() == starts.tolist()
    order = sorted(range(4), key=lambda i: held.sample(0, i))
    batch = held.microbatch(0, order)
    assert batch.ids.flatten().tolist() == row[:32].tolist()
    assert batch.documents.flatten().tolist() == starts[:32].tolist()
    uncounted = [j for j in range(1, 33) if starts[j] != starts[j - 1]]
    assert [j + 1 for j in range(32) if not batch.valid.flatten()[j]] == uncounted == [5, 7]


def test_of_megatron_files_the_last_part_is_held_out(tmp_path):
    megatron.write(tmp_path / "m", DOCUMENTS, vocab=300)
    np.save(tmp_path / "mask.npy", np.arange(37) % 2)
    held = opened(
        tmp_path / "m", eval_fraction=0.3, documents="idx", mask=str(tmp_path / "mask.npy")
    )
    assert (len(held.train.ids), len(held.held_out.ids)) == (26, 11)
    assert held.held_out.ids.tolist() == list(range(29, 40))
    assert held.held_out.documents[np.arange(11)].tolist() == [4] * 11
    assert held.held_out.mask.tolist() == [0, 1] * 5 + [0]
    assert held.fingerprint() != opened(tmp_path / "m", eval_fraction=0.3).fingerprint()
    assert opened(tmp_path / "m", eval_source=str(tmp_path / "m.bin")).num_eval_sequences == 4
    with pytest.raises(DataError, match=r"m: token 36 is 39, outside \[0, 39\)"):
        opened(tmp_path / "m", vocab=39)
    (tmp_path / "a.txt").write_text("some text, long enough")
    with pytest.raises(UsageError, match=r"go with tokens:FILE\.npy and Megatron's"):
        opened(tmp_path / "a.txt", documents="idx")


def test_bad_megatron_files_are_refused_with_their_place(tmp_path):
    prefix = tmp_path / "m"
    megatron.write(prefix, DOCUMENTS, vocab=300)
    index, held = tmp_path / "m.idx", tmp_path / "m.bin"
    whole, ids = index.read_bytes(), held.read_bytes()

    def refused(raw, message, data=ids):
        index.write_bytes(raw)
        held.write_bytes(data)
        with pytest.raises(DataError, match=message) as caught:
            opened(prefix)
        assert "\n" not in caught.value.message

    def at(place, raw):
        return whole[:place] + raw + whole[place + len(raw) :]

    refused(b"", r"m\.idx: byte 0: begins b''")
    refused(b"PK" + whole[2:], r"m\.idx: byte 0: begins b'PKIDIDX")
    refused(whole[:20], r"m\.idx: 20 bytes; its head alone has 34")
    refused(at(9, b"\x02"), "byte 9: version 2")
    refused(at(17, b"\x06"), r"byte 17: type 6 \(float64\); ids are 1 uint8, ")
    refused(at(17, b"\x63"), r"type 99 \(unknown\)")
    refused(whole[:-1], "4 sequences and 5 entries of documents take 122")
    refused(at(18, struct.pack("<Q", 2**62)), "sequences and 5 entries")
    refused(at(34, struct.pack("<i", -1)), "sequence 0 has a length below 0")
    refused(at(50 + 16, struct.pack("<q", 8)), "sequence 2 does not begin where the one before")
    refused(at(82, struct.pack("<q", 1)), "does not rise from 0 to 4")
    refused(at(90, struct.pack("<q", 3)), "does not rise from 0 to 4")
    refused(whole, r"m\.bin: 73 bytes; m\.idx states 37 tokens of uint16, 74 bytes", ids[:-1])
    index.write_bytes(whole + bytes(4))  # modes, of data that is not only text
    held.write_bytes(ids)
    assert len(opened(prefix).train.ids) == 37
    held.unlink()
    with pytest.raises(UsageError, match=r"m\.bin: no such file"):
        opened(prefix)
    with pytest.raises(DataError, match="document 1: token 2 is 300, outside"):
        megatron.write(tmp_path / "n", [[1], [2, 3, 300]], vocab=300)
    assert not list(tmp_path.glob("*n*"))


def test_a_plain_chat_counts_the_answers_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "!"}]
    other = [{"role": "user", "content": parts}, {"role": "assistant", "content": "hello"}]
    records = [{"messages": CHAT}, {"messages": [*other, {"role": "user", "content": "bye"}]}]
    path.write_text("\n".join(map(json.dumps, records)))
    held = opened(path)
    text = bytes(held.train.ids.tolist()).decode()
    assert text == (
        "user: 2+2?\nassistant: 4\nuser: sure?\nassistant: yes\n\nuser: hi!\nassistant: hello\n\n"
    )
    counted = "".join(c for c, m in zip(text, held.train.mask, strict=True) if m)
    assert counted == "4\nyes\n\nhello\n\n"
    write_table(tmp_path / "a.parquet", records[:1] * 2, extra=False)
    tabled = opened(tmp_path / "a.parquet").train
    assert bytes(tabled.ids.tolist()).decode() == text[: text.index("user: hi")] * 2
    for messages, message in (
        ([], "line 1: its 0 messages hold no answer"),
        ([{"role": "user", "content": "a"}], "hold no answer"),
        ([{"role": "user"}, CHAT[1]], "message 0 needs a role and a content of text"),
        ([{"role": 1, "content": "a"}], "message 0 needs a role"),
        ([{"role": "user", "content": [{"type": "image"}]}, CHAT[1]], "content of text"),
        ("hello", "line 1: Expected `array"),
    ):
        path.write_text(json.dumps({"messages": messages}))
        with pytest.raises(DataError, match=message):
            opened(path)


CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Qwen3's: what was thought is written for the last answer alone.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def with_template(tmp_path):
    """with_template(template): the folder of a tokenizer that has it."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<|end|>", "<|user|>", "<|assistant|>"]
    inner.train_from_iterator(
        [], tokenizers.trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    inner.save(str(tmp_path / "tokenizer.json"))

    def make(template, **more):
        config = {"bos_token": "<s>", "chat_template": template, **more}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def counted(held, folder):
    """The whole text, and each counted stretch of it."""
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    mask, ids = held.train.mask, held.train.ids
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    parts = [ids[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [inner.decode(x.tolist(), skip_special_tokens=False) for x in (ids, *parts)]


def test_a_tokenizers_own_template_says_what_an_answer_is(with_template, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    folder = with_template(CHATML)
    held = opened(path, vocab=300, tokenizer=str(folder))
    whole, *answers = counted(held, folder)
    assert answers == ["4<|end|>\n", "yes<|end|>\n"]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert whole == theirs.apply_chat_template(CHAT, tokenize=False)
    named = [{"name": "tools", "template": "{{ 1 / 0 }}"}, {"name": "default", "template": CHATML}]
    assert counted(opened(path, vocab=300, tokenizer=str(with_template(named))), folder)[0] == whole

    print_before = held.tokenizer.fingerprint()
    folder = with_template(THINKING)
    held = opened(path, vocab=300, tokenizer=str(folder))
    assert counted(held, folder) == [
        "<|user|>2+2?<|end|><|assistant|><think></think>4<|end|>"
        "<|user|>2+2?<|end|><|assistant|>4<|end|><|user|>sure?<|end|><|assistant|><think></think>yes<|end|>",
        "<think></think>4<|end|>",
        "<think></think>yes<|end|>",
    ]
    assert held.tokenizer.fingerprint() != print_before


def test_bad_templates_are_one_line_with_their_file(with_template, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    for template, message in (
        ("{% if %}", r"tokenizer_config\.json: its chat template does not compile"),
        (3, "chat_template is no text"),
        ("{{ raise_exception('roles must alternate') }}", "line 1: .* refuses it: roles must"),
        ("{{ messages[0].content.upper() + 1 }}", "line 1: the chat template refuses it"),
        ("{{ messages.__class__.__mro__ }}", "refuses it"),
        ("{{ 1 / 0 }}", "line 1: the chat template refuses it: division by zero"),
        ("always the same", "data.source = .* has no target that is counted"),
        ("{{ messages | length }}", "message 1: the template does not continue its own prompt"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            opened(path, vocab=300, tokenizer=str(with_template(template)))
        assert "\n" not in caught.value.message
    folder = with_template(CHATML)
    (folder / "chat_template.jinja").write_text(THINKING)
    assert chat_beside(folder / "tokenizer.json").digest != "plain"
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not JSON"):
        opened(path, vocab=300, tokenizer=str(folder))


def test_batches_that_a_tokenizers_file_asks_for_do_not_touch_its_text(with_template, tmp_path):
    """Truncation cuts a text to one batch, padding fills it with what is no text."""
    (tmp_path / "a.txt").write_text("some text of many lines\n" * 40)
    path = with_template(CHATML) / "tokenizer.json"
    plain = opened(tmp_path / "a.txt", vocab=300, tokenizer=str(path)).train.ids
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.enable_truncation(16)
    inner.enable_padding(length=64, pad_id=0)
    inner.save(str(path))
    held = opened(tmp_path / "a.txt", vocab=300, tokenizer=str(path)).train
    assert np.array_equal(held.ids, plain) and held.mask is None


def test_a_record_ends_as_the_tokenizers_config_says_where_its_words_are_unknown(
    with_template, tmp_path
):
    (tmp_path / "a.jsonl").write_text('{"text": "one more"}\n{"text": "two more"}\n')
    folder = with_template(None, eos_token={"content": "<|end|>"})
    held = opened(tmp_path / "a.jsonl", vocab=300, tokenizer=str(folder))
    assert held.tokenizer.decode(held.train.ids) == "one more<|end|>two more<|end|>"
    other = opened(tmp_path / "a.jsonl", vocab=300, tokenizer=str(with_template(None)))
    assert other.tokenizer.decode(other.train.ids) == "one moretwo more"
    assert held.tokenizer.fingerprint() != other.tokenizer.fingerprint()


def test_files_as_editors_and_other_programs_leave_them(tmp_path):
    record = b'{"text": "abc def ghi"}\n' * 3
    plain = (tmp_path / "a.jsonl", record), (tmp_path / "a.txt", b"some text\n" * 4)
    for path, raw in plain:
        path.write_bytes(raw)
        wanted = opened(path).train.ids
        path.write_bytes(b"\xef\xbb\xbf" + raw)
        assert np.array_equal(opened(path).train.ids, wanted)
        held = opened(path, eval_fraction=0.4)
        cut = path.suffix == ".txt"  # each part of a text has an end
        assert len(held.train.ids) + len(held.held_out.ids) == len(wanted) + cut
    for name in ("a.JSONL", "a.ndjson", "a.json"):
        (tmp_path / name).write_bytes(record)
        assert bytes(opened(tmp_path / name).train.ids.tolist()) == b"abc def ghi\n" * 3
    long = b'{"text": "' + b"x" * 5_000_000 + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(long)
    assert len(opened(tmp_path / "a.jsonl").train.ids) == 5_000_001
    (tmp_path / "a.link").symlink_to(tmp_path / "gone")
    for name, raw, message in (
        ("b.txt", "ab".encode("utf-16"), "byte 0: it begins as UTF-16; convert it"),
        ("b.jsonl.gz", b"\x1f\x8b\x08\x00", "begins as gzip; unpack it"),
        ("b.json", b'[{"text": "a"}]', "line 1: .* with no list around them"),
        ("c.json", b"plain words", r"line 1: .* plain text is named \.txt"),
        ("b.jsonl", b'{"content": "a"}', "line 1 holds none of .*; it has content"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=message) as caught:
            opened(tmp_path / name)
        assert caught.value.key == "data.source"
    with pytest.raises(UsageError, match=r"a\.link is a link that leads to no file"):
        opened(tmp_path / "a.link")


def test_what_is_wrong_with_the_other_source_is_told_of_it(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 4)
    (tmp_path / "b.txt").write_text("short")
    (tmp_path / "b.jsonl").write_text("{}")
    for name, kind in (
        ("b.txt", DataError), ("b.jsonl", DataError), ("m.idx", UsageError), ("m.npy", UsageError),
    ):  # fmt: skip
        source = f"{'tokens:' * name.endswith('npy')}{tmp_path / name}"
        with pytest.raises(kind) as caught:
            opened(tmp_path / "a.txt", eval_source=source)
        assert caught.value.key == "data.eval_source"
