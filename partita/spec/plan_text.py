"""A plan as one line, and back.

    pp4:zb_h1/16mb dp_replicate2 dp_shard4.zero3 cp2:ring tp8+sp ep8 recompute:selective bf16 offload:cpu

Words in any order; each states only the fields it names, so `section.field=value` words can say the
rest. parse(print_plan(p)) == p for every plan whose fields hold what plan_table.problems_of accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Any, get_args, get_origin, get_type_hints

from partita.base.errors import UsageError
from partita.base.text import did_you_mean
from partita.spec.plan import DEFAULT_ORDER, Plan, has_fixed_stages
from partita.spec.plan_table import (
    CHOICES,
    SCHEDULES,
    TARGETS,
    data_parallel,
    fixed_stages_problem,
    from_toml,
    is_schedule,
    problems_of,
    spelled,
    to_toml,
)

__all__ = ["from_toml", "parse", "print_plan", "slug", "to_toml"]

MAX_LINE = 10_000
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_WORD = re.compile(rf'(?:{_QUOTED}|[^\s"])+')
_ASSIGNMENT = re.compile(r"\w+\.\w+=.*", re.DOTALL)
_DP = re.compile(r"dp(\d+)(?:\.zero(\d+))?")
_SECTIONS: dict[str, type[Any]] = {f.name: type(getattr(Plan(), f.name)) for f in fields(Plan)}


@dataclass
class _Given:
    """The fields that a line states, and the word that stated each."""

    line: str
    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    words: dict[tuple[str, str], str] = field(default_factory=dict)

    def set(self, word: str, section: str, name: str, value: Any) -> None:
        """States a field. Raises UsageError if another word did."""
        place = (section, name)
        if place in self.words:
            other = self.words[place]
            twice = f"and '{other}' both set {section}.{name}: leave one out"
            twice = "stands twice" if other == word else twice
            raise _error(self.line, word, twice, quote=True)
        self.values[place], self.words[place] = value, word


def _error(line: str, word: str, why: str, *, quote: bool = False) -> UsageError:
    shown = line if len(line) <= 200 else line[:200] + "..."
    lead = f"'{word[:80]}' {why}" if quote else f"'{word[:80]}': {why}"
    return UsageError(f"plan '{shown}': {lead}", key=word[:80])


def parse(line: str) -> Plan:
    """The plan of a line. Raises UsageError that names the word, the rule and what is near."""
    text = _plain(line)
    given = _Given(line)
    later: list[tuple[str, int]] = []
    for match in _WORD.finditer(text):
        for word in spelled(match.group()):
            _read_word(given, word, later)
    for word, size in later:  # what dp<n> means depends on the other words
        for (section, name), value in data_parallel(size, given.values).items():
            given.set(word, section, name, value)
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    for (section, name), value in given.values.items():
        sections[section][name] = value
    plan = Plan(**{name: make(**sections[name]) for name, make in _SECTIONS.items()})
    found = problems_of(plan) + fixed_stages_problem(given.values)
    if found:
        section, _, name = found[0][0].partition(".")
        word = given.words.get((section, name)) or given.words.get(
            ("context", "method"), found[0][0]
        )
        raise _error(line, word, "; ".join(f"{key}: {message}" for key, message in found))
    return plan


def _plain(line: str) -> str:
    """The line with the middle dot read as a dot, outside quotes."""
    if len(line) > MAX_LINE:
        raise UsageError(f"a plan line has at most {MAX_LINE} characters, this one {len(line)}")
    parts = re.split(rf"({_QUOTED})", line)
    parts[::2] = [part.replace("·", ".") for part in parts[::2]]
    for part in parts[::2]:
        if '"' in part:
            raise _error(line, part[part.index('"') :], "the quote is never closed")
        if not part.isascii():
            odd = next(c for c in part if not c.isascii())
            raise _error(
                line, odd, "a plan line is ASCII; other characters stand only in a quoted path"
            )
    return "".join(parts)


def _read_word(given: _Given, word: str, later: list[tuple[str, int]]) -> None:
    """States the fields of one word; a plain `dp<n>` waits in `later`."""
    if _ASSIGNMENT.fullmatch(word):
        return _read_assignment(given, word)
    if match := _DP.fullmatch(word):
        size = _integer(given.line, word, match[1])
        if not match[2]:
            return later.append((word, size))
        given.set(word, "data", "zero_stage", _integer(given.line, word, match[2]))
        return given.set(word, "mesh", "dp_shard", size)
    for pattern, read in _READERS:
        if match := pattern.fullmatch(word):
            return read(given, word, match)
    raise _unknown(given.line, word)


def _unknown(line: str, word: str) -> UsageError:
    """Says what was probably meant by a word, by which rule, and the line that says it."""
    from partita.spec.plan_hints import meant, near

    words = [match.group() for match in _WORD.finditer(line)]
    found = meant(word, words)
    if found is None:
        return _error(line, word, f"not understood; {near(word)}")
    said, tried = found.line.split(), 0
    while tried <= len(words) and (wrong := next((w for w in said if not _is_word(w)), None)):
        other = meant(wrong, said)
        said, tried = (other.line.split() if other else []), tried + 1
    try:
        shown = " ".join(said) if parse(" ".join(said)) and said else ""
    except UsageError:  # what is left is wrong in another way
        shown = " ".join(found.words)
    return _error(line, word, found.rule + (f"; e.g. '{shown}'" if shown else ""))


def _is_word(word: str) -> bool:
    """Whether the grammar has the word, be its numbers as they may."""
    known = (_ASSIGNMENT, _DP, *(pattern for pattern, _ in _READERS))
    return all(any(p.fullmatch(w) for p in known) for w in spelled(word))


def _integer(line: str, word: str, digits: str) -> int:
    if len(digits) > 15:
        raise _error(line, word, f"{digits[:20]}... is absurd")
    return int(digits)


def _read_axis(given: _Given, word: str, match: re.Match[str]) -> None:
    """dp_replicate<n>, dp_shard<n>[.zero<k>], tp<n>[+sp], ep<n>, etp<n>, split<n>."""
    axis, digits, zero, sp = match["axis"], match["n"], match["zero"], match["sp"]
    given.set(word, "mesh", axis, _integer(given.line, word, digits))
    if zero:
        given.set(word, "data", "zero_stage", _integer(given.line, word, zero))
    if sp:
        given.set(word, "mesh", "sp", True)


def _read_pipeline(given: _Given, word: str, match: re.Match[str]) -> None:
    """pp<n>[:<schedule>[x<V>]][/<m>mb]."""
    given.set(word, "mesh", "pp", _integer(given.line, word, match["n"]))
    if match["mb"]:
        given.set(word, "pipeline", "num_microbatches", _integer(given.line, word, match["mb"]))
    name = match["schedule"]
    if not name:
        return
    quoted = re.fullmatch(rf"({_QUOTED})(?:x(\d+))?", name)
    split = re.fullmatch(r"(\w+?)x(\d+)", name)
    if quoted:
        path, stages = _unquote(given.line, word, quoted[1]), quoted[2]
        schedule = path if path.startswith("file:") else f"file:{path}"
    elif is_schedule(name) or not (split and is_schedule(split[1])):
        schedule, stages = name, None
    else:
        schedule, stages = split[1], split[2]
    if not is_schedule(schedule):
        from partita.spec.plan_hints import meant

        if meant(word, ()):
            raise _unknown(given.line, word)
        hint = did_you_mean(schedule, SCHEDULES)
        raise _error(
            given.line, word, f"no schedule '{schedule}'{hint} (a file is quoted: \"file:a.csv\")"
        )
    given.set(word, "pipeline", "schedule", schedule)
    if stages:
        given.set(word, "pipeline", "virtual_stages", _integer(given.line, word, stages))


def _read_context(given: _Given, word: str, match: re.Match[str]) -> None:
    """cp<n>[:ring|ulysses|hybrid<u>x<r>|all_gather|halo]."""
    size, method = _integer(given.line, word, match["n"]), match["method"]
    given.set(word, "mesh", "cp", size)
    if not method:
        return
    hybrid = re.fullmatch(r"hybrid(?:(\d+)x(\d+))?", method)
    if hybrid:
        if not hybrid[1]:
            raise _error(
                given.line, word, "hybrid states its degrees, e.g. cp4:hybrid2x2 (ulysses x ring)"
            )
        inner, outer = (_integer(given.line, word, hybrid[i]) for i in (1, 2))
        if inner * outer != size:
            raise _error(
                given.line, word, f"hybrid {inner}x{outer} is {inner * outer} ranks, cp is {size}"
            )
        given.set(word, "context", "ulysses", inner)
    elif method not in CHOICES["context", "method"]:
        hint = did_you_mean(method, CHOICES["context", "method"])
        raise _error(given.line, word, f"no method '{method}'{hint}")
    given.set(word, "context", "method", "hybrid" if hybrid else method)


def _read_choice(given: _Given, word: str, match: re.Match[str]) -> None:
    """recompute:<mode>, offload:<to>."""
    section, value = match["section"], match["value"]
    name = "mode" if section == "recompute" else "to"
    choices = CHOICES[section, name]
    if value in TARGETS:
        raise _unknown(given.line, word)
    if value not in choices:
        raise _error(given.line, word, f"{section} is one of {', '.join(choices)}")
    given.set(word, section, name, value)


def _read_microbatches(given: _Given, word: str, match: re.Match[str]) -> None:
    given.set(word, "pipeline", "num_microbatches", _integer(given.line, word, match["n"]))


def _read_dtype(given: _Given, word: str, match: re.Match[str]) -> None:
    given.set(word, "precision", "dtype", match.group())


def _read_order(given: _Given, word: str, match: re.Match[str]) -> None:
    given.set(word, "mesh", "order", tuple(match["axes"].split(",")))


_Reader = Callable[[_Given, str, "re.Match[str]"], None]
_READERS: tuple[tuple[re.Pattern[str], _Reader], ...] = (
    (
        re.compile(
            rf'pp(?P<n>\d+)(?::(?P<schedule>{_QUOTED}(?:x\d+)?|[^/"]+))?(?:/(?P<mb>\d+)mb)?'
        ),
        _read_pipeline,
    ),
    (
        re.compile(
            r"(?=dp_shard|[^.]*$)(?=tp|[^+]*$)"  # zero is dp_shard's, sp tp's
            r"(?P<axis>dp_replicate|dp_shard|tp|ep|etp|split)(?P<n>\d+)(?:\.zero(?P<zero>\d+))?(?P<sp>\+sp)?"
        ),
        _read_axis,
    ),
    (re.compile(r"cp(?P<n>\d+)(?::(?P<method>\w+))?"), _read_context),
    (re.compile(r"(?P<n>\d+)mb"), _read_microbatches),
    (re.compile("|".join(CHOICES["precision", "dtype"])), _read_dtype),
    (re.compile(r"(?P<section>recompute|offload):(?P<value>\w+)"), _read_choice),
    (re.compile(r"order:(?P<axes>[\w,]+)"), _read_order),
)


def _read_assignment(given: _Given, word: str) -> None:
    """section.field=value, the value read as the field's type."""
    key, _, text = word.partition("=")
    section, _, name = key.partition(".")
    if section in ("model", "train", "cluster"):
        raise _error(
            given.line, word, f"{section} is a table of the job: it stands beside the plan"
        )
    if section not in _SECTIONS:
        raise _error(
            given.line, word, f"no section '{section}'{did_you_mean(section, list(_SECTIONS))}"
        )
    hints = get_type_hints(_SECTIONS[section])
    if name not in hints:
        raise _error(
            given.line, word, f"{section} has no '{name}'{did_you_mean(name, list(hints))}"
        )
    given.set(word, section, name, _value(given.line, word, hints[name], text))


def read_field(word: str) -> tuple[str, str, Any]:
    """'pipeline.split=5,5,4,4' as ('pipeline', 'split', (5, 5, 4, 4)). Raises UsageError."""
    given = _Given(word)
    _read_assignment(given, word)
    ((section, name), value), *_ = given.values.items()
    return section, name, value


def _value(line: str, word: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is tuple:
        parts = re.findall(rf'(?:{_QUOTED}|[^,"])+', text)
        return tuple(_value(line, word, get_args(kind)[0], part) for part in parts)
    if kind is bool:
        if text not in ("true", "false"):
            raise _error(line, word, "true or false is wanted")
        return text == "true"
    if kind is str:
        return _unquote(line, word, text) if text.startswith('"') else text
    if not re.fullmatch(r"\d+", text):
        raise _error(line, word, "a whole number is wanted")
    return _integer(line, word, text)


def _unquote(line: str, word: str, quoted: str) -> str:
    try:
        return str(json.loads(quoted, strict=False))
    except ValueError:
        raise _error(line, word, "a quoted text is written as in JSON") from None


def print_plan(plan: Plan) -> str:
    """The line of a plan: axes larger than 1 with their methods, other fields that differ."""
    words, said = _axis_words(plan)
    mesh, dtype = plan.mesh, plan.precision.dtype
    if plan.recompute.mode != "none":
        words.append(f"recompute:{plan.recompute.mode}")
    if dtype != "fp32":
        words.append(dtype)
    if plan.offload.to != "none":
        words.append(f"offload:{plan.offload.to}")
    if mesh.order != DEFAULT_ORDER:
        words.append(f"order:{','.join(mesh.order)}")
    said |= {("recompute", "mode"), ("precision", "dtype"), ("offload", "to")}
    rest: list[str] = []
    for section, make in _SECTIONS.items():
        mine, default = getattr(plan, section), make()
        if section == "mesh":
            continue
        for f in fields(mine):
            value = getattr(mine, f.name)
            if (section, f.name) not in said and value != getattr(default, f.name):
                rest.append(f"{section}.{f.name}={_print_value(value)}")
    return " ".join(words + sorted(rest)) or "1mb"


def _axis_words(plan: Plan) -> tuple[list[str], set[tuple[str, str]]]:
    """The words from pp to mb, and the fields outside mesh that they state."""
    mesh, pipeline, context = plan.mesh, plan.pipeline, plan.context
    words: list[str] = []
    said = {("pipeline", "num_microbatches")}
    microbatches = f"{pipeline.num_microbatches}mb" if pipeline.num_microbatches else ""
    if mesh.pp > 1:
        name = pipeline.schedule
        name = json.dumps(name) if name.startswith("file:") else name
        stages = pipeline.virtual_stages
        times = f"x{stages}" if stages > 1 and not has_fixed_stages(name) else ""
        words.append(f"pp{mesh.pp}:{name}{times}{microbatches and '/' + microbatches}")
        said |= {("pipeline", "schedule"), ("pipeline", "virtual_stages")}
        microbatches = ""
    if has_fixed_stages(pipeline.schedule):
        said.add(("pipeline", "virtual_stages"))
    if mesh.dp_replicate > 1:
        words.append(f"dp_replicate{mesh.dp_replicate}")
    if mesh.dp_shard > 1:
        words.append(f"dp_shard{mesh.dp_shard}.zero{plan.data.zero_stage}")
        said.add(("data", "zero_stage"))
    if mesh.cp > 1:
        method = context.method
        if method == "hybrid":
            method = f"hybrid{context.ulysses}x{mesh.cp // context.ulysses}"
            said.add(("context", "ulysses"))
        words.append(f"cp{mesh.cp}:{method}")
        said.add(("context", "method"))
    if mesh.tp > 1 or mesh.sp:
        words.append(f"tp{mesh.tp}{'+sp' if mesh.sp else ''}")
    words += [
        f"{axis}{getattr(mesh, axis)}" for axis in ("ep", "etp", "split") if getattr(mesh, axis) > 1
    ]
    return words + ([microbatches] if microbatches else []), said


def _print_value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_print_value, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return (
        text
        if not isinstance(value, str) or re.fullmatch(r"\w+", text, re.ASCII)
        else json.dumps(text)
    )


def slug(plan: Plan) -> str:
    """The line with only [a-z0-9_-]; a long one, or one with a path, ends in a digest of the line."""
    line = print_plan(plan)
    text = re.sub(r"[^a-z0-9_-]+", "-", line.lower().replace(" ", "_")).strip("-")
    if len(text) <= 100 and '"' not in line:
        return text
    return f"{text[:90].rstrip('-_')}-{sha256(line.encode()).hexdigest()[:8]}"
