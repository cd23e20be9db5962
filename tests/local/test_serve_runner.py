"""A runner's logits, of sequences in pieces, are those of the reference on whole ones: float64."""

from __future__ import annotations

import pytest
import torch
from serve_models import FAMILIES, MAX_LEN, PAGES, greatest_difference, model, opening, sequences

from partita.base.errors import UsageError
from partita.parallel.laid import lay
from partita.serve.piece import Piece
from partita.serve.runner import SingleRunner
from partita.simulate.serving.kept import page_bytes

CLOSE = 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_equals_the_reference(family):
    spec = model(family)
    assert greatest_difference(SingleRunner(opening(spec)), spec) < CLOSE


@pytest.mark.parametrize(
    ("piece", "told"),
    [
        (Piece((1, 99), 0, (0,)), "token 99 is not within the vocabulary of 37"),
        (Piece((1,), MAX_LEN, tuple(range(13))), f"position {MAX_LEN} is behind the last"),
        (Piece((1,) * 5, 0, (0,)), "1 pages of 4 do not hold 5 tokens"),
        (Piece((1,), 0, (PAGES,)), f"a page is not within 0 .. {PAGES - 1}"),
        (Piece((1,), 0, (0,), want=2), "logits of 2 are wanted"),
        (Piece((), 0, (0,), want=0), "0 tokens"),
    ],
)
def test_a_piece_that_cannot_be_is_refused_before_anything_runs(piece, told):
    runner = SingleRunner(opening(model("llama")))
    good = Piece((3, 4), 0, (1,), 2)
    before = runner.run([good])
    with pytest.raises(UsageError, match=told):
        runner.run([good, piece])
    assert torch.equal(runner.run([good]), before)


def test_what_pages_held_before_reaches_nobody():
    """Not even numbers that are none, which a weight of zero would hand on."""
    spec = model("llama")
    runner = SingleRunner(opening(spec))
    (ids,) = sequences(spec, 6)
    piece = Piece(tuple(ids), 0, (2, 5), 6)
    right = runner.run([piece])
    for block in runner._part.blocks[1:-1]:
        block.attention.core.keys[:PAGES].fill_(torch.nan)
        block.attention.core.values[:PAGES].fill_(torch.nan)
    assert torch.equal(runner.run([piece]), right)
    beside = runner.run([Piece((1,), 0, (7,), 1), Piece(tuple(ids[:5]), 0, (5, 2), 5)])
    assert torch.allclose(beside[1:], right[:5], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_bf16_is_near(family):
    spec = model(family)
    worst = greatest_difference(SingleRunner(opening(spec, dtype="bf16")), spec)
    assert CLOSE < worst < 1.0  # of logits of about 5


def test_weights_are_all_that_is_held():
    spec = model("llama")
    units = SingleRunner(opening(spec, dtype="bf16"))._part.units
    held = {x.untyped_storage() for u in units for x in (u.working, u.master, u.gradient, u.sums)}
    assert sum(x.nbytes() for x in held) == 2 * spec.parameters()


def test_of_latent_attention_the_latent_is_kept():
    spec = model("latent")
    core = SingleRunner(opening(spec))._part.blocks[1].attention.core
    assert core.keys.shape[2:] == (1, 8 + 4) and core.values.shape[2:] == (1, 8)
    assert core.values.untyped_storage().data_ptr() == core.keys.untyped_storage().data_ptr()
    laid = lay(opening(spec).request)
    assert page_bytes(laid, 4) == 2 * 4 * 12 * 8  # layers, tokens, numbers, bytes


def test_a_sequence_beside_others_differs_by_roundings_alone(tolerance):
    spec = model("llama")
    runner = SingleRunner(opening(spec, dtype="fp32"))
    one, two, long = sequences(spec, 9, 9, 30)
    alone = runner.run([Piece(tuple(one), 0, (0, 1, 2), 9)])
    beside = runner.run(
        [
            Piece(tuple(long), 0, tuple(range(10, 18)), 30),
            Piece(tuple(one), 0, (3, 4, 5), 9),
            Piece(tuple(two), 0, (6, 7, 8), 9),
        ]
    )
    bound = alone.abs().max() * tolerance("fp32", spec.hidden * spec.layers)
    assert (beside[30:39] - alone).abs().max() < bound
