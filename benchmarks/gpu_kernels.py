"""Kernels that could take the place of those a layer runs, one beside the other on one GPU: seconds of each,
and how far apart their results are. A layer takes one where a run shows that it is quicker."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.gpu_sides import Env, reason
from partita.model.mlp import SwiGLU
from partita.parallel.sp.norm import Norm

Call = Callable[[], Tensor]


def candidates(env: Env) -> dict[str, Any]:
    """Each pair: what runs now, and what could."""
    pairs = {
        "gradient, added to fp32": gradient,
        "swiglu forward": swiglu,
        "swiglu backward": swiglu_back,
        "norm forward": norm,
    }
    found: dict[str, Any] = {}
    for name, make in pairs.items():
        try:
            found[name] = beside(env, *make(env))
        except Exception as error:  # one that is not there says so
            found[name] = {"failed": reason(error)}
    return {"candidates": found}


def beside(env: Env, now: Call, then: Call) -> dict[str, float]:
    """Median seconds, A B B A; the largest difference over the largest element."""
    first, second = now().float(), then().float()
    apart = float((first - second).abs().max() / first.abs().max().clamp(min=1e-30))
    times: dict[int, list[float]] = {0: [], 1: []}
    calls, each = (now, then), 1 if env.tiny else 10
    for turn in range(2 if env.tiny else 12):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            times[i].append(env.seconds(lambda i=i: [calls[i]() for _ in range(each)]) / each)
    return {"now_s": median(times[0][1:]), "then_s": median(times[1][1:]), "apart": apart}


def drawn(env: Env, *shape: int) -> Tensor:
    """bf16 numbers."""
    return torch.randn(shape, device=env.device).to(torch.bfloat16)


def sizes(env: Env) -> tuple[int, int, int]:
    """Tokens, hidden, ffn."""
    return (16, 32, 48) if env.tiny else (8192, 2048, 8192)


def gradient(env: Env) -> tuple[Call, Call]:
    """A product that is added, against one that adds as it is made."""
    tokens, hidden, ffn = sizes(env)
    dy, x = drawn(env, tokens, ffn), drawn(env, tokens, hidden)
    a, b = (torch.zeros(ffn, hidden, device=env.device) for _ in range(2))

    def then() -> Tensor:
        out: Any = torch.addmm(b, dy.t(), x, out_dtype=torch.float32, out=b)  # type: ignore[call-overload]
        return out

    return lambda: a.add_(dy.t() @ x), then


def swiglu(env: Env) -> tuple[Call, Call]:
    """Kernels of halves, against one that a compiler makes."""
    tokens, _, ffn = sizes(env)
    x = drawn(env, tokens, 2 * ffn)

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return silu(gate) * up

    made = torch.compile(plain)
    return lambda: SwiGLU.apply(x), lambda: made(x)  # type: ignore[return-value]


def swiglu_back(env: Env) -> tuple[Call, Call]:
    """The same backward."""
    tokens, _, ffn = sizes(env)
    x, dy = drawn(env, tokens, 2 * ffn), drawn(env, tokens, ffn)
    leaf = x.clone().requires_grad_()
    y: Any = SwiGLU.apply(leaf)

    def plain(x: Tensor, dy: Tensor) -> Tensor:
        gate, up = (t.float() for t in x.chunk(2, -1))
        s, dy = gate.sigmoid(), dy.float()
        d_gate = dy * up * s * (1 + gate * (1 - s))
        return torch.cat([d_gate, dy * gate * s], -1).to(x.dtype)

    made = torch.compile(plain)
    return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0], lambda: made(x, dy)


def norm(env: Env) -> tuple[Call, Call]:
    """Kernels of a norm, against torch's own."""
    tokens, hidden, _ = sizes(env)
    x, w = drawn(env, tokens, hidden), torch.ones(hidden, device=env.device, dtype=torch.bfloat16)

    class Weight:
        value, trains = w, False

    ours = Norm.of(Weight(), None, 1e-5)  # type: ignore[arg-type]
    return lambda: ours(x), lambda: torch.nn.functional.rms_norm(x, [hidden], w, 1e-5)
