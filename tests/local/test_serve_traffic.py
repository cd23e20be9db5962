"""What a serving step sends, and what weights and pages take, is what the laid program says, to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
from serve_models import PAGE, PAGES, model, opening, sequences, walk

from partita.comm.threads.local import LocalRanks
from partita.model.transformer import LayerBlock
from partita.parallel.laid import lay
from partita.record.transfer import summarise
from partita.serve.part import Part
from partita.simulate.serving.cut import Shape, traffic_of
from partita.simulate.serving.memory import held
from partita.simulate.serving.works import SERVERS

ALL = {"top_k": 4}  # every token goes to every expert: what routers choose changes nothing
PLANS = [
    ("tp2", "llama", {}),
    ("tp2+sp", "qwen2", {}),
    ("tp2", "latent", {}),
    ("pp2", "gpt2", {}),
    ("tp2+sp pp2", "latent", {}),
    ("ep2 dp2", "moe", ALL),
    ("tp2+sp ep2", "moe", ALL),
    ("tp2 etp2", "moe", ALL),
]


@pytest.mark.parametrize(("plan", "family", "changes"), PLANS)
def test_recorded_equals_declared(plan, family, changes):
    spec = model(family, **changes)
    opened = opening(spec, plan, "fp32")
    steps = [
        [replace(p, want=min(2, p.want)) for p in step] for step in walk(sequences(spec, 23, 6, 1))
    ]

    def run(world):
        part = Part(opened, world, world.where)
        for pieces in steps:
            part.run(pieces)
        return summarise(part.context.recorder.take()), memory(part)

    recorded = LocalRanks(opened.ranks, 30.0, lambda world: world).run(run)
    laid = lay(opened.request)
    shapes = [
        Shape(chunk=sum(len(p.tokens) for p in step), wanted=sum(p.want for p in step))
        for step in steps
    ]
    assert any(sent for sent, _ in recorded)
    stages = held(laid, None, SERVERS["partita"], PAGE)
    for rank, (sent, (weights, pages)) in enumerate(recorded):
        assert sent == traffic_of(laid, rank, shapes)
        of = stages[laid.mesh.coords(rank)["pp"]]
        assert (weights, pages) == (of.weights, (PAGES + 1) * of.page)


def memory(part):
    """Bytes of a rank's weights and of its pages."""
    cores = [b.attention.core for b in part.blocks if isinstance(b, LayerBlock)]
    pages = {
        t.untyped_storage().data_ptr(): t.untyped_storage()
        for c in cores
        for t in (c.keys, c.values)
    }
    weights = sum(u.master.nbytes for u in part.units)
    return weights, sum(x.nbytes() for x in pages.values())
