"""Strict TOML and JSON to frozen dataclasses and back.

Types are strict (a string is no number), an unknown key is answered with the nearest known one, numbers
that are not finite are refused, and everything that is wrong with a file is said at once. Every error is
a UsageError with the file and the dotted key.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from partita.base.errors import UsageError
from partita.base.text import did_you_mean, nearest_name

T = TypeVar("T")
MAX_FILE_BYTES = 4_000_000
MAX_NUMBER = 1e30
_MISSING = object()


def read_text(path: str | Path) -> str:
    """The text of a small file of the user's. Raises UsageError when it is missing, no regular file,
    too big to be a job, model or cluster file, or binary."""
    path = Path(path)
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder, a file is wanted", file=str(path))
        if not path.is_file():
            what = "no plain file" if path.exists() else f"no such file{_beside(path)}"
            raise UsageError(f"{path}: {what}", file=str(path))
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UsageError(
                f"{path}: {size} bytes; such a file has at most {MAX_FILE_BYTES}", file=str(path)
            )
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        what = "it is not UTF-8 text" if isinstance(error, UnicodeError) else str(error)
        what = error.strerror or what if isinstance(error, OSError) else what
        raise UsageError(f"{path}: cannot be read: {what}", file=str(path)) from None
    if "\0" in text:
        raise UsageError(f"{path}: cannot be read: it is binary, not text", file=str(path))
    return text


def _beside(path: Path) -> str:
    """The nearest name in the folder; a link to nothing is not what was meant."""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    others = [name for name in names[:1000] if name != path.name]
    return did_you_mean(path.name, others).partition("; known")[0]


def load_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UsageError with the file and the line."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not TOML: {_short(error)}", file=str(path)) from None


def load_json(path: str | Path) -> dict[str, Any]:
    """The object of a JSON file. Raises UsageError with the file."""
    text = read_text(path)
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON: {_short(error)}", file=str(path)) from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a JSON object is wanted", file=str(path))
    return value


def _short(error: BaseException) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def decode(
    kind: type[T], mapping: Mapping[str, Any], *, file: str | None = None, prefix: str = ""
) -> T:
    """A dataclass from a mapping. `prefix` is the dotted key the mapping stands under.

    Raises UsageError that names every unknown key, wrong type and missing field at once."""
    problems: list[tuple[str, str]] = []
    value = _decode(kind, mapping, prefix, problems)
    if problems:
        where = f"{file}: " if file else ""
        lines = [f"{where}{key}: {text}" if key else f"{where}{text}" for key, text in problems]
        wrong = UsageError("\n".join(lines), file=file, key=problems[0][0] or None)
        wrong.keys = tuple(key for key, _ in problems)
        raise wrong
    return value


def _dotted(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _decode(kind: Any, raw: Any, key: str, problems: list[tuple[str, str]]) -> Any:
    """The value of type `kind`; what is wrong is appended to `problems`."""
    if isinstance(raw, Mapping) and (inner := _dataclass_in(kind)):
        return _decode_fields(inner, raw, key, problems)
    origin, arguments = get_origin(kind), get_args(kind)
    many = origin is tuple and arguments[1:] == (...,)
    many = many and (_dataclass_in(arguments[0]) or get_origin(arguments[0]) is Literal)
    if many and isinstance(raw, list | tuple):
        kind = arguments[0]
        return tuple(_decode(kind, item, f"{key}[{i}]", problems) for i, item in enumerate(raw))
    if isinstance(raw, Mapping) and (of := _value_in(kind)):
        return {k: _decode(of, v, _dotted(key, str(k)), problems) for k, v in raw.items()}
    problems += [(where, text) for where, text in _absurd(raw, key)]
    if key.endswith("_bytes") and isinstance(raw, float) and raw.is_integer():
        raw = int(raw)  # 80e9 is how people write bytes
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        text = str(error).replace("`", "'").partition(" - at ")
        at = text[2].strip().strip("'").removeprefix("$")
        told = _of_literal(kind, raw) or f"{text[0][0].lower()}{text[0][1:]}{_as_list(kind, raw)}"
        problems.append((key + at, told))
        return None


def _decode_fields(
    kind: type, raw: Mapping[str, Any], key: str, problems: list[tuple[str, str]]
) -> Any:
    """A dataclass: unknown and missing keys first, then each field."""
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind) if f.init}
    before = len(problems)
    for name in raw:
        if name not in known:
            problems.append(
                (_dotted(key, str(name)), "unknown key" + did_you_mean(name, list(known)))
            )
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in raw:
            values[name] = _decode(hints[name], raw[name], _dotted(key, name), problems)
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append((_dotted(key, name), "missing, and it has no default"))
    if len(problems) > before:
        return None
    try:
        return kind(**values)
    except UsageError as error:
        problems += [(_dotted(key, own) if own else key, text) for own, text in error.all]
        return None


def _dataclass_in(kind: Any) -> type | None:
    """The dataclass that a type is, or may be: D, or D | None."""
    if isinstance(kind, type) and is_dataclass(kind):
        return kind
    if get_origin(kind) in (Union, UnionType):
        return next((a for a in get_args(kind) if isinstance(a, type) and is_dataclass(a)), None)
    return None


def _value_in(kind: Any) -> Any:
    """What a mapping by name holds, where a type is, or may be, one: V of dict[str, V], or | None."""
    found = (a for a in (kind, *get_args(kind)) if get_origin(a) is dict)
    name, of = next((get_args(a) for a in found), (None, None))
    return of if name is str and of is not Any else None


def _of_literal(kind: Any, raw: Any) -> str:
    """What is accepted in place of a name that is not one of a Literal's."""
    choices = [a for a in get_args(kind) if isinstance(a, str)]
    if not choices or not isinstance(raw, str):
        return ""
    near = nearest_name(raw, choices)
    hint = f"; did you mean '{near}'?" if near else ""
    return f"'{raw[:80]}' is none of {', '.join(choices)}{hint}"


def _as_list(kind: Any, raw: Any) -> str:
    """How one value is written where a list is wanted."""
    single = get_origin(kind) is tuple and isinstance(raw, str | int | float)
    return f"; a list is written {json.dumps([raw])[:100]}" if single else ""


def _absurd(raw: Any, key: str) -> Iterator[tuple[str, str]]:
    """Numbers that no field can mean."""
    if isinstance(raw, Mapping):
        for name, value in raw.items():
            yield from _absurd(value, _dotted(key, str(name)))
    elif isinstance(raw, list | tuple):
        for i, value in enumerate(raw):
            yield from _absurd(value, f"{key}[{i}]")
    elif isinstance(raw, float) and not isfinite(raw):
        yield key, f"{raw} is not a finite number"
    elif isinstance(raw, int | float) and abs(raw) > MAX_NUMBER:
        yield key, f"a number beyond {MAX_NUMBER:g} is absurd"


def encode(value: Any) -> dict[str, Any]:
    """A dataclass as plain mappings and lists; None is left out, as TOML has none."""
    return _without_none(msgspec.to_builtins(value))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def to_toml(mapping: Mapping[str, Any]) -> str:
    """The TOML text of a mapping."""
    import tomli_w

    return tomli_w.dumps(_without_none(dict(mapping)))


def parse_value(text: str) -> Any:
    """What a word after '=' means: TOML if it is TOML, else the string itself."""
    try:
        value = tomllib.loads(f"v = {text}") if "\n" not in text else {}
    except (ValueError, RecursionError):
        return text
    plain = value.get("v", _MISSING)
    return plain if isinstance(plain, str | int | float | list | dict) else text


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the mapping with each 'section.field=value' applied, the last one last.

    Values are TOML, else strings. Raises UsageError for a word that is no override."""
    result = _copy(mapping)
    for word in overrides:
        key, equals, text = word.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(p.replace("_", "").replace("-", "").isalnum() for p in parts):
            raise UsageError(
                f"'{word[:100]}': an override is written section.field=value", key=word[:100]
            )
        table = result
        for part in parts[:-1]:
            below = table.setdefault(part, {})
            if not isinstance(below, dict):
                raise UsageError(f"{key}: '{part}' is a value, not a section", key=key)
            table = below
        table[parts[-1]] = parse_value(text.strip())
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value
