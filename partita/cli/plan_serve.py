"""`partita plan --serve`: the best plan to serve a model on a cluster, or the prediction of one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import typer

from partita.base.errors import UsageError
from partita.base.text import did_you_mean
from partita.base.units import format_seconds
from partita.cli.jobs import from_words
from partita.cli.out import note, waiting, write_json, write_text
from partita.spec.cluster import Cluster
from partita.spec.plan import Plan

FP32 = re.compile(r"\bfp32\b", re.IGNORECASE)
NEAR = 16  # tokens of a sequence of a job that only says its model and cluster


@dataclass(frozen=True)
class ServeOptions:
    """What `plan --serve` is told; None: its default."""

    prompt_len: int | None = None
    output_len: int | None = None
    concurrency: int | None = None
    max_ttft: float | None = None
    max_itl: float | None = None
    max_batch_tokens: int | None = None
    server: str | None = None

    @property
    def stated(self) -> list[str]:
        """Names of those that were given."""
        return [name for name, value in vars(self).items() if value is not None]

    def require(self) -> None:
        """Raises UsageError for limits that are no time."""
        for name, value in (("max_ttft", self.max_ttft), ("max_itl", self.max_itl)):
            if value is not None and not value > 0:
                text = f"--{name.replace('_', '-')} {value:g}: seconds above 0 are wanted"
                raise UsageError(text, key=name)


def hold_apart(serve: bool, options: ServeOptions, of_training: Mapping[str, Any]) -> None:
    """Raises UsageError where options of a server and of a training job stand together."""
    if not serve and options.stated:
        name = options.stated[0].replace("_", "-")
        raise UsageError(f"--{name} is of a server: it goes with --serve", key=options.stated[0])
    for name, value in of_training.items():
        if serve and value:
            text = f"--{name.replace('_', '-')} is of a training job: it does not go with --serve"
            raise UsageError(text, key=name)


def answer_of_server(
    words: list[str], line: str | None, options: ServeOptions, goal: str, top: int, precision: str,
    budget: float, json: bool,
) -> None:  # fmt: skip
    """Writes the best plans, or what becomes of `line`; exits with 1 where none does, and looks no longer
    than `budget` seconds for what would."""
    from partita.planner.serving.search import BATCH_TOKENS, Wanted
    from partita.simulate.serving.predict import Asked, Load
    from partita.simulate.serving.works import SERVERS

    options.require()
    name = options.server or "partita"
    if name not in SERVERS:
        raise UsageError(f"no server '{name}'{did_you_mean(name, list(SERVERS))}", key="server")
    job = from_words(words, None, {"global_batch_size": 1, "seq_len": NEAR})
    most = job.model.max_seq_len
    output = options.output_len or min(256, max(most // 4, 1))
    prompt = options.prompt_len or min(1024, max(most - output, 1))
    load = Load(prompt, output, options.concurrency or 16)
    dtype = _dtype(line, precision, job.cluster)
    sizes = (options.max_batch_tokens,) if options.max_batch_tokens else BATCH_TOKENS
    wanted = Wanted(
        "throughput" if goal == "time" else goal, options.max_ttft, options.max_itl, sizes
    )
    asked = Asked(job.model, job.cluster, load, dtype, SERVERS[name])
    if line is None:
        _search(asked, wanted, top, budget, json)
    else:
        _judge(asked, wanted, Plan.parse(line), budget, json)


def _dtype(line: str | None, precision: str, cluster: Cluster) -> str:
    """What the line or the option says, else 16 bits where the device is faster in them. Raises UsageError
    where they differ."""
    stated = Plan.parse(line).precision.dtype if line else "fp32"
    if stated == "fp32" and not FP32.search(line or ""):
        stated = ""
    if stated and precision and stated != precision:
        text = f"--precision {precision} and the plan's {stated} differ: state one of them"
        raise UsageError(text, key="precision")
    if stated or precision:
        return stated or precision
    return "bf16" if cluster.peak("bf16") > cluster.peak("fp32") else "fp32"


def _search(asked: Any, wanted: Any, top: int, budget: float, json: bool) -> None:
    from partita.planner.serving.search import of_each_plan, search
    from partita.planner.serving.why import counts, document, ranked, why, would_do

    with waiting("plan --serve  predicting every plan", quiet=json):
        found = search(asked, wanted)
    plans = of_each_plan(found.plans)[:top]
    texts = why(found, wanted) if plans else would_do(asked, wanted, found, budget)
    if json:
        write_json(document(plans, found, texts))
    else:
        write_text("\n".join([*([ranked(plans)] if plans else []), counts(found), *texts]))
    if not plans:
        note(f"partita: {texts[0]}")
        raise typer.Exit(1)


def _slower(wanted: Any, p: Any) -> str:
    name = wanted.late(p)
    first = name == "max-ttft"
    what = "the first token comes after" if first else "a token comes every"
    took, most = (p.rates.ttft_s, wanted.max_ttft_s) if first else (p.rates.itl_s, wanted.max_itl_s)
    return f"{what} {format_seconds(took)}, --{name} allows {format_seconds(most)}"


def _judge(asked: Any, wanted: Any, plan: Plan, budget: float, json: bool) -> None:
    from partita.planner.serving.search import FoundServing
    from partita.planner.serving.why import curve, curve_table, document, would_do
    from partita.simulate.serving.predict import predict
    from partita.simulate.serving.told import told

    every = [
        predict(replace(asked, load=replace(asked.load, max_batch_tokens=n)), plan)
        for n in wanted.batch_tokens
    ]
    fits = [p for p in every if p.rates is not None]
    kept = [p for p in fits if not wanted.late(p)]
    best = min(kept or fits, key=wanted.key, default=every[0])
    texts = []
    if not kept:
        texts = [_slower(wanted, best) if fits else best.problems[0].message]
        if not fits and best.problems[0].room == "memory":
            texts += would_do(asked, wanted, FoundServing(too_big=[best]), budget)[1:]
    if json:
        alone = FoundServing(considered=1, plans=[best])
        if not kept:
            alone.rejected[wanted.late(best) if fits else "memory" if best.held else "plan"] = 1
        write_json(document([best], alone, texts))
    else:
        more = [curve_table(curve(best))] if fits else []
        write_text("\n".join([told(best), *more, *texts]))
    if not kept:
        note(f"partita: {best.line}: {texts[0]}")
        raise typer.Exit(1)
