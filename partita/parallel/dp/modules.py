"""ZeRO stage 3 over any list of nn.Module blocks (Rajbhandari et al. 2020), by calls around each block.

    sharded = ShardedModules(blocks, comm)
    optimizer = torch.optim.Adam(sharded.parameters())      any optimizer that is element-wise
    sharded(x).sum().backward(); sharded.finish(); optimizer.step(); optimizer.zero_grad()

A block's parameters are views of one flat buffer whose memory is there while the block runs. Each rank
stores, and its optimizer sees, one flat shard a block; gradients are *summed* over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from partita.comm.protocol import Comm, Handle
from partita.parallel.passed import Passed


class ShardedModules:
    """Sends, on `comm`: an all_gather of a block's shard before its forward and before its backward, a
    reduce_scatter of its gradient behind it. `prefetch` blocks are gathered ahead. Each block takes and
    returns one tensor. All ranks hand in equal parameters."""

    def __init__(self, blocks: Sequence[nn.Module], comm: Comm, prefetch: int = 1) -> None:
        self.blocks, self.comm, self.prefetch = list(blocks), comm, prefetch
        self.shards: list[nn.Parameter] = []
        self._flats: list[Tensor] = []
        self._under_way: dict[int, Handle] = {}
        for block in self.blocks:
            self._cut(list(block.parameters()))

    def _cut(self, parameters: list[nn.Parameter]) -> None:
        size = sum(p.numel() for p in parameters)
        each = -(-size // self.comm.size)
        flat = parameters[0].new_zeros(each * self.comm.size).detach()
        first = 0
        for p in parameters:
            place = flat[first : first + p.numel()].view(p.shape)
            place.copy_(p.detach())
            p.data = place
            first += p.numel()
        mine = flat[self.comm.rank * each : (self.comm.rank + 1) * each]
        self.shards.append(nn.Parameter(mine.clone()))
        self._flats.append(flat)
        self._free(len(self._flats) - 1)

    def parameters(self) -> Iterator[nn.Parameter]:
        """One flat shard a block: what an optimizer updates."""
        return iter(self.shards)

    def __call__(self, x: Tensor) -> Tensor:
        """All blocks in a row."""
        for at, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and x.requires_grad:
                x = Passed.apply(x, partial(self.backward_done, at))  # type: ignore[assignment]
            self._bring(range(at, min(at + 1 + self.prefetch, len(self.blocks))))
            x = block(x)
            self._free(at)
            if torch.is_grad_enabled():
                x = Passed.apply(x, partial(self.backward_begins, at))  # type: ignore[assignment]
        return x

    def backward_begins(self, at: int) -> None:
        """The block's parameters are there again; those before it on their way."""
        self._bring(range(at, max(at - 1 - self.prefetch, -1), -1))

    def backward_done(self, at: int) -> None:
        """Sums the block's gradient into this rank's shard, and lets go of both."""
        parameters, shard = list(self.blocks[at].parameters()), self.shards[at]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        whole = torch.cat([g.reshape(-1) for g in grads])
        whole = nn.functional.pad(whole, (0, self._flats[at].numel() - whole.numel()))
        mine = self.comm.reduce_scatter(whole, site=f"modules.{at}:scatter")
        shard.grad = mine if shard.grad is None else shard.grad.add_(mine)
        for p in parameters:
            p.grad = None
        self._free(at)

    def finish(self) -> None:
        """Behind backward: blocks whose input has no gradient are done too."""
        for at in range(len(self.blocks) - 1, -1, -1):
            if self._flats[at].untyped_storage().nbytes():
                self.backward_done(at)

    def _bring(self, order: range) -> None:
        for at in order:
            flat, shard = self._flats[at], self.shards[at]
            if at not in self._under_way and not flat.untyped_storage().nbytes():
                flat.untyped_storage().resize_(flat.numel() * flat.element_size())
                self._under_way[at] = self.comm.start_all_gather(
                    shard.detach(), site=f"modules.{at}:gather", out=flat
                )
        handle = self._under_way.pop(order[0], None)
        if handle is not None:
            handle.wait()

    def _free(self, at: int) -> None:
        self._flats[at].untyped_storage().resize_(0)
