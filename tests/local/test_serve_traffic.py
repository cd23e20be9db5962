"""What a serving step sends, and what weights and pages take, is what the laid program says, to the byte."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from serve_models import PAGE, PAGES, Random, model, opening, sequences, walk

from partita.comm.threads.local import LocalRanks
from partita.model.families.export import export
from partita.model.transformer import LayerBlock
from partita.parallel.laid import lay
from partita.record.transfer import summarise
from partita.serve import forecast as foretelling
from partita.serve.part import Part
from partita.serve.runner import open_runner
from partita.serve.stats import Times
from partita.simulate.serving.cut import Shape, traffic_of
from partita.simulate.serving.memory import held
from partita.simulate.serving.works import SERVERS
from partita.spec.cluster import Cluster

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


@pytest.mark.parametrize("known", [True, False])
def test_a_server_says_what_it_holds(tmp_path, monkeypatch, known):
    """Weights and pages of the fullest rank; seconds where the machine was measured, and beside them what
    tokens took."""
    spec = model("qwen2", tied=False)
    export(tmp_path, spec, Random(spec).values().__getitem__, dtype=torch.float32)
    measured = replace(Cluster.load("laptop"), piece_seconds={} if known else None)
    monkeypatch.setattr(foretelling, "calibrated", lambda cluster: measured)
    with closing(open_runner(tmp_path, "tp2", dtype="fp32", pages=PAGES, page_size=PAGE)) as runner:
        told = foretelling.forecast(tmp_path, "tp2", "fp32", runner, "cpu")
        alone = foretelling.forecast(tmp_path, "", "fp32", runner, "cpu")
    assert told.weights < alone.weights == 4 * spec.parameters()
    assert (
        2 * told.pages == alone.pages == 2 * (PAGES + 1) * PAGE * 2 * 2 * 8 * 4
    )  # layers; k, v; heads
    tokens = Times()
    assert not told.beside(tokens.seen())
    tokens.add(0.5)
    seen = told.beside(tokens.seen())
    assert (
        (told.itl_s is not None)
        == known
        == ("a token every 500 ms" in seen)
        == ("token" in str(told))
    )
