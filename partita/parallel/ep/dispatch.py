"""Rows to their experts and back: sort by expert, exact all-to-all, and the conjugates.

    x [tokens, hidden] ─ sort ─► sent [slots, hidden] ─ all_to_all ep ─► arrived ─ by expert ─► inside
    y [tokens, hidden] ◄─ sum of gate * row ─ back [slots, hidden] ◄─ all_to_all ep ─ leaving ◄─ made

`order` lists the slots (token * top_k + pick) by expert, so that a token's row goes once to each of its
experts: top_k * tokens * hidden elements leave a rank, no copies more. Numbers of rows are told ahead
(Comm.counts, the one host read; of a GPU without peers there is none). On etp > 1 peers gather each other's
rows, padded to the most that one of them has, and add up what they made; where tokens are replicated over
tp = etp they hold the same rows, and copy_to / reduce_from do it.

Each way is two functions, leave and arrive, so that other work may run between them: the experts of another
chunk of the tokens, or another microbatch. What travels is with the Rows; autograd sees an empty tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, one_hot

from partita.comm.protocol import Done, Handle
from partita.parallel.ep.counts import experts_of
from partita.parallel.ep.loads import Counts, Loads, count, is_told_late
from partita.parallel.regions import IDENTITY, Region, Unplayed


@dataclass(frozen=True)
class Exchange:
    """The regions of a layer's exchange. Those over a group of one move nothing."""

    experts: int
    top_k: int
    count: Region  # dispatch.count:counts, over ep and etp
    send: Region  # dispatch.send:all_to_all, over ep
    receive: Region  # dispatch.receive, over etp: gather_rows or copy_to
    leave: Region  # experts.down, over etp: scatter_rows or reduce_from
    back: Region  # experts.back:all_to_all, over ep
    picks: Region  # router.choose:gather_picks, over what cuts seq
    capacity: int | None = None  # rows that an expert takes of a sequence
    chunks: int = 1  # of a rank's tokens, that travel one after the other
    mark: Region = IDENTITY  # dispatch.mark:all_to_all, over ep
    marked: Region = IDENTITY  # dispatch.marked:gather_rows, over etp
    limit: Unplayed | None = None  # what admits rows, where a replay leaves it out

    def plan(
        self, chosen: Tensor, positions: Tensor | None = None, real: Tensor | None = None
    ) -> list[Rows]:
        """Who sends what, chunk by chunk: `chosen` [batch, seq, top_k] are the experts of each token;
        `positions` [batch or 1, whole seq] of the laid sequence's places, where they are not in order; `real`
        [batch or 1, seq] leaves out tokens that fill a sequence up, which send nothing.

        Communicates: counts over ep.etp, 8 bytes an expert and chunk; with a capacity 8 bytes a token and
        pick over what cuts seq."""
        flat = chosen.flatten()
        if self.capacity is not None:
            flat = self._limited(chosen, self.capacity, positions).flatten()
        if real is not None:
            none = ~real.unsqueeze(-1).expand_as(chosen)
            flat = flat.masked_fill(none.flatten(), self.experts)
        parts = [p.flatten() for p in flat.view(-1, self.top_k).tensor_split(self.chunks)]
        alone = self.count.comm.size == 1 and self.capacity is None and real is None
        if alone and is_told_late(chosen.device):
            return [self._alone(part) for part in parts]
        mine = [count(p, self.experts + 1)[: self.experts] for p in parts]
        comm, site = self.count.comm, self.count.site
        table = self.count.told(lambda: comm.counts(torch.cat(mine), site=site))
        found = []
        for i, part in enumerate(parts):
            each = [row[i * self.experts : (i + 1) * self.experts] for row in table]
            sent, order = each[self.count.comm.rank], part.sort(stable=True).indices
            found.append(Rows(self, order[: sum(sent)], part.numel(), each, sent))
        return found

    def _alone(self, chosen: Tensor) -> Rows:
        """Of a chunk [slots] that no peer has a part in: the host does not learn how many there are."""
        sorted_, order = chosen.int().sort(stable=True)
        loads = Loads.of_sorted(sorted_, self.experts)
        return Rows(self, order, chosen.numel(), [], [], alone=loads)

    def _limited(self, chosen: Tensor, capacity: int, positions: Tensor | None) -> Tensor:
        """The experts of each token; where one's row is dropped, a number behind all."""

        def made() -> Tensor:
            kept = self._admitted(chosen, capacity, positions)
            return chosen.masked_fill(~kept, self.experts)

        return made() if self.limit is None else self.limit.made(made)

    def _admitted(self, chosen: Tensor, capacity: int, positions: Tensor | None) -> Tensor:
        """bool [batch, seq, top_k]: rows of earlier positions first, up to the capacity."""
        comm, mine = self.picks.comm, chosen.shape[1]
        every = comm.all_gather(chosen, site=self.picks.site, dim=1) if comm.size > 1 else chosen
        taken = one_hot(every, self.experts).sum(-2)
        if positions is None:
            taken = taken.cumsum(1)
        else:
            at = positions.argsort(-1).unsqueeze(-1).expand_as(taken)
            taken = torch.empty_like(taken).scatter_(1, at, taken.gather(1, at).cumsum(1))
        return taken.narrow(1, comm.rank * mine, mine).gather(-1, chosen) <= capacity


@dataclass(frozen=True)
class Marks:
    """Of which token each row is in a step, int64 [rows] of sample * seq + position: dropout's key."""

    step: int
    tokens: Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of one microbatch, or a chunk of it. `table[peer]` are the rows that a peer on ep.etp sends to
    each expert, `alone` those of this rank where it has none; `under_way` is what travels between the two
    functions of a direction."""

    exchange: Exchange
    order: Tensor
    slots: int  # token picks of this rank, sent or not
    table: list[list[int]]
    sent: list[int]
    under_way: list[Handle] = field(default_factory=list)
    marks: Marks | None = None  # of the rows at this rank's experts, by expert
    alone: Loads | None = None

    @property
    def tokens(self) -> int:
        """Tokens of this rank."""
        return self.slots // self.exchange.top_k

    @property
    def _ep(self) -> int:
        return self.exchange.send.comm.size

    def _local(self, peer: int) -> list[int]:
        """Rows that a peer of the table sends to each expert of this rank."""
        ep = self._ep
        first, end = experts_of(self.exchange.experts, ep, self.exchange.send.comm.rank)
        return self.table[peer][first:end]

    def arriving(self, etp: int) -> list[list[int]]:
        """[ep peer][local expert] -> rows that arrive at the etp peer."""
        width = self._etp[0]
        return [self._local(i * width + etp) for i in range(self._ep)]

    @property
    def _etp(self) -> tuple[int, int]:
        """(peers that hold other rows, this rank's place among them)."""
        receive = self.exchange.receive
        return (receive.comm.size, receive.comm.rank) if receive.kind == "gather_rows" else (1, 0)

    @property
    def leaving(self) -> Counts:
        """Rows that this rank sends to each expert."""
        return self.sent if self.alone is None else self.alone

    @property
    def counts(self) -> Counts:
        """Rows of each local expert, of all etp peers."""
        if self.alone is not None:
            return self.alone
        peers = range(self._etp[0])
        each = [sum(c) for c in zip(*(row for j in peers for row in self.arriving(j)), strict=True)]
        return each if self.order.device.type == "cpu" else Loads(each)

    def marked(self, step: int, tokens: Tensor) -> Rows:
        """The same, whose tokens, int64 [tokens], are told where the experts are.

        Communicates: 8 bytes a row over ep, then over etp where peers have other rows."""
        exchange = self.exchange

        def bring() -> Tensor:
            mine = tokens.index_select(0, self.order // exchange.top_k)
            here = self._all_to_all(mine, exchange.mark, back=False).wait()
            return self._gather(self._by_expert(here), exchange.marked)

        last = exchange.mark if exchange.marked.tape is None else exchange.marked
        return replace(self, marks=Marks(step, last.known(bring)))

    @property
    def arrival(self) -> Region:
        """Of those that bring rows to the experts the one whose result a plan may keep."""
        into = self.exchange.receive
        return into if into.kind == "gather_rows" and into.tape is not None else self.exchange.send

    def start(self, x: Tensor, region: Region, back: bool) -> None:
        """all_to_all over ep: to the experts, or back."""
        self.under_way.append(self._all_to_all(x, region, back))

    def _all_to_all(self, x: Tensor, region: Region, back: bool) -> Handle:
        if region.comm.size == 1:
            return Done(x)
        ep, me = self._ep, self._etp[1]
        spans = [experts_of(self.exchange.experts, ep, i) for i in range(ep)]
        out = [sum(self.sent[a:b]) for a, b in spans]
        come = [sum(c) for c in self.arriving(me)]
        send, take = (come, out) if back else (out, come)
        counts = {"send_counts": send, "receive_counts": take}
        return region.comm.start_all_to_all(x, site=region.site, **counts)

    def arrived(self) -> Tensor:
        """What was started, when it is there."""
        return self.under_way.pop().wait()

    def _by_expert(self, x: Tensor, back: bool = False) -> Tensor:
        """Rows that have come to this rank, by expert; or `back`. Of one peer they are."""
        return x if self._ep == 1 else self.regroup(x, self.arriving(self._etp[1]), back)

    def regroup(self, x: Tensor, blocks: list[list[int]], back: bool, pad: int = 0) -> Tensor:
        """Rows that lie source by source, each by expert, put expert by expert; or `back`. A source has `pad`
        rows where that is given, its own ones first."""
        if len(blocks) == 1 and not pad:
            return x
        sources, experts = len(blocks), len(blocks[0])
        rest = [[pad - sum(b)] if pad else [] for b in blocks]
        if not back:
            each = experts + len(rest[0])
            parts = x.split([n for b, r in zip(blocks, rest, strict=True) for n in (*b, *r)])
            return torch.cat([p for e in range(experts) for p in parts[e::each]])
        parts = x.split([n for column in zip(*blocks, strict=True) for n in column])
        behind = [[x.new_zeros((n, *x.shape[1:])) for n in r] for r in rest]
        return torch.cat([p for s in range(sources) for p in (*parts[s::sources], *behind[s])])

    def enter(self, arrived: Tensor, conjugate: bool = False) -> Tensor:
        """Rows of this rank by expert -> rows that its experts compute on. `conjugate`: a gradient on its way
        through `leave`'s backward."""
        region = self.exchange.leave if conjugate else self.exchange.receive
        if region.comm.size > 1 and region.kind in ("copy_to", "reduce_from"):
            return region.backward(arrived) if conjugate else region.forward(arrived)
        return self._gather(arrived, region)

    def _gather(self, arrived: Tensor, region: Region) -> Tensor:
        """Rows of this rank by expert -> those of all etp peers."""
        if region.comm.size == 1:
            return arrived
        blocks, most = self._peers()
        padded = arrived.new_zeros((most, *arrived.shape[1:]))
        padded[: arrived.shape[0]] = arrived
        return self.regroup(region.comm.all_gather(padded, site=region.site), blocks, False, most)

    def exit(self, made: Tensor, conjugate: bool = False) -> Tensor:
        """What experts made, added up over etp -> this rank's rows. `conjugate`: as in `enter`."""
        if conjugate or self.exchange.leave.kind != "scatter_rows":
            return self._exit(made, conjugate)
        return self.exchange.leave.known(lambda: self._exit(made, conjugate))

    def _exit(self, made: Tensor, conjugate: bool) -> Tensor:
        region = self.exchange.receive if conjugate else self.exchange.leave
        if region.comm.size == 1:
            return made
        if region.kind in ("copy_to", "reduce_from"):
            return region.backward(made) if conjugate else region.forward(made)
        blocks, most = self._peers()
        spread = self.regroup(made, blocks, True, most)
        found = region.comm.reduce_scatter(spread, site=region.site)
        mine = sum(blocks[region.comm.rank])
        # which may be kept, without the padding
        return found if mine == most else found[:mine].clone()

    def _peers(self) -> tuple[list[list[int]], int]:
        """Rows of each etp peer by local expert, and the most that one has."""
        peers = range(self._etp[0])
        blocks = [[sum(c) for c in zip(*self.arriving(j), strict=True)] for j in peers]
        return blocks, max(sum(b) for b in blocks)

    def start_to_experts(self, sent: Tensor, conjugate: bool = False) -> None:
        """Rows in `order` leave for their experts. `conjugate`: gradients, through `back`."""
        self.start(sent, self.exchange.back if conjugate else self.exchange.send, back=False)

    def at_experts(self, conjugate: bool = False) -> Tensor:
        """They are there, by expert."""
        if conjugate:
            return self.enter(self._by_expert(self.arrived()), conjugate)
        if self.exchange.receive.kind == "copy_to":
            return self.enter(self.arrival.known(lambda: self._by_expert(self.arrived())))
        return self.arrival.known(lambda: self.enter(self._by_expert(self.arrived())))

    def start_to_tokens(self, made: Tensor, conjugate: bool = False) -> None:
        """Rows by expert leave for their tokens. `conjugate`: gradients, through `send`."""
        if not conjugate and self.exchange.back.is_known:
            return
        mine = self.exit(made, conjugate)
        region = self.exchange.send if conjugate else self.exchange.back
        self.start(self._by_expert(mine, back=True), region, back=True)


def _token(x: Tensor) -> Tensor:
    """What stands for rows that travel, and for their gradient: nothing."""
    return x.new_empty(0)


class Dispatch(torch.autograd.Function):
    """Tokens [tokens, hidden] leave as rows for their experts; keeps `order`."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Rows) -> Tensor:
        """Sorts and starts to send."""
        ctx.save_for_backward(rows.order)
        ctx.rows = rows
        if not rows.arrival.is_known:
            rows.start_to_experts(x.index_select(0, rows.order // rows.exchange.top_k))
        return _token(x)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        """Adds up the gradients of a token, that have come back."""
        (order,) = ctx.saved_tensors
        rows: Rows = ctx.rows
        return _by_token(rows.arrived(), order, rows), None


class Arrive(torch.autograd.Function):
    """Rows have come to their experts."""

    @staticmethod
    def forward(ctx, travelling: Tensor, rows: Rows) -> Tensor:
        """Waits and puts them by expert."""
        ctx.rows = rows
        return rows.at_experts()

    @staticmethod
    def backward(ctx, drows: Tensor) -> tuple[Tensor, None]:
        """Starts to bring gradients back."""
        ctx.rows.start_to_tokens(drows, conjugate=True)
        return _token(drows), None


class Leave(torch.autograd.Function):
    """What experts made leaves for the tokens."""

    @staticmethod
    def forward(ctx, made: Tensor, rows: Rows) -> Tensor:
        """Starts to send."""
        ctx.rows = rows
        rows.start_to_tokens(made)
        return _token(made)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        """Gradients have come to the experts."""
        return ctx.rows.at_experts(conjugate=True), None


class Combine(torch.autograd.Function):
    """Rows have come back: each token's, weighed by its gates [tokens, top_k]; keeps rows, gates, order."""

    @staticmethod
    def forward(ctx, travelling: Tensor, gates: Tensor, rows: Rows) -> Tensor:
        """Adds rows up in the gates' dtype."""
        back = rows.exchange.back.known(rows.arrived)
        ctx.save_for_backward(back, gates, rows.order)
        ctx.rows = rows
        return _by_token(back, rows.order, rows, gates)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """Starts to send each row its token's gradient, weighed."""
        back, gates, order = ctx.saved_tensors
        rows: Rows = ctx.rows
        token, gate = order // rows.exchange.top_k, gates.flatten().index_select(0, order)
        weighed, slopes = torch.empty_like(back), torch.empty_like(gate)
        for some in _rows_at_once(back):
            drows = dy.index_select(0, token[some]).to(gates.dtype)
            torch.linalg.vecdot(drows, back[some].to(gates.dtype), out=slopes[some])
            torch.mul(drows, gate[some].unsqueeze(-1), out=weighed[some])
        dgates = gates.new_zeros(rows.slots).index_copy_(0, order, slopes)
        rows.start_to_experts(weighed, conjugate=True)
        return _token(back), dgates.view(gates.shape), None


def _rows_at_once(x: Tensor) -> Iterator[slice]:
    """x [rows, hidden] in turns that are short beside it, so that what is made wide of them is little: of a
    CPU's stays in the caches (a sixth of the time of all at once), of a GPU's is worth its launches."""
    elements = 1 << (18 if x.device.type == "cpu" else 24)
    each = max(elements // x.shape[-1], 1)
    return (slice(at, at + each) for at in range(0, len(x), each))


def _by_token(x: Tensor, order: Tensor, rows: Rows, gates: Tensor | None = None) -> Tensor:
    """Rows in `order` -> [tokens, hidden]: those of a token, weighed by its gates [tokens, top_k], added up
    wide and rounded once; what was not sent is zero."""
    places = torch.arange(rows.slots, device=order.device)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if order.numel() == rows.slots:  # whole rows are faster read by place than written by place
        places = torch.empty_like(order).scatter_(0, order, places)
    else:
        wide = wide.new_zeros((rows.slots, x.shape[-1])).index_copy_(0, order, wide)
    picks = places.view(-1, rows.exchange.top_k)
    return embedding_bag(picks, wide, mode="sum", per_sample_weights=gates).to(x.dtype)
