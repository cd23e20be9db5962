"""What a word that no plan has was meant to say: the rule it breaks, and the words that say it.

Each rule reads one word, in lower case, beside the other words of the line; what it means may change a
word beside it: `tp2 sp` is `tp2+sp`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from partita.base.text import nearest_name
from partita.spec.plan_table import ALIASES, CHOICES, SCHEDULES, TARGETS, is_schedule

EXAMPLES = {
    "pp": "pp4:1f1b/8mb",
    "dp": "dp4",
    "dp_replicate": "dp_replicate4",
    "dp_shard": "dp_shard4.zero3",
    "cp": "cp2:ring",
    "tp": "tp2+sp",
    "ep": "ep8",
    "etp": "etp2",
    "split": "split2",
    "mb": "8mb",
    "recompute": "recompute:full",
    "offload": "offload:cpu",
    "order": "order:tp,cp,dp_shard,dp_replicate,pp",
    **{dtype: dtype for dtype in CHOICES["precision", "dtype"]},
}
GRAMMAR = {
    "pp": "pp<n>[:<schedule>[x<v>]][/<m>mb]",
    "dp": "dp<n>[.zero<0-3>]",
    "dp_replicate": "dp_replicate<n>",
    "dp_shard": "dp_shard<n>[.zero<0-3>]",
    "cp": "cp<n>[:ring|ulysses|hybrid<u>x<r>|all_gather|halo]",
    "tp": "tp<n>[+sp]",
    "mb": "<m>mb",
    "recompute": "recompute:none|selective|full",
    "offload": "offload:none|cpu|nvme",
    "order": "order:<each of five axes once, innermost first>",
}
WORDS = "words are " + " ".join(dict.fromkeys(EXAMPLES.values())) + " section.field=value"
_AXIS = r"dp_replicate|dp_shard|etp|ep|pp|dp|cp|tp|split"
_SCHEDULES = {"interleaved": "interleaved_1f1b", "vpp": "interleaved_1f1b", "bfs": "looped_bfs",
              "zb": "zb_h1", "zero_bubble": "zb_h1", "zerobubble": "zb_h1"}  # fmt: skip
_DTYPES = {
    "bf16": "bfloat16 brain amp mixed bf16_mixed bf16_true mixed_precision mp autocast",
    "fp16": "float16 half f16 fp16_mixed",
    "fp32": "float32 float single f32 tf32 full_precision",
    "fp64": "float64 double f64",
    "fp8": "float8 f8 e4m3 e5m2 fp8_e4m3 hybrid",
}
_DTYPE_OF = {name: dtype for dtype, names in _DTYPES.items() for name in [dtype, *names.split()]}


@dataclass(frozen=True)
class Meant:
    """`words` in place of the word, `others` the other words of the line as they then stand. No words: they
    say nothing that a plan has."""

    rule: str
    words: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def line(self) -> str:
        """The line that was meant."""
        return " ".join([*self.others, *self.words])


_Match = re.Match[str]
_Rule = Callable[[_Match, list[str]], Meant | None]


def meant(word: str, line: Sequence[str]) -> Meant | None:
    """What `word` of the words of a line was meant to say; None where nothing known is like it."""
    others = list(line)
    if word in others:
        others.remove(word)
    low = word.lower().lstrip("-")
    for pattern, rule in _RULES:
        if (match := re.fullmatch(pattern, low)) and (found := rule(match, others)):
            return found
    return None


def near(word: str) -> str:
    """How the word that this one is most like is written; what words there are where it is like none."""
    head = re.match(r"[A-Za-z_]*", word).group()  # type: ignore[union-attr]
    lower = head.lower().rstrip("_")
    found = lower if lower in EXAMPLES else ""
    found = found or nearest_name(lower or word, list(EXAMPLES))
    if not found:
        return WORDS
    written = GRAMMAR.get(found, f"{found}<n>" if EXAMPLES[found] != found else found)
    return f"did you mean '{EXAMPLES[found]}'? it is written {written}"


def _made(rule: str, words: str | Sequence[str], others: Sequence[str]) -> Meant:
    return Meant(rule, tuple([words] if isinstance(words, str) else words), tuple(others))


def _joined(
    others: list[str], pattern: str, rule: str, make: Callable[[_Match], str]
) -> Meant | None:
    """The rule where a word of the line is what the word belongs to: `make` joins the two."""
    for i, other in enumerate(others):
        if match := re.fullmatch(pattern, other.lower()):
            return _made(rule, (), [*others[:i], make(match), *others[i + 1 :]])
    return None


def _sp(match: _Match, others: list[str]) -> Meant:
    rule = "sequence parallelism goes with tp and stands behind it, tp<n>+sp"
    found = _joined(others, r"tp(\d+)", rule, lambda m: f"tp{m[1]}+sp")
    return found or _made(rule, f"tp{match['n'] or 2}+sp", others)


def _sp_elsewhere(match: _Match, others: list[str]) -> Meant | None:
    rule = "sequence parallelism goes with tp alone, tp<n>+sp"
    found = _joined(others, r"tp(\d+)", rule, lambda m: f"tp{m[1]}+sp")
    words = [match["word"], *(() if found else ["tp2+sp"])]
    return _made(rule, words, found.others if found else others)


def _tp_sp(match: _Match, others: list[str]) -> Meant:
    return _made("sequence parallelism is joined by a plus, tp<n>+sp", f"tp{match['n']}+sp", others)


def _zero(match: _Match, others: list[str]) -> Meant:
    stage = match["k"] if match["k"] and int(match["k"]) <= 3 else "3"
    rule = "a ZeRO stage, 0 to 3, stands behind dp_shard, dp_shard<n>.zero<k>"
    found = _joined(others, r"dp(?:_shard)?(\d+)", rule, lambda m: f"dp_shard{m[1]}.zero{stage}")
    return found or _made(rule, f"dp_shard2.zero{stage}", others)


def _dp_zero(match: _Match, others: list[str]) -> Meant:
    rule = "a ZeRO stage, 0 to 3, is joined by a dot, dp_shard<n>.zero<k>"
    return _made(rule, f"dp_shard{match['n']}.zero{min(int(match['k']), 3)}", others)


def _zero_elsewhere(match: _Match, others: list[str]) -> Meant:
    rule = f"{match['axis']} has no zero stage; dp_shard has, dp_shard<n>.zero<k>"
    zero = f".zero{min(int(match['k']), 3)}"
    if match["axis"] == "dp_replicate":
        return _made(rule, f"dp_shard{match['n']}{zero}", others)
    return _made(rule, [f"{match['axis']}{match['n']}", f"dp_shard2{zero}"], others)


def _fsdp(match: _Match, others: list[str]) -> Meant:
    if match["kind"] == "ddp":
        return _made("replicas are dp_replicate<n>", f"dp_replicate{match['n'] or 2}", others)
    rule = "FSDP is dp_shard<n>.zero3; with replicas of it dp_replicate<m> dp_shard<n>.zero3"
    if match["kind"] == "hsdp":
        words = [f"dp_replicate{match['n'] or 2}", f"dp_shard{match['m'] or 2}.zero3"]
        return _made(rule, words, others)
    return _made(rule, f"dp_shard{match['n'] or 2}.zero3", others)


def _stages(match: _Match, others: list[str]) -> Meant:
    """pp2x2, pp2v2."""
    rule = "stages a rank stand behind a schedule that has several, pp<n>:<schedule>x<v>"
    return _made(rule, f"pp{_some(match['n'])}:interleaved_1f1bx{_some(match['v'])}", others)


def _stages_alone(match: _Match, others: list[str]) -> Meant:
    """x2, vpp2."""
    rule = "stages a rank stand behind a schedule that has several, pp<n>:<schedule>x<v>"
    made = f":interleaved_1f1bx{_some(match['v'])}"
    found = _joined(others, r"pp(\d+)(/\d+mb)?", rule, lambda m: f"pp{m[1]}{made}{m[2] or ''}")
    return found or _made(rule, f"pp2{made}", others)


def _pipeline(match: _Match, others: list[str]) -> Meant | None:
    """pp2/1f1b/4mb, pp2:4mb, pp2/4, pp2:4mb:1f1b: the parts in another order, or by other signs."""
    schedule, stages, microbatches = "", "", ""
    for part in re.split(r"[:/.,;_]+(?=\d+(?:mb)?(?:$|[:/.,;]))|[:/,;]+", match["rest"]):
        named = re.fullmatch(r"(\w+?)(?:x(\d+))?", part)
        if number := re.fullmatch(r"(\d+)(?:mb)?", part):
            microbatches = f"/{int(number[1]) or 1}mb"
        elif part and named and (name := _schedule_named(part)):
            schedule = f":{name}"
        elif part and named and named[2] and (name := _schedule_named(named[1])):
            schedule, stages = f":{name}", f"x{_some(named[2])}"
        elif part:
            return None
    rule = "a pipeline is written pp<n>:<schedule>/<m>mb"
    return _made(rule, f"pp{_some(match['n'])}{schedule}{stages}{microbatches}", others)


def _some(number: str) -> int:
    """The number, or two for none."""
    return int(number) or 2


def _schedule_named(word: str) -> str:
    name = word.replace("-", "_")
    bare = {s.replace("_", ""): s for s in SCHEDULES}
    name = _SCHEDULES.get(name, bare.get(name, name))
    return name if is_schedule(name) else ""


def _schedule(match: _Match, others: list[str]) -> Meant | None:
    if not (name := _schedule_named(match["name"])) or name in ("auto", "forward"):
        return None
    made = f":{name}" + (f"x{_some(match['v'])}" if match["v"] else "")
    rule = "a schedule stands behind the stages, pp<n>:<schedule>"
    found = _joined(others, r"pp(\d+)(/\d+mb)?", rule, lambda m: f"pp{m[1]}{made}{m[2] or ''}")
    return found or _made(rule, f"pp2{made}", others)


def _context(match: _Match, others: list[str]) -> Meant | None:
    """ring, and cp2.ring."""
    method = match["method"].replace("allgather", "all_gather").replace("ringattention", "ring")
    if method not in ("ring", "ulysses", "all_gather", "halo"):
        return None
    rule = "how the sequence is cut stands behind cp, cp<n>:<method>"
    if match["n"]:
        return _made(rule, f"cp{match['n']}:{method}", others)
    found = _joined(others, r"cp(\d+)", rule, lambda m: f"cp{m[1]}:{method}")
    return found or _made(rule, f"cp2:{method}", others)


def _microbatches(match: _Match, others: list[str]) -> Meant:
    rule = "microbatches are written <m>mb, the number first"
    number = match["n"] or match["m"]
    if number is None:
        return _alone("mb", rule, others)
    return _made(rule, f"{int(number) or 1}mb", others)


def _of_job(match: _Match, others: list[str]) -> Meant:
    """seq_len=128, lora."""
    name = match.group().partition("=")[0].partition(":")[0]
    keys = {
        "mbs": "train.micro_batch_size",
        "gbs": "train.global_batch_size",
        "lora": "model.lora_rank",
    }
    key = next((key for key in keys.values() if name in key), keys.get(name, "train.seq_len"))
    return _made(f"that is no part of a plan: {key} stands in the job file", (), others)


def _alone(axis: str, rule: str, others: list[str]) -> Meant:
    """An axis whose number stands apart, or nowhere."""
    for i, other in enumerate(others):
        if other.isascii() and other.isdigit() and len(other) < 8:
            rest = [*others[:i], *others[i + 1 :]]
            return _made(rule, f"{other}mb" if axis == "mb" else f"{axis}{int(other) or 1}", rest)
    return _made(rule, EXAMPLES[axis], others)


def _axis(match: _Match, others: list[str]) -> Meant:
    """TP2, tp=2, tp-2, tp."""
    axis, number = match["axis"], match["n"]
    if match.group().endswith("-1"):
        rule = "a size is stated: -1 for the ranks that are left is not filled in"
        return _made(rule, EXAMPLES[axis], others)
    rule = "a word is in lower case, its number right behind the name"
    return (
        _made(rule, f"{axis}{int(number) or 1}", others) if number else _alone(axis, rule, others)
    )


def _number(match: _Match, others: list[str]) -> Meant:
    return _made(
        "a number stands right behind its axis, tp<n>", f"tp{int(match.group()) or 1}", others
    )


def _order(_: _Match, others: list[str]) -> Meant:
    return _made("the order names each axis once, innermost first", EXAMPLES["order"], others)


def _other_system(match: _Match, others: list[str]) -> Meant | None:
    section, name = ALIASES.get(match["name"].replace("-", "_"), ("", ""))
    number = int(match["n"]) or 1
    if section == "mesh" and name in EXAMPLES:
        rule = "the name of another system; as a [plan] table it is read, in a line it is short"
        return _made(rule, f"{name}{number}", others)
    if name == "virtual_stages":
        return _stages_alone(re.fullmatch(r"(?P<v>\d+)", str(number)), others)  # type: ignore[arg-type]
    if name == "num_microbatches":
        return _made("microbatches are written <m>mb", f"{number}mb", others)
    return None


def _several(match: _Match, others: list[str]) -> Meant | None:
    """pp2,tp2 and dp2xtp2: words in one."""
    parts = re.findall(rf"(?:{_AXIS})\d+(?:\+sp)?|\d+mb", match.group())
    return _made("words stand apart, with blanks between them", parts, others)


def _sign(_: _Match, others: list[str]) -> Meant:
    return _made("words stand apart, with blanks alone between them", (), others)


def _dtype(match: _Match, others: list[str]) -> Meant | None:
    """BF16, bfloat16, fp32/bf16, bf16-mixed, fp4."""
    word = match.group().replace("-", "_")
    known = ", ".join(CHOICES["precision", "dtype"])
    if word in _DTYPE_OF:
        return _made(f"precision is one of {known}", _DTYPE_OF[word], others)
    parts = [_DTYPE_OF.get(p) for p in re.split(r"[/,+|&_]+", word)]
    if len(parts) > 1 and all(parts):
        rule = "a plan states one precision, of weights and activations; masters are fp32 by themselves"
        small = next((p for p in parts if p not in ("fp32", "fp64")), parts[0])
        return _made(rule, str(small), others)
    if re.fullmatch(r"(?:fp|int|bf|f|e|tf)\d\w*", word):
        return _made(
            f"precision is one of {known}", "fp8" if "8" in word or "4" in word else "bf16", others
        )
    return None


def _recompute(match: _Match, others: list[str]) -> Meant:
    """full, recompute=selective, activation_checkpointing."""
    mode = next((m for m in CHOICES["recompute", "mode"] if m in match.group()), "full")
    rule = "what backward makes again is recompute:selective or recompute:full"
    return _made(rule, f"recompute:{mode}", others)


def _offload(match: _Match, others: list[str]) -> Meant:
    to = "nvme" if "nvme" in match.group() or "disk" in match.group() else "cpu"
    rule = (
        "where states may lie is offload:cpu or offload:nvme, and which of them offload.targets=..."
    )
    found = [target for target in TARGETS if target[:8] in match.group()]
    which = [f"offload.targets={','.join(found)}"] if found else []
    return _made(rule, [f"offload:{to}", *which], others)


def _experts(match: _Match, others: list[str]) -> Meant:
    if match["etp"]:
        return _made(
            "words stand apart, with blanks between them",
            [f"ep{match['n']}", f"etp{match['etp']}"],
            others,
        )
    return _made("ranks that share the experts are ep<n>", f"ep{match['n'] or 8}", others)


def _auto(_: _Match, others: list[str]) -> Meant:
    rule = (
        "it stands alone, in place of a line, in a job file; `partita plan` without --plan searches"
    )
    return _made(rule, (), others)


def _single(_: _Match, others: list[str]) -> Meant:
    return _made("one rank is a plan without an axis", () if others else "1mb", others)


_WORD = rf"(?:(?:{_AXIS})\d{{1,7}}(?:\+sp)?|\d{{1,7}}mb)"
_RULES: tuple[tuple[str, _Rule], ...] = (
    (r"\+?sp(?P<n>\d{1,7})?", _sp),
    (r"\+?sequence_parallel(?P<n>)(?:=true)?", _sp),
    (rf"(?P<word>(?:{_AXIS})\d{{1,7}}[^\s+]*)\+sp", _sp_elsewhere),
    (r"tp(?P<n>\d{1,7})[-_.:,/]?(?:sp|sequence_parallel)", _tp_sp),
    (r"\.?zero[-_.=:]?(?P<k>\d)?", _zero),
    (
        r"(?P<axis>dp_replicate|[ct]p|pp|e?tp|ep|split)(?P<n>\d{1,7})[-_.:,/+]?zero[-_]?(?P<k>\d)",
        _zero_elsewhere,
    ),
    (r"(?:dp|dp_shard|fsdp)(?P<n>\d{1,7})[-_.:,/+]?z(?:ero)?[-_=]?(?P<k>\d)", _dp_zero),
    (r"(?P<kind>fsdp2?|ddp|hsdp)[-=:]?(?P<n>\d{1,7})?(?:[x*,](?P<m>\d{1,7}))?", _fsdp),
    (r"pp(?P<n>\d{1,7})[xv*](?P<v>\d{1,3})", _stages),
    (r"(?:x|v|vp|vpp)[-=:]?(?P<v>\d{1,3})", _stages_alone),
    (r"ep(?P<n>\d{1,7})[:.,/+]etp(?P<etp>\d{1,7})", _experts),
    (rf"{_WORD}(?:[,*x+/&;|.:-]?{_WORD})+", _several),
    (r"pp[-=:]?(?P<n>\d{1,7})(?P<rest>[:/,.;].+)", _pipeline),
    (r"cp(?P<n>\d{1,7})[-./_=,](?P<method>\w+)", _context),
    (r"(?:cp)?(?P<n>)(?P<method>ring|ring_?attention|ulysses|all_?gather|halo)", _context),
    (r"(?P<name>[a-z_0-9-]+?)(?:x(?P<v>\d{1,3}))?", _schedule),
    (
        r"(?:n?mb|m|ga|accum|accumulate|(?:num_)?micro_?batches)(?:[=:-]?(?P<n>\d{1,7}))?"
        r"|(?P<m>\d{1,7})(?:m|mbs|micro_?batches)",
        _microbatches,
    ),
    (r"(?:[mg]bs|(?:micro_|global_)?batch_size|seq_len|lora)[=:]?\d*", _of_job),
    (rf"(?P<axis>{_AXIS})(?:[-_=:.]?(?P<n>\d{{1,7}})(?:\.0+)?)?", _axis),
    (r"(?P<name>[a-z_-]+)[=:](?P<n>\d{1,7})", _other_system),
    (r"(?:expert|experts|moe|expert_parallel)[-_=:]?(?P<n>\d{1,7})?(?P<etp>)", _experts),
    (r"[*x+,;/|&]{1,9}", _sign),
    (r"\d{1,7}", _number),
    (r"none|single|serial", _single),
    (r"[a-z0-9_/,+|&-]+", _dtype),
    (
        r"(?:recompute|ac|(?:(?:gradient|activation)_)?checkpoint(?:ing)?)(?:[=:._-]?\w+)?|selective|full",
        _recompute,
    ),
    (r"offload.*|(?:cpu|nvme|disk)(?:_offload(?:ing)?)?", _offload),
    (r"order.*", _order),
    (r"auto", _auto),
)
