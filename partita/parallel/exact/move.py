"""Collectives in exact arithmetic, for block.py: what a rank hands in, and what it has after.

Parts know their global indices, so parts that leave a gap, or do not fit, are an ExecuteError.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partita.parallel.exact.algebra import ExecuteError, Local, P, meet
from partita.spec.program import Event


def cut_to(x: Local, spans: tuple[range, ...], site: str) -> Local:
    """The part of x at `spans`, which x must hold."""
    if any(
        s and (s.start < o.start or s.stop > o.stop) for s, o in zip(spans, x.spans, strict=True)
    ):
        raise ExecuteError(f"{site}: {spans} is not within {x.spans}")
    at = tuple(
        slice(s.start - o.start, s.stop - o.start) for s, o in zip(spans, x.spans, strict=True)
    )
    return Local(x.dims, spans, x.values[at])


def assemble(parts: Sequence[Local], spans: tuple[range, ...], site: str) -> Local:
    """Parts side by side; where they overlap they must be equal, and nothing may be left open."""
    values = np.full([len(s) for s in spans], -1, np.int64)
    for x in parts:
        at = tuple(
            slice(s.start - o.start, s.stop - o.start) for s, o in zip(x.spans, spans, strict=True)
        )
        if (
            values[at].shape != x.values.shape
            or ((values[at] != -1) & (values[at] != x.values)).any()
        ):
            raise ExecuteError(f"{site}: gathers parts that do not fit each other")
        values[at] = x.values
    if (values == -1).any():
        raise ExecuteError(f"{site}: gathers parts that leave a gap")
    return Local(parts[0].dims, spans, values)


def common(a: Sequence[range], b: Sequence[range]) -> tuple[range, ...]:
    """The indices that two parts share."""
    return tuple(
        range(max(s.start, o.start), min(s.stop, o.stop)) for s, o in zip(a, b, strict=True)
    )


def elements(event: Event, part: Local, wants: Sequence[tuple[range, ...]]) -> int:
    """What a rank hands in for a part, `wants` being what each of its group gets: of an all_to_all all that
    they want; of a gradient that follows its share round a ring that share alone."""
    if event.collective == "all_to_all":
        shares = (common(part.spans, want) for want in wants)
        return sum(int(np.prod([len(s) for s in share])) for share in shares)
    whole = part.values.size
    return whole // len(wants) if event.collective == "send" and event.gradient else whole


def arrive(event: Event, parts: Sequence[Local], want: tuple[range, ...], site: str) -> Local:
    """What a rank of the group has after a collective on its parts."""
    if event.collective == "all_gather" or (event.collective == "send" and not event.gradient):
        return assemble(parts, want, site)
    if event.collective == "all_to_all":
        cut = [cut_to(x, common(x.spans, want), site) for x in parts if all(common(x.spans, want))]
        return scattered(cut, want, site) if event.gradient else assemble(cut, want, site)
    meet(parts)
    summed = Local(parts[0].dims, parts[0].spans, sum(x.values for x in parts) % P)  # type: ignore[operator]
    if event.collective == "all_reduce":
        return summed
    if event.collective in ("reduce_scatter", "send"):
        return cut_to(summed, want, site)
    raise ExecuteError(f"{site}: {event.collective} within a block")


def scattered(parts: Sequence[Local], spans: tuple[range, ...], site: str) -> Local:
    """Parts added where they lie; none may be left open."""
    values = np.zeros([len(s) for s in spans], np.int64)
    held = np.zeros(values.shape, bool)
    for x in parts:
        at = tuple(
            slice(s.start - o.start, s.stop - o.start) for s, o in zip(x.spans, spans, strict=True)
        )
        values[at] = (values[at] + x.values) % P
        held[at] = True
    if not held.all():
        raise ExecuteError(f"{site}: parts leave a gap")
    return Local(parts[0].dims, spans, values)


def spread(x: Local, dim: str, times: int) -> Local:
    """Each index of a dim `times` times, side by side."""
    at = x.dims.index(dim)
    spans = scaled(x.spans, at, times)
    return Local(x.dims, spans, x.values.repeat(times, at))


def scaled(spans: tuple[range, ...], at: int, times: int) -> tuple[range, ...]:
    """Where the copies lie of what lies at `spans`, of one dim `times` each."""
    s = spans[at]
    return (*spans[:at], range(s.start * times, s.stop * times), *spans[at + 1 :])


def folded(
    parts: Sequence[Local], spans: tuple[range, ...], dim: str, times: int, site: str
) -> Local:
    """Gradients of copies added up at `spans`; of copies that other groups have nothing comes."""
    at = parts[0].dims.index(dim)
    here = range(min(x.spans[at].start for x in parts), max(x.spans[at].stop for x in parts))
    asked = scaled(spans, at, times)
    want = common(asked, (*asked[:at], here, *asked[at + 1 :]))
    cut = [cut_to(x, both, site) for x in parts if all(both := common(x.spans, want))]
    came = scattered(cut, want, site)
    values = np.zeros([len(s) for s in spans], np.int64)
    for i, index in enumerate(want[at]):
        to = index // times - spans[at].start
        values.swapaxes(0, at)[to] += came.values.swapaxes(0, at)[i]
    return Local(came.dims, spans, values % P)


def rows_to(parts: Sequence[Local], into: Local) -> Local:
    """`into`, zeros, with what of all parts lies there: values of one holder, or gradients added up."""
    for x in parts:
        both = common(x.spans, into.spans)
        if not all(both):
            continue
        of, to = (
            tuple(
                slice(b.start - s.start, b.stop - s.start) for b, s in zip(both, spans, strict=True)
            )
            for spans in (x.spans, into.spans)
        )
        into.values[to] = (into.values[to] + x.values[of]) % P
    return into
