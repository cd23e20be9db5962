"""Faults of context parallelism that others shipped, planted one at a time: verify must see each."""

from dataclasses import replace

import pytest
import torch
import verify_jobs

from partita.parallel.cp import ring, split, travel, ulysses
from partita.parallel.cp.split import Split
from partita.train.step import Model
from partita.verify.parity import verify


@pytest.fixture
def judged(tmp_path):
    def judge(plan, family="llama", **more):
        found = verify(verify_jobs.job(tmp_path, f"{plan} fp64", family, layers=2, **more))
        assert not found.equal, str(found)
        assert found.divergence is not None, str(found)
        return found.divergence

    return judge


@pytest.mark.parametrize("plan", ["cp2:ring", "cp2:ulysses"])
def test_the_loss_averaged_per_rank(judged, monkeypatch, plan):
    count = Model.count

    def local_count(self, batch):
        self.comms = replace(self.comms, count=None)
        count(self, batch)

    monkeypatch.setattr(Model, "count", local_count)
    at = judged(plan)
    axis = "ulysses" if "ulysses" in plan else "cp"
    assert at.expected == ("all_reduce", axis) and "step.count" in at.message


def test_the_ring_drops_a_share_in_backward(judged, monkeypatch):
    """The forward is right, and so is the traffic; what the last layer hands back is wrong."""
    add = travel._Following.add

    def drops(self, owner, parts):
        lost = owner == (self._ring.rank + 1) % self._ring.comm.size
        add(self, owner, [torch.zeros_like(p) for p in parts] if lost else parts)

    monkeypatch.setattr(travel._Following, "add", drops)
    at = judged("cp4:ring")
    assert (at.phase, at.module) == ("backward", "blocks.0.mlp")


def test_zig_zag_positions_taken_for_contiguous(judged, monkeypatch):
    monkeypatch.setattr(
        Split,
        "tables",
        lambda self, rope, a, b: (rope[0][a:b].unsqueeze(0), rope[1][a:b].unsqueeze(0)),
    )
    at = judged("cp2:ring")
    assert (at.phase, at.module) == ("forward", "blocks.0.attention")


def test_learned_positions_of_another_rank(judged, monkeypatch):
    part = split.Tokens.part
    moved = lambda self, a, b: part(self, 0, b - a)  # noqa: E731
    monkeypatch.setattr(split.Tokens, "part", moved)
    assert judged("cp2:ring", "gpt2").phase in ("data", "forward")


@pytest.mark.parametrize("plan", ["cp2:ring", "cp2:all_gather"])
def test_a_document_leaks_into_the_next(judged, monkeypatch, plan):
    monkeypatch.setattr(Split, "_held", lambda self, row, place: frozenset({0}))
    monkeypatch.setattr(
        split, "visible", lambda q, k, w, c: q.positions.unsqueeze(-1) >= k.positions.unsqueeze(-2)
    )
    at = judged(plan, packed=True)
    assert (at.phase, at.module) == ("forward", "blocks.0.attention")


def test_documents_in_the_order_of_the_file(judged, monkeypatch):
    right = Split.of

    def wrong(request, documents=None):
        made = right(request, documents)
        tokens = replace(made.tokens, documents=documents)
        return Split(made.order, tokens, made.ring, made.window)

    monkeypatch.setattr(Split, "of", staticmethod(wrong))
    assert judged("cp2:ring", packed=True).phase == "forward"


def test_tiles_added_without_their_weights(judged, monkeypatch):
    class Plain(ring.Merged):
        def add(self, tile, out, lse):
            super().add(tile, out, torch.where(lse > -torch.inf, torch.zeros_like(lse), lse))

    monkeypatch.setattr(ring, "Merged", Plain)
    at = judged("cp2:ring")
    assert (at.phase, at.module) == ("forward", "blocks.0.attention")


def test_copies_of_a_shared_head_not_added(judged, monkeypatch):
    """Two kv heads on four ranks: backward takes one of the two that come back."""
    back = ulysses.to_sequence

    def takes_one(x, region):
        came = back(x, region)
        if "wv" in region.site:
            came = came * torch.tensor([1, 0, 1, 0]).view(1, 4, 1, 1)
        return came

    monkeypatch.setattr(ulysses, "to_sequence", takes_one)
    assert judged("cp4:ulysses").phase == "backward"


def test_weights_not_reduced_over_cp(judged, monkeypatch):
    from partita.parallel.dp.replicate import Reducer

    start = Reducer._start
    monkeypatch.setattr(
        Reducer, "_start", lambda self, unit: None if "unit[cp]" in unit.name else start(self, unit)
    )
    at = judged("cp2:ring")
    assert at.phase == "gradient" and at.expected == ("all_reduce", "cp")


def test_dropout_by_place_instead_of_position(judged, monkeypatch):
    from partita.model.dropout import Dropout

    monkeypatch.setattr(
        Dropout, "mask", lambda self, step, batch: self._draw(step, batch.samples, self.box)
    )
    at = judged("cp2:ring", "gpt2", dropout=0.2)
    assert at.phase == "forward"
