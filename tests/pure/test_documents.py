"""Every document that needs no torch has the keys of the contract, whatever its answer is."""

import json
import sys

import pytest

from partita.cli.main import run

PREDICTION = {
    "plan", "problems", "fits", "step_time_s", "step_time_interval_s", "tokens_per_s",
    "tokens_per_s_per_device", "mfu", "hfu", "flops_convention", "bubble_fraction", "memory", "traffic",
    "time",
}  # fmt: skip
MEMORY = {"peak_bytes", "peak_interval_bytes", "limit_bytes", "per_rank"}
RANK = {
    "ranks", "parameters", "gradients", "optimizer", "activations", "buffers", "total", "host", "disk",
}  # fmt: skip
TRAFFIC = {"axis", "op", "site", "phase", "count", "bytes"}
TIME = {"compute_s", "exposed_comm_s", "bubble_s", "optimizer_s"}
PROBLEM = {"room", "rule", "message", "asked", "limit", "nearest", "severity"}
SEARCHED = {"plans", "considered", "rejected", "bounded", "complete", "seconds"}
DRAWN = {
    "schedule", "num_ranks", "num_stages", "num_microbatches", "placement", "actions", "direction",
    "makespan", "span", "bubble_overhead", "steady_bubble_overhead", "peak_activations",
}  # fmt: skip
ASKED = ("tiny", "4xh100", "--global-batch-size", "8", "--seq-len", "64")
QUICK = (
    *ASKED,
    "--fix",
    "1mb",
    "--forbid",
    "pp",
    "--forbid",
    "cp",
    "--forbid",
    "offload",
    "--forbid",
    "order",
)


def answered(capsys, *words: str) -> tuple[int, dict]:
    """The exit code and the one document, which names no number that JSON has none for."""
    code = run([*words, "--json"])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["format"] == 1
    return code, found


def hold_prediction(found: dict, legal: bool) -> None:
    """All keys are there; of an illegal plan no number is."""
    assert set(found) >= PREDICTION and found["flops_convention"] == "model_causal"
    assert set(found["memory"]) >= MEMORY and set(found["time"]) == TIME
    assert isinstance(found["time"]["exposed_comm_s"], dict)
    assert all(set(p) == PROBLEM for p in found["problems"])
    assert all(set(line) >= TRAFFIC for line in found["traffic"])
    assert all(set(rank) >= RANK for rank in found["memory"]["per_rank"])
    assert bool(found["memory"]["per_rank"]) is legal
    for pair in (found["step_time_interval_s"], found["memory"]["peak_interval_bytes"]):
        assert len(pair) == 2
    numbers = [x for key, x in leaves(found) if key != "format"]
    assert bool(numbers) is legal
    if not legal:
        assert found["fits"] is False and any(p["severity"] == "error" for p in found["problems"])


def leaves(found: object, key: str = "") -> list[tuple[str, float]]:
    """Every number of a document with the key it stands under."""
    if isinstance(found, dict):
        return [x for k, v in found.items() for x in leaves(v, k)]
    if isinstance(found, list):
        return [x for v in found for x in leaves(v, key)]
    return [(key, found)] if isinstance(found, int | float) and not isinstance(found, bool) else []


@pytest.mark.parametrize("verb", ["simulate", "plan"])
@pytest.mark.parametrize(
    ("line", "code", "legal"),
    [("tp2+sp pp2/4mb", 0, True), ("tp8", 1, False), ("dp3", 1, False), ("pp2:forward", 1, False)],
)
def test_one_plan(verb: str, line: str, code: int, legal: bool, capsys) -> None:
    got, found = answered(capsys, verb, *ASKED, "--plan", line)
    assert got == code
    if verb == "plan":
        assert set(found) >= SEARCHED and found["complete"] and found["considered"] == 1
        assert sum(found["rejected"].values()) == 1 - legal
        (found,) = found["plans"]
        assert found["why"]
    hold_prediction(found, legal)
    assert found["fits"] is legal


def test_a_plan_that_is_too_big_has_its_numbers(capsys) -> None:
    words = (
        "llama3-8b",
        "1xh100",
        "--plan",
        "bf16",
        "--global-batch-size",
        "1",
        "--seq-len",
        "128",
    )
    code, found = answered(capsys, "simulate", *words)
    assert code == 1 and not found["fits"] and not found["problems"]
    hold_prediction(found, legal=True)


def test_a_search(capsys) -> None:
    code, found = answered(capsys, "plan", *QUICK, "--top", "2")
    assert code == 0 and set(found) >= SEARCHED and len(found["plans"]) == 2
    for i, plan in enumerate(found["plans"]):
        hold_prediction(plan, legal=True)
        assert bool(plan["why"]) is (i == 0)
    code, found = answered(capsys, "plan", *QUICK, "--fix", "tp4", "--solve", "devices")
    assert code == 0 and set(found["solve"]) >= {"field", "value"} and set(found) >= SEARCHED


def test_a_search_that_finds_none(capsys) -> None:
    code, found = answered(capsys, "plan", *QUICK, "--fix", "tp3")
    assert code == 1 and set(found) >= SEARCHED and found["plans"] == [] and found["why"]


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        (("plan", *ASKED, "--fix", "nothing"), "usage", 2),
        (("plan", "nosuch", "4xh100"), "usage", 2),
        (("simulate", *ASKED, "--plan", "tq2"), "usage", 2),
        (("draw", "nosuch", "-p", "2", "-m", "2"), "usage", 2),
        (("validate", "nosuch.csv"), "usage", 2),
    ],
)
def test_a_failure_is_a_document(words: tuple[str, ...], kind: str, code: int, capsys) -> None:
    got, found = answered(capsys, *words)
    assert set(found["error"]) == {"kind", "message", "file", "key"}
    assert (got, found["error"]["kind"]) == (code, kind)


def test_drawings(capsys) -> None:
    words = ("-p", "2", "-m", "4")
    code, found = answered(capsys, "draw", "zb_h1", *words)
    assert code == 0 and set(found) >= DRAWN
    code, found = answered(capsys, "draw", "auto", *words)
    assert code == 0 and set(found) >= DRAWN | {"lower_bound", "gap", "proven", "seconds"}
    code, found = answered(capsys, "draw", "1f1b", "gpipe", *words)
    assert code == 0 and all(set(x) >= DRAWN for x in found["schedules"])


def test_a_library_that_is_missing_is_named(monkeypatch, capsys) -> None:
    """Whatever imports it, without a traceback."""
    monkeypatch.delitem(
        sys.modules, "partita.cli.draw", raising=False
    )  # imported anew, by the verb
    monkeypatch.setitem(sys.modules, "typer", None)
    assert run(["draw", "1f1b", "-p", "2", "-m", "4"]) == 2
    said = capsys.readouterr().err
    assert "typer is not installed" in said and "pip install typer" in said
    assert "Traceback" not in said
