"""What anybody would try is never faster than the answer; and of ranks that take turns on cores."""

from collections import Counter
from dataclasses import replace

import pytest
from drawn_plans import wide
from test_planner import equals_brute_force, hold_many

from partita.planner.search.nodes import ANY, Queue, measures
from partita.planner.search.search import Search, searcher
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.spec.plan import Plan


def test_no_answer_is_worse_than_the_best_of_one_rank():
    """Four ranks that share a core."""
    job = Job.of("tiny", "4xh100", "", global_batch_size=8, seq_len=64)
    cluster = replace(Cluster.load("laptop"), memory_bytes=10**9, cores_shared=1)
    search = searcher(replace(job, cluster=cluster), forbid=("recompute",))
    plans = (Plan.parse(f"{n}mb {search.space.dtype}") for n in (1, 2, 4, 8))
    queue = Queue(ANY, Counter())
    for node in search.roots():
        queue.push(node)
    search._alone(queue, float("inf"))
    told = [search.predict(plan) for plan in plans]
    assert queue.best[0][0] <= min(ANY.key(*measures(p)) for p in told)


def turns(search: Search, cores: int, crowding: dict[str, float], **words) -> Search:
    """The same where four ranks share so many cores."""
    cluster = replace(search.job.cluster, cores_shared=cores, crowding=crowding)
    return searcher(replace(search.job, cluster=cluster), **words)


@pytest.mark.parametrize(
    ("model", "cores", "crowding"),
    [("tiny", 1, {"1": 1.0, "2": 1.3, "4": 1.2}), ("tiny-moe", 3, {"2": 1.1})],
)
def test_no_bound_of_ranks_that_take_turns_is_above_what_simulate_says(model, cores, crowding):
    hold_many(turns(wide(model, "laptop", 8), cores, crowding), 5, 15)


def test_the_best_of_ranks_that_take_turns_is_that_of_brute_force_by_few_simulations():
    words = {"forbid": ("recompute", "cp", "sp", "1mb", "4mb", "8mb")}
    search = turns(wide("tiny", "laptop", 8, layers=4), 2, {"1": 1.0, "4": 1.1}, **words)
    equals_brute_force(search, ANY)
    found = searcher(search.job, **words).best(top=3)
    assert found.simulated < found.considered / 10
