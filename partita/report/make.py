"""report.html: what was predicted beside what happened, from a run folder alone."""

from __future__ import annotations

from html import escape
from pathlib import Path

from partita.base.errors import WriteError
from partita.base.units import format_bytes, format_count, format_seconds
from partita.plots.experts import experts_figure
from partita.plots.loss import loss_figure
from partita.plots.memory import memory_figure
from partita.plots.page import Section, figure, html_table, page, tiles
from partita.plots.spans import timeline_figure
from partita.plots.traffic import traffic_table
from partita.record.compare import join_blocks
from partita.record.ledger import CATEGORIES
from partita.report.summary import RunSummary


def write_report(run: RunSummary, path: Path) -> Path:
    """Writes the page. Raises WriteError where the disk refuses."""
    try:
        path.write_text(report_page(run), encoding="utf-8")
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}", file=str(path)) from None
    return path


def report_page(run: RunSummary) -> str:
    """The page: timeline, memory, traffic, loss, experts where there are some, sample, plan and machine."""
    lead = f"<code>{escape(str(run.job.plan))}</code>{tiles(_facts(run))}"
    parts = _timeline, _memory, _traffic, _loss, _experts, _sample, _job
    sections = [made for part in parts if (made := part(run)) is not None]
    return page(f"{run.job.name}: predicted beside measured", lead, sections)


def _facts(run: RunSummary) -> list[tuple[str, str]]:
    found = [(f"{run.last('step') or 0}", "steps done")]
    if run.last("loss") is not None:
        found.append((f"{run.last('loss'):.3f}", "last training loss, nats"))
    if run.last("eval_loss") is not None:
        found.append((f"{run.last('eval_loss'):.3f}", "held-out loss, nats"))
    if run.facts.unigram_entropy is not None:
        found.append((f"{run.facts.unigram_entropy:.3f}", "unigram entropy, nats"))
    if run.forecast:
        found.append((format_seconds(run.forecast.step_time_s), "a step, predicted"))
    if run.step_time_s:
        found.append((format_seconds(run.step_time_s), "a step, measured (median)"))
    if run.last("tokens_per_s"):
        found.append((f"{format_count(run.last('tokens_per_s'))} tokens/s", "newest step"))
    for rank, (steps, ratio) in sorted(run.stragglers.items()):
        found.append(
            (f"rank {rank}, {ratio:.1f} x", f"slower than ranks with its work, {steps} steps")
        )
    measured = [r.ledger.peak_bytes for r in run.ranks if r.ledger]
    if measured:
        found.append((format_bytes(max(measured)), "peak of the fullest rank, measured"))
    if run.traffic_equal is not None:
        word = "equal" if run.traffic_equal else "different"
        found.append((word, "traffic declared and recorded"))
    return found


def _timeline(run: RunSummary) -> Section:
    if not run.predicted and not run.ranks:
        return Section("Timeline", _nothing("This run recorded no step."), "timeline")
    steps = sorted({r.step for r in run.ranks})
    text = f"Measured in step {', '.join(map(str, steps))}." if steps else "Nothing was measured."
    fig = timeline_figure(run.predicted, run.ranks)
    body = (
        f'<p class="note">{text} Thin bars lie under what they run in: collectives and waiting. Drag to '
        "zoom, double-click to see all, click a span for its details.</p>"
        + figure(fig, "timeline-figure", "Click a span.")
        + _exposed(run)
    )
    return Section("Timeline: predicted above measured", body, "timeline")


def _exposed(run: RunSummary) -> str:
    """Communication that nothing computes beside, by axis."""
    told = (run.forecast.time.get("exposed_comm_s") if run.forecast else None) or {}
    found = run.exposed_comm_s
    axes = sorted({*told, *found})
    if not axes:
        return ""
    rows = [
        (
            axis or "unknown",
            *(format_seconds(by[axis]) if axis in by else "" for by in (told, found)),
        )
        for axis in axes
    ]
    note = (
        "Exposed communication by axis: predicted of the busiest rank without its bubble; measured of the "
        "rank that stood longest in collectives and waits, which on pp are waits for other ranks too."
    )
    table = html_table(("axis", "predicted", "measured"), rows)
    return f'<p class="note">{note}</p>{table}'


def _memory(run: RunSummary) -> Section:
    limit = run.job.cluster.memory_limit_bytes
    body = figure(memory_figure(run.predicted, run.ranks, limit), "memory-figure")
    rows = []
    for what, records in (("predicted", run.predicted), ("measured", run.ranks)):
        for r in records:
            if r.ledger:
                sizes = [format_bytes(r.ledger.at_peak.get(c, 0)) for c in CATEGORIES]
                total = format_bytes(r.ledger.peak_bytes)
                rows.append((r.rank, what, *sizes, total, _share(r.ledger.peak_bytes, limit)))
    rows.sort(key=lambda row: (row[0], row[1] == "measured"))
    body += html_table(("rank", "", *CATEGORIES, "total", "of the limit"), rows)
    return Section("Memory at the peak of each rank", body, "memory")


def _share(size: int, limit: int) -> str:
    return f"{size / limit:.1%}" if limit else ""


def _traffic(run: RunSummary) -> Section:
    title = "Traffic of one step: declared beside recorded"
    if run.traffic_equal is None:
        return Section(title, _nothing("This run recorded no traffic."), "traffic")
    different = sum(not p.equal for p in run.traffic)
    verdict = (
        f'<b class="good">equal</b>: all {len(run.traffic)} lines agree to the byte'
        if not different
        else f'<b class="bad">different</b>: {different} of {len(run.traffic)} lines'
    )
    body = (
        f'<p class="note">{verdict}. Compared line by line; shown with the blocks joined. Bytes are '
        "of the tensor a rank hands in.</p>" + traffic_table(join_blocks(run.traffic))
    )
    return Section(title, body, "traffic")


def _loss(run: RunSummary) -> Section:
    if not run.metrics:
        return Section("Loss", _nothing("No step is done."), "loss")
    fig = loss_figure(run.metrics, run.facts.unigram_entropy)
    return Section("Loss", figure(fig, "loss-figure"), "loss")


def _experts(run: RunSummary) -> Section | None:
    """Rows of each expert over the run; drops and imbalance of its first step, worst and last."""
    held = [m for m in run.metrics if m.get("expert_load")]
    if not held:
        return None
    worst = max(held, key=lambda m: m["expert_imbalance"])
    rows = []
    for what, m in (("first", held[0]), ("most uneven", worst), ("last", held[-1])):
        busiest = f"{m['expert_imbalance']:.2f}"
        shares = f"{min(m['expert_load']):.1%} to {max(m['expert_load']):.1%}"
        losses = [f"{m.get(name, 0.0):.4g}" for name in ("balance_loss", "z_loss")]
        rows.append((what, m["step"], shares, busiest, m["dropped_rows"], *losses))
    header = ("", "step", "shares", "busiest / even", "dropped rows", "balance loss", "z-loss")
    body = figure(experts_figure(held), "experts-figure") + html_table(header, rows)
    return Section("Experts: rows of each", body, "experts")


def _sample(run: RunSummary) -> Section:
    facts = run.facts
    if not facts.sample_text:
        return Section("What the model wrote", _nothing("No sample was written."), "sample")
    prompt = f"<b>{escape(facts.sample_prompt)}</b>"
    return Section(
        "What the model wrote", f"<pre>{prompt}{escape(facts.sample_text)}</pre>", "sample"
    )


def _job(run: RunSummary) -> Section:
    lines = [f"plan     {run.job.plan}", f"cluster  {run.job.cluster}"]
    if run.facts.machine:
        lines.append(f"machine  {run.facts.machine}")
    text = "\n".join(lines) + "\n\n" + run.job.to_toml()
    return Section("Plan, machine and job", f"<pre>{escape(text)}</pre>", "plan")


def _nothing(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
