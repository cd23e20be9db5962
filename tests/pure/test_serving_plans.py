"""Serving is predicted as the scheduler would run it, and the search finds the best of all plans."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from partita.cli.main import run
from partita.planner.serving.search import Wanted, meshes, of_each_plan, search
from partita.planner.serving.why import start
from partita.serve.pages import PagePool
from partita.serve.scheduler import Scheduler, Seq
from partita.simulate.serving.cut import Shape
from partita.simulate.serving.memory import held
from partita.simulate.serving.predict import Asked, predict, steps_of, wrongs
from partita.simulate.serving.rates import Load, rates
from partita.simulate.serving.told import to_json
from partita.simulate.serving.works import SERVERS, touched
from partita.spec.cluster import Cluster
from partita.spec.model import ModelSpec
from partita.spec.plan import Plan

GRAPHS, USUAL = SERVERS["graphs"], Load(1024, 256, 16)


def asked(model="llama3-8b", cluster="4xh100", load=USUAL):
    return Asked(ModelSpec.load(model), Cluster.load(cluster), load, "bf16", GRAPHS)


@pytest.mark.parametrize(
    "load",
    [
        Load(96, 33, 8, max_batch_tokens=64),
        Load(24, 65, 12, max_batch_tokens=64),
        Load(192, 9, 12, max_batch_tokens=64),  # prompts find no room: they wait
    ],
    ids=["a few read", "few", "all wait"],
)
def test_the_mean_is_that_of_the_scheduler(load):
    """Tokens a second of the real scheduler, whose steps take what is predicted, on requests of lengths from
    half to one and a half of the load's (equal ones that begin at once stay in step)."""
    steps = steps_of(asked(load=load), Plan.parse(""))
    found = rates(steps, load, load.concurrency)
    draw = Random(0)
    scheduler = Scheduler(PagePool(4096, load.page_size), load.max_batch_tokens, load.concurrency)
    clock = since = 0.0
    written = number = ended = 0
    while ended < 12 * load.concurrency:
        while len(scheduler.running) + len(scheduler.waiting) < load.concurrency:
            prompt, answer = (
                draw.randint(n // 2, n + n // 2) for n in (load.prompt_len, load.output_len)
            )
            ids = [number * 1000 + i for i in range(prompt)]
            scheduler.add(Seq((number, 0), ids, prompt, prompt + answer))
            number += 1
        shares = scheduler.plan()
        clock += steps.step(shape_of(shares)).latency_s
        for share in shares:
            if share.chooses:
                share.seq.tokens.append(0)
                written += 1
            scheduler.commit(share)
            if len(share.seq.tokens) == share.seq.most:
                scheduler.finish(share.seq)
                ended += 1
        if ended < 3 * load.concurrency:  # not yet in the steady state
            since, written = clock, 0
    predicted = found.requests_per_s * load.output_len
    assert predicted == pytest.approx(written / (clock - since), rel=0.1)


def shape_of(shares):
    """What a step runs, of few shapes."""
    writes = [s.start for s in shares if s.seq.left == 1]
    reads = [s for s in shares if s.seq.left > 1]
    context, before = (
        round(sum(starts) / max(len(starts), 1), -1)
        for starts in (writes, [s.start for s in reads])
    )
    wanted, chunk = sum(s.want for s in shares), sum(s.count for s in reads)
    return Shape(len(writes), context, chunk, before, wanted, max(len(reads), 1))


def test_experts_that_are_met():
    steps = steps_of(asked("qwen3-30b-a3b"), Plan.parse("tp2+sp ep2"))
    one, many = (touched(steps.laid, n)[0] for n in (1, 100_000))
    assert one == pytest.approx(8 / 2) and many == pytest.approx(128 / 2)


def test_pages_fill_the_rank():
    found = predict(asked("llama3-70b", "2xh100", Load(1024, 256, 64)), Plan.parse("tp2"))
    of, limit = found.fullest, found.limit_bytes
    taken = of.weights + of.step + (found.pages + 1) * of.page
    assert taken <= limit < taken + of.page
    assert found.rates is not None and found.rates.running == found.most_sequences < 64
    assert [p.rule for p in found.problems] == ["waiting"]
    assert held(found.laid, None, GRAPHS, 16)[0].weights == of.weights


def test_what_more_of_something_does():
    def at(line="", **load):
        return predict(
            asked(load=Load(**{"prompt_len": 512, "output_len": 128, **load})), Plan.parse(line)
        )

    one, many = at(concurrency=1), at(concurrency=32)
    assert one.tokens_per_s < many.tokens_per_s and one.rates.itl_s < many.rates.itl_s
    assert one.rates.itl_s == pytest.approx(one.rates.itl_alone_s, rel=0.02)
    assert at("tp2", concurrency=1).rates.itl_s < one.rates.itl_s
    four, single = at("dp_replicate4", concurrency=128), at(concurrency=32)
    assert four.tokens_per_s == pytest.approx(4 * single.tokens_per_s)
    five, six = at("dp_replicate2", concurrency=5), at("dp_replicate2", concurrency=6)
    assert five.tokens_per_s == pytest.approx(5 / 6 * six.tokens_per_s)
    assert at("pp2", concurrency=32).tokens_per_s > at("pp2", concurrency=1).tokens_per_s
    for x in (one, many, four):
        assert 0 < x.mfu < 1 and 0 < x.mbu < 1
    read = [at(output_len=1, concurrency=4, max_batch_tokens=n) for n in (2048, 8192)]
    assert read[0].tokens_per_s == read[1].tokens_per_s  # no step has more than all prompts
    assert read[0].tokens_per_s * read[0].rates.ttft_s <= 1.5 * 4


def test_engines_of_a_node_share_its_cores():
    laptop = replace(asked("tiny", "laptop", Load(32, 16, 4)), dtype="fp32")
    one = predict(replace(laptop, load=Load(32, 16, 1)), Plan.parse(""))
    four = predict(laptop, Plan.parse("dp_replicate4"))  # on two cores
    assert four.rates.itl_s == pytest.approx(2 * one.rates.itl_s)
    assert four.tokens_per_s == pytest.approx(2 * one.tokens_per_s)


def test_the_best_of_all_plans():
    question = asked(load=Load(256, 64, 24))
    found = search(question, Wanted(batch_tokens=(512,)))
    legal = [p for p in meshes(question) if not wrongs(question, p)]
    assert len(found.plans) == len(legal) and "tp4" in {str(p.plan) for p in found.plans}
    for plan in legal:
        engines = plan.with_("mesh", dp_replicate=4 // plan.world_size)
        assert predict(question, engines).tokens_per_s <= found.plans[0].tokens_per_s
    limit = sorted(p.rates.itl_s for p in found.plans)[3]
    quick = search(question, Wanted(max_itl_s=limit, batch_tokens=(512,)))
    assert len(quick.plans) == 4 and all(p.rates.itl_s <= limit for p in quick.plans)
    sizes = search(question, Wanted(batch_tokens=(512, 64)))
    lines = [p.line for p in of_each_plan(sizes.plans)]
    assert (
        len(sizes.plans) == 2 * len(legal) == 2 * len(set(lines))
        and lines[0] == sizes.plans[0].line
    )
    fewest = search(question, Wanted("devices", batch_tokens=(512,)))
    assert fewest.plans[0].plan.world_size == 1


def test_replicas_and_what_serves_nothing():
    question = asked()
    for line, told in (("cp2:ring", "use tp"), ("tp8", "8 ranks"), ("tp3", "heads")):
        found = predict(question, Plan.parse(line))
        assert not found.fits and told in found.problems[0].message
        assert to_json(found)["tokens_per_s"] is None
    long = replace(question, load=Load(8000, 500))
    assert predict(long, Plan.parse("")).problems[0].rule == "length"


def test_how_an_engine_is_started():
    """Its ranks on devices of their own, and no more sequences than a step has tokens."""
    found = predict(asked(load=Load(512, 128, 18, max_batch_tokens=4)), Plan.parse("tp2 dp2"))
    told = start(found)
    assert '--plan "tp2" --backend processes ' in told and "2 times, each on devices" in told
    assert "--max-sequences 4 --max-batch-tokens 4" in told
    assert "--plan" not in start(predict(asked(), Plan.parse("")))


def test_the_verb(capsys):
    words = ["plan", "llama3-8b", "2xh100", "--serve", "--max-batch-tokens", "512", "--json"]
    assert run([*words, "--concurrency", "4", "--goal", "latency"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plans"][0]["why"] and told["complete"] and told["simulated"] == 4
    by = told["plans"][0]["by_concurrency"]
    assert [x["concurrency"] for x in by] == [1, 2, 4, 8]
    assert all(a["tokens_per_s"] < b["tokens_per_s"] for a, b in pairwise(by))
    assert {"ttft_s", "itl_s", "tokens_per_s", "binds", "memory", "mbu"} <= told["plans"][0].keys()
    big = ["plan", "llama3-405b", "8xh100", "--serve", "--plan", "tp8", "--max-batch-tokens", "512"]
    assert run([*big, "--json"]) == 1
    out, err = capsys.readouterr()
    assert "leave no page" in json.loads(out)["plans"][0]["why"][0] and "leave no page" in err
    for wrong in (
        ["--prompt-len", "4"],
        ["--serve", "--seq-len", "4"],
        ["--serve", "--goal", "speed"],
        ["--serve", "--max-itl", "nan"],
        ["--serve", "--plan", "tp2 bf16", "--precision", "fp32"],
    ):
        assert run(["plan", "llama3-8b", "8xh100", *wrong]) == 2
    capsys.readouterr()
    one = ["plan", "llama3-8b", "8xh100", "--serve", "--max-batch-tokens", "512", "--json"]
    assert run([*one, "--plan", "tp2 fp32"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["plan"] == "tp2"
    assert run([*one, "--plan", "tp2", "--max-ttft", "1e-3"]) == 1
    assert ", --max-ttft allows 1 ms" in capsys.readouterr().err
    slow = [*one, "--max-itl", "1e-6", "--budget", "0"]
    assert run(slow) == 1
    assert "such devices" not in capsys.readouterr().out
