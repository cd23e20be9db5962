"""The way of GPUs, taken on the CPU: `device = "cuda"` on one host but for the device and nccl, which knows
no keys, carries a pair's messages of one group in one row, and connects two ranks when both first come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faults
import pytest
import torch

from partita.comm.distributed import torch as world
from partita.comm.distributed import torch_comm
from partita.comm.processes import start_ranks
from partita.train.launch import rank as ranks

PLAN = "pp2:interleaved_1f1bx2/4mb cp2:ring"  # two ranks send each other both ways, ahead of their computing
LAYERS = {"layers": 4}
Way = tuple[int, int]  # places that send and receive


def on_gpus(number: int, channel: Any, spec: ranks.RunSpec) -> None:
    """A rank that takes its CPU for a GPU, and gloo for nccl."""
    world.BOTH, world.GPU = "gloo", "cpu"
    torch_comm.tag_of = lambda key: 0  # who matches messages by their keys finds none
    ranks.computes_on_gpu = lambda job: True
    ranks.device_of = lambda job, number: torch.device("cpu")
    connect, way = torch_comm.TorchComm.connect, torch_comm.TorchComm._way
    used, connected = set[tuple[int, Way]](), set[tuple[int, Way]]()

    def connecting(comm: Any, word: torch.Tensor, pairs: Any) -> None:
        connect(comm, word, pairs)
        connected.update(used)
        used.clear()

    def going(comm: Any, source: int, to: int) -> Any:
        group = way(comm, source, to)
        used.add((id(group), (source, to)))
        both = {(group, (b, a)) for group, (a, b) in used} & used
        # at once: the launcher does not wait for what a rank does after its outcome is told
        Path(f"ways-{number}").write_text(f"{len(used)} {len(both)} {len(used - connected)}")
        return group

    torch_comm.TorchComm.connect = connecting  # type: ignore[method-assign]
    torch_comm.TorchComm._way = going  # type: ignore[method-assign]
    ranks.run_rank(number, channel, spec)


def test_a_run_takes_the_way_of_gpus(tmp_path, scratch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faults.write_job(model=LAYERS, train={"global_batch_size": 4, "steps": 2})
    assert faults.train("plan=4mb", "name=alone") == 0
    monkeypatch.setattr(
        "partita.train.launch.launcher.start_ranks",
        lambda n, _, args: start_ranks(n, on_gpus, args),
    )
    assert faults.train(f"plan={PLAN}") == 0
    alone = faults.metrics(Path("runs/alone"))
    for found, one in zip(faults.metrics(), alone, strict=True):
        assert found == pytest.approx(one, rel=1e-5)
    for number in range(4):
        used, both, unconnected = map(int, Path(f"ways-{number}").read_text().split())
        assert used >= 4 and both == unconnected == 0
    assert not faults.left_behind(scratch)


def test_who_sends_to_each_other_on_a_lane():
    """Stages of modules skip some on a wire; each rank is in a pair at a time, all in one order."""
    ring = [(0, 1), (2, 3), (0, 4), (1, 2), (3, 4)]
    assert world.pairs_of("pp_down.1", 5) == world.pairs_of("cp", 5) == ring
    assert world.pairs_of("pp_up", 2) == [(0, 1)] and world.pairs_of("tp", 4) == []
    assert world.pairs_of("wire.0.up", 3) == [(0, 1), (0, 2), (1, 2)]
