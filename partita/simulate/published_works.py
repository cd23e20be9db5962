"""What published runs compute that no plan says: a vocabulary that all stages share."""

from __future__ import annotations

from dataclasses import replace

from partita.parallel.laid import Laid
from partita.simulate.published import Case
from partita.simulate.stage import Work, Works, works_of


def case_works(found: Case, laid: Laid) -> Works:
    """The work of a case that was laid."""
    works = works_of(laid, found.matmul_dtype)
    return spread(works) if found.spread else works


def spread(works: Works) -> Works:
    """Embedding and head cut over all stages along the vocabulary (Yeung et al. 2024, 2411.05288): each
    does its share of both. Their barriers are beside compute and not priced."""
    first, last = works.stages[0].parts[0], works.stages[-1].parts[-1]
    share = [replace(p, times=p.times / len(works.stages)) for p in (first, last)]

    def with_share(w: Work) -> Work:
        layers = [p for p in w.parts if p is not first and p is not last]
        return replace(w, parts=(*layers, *share))

    return Works(tuple(map(with_share, works.stages)), works.once)
