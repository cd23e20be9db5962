"""A runner of several ranks gives the reference's logits, on thread ranks: float64. One that loses a rank
says which."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import asdict, replace

import pytest
import torch
from serve_models import PAGE, PAGES, Random, greatest_difference, model, opening, sequences, walk

from partita.base.errors import CheckpointError, RankLostError, UsageError
from partita.model.families.export import export
from partita.serve import ranks
from partita.serve.part import Part
from partita.serve.runner import SingleRunner, open_runner, started
from partita.train.checkpoints import checkpoint as saved

CLOSE = 1e-9
THREE = {"hidden": 48, "heads": 6, "kv_heads": 3, "ffn_hidden": 45}
PLANS = [
    ("tp2", "llama", {}),
    ("tp3", "llama", THREE),
    ("tp4", "llama", {}),  # two ranks share a kv head
    ("tp2", "sliding", {"kv_heads": 1}),
    ("tp2+sp", "gpt2", {}),
    ("tp2", "bloom", {}),
    ("tp2", "latent", {}),
    ("tp2+sp", "latent", {}),
    ("pp2", "neox", {}),
    ("pp2", "qwen2", {}),  # tied: both stages hold the table
    ("tp2 pp2", "qwen3", {}),
    ("ep2 dp2", "moe", {}),
    ("tp2+sp ep2", "switch", {}),
    ("tp2 etp2", "moe", {}),
    ("tp2+sp pp2 ep2", "moe", {}),
]


@pytest.mark.parametrize(("plan", "family", "changes"), PLANS)
def test_ranks_equal_the_reference(plan, family, changes):
    spec = model(family, **changes)
    with closing(started(opening(spec, plan))) as runner:
        assert greatest_difference(runner, spec, lengths=(23, 6, 1)) < CLOSE


def test_stages_work_on_several_steps():
    """What is started before the first answer is asked for comes in order, each right."""
    spec = model("llama")
    alone = SingleRunner(opening(spec))
    ids = sequences(spec, 9, 12, 5)
    steps = [s for x in range(3) for s in walk([ids[x]], seed=x)]
    with closing(started(opening(spec, "pp2"))) as runner:
        under_way = [(runner.start(s), s) for s in steps]
        for started_step, step in reversed(under_way):
            assert started_step.result().shape == (sum(p.want for p in step), spec.vocab)
        for step in steps:
            assert torch.allclose(runner.run(step), alone.run(step), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hugging_face_folder_under_a_plan(tmp_path, dtype):
    spec = model("qwen2", tied=False)
    export(tmp_path / "hf", spec, Random(spec).values().__getitem__, dtype=dtype)
    runner = open_runner(tmp_path / "hf", "tp2", dtype="fp64", pages=PAGES, page_size=PAGE)
    with closing(runner):
        near = CLOSE if dtype == torch.float64 else 1e-3
        assert greatest_difference(runner, spec, lengths=(9,)) < near
        assert (runner.vocab, runner.max_len) == (spec.vocab, spec.max_seq_len)


def test_a_checkpoint_saved_by_three_ranks_under_another_plan(tmp_path):
    spec = model("moe")
    values = Random(spec).values()

    def of_rank(rank):
        for number, (name, x) in enumerate(values.items()):
            if number % 3 == rank:
                yield saved.Piece(name, "weight", tuple((0, n) for n in x.shape), x)

    shapes = {n: tuple(x.shape) for n, x in values.items()}
    stated = {k: v for k, v in asdict(spec).items() if not k.startswith("_")}
    header = saved.Header(plan="tp3", tensors=shapes, roles=("weight",), model=stated)
    step = saved.save_alone(tmp_path / "run" / "checkpoints", 5, 3, of_rank, header)
    for folder in (step, tmp_path / "run"):
        runner = open_runner(folder, "pp2", dtype="fp64", memory=100_000, page_size=PAGE)
        with closing(runner):
            assert greatest_difference(runner, spec, lengths=(9,)) < CLOSE
            assert runner.pages == 100_000 // (
                PAGE * 2 * 2 * 8 * 8
            )  # a layer each; k, v; 2 heads of 8


@pytest.mark.parametrize(
    ("held", "told"), [((), "neither a checkpoint"), (("config.json",), "model_type")]
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, held, told):
    for name in held:
        (tmp_path / name).write_text("{}")
    with pytest.raises((CheckpointError, UsageError), match=told):
        open_runner(tmp_path)


def test_a_rank_that_raises_is_named(monkeypatch):
    spec, right = model("llama"), Part.run

    def run(part, pieces):
        if part.context.rank == 1 and pieces[0].start:
            raise RuntimeError("out of luck")
        return right(part, pieces)

    monkeypatch.setattr(Part, "run", run)
    runner = started(opening(spec, "tp2"))
    first, second = list(walk(sequences(spec, 8), sizes=(4,)))
    runner.run(first)
    with pytest.raises(RankLostError, match="rank 1 is lost: RuntimeError: out of luck") as told:
        runner.run(second)
    assert told.value.rank == 1
    with pytest.raises(RankLostError, match="rank 1"):
        runner.run(first)
    runner.close()


def test_a_rank_that_hangs_is_named_with_what_the_other_waits_in(monkeypatch):
    spec, right, goes = model("llama"), Part.run, threading.Event()
    monkeypatch.setattr(ranks, "CLOSE_S", 0.1)

    def run(part, pieces):
        if part.context.rank == 1 and pieces[0].start:
            goes.wait(30)
        return right(part, pieces)

    monkeypatch.setattr(Part, "run", run)
    runner = started(replace(opening(spec, "tp2"), step_s=0.5))
    first, second = list(walk(sequences(spec, 8), sizes=(4,)))
    runner.run(first)
    with pytest.raises(
        RankLostError, match=r"rank 1 did not come within 0.5 s: tp all_reduce .*embedding"
    ):
        runner.run(second)
    goes.set()
    runner.close()


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("dp_replicate2", "dp_replicate2 serves nothing: replicas are servers of their own"),
        ("cp2:ring", "cp2 serves nothing"),
        ("dp_shard2", "dp_shard \\* tp = ep \\* etp: 2 is not 1"),
    ],
)
def test_a_plan_that_serves_nothing_is_refused(plan, told):
    with pytest.raises(UsageError, match=told):
        opening(model("llama"), plan)
