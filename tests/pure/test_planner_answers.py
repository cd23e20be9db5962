"""Around the search: why, what binds, what fits at most, a front, auto, nothing fits."""

import io
import json
import re
import sys
from collections import Counter
from dataclasses import replace

import pytest

from partita.base.errors import PlanError, UsageError
from partita.cli.main import run
from partita.cli.out import waiting
from partita.planner.answers.answer import counts, document, ranked
from partita.planner.answers.ask import Answer, Question, ask, resolved
from partita.planner.answers.explain import beside, binds, causes, changes, why
from partita.planner.answers.solve import nothing_fits, pareto, solve, with_devices
from partita.planner.search.nodes import Found
from partita.planner.search.search import Search, measures, searcher
from partita.planner.words import Words
from partita.simulate.predict import layers_of, simulate
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.spec.plan import Plan
from partita.spec.prices import Prices

WORDS = {"fix": ("2mb",), "forbid": ("v_half", "v_min", "gpipe", "cp")}


def makes(job: Job) -> Search:
    return searcher(job, **WORDS)


def on_devices(job: Job) -> Search:
    """All of it on the devices."""
    return searcher(job, fix=WORDS["fix"], forbid=(*WORDS["forbid"], "offload"))


def job_of(devices: int, memory: float) -> Job:
    cluster = replace(Cluster.load(f"{devices}xh100"), memory_bytes=int(memory))
    job = Job.of("tiny", "4xh100", "", global_batch_size=8, seq_len=64)
    return replace(job, cluster=cluster)


def test_why_has_the_numbers_of_two_simulations():
    job = job_of(4, 3e6)
    best = makes(job).best().plans[0]
    reasons = why(job, best)
    assert {r.choice for r in reasons} >= {"recompute:none", "2mb"}
    seconds, num_bytes, _ = measures(best)
    for r in reasons:
        again = simulate(job.with_plan(r.changed.plan))
        assert str(again.plan) in r.text
        if again.step_time_s is None:
            assert "cannot be" in r.text
            continue
        theirs, their_bytes, _ = measures(again)
        if their_bytes > again.limit_bytes:
            assert f"{their_bytes / again.limit_bytes:.2f} times" in r.text
        else:
            assert f"({theirs / seconds - 1:+.1%})" in r.text
    for r in why(job, best, "memory"):
        if r.changed.fits:
            assert f"({measures(r.changed)[1] / num_bytes - 1:+.1%}); takes" in r.text
    assert f"({num_bytes / best.limit_bytes:.0%})" in binds(job, best)
    assert sum(causes(best).values()) == pytest.approx(seconds)


def test_other_stages_have_the_balanced_split():
    plan = Plan.parse("pp2:interleaved_1f1bx2/4mb dp_shard2.zero1 pipeline.split=1,2,1,0")
    others = dict(changes(job_of(4, 3e6), plan))
    assert others["pp2"].pipeline.split == others["interleaved_1f1b"].pipeline.split == ()
    assert others["zero1"].pipeline.split == plan.pipeline.split
    assert others["split:1,2,1,0"] == plan.with_("pipeline", split=())
    line = "pp4:1f1b/8mb tp2+sp bf16"
    job = Job.of("llama3-8b", "8xh100", line, global_batch_size=8, seq_len=512)
    even = simulate(job)
    found = {r.choice: r for r in why(job, even)}
    seconds = [s.forward_s + s.backward_s for s in even.timed.stages]
    there = layers_of(found["even split"].changed)
    moved = [b - a for a, b in zip(layers_of(even), there, strict=True)]
    assert sorted(moved) == [-1, 0, 0, 1]
    assert seconds[moved.index(-1)] == max(seconds) and seconds[moved.index(1)] == min(seconds)


def test_a_named_plan_is_told_which_change_makes_it_fastest():
    job = job_of(4, 3e6).with_plan("tp4 4mb recompute:full")
    named = simulate(job)
    told = beside(job, named)
    fit = [r.changed for r in why(job, named) if r.changed.fits]
    best = min(fit, key=lambda p: measures(p)[0])
    change = measures(best)[0] / measures(named)[0] - 1
    assert change < 0 and best.plan in told[1] and f"({change:+.1%})" in told[1]
    assert told[2:] == [r.text for r in why(job, named)]
    fastest = searcher(job_of(4, 3e6)).best().plans[0]
    assert beside(job.with_plan(fastest.plan), fastest)[1].startswith("no change of one choice")


def test_words_that_leave_no_plan_are_named():
    job = job_of(4, 3e6)
    lines = nothing_fits(job, lambda j: searcher(j, fix=("tp3", "2mb")), 4.0)
    assert "none has tp 3 (there may be 1, 2, 4)" in lines[0]
    line = nothing_fits(job, lambda j: searcher(j, fix=("3mb",)), 4.0)[0]
    assert (
        "microbatches 3 (there may be 1, 2, 4, 8): dp times microbatches divides 8 sequences"
        in line
    )
    line = nothing_fits(job, lambda j: searcher(j, fix=("tp2", "2mb"), forbid=("tp",)), 4.0)[0]
    assert line.endswith("none has tp 2 and no tp"), line
    odd = replace(job, train=replace(job.train, micro_batch_size=3))
    line = nothing_fits(odd, lambda j: searcher(j, fix=("tp2",)), 4.0)[0]
    assert line.endswith("micro_batch_size 3 divides no replica's part of 8 sequences"), line
    told = solve(job, "layers", lambda j: searcher(j, fix=("16mb",)), 20.0)
    assert (told.value, told.proven) == (None, False)
    assert told.text.startswith(
        "of layers 2 no plan is legal under these words: none has microbatches 16 (there may be 1"
    )


def test_why_speaks_of_every_choice_of_a_plan_with_experts():
    line = "pp2:interleaved_1f1bx3/8mb dp_shard4.zero1 cp2:ring tp2+sp ep4 bf16"
    size = {"global_batch_size": 32, "seq_len": 1024}
    job = Job.of("mixtral-8x7b", "32xh100", line, **size)
    job = replace(job, model=replace(job.model, layers=12))
    best = simulate(job)
    reasons = {r.choice: r for r in why(job, best)}
    axes = {"pp2", "cp2", "tp2", "+sp", "ep4", "etp1", "dp_shard4"}
    rest = {"ring", "interleaved_1f1b", "x3", "8mb", "recompute:none", "zero1", "bf16"}
    rest |= {"order:tp,cp,dp_shard,dp_replicate,pp", "even split"}
    assert set(reasons) == axes | rest
    for r in reasons.values():
        again = simulate(job.with_plan(r.changed.plan))
        told = "cannot be" if again.step_time_s is None else "instead of" if again.fits else "times"
        assert again.plan in r.text and told in r.text, r.text


def test_images_that_fit_nowhere_are_told_how_much_they_need():
    job = Job.of("alexnet", "laptop", "", global_batch_size=8, seq_len=1)
    fix, forbid = ("1mb", "recompute:full", "pp2:1f1b"), ("tp", "split", "cp")
    lines = nothing_fits(job, lambda j: searcher(j, fix=fix, forbid=forbid), 120.0)
    assert "of 29 MB a rank" in lines[0], lines
    none = "no plan was found on less than 2,097,152 devices"
    assert lines[1:] == [f"how many devices would do was not found: {none}"]
    with pytest.raises(UsageError, match="images"):
        solve(job, "layers", searcher, 1.0)


def test_that_nothing_fits_is_told_on_the_last_line_and_images_need_no_length(capsys):
    words = "plan alexnet laptop --global-batch-size 8 --fix 1mb --fix recompute:full --forbid cp"
    words += " --forbid split --fix pp2:1f1b --budget 40 --json"
    assert run(words.split()) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["plans"] == []
    assert err.splitlines()[-1].startswith("partita: nothing fits"), err
    assert run([*words.split(), "--save", "no/such/job.toml"]) == 2  # before the search
    assert "no/such does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("1025", "seq_len 1025 is longer than max_seq_len 1024"),
        ("128", "'blocks.99' matches no weight"),
    ],
)
def test_what_the_model_refuses_under_every_plan_is_told_before_the_search(
    change, words, tmp_path, capsys
):
    frozen = 'frozen = ["blocks.99"]\n' if change == "128" else ""
    path = tmp_path / "job.toml"
    path.write_text(
        'plan = "auto"\n[model]\npreset = "gpt2"\n[cluster]\npreset = "8xa100"\n'
        f"[train]\nglobal_batch_size = 8\nseq_len = {change}\n{frozen}"
    )
    assert run(["plan", str(path)]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("no plan is legal") and words in err.splitlines()[-1]
    assert run(["plan", str(path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["error"]["kind"] == "plan" and [p["room"] for p in told["problems"]] == ["model"]
    with pytest.raises(PlanError, match="no plan is legal"):
        resolved(Job.load(str(path)))


def test_what_a_search_did_not_come_to_is_not_said_to_fit_nowhere(monkeypatch):
    job, found = job_of(2, 80e9), Found(complete=False)
    monkeypatch.setattr(
        "partita.planner.answers.solve.least_memory", lambda search, budget_s: found
    )
    lines = nothing_fits(job, makes, 0.0)
    assert lines == ["the plan of least memory was not found in 0 s"]
    found = replace(found, plans=[simulate(job.with_plan("tp2 2mb"))])
    (line,) = nothing_fits(job, makes, 0.0)
    assert line.startswith("tp2") and line.endswith("fits: the search had not come to it"), line
    assert "cut by their bound or not looked at, " in counts(found)
    assert "cut by their bound, " in counts(replace(found, complete=True))


def test_a_model_with_overrides_behind_it_is_asked_for_its_cluster(capsys):
    assert run(["simulate", "llama3-8b", "train.seq_len=4"]) == 2
    assert "a model takes a cluster behind it: llama3-8b 16xh100" in capsys.readouterr().err


def test_a_front_is_beaten_nowhere():
    front = [measures(p)[:2] for p in pareto(makes(job_of(4, 80e9)), "time", "memory", 20).plans]
    assert len(front) > 2
    assert front == sorted(front) and [b for _, b in front] == sorted(
        (b for _, b in front), reverse=True
    )


def test_solve_devices_finds_the_edge():
    job = job_of(2, 1.2e6)
    solved = solve(job, "devices", on_devices, 20)
    assert solved.proven and solved.value is not None and solved.value > 2
    below = on_devices(job_of(solved.value - 1, 1.2e6)).best(first=True)
    assert below.complete and not below.plans
    job = job_of(4, 2.8e6)  # three, no divisor of the four that are asked for
    job = replace(job, train=replace(job.train, global_batch_size=12))
    fewer = {"fix": ("1mb", "bf16"), "forbid": (*WORDS["forbid"], "recompute", "offload")}
    solved = solve(job, "devices", lambda j: searcher(j, **fewer), 20)
    assert solved.proven and solved.value == 3
    cluster = replace(job.cluster, devices=2)
    assert not searcher(replace(job, cluster=cluster), **fewer).best(first=True).plans


def test_solve_devices_looks_where_offload_needs_fewer():
    job = job_of(32, 1.2e6)
    alone = solve(job, "devices", on_devices, 20)
    solved = solve(job, "devices", makes, 20)
    assert solved.proven and alone.value is not None and solved.value is not None
    assert solved.value < alone.value and "offload:cpu" in solved.text
    line = solved.found.plans[0].plan
    assert simulate(
        replace(job, cluster=with_devices(job.cluster, solved.value)).with_plan(line)
    ).fits


def test_what_is_doubled_ten_times_and_still_fits_has_no_edge_that_is_told():
    told = solve(job_of(4, 80e9), "layers", lambda j: searcher(j, fix=("2mb",)), 20.0)
    assert (told.value, told.proven) == (2048, False) and "more was not tried" in told.text


def test_solve_layers_finds_the_edge():
    job = job_of(2, 3e6)
    told = solve(job, "layers", makes, 20)
    solved = solve(job, "layers", on_devices, 20)
    assert solved.proven and solved.value
    assert (told.value, told.proven) == (solved.value, False) and "without offload: " in told.text
    for layers, fits in ((solved.value, True), (solved.value + 1, False)):
        deeper = replace(job, model=replace(job.model, layers=layers))
        assert bool(makes(deeper).best(first=True).plans) == fits
    with pytest.raises(UsageError):
        solve(job, "heads", makes, 1)


def test_nothing_fits_says_by_how_much_and_what_would(monkeypatch):
    lines = nothing_fits(job_of(2, 6e5), makes, 20)
    assert "times)" in lines[0] and any("devices" in line for line in lines[1:])
    monkeypatch.setattr("partita.planner.answers.solve.MOST_DEVICES", 1)
    none = "how many devices would do was not found: no plan was found on less than 2 devices"
    assert nothing_fits(job_of(2, 6e5), makes, 8)[1].startswith(none)


def table(memory: int) -> dict:
    return {
        "plan": "auto",
        "model": {"preset": "tiny"},
        "cluster": {"preset": "laptop", "memory_bytes": memory},
        "train": {"global_batch_size": 4, "seq_len": 64, "micro_batch_size": 2},
    }


def test_auto_is_searched_for_and_never_run_unresolved():
    job = Job.load(table(1_500_000))
    assert job.auto and any(p.rule == "auto" for p in simulate(job).problems)
    found = resolved(job, budget_s=2)
    assert not found.auto and simulate(found).fits and resolved(found) is found
    assert Job.load(table(1_500_000), "plan=tp2").auto is False
    with pytest.raises(UsageError, match="auto"):
        Job.load(table(1_500_000), "plan.mesh.tp=2")
    with pytest.raises(PlanError, match="found none"):
        resolved(Job.load(table(50_000)), budget_s=1)


def test_the_verb_answers_in_the_contracts_shape(tmp_path, capsys):
    kept = tmp_path / "job.toml"
    words = (
        "plan tiny 4xh100 --global-batch-size 8 --seq-len 64 --fix 2mb --json --top 2 --forbid cp"
    )
    assert run([*words.split(), "--save", str(kept)]) == 0
    told = json.loads(capsys.readouterr().out)
    first, second = told["plans"]
    assert told["complete"] is True and first["why"]
    assert first["step_time_s"] <= second["step_time_s"]
    assert str(Job.load(kept).plan) == first["plan"]
    more = [*words.split(), "--save", str(kept), "--solve", "seq_len"]
    assert run([*more, "--budget", "5"]) == 0
    value, saved = json.loads(capsys.readouterr().out)["solve"]["value"], Job.load(kept)
    assert saved.train.seq_len == value > 64 and simulate(saved).fits
    assert (
        told["bounded"] + told["simulated"] + sum(told["rejected"].values()) == told["considered"]
    )


PRICES = Prices(device_hour=2.5, watts=1000.0, kwh=0.1)


def test_the_cheapest_plan_pays_least_for_its_devices():
    job = job_of(4, 80e9)
    priced = replace(job, cluster=replace(job.cluster, prices=PRICES))
    asked = Question("cost", top=3, forbid=(*WORDS["forbid"], "1mb"), fix=WORDS["fix"], budget_s=20)
    answer = ask(priced, asked)
    assert answer.found.complete and "a million tokens" in ranked(answer.plans)
    cluster = replace(priced.cluster, prices=replace(PRICES, watts=0.0))
    unmetered = [replace(p, job=replace(priced, cluster=cluster)) for p in answer.plans]
    assert "kWh" in ranked(answer.plans) and "kWh" not in ranked(unmetered)
    per_step = []
    for p in answer.plans:
        told = p.to_json()["cost"]
        seconds, _, world = measures(p)
        per_step.append(told["money_per_step"])
        assert told["money_per_step"] == pytest.approx(world * seconds * (2.5 / 3600 + 0.1 / 3600))
        assert told["energy_per_token_j"] == pytest.approx(world * seconds * 1000 / (8 * 64))
    assert per_step == sorted(per_step)
    fastest = ask(priced, replace(asked, goal="time")).plans[0]
    assert fastest.to_json()["cost"]["money_per_step"] >= per_step[0]
    front = pareto(makes(priced), "cost", "time", 20).plans
    assert [p.step_time_s for p in front] == sorted((p.step_time_s for p in front), reverse=True)
    assert front[0].to_json()["cost"]["money_per_step"] == pytest.approx(per_step[0])
    assert answer.plans[0].plan == front[0].plan
    with pytest.raises(UsageError, match="has none: a table"):
        ask(job, asked)
    no_kwh = replace(job, cluster=replace(job.cluster, prices=Prices(watts=700.0)))
    with pytest.raises(UsageError, match="states no price: watts without kwh"):
        ask(no_kwh, asked)


def test_a_cluster_file_has_prices():
    table = {"preset": "4xh100", "prices": {"device_hour": 2.5, "watts": 1000.0, "kwh": 0.1}}
    cluster = Cluster.load(table)
    assert cluster.prices == PRICES and Cluster.load(cluster.to_toml()) == cluster
    assert simulate(job_of(4, 80e9)).to_json()["cost"] is None
    with pytest.raises(UsageError, match="below 0"):
        Cluster.load({"preset": "4xh100", "prices": {"device_hour": -1.0}})


def test_a_front_of_what_is_solved_for_is_refused(capsys):
    words = ["plan", "tiny", "4xh100", "--global-batch-size", "8", "--seq-len", "64",
             "--solve", "devices", "--pareto", "time,memory"]  # fmt: skip
    assert run(words) == 2
    out, err = capsys.readouterr()
    assert not out and "--solve" in err and "not both" in err


@pytest.mark.parametrize(
    ("word", "fixed"),
    [
        ("pp2:1f1b/4mb", {"pp": 2, "schedule": "1f1b", "num_microbatches": 4}),
        ("pp2:interleaved_1f1bx3", {"pp": 2, "schedule": "interleaved_1f1b", "virtual": 3}),
        ("cp4:hybrid2x2", {"cp": 4, "method": "hybrid", "ulysses": 2}),
        ("dp_shard4.zero2 tp2+sp", {"dp_shard": 4, "zero": 2, "tp": 2, "sp": True}),
        ("offload:cpu bf16 8mb", {"offload": "cpu", "dtype": "bf16", "num_microbatches": 8}),
    ],
)
def test_words_are_read_as_a_plan_prints_them(word, fixed):
    assert dict(Words.of((word,)).fixed) == fixed


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("TP2", "did you mean 'tp2'?"), ("tp=2", "did you mean 'tp2'?"), ("mesh.tp=2", "did you mean 'tp2'?"),
        ("full", "did you mean 'recompute:full'?"), ("nvme", "did you mean 'offload:nvme'?"),
        ("pp2:zbv", "did you mean 'zb_v'?"), ("precision:bf16", "did you mean 'bf16'?"), ("tp0", "1 or more"),
        ("pipeline.split=1,2", "--plan judges a plan with pipeline.split=1,2"), ("", "is empty"),
        ("tp2:4mb:", "no word of a plan"), ("tp2/4mb", "no word of a plan"),
    ],
)  # fmt: skip
def test_an_unknown_word_teaches(word, text):
    for key in ("fix", "forbid"):
        with pytest.raises(UsageError, match=re.escape(text)) as error:
            Words.of(**{key: (word,)})
        assert error.value.key == key and f"--{key}" in error.value.message


def test_what_is_to_be_forbidden_is_one_thing():
    with pytest.raises(UsageError, match=r"one thing a word: dp_shard2 or zero3$"):
        Words.of(forbid=("dp_shard2.zero3",))
    with pytest.raises(UsageError, match=r"which\? e.g. offload:cpu"):
        Words.of(("offload",))


def test_a_hybrid_is_searched_in_its_own_parts():
    job = job_of(4, 1e9)
    told = ask(job, Question(top=50, fix=("cp4:hybrid2x2 bf16 2mb",), forbid=("recompute",))).plans
    assert told and all("cp4:hybrid2x2" in p.plan for p in told)


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def test_long_work_is_told_on_a_terminal_alone(monkeypatch):
    shown = []
    for stream, quiet in ((Terminal(), False), (Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with waiting("plan  searching", quiet):
            pass
        shown.append("searching" in stream.getvalue())
    assert shown == [True, False, False]


def test_host_memory_that_a_cluster_does_not_state_is_told():
    job = job_of(2, 80e9)
    text = binds(job, simulate(job.with_plan("dp_shard2.zero2 offload:cpu bf16")))
    assert "on the host of a node, whose room the cluster does not state" in text
    roomy = replace(job, cluster=replace(job.cluster, host_memory_bytes=64e9))
    assert "of 64 GB on the host of a node" in binds(
        roomy, simulate(roomy.with_plan("dp_shard2.zero2 offload:cpu bf16"))
    )
    assert "host" not in binds(job, simulate(job.with_plan("dp_shard2.zero2 bf16")))


def test_reasons_that_refused_nothing_are_left_out():
    found = Found(rejected=Counter({"memory": 2, "files where the host has room": 0}))
    assert document(Answer(found, ()))["rejected"] == {"memory": 2}
