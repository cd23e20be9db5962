"""The [plan] table of a job file, and what every field of a plan may hold.

Names of other systems (tensor_parallel_size, pipeline_model_parallel_size, ...) are read at the top of
the table; what is written uses ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from partita.base.config import decode, encode
from partita.base.errors import UsageError
from partita.base.text import did_you_mean
from partita.spec.plan import AXES, DEFAULT_ORDER, Plan, has_fixed_stages
from partita.spec.stage_costs import wrong_costs

SCHEDULES = (
    "gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "zb_h1", "zb_h2", "zb_v", "v_half", "v_min",
    "interleaved_zb", "dualpipe", "dualpipev", "chimera", "pipedream", "pipedream_2bw", "forward",
    "auto",
)  # fmt: skip
CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("data", "accumulate"): ("shard", "whole"),
    ("context", "method"): ("ring", "ulysses", "hybrid", "all_gather", "halo"),
    ("recompute", "mode"): ("none", "selective", "full"),
    ("recompute", "collectives"): ("repeat", "keep"),
    ("precision", "dtype"): ("fp64", "fp32", "bf16", "fp16", "fp8"),
    ("precision", "fp8_format"): ("hybrid", "e4m3"),
    ("precision", "fp8_granularity"): ("tensor", "row", "block"),
    ("precision", "fp8_scaling"): ("current", "delayed", "static"),
    ("precision", "rounding"): ("nearest", "stochastic"),
    ("offload", "to"): ("none", "cpu", "nvme"),
}
TARGETS = ("parameters", "gradients", "optimizer", "activations")
MODULES = ("core", "norm", "act")
RANGES: dict[tuple[str, str], tuple[int, int]] = {
    **{("mesh", axis): (1, 1_000_000) for axis in (*AXES, "ep", "etp", "split")},
    ("pipeline", "virtual_stages"): (1, 1_000),
    ("pipeline", "num_microbatches"): (1, 10_000_000),
    ("pipeline", "limit"): (0, 10_000_000),
    ("pipeline", "copies"): (1, 2),
    ("data", "zero_stage"): (0, 3),
    ("data", "prefetch"): (0, 1_000),
    ("data", "bucket_bytes"): (1, 10**15),
    ("context", "ulysses"): (1, 1_000_000),
    ("expert", "chunks"): (1, 64),
    ("recompute", "every"): (1, 1_000_000),
}
_V_NAMED = re.compile(r"v_([1-9]\d*)_([1-9]\d*)")
_MESH_ALIASES = {
    "pp": "pp pipeline_parallel_size pipeline_model_parallel_size pipeline_parallel_degree",
    "dp_replicate": "dp_replicate data_parallel_replicate_degree",
    "dp_shard": "dp_shard data_parallel_shard_degree",
    "dp": "dp data_parallel_size data_parallel_degree",
    "cp": "cp context_parallel_size context_parallel_degree",
    "tp": "tp tensor_parallel_size tensor_model_parallel_size tensor_parallel_degree",
    "ep": "ep expert_parallel_size expert_model_parallel_size expert_parallel_degree",
    "etp": "etp expert_tensor_parallel_size expert_tensor_parallel_degree",
    "split": "split",
    "sp": "sp sequence_parallel",
    "order": "order",
}
_OTHER_ALIASES = {
    ("pipeline", "num_microbatches"): "num_microbatches gradient_accumulation_steps",
    ("pipeline", "virtual_stages"): (
        "virtual_stages virtual_pipeline_parallel_size virtual_pipeline_model_parallel_size"
    ),
    ("pipeline", "schedule"): "schedule pipeline_parallel_schedule",
    ("data", "zero_stage"): "zero_stage",
}
ALIASES = {
    alias: place
    for place, names in [
        *((("mesh", axis), names) for axis, names in _MESH_ALIASES.items()),
        *_OTHER_ALIASES.items(),
    ]
    for alias in names.split()
}


def is_schedule(name: str) -> bool:
    """Whether a plan may name this schedule; `file:` and a path stand for one of the user's."""
    return name in SCHEDULES or bool(_V_NAMED.fullmatch(name)) or (
        name.startswith("file:") and len(name) > len("file:")
    )  # fmt: skip


def problems_of(plan: Plan) -> list[tuple[str, str]]:
    """(dotted key, message) for every field that holds what no plan can mean."""
    found: list[tuple[str, str]] = []
    for (section, name), (low, high) in RANGES.items():
        value = getattr(getattr(plan, section), name)
        if value is not None and not low <= value <= high:
            found.append((f"{section}.{name}", f"{value} is not within {low}..{high}"))
    for (section, name), names in CHOICES.items():
        value = getattr(getattr(plan, section), name)
        if value not in names:
            found.append((f"{section}.{name}", f"'{value}' is none of {', '.join(names)}"))
    schedule = plan.pipeline.schedule
    if not is_schedule(schedule):
        found.append(
            ("pipeline.schedule", f"no schedule '{schedule}'{did_you_mean(schedule, SCHEDULES)}")
        )
    found += wrong_costs(plan.pipeline.costs)
    if any(layers < 0 or layers > 1_000_000 for layers in plan.pipeline.split):
        found.append(
            ("pipeline.split", f"{list(plan.pipeline.split)}: a stage has 0 or more layers")
        )
    if sorted(plan.mesh.order) != sorted(DEFAULT_ORDER):
        text = f"{','.join(plan.mesh.order)} must name each of {','.join(DEFAULT_ORDER)} once"
        stated = [a for a in dict.fromkeys(plan.mesh.order) if a in DEFAULT_ORDER]
        whole = ",".join([*stated, *(a for a in DEFAULT_ORDER if a not in stated)])
        found.append(("mesh.order", f"{text}, innermost first; e.g. {whole}"))
    for key, given, known in (
        ("offload.targets", plan.offload.targets, TARGETS),
        ("recompute.modules", plan.recompute.modules, MODULES),
    ):
        found += [(key, f"no '{x}'{did_you_mean(x, known)}") for x in given if x not in known]
    cp, ulysses = plan.mesh.cp, plan.context.ulysses
    if plan.context.method == "hybrid" and ulysses > 0 and cp % ulysses:
        found.append(("context.ulysses", f"hybrid: ulysses {ulysses} does not divide cp {cp}"))
    return found


STRATEGIES = {  # torch.distributed.fsdp.ShardingStrategy
    "FULL_SHARD": ("zero3",),
    "SHARD_GRAD_OP": ("zero3", "data.reshard_after_forward=false"),
    "NO_SHARD": ("zero0",),
    "HYBRID_SHARD": ("zero3",),  # beside a dp_replicate
}


def spelled(word: str) -> tuple[str, ...]:
    """A word as this grammar has it: FSDP's strategies are zero stages.

    >>> spelled("dp_shard8.SHARD_GRAD_OP")
    ('dp_shard8.zero3', 'data.reshard_after_forward=false')
    """
    axis, _, name = word.partition(".")
    if not axis.startswith("dp") or name.upper() not in STRATEGIES:
        return (word,)
    first, *rest = STRATEGIES[name.upper()]
    return (f"{axis}.{first}", *rest)


def data_parallel(size: int, given: Mapping[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
    """What `dp<n>` means beside the fields already given: dp_shard when a zero stage or ep > 1 is
    present (zero 0 where only ep is), else dp_replicate."""
    zero, ep = ("data", "zero_stage") in given, given.get(("mesh", "ep"), 1)
    experts = isinstance(ep, int) and ep > 1
    if ("mesh", "dp_shard") in given or not (zero or experts):
        return {("mesh", "dp_replicate"): size}
    return {("mesh", "dp_shard"): size} | ({} if zero else {("data", "zero_stage"): 0})


def from_toml(table: Mapping[str, Any], *, file: str | None = None, prefix: str = "plan") -> Plan:
    """A plan from its table: sections, or the names of other systems at the top of it.

    Raises UsageError that names file, key and what is accepted."""
    sections = {f.name for f in fields(Plan)}
    raw: dict[str, Any] = {}
    given: dict[tuple[str, str], Any] = {}
    for key, value in table.items():
        if key in sections and isinstance(value, Mapping):
            given |= {(key, name): v for name, v in value.items()}
    for key, value in table.items():
        if key in ALIASES:
            if ALIASES[key] in given:
                raise UsageError(
                    f"{file + ': ' if file else ''}{prefix}.{key}: "
                    f"{'.'.join(ALIASES[key])} is given twice",
                    file=file,
                    key=f"{prefix}.{key}",
                )
            given[ALIASES[key]] = value
        elif key not in sections or not isinstance(value, Mapping):
            raw[key] = value  # decode says what is wrong with it
    if ("mesh", "dp") in given:
        given |= data_parallel(given.pop(("mesh", "dp")), given)
    for (section, name), value in given.items():
        raw.setdefault(section, {})[name] = value
    plan = decode(Plan, raw, file=file, prefix=prefix)
    found = problems_of(plan) + fixed_stages_problem(given)
    if found:
        where = f"{file}: " if file else ""
        lines = [f"{where}{prefix}.{key}: {message}" for key, message in found]
        raise UsageError("\n".join(lines), file=file, key=f"{prefix}.{found[0][0]}")
    return plan


def fixed_stages_problem(given: Mapping[tuple[str, str], Any]) -> list[tuple[str, str]]:
    """A schedule with two stages a rank by definition cannot be given another number."""
    schedule = given.get(("pipeline", "schedule"), "")
    stages = given.get(("pipeline", "virtual_stages"), 2)
    if isinstance(schedule, str) and has_fixed_stages(schedule) and stages != 2:
        return [("pipeline.virtual_stages", f"{schedule} has 2 stages a rank, not {stages}")]
    return []


def to_toml(plan: Plan) -> dict[str, dict[str, Any]]:
    """The [plan] table: every field that differs from its default, by section."""
    mine, default = encode(plan), encode(Plan())
    table = {
        section: {k: v for k, v in values.items() if v != default[section].get(k)}
        for section, values in mine.items()
    }
    if has_fixed_stages(plan.pipeline.schedule):
        del table["pipeline"]["virtual_stages"]
    return {section: values for section, values in table.items() if values}
