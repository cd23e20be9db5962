"""Passes that say where weights, gradients and activations are while a schedule runs.

They work on programs (one list of actions a rank, SEND and RECV among them or not), put no compute
action elsewhere, and are independent: take those that a plan asks for. A schedule with ZeRO or offload
is still a schedule.

    with_reduce     REDUCE behind a stage's last weight gradient (not its last I), before its U
    with_shards     UNSHARD before a stage is needed, RESHARD when others are (ZeRO-3)
    with_offload    OFFLOAD behind F, RELOAD ahead of the backward
    with_free       FREE behind the last reader of what F kept
    with_updates    U of every stage, once its gradients are reduced
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice

from partita.schedule.ir import COMPUTE, STEP, Action

Program = tuple[tuple[Action, ...], ...]
Ranks = Sequence[Sequence[Action]]


def with_reduce(ranks: Ranks, each_microbatch: bool = False) -> Program:
    """REDUCE of a stage right behind the last B or W before each of its U, or before the end.

    `each_microbatch`: behind every B or W, named by its microbatch (ZeRO-2 keeps no whole gradient).
    Stages finish at different times: the reduction hides under what the rank still computes.

    >>> s = [[Action(0, kind, 0) for kind in "FIW"]]
    >>> print(*with_reduce(s)[0])
    0F0 0I0 0W0 0REDUCE
    """
    return tuple(tuple(_reduced(actions, each_microbatch)) for actions in ranks)


def _reduced(actions: Sequence[Action], each_microbatch: bool) -> Iterator[Action]:
    last: set[int] = set()  # places of the last weight gradient before a U, or before the end
    open_stages: set[int] = set()
    for i in reversed(range(len(actions))):
        stage, kind, _ = actions[i]
        if kind == "U":
            open_stages.discard(stage)
        elif kind in ("B", "W") and stage not in open_stages:
            open_stages.add(stage)
            last.add(i)
    for i, action in enumerate(actions):
        yield action
        if each_microbatch and action.kind in ("B", "W"):
            yield action._replace(kind="REDUCE")
        elif i in last:
            yield Action(action.stage, "REDUCE", STEP)


def with_updates(ranks: Ranks) -> Program:
    """U of each stage at the rank's end, carrying the stage's last microbatch there; for schedules that
    have none of their own."""
    out = []
    for actions in ranks:
        last: dict[int, int] = {}
        for stage, kind, microbatch in actions:
            if kind in ("B", "W"):
                last[stage] = max(last.get(stage, 0), microbatch)
        out.append((*actions, *(Action(stage, "U", k) for stage, k in sorted(last.items()))))
    return tuple(out)


def with_shards(ranks: Ranks, keep: int = 2) -> Program:
    """UNSHARD and RESHARD, so that at most `keep` stages of a rank have whole weights at once.

    Those kept are the next `keep` that the rank computes with: keep - 1 are gathered ahead, under the
    compute before. With keep = 1 each gather is waited for. Breadth-first gathers once a stage and
    direction, 1F1B interleaved at every turn.

    >>> s = [[Action(stage, "F", k) for stage in (0, 2) for k in (0, 1)]]
    >>> print(*with_shards(s, keep=1)[0])
    0UNSHARD 0F0 0F1 0RESHARD 2UNSHARD 2F0 2F1 2RESHARD
    """
    return tuple(tuple(_sharded(actions, keep)) for actions in ranks)


def _sharded(actions: Sequence[Action], keep: int) -> Iterator[Action]:
    whole: list[int] = []
    for i, action in enumerate(actions):
        if action.kind in COMPUTE and action.kind != "U":
            coming = list(islice(_distinct_stages(actions, i), keep))
            yield from (Action(stage, "RESHARD", STEP) for stage in whole if stage not in coming)
            yield from (Action(stage, "UNSHARD", STEP) for stage in coming if stage not in whole)
            whole = coming
        yield action
    yield from (Action(stage, "RESHARD", STEP) for stage in whole)


def _distinct_stages(actions: Sequence[Action], start: int) -> Iterator[int]:
    seen: set[int] = set()
    for i in range(start, len(actions)):
        stage, kind, _ = actions[i]
        if kind in COMPUTE and kind != "U" and stage not in seen:
            seen.add(stage)
            yield stage


def with_offload(ranks: Ranks, stages: Collection[int] | None = None, ahead: int = 1) -> Program:
    """OFFLOAD behind F, RELOAD `ahead` compute actions before B or I, for the stages named (all).

    A microbatch whose backward follows within `ahead` compute actions stays: it would not be away.
    """
    return tuple(tuple(_offloaded(actions, stages, ahead)) for actions in ranks)


def _offloaded(
    actions: Sequence[Action], stages: Collection[int] | None, ahead: int
) -> Iterator[Action]:
    order = [a for a in actions if a.kind in COMPUTE]
    forward = {(a.stage, a.microbatch): i for i, a in enumerate(order) if a.kind == "F"}
    away: set[tuple[int, int]] = set()
    back: dict[Action, list[Action]] = {}
    for i, (stage, kind, microbatch) in enumerate(order):
        place = forward.get((stage, microbatch), i)
        if kind in ("B", "I") and (stages is None or stage in stages) and i - ahead > place + 1:
            away.add((stage, microbatch))
            back.setdefault(order[i - ahead], []).append(Action(stage, "RELOAD", microbatch))
    for action in actions:
        yield from back.get(action, ())
        yield action
        if action.kind == "F" and (action.stage, action.microbatch) in away:
            yield action._replace(kind="OFFLOAD")


def with_free(ranks: Ranks) -> Program:
    """FREE behind the B or W that reads last what F kept; behind F where nothing runs backward."""
    backward = any(a.kind in ("B", "W") for actions in ranks for a in actions)
    last = ("B", "W") if backward else ("F",)
    return _behind(ranks, lambda a: (a._replace(kind="FREE"),) if a.kind in last else ())


def _behind(ranks: Ranks, added: Callable[[Action], tuple[Action, ...]]) -> Program:
    return tuple(tuple(new for a in actions for new in (a, *added(a))) for actions in ranks)
