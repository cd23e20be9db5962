import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.base.config import (
    apply_overrides,
    decode,
    encode,
    load_json,
    load_toml,
    parse_value,
    to_toml,
)
from partita.base.errors import UsageError
from partita.spec.cluster import Cluster
from partita.spec.model import ModelSpec


@dataclass(frozen=True)
class Inner:
    width: int
    names: tuple[str, ...] = ()
    size_bytes: int = 0

    def __post_init__(self) -> None:
        if self.width < 0:
            raise UsageError(f"{self.width} is negative", key="width")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    many: tuple[Inner, ...] = ()
    rate: float = 1.0
    label: str | None = None


GOOD = {
    "inner": {"width": 3, "names": ["a", "b"], "size_bytes": 80e9},
    "many": [{"width": 1}],
    "rate": 2,
}


def test_decode_and_encode_are_inverse() -> None:
    value = decode(Outer, GOOD)
    assert value == Outer(Inner(3, ("a", "b"), 80_000_000_000), (Inner(1),), 2.0)
    assert decode(Outer, encode(value)) == value
    assert "label" not in encode(value)


def test_all_problems_are_said_at_once() -> None:
    bad = {
        "iner": {},
        "inner": {"width": "3", "nmes": []},
        "many": [{"width": 1}, {"width": -1}],
        "rate": float("nan"),
    }
    with pytest.raises(UsageError) as error:
        decode(Outer, bad, file="x.toml", prefix="top")
    lines = error.value.message.splitlines()
    assert "x.toml: top.iner: unknown key; did you mean 'inner'?" in lines
    assert "x.toml: top.inner.nmes: unknown key; did you mean 'names'?" in lines
    assert "x.toml: top.inner.width: expected 'int', got 'str'" in lines
    assert "x.toml: top.many[1].width: -1 is negative" in lines
    assert "x.toml: top.rate: nan is not a finite number" in lines
    assert len(lines) == 5
    assert (error.value.file, error.value.key) == ("x.toml", "top.iner")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"width": True}, "expected 'int', got 'bool'"),
        ({"width": 1.0}, "expected 'int', got 'float'"),
        ({"width": 1, "names": "a"}, "expected 'array', got 'str'"),
        ({"width": 10**40}, "absurd"),
        ({}, "inner.width: missing"),
        (3, "inner: expected 'object', got 'int'"),
    ],
)
def test_types_are_strict(value: object, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        decode(Outer, {"inner": value})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a = ", "not TOML"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a = 1\0", "binary"),
        (b"a = 1\na = 2", "not TOML"),
        (b"a = " + b"[" * 50_000, "not TOML"),
        (b"a = " + b"9" * 100_000, "not TOML"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=text) as error:
        load_toml(path)
    assert error.value.file == str(path)


def test_missing_folder_and_huge(tmp_path: Path) -> None:
    (tmp_path / "quickstart.toml").write_text("a = 1")
    with pytest.raises(UsageError, match=r"no such file; did you mean 'quickstart\.toml'"):
        load_toml(tmp_path / "quikstart.toml")
    with pytest.raises(UsageError, match="is a folder"):
        load_toml(tmp_path)
    huge = tmp_path / "huge.toml"
    with huge.open("wb") as f:
        f.truncate(50_000_000_000)
    start = time.thread_time()
    with pytest.raises(UsageError, match="50000000000 bytes"):
        load_toml(huge)
    with pytest.raises(UsageError, match="no plain file"):
        load_toml("/dev/zero")
    assert time.thread_time() - start < 1  # seconds of work


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, {"b": null}]}')
    assert load_json(path) == {"a": [1, {"b": None}]}
    for text in ("[1]", "{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"config\.json"):
            load_json(path)


def test_overrides() -> None:
    before = {"train": {"lr": 1}, "name": "a"}
    after = apply_overrides(
        before,
        ["train.lr=3e-4", "name=llama3-8b", "data.source=tokens:a.npy", "x=[1, 2]", "d=1979-05-27"],
    )
    assert after == {
        "train": {"lr": 3e-4},
        "name": "llama3-8b",
        "data": {"source": "tokens:a.npy"},
        "x": [1, 2],
        "d": "1979-05-27",
    }
    assert before == {"train": {"lr": 1}, "name": "a"}
    for word in ("train", "=3", "a..b=1", "a b=1", "name.x=1"):
        with pytest.raises(UsageError):
            apply_overrides(before, [word])


@given(st.text())
def test_any_value_parses(text: str) -> None:
    assert isinstance(parse_value(text), str | int | float | list | dict)


@given(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_decode_raises_nothing_but_usage_errors(raw: object) -> None:
    mapping = raw if isinstance(raw, dict) else {"inner": raw, "many": raw, "rate": raw}
    with pytest.raises(UsageError):
        decode(Outer, {**mapping, "surely_unknown": 1})


def test_toml_text_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(to_toml({"a": {"b": [1, 2.5], "c": None, "d": "x\ny"}}))
    assert load_toml(path) == {"a": {"b": [1, 2.5], "d": "x\ny"}}


def test_sizes_and_links_that_cannot_be_are_told_at_once():
    sizes = {"family": "llama", "layers": 0, "hidden": 65, "heads": 4, "kv_heads": 3,
             "ffn_hidden": -2, "vocab": 256, "max_seq_len": 64}  # fmt: skip
    with pytest.raises(UsageError) as told:
        ModelSpec.from_toml(sizes, file="m.toml")
    keys = [line.split(": ")[1] for line in str(told.value).split("\n")]
    assert keys == [f"model.{k}" for k in ("layers", "ffn_hidden", "heads", "kv_heads")]
    link = {"bytes_per_s": 0.0, "latency_s": -1.0}
    table = {"devices": 4, "device": "h100", "links": [{**link, "devices": 2}, link]}
    with pytest.raises(UsageError) as told:
        Cluster.from_toml(table, file="c.toml", prefix="cluster")
    keys = [line.split(": ")[1] for line in str(told.value).split("\n")]
    assert keys == [f"cluster.links[{i}].{k}" for i in (0, 1) for k in link]
    table = {
        "devices": 4,
        "device": "h100",
        "peak_flops": {"bf16": "fast", "fp8": 1e15, "fp32": []},
    }
    with pytest.raises(UsageError) as told:
        Cluster.from_toml(table, file="c.toml", prefix="cluster")
    assert told.value.keys == ("cluster.peak_flops.bf16", "cluster.peak_flops.fp32")
    with pytest.raises(UsageError) as told:
        Cluster.from_toml(
            {"devices": 4, "device": "h100", "prices": {"watts": 0}}, prefix="cluster"
        )
    assert told.value.key == "cluster.prices.device_hour"
