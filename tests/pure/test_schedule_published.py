"""Published bubble rates, from the times their authors profiled: within 0.02 (most within 0.001).

zb-t5: Qi et al. 2024 (arXiv 2401.10241), bubble = 1 - m(F+I+W) / span. Their ZB-1p and ZB-2p are schedules
made under 1F1B's memory and twice that, so ours are `auto`'s on a line; a weight half needs the linears'
inputs alone, 32 of the 34 + 5as/h bytes a token and hidden that a layer keeps.
vocabpar-csv: Yeung et al. 2024 (VocabularyParallelism's one-host runs), bubble = 1 - m mean(F+B+S) / step.
"""

import csv
import re
from pathlib import Path

import pytest

from partita.schedule.clock import Costs, StageCosts, clock, makespan, span
from partita.schedule.make import schedule
from partita.schedule.synth.synthesis import Task, synthesise

TABLE = Path(__file__).parents[2] / "validation" / "measurements.csv"
with TABLE.open() as file:
    ROWS = [
        row for row in csv.DictReader(file)
        if row["group"] in ("zb-t5", "vocabpar-csv") and row["metric"] == "bubble_rate"
    ]  # fmt: skip
# milliseconds of F, I, W of a stage and of a message, by model and m (the paper's profile)
PROFILE = {
    ("GPT-1.5B", 24): (18.522, 18.086, 9.337, 0.601),
    ("GPT-1.5B", 64): (18.546, 18.097, 9.321, 0.762),
    ("GPT-6.2B", 32): (29.802, 29.428, 19.530, 0.577),
    ("GPT-6.2B", 64): (29.935, 29.621, 19.388, 0.535),
    ("GPT-14.6B", 48): (11.347, 11.248, 8.132, 0.377),
    ("GPT-14.6B", 64): (11.307, 11.254, 8.101, 0.379),
    ("GPT-14.6B", 128): (11.325, 11.308, 8.109, 0.378),
    ("GPT-28.3B", 96): (10.419, 10.207, 7.715, 0.408),
    ("GPT-28.3B", 128): (10.408, 10.204, 7.703, 0.408),
    ("GPT-28.3B", 256): (10.402, 10.248, 7.698, 0.460),
}
NAMES = {"1f1b": "1f1b", "1f1b-interleaved": "interleaved_1f1b", "zb-h1": "zb_h1", "zb-h2": "zb_h2"}
CHUNKS = {"GPT-1.5B": 3, "GPT-6.2B": 4, "GPT-14.6B": 3, "GPT-28.3B": 2}  # one layer each
LIMIT = {"zb-1p": 1, "zb-2p": 2}


def rows(group: str, large: bool) -> list[dict[str, str]]:
    """Of one group; large: p * m is more than a moment's work for a search."""
    found = [r for r in ROWS if r["group"] == group]
    return [r for r in found if (r["schedule"] in LIMIT and int(r["pp"]) > 8) == large]


def zero_bubble_rate(row: dict[str, str]) -> float:
    """Our bubble for a row of the zero-bubble paper."""
    p, m = int(row["pp"]), int(re.search(r"m=(\d+)", row["notes"])[1])  # type: ignore[index]
    f, i, w, c = PROFILE[row["model_name"], m]
    name = row["schedule"]
    if name in LIMIT:
        h, a, s = (int(row[key]) for key in ("hidden", "heads", "seq_len"))
        kept = 32 * h / (34 * h + 5 * a * s)
        task = Task(
            p, m, Costs((StageCosts(f, i, w),), c), LIMIT[name] * p, until_weights=kept, stages=1,
            copies=1, goal="span", effort=0, proof=0.0,
        )  # fmt: skip
        found = synthesise(task)
        assert span(clock(found.schedule, found.costs)) == pytest.approx(found.makespan)
        return 1 - m * (f + i + w) / found.makespan
    v = CHUNKS[row["model_name"]] if name == "1f1b-interleaved" else 1
    made = schedule(NAMES[name], num_ranks=p, num_microbatches=m, virtual_stages=v)
    return 1 - m * (f + i + w) / span(clock(made, Costs.equal(made, f, i, w, c)))


@pytest.mark.parametrize("row", rows("zb-t5", large=False), ids=lambda row: row["id"])
def test_the_zero_bubble_papers_rates(row):
    assert zero_bubble_rate(row) == pytest.approx(float(row["value"]), abs=0.02)


@pytest.mark.slow
@pytest.mark.turns(2)
@pytest.mark.timeout(120)
@pytest.mark.parametrize("row", rows("zb-t5", large=True), ids=lambda row: row["id"])
def test_the_zero_bubble_papers_rates_of_many_ranks(row):
    assert zero_bubble_rate(row) == pytest.approx(float(row["value"]), abs=0.02)


@pytest.mark.parametrize("row", rows("vocabpar-csv", large=False), ids=lambda row: row["id"])
def test_vocabulary_parallelisms_rates(row):
    """A vocabulary pass S runs with the backward; interlaced, all ranks run it together, as long as the
    slowest."""
    f, b, s = (
        [float(x) for x in re.search(rf"{kind}_us=([\d ]+)", row["notes"])[1].split()]  # type: ignore[index]
        for kind in "FBS"
    )
    work = sum(f + b + s) / len(f)
    if "interlaced" in row["notes"]:
        s = [max(s)] * len(s)
    p, m = int(row["pp"]), int(row["global_batch"])
    made = schedule("1f1b", num_ranks=p, num_microbatches=m)
    stages = tuple(StageCosts(x, y, z) for x, y, z in zip(f, b, s, strict=True))
    step = makespan(clock(made, Costs(stages)))
    assert 1 - m * work / step == pytest.approx(float(row["value"]), abs=0.02)


def test_no_row_is_left_out():
    assert len(ROWS) == len(rows("zb-t5", False)) + len(rows("zb-t5", True)) + 20
