"""Small budgets: slices of the time that is left, and a moment's look before a search."""

from collections import Counter
from dataclasses import replace

import pytest

from partita.planner.answers.ask import Question, ask
from partita.planner.answers.solve import nothing_fits, pareto, solve
from partita.planner.search.nodes import ANY, INF, Found, Goal, Queue
from partita.planner.search.search import Search, measures, searcher
from partita.simulate.predict import simulate
from partita.spec.cluster import Cluster
from partita.spec.job import Job

JOB = Job.of("tiny", "4xh100", "", global_batch_size=8, seq_len=64)


def test_a_plan_that_fits_more_is_no_new_search(monkeypatch):
    """A search whose budget is over at once for every value but the first."""
    cluster = replace(Cluster.load("4xh100"), memory_bytes=4 * 10**6)
    job, asked = replace(JOB, cluster=cluster), []
    search = Search.best

    def best(self, goal=ANY, *rest, **words):
        asked.append(goal)
        late = len(asked) > 1 and words.get("first")
        return Found(complete=False) if late else search(self, goal, *rest, **words)

    monkeypatch.setattr(Search, "best", best)
    solved = solve(job, "seq_len", lambda j: searcher(j, ("1mb",), ("cp", "offload")), 20)
    assert solved.value and solved.value > 64 and not solved.proven
    assert "is not known: --budget 80 may tell" in solved.text
    longer = replace(job, train=replace(job.train, seq_len=solved.value))
    assert simulate(longer.with_plan(solved.found.plans[0].plan)).fits


def test_a_front_that_ends_by_its_budget_has_its_other_end(monkeypatch):
    search = searcher(JOB, ("1mb",), ("cp", "offload", "recompute"))
    whole = pareto(search, "time", "memory", 60.0).plans
    best = Search.best

    def late(self, goal=ANY, *rest, **words):
        """Nothing is found under a limit."""
        under = goal.under != Goal().under
        return Found(complete=False) if under else best(self, goal, *rest, **words)

    monkeypatch.setattr(Search, "best", late)
    ends = pareto(search, "time", "memory", 60.0).plans
    assert len(whole) > 2
    assert [p.plan for p in ends] == [whole[0].plan, whole[-1].plan]


def test_each_goal_cuts_by_the_seconds_that_no_better_plan_takes():
    search = searcher(JOB, ("1mb",), ("cp", "offload", "recompute"))
    plan = next(p for p in search.best(top=20).plans if measures(p)[2] == 2)
    seconds, num_bytes, _ = measures(plan)

    def cuts(goal: Goal) -> tuple[float, ...]:
        queue = Queue(goal, Counter(), seen=[plan])
        return *(queue.cut_of(world) for world in (1, 2, 4)), queue.cut_bytes

    every = {
        "time": (seconds, seconds, seconds, INF),
        "memory": (INF, INF, INF, num_bytes),
        "devices": (INF, seconds, seconds, INF),
        "cost": (2 * seconds, seconds, seconds / 2, INF),
    }
    for name, wanted in every.items():
        assert cuts(Goal(name, price=float(name == "cost"))) == pytest.approx(wanted)
    under = (seconds * 3, num_bytes * 2, INF, INF)
    assert cuts(Goal("memory", under)) == pytest.approx((seconds * 3,) * 3 + (num_bytes,))
    assert cuts(Goal("time", under))[3] == num_bytes * 2
    fewer = Queue(Goal("time", (INF, INF, INF, 4 * seconds), 1.0), Counter())
    assert [fewer.cut_of(n) for n in (1, 2)] == pytest.approx([4 * seconds, 2 * seconds])


def test_where_nothing_fits_what_would_is_looked_for_with_offload_too():
    job = Job.of("tiny", "1xh100", "", global_batch_size=8, seq_len=64)
    job = replace(job, cluster=replace(job.cluster, memory_bytes=10**6))
    lines = nothing_fits(job, lambda j: searcher(j, ("bf16",), ("recompute",)), 240.0)
    wanted = ("seq_len 56 fits (8mb bf16 offload:cpu)", "layers 1 fits (4mb bf16 offload:cpu)")
    assert lines[0].startswith("nothing fits")
    assert [line.partition(", ")[0] for line in lines[1:]] == [f"would fit: {w}" for w in wanted]


def test_where_nothing_fits_in_the_precision_of_the_rates_the_other_is_named():
    job = Job.of("tiny", {"preset": "laptop", "devices": 1}, "", global_batch_size=8, seq_len=64)
    job = replace(job, cluster=replace(job.cluster, memory_bytes=1_100_000))
    words = ("recompute",)
    told = ask(job, Question(forbid=words))
    assert not told.plans
    (line,) = (x for x in told.texts if x.startswith("would fit: bf16, with "))
    assert simulate(job.with_plan(line.removeprefix("would fit: bf16, with "))).fits
    assert ask(job, Question(fix=("bf16",), forbid=words)).plans
    stated = ask(job, Question(fix=("fp32",), forbid=words)).texts
    assert stated and not any("bf16" in x for x in stated)
