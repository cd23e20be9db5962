"""What a cut sequence costs as another way to lay experts tells it: never more than laid, nearly as much."""

import pytest

from partita.planner.bounds.bound import ENDLESS
from partita.planner.bounds.columns import TIMES, TRAVEL
from partita.planner.bounds.rough import HIDES
from partita.planner.bounds.table import Table
from partita.planner.search.search import searcher
from partita.planner.space import MeshChoice, Shape, Tokens
from partita.spec.job import Job

ABOVE = 1e-4  # of it: another way hides a little more; bounds leave out twenty times that


@pytest.mark.parametrize("device", ["16xh100", "16xa100"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_cut_sequence_costs_what_is_told_of_it_wherever_experts_lie(device, mode):
    job = Job.of("deepseek-v2-lite", device, "", global_batch_size=64, seq_len=4096)
    search, told = searcher(job), 0
    b, tokens = search.bounds, Tokens(mode, 1, ENDLESS)
    for cp, method in ((2, "ring"), (4, "all_gather"), (4, "ulysses")):
        for ep in (1, 8, 2, 16):
            mesh = MeshChoice(1, 16 // cp, cp, 1, False)
            b.table(mesh._replace(cp=1), Shape(ep=ep), tokens)
            shape = Shape(method, ep=ep)
            known, laid = b.rings.told(mesh, shape, tokens), b.table(mesh, shape, tokens)
            assert isinstance(laid, Table) and (known is None) == (ep == 1)
            if known is None:
                continue
            told += 1
            for hides in (0.0, HIDES):
                least, took = (
                    x.rows[:, TIMES].sum(1) - hides * x.rows[:, TRAVEL] for x in (known, laid)
                )
                assert (least <= cp * took * (1 + ABOVE)).all()
                assert (least >= cp * took * 0.9).all()
    assert told == 9
