"""Drawn tokens follow the softmax, and the seed alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from partita.model.generate import drawn, likeliest

LOGITS = torch.tensor([1.0, 0.0, 2.0, -30.0])


def test_the_same_seed_draws_the_same():
    first, second, other = (drawn(s, 0.8) for s in (1, 1, 2))
    found = [[c(LOGITS, n) for n in range(50)] for c in (first, second, other)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_frequencies_are_the_softmax(temperature):
    choose, count = drawn(0, temperature), 4000
    seen = Counter(choose(LOGITS, n) for n in range(count))
    for token, p in enumerate((LOGITS / temperature).softmax(0).tolist()):
        spread = 4 * (p * (1 - p) / count) ** 0.5  # four standard deviations
        assert abs(seen[token] / count - p) <= spread + 1e-9


def test_a_cold_draw_is_the_likeliest():
    assert {drawn(0, 1e-6)(LOGITS, n) for n in range(20)} == {likeliest(LOGITS, 0)} == {2}
