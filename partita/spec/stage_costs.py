"""What `auto` makes a schedule for, as a plan's line has it: `pipeline.costs=33_35_32x7,36_39_36,2` says F, I
and W of seven stages, of one more, and what a message takes from rank to rank, all in one unit of the user's;
`9_8` in its place says that the link out of a rank is taken for 8 of its 9.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

MOST = 10_000  # stages
_MESSAGE = re.compile(r"(\d{1,7})(?:_(\d{1,7}))?")
_STAGE = re.compile(r"(\d{1,7})_(\d{1,7})_(\d{1,7})(?:x([1-9]\d{0,5}))?")

Three = tuple[int, int, int]
Message = tuple[int, int]  # how long it takes, and how long of that the link is taken


def read_costs(texts: Sequence[str]) -> tuple[tuple[Three, ...], Message]:
    """F, I, W of each stage, and of a message (0 where none is stated). Raises ValueError."""
    stages: list[Three] = []
    send = wire = 0
    for i, text in enumerate(texts):
        found = _STAGE.fullmatch(text)
        if found:
            times = int(found[4] or 1)
            if len(stages) + times > MOST:
                raise ValueError(f"{len(stages) + times} stages: more than {MOST}")
            stages += [(int(found[1]), int(found[2]), int(found[3]))] * times
        elif stages and i == len(texts) - 1 and (last := _MESSAGE.fullmatch(text)):
            send, wire = int(last[1]), int(last[2] or 0)
        else:
            raise ValueError(
                f"'{text}' is no stage's F_I_W, as 33_35_32 (33_35_32x4: of four), nor, last, a message "
                "(9, or 9_8 where the link is taken for 8 of them)"
            )
    if wire > send:
        raise ValueError(f"{send}_{wire}: a link is taken for {wire} of the {send} of a message")
    if texts and not any(map(sum, stages)):
        raise ValueError("no stage takes any time")
    return tuple(stages), (send, wire)


def write_costs(stages: Sequence[Three], message: Message) -> tuple[str, ...]:
    """As a plan's line has them; a message of nothing is left out, and a link that none waits for: one taken
    no longer than the quickest F or I."""
    send, wire = message
    wire = min(wire, send) if wire > min(min(f, i) for f, i, _ in stages) else 0
    found = [(stage, sum(1 for _ in alike)) for stage, alike in groupby(stages)]
    texts = [f"{f}_{i}_{w}" + (f"x{n}" if n > 1 else "") for (f, i, w), n in found]
    last = f"{send}_{wire}" if wire else str(send)
    return (*texts, *([last] if send else []))


def wrong_costs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """(dotted key, message) where no plan can mean them."""
    try:
        read_costs(texts)
    except ValueError as wrong:
        return [("pipeline.costs", str(wrong))]
    return []
