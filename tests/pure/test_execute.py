"""Every laid plan computes what one device computes: loss, norm, every gradient, the weights after two
steps; and sends what it declares."""

from __future__ import annotations

import pytest
from executed import DROPS, GPT2, LLAMA, TIED, difference, laid

from partita.parallel.execute import execute

PLANS = [
    "tp2", "tp4", "tp2+sp", "tp4+sp", "dp_replicate2", "dp_shard2.zero0", "pp2/1mb", "pp2/2mb",
    "dp_replicate2 tp2", "dp_replicate2 pp2/2mb", "pp2/2mb tp2+sp",
    "dp_replicate2 pp2/2mb tp2+sp", "dp_replicate2 dp_shard2.zero0 tp2",
]  # fmt: skip
CASES = [(m, p) for m in (LLAMA, TIED, GPT2, DROPS) for p in PLANS]


@pytest.mark.parametrize("recompute", ["", " recompute:full"], ids=["keeps", "replays"])
@pytest.mark.parametrize(("spec", "line"), CASES)
def test_plan_equals_one_device(spec, line, recompute) -> None:
    whole = laid(spec, line + recompute)
    got = execute(whole)
    assert difference(spec, got, 2) == ""
    for rank in range(whole.mesh.world_size):
        assert got.traffic[rank] == whole.traffic(rank)
