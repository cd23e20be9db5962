"""Where the stages of a schedule lie, and what no schedule of its kind is faster than.

What a rank takes for a microbatch is the most of some lines: so many seconds of a sample, and what it takes
beside them (starts.py). A sum of lines is a line, so they are known of stages, and of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from partita.cost.empirical import SLOW
from partita.planner.bounds.columns import GROWS, LEAST, SETS_OFF, STARTS, TIMES, TRAVEL
from partita.spec.plan import has_fixed_stages

# `auto` by where its stages lie: a line, a loop, a vee
MADE = ("auto", "auto_loop", "auto_vee")
HALVES = (
    "zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "interleaved_zb", "dualpipe", "dualpipev", *MADE,
)  # fmt: skip
HIDES = 1 - SLOW  # of what travels under compute
# A backward beside a forward: rows travel under the other's compute
PAIRED = ("dualpipe", "dualpipev")


class Halves(NamedTuple):
    """Seconds of microbatches at least [rows, size]: forward, the input half of backward, both halves; and of
    forward and backward what their lines alone tell."""

    forward: np.ndarray
    back: np.ndarray
    whole: np.ndarray
    lines: tuple[np.ndarray, np.ndarray]

    def at(self, row: np.ndarray) -> Halves:
        """Of some rows."""
        forward, back, whole, (there, here) = self
        return Halves(forward[row], back[row], whole[row], (there[row], here[row]))


def halves(rows: np.ndarray, share: np.ndarray, hides: np.ndarray | float = 0.0) -> Halves:
    """Of rows of a table [rows, numbers], for microbatches that have such a `share` [size] of its samples;
    `hides` [rows]: what part of what rows of experts travel hides under another microbatch's compute."""
    columns = rows.T
    (f, i, w), start, grow = columns[TIMES], columns[STARTS], columns[GROWS]
    least_f, least_b = rows[:, LEAST, None].swapaxes(0, 1)
    if not isinstance(hides, float) or hides:
        start, grow, travel = start.copy(), grow.copy(), columns[TRAVEL]
        start[1] -= hides * columns[SETS_OFF]
        grow[1] -= hides * (travel - columns[SETS_OFF])
        i = i - hides * travel
        least_b = np.where((hides * travel > 0)[:, None], 0.0, least_b)
    each = np.multiply.outer(np.concatenate((grow, (f, i, i + w))), share)
    lines, (forward, back, whole) = each[:5], each[5:]
    lines += start[..., None]
    line_f, line_i = lines[:2]
    line_b = np.maximum.reduce(lines[2:], 0)
    line_b += line_i
    most = np.maximum
    most(most(forward, line_f, out=forward), least_f, out=forward)
    most(most(whole, line_b, out=whole), least_b, out=whole)
    return Halves(forward, most(back, line_i, out=back), whole, (line_f, line_b))


class Rough:
    """No schedule of this kind ends sooner, for many microbatch sizes at once:

        step >= max over ranks and stages of  micro * (head + tail) + messages + samples * work

    From where its stages lie alone, which needs no schedule to be made: in a line or a loop, in a vee, or,
    for dualpipe and chimera, a copy at either end.
    """

    def __init__(self, schedule: str, ranks: int, virtual: int) -> None:
        self.split = schedule in HALVES or has_fixed_stages(schedule)
        self.num_stages = ranks * virtual
        at = np.arange(ranks)
        vee = (has_fixed_stages(schedule) or schedule == "auto_vee") and virtual == 2
        rows = [at + i * ranks for i in range(virtual)]
        if vee:
            rows = [at, 2 * ranks - 1 - at]
        both = schedule in ("dualpipe", "chimera") and ranks > 1
        rows = [at, ranks - 1 - at] if both else rows
        self.held = -np.sort(-np.stack(rows, 1), 1)
        hops = np.arange(self.num_stages) * (ranks > 1)
        # Ranks that a first microbatch leaves
        self.hops = (hops - (vee & (hops >= ranks)))[:, None]
        self.share = 0.5 if both else 1.0
        self.paired = schedule in PAIRED
        # Of those with the same bounds, but for `split`
        self.kind = virtual, vee, both, self.paired

    def __call__(
        self,
        stages: np.ndarray,
        share: np.ndarray,
        times: np.ndarray | float,
        send: np.ndarray | float,
    ) -> np.ndarray:
        """Seconds at least for each size, as `bounds` takes them."""
        first, whole, split = self.bounds(stages, share, times, send)
        return np.maximum(first, split) if self.split else whole

    def bounds(
        self,
        stages: np.ndarray,
        share: np.ndarray,
        times: np.ndarray | float,
        send: np.ndarray | float,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each size of a microbatch, of which a step has so many `times`: its `share` of the samples that
        the rows of `stages` [stage, numbers] are of, `send` seconds of a message from rank to rank. Another
        microbatch's compute hides what it can. Three: all of a rank's work behind its first forward; the same
        and the tail behind it, where backwards are whole (never below the first); and where weight halves are
        apart what of it is not one of them, between the head and the tail."""
        forward, back, whole, _ = halves(stages, share, HIDES * self.paired)
        messages = self.hops * send
        head = (forward.cumsum(0) - forward + messages)[self.held]
        times = times * self.share
        first = times * (forward + whole)[self.held].cumsum(1)
        first += head
        second = times * (forward + back)[self.held].cumsum(1)
        second += head + (back.cumsum(0) - back + messages)[self.held]
        tail = (whole.cumsum(0) - whole + messages)[self.held]
        most = np.maximum.reduce
        return most(first, (0, 1)), most(first + tail, (0, 1)), most(second, (0, 1))

    def fewest(self, split: Sequence[int]) -> float:
        """Layers that a microbatch meets on the rank with fewest, over those of an even split."""
        layers = np.array(split)[self.held].sum(1) * self.share
        return float(layers.min() * len(layers) / sum(split))
