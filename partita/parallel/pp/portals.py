"""Tensors from any stage to any later one, straight (the portals of torchgpipe, Kim et al. 2020, arXiv
2004.09910).

    stage 0            stage 1            stage 2
    token ──►  Send ──► token  ──► ... ──►  Receive ──► token
    skip  ──►   │                             │   ──►  skip
                └──────────── skip ──────────►┘                 forward, within F of either stage
                ◄───────── its gradient ──────┘                 backward, within their B or I

What stages hand over one to the next is a token, a row a wire: shape and type of what the wire carries, which
may be others in every microbatch. It orders F behind F and B behind B, so that every schedule which can run
without portals can run with them, as sends wait for nobody. A tensor that needs no gradient (a label) sends
none back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partita.comm.protocol import Comm, Handle, Key
from partita.schedule.ir import Schedule

DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
DIMS = 8
ROW = 3 + DIMS  # of a token: dtype, whether its gradient comes back, how many dims, dims


@dataclass(frozen=True)
class Wire:
    """A tensor that stage `source` makes and the later stage `target` uses, under one name at both."""

    name: str
    source: int
    target: int

    def __str__(self) -> str:
        return f"{self.name} {self.source}->{self.target}"


@dataclass
class Portal:
    """One end, or both, of the wire that is the token's row `at`. Communicates the tensor on `down` and its
    gradient on `up`; nothing where both stages lie on one rank. Sites '<stage>.<name>:send'."""

    at: int
    wire: Wire
    schedule: Schedule
    down: Comm
    up: Comm
    device: torch.device
    _here: dict[Key, Tensor] = field(default_factory=dict)  # both ends lie on this rank
    _sent: list[Handle] = field(default_factory=list)

    @staticmethod
    def refuses(x: Tensor) -> str:
        """Why a tensor cannot be sent; '' where it can."""
        if x.is_sparse or x.layout != torch.strided:
            return "what is sent is dense: .to_dense()"
        if x.dtype not in DTYPES:
            return f"types sent are {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
        return f"what is sent has at most {DIMS} dims" if x.dim() > DIMS else ""

    def send(self, token: Tensor, x: Tensor, microbatch: int) -> Tensor:
        """The token behind the send of x, which is not refused; its backward waits for x's gradient."""
        return _Send.apply(token, x, self, microbatch)  # type: ignore[return-value]

    def receive(self, token: Tensor, microbatch: int) -> tuple[Tensor, Tensor]:
        """The token behind the receive, and the tensor; its backward sends the gradient."""
        return _Receive.apply(token, self, microbatch)  # type: ignore[return-value]

    def settle(self) -> None:
        """Waits until all that was sent has arrived."""
        for handle in self._sent:
            handle.wait()
        self._sent.clear()

    def put(self, token: Tensor, x: Tensor, wanted: bool, microbatch: int) -> Tensor:
        """x goes down the wire; the token that tells of it. `wanted`: whether its gradient is waited for."""
        told = [DTYPES.index(x.dtype), int(wanted), x.dim(), *x.shape]
        token = token.clone()
        token[self.at, : len(told)] = torch.tensor(told, dtype=token.dtype)
        self._hand("F", x.detach(), microbatch)
        return token

    def get(self, token: Tensor, microbatch: int) -> tuple[Tensor, bool]:
        """What comes down, and whether its gradient is waited for."""
        kind, wanted, dims, *shape = map(int, token[self.at].tolist())
        like = torch.empty(shape[:dims], dtype=DTYPES[kind], device=self.device)
        return self._take("F", like, microbatch), bool(wanted)

    def give_back(self, gradient: Tensor, microbatch: int) -> None:
        """The gradient goes up."""
        self._hand("B", gradient, microbatch)

    def take_back(self, like: Tensor, microbatch: int) -> Tensor:
        """The gradient that comes up."""
        return self._take("B", like, microbatch)

    def _ends(self, what: str) -> tuple[int, int, Comm]:
        down = what == "F"
        source, target = (self.wire.source, self.wire.target)[:: 1 if down else -1]
        return source, target, self.down if down else self.up

    def _hand(self, what: str, x: Tensor, microbatch: int) -> None:
        source, target, comm = self._ends(what)
        key = Key(what, target, microbatch)
        to = self.schedule.rank_of(target, microbatch)
        if to == self.schedule.rank_of(source, microbatch):
            self._here[key] = x
        elif x.numel():
            site = f"{source}.{self.wire.name}:send"
            self._sent.append(comm.send(x.contiguous(), to, key=key, site=site))

    def _take(self, what: str, like: Tensor, microbatch: int) -> Tensor:
        source, target, comm = self._ends(what)
        key = Key(what, target, microbatch)
        rank = self.schedule.rank_of(source, microbatch)
        if rank == self.schedule.rank_of(target, microbatch):
            return self._here.pop(key)
        if not like.numel():
            return like
        site = f"{source}.{self.wire.name}:send"
        return comm.receive(like, rank, key=key, site=site).wait()


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token: Tensor, x: Tensor, portal: Portal, microbatch: int) -> Tensor:
        ctx.portal, ctx.microbatch, ctx.meta = portal, microbatch, (x.shape, x.dtype, x.device)
        return portal.put(token, x, ctx.needs_input_grad[1], microbatch)

    @staticmethod
    def backward(ctx, dtoken: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        if not ctx.needs_input_grad[1]:
            return dtoken, None, None, None
        shape, dtype, device = ctx.meta
        like = torch.empty(shape, dtype=dtype, device=device)
        return dtoken, ctx.portal.take_back(like, ctx.microbatch), None, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token: Tensor, portal: Portal, microbatch: int) -> tuple[Tensor, Tensor]:
        ctx.portal, ctx.microbatch = portal, microbatch
        x, ctx.wanted = portal.get(token, microbatch)
        if not ctx.wanted:
            ctx.mark_non_differentiable(x)
        return token.view_as(token), x

    @staticmethod
    def backward(ctx, dtoken: Tensor, dx: Tensor) -> tuple[Tensor, None, None]:
        if ctx.wanted:
            ctx.portal.give_back(dx, ctx.microbatch)
        return dtoken, None, None


class Adds(torch.autograd.Function):
    """The token, whose backward starts the loss's own with 1: a loss may arise on any stage."""

    @staticmethod
    def forward(ctx, token: Tensor, loss: Tensor) -> Tensor:
        """The token as it is."""
        ctx.like = loss
        return token.view_as(token)

    @staticmethod
    def backward(ctx, dtoken: Tensor) -> tuple[Tensor, Tensor]:
        """1 for the loss, whatever comes for the token."""
        return dtoken, torch.ones_like(ctx.like)


def what_is(x: Any) -> str:
    """'float32[4, 8]' of a tensor, else the name of its type, None itself."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    return "None" if x is None else f"a {type(x).__name__}"


def wire_problems(wires: Sequence[Wire], stages: int) -> list[str]:
    """What is wrong with them, all at once."""
    found = []
    for at, wire in enumerate(wires):
        if not 0 <= wire.source < wire.target < stages:
            found.append(f"wire {wire}: goes from a stage to a later one, of 0 to {stages - 1}")
        if wire.name == "loss" or not wire.name.isidentifier():
            found.append(f"wire {wire}: a name is an identifier other than 'loss'")
        same = [w for w in wires[:at] if (w.name, w.target) == (wire.name, wire.target)]
        if same:
            found.append(
                f"wire {wire}: stage {wire.target} takes a '{wire.name}' already ({same[0]})"
            )
    return found
