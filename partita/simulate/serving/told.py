"""The prediction of serving as text and as JSON."""

from __future__ import annotations

from typing import Any

from partita.base.text import table
from partita.base.units import format_bytes, format_count, format_seconds
from partita.simulate.serving.predict import Serving

SAYS = {
    "weights": "reading weights",
    "keys": "reading keys and values",
    "compute": "products",
    "passes": "norms and other passes through memory",
    "launch": "starts of kernels on the device",
    "host": "the host that starts kernels",
    "pp": "messages between stages",
    "memory": "memory",
}


def says(cause: str) -> str:
    """A cause in words; a collective's is its axis."""
    return SAYS.get(cause, f"collectives of {cause}")


def told(p: Serving) -> str:
    """All of it; of a plan that serves nothing what is wrong."""
    lines = [f"plan    {p.line}"]
    lines += [f"{x.room:<8}{x.severity}: {x.message}" for x in p.problems]
    if p.rates is None:
        return "\n".join([*lines, *_memory(p)])
    r, load = p.rates, p.asked.load
    engines = f"{p.engines} engines of " if p.engines > 1 else ""
    lines += [
        f"load    {load.concurrency} requests at once, prompts of {load.prompt_len} tokens, answers of "
        f"{load.output_len}; {engines}{p.plan.world_size // p.engines} ranks, steps of at most "
        f"{load.max_batch_tokens} tokens",
        f"first   token after {format_seconds(r.ttft_s)}; {format_seconds(r.ttft_alone_s)} where a request "
        "is alone",
        f"then    a token every {format_seconds(r.itl_s)}; {format_seconds(r.itl_alone_s)} alone",
        f"tokens  {format_count(p.tokens_per_s or 0)}/s, {format_count(p.tokens_per_s_per_device or 0)}/s a "
        f"device; MFU {p.mfu:.1%}, {p.mbu:.0%} of the memory's rate",
        f"binds   {says(p.binds)}",
        "a step of the load, all stages",
        table(_causes(r.cycle)),
    ]
    return "\n".join([*lines, *_memory(p)])


def _causes(cycle: dict[str, float]) -> list[tuple[str, str, str]]:
    whole = sum(cycle.values())
    parts = sorted(cycle.items(), key=lambda item: -item[1])
    return [(f"  {says(n)}", format_seconds(s), f"{s / whole:.1%}") for n, s in parts]


def _memory(p: Serving) -> list[str]:
    if not p.held:
        return []
    h, load = p.fullest, p.asked.load
    left = max(p.limit_bytes - h.weights - h.step, 0)
    rows = [
        ("  weights", format_bytes(h.weights), ""),
        ("  a step", format_bytes(h.step), ""),
        (
            "  pages",
            format_bytes(left),
            f"{p.pages} of {load.page_size} tokens, {format_bytes(h.page)} each",
        ),
    ]
    requests = f"{p.most_sequences} requests of {load.tokens}"
    tokens = f"{max(p.kv_tokens, 0)} tokens, {requests}, in an engine's pages"
    return [
        f"memory of the fullest rank, {format_bytes(p.limit_bytes)}",
        table(rows),
        f"  {tokens}",
    ]


def to_json(p: Serving) -> dict[str, Any]:
    """The fields of one plan (docs: json)."""
    r, load = p.rates, p.asked.load
    number = ("ttft_s", "ttft_alone_s", "itl_s", "itl_alone_s", "requests_per_s")
    fits = r is not None
    return {
        "plan": p.line,
        "problems": [vars_of(x) for x in p.problems],
        "fits": fits,
        "server": p.asked.server.name,
        "engines": p.engines if fits else None,
        "devices": p.plan.world_size,
        "max_batch_tokens": load.max_batch_tokens,
        **{name: getattr(r, name) if r else None for name in number},
        "request_s": p.request_s if fits else None,
        "running": r.running if r else None,
        "tokens_per_s": p.tokens_per_s,
        "tokens_per_s_per_device": p.tokens_per_s_per_device,
        "mfu": p.mfu,
        "mbu": p.mbu,
        "binds": p.binds if fits else None,
        "time": dict(r.cycle) if r else {},
        "memory": _held_json(p),
    }


def _held_json(p: Serving) -> dict[str, Any]:
    known = bool(p.held)
    return {
        "limit_bytes": p.limit_bytes,
        "page_size": p.asked.load.page_size,
        "pages": p.pages if known else None,
        "kv_tokens": max(p.kv_tokens, 0) if known else None,
        "max_requests": p.most_sequences if known else None,
        "per_rank": [
            {
                "stage": h.stage,
                "ranks": h.ranks,
                "weights": h.weights,
                "step": h.step,
                "page": h.page,
            }
            for h in p.held
        ],
    }


def vars_of(problem: Any) -> dict[str, Any]:
    """A problem as every verb writes it."""
    names = ("room", "rule", "message", "asked", "limit", "nearest", "severity")
    return {name: getattr(problem, name) for name in names}
