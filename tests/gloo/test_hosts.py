"""Two hosts are one run: their losses are those of one host, both save, and one host goes on from it.

They are network namespaces of this machine (netns.py), which need root and `ip`: they are made only where
`--hosts` asks for them, and then what is missing is a failure. What befalls hosts is campaign.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import campaign
import faults
import pytest
from netns import Hosts, missing

from partita.train.checkpoints import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def hosts(request) -> Iterator[Hosts]:
    if not request.config.getoption("--hosts"):
        pytest.skip("two hosts are made only where --hosts asks for them")
    if missing():
        pytest.fail(f"no hosts on this machine: {missing()}")
    with Hosts() as made:
        yield made


def test_two_hosts_are_one_run(hosts, tmp_path: Path, scratch: Path, monkeypatch) -> None:
    """Four replicas, so that their group spans hosts with two ranks on each; clocks hours apart."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    faults.write_job(plan="dp_replicate4", train={"global_batch_size": 4})
    words = ("train", "job.toml", "train.steps=4", "--json")
    agents = [
        hosts.start(h, campaign.agent(h, *words), folder=tmp_path, monotonic_s=9999 * h)
        for h in range(2)
    ]
    assert [a.wait(200) for a in agents] == [0, 0], [a.err for a in agents]
    answer = json.loads(agents[0].out)  # rank 0 speaks, and it alone
    assert (answer["step"], answer["run"], agents[1].out) == (4, "runs/small", "")
    newest = checkpoint.newest_complete(faults.RUN / "checkpoints")
    assert newest is not None and newest.name == "step-00000004"
    assert {p.name for p in newest.glob("*.safetensors")} == {
        f"rank-{r}.safetensors" for r in range(4)
    }
    assert faults.train("name=alone") == 0
    alone = faults.metrics(Path("runs/alone"))
    for one, other in zip(faults.metrics(), alone, strict=False):
        assert one == pytest.approx(other, rel=1e-5)
    # One host goes on: there everything listens on loopback, or does not
    listening: set[str] = set()
    one = hosts.start(
        1, [campaign.sys.executable, "-m", "partita", "train", "job.toml"], folder=tmp_path
    )
    while one.process.poll() is None:
        listening |= {address for address, _ in hosts.listeners(1)}
    assert one.process.poll() == 0, one.err
    assert all(x.startswith(("127.0.0.1:", "[::1]:")) for x in listening), listening
    assert faults.metrics()[-1] == pytest.approx(alone[-1], rel=1e-5)
    assert not faults.left_behind(scratch)
