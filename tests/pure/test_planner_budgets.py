"""Small budgets: slices of the time that is left, and a moment's look before a search."""

from dataclasses import replace

from partita.planner.answers.solve import pareto, solve
from partita.planner.search.nodes import ANY, Found, Goal
from partita.planner.search.search import Search, searcher
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
