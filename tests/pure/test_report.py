"""A report is made from a run folder alone, and shows where measurement leaves prediction."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from runs import CLOCK_S, write_run

from partita.base.errors import UsageError
from partita.cli.main import run as command
from partita.record.compare import join_blocks, pair_traffic
from partita.record.run import RankRecord, aligned, read_forecast, read_ranks
from partita.record.span import Span
from partita.record.transfer import TrafficLine
from partita.report.make import report_page
from partita.report.summary import read_run


def test_records_read_back_on_one_clock(tmp_path: Path) -> None:
    write_run(tmp_path)
    forecast, ranks = read_forecast(tmp_path), read_ranks(tmp_path)
    assert forecast is not None
    assert [r.rank for r in ranks] == [0, 1, 2, 3]
    assert min(s.start_s for r in ranks for s in r.spans) == 0
    assert max(s.end_s for r in ranks for s in r.spans) < CLOCK_S
    for predicted, measured in zip(forecast.ranks, ranks, strict=True):
        assert measured.traffic == predicted.traffic
        assert measured.ledger.peak_bytes == predicted.ledger.peak_bytes + 1000


def test_forecast_has_every_rank_to_the_end_of_the_step(tmp_path: Path) -> None:
    write_run(tmp_path)
    forecast = read_forecast(tmp_path)
    for rank in forecast.ranks:
        assert {s.rank for s in rank.spans} == {rank.rank}
        assert {"F", "B", "U"} <= {s.kind for s in rank.spans}
        assert max(s.end_s for s in rank.spans) == pytest.approx(forecast.step_time_s)


def test_a_run_that_ended_before_its_first_step_says_so(tmp_path: Path) -> None:
    write_run(tmp_path)
    for path in [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "job.toml"]:
        path.unlink()
    page = report_page(read_run(tmp_path))
    for text in ("recorded no step", "recorded no traffic", "No step is done", "No sample was"):
        assert text in page


@pytest.mark.parametrize(("text", "says"), [("[]", "an object is wanted"), ("{", "truncated")])
def test_a_record_that_is_none_is_named(tmp_path: Path, text: str, says: str) -> None:
    write_run(tmp_path)
    path = tmp_path / "records" / "rank-1.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"rank-1.json: not a record: .*{says}"):
        read_run(tmp_path)


def test_trace_has_a_process_for_each_rank_measured_and_predicted(tmp_path: Path) -> None:
    write_run(tmp_path)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {f"rank {r} {w}" for r in range(4) for w in ("predicted", "measured")}
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in events if e["ph"] == "X")


def test_a_trace_holds_every_span_where_it_belongs(tmp_path: Path) -> None:
    """On the process of its rank, the thread of its lane, at its time, with its step."""
    write_run(tmp_path)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    process, thread = (
        {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["name"] == f"{n}_name"}
        for n in ("process", "thread")
    )
    found = sorted(
        (
            process[e["pid"], None], thread[e["pid"], e["tid"]], e["name"], round(e["ts"]), round(e["dur"]),
            e["args"]["step"],
        )
        for e in events if e["ph"] == "X"
    )  # fmt: skip
    records = {"predicted": read_forecast(tmp_path).ranks, "measured": read_ranks(tmp_path)}
    assert found == sorted(
        (
            f"rank {r.rank} {what}", s.lane, s.name, round(s.start_s * 1e6), round(s.duration_s * 1e6),
            s.step,
        )
        for what, ranks in records.items() for r in ranks for s in (*r.spans, *r.aside)
    )  # fmt: skip


def test_each_host_begins_where_its_first_span_does() -> None:
    """Spans of a record are in no order; ranks of one host share its clock."""

    def record(rank: int, host: str, *starts: float) -> RankRecord:
        spans = tuple(Span(rank, "compute", "F", "0F0", s, s + 0.5) for s in starts)
        return RankRecord(rank, host=host, spans=spans, aside=spans[:1])

    found = aligned([record(0, "a", 7.0, 5.0), record(1, "a", 6.0), record(2, "b", 90.0)])
    assert [[s.start_s for s in r.spans] for r in found] == [[2.0, 0.0], [1.0], [0.0]]
    assert [r.aside[0].start_s for r in found] == [2.0, 1.0, 0.0]


def test_the_step_s_time_is_the_median_without_the_first_two(tmp_path: Path) -> None:
    write_run(tmp_path)
    lines = [{"step": i + 1, "step_time_s": t} for i, t in enumerate((9.0, 8.0, 3.0, 1.0, 2.0))]
    for some, want in ((lines, 2.0), (lines[:3], 8.0)):
        text = "".join(json.dumps(x) + "\n" for x in some)
        (tmp_path / "metrics.jsonl").write_text(text)
        assert read_run(tmp_path).step_time_s == want


def test_exposed_communication_is_told_by_axis(tmp_path: Path) -> None:
    """Of the rank that stood in it longest: its collectives, named by the traffic, and its waits by axis."""
    write_run(tmp_path)
    path = tmp_path / "records" / "rank-1.json"
    document = json.loads(path.read_text())
    line = next(t for t in document["traffic"] if t["axis"] == "tp")
    for name, kind, seconds in (
        (f"{line['op']} {line['site']}", "comm", 2.0),
        ("wait pp", "wait", 3.0),
        ("wait pp", "wait", 4.0),
    ):
        span = {"rank": 1, "lane": "host", "kind": kind, "name": name, "start_s": CLOCK_S}
        document["spans"].append(span | {"end_s": CLOCK_S + seconds, "step": 2})
    path.write_text(json.dumps(document))
    found = read_run(tmp_path)
    told = found.to_json()["exposed_comm_s"]
    assert told["measured"]["pp"] == pytest.approx(7.0)
    assert told["measured"]["tp"] == pytest.approx(2.0, abs=1e-3)
    assert told["predicted"] == found.forecast.time["exposed_comm_s"] and told["predicted"]
    assert "Exposed communication by axis" in report_page(found)


def test_summary_of_a_run_that_matched(tmp_path: Path) -> None:
    write_run(tmp_path)
    found = read_run(tmp_path).to_json()
    assert found["traffic"]["equal"] is True
    assert found["step_time_s"]["measured"] == pytest.approx(
        1.1 * found["step_time_s"]["predicted"]
    )
    assert found["loss"] == {
        "first": 6.9, "last": 5.0, "eval": 5.2, "unigram_entropy": 6.0,
    }  # fmt: skip


def test_one_byte_of_traffic_shows(tmp_path: Path) -> None:
    write_run(tmp_path, changed_bytes=1)
    run = read_run(tmp_path)
    assert run.to_json()["traffic"]["different"] == 1
    text = report_page(run)
    assert "different</b>: 1 of" in text
    assert text.count('<tr class="different">') == 1


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path)
    text = report_page(read_run(tmp_path))
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']?(https?:)?//", text)
    assert "&lt;pass &amp; go&gt;" in text


def test_a_line_that_one_side_lacks_is_different() -> None:
    line = TrafficLine(0, "tp", "all_reduce", "blocks.0.mlp.down:reduce_from", "F", 2, 64)
    other = TrafficLine(0, "tp", "all_reduce", "blocks.1.mlp.down:reduce_from", "F", 2, 64)
    pairs = pair_traffic([line, other], [line])
    assert [p.equal for p in pairs] == [True, False]
    (joined,) = join_blocks(pairs)
    assert (joined.site, joined.declared_count, joined.recorded_count) == (
        "blocks.*.mlp.down:reduce_from", 4, 2,
    )  # fmt: skip
    assert not joined.equal
    assert not any(p.equal for p in join_blocks(pairs[::-1]))


def test_rows_to_experts_are_compared_by_calls() -> None:
    even, routed, fewer = (
        TrafficLine(0, "ep", "all_to_all", "blocks.0.dispatch.send:all_to_all", "F", n, size)
        for n, size in ((4, 4096), (4, 4608), (3, 4096))
    )
    assert [p.equal for p in pair_traffic([even], [routed])] == [True]
    assert [p.equal for p in pair_traffic([even], [fewer])] == [False]


def test_no_run_folder_is_the_users_mistake(tmp_path: Path, capsys) -> None:
    with pytest.raises(UsageError, match=r"no job\.toml"):
        read_run(tmp_path)
    assert command(["report", str(tmp_path / "missing"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "usage"


def test_the_verb_writes_the_page_and_one_document(tmp_path: Path, capsys) -> None:
    write_run(tmp_path)
    assert command(["report", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == 1
    assert Path(found["report"]).read_text().startswith("<!doctype html>")


def test_experts_have_their_rows_drops_and_imbalance_shown(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert "experts-figure" not in report_page(read_run(tmp_path))
    path = tmp_path / "metrics.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    for line in lines:
        load = [0.1 + 0.02 * line["step"], 0.9 - 0.02 * line["step"]]
        even = {"dropped_rows": 100 - line["step"], "expert_imbalance": 2 * max(load)}
        line |= {"expert_load": load, "balance_loss": 0.01, "z_loss": 0.0, **even}
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    page = report_page(read_run(tmp_path))
    assert "experts-figure" in page and "expert 1" in page
    section = page[page.index('id="experts"') :]
    assert "12.0% to 88.0%" in section and "1.76" in section and ">99<" in section  # its first step
    assert "50.0% to 50.0%" in section and ">80<" in section
