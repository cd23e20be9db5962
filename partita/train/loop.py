"""The training loop of one rank: data, steps, metrics, evaluation, checkpoints, an agreed stop.

Everything that decides (resume step, stop step, whether to evaluate) is the same on every rank by
construction, so that all enter the same collectives.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from partita.base.errors import CheckpointError, CorruptError, NonFiniteError, WriteError
from partita.base.units import format_count, format_seconds
from partita.parallel.ep.log import Routed
from partita.spec.job import Job
from partita.train.build import Built
from partita.train.checkpoints.background_save import Behind
from partita.train.checkpoints.checkpoint import Ranks
from partita.train.checkpoints.resume import begin_save, load_run, pieces
from partita.train.control import Control
from partita.train.finite import check_weights, explained
from partita.train.metrics import Bar, MetricsFile
from partita.train.recorder import StepRecorder
from partita.train.replay import Replay
from partita.train.step import StepBatch
from partita.train.stragglers import Stragglers
from partita.train.track import tracking


@dataclass
class Outcome:
    """How a rank's loop ended: the newest metrics line, and the signal that stopped it, if any."""

    metrics: dict[str, Any] = field(default_factory=dict)
    stopped_by: int = 0
    already_done: bool = False


@dataclass
class Loop:
    """One rank's run, from `checkpoint` on. `after_step(step)` is called when a step is over (tests)."""

    job: Job
    built: Built
    folder: Path
    control: Control
    checkpoint: Path | None = None
    after_step: Callable[[int], None] = lambda step: None

    def __post_init__(self) -> None:
        self.recorder = StepRecorder(self.built, self.folder, self.job.train.steps)
        self.behind = Behind()
        self.replay = Replay(self.built, self.job.train.replay_every, self.control.shared)
        mesh, unequal = self.built.context.mesh, bool(self.job.cluster.nodes)
        places = [(mesh.coords(r)["pp"], unequal and r) for r in range(mesh.world_size)]
        self.stragglers = Stragglers(places)
        self._drained, self._leaves = True, False
        self._open: tuple[dict[str, Any], StepBatch] | None = None  # a step whose loss is not known

    def run(self) -> Outcome:
        """Trains from the checkpoint to the last step, or to an agreed stop."""
        job, context = self.job, self.built.context
        done = self._restore()
        outcome = Outcome(already_done=done >= job.train.steps)
        metrics = MetricsFile(self.folder / "metrics.jsonl")
        if context.rank == 0:
            metrics.truncate_after(done)
        self._saved = done
        start = time.perf_counter()
        speaks = context.rank == 0
        with _bar(speaks, job, done) as bar, tracking(job, self.folder, done, speaks) as track:
            for step in range(done, job.train.steps):
                last = step + 1 == job.train.steps
                self._drained = last or self._is_due(step + 1) or self._leaves
                lines = self._one(step, start)
                if self._evaluates(step + 1):
                    with self.recorder.span("eval", "evaluation"):
                        lines[-1] |= self.evaluate()
                for line in lines:
                    outcome.metrics = line
                    if context.rank == 0:
                        line |= self._slow()
                        metrics.write(line)
                        bar.update(line["step"], self._facts(line))
                        track.log(line)
                if self._after(step + 1, last):
                    outcome.stopped_by = self.control.stop_signal
                    break
        if not outcome.metrics:
            outcome.metrics = {"step": done}
        self.recorder.finish()
        return outcome

    def _evaluates(self, step: int) -> bool:
        """At the end and every `eval_every` steps, where something is held out."""
        every, steps = self.job.train.eval_every, self.job.train.steps
        due = step == steps or _every(every, step)
        return due and self.built.data.num_eval_sequences > 0

    def _after(self, step: int, last: bool) -> bool:
        """Checkpoints when due; True when the run must leave."""
        self.after_step(step)
        self._advance()
        self._leaves = self._leaves or self._should_stop(step)
        stop = self._leaves and self._drained and not last
        if last or stop or _every(self.job.train.checkpoint_every, step):
            with self.recorder.span("checkpoint", f"checkpoint {step}"):
                self.save(step)
                if last or stop:
                    self._advance(wait=True)
        return stop

    def _advance(self, wait: bool = False) -> None:
        """Goes on with the save in flight, or waits for its end."""
        try:
            if wait:
                self.behind.finish()
            elif self.behind.in_flight:
                self.behind.advance()
        except (WriteError, CheckpointError):
            self.built.context.where.activity = "checkpoint"
            raise

    def _is_due(self, step: int) -> bool:
        """Whether an evaluation or a checkpoint follows a step: an asynchronous pipeline drains in it, an
        update is proven before it ends."""
        flows = self.built.model.flow is not None or self.built.model.guess is not None
        saves = _every(self.job.train.checkpoint_every, step)
        return not flows or saves or self._evaluates(step)

    def _should_stop(self, step: int) -> bool:
        """The same answer on every rank: agreed in the shared file, or by a collective without one."""
        control, rank = self.control, self.built.context.rank
        if control.shared:
            return control.should_stop(rank, step)
        self.built.context.world.check()
        signals, busy = zip(
            *self.built.exchange((control.stop_signal, control.busy_ms(rank))), strict=True
        )
        for other, milliseconds in enumerate(busy):
            control.report_busy(other, milliseconds / 1000)
        if any(signals):
            control.ask_stop(max(signals))
        return any(signals)

    def _one(self, step: int, start: float) -> list[dict[str, Any]]:
        """Runs a step; the lines that are whole by then: its own, or that of the step before."""
        built, job, where = self.built, self.job, self.built.context.where
        begin = time.perf_counter()
        built.waited()  # what was waited for between steps is no step's
        where.step, where.phase = step + 1, "step"
        where.activity = "data"
        self._rehearse(step)
        with self.recorder.step(step):
            with self.recorder.span("data", "data"):
                batch = built.batch(step, self._drained)
            try:
                loss = built.model.forward_backward(batch)
                self.replay.compare(loss)
                done = self._closed()
                with self.recorder.span("U", "optimizer"):
                    norm = built.update.step()
            except NonFiniteError as error:
                bad = batch if self._open is None else self._open[1]
                found = explained(error, built.model, bad, built.exchange)
                self._advance(wait=True)  # all ranks end here: what is in flight is worth the wait
                raise found from None
            except CorruptError:
                self._advance(wait=True)
                raise
        end = time.perf_counter()
        self.control.report_busy(built.context.rank, end - begin - built.waited())
        tokens = job.train.global_batch_size * job.train.seq_len
        line = {
            "step": step + 1,
            **self._seen(step, built.model.told(loss), norm, built.update.lr),
            "tokens": (step + 1) * tokens,
            "tokens_per_s": tokens / (end - begin),
            "step_time_s": end - begin,
            "peak_memory_bytes": self.recorder.peak_bytes(),
            "wall_time_s": end - start,
            **self._more(),
            **self._routing(self.built.model.routed),
        }
        if batch.drains or built.model.guess is None:
            return [*done, line]
        self._open = line, batch
        return done

    def _rehearse(self, step: int) -> None:
        """A step that is to be computed twice, for the first time."""
        if not self.replay.is_due(step + 1):
            return
        batch = self.built.batch(step)
        try:
            self.replay.rehearse(batch)
        except NonFiniteError as error:
            raise explained(error, self.built.model, batch, self.built.exchange) from None

    def _seen(self, step: int, loss: float | None, norm: float, lr: float) -> dict[str, Any]:
        """Of a step; `loss` None where no target is counted."""
        if loss is None:
            logging.warning(
                "step %d has no loss: none of its targets is counted (masked, -100, or of another document "
                "than their inputs); its gradients are those of auxiliary losses alone, else 0",
                step + 1,
            )
        elif not math.isnan(loss):
            logging.info("step %d loss %.6f grad_norm %.6f", step + 1, loss, norm)
        return {"loss": loss, "grad_norm": norm if math.isfinite(norm) else None, "lr": lr}

    def _closed(self) -> list[dict[str, Any]]:
        """The line of the step before, where its loss and norm are known only now."""
        if self._open is None:
            return []
        (line, _), self._open = self._open, None
        guess = self.built.model.guess
        assert guess is not None and guess.found is not None
        found = guess.found
        loss = found.loss if found.has_targets else None
        seen = self._seen(found.step, loss, found.norm, found.lr)
        return [{**line, **seen, **self._more(), **self._routing(found.routed)}]

    def _more(self) -> dict[str, float]:
        """Of fp16 the loss scale, of an asynchronous schedule this rank's largest staleness so far."""
        scaler, flow = self.built.model.scaler, self.built.model.flow
        found: dict[str, float] = {}
        if scaler is not None:
            found |= {"loss_scale": scaler.scale, "skipped_steps": scaler.skipped}
        if flow is not None:
            found["staleness"] = flow.staleness
        return found

    def _routing(self, routed: Routed) -> dict[str, Any]:
        """Where experts are: their losses as they enter the gradient, rows dropped, and how even they are."""
        spec = self.job.model
        if not spec.experts:
            return {}
        return {
            "balance_loss": spec.balance_loss * routed.balance,
            "z_loss": spec.z_loss * routed.z,
            "dropped_rows": routed.dropped,
            "expert_imbalance": routed.imbalance,
            "expert_load": routed.load,
        }

    def _slow(self) -> dict[str, float]:
        """The slowest of the ranks that hold the others up, if any does; told as that changes."""
        if self.control.num_ranks == 1:
            return {}
        named, through = self.stragglers.see(self.control.busy_s())
        for found in named:
            rows = ", or its experts get more rows" if self.job.model.experts else ""
            logging.warning("%s: its host is slow or does other work%s", found, rows)
        for rank in through:
            logging.warning("rank %d is no slower than ranks with its work any more", rank)
        worst = self.stragglers.worst
        return {"straggler": worst.rank, "straggler_ratio": worst.ratio} if worst else {}

    def _facts(self, line: dict[str, Any]) -> str:
        rank, busy = self.control.slowest()
        slow = f"slowest rank {rank} ({format_seconds(busy)})" if self.control.num_ranks > 1 else ""
        if "straggler" in line:
            slow = f"rank {line['straggler']} takes {line['straggler_ratio']:.1f} x its peers' time"
        extra = f"  eval {line['eval_loss']:.4f}" if "eval_loss" in line else ""
        rate = f"{format_count(line['tokens_per_s'])} tokens/s"
        mfu = self.built.mfu(line["tokens_per_s"])
        loss = "no targets" if line["loss"] is None else f"loss {line['loss']:.4f}"
        return f"{loss}{extra}  {rate}  MFU {mfu:.1%}  {slow}"

    def evaluate(self) -> dict[str, float]:
        """What the model makes of held-out data."""
        self.built.context.where.activity = "evaluation"
        return self.built.held_out()

    def _restore(self) -> int:
        built = self.built
        if self.checkpoint is None:
            return 0
        step = load_run(self.checkpoint, self.job, built.model, built.update, built.fingerprint)
        logging.info("resumed from %s at step %d", self.checkpoint, step)
        return step

    def save(self, step: int) -> None:
        """Begins a checkpoint of all ranks, once the one before it is over; again for a step that is
        saved is nothing."""
        if step == self._saved:
            return
        self._advance(wait=True)
        built, job = self.built, self.job
        check_weights(built.model, step, built.exchange)
        ranks = Ranks(built.context.rank, built.context.mesh.world_size, built.agree)
        saving = begin_save(
            self.folder / "checkpoints",
            step,
            job,
            built.model,
            built.update,
            built.fingerprint,
            ranks,
        )
        here = self.control.num_ranks
        in_files = built.model.arenas.has_states_in_files
        self.behind.start(saving, pieces(built.model, built.update, job), here, in_files)
        self._saved = step
        logging.info("saving %s", saving.final)


def _every(every: int, step: int) -> bool:
    """Whether something that is done every so many steps (0: never) is due after this one."""
    return every > 0 and step % every == 0


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, step: int, facts: str) -> None:
        """Nothing to show on this rank."""


def _bar(shown: bool, job: Job, done: int) -> Bar | _Silent:
    return Bar(job.train.steps, done, f"train {job.name}") if shown else _Silent()
