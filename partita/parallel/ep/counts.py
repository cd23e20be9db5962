"""How many rows every rank of an exchange has: what a router's choice makes of the sizes that are data.

    slots     rows this rank sends: one for each (token, chosen expert) it keeps
    arrivals  rows that come to this rank: of all its ep peers, those for its experts
    gathered  rows its experts compute on: the arrivals of all its etp peers
    padded    rows it hands in to gather them: as many as the etp peer with most arrivals has
    spread    rows it hands in to add up what etp peers made: padded, for each peer

Where tokens are replicated over tp = etp, peers have the same arrivals and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from partita.spec.mesh import Mesh

Counts = Mapping[int, Sequence[int]]  # rank -> rows it sends to each expert


@dataclass(frozen=True)
class Routing:
    """What routers chose in one step: for each block with experts and microbatch, every rank's counts."""

    mesh: Mesh
    replicated: bool  # tokens are, over tp = etp
    counts: Mapping[tuple[str, int], Counts]  # chunk by chunk, where there are several
    chunks: int = 1

    def rows(self, block: str, microbatch: int, rank: int) -> dict[str, int]:
        """Dim -> this rank's rows, of all chunks."""
        every, found = self.counts[block, microbatch], dict[str, int]()
        for c in range(self.chunks):
            part = {
                r: n[c * (size := len(n) // self.chunks) : (c + 1) * size] for r, n in every.items()
            }
            for name, n in rows(self.mesh, part, rank, self.replicated).items():
                found[name] = found.get(name, 0) + n
        return found


def rows(mesh: Mesh, counts: Counts, rank: int, replicated: bool) -> dict[str, int]:
    """Dim -> rows of a rank, from the counts of its peers on ep and etp."""
    peers = (rank,) if replicated else mesh.group(rank, "etp")
    each = [arrivals(mesh, counts, r) for r in peers]
    most = max(each)
    return {
        "slots": sum(counts[rank]), "arrivals": arrivals(mesh, counts, rank), "gathered": sum(each),
        "padded": most, "spread": most * len(peers),
    }  # fmt: skip


def arrivals(mesh: Mesh, counts: Counts, rank: int) -> int:
    """Rows of the rank's ep peers for its experts."""
    first, end = experts_of(len(counts[rank]), mesh.sizes["ep"], mesh.coords(rank)["ep"])
    return sum(sum(counts[r][first:end]) for r in mesh.group(rank, "ep"))


def experts_of(experts: int, ep: int, at: int) -> tuple[int, int]:
    """(first, end) of the experts that lie at a place of ep."""
    each = experts // ep
    return at * each, (at + 1) * each
