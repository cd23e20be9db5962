"""What anybody would try is never faster than the answer."""

from collections import Counter
from dataclasses import replace

from partita.planner.nodes import ANY, Queue, measures
from partita.planner.search import searcher
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.spec.plan import Plan


def test_no_answer_is_worse_than_the_best_of_one_rank():
    """Four ranks that share a core, of which bounds know little, so that a search ends by its budget."""
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
