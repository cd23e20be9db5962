"""What a judged plan is told: a way out that is legal as a whole, and one last line that says why not."""

import json
from dataclasses import replace

import pytest

from partita.cli.main import run
from partita.planner.answers.explain import reason
from partita.planner.answers.judge import judged
from partita.planner.search.nodes import measures
from partita.simulate.predict import simulate
from partita.spec.job import Job

LINES = (
    "tp3", "tp3 cp3", "pp9/2mb", "dp3 tp3+sp", "pp2:zb_h2/2mb cp3", "ep2", "cp8:ulysses tp2",
    "pp4:interleaved_1f1bx2/3mb tp3", "offload:cpu pp2:pipedream/2mb", "dp_shard4.zero3 pp2:pipedream/2mb",
    "tp2+sp cp3 pp3", "pp4:dualpipe/4mb dp3",
)  # fmt: skip
ASKED = ("--global-batch-size", "8", "--seq-len", "64")


def job(line: str) -> Job:
    return Job.of("tiny", "8xh100", line, global_batch_size=8, seq_len=64)


@pytest.mark.parametrize("line", LINES)
def test_what_would_be_legal_is_legal_as_a_whole(line: str) -> None:
    found = judged(job(line))
    wrong = [p for p in found.problems if p.severity == "error"]
    assert wrong and not found.fits
    assert any(p.nearest for p in wrong)
    for problem in wrong:
        if problem.nearest:
            again = simulate(job(problem.nearest)).problems
            assert [p for p in again if p.severity == "error"] == []


def test_two_stages_more_than_layers_are_told_the_split_that_fills_them() -> None:
    """Llama 3 405B: 126 layers, embedding and head are the 128 stages of 16 ranks (Llama Team 2024)."""
    line = "pp16:interleaved_1f1bx8/16mb dp_shard128.zero1 tp8+sp bf16"
    asked = Job.of("llama3-405b", "16384xh100", line, global_batch_size=2048, seq_len=8192)
    (wrong,) = judged(asked).problems
    assert "126 layers cannot fill 128 stages, unless" in wrong.message
    assert wrong.nearest is not None and line in wrong.nearest
    found = simulate(asked.with_plan(wrong.nearest))
    assert found.laid is not None and found.step_time_s is not None
    names = [s.names for s in found.laid.stages]
    assert names[:2] == [("embedding",), ("blocks.0",)] and names[-2:] == [
        ("blocks.125",),
        ("head",),
    ]


def test_a_plan_that_is_too_big_has_its_ledger_once(capsys) -> None:
    words = ["plan", "llama3-8b", "8xh100", "--plan", "dp_replicate8", *ASKED]
    assert run(words) == 1
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("optimizer ")]
    assert len(rows) == 1


def test_equal_times_are_neither_faster_nor_slower() -> None:
    asked = job("tp2 8mb")
    other = simulate(asked)
    assert other.step_time_s is not None
    slower = replace(other, step_time_s=other.step_time_s * (1 + 1e-6))
    assert "32.0 ms as here" in reason(asked, slower, "itself", asked.plan).text


@pytest.mark.parametrize("verb", ["simulate", "plan"])
def test_an_illegal_plan_is_told_on_the_last_line(verb: str, capsys) -> None:
    words = [verb, "tiny", "8xh100", "--plan", "tp3 cp3", *ASKED]
    assert run(words) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("partita: cp3:ring tp3 8mb: mesh: cp*tp = 3*3 = 9 ranks")
    assert "would be legal: " in out
    assert run([*words, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    told = told["plans"][0] if verb == "plan" else told
    assert told["fits"] is False and told["step_time_s"] is None
    assert {p["room"] for p in told["problems"]} >= {"mesh", "cp", "tp"}


def test_a_judged_plan_is_shown_and_saved(tmp_path, capsys) -> None:
    page, saved = tmp_path / "p.html", tmp_path / "job.toml"
    words = ["plan", "tiny", "8xh100", "--plan", "tp2 8mb", *ASKED]
    assert run([*words, "--html", str(page), "--save", str(saved)]) == 0
    assert "tp2 8mb" in page.read_text() and str(Job.load(saved).plan) == "tp2 8mb"
    capsys.readouterr()
    words[4:5] = ["tp3"]  # illegal: there is nothing to show, and that is said
    page.unlink()
    assert run([*words, "--html", str(page)]) == 1 and not page.exists()
    assert "nothing was measured or written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked",
    [
        ("--solve", "devices"),
        ("--pareto", "time,memory"),
        ("--fix", "tp2"),
        ("--forbid", "cp"),
        ("--precision", "bf16"),
    ],
)
def test_what_asks_the_search_is_refused_beside_a_plan(asked, capsys) -> None:
    assert run(["plan", "tiny", "8xh100", "--plan", "tp2 8mb", *ASKED, *asked]) == 2
    assert f"{asked[0]} asks the search" in capsys.readouterr().err.splitlines()[-1]


def test_a_judged_plan_knows_goals(capsys) -> None:
    words = ["plan", "tiny", "8xh100", "--plan", "tp2 8mb", *ASKED, "--goal"]
    assert run([*words, "speed"]) == 2 and run([*words, "memory"]) == 0
    assert "MB instead of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "warned"), [("", True), ("recompute.modules=norm,core", False), ("dropout", False)]
)
def test_selective_recompute_that_makes_nothing_again_is_warned_of(
    words: str, warned: bool
) -> None:
    asked = job(f"8mb recompute:selective {words.replace('dropout', '')}")
    if words == "dropout":
        asked = replace(asked, model=replace(asked.model, family="gpt2", kv_heads=0, dropout=0.1))
    found = simulate(asked)
    assert any("changes nothing" in p.message for p in found.problems) == warned
    same = simulate(asked.with_plan(asked.plan.with_("recompute", mode="none")))
    assert (measures(found)[1] == measures(same)[1]) == warned
    for p in found.problems:
        if p.rule == "core":
            assert (
                p.nearest and measures(simulate(asked.with_plan(p.nearest)))[1] < measures(same)[1]
            )
