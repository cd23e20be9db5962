"""A token from a row: the interfaces' definitions, and draws that follow them."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from partita.base.errors import NonFiniteError
from partita.serve.request import SamplingParams
from partita.serve.sampler import Drawing, changed, choose, kept, likeliest, logprob

ROW = torch.tensor([2.0, -1.0, 0.5, 0.5, -3.0])


def drawing(index: int = 0, prompt=(), counts=None, seed: int = 4, **given) -> Drawing:
    return Drawing(SamplingParams(**given), seed, index, frozenset(prompt), dict(counts or {}))


def test_penalties_are_as_openai_defines_them():
    """logit - count * frequency - [count > 0] * presence, of the answer's tokens; the prompt's only count
    for repetition_penalty, which divides what is positive and multiplies what is not."""
    counts = {0: 3, 1: 1}
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = changed(ROW.double(), params, {2}, counts)
    assert found.tolist() == pytest.approx([2 - 0.75 - 0.5, -1 - 0.25 - 0.5, 0.5, 0.5, -3])
    found = changed(ROW.double(), SamplingParams(repetition_penalty=2.0), {2, 4}, counts)
    assert found.tolist() == pytest.approx([1.0, -2.0, 0.25, 0.5, -6.0])
    found = changed(ROW.double(), SamplingParams(logit_bias={3: 1.5, 0: -100}), (), {})
    assert found.tolist() == pytest.approx([-98.0, -1.0, 0.5, 2.0, -3.0])
    assert ROW.tolist() == [2.0, -1.0, 0.5, 0.5, -3.0]


@pytest.mark.parametrize(
    "given, ids",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 2]),  # of equals the lowest id
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.7}, [0, 2]),
        ({"top_p": 1e-9}, [0]),
        ({"top_k": 3, "top_p": 0.999}, [0, 2, 3]),
        ({"min_p": 0.2}, [0, 2, 3]),
        ({"min_p": 1.0}, [0]),
    ],
)
def test_what_may_be_drawn(given, ids):
    assert kept(ROW.double(), SamplingParams(**given)).tolist() == ids


def test_draws_follow_the_softmax_of_what_is_kept():
    one, count = drawing(temperature=0.8, top_k=4), 1000
    seen = Counter(choose(ROW, one, number) for number in range(count))
    for token, p in enumerate((ROW[:4] / 0.8).softmax(0).tolist()):
        assert abs(seen[token] / count - p) <= 4 * math.sqrt(p * (1 - p) / count)
    assert 4 not in seen


def test_a_draw_is_of_its_seed_choice_and_number():
    def draws(**given):
        return [choose(ROW, drawing(**given), number) for number in range(40)]

    assert draws() == draws() != draws(seed=5)
    assert draws() != draws(index=1)
    even = torch.zeros(64)
    found = [choose(even, drawing(), number) for number in range(300)]
    for apart in range(-3, 4):  # one number says nothing of the next
        assert sum(b - a == apart for a, b in pairwise(found)) < 25
    assert len(set(found)) > 50


def test_the_likeliest_is_the_first_of_equals_and_of_numbers():
    rows = torch.tensor([[1.0, 3.0, 3.0], [0.0, torch.nan, 1.0], [torch.inf, 0, 0], [-9.0, -9, -8]])
    assert likeliest(rows) == [1, -1, -1, 2] and likeliest(rows[:0]) == []
    assert choose(rows[0], drawing(temperature=0.0), 0) == 1
    for row in rows[1:3]:
        for temperature in (0.0, 1.0):
            with pytest.raises(NonFiniteError, match="not finite"):
                choose(row, drawing(temperature=temperature), 7)


def test_a_mask_rules_out():
    allowed = torch.tensor([False, True, False, True, False])
    assert choose(ROW, drawing(temperature=0.0), 0, allowed) == 3
    assert {choose(ROW, drawing(temperature=5.0), n, allowed) for n in range(60)} == {1, 3}
    with pytest.raises(NonFiniteError, match="no token is allowed"):
        choose(ROW, drawing(), 0, torch.zeros(5, dtype=torch.bool))


def test_log_probabilities_sum_to_one():
    found = logprob(ROW, 1, 5)
    assert found.logprob == pytest.approx(float(ROW.double().log_softmax(0)[1]))
    assert [i for i, _ in found.top] == [0, 2, 3, 1, 4]
    assert sum(math.exp(p) for _, p in found.top) == pytest.approx(1.0, abs=1e-12)
    assert logprob(ROW, 1, 0).top == ()
