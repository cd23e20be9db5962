"""Each collective as rounds (shm_group): what a rank posts, what it takes.

                      bytes a rank copies in    reads from others       rounds for S bytes, B a buffer
    all_reduce, few   S                         (n - 1) S               S / B
    all_reduce, many  S (n - 1)/n, then S/n     2 S (n - 1)/n           2 S / B
    all_gather        S (its shard)             (n - 1) S               S / B
    reduce_scatter    S (n - 1)/n               S (n - 1)/n             S / B
    all_to_all        all but its own rows      as many                 largest piece / (B / n)
    broadcast         S at the root             S                       S / B

Sums go in rank order. bf16 and fp16 add up in fp32 and round once, whatever the number of ranks.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from partita.comm.protocol import Message
from partita.comm.shm_group import BUFFER_BYTES, Group, Rounds
from partita.comm.shm_segment import copy_bytes

FEW_BYTES = 128 << 10  # up to here every rank adds up everything: one meeting instead of two
_ALIGN = 64
_LOW = (torch.bfloat16, torch.float16)


def reduce_into(out: Tensor, parts: list[Tensor], largest: bool) -> None:
    """out = the sum or maximum of `parts`, in their order."""
    if largest:
        torch.maximum(parts[0], parts[1], out=out)
        for part in parts[2:]:
            torch.maximum(out, part, out=out)
    elif len(parts) == 2 or out.dtype not in _LOW:  # torch adds two bf16 in fp32 and rounds once
        torch.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            out.add_(part)
    else:
        total = parts[0].float()
        for part in parts[1:]:
            total.add_(part)
        out.copy_(total)


def all_reduce(group: Group, x: Tensor, message: Message, largest: bool) -> Rounds:
    """The plan that suits the size: two ranks, or little data, need one meeting a round."""
    size = x.numel() * x.element_size()
    few = group.size == 2 or size <= FEW_BYTES
    return (_reduce_whole if few else _reduce_shares)(group, x, message, largest)


def _reduce_whole(group: Group, x: Tensor, message: Message, largest: bool) -> Rounds:
    """Every rank posts all of x and adds up everything itself."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat, total = x.view(-1), out.view(-1)
    item, dtype, num, me = x.element_size(), x.dtype, x.numel(), group.me
    per, source = BUFFER_BYTES // item, x.data_ptr()
    members = range(group.size)

    def post(i: int, buffer: int) -> None:
        length = min(per, num - i * per) * item
        copy_bytes(group.mine(buffer, length), source + i * per * item, length)

    def take(i: int, buffer: int) -> None:
        start = i * per
        count = min(per, num - start)
        own, into = (flat, total) if count == num else (flat[start : start + count], None)
        into = total[start : start + count] if into is None else into
        parts = [own if m == me else group.view(m, buffer, dtype, 0, count) for m in members]
        reduce_into(into, parts, largest)

    return Rounds(message, max(-(-num // per), 1), post, take, out)


def _reduce_shares(group: Group, x: Tensor, message: Message, largest: bool) -> Rounds:
    """Even rounds bring each rank its share of a chunk, which it adds up; odd rounds hand the sums around."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat, total = x.view(-1), out.view(-1)
    item, dtype, num, me, n = x.element_size(), x.dtype, x.numel(), group.me, group.size
    per, source, target = BUFFER_BYTES // item, x.data_ptr(), out.data_ptr()

    def share(chunk: int, member: int) -> tuple[int, int]:
        start = chunk * per
        length = min(per, num - start)
        return start + length * member // n, start + length * (member + 1) // n

    def post(i: int, buffer: int) -> None:
        chunk = i // 2
        start, end = chunk * per, min(num, (chunk + 1) * per)
        a, b = share(chunk, me)
        at = group.mine(buffer, (end - start) * item)
        if i & 1:
            copy_bytes(at, target + a * item, (b - a) * item)
            return
        copy_bytes(at, source + start * item, (a - start) * item)
        copy_bytes(at + (b - start) * item, source + b * item, (end - b) * item)

    def take(i: int, buffer: int) -> None:
        chunk = i // 2
        if i & 1:
            for m in group.peers:
                a, b = share(chunk, m)
                copy_bytes(target + a * item, group.address(m, buffer), (b - a) * item)
            return
        a, b = share(chunk, me)
        first = (a - chunk * per) * item
        parts = [
            flat[a:b] if m == me else group.view(m, buffer, dtype, first, b - a) for m in range(n)
        ]
        reduce_into(total[a:b], parts, largest)

    count = 2 * max(-(-num // per), 1)
    return Rounds(message, count, post, take, out, alternates=True)


Block = tuple[int, int, int, int]  # rows r0:r1, columns c0:c1; whole rows, or a part of one row


def blocks(rows: int, columns: int, limit: int) -> list[Block]:
    """A rows x columns matrix cut into blocks of at most `limit` elements, contiguous in it."""
    if rows * columns == 0:
        return [(0, 0, 0, 0)]
    if columns <= limit:
        step = limit // columns
        return [(r, min(r + step, rows), 0, columns) for r in range(0, rows, step)]
    return [
        (r, r + 1, c, min(c + limit, columns)) for r in range(rows) for c in range(0, columns, limit)
    ]


def all_gather(group: Group, x: Tensor, message: Message, dim: int) -> Rounds:
    """Every rank posts its shard; all copy it to its place along dim."""
    n, item, dtype = group.size, x.element_size(), x.dtype
    shape = list(x.shape)
    rows, columns = prod(shape[:dim]), prod(shape[dim:])
    shape[dim] *= n
    out = torch.empty(shape, dtype=dtype)
    whole, source, target = out.view(rows, n, columns), x.data_ptr(), out.data_ptr()
    cut = blocks(rows, columns, BUFFER_BYTES // item)
    whole[:, group.me].copy_(x.view(rows, columns))

    def post(i: int, buffer: int) -> None:
        r0, r1, c0, c1 = cut[i]
        length = (r1 - r0) * (c1 - c0) * item
        copy_bytes(group.mine(buffer, length), source + (r0 * columns + c0) * item, length)

    def take(i: int, buffer: int) -> None:
        r0, r1, c0, c1 = cut[i]
        count = (r1 - r0) * (c1 - c0)
        for m in group.peers:
            if r1 - r0 <= 1:
                to = target + ((r0 * n + m) * columns + c0) * item
                copy_bytes(to, group.address(m, buffer), count * item)
            else:
                came = group.view(m, buffer, dtype, 0, count)
                whole[r0:r1, m].copy_(came.view(r1 - r0, columns))

    return Rounds(message, len(cut), post, take, out)


def reduce_scatter(group: Group, x: Tensor, message: Message, dim: int) -> Rounds:
    """Every rank posts each other's share of x; each adds up its own."""
    n, me, item, dtype = group.size, group.me, x.element_size(), x.dtype
    shape = list(x.shape)
    shape[dim] //= n
    rows, columns = prod(shape[:dim]), prod(shape[dim:])
    out = torch.empty(shape, dtype=dtype)
    total, shares, source = out.view(rows, columns), x.view(rows, n, columns), x.data_ptr()
    room = BUFFER_BYTES // n // _ALIGN * _ALIGN
    cut = blocks(rows, columns, room // item)

    def post(i: int, buffer: int) -> None:
        r0, r1, c0, c1 = cut[i]
        count = (r1 - r0) * (c1 - c0)
        at = group.mine(buffer, (n - 1) * room + count * item)
        for p in group.peers:
            if r1 - r0 <= 1:
                start = (r0 * n + p) * columns + c0
                copy_bytes(at + p * room, source + start * item, count * item)
            else:
                place = group.view(me, buffer, dtype, p * room, count)
                place.view(r1 - r0, columns).copy_(shares[r0:r1, p])

    def take(i: int, buffer: int) -> None:
        r0, r1, c0, c1 = cut[i]
        count, high, wide = (r1 - r0) * (c1 - c0), r1 - r0, c1 - c0
        parts = [
            shares[r0:r1, me, c0:c1]
            if m == me
            else group.view(m, buffer, dtype, me * room, count).view(high, wide)
            for m in range(n)
        ]
        reduce_into(total[r0:r1, c0:c1], parts, largest=False)

    return Rounds(message, len(cut), post, take, out)


def all_to_all(group: Group, x: Tensor, message: Message, counts: list[list[int]]) -> Rounds:
    """Rows of dim 0: counts[s][d] go from member s to member d."""
    n, me = group.size, group.me
    row = prod(x.shape[1:]) * x.element_size()
    out = torch.empty([sum(c[me] for c in counts), *x.shape[1:]], dtype=x.dtype)
    leaves = [x.data_ptr() + sum(counts[me][:p]) * row for p in range(n)]
    lands = [out.data_ptr() + sum(counts[s][me] for s in range(p)) * row for p in range(n)]
    copy_bytes(lands[me], leaves[me], counts[me][me] * row)
    room = BUFFER_BYTES // n // _ALIGN * _ALIGN
    largest = max(counts[s][d] * row for s in range(n) for d in range(n) if s != d)

    def part(i: int, rows_: int) -> int:
        return min(max(rows_ * row - i * room, 0), room)

    def post(i: int, buffer: int) -> None:
        lengths = {p: part(i, counts[me][p]) for p in group.peers}
        last = max((p for p in group.peers if lengths[p]), default=0)
        at = group.mine(buffer, last * room + lengths.get(last, 0))
        for p, length in lengths.items():
            copy_bytes(at + p * room, leaves[p] + i * room, length)

    def take(i: int, buffer: int) -> None:
        for p in group.peers:
            start = group.address(p, buffer) + me * room
            copy_bytes(lands[p] + i * room, start, part(i, counts[p][me]))

    return Rounds(message, max(-(-largest // room), 1), post, take, out)


def broadcast(group: Group, x: Tensor, message: Message, root: int) -> Rounds:
    """The root posts; the others post nothing and take."""
    out = x.clone() if group.me == root else torch.empty_like(x)
    size = x.numel() * x.element_size()
    source, target = x.data_ptr(), out.data_ptr()

    def post(i: int, buffer: int) -> None:
        if group.me == root:
            start = i * BUFFER_BYTES
            length = min(BUFFER_BYTES, size - start)
            copy_bytes(group.mine(buffer, length), source + start, length)

    def take(i: int, buffer: int) -> None:
        if group.me != root:
            start = i * BUFFER_BYTES
            length = min(BUFFER_BYTES, size - start)
            copy_bytes(target + start, group.address(root, buffer), length)

    return Rounds(message, max(-(-size // BUFFER_BYTES), 1), post, take, out)


def barrier(message: Message) -> Rounds:
    """One round without bytes."""

    def nothing(i: int, buffer: int) -> None:
        """Posts and takes no bytes."""

    return Rounds(message, 1, nothing, nothing, torch.empty(0))
