"""What a rank of a serving plan holds: its weights, what one step needs beside them, and pages in the rest.

weights      the laid program's, in the dtype that they are used in; no gradients, masters or states
step         the most that lives at a time in a block at the step's rows, the logits, and, where a server
             copies keys and values out of their pages, one layer's of a step
pages        as many as fit on the fullest rank; one more is scratch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partita.parallel.laid import Laid
from partita.parallel.read import BYTES, bytes_of, state_bytes
from partita.simulate.serving.cut import Piece, Shape, pieces
from partita.simulate.serving.kept import layers_at, token_bytes
from partita.simulate.serving.works import Server
from partita.spec.program import Sizes, distinct

WIDE = 4  # bytes of a logit that is handed out


@dataclass(frozen=True)
class Held:
    """Bytes on each rank of one stage."""

    stage: int
    ranks: int
    weights: int
    step: int
    page: int  # of one page

    def room(self, limit: int, page_size: int) -> int:
        """Tokens whose keys and values fit beside the rest; negative: so many are missing."""
        left = limit - self.weights - self.step
        if not self.page:
            return 0 if left < 0 else 1 << 62
        return (left // self.page - 1) * page_size


def held(laid: Laid, most: Shape | None, server: Server, page_size: int) -> list[Held]:
    """Of every stage. `most`: the largest step; None: nothing but weights and pages."""
    each = laid.request.plan.world_size // laid.sizes["pp"]
    known: dict[object, int] = {}
    found = []
    for i, stage in enumerate(laid.stages):
        key = frozenset(map(id, stage.blocks))
        if most is not None and key not in known:
            known[key] = _step(laid, i, most, server)
        page = layers_at(laid, i) * page_size * token_bytes(laid)
        found.append(Held(i, each, weights_of(laid, i), known.get(key, 0), page))
    return found


def weights_of(laid: Laid, stage: int) -> int:
    """Bytes of a stage's weights on a rank."""
    blocks = distinct(laid.stages[stage].blocks)
    return sum(n * sum(state_bytes(b, laid.sizes).values()) for b, n in blocks)


def _step(laid: Laid, stage: int, most: Shape, server: Server) -> int:
    """What a step needs at most."""
    found = [live(p, laid.sizes) for p in pieces(laid, stage, most.tokens, max(most.wanted, 1))]
    if not found:
        return 0
    copied = token_bytes(laid) * (most.decode * most.context + most.prompts * most.before)
    logits = 0
    if stage == len(laid.stages) - 1:
        size = BYTES[laid.request.plan.precision.dtype]
        logits = most.wanted * laid.request.model.vocab * (WIDE + size)
    return max([*found, logits]) + (int(copied) if server.gathers else 0)


def live(piece: Piece, sizes: Sizes) -> int:
    """The most bytes of activations that live at a time in a block: what was written and is read later."""
    ops, each = piece.block.ops(), bytes_of(piece.block, sizes)
    last = {name: i for i, op in enumerate(ops) for name in op.reads}
    alive = {piece.block.input} if piece.block.input in each else set[str]()
    most = 0
    for i, op in enumerate(ops):
        alive.add(op.writes)
        most = max(most, sum(each[n] for n in alive))
        alive -= {n for n in alive if last.get(n, len(ops)) <= i}
    return most


def fullest(stages: Sequence[Held], limit: int, page_size: int) -> Held:
    """The stage whose ranks have room for the fewest tokens."""
    return min(stages, key=lambda h: h.room(limit, page_size))
