"""Drawn tokens follow the softmax, and the seed alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from partita.model.generate import continued, drawn, likeliest

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


def test_each_token_has_noise_of_its_own():
    """Not that of the one before, moved by a word."""
    choose, even = drawn(0, 1.0), torch.zeros(64)
    found = [choose(even, n) for n in range(200)]
    for apart in range(-3, 4):
        assert sum(b - a == apart for a, b in pairwise(found)) < 20


class Body:
    """Hands the ids on, and notes what it saw."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, batch):
        self.seen.append(batch.ids[0].tolist())
        return batch.ids.unsqueeze(-1)


class Head:
    """Says the number behind the last one; of padding, that it is likeliest of all."""

    def logits(self, x):
        row = torch.zeros(*x.shape[:2], 12)
        row.scatter_(-1, (x + 1) % 10, 1.0)
        row[..., 10:] = 2.0
        return row


def test_a_continuation_sees_the_last_tokens_and_no_more_than_the_window():
    body = Body()
    assert continued([body, Head()], [4, 5, 6], 5, window=4, vocab=10) == [7, 8, 9, 0, 1]
    assert body.seen == [[4, 5, 6], [4, 5, 6, 7], [5, 6, 7, 8], [6, 7, 8, 9], [7, 8, 9, 0]]
