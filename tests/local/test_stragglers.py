"""A slow rank is named by its own time beside that of ranks with equal work; noise names nobody."""

from __future__ import annotations

import random

import pytest

from partita.train.stragglers import HISTORY, STEPS, WARM_UP, Stragglers

STAGES = {"peers": [0, 0, 0, 0, 1, 1, 1, 1], "two": [0, 0], "alone": [0, 1, 2]}
BEGIN = WARM_UP + HISTORY


def times(places: list[int], dice: random.Random, noise: float) -> list[float]:
    """One step: stages take 0.1, 0.3 and 0.5 s, all of them longer in some steps."""
    busy = dice.choice((1.0, 1.0, 1.7))
    return [(0.1 + 0.2 * p) * busy * dice.lognormvariate(0, noise) for p in places]


@pytest.mark.parametrize("places", STAGES.values(), ids=STAGES)
def test_a_slow_rank_is_named_once_and_is_through_later(places):
    dice, watch = random.Random(0), Stragglers(places)
    for step in range(BEGIN):
        slow = times(places, dice, 0.03)
        slow[1] *= 3 if step == WARM_UP else 1  # one slow step is none
        assert watch.see(slow) == ([], []) and watch.worst is None
    for step in range(1, 21):
        slow = times(places, dice, 0.03)
        slow[1] *= 2
        named, through = watch.see(slow)
        assert [s.rank for s in named] == ([1] if step == STEPS else []) and not through
    assert watch.worst is not None and watch.worst.ratio == pytest.approx(2, rel=0.1)
    assert str(watch.worst).startswith("rank 1 takes 2.0 times as long for a step")
    for step in range(1, STEPS + 1):
        named, through = watch.see(times(places, dice, 0.03))
        assert not named and through == ([1] if step == STEPS else [])
    assert watch.worst is None


@pytest.mark.parametrize("places", STAGES.values(), ids=STAGES)
def test_noise_names_nobody(places):
    dice, watch = random.Random(1), Stragglers(places)
    for _ in range(2000):
        busy = times(places, dice, 0.12)
        busy[dice.randrange(len(busy))] *= dice.choice((1, 1, 4))  # someone is held up now and then
        assert watch.see(busy) == ([], [])


def test_a_difference_of_milliseconds_and_what_is_not_known_yet_are_nothing():
    watch = Stragglers([0, 0])
    for busy in [[0.003, 0.009]] * 30 + [[0.0, 0.5]] * 30:
        assert watch.see(busy) == ([], [])
