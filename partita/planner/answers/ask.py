"""A question to the planner and its answer: what `partita plan` asks, in one value each; and `plan = "auto"`,
which asks for the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from partita.base.errors import PlanError, UsageError
from partita.planner.answers.explain import binds, why
from partita.planner.answers.nearby import allowed, nearby
from partita.planner.answers.solve import Solved, goal_of, nothing_fits, pareto, solve
from partita.planner.answers.unequal import by_rates
from partita.planner.search.beyond import faster_dtype, precise
from partita.planner.search.elsewhere import widened
from partita.planner.search.nodes import ANY, KEEP, Goal
from partita.planner.search.search import Found, Search, searcher
from partita.planner.search.splits import finished
from partita.planner.words import Words
from partita.simulate.predict import Prediction
from partita.spec.job import Job
from partita.spec.plan import Plan
from partita.spec.plan_table import CHOICES
from partita.spec.unequal import is_unequal

AUTO_S = 20.0
NEAR_S = 3.0  # of a search that ended by its budget, for what is close to its best


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
        known, words = CHOICES["precision", "dtype"], Words.of(self.fix, self.forbid)
        for dtype in self.precision:
            text = f"is none of {', '.join(known)}" if dtype not in known else ""
            if not text and not words.admit("dtype", dtype):
                text = "is not what --fix and --forbid leave"
            if text:
                raise UsageError(f"--precision {dtype} {text}", key="precision")
        return searcher(job, (*self.fix, *self.precision[:1]), self.forbid)


@dataclass(frozen=True)
class Answer:
    """What was found, and sentences: why the best plan, or why none fits and what would. `measured`: seconds
    of a step and bytes of the fullest rank by the line of a plan that was run; `others`: cores that other
    work took meanwhile, None where nobody counts; `survive`: by the ranks that are left when some are lost,
    the best plan."""

    found: Found
    plans: tuple[Prediction, ...]
    texts: tuple[str, ...] = ()
    solved: Solved | None = None
    measured: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    others: float | None = None
    survive: Mapping[int, Prediction | None] = field(default_factory=dict)


def searched(search: Search, goal: Goal, question: Question) -> Found:
    """The best plans over all choices: of the search's own space, then of what is beyond it."""
    top, budget_s = question.top, question.budget_s
    found = search.best(goal, top, budget_s)
    left = budget_s - found.seconds
    dtypes = question.precision or faster_dtype(search, goal, found)
    search, found = precise(search, dtypes, goal, top, found, left)
    left = budget_s - found.seconds
    found = widened(search, goal, top, found, left)
    found = nearby(search, goal, top, found, NEAR_S)
    return finished(search, goal, top, found, budget_s - found.seconds, every=True)


def _on_devices(job: Job, question: Question, goal: Goal, found: Found) -> Found:
    """The same, on devices that differ with layers by what they reach."""
    if not is_unequal(job.cluster):
        return found

    def of_pp(pp: int) -> Search | None:
        words = (*question.fix, *([f"pp{pp}"] if pp else []))
        try:
            return replace(question, fix=words).search(job)
        except UsageError:  # words that leave it out
            return None

    left = max(question.budget_s - found.seconds, question.budget_s / 4)
    return by_rates(job, of_pp, goal, question.top, found, left)


def _precisions(search: Search, question: Question, found: Found) -> set[str]:
    """Those that plans were searched in."""
    known = {search.space.dtype, Plan.parse(found.plans[0].plan).precision.dtype}
    return known | set(() if question.pareto else question.precision)


def resolved(job: Job, budget_s: float = AUTO_S) -> Job:
    """The job with the plan that 'auto' stands for; itself where it has one. Raises PlanError."""
    if not job.auto:
        return job
    _hold_job(job)
    question = Question(top=1, budget_s=budget_s)
    found = searched(searcher(job), ANY, question)
    found = _on_devices(job, question, ANY, found) if found.plans else found
    if not found.plans:
        lines = nothing_fits(job, searcher, budget_s)
        raise PlanError("\n".join(['plan = "auto" found none', *lines]))
    return job.with_plan(found.plans[0].plan)


def _hold_job(job: Job) -> None:
    """Raises PlanError where the model refuses the job under whatever plan."""
    wrong = [p for p in job.problems() if p.room == "model" and p.severity == "error"]
    if wrong:
        raise PlanError("no plan is legal: the model refuses each", wrong)


def ask(job: Job, question: Question) -> Answer:
    """Searches. Raises UsageError where the question cannot be, PlanError where no plan can."""
    if question.solve and question.pareto:
        text = "--solve asks how much fits, --pareto for a front of plans: one of the two, not both"
        raise UsageError(text, key="pareto")
    if question.solve:
        solved = solve(job, question.solve, question.search, question.budget_s)
        return Answer(solved.found, tuple(solved.found.plans[: question.top]), (), solved)
    _hold_job(job)
    first, _, second = question.pareto.partition(",")
    goal = goal_of(job, question.goal)
    search = question.search(job)
    if question.pareto:
        found = pareto(search, first, second, question.budget_s)
    else:
        found = searched(search, goal, question)
        found = _on_devices(job, question, goal, found) if found.plans else found
    if not found.plans:
        texts = nothing_fits(job, question.search, question.budget_s)
        if not found.complete and found.considered:
            texts = [f"no plan was found in {question.budget_s:g} s: not proven", *texts]
        return Answer(found, (), tuple(texts))
    best = found.plans[0]
    dtypes = _precisions(search, question, found)

    def admitted(plan: Plan) -> bool:
        alike = plan.with_("precision", dtype=search.space.dtype)
        return plan.precision.dtype in dtypes and allowed(search.space.words, alike)

    reasons = why(job, best, first or goal.name, admitted)
    texts = [binds(job, best), *(r.text for r in reasons)]
    most = KEEP if question.pareto else question.top
    return Answer(found, tuple(found.plans[:most]), tuple(texts))
