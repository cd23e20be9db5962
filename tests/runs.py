"""A run folder as a run would leave it, without training: the forecast shaken by known amounts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from partita.record.run import RankRecord, RunFacts, write_record, write_trace
from partita.record.span import Span
from partita.simulate.forecast import forecast
from partita.simulate.predict import simulate
from partita.spec.job import Job

JOB = {
    "name": "synthetic",
    "plan": "pp2:1f1b/4mb tp2+sp",
    "model": {"preset": "quickstart"},
    "cluster": {"preset": "laptop"},
    "data": {"source": "python-stdlib", "tokenizer": "byte"},
    "train": {"steps": 20, "global_batch_size": 4, "seq_len": 64},
}
CLOCK_S = 1234.5  # when the step began, on the host's clock


def write_run(folder: Path, *, changed_bytes: int = 0) -> Job:
    """Spans 10 % longer than predicted, ledgers with 1,000 untagged bytes more, equal traffic but for
    `changed_bytes` on rank 1's first line."""
    job = Job.load(JOB)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.toml").write_text(job.to_toml())
    predicted = forecast(simulate(job))
    write_record(folder / "records" / "prediction.json", predicted)
    for record in predicted.ranks:
        write_record(
            folder / "records" / f"rank-{record.rank}.json", _measured(record, changed_bytes)
        )
    facts = RunFacts("a machine", 6.0, "def ", "main():\n    <pass & go>")
    write_record(folder / "records" / "run.json", facts)
    lines = [
        {
            "step": s,
            "loss": 7 - 0.1 * s,
            "step_time_s": 1.1 * predicted.step_time_s,
            "tokens_per_s": 500.0,
        }
        for s in range(1, 21)
    ]
    lines[-1]["eval_loss"] = 5.2
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    write_trace(folder)
    return job


def _measured(record: RankRecord, changed_bytes: int) -> RankRecord:
    spans = [
        replace(s, start_s=CLOCK_S + 1.1 * s.start_s, end_s=CLOCK_S + 1.1 * s.end_s)
        for s in record.spans
    ]
    first = spans[0].start_s
    spans.append(Span(record.rank, "tp", "comm", "all_gather", first, first + 1e-4, step=2))
    traffic = list(record.traffic)
    if record.rank == 1:
        traffic[0] = replace(traffic[0], bytes=traffic[0].bytes + changed_bytes)
    assert record.ledger is not None
    ledger = replace(record.ledger, at_peak={**record.ledger.at_peak, "untagged": 1000})
    return replace(
        record, step=2, host="here", spans=tuple(spans), traffic=tuple(traffic), ledger=ledger
    )
