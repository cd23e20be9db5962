"""ZeRO stage 3 over any list of nn.Module blocks (Rajbhandari et al. 2020), by calls around each block.

    sharded = ShardedModules(blocks, context)               whose plan has dp_shard<n>
    optimizer = torch.optim.Adam(sharded.parameters())      any optimizer that is element-wise
    sharded(x).sum().backward(); sharded.finish(); sharded.clip_grad_norm(1.0)
    optimizer.step(); optimizer.zero_grad()

Parameters of a block lie in flat units, whose memory is there while a block that uses them runs: one for
each dtype, for what is trained and what is frozen, and for what several blocks share (tied weights). Each
rank stores one flat shard a unit, and its optimizer sees the trained; gradients are *summed* over the ranks.
Between uses a parameter reads NaN in its shape; inside `with sharded.whole()` all are there, to be saved.
Buffers (BatchNorm's statistics) are each rank's own, of its own samples. What a block draws (dropout) is
drawn from the seed, its rank, the block and the call (draws.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from partita.base.errors import UsageError
from partita.comm.context import Context
from partita.comm.protocol import Comm, Handle
from partita.parallel.backward_call import Passed
from partita.parallel.draws import drawing
from partita.parallel.equal_start import hold_alike


@dataclass(eq=False)
class _Unit:
    """Parameters that come and go together; `first` of the blocks that use them is the last in backward."""

    parameters: list[nn.Parameter]
    first: int
    flat: Tensor
    shard: nn.Parameter
    under_way: Handle | None = None
    held: set[int] = field(default_factory=set)  # blocks that it is there for


class ShardedModules:
    """Sends, on `comm`: an all_gather of a unit's shard before a block's forward and before its backward, a
    reduce_scatter of its gradient, if it is trained, behind the backward of the first block that uses it.
    `prefetch` blocks are gathered ahead. Each block takes and returns one tensor. All ranks hand in equal
    parameters: their digests are compared (16 bytes a rank, once). `comm` may be the Context, for its ranks
    of dp_shard. `calls` is the number of calls, which what is drawn depends on. Raises UsageError where ranks
    begin unlike, or a block returns no tensor."""

    def __init__(
        self, blocks: Sequence[nn.Module], comm: Comm | Context, prefetch: int = 1, seed: int = 0
    ) -> None:
        if isinstance(comm, Context):
            comm = _shards_of(comm)
        self.blocks, self.comm, self.prefetch = list(blocks), comm, prefetch
        self.seed, self.calls = seed, 0
        named = [
            (f"block {i}: {n}", p) for i, b in enumerate(blocks) for n, p in b.named_parameters()
        ]
        hold_alike(comm, named, "modules.parameters:compare")
        users: dict[nn.Parameter, list[int]] = {}
        for at, block in enumerate(self.blocks):
            for p in block.parameters():
                users.setdefault(p, []).append(at)
        alike: dict[tuple[object, ...], list[nn.Parameter]] = {}
        for p, at in users.items():
            alike.setdefault((*at, p.dtype, p.requires_grad), []).append(p)
        self.units = [self._cut(found, users[found[0]][0]) for found in alike.values()]
        self._of: list[list[_Unit]] = [[] for _ in self.blocks]
        for unit in self.units:
            for at in users[unit.parameters[0]]:
                self._of[at].append(unit)
        self._due: list[_Unit] = []  # whose gradient a backward is to bring

    def _cut(self, parameters: list[nn.Parameter], first: int) -> _Unit:
        size = sum(p.numel() for p in parameters)
        each = -(-size // self.comm.size)
        flat = parameters[0].new_zeros(each * self.comm.size).detach()
        start = 0
        for p in parameters:
            place = flat[start : start + p.numel()].view(p.shape)
            place.copy_(p.detach())
            p.data = place
            start += p.numel()
        mine = flat[self.comm.rank * each : (self.comm.rank + 1) * each].clone()
        flat.untyped_storage().resize_(0)
        _hide(parameters)
        shard = nn.Parameter(mine, requires_grad=parameters[0].requires_grad)
        return _Unit(parameters, first, flat, shard)

    def parameters(self) -> Iterator[nn.Parameter]:
        """One flat shard a unit that is trained: what an optimizer updates."""
        return (u.shard for u in self.units if u.shard.requires_grad)

    def __call__(self, x: Tensor) -> Tensor:
        """All blocks in a row."""
        if torch.is_grad_enabled():
            self._due += [u for u in self.units if u.shard.requires_grad]
        for at, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and x.requires_grad:
                x = Passed.apply(x, partial(self.backward_done, at))  # type: ignore[assignment]
            self._bring(range(at, min(at + 1 + self.prefetch, len(self.blocks))))
            x = self._run(at, block, x)
            self._free(at)
            if torch.is_grad_enabled():
                x = Passed.apply(x, partial(self.backward_begins, at))  # type: ignore[assignment]
        self.calls += 1
        return x

    def _run(self, at: int, block: nn.Module, x: Tensor) -> Tensor:
        rank = self.comm.ranks[self.comm.rank]
        with drawing(self.seed, "rank", rank, "call", self.calls, "block", at, device=x.device):
            try:
                y = block(x)
            except RuntimeError as error:
                if "is being modified inplace" not in str(error):
                    raise
                text = (
                    f"rank {rank}: block {at} ({type(block).__name__}) changes its input in place"
                )
                raise UsageError(f"{text}; give it inplace=False, or make a copy first") from error
        if not isinstance(y, Tensor):
            raise UsageError(
                f"rank {rank}: block {at} ({type(block).__name__}) returned a {type(y).__name__}; each block "
                "takes one tensor and returns one"
            )
        return y

    def backward_begins(self, at: int) -> None:
        """The block's parameters are there again; those before it on their way."""
        self._bring(range(at, max(at - 1 - self.prefetch, -1), -1))

    def backward_done(self, at: int) -> None:
        """Sums the gradients that are whole now into this rank's shards, and lets go of both."""
        self._reduce(u for u in self._due if u.first == at)
        self._free(at)

    def finish(self) -> None:
        """Behind backward: blocks whose input has no gradient are done too."""
        self._reduce(reversed(self._due))
        self._due.clear()
        for at in range(len(self.blocks)):
            self._free(at)

    def clip_grad_norm(self, most: float) -> Tensor:
        """The 2-norm of the whole gradient, behind `finish`; where it is more than `most`, gradients are
        scaled as torch's clip_grad_norm_ does. Sends one all_reduce of one number."""
        grads = [s.grad for s in self.parameters() if s.grad is not None]
        mine = sum((g.double().square().sum() for g in grads), torch.zeros((), dtype=torch.float64))
        place = next((u.flat.device for u in self.units), mine.device)
        norm = self.comm.all_reduce(mine.to(place), site="modules.norm:reduce_from").sqrt()
        for g in grads:
            g.mul_((most / (norm + 1e-6)).clamp(max=1.0).to(g.dtype))
        return norm

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All parameters are there, as the shards have them: to be looked at, and saved by `state_dict`.
        Sends one all_gather a unit, so every rank enters it; what is changed inside is lost."""
        for at in range(len(self.blocks)):
            self._bring(range(at, at + 1))
        try:
            yield
        finally:
            for at in range(len(self.blocks)):
                self._free(at)

    def _reduce(self, units: Iterable[_Unit]) -> None:
        for unit in dict.fromkeys(units):
            self._due.remove(unit)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in unit.parameters]
            whole = torch.cat([g.reshape(-1) for g in grads])
            whole = nn.functional.pad(whole, (0, unit.flat.numel() - whole.numel()))
            mine = self.comm.reduce_scatter(whole, site=f"modules.{unit.first}:scatter")
            shard = unit.shard
            shard.grad = mine if shard.grad is None else shard.grad.add_(mine)
            for p in unit.parameters:
                p.grad = None

    def _bring(self, order: range) -> None:
        for at in order:
            for unit in self._of[at]:
                if not unit.held:
                    flat, shard = unit.flat, unit.shard.detach()
                    flat.untyped_storage().resize_(flat.numel() * flat.element_size())
                    _show(unit.parameters, flat)
                    site = f"modules.{unit.first}:gather"
                    unit.under_way = self.comm.start_all_gather(shard, site=site, out=flat)
                unit.held.add(at)
        for unit in self._of[order[0]]:
            if unit.under_way is not None:
                unit.under_way.wait()
                unit.under_way = None

    def _free(self, at: int) -> None:
        for unit in self._of[at]:
            unit.held.discard(at)
            if not unit.held:
                if unit.under_way is not None:  # nobody came to use it
                    unit.under_way.wait()
                    unit.under_way = None
                unit.flat.untyped_storage().resize_(0)
                _hide(unit.parameters)


def _show(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Each parameter is its place in the flat unit."""
    start = 0
    for p in parameters:
        p.data = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()


def _hide(parameters: Sequence[nn.Parameter]) -> None:
    """Whose memory is gone: one NaN that has its shape. Reading what is freed would end the process."""
    for p in parameters:
        p.data = p.data.new_full((), torch.nan).expand(p.shape)


def _shards_of(context: Context) -> Comm:
    """Its ranks of dp_shard. Raises UsageError where its plan has none, and would train each rank alone."""
    if context.mesh.sizes["dp_shard"] == 1 and context.world.size > 1:
        raise UsageError(
            f"the plan {context.plan} cuts no parameters: hand in a Context of one with dp_shard, e.g. "
            f"local({context.world.size}, 'dp_shard{context.world.size}.zero3')"
        )
    return context.comm("dp_shard")
