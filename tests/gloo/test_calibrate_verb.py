"""`partita calibrate` on this machine: real ranks, one document, a file that jobs can read."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest

from partita.cli.main import run as command
from partita.cost.pieces import CROWDED
from partita.spec.cluster import Cluster
from partita.tune.pieces import SHAPES
from partita.tune.probes import COLLECTIVES, Setup


@pytest.mark.timeout(120)
def test_it_measures_and_remembers(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partita.cli.calibrate.FOLDER", tmp_path)
    # The whole of it is run by the quickstart; what lies between the ends is the same again
    quick = partial(Setup, seconds_each=0.02, shapes=(SHAPES[0], SHAPES[-1]))
    monkeypatch.setattr("partita.tune.calibrate.Setup", quick)
    assert command(["calibrate", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "collectives over gloo" in err
    (path,) = tmp_path.glob("*.toml")
    base, made = Cluster.load("laptop"), Cluster.load(path)
    assert found["cluster"] == json.loads(json.dumps(made.to_toml()))
    assert (made.devices, made.memory_limit_bytes) == (base.devices, base.memory_limit_bytes)
    assert 1e8 < made.peak_flops["fp32"] < 1e14
    assert made.memory_bytes_per_s > 1e7
    calls = found["measured"]["collectives"]
    alone = {(o, n) for o in COLLECTIVES for n in (2, 4)}
    beside = {(o + CROWDED, 2) for o in COLLECTIVES}  # two groups of two, where they share cores
    assert alone <= {(c["op"], c["ranks"]) for c in calls} <= alone | beside
    assert all(c["seconds"] > 0 and math.isfinite(c["seconds"]) for c in calls)

    monkeypatch.setattr("partita.tune.calibrate.calibrate", None)  # nothing is measured again
    assert command(["calibrate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
