"""A short step exists where one of many microbatches does, and its ranks hold as much."""

import numpy as np
import pytest

from partita.base.errors import ScheduleError
from partita.planner.bounds.holds import short_step
from partita.planner.bounds.table import Probe, probe_of
from partita.schedule.make import schedule


def probe(name: str, p: int, m: int, v: int) -> Probe | None:
    try:
        return probe_of(schedule(name, num_ranks=p, num_microbatches=m, virtual_stages=v))
    except ScheduleError:
        return None


@pytest.mark.parametrize("name", ["1f1b", "interleaved_1f1b", "interleaved_zb", "zb_h2", "zb_v"])
def test_a_short_step_exists_where_the_whole_does_and_holds_as_much(name):
    v = 2 if name.startswith("interleaved") or name == "zb_v" else 1
    compared = 0
    for p in (2, 3, 5):
        kept = np.arange(1.0, p * v + 1)
        for m in range(2 * p + 1, 6 * p):
            whole, short = (probe(name, p, n, v) for n in (m, short_step(name, p, m)))
            assert (whole is None) == (short is None), (p, m)
            if whole is not None and short is not None:
                most = [x.most(kept, 0.7 * kept)[0] for x in (whole, short)]
                assert np.array_equal(*most), (p, m)
                compared += 1
    assert compared > 5
