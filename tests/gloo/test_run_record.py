"""A real run of four ranks records what its report needs, and what it measured is what was declared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from partita.base.config import to_toml
from partita.cli.main import run as command
from partita.report.make import report_page
from partita.report.summary import read_run

JOB = {
    "name": "recorded",
    "plan": "pp2:1f1b/4mb tp2+sp bf16",
    "model": {
        "family": "llama", "layers": 4, "hidden": 128, "heads": 4, "kv_heads": 2, "ffn_hidden": 256,
        "vocab": 256, "max_seq_len": 128,
    },
    "cluster": {"preset": "laptop"},
    "data": {"source": "python-stdlib", "tokenizer": "byte"},
    "train": {"steps": 4, "global_batch_size": 4, "seq_len": 128},
}  # fmt: skip


@pytest.mark.timeout(120)
def test_a_run_measures_what_was_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(to_toml(JOB))
    assert command(["train", "job.toml", "--json"]) == 0, capsys.readouterr().err
    run = read_run(Path("runs/recorded"))
    assert [r.rank for r in run.ranks] == [0, 1, 2, 3]
    assert run.traffic_equal is True
    assert len(run.traffic) > 50
    for predicted, record in zip(run.predicted, run.ranks, strict=True):
        ledger = record.ledger
        assert ledger.at_peak.get("untagged", 0) < 0.03 * ledger.peak_bytes
        assert ledger.peak_bytes == pytest.approx(predicted.ledger.peak_bytes, rel=0.10)
        for category, want in predicted.ledger.most.items():
            near = 0.10 if category == "activations" else 0.03
            assert ledger.most.get(category, 0) == pytest.approx(want, rel=near), category
        assert record.declared.at_peak["gradients"] == ledger.at_peak["gradients"]
        kinds = [s.kind for s in record.spans if s.lane == "compute" and s.kind in "FB"]
        assert sorted(kinds) == ["B"] * 4 + ["F"] * 4
        assert {"comm", "wait", "data", "U"} <= {s.kind for s in record.spans}
        assert "checkpoint" in {s.kind for s in record.aside}
    assert run.last("peak_memory_bytes") >= run.ranks[0].ledger.peak_bytes
    trace = json.loads(Path("runs/recorded/trace.json").read_text())
    assert {e["pid"] for e in trace["traceEvents"]} == set(range(8))
    assert run.facts.unigram_entropy > 0
    assert "all " in report_page(run)


@pytest.mark.slow
@pytest.mark.turns(2)
@pytest.mark.parametrize("schedule", ["zb_h1", "zb_v"])
def test_what_weight_halves_wait_for_is_declared(
    schedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Layers that run again keep little for their backward, and all that W reads from I on."""
    monkeypatch.chdir(tmp_path)
    wide = JOB["model"] | {"layers": 8, "hidden": 256, "heads": 8, "ffn_hidden": 704, "vocab": 1024}
    room = {"preset": "laptop", "memory_bytes": 200_000_000}
    plan = f"pp2:{schedule}/4mb recompute:full"
    job = JOB | {"plan": plan, "model": wide, "cluster": room}
    Path("job.toml").write_text(to_toml(job))
    assert command(["train", "job.toml", "--json"]) == 0, capsys.readouterr().err
    run = read_run(Path("runs/recorded"))
    for predicted, record in zip(run.predicted, run.ranks, strict=True):
        assert record.ledger.peak_bytes == pytest.approx(predicted.ledger.peak_bytes, rel=0.05)


@pytest.mark.timeout(120)
def test_a_shard_that_is_to_be_added_stands_beside_what_it_comes_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Stage 3, of whose layers nothing that is kept stays: the peak is in backward, as gradients move."""
    monkeypatch.chdir(tmp_path)
    plan = "dp_shard2.zero3 2mb offload:cpu offload.targets=activations"
    model = JOB["model"] | {"layers": 6, "heads": 8, "kv_heads": 8, "ffn_hidden": 352}
    train = {"steps": 4, "global_batch_size": 8, "seq_len": 64}
    Path("job.toml").write_text(to_toml(JOB | {"plan": plan, "model": model, "train": train}))
    assert command(["train", "job.toml", "--json"]) == 0, capsys.readouterr().err
    for predicted, record in zip(*_ledgers(Path("runs/recorded")), strict=True):
        assert record.peak_bytes == pytest.approx(predicted.peak_bytes, rel=0.015)


def _ledgers(folder: Path):
    run = read_run(folder)
    return [p.ledger for p in run.predicted], [r.ledger for r in run.ranks]


@pytest.mark.timeout(120)
def test_a_layer_made_again_is_not_also_what_its_weight_half_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """In an input half its inputs and gradients come one after the other: a quarter of a rank's peak."""
    monkeypatch.chdir(tmp_path)
    model = JOB["model"] | {"heads": 8, "kv_heads": 8, "ffn_hidden": 352, "max_seq_len": 256}
    train = {"steps": 4, "global_batch_size": 16, "seq_len": 256}
    room = {"preset": "laptop", "memory_bytes": 400_000_000}
    job = JOB | {
        "plan": "pp2:zb_h1/4mb recompute:full",
        "model": model,
        "train": train,
        "cluster": room,
    }
    Path("job.toml").write_text(to_toml(job))
    assert command(["train", "job.toml", "--json"]) == 0, capsys.readouterr().err
    for predicted, record in zip(*_ledgers(Path("runs/recorded")), strict=True):
        assert record.peak_bytes == pytest.approx(predicted.peak_bytes, rel=0.06)
