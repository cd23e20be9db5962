"""What `auto` makes a schedule for, as a plan's line has it: `pipeline.costs=33_35_32x7,36_39_36,2` says F, I
and W of seven stages, of one more, and what a message takes from rank to rank, all in one unit of the user's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

MOST = 10_000  # stages
_STAGE = re.compile(r"(\d{1,7})_(\d{1,7})_(\d{1,7})(?:x([1-9]\d{0,5}))?")

Three = tuple[int, int, int]


def read_costs(texts: Sequence[str]) -> tuple[tuple[Three, ...], int]:
    """F, I, W of each stage, and of a message (0 where none is stated). Raises ValueError."""
    stages: list[Three] = []
    send = 0
    for i, text in enumerate(texts):
        found = _STAGE.fullmatch(text)
        if found:
            times = int(found[4] or 1)
            if len(stages) + times > MOST:
                raise ValueError(f"{len(stages) + times} stages: more than {MOST}")
            stages += [(int(found[1]), int(found[2]), int(found[3]))] * times
        elif stages and i == len(texts) - 1 and re.fullmatch(r"\d{1,7}", text):
            send = int(text)
        else:
            raise ValueError(
                f"'{text}' is no stage's F_I_W, as 33_35_32 (33_35_32x4: of four), nor, last, a message"
            )
    if texts and not any(map(sum, stages)):
        raise ValueError("no stage takes any time")
    return tuple(stages), send


def write_costs(stages: Sequence[Three], send: int) -> tuple[str, ...]:
    """As a plan's line has them; a message of nothing is left out."""
    found = [(stage, sum(1 for _ in alike)) for stage, alike in groupby(stages)]
    texts = [f"{f}_{i}_{w}" + (f"x{n}" if n > 1 else "") for (f, i, w), n in found]
    return (*texts, *([str(send)] if send else []))


def wrong_costs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """(dotted key, message) where no plan can mean them."""
    try:
        read_costs(texts)
    except ValueError as wrong:
        return [("pipeline.costs", str(wrong))]
    return []
