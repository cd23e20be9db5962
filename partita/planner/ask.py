"""A question to the planner and its answer: what `partita plan` asks, in one value each; and `plan = "auto"`,
which asks for the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from partita.base.errors import PlanError, UsageError
from partita.planner.beyond import precise, turned
from partita.planner.elsewhere import widened
from partita.planner.explain import binds, why
from partita.planner.nodes import ANY, KEEP, Goal
from partita.planner.search import Found, Search, searcher
from partita.planner.solve import Solved, goal_of, nothing_fits, pareto, solve
from partita.planner.splits import splits
from partita.simulate.predict import Prediction
from partita.spec.job import Job
from partita.spec.plan_table import CHOICES

AUTO_S = 20.0


@dataclass(frozen=True)
class Question:
    """What is best (`goal`, or a front of two, 'time,memory'), or how much fits (`solve`); words the plan
    must have and must not; plans in the answer; seconds the search may take; precisions to choose from, of
    which a front and what is solved for take the first."""

    goal: str = "time"
    top: int = 5
    fix: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    budget_s: float = 60.0
    pareto: str = ""
    solve: str = ""
    precision: tuple[str, ...] = ()

    def search(self, job: Job) -> Search:
        """A search of the job's plans under the words, in the first precision. Raises UsageError."""
        known = CHOICES["precision", "dtype"]
        for dtype in self.precision:
            if dtype not in known:
                raise UsageError(
                    f"--precision {dtype} is none of {', '.join(known)}", key="precision"
                )
        return searcher(job, (*self.fix, *self.precision[:1]), self.forbid)


@dataclass(frozen=True)
class Answer:
    """What was found, and sentences: why the best plan, or why none fits and what would. `measured`: seconds
    of a step and bytes of the fullest rank by the line of a plan that was run."""

    found: Found
    plans: tuple[Prediction, ...]
    texts: tuple[str, ...] = ()
    solved: Solved | None = None
    measured: Mapping[str, tuple[float, int]] = field(default_factory=dict)


def searched(search: Search, goal: Goal, question: Question) -> Found:
    """The best plans over all choices: of the search's own space, then of what is beyond it."""
    top, budget_s = question.top, question.budget_s
    found = search.best(goal, top, budget_s)
    left = budget_s - found.seconds
    search, found = precise(search, question.precision, goal, top, found, left)
    for more in (widened, turned, splits):
        left = budget_s - found.seconds
        found = more(search, goal, top, found, left) if left > 0 else found
    return found


def resolved(job: Job, budget_s: float = AUTO_S) -> Job:
    """The job with the plan that 'auto' stands for; itself where it has one. Raises PlanError."""
    if not job.auto:
        return job
    question = Question(top=1, budget_s=budget_s)
    found = searched(searcher(job), ANY, question)
    if not found.plans:
        lines = nothing_fits(job, searcher, budget_s / 4)
        raise PlanError("\n".join(['plan = "auto" found none', *lines]))
    return job.with_plan(found.plans[0].plan)


def ask(job: Job, question: Question) -> Answer:
    """Searches. Raises UsageError where the question cannot be."""
    if question.solve:
        solved = solve(job, question.solve, question.search, question.budget_s)
        return Answer(solved.found, tuple(solved.found.plans[: question.top]), (), solved)
    goal = goal_of(job, question.goal)
    search = question.search(job)
    if question.pareto:
        first, _, second = question.pareto.partition(",")
        found = pareto(search, first, second, question.budget_s)
    else:
        found = searched(search, goal, question)
    if not found.plans:
        texts = nothing_fits(job, question.search, question.budget_s / 4)
        if not found.complete:
            texts = [f"no plan was found in {question.budget_s:g} s: not proven", *texts]
        return Answer(found, (), tuple(texts))
    best = found.plans[0]
    texts = [binds(job, best), *(r.text for r in why(job, best))]
    most = KEEP if question.pareto else question.top
    return Answer(found, tuple(found.plans[:most]), tuple(texts))
