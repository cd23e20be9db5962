"""What a user fixes and forbids: words of a plan's line, as `plan` prints them, and what each states."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from partita.base.errors import UsageError
from partita.base.text import nearest_name
from partita.spec.plan import DEFAULT_ORDER, Plan
from partita.spec.plan_table import CHOICES, SCHEDULES, is_schedule

AXES = ("pp", "dp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp", "split")
_AXIS = re.compile(rf"({'|'.join(AXES)})(\d+)?(\+sp)?(?:[:.]([\w:.]+))?(?:/(\d+mb))?")
_HYBRID = re.compile(r"hybrid(\d+)x(\d+)")
_ALONE = (
    *AXES,
    "sp",
    "groups",
    "num_microbatches",
    "zero",
    "dtype",
    "method",
    "schedule",
)  # to forbid
_SAID = {"dtype": "precision", "order": "order of axes"}
_EACH = ("recompute", "offload")  # written as a name, a colon and a choice
Stated = list[tuple[str, object]]


@dataclass(frozen=True)
class Words:
    """What a plan must have and must not: (field, value) pairs; value None is 'larger than 1, or on'."""

    fixed: tuple[tuple[str, object], ...] = ()
    forbidden: tuple[tuple[str, object], ...] = ()

    @staticmethod
    def of(fix: tuple[str, ...] = (), forbid: tuple[str, ...] = ()) -> Words:
        """From words of a plan's line, one or several at once: tp8, tp8+sp, cp2:ring, pp4:zb_h1/8mb, zero1,
        recompute:full, bf16, 8mb, offload:cpu, order:pp,tp,cp,dp_shard,dp_replicate; an axis alone (cp, sp,
        recompute, pp) to forbid it. Raises UsageError."""
        fixed: Stated = []
        for word in _single(fix, "fix"):
            pairs = _read(word, "fix")
            if any(value is None for _, value in pairs):
                raise UsageError(f"--fix {word}: which? e.g. {_example(word)}", key="fix")
            fixed += pairs
        forbidden: Stated = []
        for word in _single(forbid, "forbid"):
            pairs = _read(word, "forbid")
            if len(pairs) > 1:
                ways = " or ".join(_written(*pair) for pair in pairs if pair[0] in _ALONE)
                raise UsageError(f"--forbid {word}: one thing a word: {ways}", key="forbid")
            forbidden += pairs
        return Words(tuple(fixed), tuple(forbidden))

    def admit(self, name: str, value: object) -> bool:
        """Whether a field may hold this."""
        if not self.fixed and not self.forbidden:
            return True
        on = value not in (1, False, "none", None, DEFAULT_ORDER)
        if any(f == name and not (on if v is None else v == value) for f, v in self.fixed):
            return False
        return not any(f == name and (on if v is None else v == value) for f, v in self.forbidden)

    def only(self, name: str) -> str | None:
        """What is fixed of a field of which a plan has one; None where nothing is. Raises UsageError for two,
        or for one that is forbidden."""
        stated = [v for f, v in self.fixed if f == name]
        shown = [",".join(v) if isinstance(v, tuple) else str(v) for v in dict.fromkeys(stated)]
        if len(shown) > 1:
            text = (
                f"{' and '.join(shown)} are both asked for: a plan has one {_SAID.get(name, name)}"
            )
            raise UsageError(text, key="fix")
        if stated and not self.admit(name, stated[0]):
            raise UsageError(
                f"{_SAID.get(name, name)} {shown[0]} is fixed and forbidden", key="fix"
            )
        return shown[0] if shown else None


def _single(words: Iterable[str], key: str) -> Iterator[str]:
    """The words one by one, where several stand in one."""
    for some in words:
        if not some.split():
            raise UsageError(f"--{key} is empty: a word of a plan's line, e.g. tp8", key=key)
        yield from some.replace("·", ".").split()


def _read(word: str, key: str) -> Stated:
    """The fields that a word of a plan's line states. Raises UsageError with what may be meant."""
    found = _alone(word) or _of_axis(word)
    if found is None:
        raise UsageError(f"--{key} {word}: no word of a plan{_meant(word)}", key=key)
    wrong = next((pair for pair in found if pair[1] == 0 and pair[0] != "zero"), None)
    if wrong is not None:
        raise UsageError(f"--{key} {word}: 1 or more", key=key)
    return found


def _alone(word: str) -> Stated | None:
    """Of a word that is no axis."""
    if word in ("sp", "recompute", "split", "offload", "order"):
        return [(word, True if word == "sp" else None)]
    if found := re.fullmatch(r"(\d+)mb", word):
        return [("num_microbatches", int(found[1]))]
    if found := re.fullmatch(r"zero([0-3])", word):
        return [("zero", int(found[1]))]
    if word in CHOICES["precision", "dtype"]:
        return [("dtype", word)]
    name, _, rest = word.partition(":")
    for field in _EACH:
        if name == field and rest in _choices(field):
            return [(field, rest)]
    if name == "order":
        return [("order", Plan.parse(word).mesh.order)]
    if found := _HYBRID.fullmatch(word):
        return [
            ("method", "hybrid"),
            ("ulysses", int(found[1])),
            ("cp", int(found[1]) * int(found[2])),
        ]
    if word in CHOICES["context", "method"]:
        return [("method", word)]
    found = re.fullmatch(r"(\w+?)x(\d+)", word)
    if found and is_schedule(found[1]) and not is_schedule(word):
        return [("schedule", found[1]), ("virtual", int(found[2]))]
    return [("schedule", word)] if is_schedule(word) else None


def _of_axis(word: str) -> Stated | None:
    """Of an axis, with what the line writes behind it: cp4:hybrid2x2, dp_shard4.zero3, pp2:1f1b/8mb."""
    found = _AXIS.fullmatch(word)
    if not found:
        return None
    axis, size, sp, rest, count = found.groups()
    behind = _alone(rest) if rest else []
    if behind is None or (count and axis != "pp"):
        return None
    axis = "groups" if axis == "split" else axis  # split alone is of layers too
    pairs: Stated = [(axis, int(size) if size else None)]
    pairs += [("sp", True)] if sp else []
    pairs += [pair for pair in behind if pair not in pairs]
    return pairs + ((_alone(count) or []) if count else [])


def _choices(field: str) -> tuple[str, ...]:
    return CHOICES[field, "mode" if field == "recompute" else "to"]


def _known() -> list[str]:
    """Words to compare another with."""
    each = [f"{field}:{choice}" for field in _EACH for choice in _choices(field)]
    rest = ["8mb", "tp8+sp", "sp", *(f"zero{i}" for i in range(4))]
    names = (*CHOICES["context", "method"], *CHOICES["precision", "dtype"], *SCHEDULES)
    return [*AXES, *each, *rest, *names]


def _meant(word: str) -> str:
    """What a word that no plan has may stand for."""
    stated = re.fullmatch(r"\w+\.(\w+=.*)", word)
    bare = re.sub(r"[\s=:'\"-]", "", (stated[1] if stated else word).lower())
    if bare != word and (_alone(bare) or _of_axis(bare)):
        return f"; did you mean '{bare}'?"
    if stated:
        return f": the search has no such choice; --plan judges a plan with {word}"
    told = word.lower().partition(":")[2] or word.lower()
    for field in _EACH:
        if told in _choices(field) and told != "none":
            return f"; did you mean '{field}:{told}'?"
    if told != word.lower() and _alone(told):
        return f"; did you mean '{told}'?"
    near = nearest_name(word, _known())
    example = "e.g. tp8, cp, zero1, zb_h1, recompute:full"
    return f"; did you mean '{near}'?" if near else f"; {example}"


def _example(word: str) -> str:
    """A word that says which."""
    axis = word.partition("+")[0].partition(":")[0]
    own = {
        "recompute": "recompute:full",
        "offload": "offload:cpu",
        "split": "--plan with pipeline.split=...",
    }
    order = f"order:{','.join(DEFAULT_ORDER)}"
    return {**own, "order": order}.get(axis, f"{axis}2")


def _written(name: str, value: object) -> str:
    """A field as a word."""
    if name in ("method", "schedule", "dtype"):
        return str(value)
    if name in _EACH:
        return f"{name}:{value}"
    own = {"num_microbatches": f"{value}mb", "sp": "sp", "groups": f"split{value}"}
    return own.get(name, name if value is None else f"{name}{value}")
