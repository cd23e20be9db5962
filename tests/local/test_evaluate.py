"""Evaluation does not depend on the plan: the same sequences, the same mean."""

import verify_jobs

from partita.comm.local import local
from partita.spec.job import Job
from partita.train.build import assemble


def evaluated(world, job):
    built = assemble(job, world)
    found = [(built.evaluate(batch), valid) for batch, valid in built.eval_batches()]
    return sum(x * n for x, n in found) / sum(n for _, n in found), sum(n for _, n in found)


def test_every_plan_evaluates_to_the_same_loss(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 60)
    results = []
    for plan in ("fp64", "tp2+sp pp2/2mb fp64", "dp4 fp64", "dp2 pp2/4mb fp64"):
        base = verify_jobs.job(tmp_path, plan, vocab=256).to_table()
        base["data"] = {"source": str(text), "tokenizer": "byte", "eval_fraction": 0.2}
        job = Job.load(base)
        with local(job.plan.world_size, 20) as ranks:
            found = ranks.run(evaluated, job)
        assert len({loss for loss, _ in found}) == 1
        results.append(found[0])
    tokens = {n for _, n in results}
    assert len(tokens) == 1, results
    assert max(x for x, _ in results) - min(x for x, _ in results) < 1e-12
