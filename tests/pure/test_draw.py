"""`partita draw`: its JSON, its pictures, and what a wrong command gets."""

import json
import signal
import time
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

import partita as pt
from partita.cli import main
from partita.cli.main import VERBS, available, run
from partita.schedule.text import read_schedule


def ask(capsys, *words: str) -> tuple[int, str, str]:
    code = run(["draw", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_is_the_contracts(capsys):
    code, out, _ = ask(capsys, "1f1b", "-p", "4", "-m", "8", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["actions"][3][:4] == ["3F0", "3B0", "3F1", "3B1"]
    assert document["peak_activations"] == [4, 3, 2, 1]
    assert document["makespan"] == document["span"] == 33.0
    assert document["bubble_overhead"] == document["steady_bubble_overhead"] == 0.375
    assert document["placement"] == [0, 1, 2, 3] and document["direction"] is None
    assert (document["format"], document["num_stages"], document["num_microbatches"]) == (1, 4, 8)


def test_layers_are_cut_with_the_schedule(capsys, tmp_path):
    """A head of three layers' work takes layers from its stage; --layers is auto's alone."""
    path = tmp_path / "layers.json"
    layers = [{"F": 1, "I": 1, "W": 1}] * 7 + [{"F": 3, "I": 3, "W": 3}]
    path.write_text(json.dumps({"stages": layers, "send": 0}))
    words = ["auto", "-p", "2", "-m", "4", "--layers", str(path)]
    document = json.loads(ask(capsys, *words, "--json")[1])
    split, stages = document["split"], document["num_stages"]
    assert sum(split) == 8 and len(split) == stages and min(split) >= 1
    assert document["makespan"] <= 4 * 3 * 5 + 5  # two halves of ten layers' work, and little idle
    assert f"layers of each stage: {','.join(map(str, split))}" in ask(capsys, *words)[1]
    code, _, err = ask(capsys, "1f1b", *words[1:])
    assert code == 2 and "auto" in err


def test_several_and_steps_and_costs(capsys, tmp_path):
    _, out, _ = ask(capsys, "gpipe", "1f1b", "-p", "2", "-m", "4", "--costs", "2,1,1,0.5", "--json")
    gpipe, other = json.loads(out)["schedules"]
    assert (gpipe["schedule"], other["schedule"]) == ("gpipe", "1f1b")
    assert gpipe["makespan"] == (4 + 1) * 4 + 2 * 0.5
    _, out, _ = ask(capsys, "1f1b", "-p", "2", "-m", "4", "--steps", "3", "--json")
    assert json.loads(out)["num_microbatches"] == 12
    stages = [{"F": 1, "I": 1, "W": 1, "activation_bytes": 10}, {"F": 2, "I": 2, "W": 2}]
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"stages": stages, "send": 0}))
    words = ["1f1b", "-p", "2", "-m", "8", "--costs", str(path), "--json"]
    assert json.loads(ask(capsys, *words)[1])["makespan"] == 51
    assert ask(capsys, *words, "--limit-bytes", "20")[0] == 0
    assert ask(capsys, *words, "--limit-bytes", "19")[0] == 1


def test_text_svg_and_html(capsys, tmp_path):
    svg, html = tmp_path / "a.svg", tmp_path / "a.html"
    code, out, _ = ask(
        capsys, "gpipe", "1f1b", "-p", "3", "-m", "4", "--costs", "1,.5,.5", "--svg", str(svg),
        "--html", str(html),
    )  # fmt: skip
    assert code == 0
    assert "rank 0 | 0F0 0F1 0F2         0B0 0F3 0B1     0B2     0B3" in out
    assert len(ET.parse(svg).findall(".//{*}g")) == 2 * 3 * 8
    page = html.read_text()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "1f1b" in page


@pytest.mark.parametrize("text, code, words", [
    ("0F0,0B0\n1F0,1B0\n", 0, []),
    ("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n", 1, ["alive"]),
    ("0F0,0B0\n1F0\n", 1, ["complete"]),
])  # fmt: skip
def test_check_proves_a_file(capsys, tmp_path, text, code, words):
    path = tmp_path / "s.csv"
    path.write_text(text)
    got, out, err = ask(capsys, "--check", str(path), "--json")
    document = json.loads(out)
    assert [line.split(": ")[:3] for line in err.splitlines()] == [
        ["partita", str(path), word] for word in words
    ]
    assert got == code and [p["rule"] for p in document["problems"]] == words
    assert (document["makespan"] is None) == bool(words)


@pytest.mark.parametrize("text, end", [
    ("0F0,0F1,0B0,0B1\n1F0,1B1,1F1,1B0\n", "ordered: rank 1 runs 1B1 before what it needs from itself"),
    ("0F0,0REDUCE,0B0\n1F0,1B0\n", "ordered: rank 0 runs 0REDUCE before the gradient of 0B0"),
    ("0F0,0B0\n1F0,1B0\n1F1", "stage 1 runs on ranks 1, 2; in a file a stage lies on one rank, or each on "
     "ranks r and p-1-r of an even p"),
])  # fmt: skip
def test_the_last_line_is_the_error_without_the_picture_below_it(capsys, tmp_path, text, end):
    path = tmp_path / "s.csv"
    path.write_text(text)
    code, _, err = ask(capsys, "--check", str(path))
    assert code == 1 and err.splitlines()[-1] == f"partita: {path}: {end}"


def test_a_file_that_cannot_run_is_not_drawn(capsys, tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("0F0,0F1,0B0\n1F0,1F1,1B0,1B1")
    code, out, err = ask(capsys, f"file:{path}")
    assert (code, out) == (1, "") and "cannot run" in err
    path.write_text("0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1")
    assert ask(capsys, f"file:{path}")[0] == 0


@pytest.mark.parametrize("words, code, says", [
    (["1f", "-p", "2", "-m", "2"], 2, "did you mean 1f1b"),
    (["1f1b", "-p", "2"], 2, "how many microbatches"),
    (["1f1b", "-p", "-1", "-m", "2"], 2, "ranks is -1"),
    (["1f1b", "-p", "2", "-m", "1000000000000"], 2, "more than"),
    (["1f1b", "-p", "2", "-m", "2", "--costs", "1,nan,1"], 2, "finite"),
    (["1f1b", "-p", "2", "-m", "2", "--costs", "none.json"], 2, "no such file"),
    (["1f1b", "-p", "2", "-m", "2", "--costs", "1,2"], 2, "F,I,W"),
    (["1f1b", "-p", "2", "-m", "2", "--costs", "0,0,0"], 2, "F, I and W all cost 0"),
    (["1f1b", "-p", "2", "-m", "2", "--costs", "1,1,1,0.1,5"], 2, "a link is taken for 5 of the 0.1"),
    (["1f1b", "-p", "2", "-m", "2", "--svg", "no/such/a.svg"], 2, "does not exist"),
    (["gpipe", "-p", "4", "-m", "8", "--limit", "5"], 1, "within it: 1f1b"),
    (["1f1b", "-p", "4", "-m", "8", "-v", "2"], 1, "one stage a rank"),
    (["1f1b", "-p", "two", "-m", "2"], 2, "integer"),
    (["1f1b", "-p", "2", "-m", "2", "--steps", "1000000000"], 2, "more than"),
    (["1f1b", "-p", "2", "-m", "2", "--limit", "nan"], 2, "limit is nan"),
    (["auto", "-p", "2", "-m", "2", "--limit", "0.5"], 1, "no order holds less"),
    (["auto", "-p", "2", "-m", "2", "--limit", "2,half"], 2, "or one for each rank, e.g. 4,3,3,4"),
    (["1f1b", "-p", "3", "-m", "4", "--limit", "3,2"], 1, "2 limits (3, 2) for 3 ranks"),
    (["gpipe", "-p", "3", "-m", "4", "--limit", "3,2,1"], 1, "more than 3, 2, 1 activations; within it: "),
    (["auto", "-p", "2", "-m", "2", "--limit-bytes", "5"], 2, "activation_bytes"),
    (["auto", "-p", "2"], 2, "how many microbatches"),
    (["auto", "-p", "2", "-m", "2", "-v", "0"], 2, "virtual-stages is 0"),
    (["auto", "-p", "2", "-m", "100000"], 1, "its time is for 30,000"),
    (["auto", "-p", "4", "-m", "8", "-v", "200"], 1, "its time is for 30,000"),
    (["zb_h2", "-p", "4", "-m", "4"], 1, "m >= 2p-1 = 7"),
    (["--wings"], 2, "--wings"),
    (["runs/nope"], 2, "runs/nope: no such run"),
    (["nope"], 2, "no schedule is called 'nope'"),
    (["gpipe", "1f1b", "-p", "2", "-m", "2", "--csv", "s.csv"], 2, "--csv writes one schedule, 2 are drawn"),
    ([], 2, "which schedule"),
])  # fmt: skip
def test_mistakes_are_one_line_and_a_document(capsys, words, code, says):
    got, out, err = ask(capsys, *words)
    assert (got, out) == (code, "") and says in err.splitlines()[-1] and "Traceback" not in err
    got, out, err = ask(capsys, *words, "--json")
    error = json.loads(out)["error"]
    assert (
        got == code
        and says in error["message"]
        and set(error) == {"kind", "message", "file", "key"}
    )
    assert error["kind"] == ("usage" if code == 2 else "plan")


def test_a_schedule_is_written_as_torchs_csv(capsys, tmp_path):
    path = tmp_path / "s.csv"
    code, _, err = ask(capsys, "dualpipev", "-p", "2", "-m", "4", "--csv", str(path))
    assert code == 0 and "no name" not in err
    read = read_schedule(path)
    assert replace(read, name="dualpipev") == pt.schedule(
        "dualpipev", num_ranks=2, num_microbatches=4
    )
    assert (
        "torch has no name for U"
        in ask(capsys, "pipedream", "-p", "2", "-m", "4", "--csv", str(path))[2]
    )
    assert ask(capsys, "--check", str(path))[0] == 0


def test_a_line_that_was_stopped_is_left_in_peace(capsys, monkeypatch):
    """The alarm that repeats a lost signal ends with the line: what it frees may take its time."""
    monkeypatch.setattr(main, "AGAIN_S", 0.01)
    handlers = {number: signal.getsignal(number) for number in (*main.STOPS, signal.SIGALRM)}
    stop = main.Stop()
    stop.listen()
    monkeypatch.setattr(main, "application", lambda words: signal.raise_signal(signal.SIGTERM))
    try:
        assert run(["draw"], stop) == 143
        time.sleep(0.05)
    finally:
        stop.done()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "partita: stopped by SIGTERM\n"


def test_version_help_and_unknown_verbs(capsys):
    assert run(["--version"]) == 0 and capsys.readouterr().out.startswith("partita 0.")
    assert run(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(verb in listed for verb in available()) and set(available()) <= set(VERBS)
    assert run(["drow"]) == 2 and "drow" in capsys.readouterr().err


def test_completion_knows_the_options_of_the_verb(capfd, monkeypatch):
    monkeypatch.setenv("_PARTITA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "partita draw --")
    monkeypatch.setenv("COMP_CWORD", "2")
    with pytest.raises(SystemExit):
        run([])
    assert "--num-microbatches" in capfd.readouterr().out


def test_a_file_that_is_no_schedule_is_named(capsys, tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("0X0\n")
    code, out, _ = ask(capsys, "--check", str(path), "--json")
    assert code == 2 and json.loads(out)["error"]["file"] == str(path)


def test_auto_says_how_far_from_the_optimum_it_may_be(capsys, tmp_path):
    words = ["auto", "-p", "2", "-m", "2", "--limit", "1.5", "--costs", "1,1.2,0.8,0.1"]
    code, out, _ = ask(capsys, *words, "--json")
    document = json.loads(out)
    assert code == 0 and document["schedule"] == "auto"
    assert document["lower_bound"] <= document["makespan"] and document["seconds"] > 0
    assert document["gap"] == pytest.approx(document["makespan"] / document["lower_bound"] - 1)
    assert document["proven"] == (document["gap"] < 1e-9)
    assert max(document["peak_activations"]) <= 1.5 * document["num_stages"] / 2
    assert "nothing else is faster" in ask(capsys, *words)[1]
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"stages": [{"F": 1, "I": 1, "W": 1}] * 3}))
    code, _, err = ask(capsys, "auto", "-p", "2", "-m", "4", "--costs", str(path))
    assert code == 2 and "costs of 3 stages, auto has 2 or 4" in err


def test_idle_time_is_told_by_cause(capsys):
    code, out, _ = ask(capsys, "1f1b", "-p", "2", "-m", "4", "--costs", "1,1,1,0.5", "--json")
    document = json.loads(out)
    assert code == 0 and [row["rank"] for row in document["idle"]] == [0, 1]
    for row in document["idle"]:
        causes = row["warm_up"] + row["drain"] + row["communication"] + sum(row["waiting"].values())
        assert row["work"] + causes == pytest.approx(document["makespan"])
    assert "warm-up" in ask(capsys, "1f1b", "-p", "2", "-m", "4")[1]


def test_what_has_columns_enough_is_named_where_times_have_no_unit(capsys):
    """Names are drawn on with '-', so that neighbours stand apart; kinds alone where most have no room."""

    def rows(*words: str) -> list[str]:
        code, out, _ = ask(capsys, *words)
        assert code == 0
        return [line.split(" | ")[1] for line in out.splitlines() if " | " in line]

    first, second = rows("zb_h1", "-p", "2", "-m", "3", "--costs", "1,1.13,0.91")
    assert first.startswith("0F0---") and "1I2---" in second
    first, second = rows("zb_h1", "-p", "3", "-m", "9", "--costs", "1,1.1,0.9")[:2]
    assert first.startswith("F0-F1-") and "0F" not in first
    first, second = rows("zb_v", "-p", "2", "-m", "12", "--costs", "1,1.13,0.91")
    assert first.startswith("FFF") and "0" not in first
