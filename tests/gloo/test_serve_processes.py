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
from partita.serve.ranks import TIMEOUT_S
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
        assert time.monotonic() - start < TIMEOUT_S / 5  # not by waiting in vain
    finally:
        runner.close()
    assert not any(map(is_alive, pids))
    assert not scratch.exists()
    assert not list(Path("/dev/shm").glob(f"*{scratch.name}*"))


def test_a_rank_that_cannot_load_is_the_error(tmp_path):
    spec = model("llama")
    values = Random(spec).values()
    export(tmp_path / "hf", spec, values.__getitem__)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: not a readable safetensors file"
    ):
        open_runner(tmp_path / "hf", "tp2", backend="processes")
