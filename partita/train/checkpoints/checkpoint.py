"""Checkpoints: safetensors pieces and a manifest, committed by one rename.

A save, on every rank:

    1  main makes .step-00000100.<id>.tmp
    2  each rank writes rank-N.safetensors, flushes it to disk, and lists its pieces in rank-N.json
    3  main joins the lists into manifest.json, flushes it and the folder
    4  main renames the folder to step-00000100 and flushes its parent      <- the commit
    5  main removes all but the last K checkpoints

Until 4 nothing of the save can be found, after it all of it can: a process killed anywhere leaves the
old or the new checkpoint. Between the stages all ranks are asked "did it work for all?" (`Ranks.agree`).
A run takes 2 to 5 behind its training (background_save.py).

Digests are verified on every load; pickles are never opened.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from partita.base.errors import CheckpointError, WriteError
from partita.train.checkpoints.manifest import (
    FORMAT,
    MANIFEST,
    Header,
    Listing,
    Manifest,
    encode,
    read_manifest,
)
from partita.train.checkpoints.pieces import (
    Copied,
    Piece,
    Wanted,
    durable_write,
    file_problems,
    fill,
    write_pieces,
)

STEP = re.compile(r"^step-(\d{8,})(?:-(\d+))?$")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Who saves. `agree(ok)` returns on all ranks, once all have called it: were all of them ok?"""

    rank: int = 0
    world: int = 1
    agree: Callable[[bool], bool] = bool

    @property
    def is_main(self) -> bool:
        """Rank 0 makes the folder and commits it."""
        return self.rank == 0


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `checkpoint inspect` and `verify` answer."""

    step: int | None
    plan: str | None
    complete: bool
    tensors: int
    bytes: int
    problems: tuple[str, ...]


ALONE = Ranks()


class Saving:
    """One save into `folder`/step-<step> on one rank: made (step 1 above), then `write` with the pieces it
    is primary of, then `commit`, each once all ranks are through with the one before (background_save.py).
    The pieces of all ranks tile every role of every tensor of `header`; the newest `keep_last` are kept.

    `temporary` is None where a good checkpoint of this step stands already: it is `final`, and nothing
    is left to do. A bad one is left where it is, and the new one lies beside it as step-<step>-2.
    """

    def __init__(
        self, folder: Path, step: int, header: Header, ranks: Ranks, keep_last: int
    ) -> None:
        self.step, self.header, self.ranks, self.keep_last = step, header, ranks, keep_last
        with stage(folder, ranks):
            if ranks.is_main:
                _prepare(folder, step)
        self.temporary = _find_temporary(folder, step)
        if self.temporary is None:
            self.final = next(p for p in list_checkpoints(folder) if _step_of(p)[0] == step)
        else:
            self.final = _free_name(folder, step)

    def write(self, pieces: Iterable[Piece | Copied]) -> None:
        """This rank's file."""
        if self.temporary is not None:
            _write(self.temporary, self.ranks.rank, self.step, pieces)

    def commit(self) -> None:
        """Main: manifest, rename, and the removal of what is too old; the others have nothing to do."""
        if self.temporary is not None and self.ranks.is_main:
            _commit(self.temporary, self.final, self.step, self.ranks.world, self.header)
            _retain(self.final, self.keep_last)


def save_alone(
    folder: Path, step: int, world: int, pieces: Callable[[int], Iterable[Piece]], header: Header
) -> Path:
    """The checkpoint that `world` ranks would write, written by one process: `pieces(rank)` are a
    rank's. `folder` holds none of this step."""
    with stage(folder, ALONE):
        _prepare(folder, step)
    temporary, final = _find_temporary(folder, step), _free_name(folder, step)
    assert temporary is not None
    with stage(temporary, ALONE):
        for rank in range(world):
            _write(temporary, rank, step, pieces(rank))
        _commit(temporary, final, step, world, header)
    return final


def _write(temporary: Path, rank: int, step: int, pieces: Iterable[Piece | Copied]) -> None:
    """One rank's file, and what it holds."""
    metadata = {"format": "partita", "save_id": _save_id(temporary), "step": str(step)}
    listing = write_pieces(temporary / f"rank-{rank}.safetensors", pieces, metadata)
    durable_write(temporary / f"rank-{rank}.json", [msgspec.json.encode(listing)])


def _save_id(temporary: Path) -> str:
    return temporary.name.split(".")[2]


def _prepare(folder: Path, step: int) -> None:
    """Clears what killed saves left, and makes the temporary folder unless the step is saved."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*.tmp"):
        shutil.rmtree(left)
    if _good(folder, step) is None:
        (folder / f".step-{step:08d}.{secrets.token_hex(8)}.tmp").mkdir()


def _find_temporary(folder: Path, step: int) -> Path | None:
    return next(iter(folder.glob(f".step-{step:08d}.*.tmp")), None)


def _good(folder: Path, step: int) -> Path | None:
    for path in list_checkpoints(folder):
        if _step_of(path)[0] == step and not inspect(path, digests=True).problems:
            return path
    return None


def _free_name(folder: Path, step: int) -> Path:
    taken = [_step_of(p)[1] for p in list_checkpoints(folder) if _step_of(p)[0] == step]
    suffix = f"-{max(taken) + 1}" if taken else ""
    return folder / f"step-{step:08d}{suffix}"


def _commit(temporary: Path, final: Path, step: int, world: int, header: Header) -> None:
    manifest = Manifest(FORMAT, _save_id(temporary), step, world, header, (), ())
    listings: list[Listing] = []
    for rank in range(manifest.world):
        path = temporary / f"rank-{rank}.json"
        listings.append(msgspec.json.decode(path.read_bytes(), type=Listing))
        path.unlink()
    whole = msgspec.structs.replace(
        manifest,
        files=tuple(listing.file for listing in listings),
        pieces=tuple(entry for listing in listings for entry in listing.pieces),
    )
    durable_write(temporary / MANIFEST, [encode(whole)])
    sync_folder(temporary)
    read_manifest(temporary)  # pieces that do not tile the model are our fault: never commit them
    temporary.rename(final)
    sync_folder(final.parent)


def _retain(final: Path, keep_last: int) -> None:
    """Of `final` and the complete ones before it, removes all but the newest `keep_last`.

    A newer one is never touched: after a fallback it is the damaged one.
    """
    until = [p for p in list_checkpoints(final.parent) if _step_of(p) <= _step_of(final)]
    complete = [p for p in until if not inspect(p).problems]
    for old in complete[max(1, keep_last) :]:
        doomed = final.parent / f".{old.name}.{secrets.token_hex(8)}.tmp"
        old.rename(doomed)  # first out of sight: a folder half removed is never found
        shutil.rmtree(doomed)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def stage(path: Path, ranks: Ranks) -> Iterator[None]:
    """One stage of a save: a rank's error becomes every rank's, and the folder is removed."""
    error: BaseException | None = None
    try:
        yield
    except (OSError, CheckpointError) as caught:
        error = caught
    if ranks.agree(error is None):
        return
    if ranks.is_main and path.name.endswith(".tmp"):
        with suppress(OSError):
            shutil.rmtree(path)
    if isinstance(error, OSError):
        raise _write_error(path, error) from error
    if error is not None:
        raise error
    other = WriteError(
        f"{path}: another rank could not write its part; nothing saved", file=str(path)
    )
    other.echoes = True
    raise other


def _write_error(path: Path, error: OSError) -> WriteError:
    what = "the disk is full" if error.errno in FULL else error.strerror or str(error)
    free = ""
    with suppress(OSError):
        free = f" ({shutil.disk_usage(path.parent).free} bytes free)"
    folder = path.parent if "step-" in path.name else path
    kept = "the last good one is kept" if list_checkpoints(folder) else "there is none before it"
    return WriteError(
        f"cannot write the checkpoint {path}: {what}{free}; {kept}",
        file=str(error.filename or path),
    )


def _step_of(path: Path) -> tuple[int, int]:
    found = STEP.match(path.name)
    return (int(found[1]), int(found[2] or 1)) if found else (-1, 0)


def list_checkpoints(folder: Path) -> list[Path]:
    """Step folders of `folder`, newest first; complete or not."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and STEP.match(p.name)]
    return sorted(found, key=_step_of, reverse=True)


def outlook(folder: Path) -> str:
    """What the next start of a run will do, for who is told that this one has ended: `folder` is its
    checkpoints'."""
    newest = next(iter(list_checkpoints(folder)), None)
    if newest is None:
        return "no checkpoint was written yet: started again, the job begins anew"
    return f"start the job again to go on from step {_step_of(newest)[0]}"


def newest_complete(
    folder: Path, *, allow_fallback: bool = False, check: Callable[[Path], object] | None = None
) -> Path | None:
    """The newest checkpoint of a checkpoints folder, every digest verified; None where none is.

    `check` stands for `verify`, with more that a good one must hold. A newest one that is damaged raises
    CheckpointError; with `allow_fallback` the newest good one is taken instead. A bad copy of a step that
    was saved again (step-N-2) does not count.
    """
    first: CheckpointError | None = None
    for path in list_checkpoints(folder):
        try:
            (check or verify)(path)
        except CheckpointError as error:
            first = first or error
            if not allow_fallback:
                break
        else:
            return path
    if first is None:
        return None
    advice = "" if allow_fallback else "; --allow-fallback takes the newest good one"
    raise CheckpointError(first.message + advice, file=first.file, key=first.key) from first


def verify(folder: Path) -> Manifest:
    """Reads every piece of a step folder; raises CheckpointError at the first that is bad."""
    manifest = read_manifest(folder)
    for problem in file_problems(folder, manifest, digests=True):
        raise problem
    return manifest


def inspect(folder: Path, *, digests: bool = False) -> Inspection:
    """What a step folder holds and what is wrong with it; with `digests` every byte is read."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return Inspection(None, None, False, 0, 0, (error.message,))
    problems = tuple(e.message for e in file_problems(folder, manifest, digests=digests))
    return Inspection(
        manifest.step,
        manifest.header.plan,
        not problems,
        len(manifest.header.tensors),
        sum(entry.bytes for entry in manifest.pieces),
        problems,
    )


def load(folder: Path, wanted: Iterable[Wanted]) -> Manifest:
    """Fills the tensors of `wanted` from a step folder, whatever plan wrote it.

    Each rank calls it for its own boxes and reads only the pieces that meet them; nothing is
    communicated. Every piece read has its digest verified. fp32 and fp64 convert into each other
    (a plan of another precision), and so do weights without masters, of bf16 and fp16; any other dtype
    must be equal. Raises CheckpointError.
    """
    manifest = read_manifest(folder)
    fill(folder, manifest, list(wanted))
    return manifest
