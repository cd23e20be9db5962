"""The judge's experts by themselves: ties, groups, capacity, auxiliary losses. test_hf holds its numbers."""

from dataclasses import replace

import pytest
import torch

from partita.comm.random.seeds import normal_box
from partita.model.reference import Reference, loss_and_gradients, weight_shapes
from partita.model.reference_moe import Told, choice, moe
from partita.parallel.ep.router import choose
from partita.spec.model import ModelSpec
from partita.train.step import Microbatch

SEQ, VOCAB = 6, 11
MOE = ModelSpec(
    family="llama", layers=3, hidden=8, heads=2, ffn_hidden=12, vocab=VOCAB, max_seq_len=SEQ,
    experts=4, top_k=2, expert_ffn_hidden=6, dense_layers=1, balance_loss=0.3, z_loss=0.2,
)  # fmt: skip


def judge_of(spec):
    weights = {
        n: normal_box(1, n, s, [(0, k) for k in s], std=0.4).double()
        for n, s in weight_shapes(spec).items()
    }
    return Reference(spec, weights)


def microbatches(*sizes):
    generator = torch.Generator().manual_seed(2)
    row = torch.randint(0, VOCAB, (sum(sizes), SEQ + 1), generator=generator)
    valid = torch.rand(sum(sizes), SEQ, generator=generator) < 0.6
    parts = zip(*(t.split(sizes) for t in (row[:, :-1], row[:, 1:], valid)), strict=True)
    return [Microbatch(i, t, v, None, torch.arange(len(i))) for i, t, v in parts]


def test_ties_go_to_the_lower_expert():
    even = torch.zeros(3, 4)
    assert choose(MOE, even, None).tolist() == [[0, 1]] * 3
    assert choose(MOE, even, torch.tensor([0.0, 0.0, 1.0, 0.0])).tolist() == [[2, 0]] * 3


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_only_the_best_groups_are_open(router):
    """Softmax groups are worth their best expert, sigmoid ones the sum of their two best."""
    spec = replace(MOE, experts=6, router=router, router_groups=3, router_top_groups=1)
    scores = torch.tensor([0.9, 0.0, 0.1, 0.2, 0.5, 0.6])
    assert choose(spec, scores, None).tolist() == ([0, 1] if router == "softmax" else [5, 4])


def test_a_choice_that_is_as_good_is_followed_and_no_other():
    """Experts 1 and 2 are 0.01 apart: a choice of either is right where scores may be 0.005 off, each."""
    spec, ranked = replace(MOE, top_k=2), torch.tensor([0.9, 0.50, 0.51, 0.2]).expand(1, 3, 4)
    judge, theirs = judge_of(spec), torch.tensor([[0, 2], [1, 0], [0, 3]])
    judge.samples, own = torch.tensor([7]), choice(spec, ranked)
    assert own.tolist() == [[[0, 2]] * 3]
    for near, followed in ((0.006, [1, 0]), (0.004, [0, 2])):
        told = Told({(0, "blocks.1", 7): theirs}, near)
        assert told.follow(judge, "blocks.1", ranked, own).tolist() == [[[0, 2], followed, [0, 2]]]


def test_later_positions_are_dropped_beyond_the_capacity():
    """One expert wanted by all: 2 of 6 rows stay with factor 2 * 6 * 1 / 6 experts; the others give zero."""
    spec = replace(MOE, experts=6, top_k=1, capacity_factor=2.0)
    judge = judge_of(spec)
    gate = torch.zeros(6, 8, dtype=torch.float64)
    gate[3] = 1.0
    judge = Reference(spec, {**judge.weights, "blocks.1.router.gate": gate})
    h = torch.rand(2, SEQ, 8, dtype=torch.float64) + 0.1
    y, aux = moe(judge, "blocks.1", h), judge.auxiliary
    assert aux.counts["blocks.1"].tolist() == [0, 0, 0, 12, 0, 0]
    assert aux.dropped == 8
    assert (y.abs().sum(-1) > 0).tolist() == [[True, True, False, False, False, False]] * 2


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_gradients_are_those_of_the_loss_and_its_auxiliaries(router):
    """Along a random direction of each weight, for a loss that holds the auxiliary means over samples."""
    judge, batches = judge_of(replace(MOE, router=router)), microbatches(1, 2)
    total = sum(int(b.valid.sum()) for b in batches)
    _, gradients = loss_and_gradients(judge, batches)

    def whole(weights):
        moved = Reference(judge.spec, weights)
        return sum(float(moved.loss(b, total) + moved.auxiliary.loss / 3) for b in batches)

    for name, gradient in gradients.items():
        step = 1e-6 * normal_box(3, name, gradient.shape, [(0, n) for n in gradient.shape]).double()
        up, down = (
            whole({**judge.weights, name: judge.weights[name] + sign * step}) for sign in (1, -1)
        )
        assert (up - down) / 2 == pytest.approx(float((gradient * step).sum()), rel=1e-5, abs=1e-11)


def test_auxiliary_losses_do_not_change_with_the_microbatches():
    spec = replace(MOE, router_bias=True)
    seen = []
    for sizes in ((4,), (1, 3), (2, 1, 1)):
        judge = judge_of(spec)
        loss, gradients = loss_and_gradients(judge, microbatches(*sizes))
        seen.append((loss, judge.auxiliary, gradients))
    for loss, auxiliary, gradients in seen[1:]:
        assert loss == pytest.approx(seen[0][0], rel=1e-12)
        assert auxiliary.balance == pytest.approx(seen[0][1].balance, rel=1e-12)
        assert auxiliary.z == pytest.approx(seen[0][1].z, rel=1e-12)
        for name, g in gradients.items():
            assert torch.allclose(g, seen[0][2][name], rtol=1e-10, atol=1e-14), name


def test_a_balance_bias_finds_its_experts_counts_for_a_gradient():
    judge = judge_of(replace(MOE, router_bias=True))
    _, gradients = loss_and_gradients(judge, microbatches(2, 2))
    counts = gradients["blocks.2.router.balance_bias"]
    assert int(counts.sum()) == 4 * SEQ * 2
    assert torch.equal(counts.long(), judge.auxiliary.counts["blocks.2"])
