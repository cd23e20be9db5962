"""`partita draw RUN`: a recorded step beside schedules at what its stages took."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from runs import write_run

from partita.base.errors import UsageError
from partita.cli.drawing import Drawing
from partita.cli.main import run
from partita.record.run import RankRecord, RunFacts, read_forecast
from partita.record.span import Span
from partita.report.actions import recorded_step
from partita.report.summary import RunSummary
from partita.schedule.clock import Costs, StageCosts, clock, makespan
from partita.schedule.make import schedule
from partita.spec.job import Job


def test_a_run_is_drawn_beside_schedules_at_what_its_stages_took(tmp_path, capsys):
    folder = tmp_path / "runs" / "mine"
    write_run(folder)
    predicted = read_forecast(folder)
    assert predicted is not None
    spans = [s for r in predicted.ranks for s in r.spans if s.kind in "FB"]
    svg, html = tmp_path / "a.svg", tmp_path / "a.html"
    words = ["draw", str(folder), "1f1b", "zb_h1", "auto"]
    assert run([*words, "--svg", str(svg), "--html", str(html), "--json"]) == 0
    mine, again, halves, made = json.loads(capsys.readouterr().out)["schedules"]
    assert mine["run"] == str(folder) and "run" not in again
    assert mine["schedule"] == "1f1b" and mine["actions"] == again["actions"]
    assert mine["makespan"] == pytest.approx(1.1 * makespan(spans))
    assert mine["peak_activations"] == [2, 1] and len(mine["idle"]) == 2
    assert halves["num_microbatches"] == made["num_microbatches"] == 4  # the run's
    assert made["makespan"] <= min(halves["makespan"], again["makespan"]) * (1 + 1e-9)
    assert again["makespan"] == pytest.approx(mine["makespan"], rel=0.25)
    assert len(ET.parse(svg).findall(".//{*}g")) == 16 + 16 + 24 + 24
    assert "1f1b, measured" in html.read_text()
    assert run(words[:4]) == 0
    text = capsys.readouterr().out
    rows = [row for row in text.splitlines() if row.startswith("rank 0 | ")]
    assert len(rows) == 3 and f"{folder} (1f1b, measured)" in text


def summary(plan: str, records: list[RankRecord], tmp_path) -> RunSummary:
    """A run of these records."""
    job = Job.load(
        {
            "plan": plan, "model": {"preset": "quickstart"}, "cluster": {"preset": "laptop"},
            "data": {"source": "python-stdlib", "tokenizer": "byte"},
            "train": {"steps": 1, "global_batch_size": 4, "seq_len": 64},
        }
    )  # fmt: skip
    return RunSummary(tmp_path, job, (), None, tuple(records), RunFacts())


def test_a_wait_for_another_rank_is_no_work_and_the_newest_of_two_counts(tmp_path):
    made = schedule("1f1b", num_ranks=2, num_microbatches=2)
    spans = clock(made, Costs.equal(made, 1.0, 1.0, 1.0))
    records = []
    for rank in (0, 1):
        own = [s for s in spans if s.rank == rank]
        late = [replace(s, start_s=s.start_s - 0.5 * (s.name in ("0B1", "1F0"))) for s in own]
        first = replace(late[0], start_s=-9.0, end_s=-8.0)  # undone
        waits = [Span(rank, "host", "wait", "wait", s.start_s, s.start_s + 0.5) for s in late]
        extra = [Span(rank, "compute", "U", "optimizer", 9.0, 9.5)]
        found = sorted([first, *late, *waits, *extra], key=lambda s: s.start_s)
        records.append(RankRecord(2 * rank, spans=tuple(found), step=3))
    got = recorded_step(summary("pp2:1f1b/2mb tp2", records, tmp_path))
    assert [s.name for s in got.spans] == [s.name for s in spans]
    begin = {s.name: s.start_s for s in got.spans}
    assert {name: begin[name] for name in ("0F0", "0B0", "0B1", "1F0", "1B0")} == {
        "0F0": 0.0, "0B0": 4.5, "0B1": 7.0, "1F0": 1.0, "1B0": 2.0,
    }  # fmt: skip
    with pytest.raises(UsageError, match="no recorded step of rank 2"):
        recorded_step(summary("pp2:1f1b/2mb tp2", records[:1], tmp_path))


def test_a_pair_is_cut_and_its_stages_have_costs(tmp_path):
    made = schedule("dualpipev", num_ranks=2, num_microbatches=4)
    spans = []
    for rank, actions in enumerate(made.ranks):
        at = 0.0
        for action in actions:
            beside = action in made.beside
            end = at if beside else at + 3.0
            begin = end - 3.0
            spans.append(
                Span(
                    rank,
                    "compute",
                    action.kind,
                    str(action),
                    begin,
                    end,
                    action.stage,
                    action.microbatch,
                )
            )
            at = end
    records = [RankRecord(r, spans=tuple(s for s in spans if s.rank == r)) for r in (0, 1)]
    got = recorded_step(summary("pp2:dualpipev/4mb", records, tmp_path))
    pairs = [(a, b) for a, b in zip(got.spans, got.spans[1:], strict=False)
             if any(str(x) == a.name for x in made.paired)]  # fmt: skip
    assert pairs
    for a, b in pairs:
        assert (a.duration_s, b.duration_s, b.start_s) == (1.0, 2.0, a.end_s)
    assert len(got.costs.stages) == 4 and all(s.F > 0 and s.I > 0 for s in got.costs.stages)


def test_updates_under_way_are_drawn_at_what_they_took(tmp_path):
    """And schedules beside a run are clocked at it."""
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0F1,0B0,0U0,0B1,0U1\n1F0,1F1,1B0,1U0,1B1,1U1")
    made = schedule(f"file:{path}", num_ranks=2, num_microbatches=2)
    spans = clock(made, Costs((StageCosts(U=0.25), StageCosts(U=0.5))))
    records = [
        RankRecord(r, spans=tuple(s for s in spans if s.rank == r), step=3) for r in range(2)
    ]
    got = recorded_step(summary(f'pp2:"file:{path}"/2mb', records, tmp_path))
    assert [s.name for s in got.spans if s.kind == "U"] == ["0U0", "0U1", "1U0", "1U1"]
    assert [s.U for s in got.costs.stages] == [0.25, 0.5]


def test_a_step_of_an_asynchronous_run_is_said_to_drain():
    made = schedule("pipedream", num_ranks=2, num_microbatches=4)
    assert Drawing(made, clock(made), run="r").name == "r (pipedream, measured: a step that drains)"
    assert Drawing(made, clock(made)).name == "pipedream"
    ahead = [*clock(made), Span(0, "compute", "F", "0F4", 20.0, 21.0, 0, 4)]
    assert Drawing(made, ahead, run="r").name == "r (pipedream, measured)", "it fills the next"


def test_a_folder_that_is_no_run_says_so(tmp_path, capsys):
    assert run(["draw", str(tmp_path), "1f1b"]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_costs_of_a_run_serve_other_numbers_of_ranks():
    from partita.cli.draw_costs import Prices

    recorded = Costs((StageCosts(1, 1, 1), StageCosts(3, 3, 3)))
    prices = Prices(recorded=recorded)
    assert prices.given(2) is recorded and prices.given(1) is recorded
    assert prices.given(4).stages == (StageCosts(1, 1, 1),)
    line, vee = (schedule(n, num_ranks=2, num_microbatches=4) for n in ("1f1b", "zb_v"))
    assert prices.of(line) is recorded
    assert prices.of(vee).stages == (StageCosts(1, 1, 1),) * 4
    assert Prices("2,2,2", recorded).of(line).stages == (StageCosts(2, 2, 2),) * 2
    assert Prices().of(vee).stages == (StageCosts(0.5, 0.5, 0.5),) * 4
