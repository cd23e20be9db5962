"""A runner whose ranks are processes: equal logits, and nothing left when a rank dies or it is closed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from serve_models import PAGE, PAGES, Random, greatest_difference, model, sequences, walk

from partita.base.errors import CheckpointError, RankLostError
from partita.comm.processes import is_alive
from partita.model.families.export import export
from partita.serve.part import STEP_S
from partita.serve.runner import open_runner


def test_processes_answer_until_one_is_killed(tmp_path):
    spec = model("llama")
    export(tmp_path / "hf", spec, Random(spec).values().__getitem__, dtype=torch.float64)
    runner = open_runner(
        tmp_path / "hf", "tp2 pp2", backend="processes", dtype="fp64", pages=PAGES, page_size=PAGE
    )
    way = runner._way
    pids, scratch = [process.pid for process, _ in way.ranks], way._scratch
    try:
        assert greatest_difference(runner, spec, lengths=(12, 5)) < 1e-9
        os.kill(pids[1], signal.SIGKILL)
        start = time.monotonic()
        (step,) = walk(sequences(spec, 3), sizes=(3,))
        with pytest.raises(
            RankLostError, match=r"rank 1 is lost: its process ended .killed by signal 9"
        ):
            runner.run(step)
        assert time.monotonic() - start < STEP_S / 2  # not by waiting in vain
    finally:
        runner.close()
    assert not any(map(is_alive, pids))
    assert not scratch.exists()
    assert not list(Path("/dev/shm").glob(f"*{scratch.name}*"))


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named(tmp_path):
    """By who waits for it."""
    spec = model("llama")
    export(tmp_path / "hf", spec, Random(spec).values().__getitem__, dtype=torch.float64)
    sizes = {"pages": PAGES, "page_size": PAGE, "step_s": 1.0}
    runner = open_runner(tmp_path / "hf", "tp2", backend="processes", dtype="fp64", **sizes)
    pids = [process.pid for process, _ in runner._way.ranks]
    try:
        (step,) = walk(sequences(spec, 3), sizes=(3,))
        runner.run(step)
        os.kill(pids[1], signal.SIGSTOP)
        told = r"rank 1 did not come within 1 s: tp all_reduce .*embedding"
        with pytest.raises(RankLostError, match=told) as error:
            runner.run(step)
        assert error.value.rank == 1
    finally:
        runner.close()
    assert not any(map(is_alive, pids))


def test_a_rank_that_cannot_load_is_the_error(tmp_path):
    spec = model("llama")
    values = Random(spec).values()
    export(tmp_path / "hf", spec, values.__getitem__)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: not a readable safetensors file"
    ):
        open_runner(tmp_path / "hf", "tp2", backend="processes")
