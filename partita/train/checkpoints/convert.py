"""A checkpoint as another plan's ranks would have written it: the same tensors, cut and filed anew.

A run needs none of this, since any plan loads any checkpoint; it is for whoever wants each rank of a
cluster to find its own file. One rank's file is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import torch

from partita.base.errors import UsageError
from partita.parallel.laid import lay
from partita.parallel.room import Request
from partita.spec.job import Job
from partita.spec.layout import Box
from partita.spec.plan import Plan
from partita.train.checkpoints.checkpoint import save_alone
from partita.train.checkpoints.manifest import Header, Manifest, read_manifest
from partita.train.checkpoints.pieces import TORCH_DTYPES, Piece, Wanted, fill
from partita.train.checkpoints.resume import stated_model, verify_run
from partita.train.checkpoints.sample import job_of
from partita.train.data.tokenizer import write_whole

Cut = Callable[[str, Box], Iterator[Piece]]  # a box of a weight, in each of its roles


def convert_checkpoint(step_folder: Path, target: Path, plan: Plan) -> Path:
    """Writes target/checkpoints/step-N for `plan`, and target/job.toml with it; returns the new step
    folder. Raises CheckpointError (the source is damaged), PlanError, UsageError (the target holds
    something), WriteError."""
    require_new(target)
    verify_run(step_folder)
    manifest = read_manifest(step_folder)
    dtypes = {(p.name, p.role): p.dtype for p in manifest.pieces}
    cut = partial(_cut, step_folder, manifest, dtypes)
    return write_as(plan, job_of(step_folder), target, (manifest.step, manifest.header), cut)


def require_new(target: Path) -> None:
    """Raises UsageError where the target holds something."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} holds something already: name a new folder", file=str(target))


def write_as(plan: Plan, job: Job, target: Path, saved: tuple[int, Header], cut: Cut) -> Path:
    """Writes a run folder with the checkpoint `saved` (its step and header) as the ranks of `plan` would;
    returns the step folder."""
    step, header = saved
    plan = replace(job, plan=plan).plan  # with its microbatches
    model = stated_model(target, header)
    laid = lay(Request(plan, model, job.train.seq_len, frozen=job.frozen))

    def pieces(rank: int) -> Iterator[Piece]:
        for name, layout in laid.layouts.items():
            for piece in layout.pieces(laid.mesh, rank):
                if piece.primary:
                    yield from cut(name, piece.box)

    told = msgspec.structs.replace(header, plan=str(plan))
    made = save_alone(target / "checkpoints", step, plan.world_size, pieces, told)
    write_whole(target / "job.toml", replace(job, plan=plan).to_toml().encode())
    return made


def _cut(
    step_folder: Path,
    manifest: Manifest,
    dtypes: dict[tuple[str, str], str],
    name: str,
    box: Box,
) -> Iterator[Piece]:
    """One box of a tensor in each of its roles."""
    shape = manifest.header.tensors[name]
    for role in manifest.header.roles_of(name):
        values = torch.empty([b - a for a, b in box], dtype=TORCH_DTYPES[dtypes[name, role]])
        fill(step_folder, manifest, [Wanted(name, role, shape, box, values)])
        yield Piece(name, role, box, values)
