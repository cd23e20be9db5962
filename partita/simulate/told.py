"""The answer of `simulate` as text: the step and its causes, memory by category, traffic by axis and link."""

from __future__ import annotations

from collections import Counter
from typing import Any

from partita.base.text import table
from partita.base.units import format_bytes, format_count, format_seconds
from partita.simulate.answer import spread, to_json
from partita.simulate.predict import Prediction

JOULES = 3.6e6  # of a kWh


def sureness(p: Prediction) -> str:
    """How far step times of such devices may be off (docs/validation.md)."""
    share, fitted = spread(p)
    where = (
        "published runs of such devices are" if fitted else "no published run of such a device is"
    )
    return f"{share:.0%} either way ({where} in the fit)"


def told(p: Prediction) -> str:
    """All of it; of an illegal plan its problems alone. The numbers are those of `--json`."""
    if p.step_time_s is None:
        return p.head()
    answer = to_json(p)
    lines = [p.head(), *_rates(p, answer), *_outlook(answer)]
    lines += ["time of the critical rank", table(_causes(answer["time"], p.step_time_s))]
    lines += _memory(p, answer["memory"])
    if answer["traffic"]:
        lines += ["traffic of the busiest rank", _traffic(answer["traffic"])]
    return "\n".join(lines)


def _rates(p: Prediction, answer: dict[str, Any]) -> list[str]:
    """How far the step may be off, use of the devices, tokens, and money and energy with prices."""
    low, high = (format_seconds(x) for x in answer["step_time_interval_s"])
    rate, each = (format_count(answer[k]) for k in ("tokens_per_s", "tokens_per_s_per_device"))
    lines = [
        f"        {low} to {high}: {sureness(p)}",
        f"        HFU {p.hfu:.1%}, with what runs again; of causal attention both count half",
        f"tokens  {rate}/s, {each}/s a device",
    ]
    cost = answer["cost"]
    if cost is not None:
        spent = [(cost["money_per_step"], cost["money_per_token"], cost["currency"])]
        if cost["energy_per_step_j"]:
            joules = cost["energy_per_step_j"], cost["energy_per_token_j"]
            spent.append((joules[0] / JOULES, joules[1] / JOULES, "kWh"))
        each = [
            f"{a:.4g} {unit} a step, {1e6 * b:.4g} {unit} a million tokens" for a, b, unit in spent
        ]
        lines.append(f"cost    {'; '.join(each)}")
    return lines


def _outlook(answer: dict[str, Any]) -> list[str]:
    """Uneven ranks and experts, packed documents, failures: a line for each that the question has."""
    lines = list[str]()
    if (jitter := answer["jitter"]) is not None:
        mean, p99 = (format_seconds(jitter["step_time_s"][k]) for k in ("mean", "p99"))
        lines.append(f"jitter  a step takes {mean} in the mean, {p99} at its 99th percentile")
    if (routing := answer["routing"]) is not None:
        lines.append(
            f"experts place {routing['busiest_ep']} of ep has {routing['load']:.2f} times an even share; "
            f"{routing['dropped']:.1%} of rows dropped"
        )
    if (packed := answer["packed"]) is not None:
        share, seconds = packed["attention_share"]["mean"], format_seconds(packed["step_time_s"])
        lines.append(
            f"packed  {share:.1%} of full causal attention: the first step takes {seconds}"
        )
    if (long := answer["goodput"]) is not None:
        lines.append(f"goodput {long['goodput']:.1%} of the time of a long run is work")
    return lines


def _causes(time: dict[str, Any], step_s: float) -> list[list[str]]:
    """Rows that add up to the step."""
    axes = sorted(time["exposed_comm_s"].items(), key=lambda kv: -kv[1])
    parts = [("compute", time["compute_s"]), ("bubble", time["bubble_s"])]
    parts = [(name, s if s > step_s * 1e-9 else 0.0) for name, s in parts]
    parts += [("optimizer", time["optimizer_s"]), *((f"{axis} traffic", s) for axis, s in axes)]
    return [[name, format_seconds(s), f"{s / step_s:.1%}"] for name, s in parts]


def _memory(p: Prediction, memory: dict[str, Any]) -> list[str]:
    """The fullest rank's categories at its peak, when that is, and what its device will show."""
    place = p.ledgers.index(p.fullest)
    worst, peak = p.ledgers[place], memory["per_rank"][place]["peak"]
    rows = [[k, format_bytes(v)] for k, v in worst.at_peak.items()]
    rows.append(["total", f"{format_bytes(worst.peak_bytes)} of {format_bytes(p.limit_bytes)}"])
    rows += [
        [name, " to ".join(format_bytes(x) for x in memory[key])]
        for name, key in (
            ("interval", "peak_interval_bytes"),
            ("on the device", "device_interval_bytes"),
        )
    ]
    rows += [
        [f"on the {arena}", format_bytes(memory["per_rank"][place][arena])]
        for arena in ("host", "disk")
        if memory["per_rank"][place][arena]
    ]
    when = f"{peak['during']}, {format_seconds(peak['time_s'])} into the step"
    return [f"memory of rank {worst.rank} (the fullest) at its peak, in {when}", table(rows)]


def _traffic(lines: list[dict[str, Any]]) -> str:
    """Calls and bytes by axis, operation and link, most bytes first."""
    calls, sent = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for t in lines:
        key = (t["axis"], t["op"], t["link"])
        calls[key] += t["count"]
        sent[key] += t["bytes"]
    rows = [[*key, f"{calls[key]:,}", format_bytes(n)] for key, n in sent.most_common()]
    return table(rows, header=("axis", "operation", "link", "calls", "bytes"))
