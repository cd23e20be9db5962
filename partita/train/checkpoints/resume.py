"""A run's state as pieces of logical tensors: saved by primaries, loaded by any plan.

Masters are saved under role 'weight', optimizer states under torch's names. A rank of the dp-0 plane saves
what it is primary of; every rank loads every box it holds. What fp8's scales look back at is each rank's
own: the same plan goes on from it, another one begins anew, as a run does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partita.base.config import decode
from partita.base.errors import CheckpointError, UsageError
from partita.parallel.laid import lay
from partita.parallel.precision.scaler import LossScaler
from partita.parallel.room import Request
from partita.spec.layout import Box, Layout
from partita.spec.model import ModelSpec
from partita.spec.plan import Plan
from partita.train.checkpoints.checkpoint import Inspection, Ranks, Saving, inspect, load, verify
from partita.train.checkpoints.manifest import (
    AMAX,
    MANIFEST,
    Header,
    Manifest,
    first_difference,
    foreign_tensors,
    read_manifest,
)
from partita.train.checkpoints.pieces import Piece, Wanted, own_pieces
from partita.train.optimizer.optim import restore_state, state_names, state_tensor
from partita.train.step import Model, Update

if TYPE_CHECKING:
    from partita.spec.job import Job


@dataclass(frozen=True)
class Stated:
    """What a header states beyond the job: layouts by weight, steps done, the fingerprints {'tokenizer': ...,
    'data': ...}, updates that the optimizer made in those steps, and fp16's loss scale."""

    layouts: Mapping[str, Layout]
    updates: int
    data: dict[str, Any]
    made: int = 0
    scaler: LossScaler | None = None


def header(job: Job, stated: Stated) -> Header:
    """What a save states about the run, and what a resume is held against."""
    spec = job.model
    t = job.train
    optimizer = {"name": t.optimizer, "betas": list(t.betas), "eps": t.eps, "momentum": t.momentum}
    if frozen := sorted(n for n in stated.layouts if job.frozen.holds(n)):
        optimizer["frozen"] = frozen
    return Header(
        plan=str(job.plan),
        tensors={n: x.shape for n, x in stated.layouts.items()},
        roles=("weight", *state_names(t)),
        model={k: v for k, v in asdict(spec).items() if not k.startswith("_")},
        tokenizer=stated.data["tokenizer"],
        optimizer=optimizer,
        data=stated.data["data"],
        state={"updates": stated.updates, "made": stated.made, "seed": job.seed}
        | ({} if stated.scaler is None else {"loss_scaler": stated.scaler.state()}),
    )


Named = tuple[str, Tensor]  # role, the part of it that a box names


def boxes(
    model: Model, update: Update, states: dict[str, dict[str, Tensor]], primary: bool
) -> Iterator[tuple[str, Box, list[Named]]]:
    """(weight, box, its values by role) of what this rank holds, or of what it is primary of. Frozen weights
    have one role.

    `states[slot name][role]` is flat as the slot is."""
    rank = model.context.rank
    held = [
        (slot.weights, slot.start, {"weight": slot.master, **states[slot.name]})
        for slot in update.slots
    ]
    frozen = [unit for unit in model.units if unit.spec.frozen]
    held += [(tuple(n for n, *_ in u.places), 0, {"weight": u.master}) for u in frozen]
    for weights, first, flat in held:
        for weight in weights:
            for piece in model.laid.pieces(weight, rank):
                if primary and not piece.primary:
                    continue
                shape = tuple(b - a for a, b in piece.box)
                start = piece.start - first
                inside = slice(start, start + piece.numel())
                yield weight, piece.box, [(r, x[inside].view(shape)) for r, x in flat.items()]


def _states(update: Update, job: Job) -> dict[str, dict[str, Tensor]]:
    """Optimizer states by slot and role; zeros before the first step."""
    found: dict[str, dict[str, Tensor]] = {}
    for slot in update.slots:
        wide = slot.gradient.dtype
        held = {r: state_tensor(update.optimizer, slot.master, r) for r in state_names(job.train)}
        found[slot.name] = {
            r: torch.zeros_like(slot.master, dtype=wide) if x is None else x
            for r, x in held.items()
        }
    return found


def pieces(model: Model, update: Update, job: Job) -> Iterator[Piece]:
    """What this rank saves: the boxes it is primary of, of masters and optimizer states; and what its fp8
    scales look back at."""
    for weight, box, named in boxes(model, update, _states(update, job), primary=True):
        for role, values in named:
            yield Piece(weight, role, box, values)
    for number, seen in enumerate(model.products.seen()):
        for of, largest in seen.items():
            name = _looked_at(model.context.rank, number, of)
            yield Piece(name, AMAX, tuple((0, n) for n in largest.shape), largest)


def _looked_at(rank: int, number: int, of: str) -> str:
    """The name of what a rank's product of this number saw of an operand."""
    return f"rank-{rank}.{number}.{of}"


def _look_back(model: Model, checkpoint: Path, manifest: Manifest) -> None:
    """Scales go on from what was seen before a save of the same plan."""
    rank, found = model.context.rank, model.products.seen()
    device = model.units[0].master.device
    for name, largest in own_pieces(checkpoint, manifest, rank, AMAX).items():
        _, number, of = name.split(".", 2)
        found[int(number)][of] = largest.to(device)
    model.products.restore(found)


def begin_save(
    folder: Path,
    step: int,
    job: Job,
    model: Model,
    update: Update,
    data: dict[str, Any],
    ranks: Ranks,
) -> Saving:
    """A checkpoint of all ranks, of which nothing is written yet; each calls it."""
    model.context.where.activity = "checkpoint"
    stated = Stated(model.laid.layouts, update.updates, data, update.made, model.scaler)
    return Saving(folder, step, header(job, stated), ranks, job.train.keep_last)


def stated_model(checkpoint: Path, header: Header) -> ModelSpec:
    """The model a checkpoint states. Raises CheckpointError where that is none, or its tensors are not
    the ones that are held."""
    path = str(checkpoint / MANIFEST)
    stated = {k: v for k, v in header.model.items() if v is not None}
    try:
        model = decode(ModelSpec, stated)
    except UsageError as error:
        text = f"{path}: the model it states is none: {error.message}"
        raise CheckpointError(text, file=path, key=error.key) from None
    held = header.tensors
    few = replace(model, layers=min(model.layers, len(held) + 1))  # a layer has a tensor at least
    layouts = lay(Request(Plan(), few, seq_len=1)).layouts
    wrong = foreign_tensors(held, {n: x.shape for n, x in layouts.items()})
    if wrong is not None:
        raise CheckpointError(f"{path}: {wrong[1]}", file=path, key=wrong[0])
    return model


def verify_run(checkpoint: Path) -> None:
    """Raises CheckpointError at the first thing that is wrong with a step folder, its digests, and the
    model it states."""
    stated_model(checkpoint, verify(checkpoint).header)


def inspect_run(checkpoint: Path, digests: bool) -> Inspection:
    """What a step folder holds and what is wrong with it; with `digests` every byte is read."""
    found = inspect(checkpoint, digests=digests)
    if found.problems:
        return found
    try:
        stated_model(checkpoint, read_manifest(checkpoint).header)
    except CheckpointError as error:
        return replace(found, complete=False, problems=(error.message,))
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:297]}..."


def check_resumes(checkpoint: Path, job: Header) -> None:
    """Raises UsageError (exit 2) naming the first field in which a checkpoint and a job differ."""
    difference = first_difference(read_manifest(checkpoint), job)
    if difference is not None:
        key = _key(difference.field)
        what = f"the digest of {key}" if difference.field == "data.digest" else key
        raise UsageError(
            f"{checkpoint} was written with {what} = {_short(difference.checkpoint)}, the job "
            f"has {_short(difference.job)}: change it back, or start anew with --fresh",
            key=key,
        )


def _key(field: str) -> str:
    """The job's key that a field of a checkpoint's header comes from."""
    section, _, name = field.partition(".")
    if section == "tokenizer":
        return "data.tokenizer"
    if section == "optimizer":
        return "train.optimizer" if name == "name" else f"train.{name}"
    own = {"digest": "data.source", "seed": "seed"}
    own |= {n: f"train.{n}" for n in ("seq_len", "global_batch_size")}
    return own.get(name, field) if section == "data" else field


def load_run(checkpoint: Path, job: Job, model: Model, update: Update, data: dict[str, Any]) -> int:
    """Fills masters, states and working weights; returns the step it was saved after.

    Raises UsageError (exit 2) naming the first field in which the run and the job differ.
    """
    check_resumes(checkpoint, header(job, Stated(model.laid.layouts, update.updates, data)))
    manifest = read_manifest(checkpoint)
    states = _states(update, job)
    wanted = [
        Wanted(weight, role, model.laid.layouts[weight].shape, box, values)
        for weight, box, named in boxes(model, update, states, primary=False)
        for role, values in named
    ]
    load(checkpoint, wanted)
    state = manifest.header.state
    if model.scaler is not None and "loss_scaler" in state:
        model.scaler.restore(state["loss_scaler"])
    if manifest.header.plan == str(job.plan):
        _look_back(model, checkpoint, manifest)
    update.updates, update.made = manifest.step, state.get("made", manifest.step)
    for slot in update.slots:
        own, made = states[slot.name], update.made
        restore_state(update.optimizer, slot.master, own, made, job.train, step=manifest.step)
    model.parameters.refresh()
    return manifest.step
