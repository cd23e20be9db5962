"""Torch's distributed checkpoint (DCP): written for others to read, and read back; no run goes on from one.

    blocks.0.attention.wq                 the weight, by its full name and logical shape
    optimizer.exp_avg.blocks.0.attention.wq
    partita.header, partita.job           JSON and TOML as uint8: what a run is held against
    partita.step                          int64

Any torch program loads the folder with `torch.distributed.checkpoint.load`, into DTensors of any mesh; what
it saves under the same names is read back. DCP has no digests: what came through it is as good as its disk.
Its metadata is a pickle: here only the classes that a DCP consists of are looked up, nothing else is called.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from partita.base.errors import CheckpointError, WriteError
from partita.spec.job import Job
from partita.spec.layout import Box
from partita.spec.plan import Plan
from partita.train.checkpoints.convert import require_new, write_as
from partita.train.checkpoints.manifest import Header, read_manifest
from partita.train.checkpoints.pieces import TORCH_DTYPES, Piece, Wanted, fill
from partita.train.checkpoints.resume import verify_run
from partita.train.checkpoints.sample import job_of

METADATA = ".metadata"
HEADER, JOB, STEP = "partita.header", "partita.job", "partita.step"
CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta", "MetadataIndex", "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in TORCH_DTYPES.values()),
}  # fmt: skip


def is_dcp(folder: Path) -> bool:
    """Whether a folder is a DCP by its looks."""
    return (folder / METADATA).is_file()


def key(name: str, role: str) -> str:
    """A tensor's name in a DCP."""
    return name if role == "weight" else f"optimizer.{role}.{name}"


def export_dcp(step_folder: Path, target: Path) -> int:
    """Writes a step folder, every digest verified, as a DCP of one rank; returns the tensors written. All
    of them are in memory at once. Raises CheckpointError, UsageError (the target holds something),
    WriteError."""
    require_new(target)
    verify_run(step_folder)
    manifest, job = read_manifest(step_folder), job_of(step_folder)
    dtypes = {(p.name, p.role): TORCH_DTYPES[p.dtype] for p in manifest.pieces}
    state: dict[str, Any] = {}
    wanted: list[Wanted] = []
    for name, shape in manifest.header.tensors.items():
        for role in manifest.header.roles_of(name):
            values = state[key(name, role)] = torch.empty(shape, dtype=dtypes[name, role])
            wanted.append(Wanted(name, role, shape, tuple((0, n) for n in shape), values))
    fill(step_folder, manifest, wanted)
    state |= {
        HEADER: _bytes(msgspec.json.encode(manifest.header)),
        JOB: _bytes(job.to_toml().encode()),
        STEP: torch.tensor([manifest.step]),
    }
    try:
        with _alone():
            save(state, storage_writer=FileSystemWriter(target), no_dist=True)
    except (CheckpointException, OSError) as error:
        raise WriteError(f"cannot write {target}: {_reason(error)}", file=str(target)) from error
    return len(wanted)


def import_dcp(source: Path, target: Path, plan: Plan | None = None) -> Path:
    """Writes target/checkpoints/step-N of a DCP that holds what `export_dcp` wrote, whoever saved it since,
    for `plan` (its own unless given); returns the new step folder.

    Raises CheckpointError (66, by tensor) for what is no DCP, lacks a tensor or has it in another shape;
    UsageError, PlanError, WriteError as `convert_checkpoint`.
    """
    require_new(target)
    reader = _Reader(source)
    held = _shapes(reader)
    told = _load(source, {n: torch.empty(held[n].size, dtype=held[n].properties.dtype)
                          for n in (HEADER, JOB, STEP) if n in held})  # fmt: skip
    if len(told) < 3:
        text = f"{source}: holds no {HEADER}: it was not exported by `partita checkpoint convert --to dcp`"
        raise CheckpointError(text, file=str(source / METADATA), key=HEADER)
    try:
        header = msgspec.json.decode(told[HEADER].numpy().tobytes(), type=Header)
        job = _job(told[JOB])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        text = f"{source}: its {HEADER} is none: {error}"
        raise CheckpointError(text, file=str(source), key=HEADER) from error
    state = _load(source, _empty(source, header, held))

    def cut(name: str, box: Box) -> Iterator[Piece]:
        for role in header.roles_of(name):
            whole = state[key(name, role)]
            yield Piece(name, role, box, whole[tuple(slice(a, b) for a, b in box)])

    return write_as(plan or job.plan, job, target, (int(told[STEP]), header), cut)


def _job(raw: Tensor) -> Job:
    import tomllib

    return Job.load(tomllib.loads(raw.numpy().tobytes().decode()))


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _shapes(reader: _Reader) -> dict[str, TensorStorageMetadata]:
    metadata = reader.read_metadata()
    found = metadata.state_dict_metadata
    return {k: v for k, v in found.items() if isinstance(v, TensorStorageMetadata)}


def _empty(
    source: Path, header: Header, held: dict[str, TensorStorageMetadata]
) -> dict[str, Tensor]:
    """What the header states, to be filled."""
    found: dict[str, Tensor] = {}
    for name, shape in header.tensors.items():
        for role in header.roles_of(name):
            here = held.get(key(name, role))
            if here is None or tuple(here.size) != tuple(shape):
                what = "is missing" if here is None else f"has shape {list(here.size)}"
                raise CheckpointError(
                    f"{source}: {key(name, role)} {what}; the model it states has {list(shape)}",
                    file=str(source / METADATA),
                    key=name,
                )
            found[key(name, role)] = torch.empty(shape, dtype=here.properties.dtype)
    return found


def _load(source: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a DCP, in place."""
    try:
        with _alone():
            load(dict(state), storage_reader=_Reader(source), no_dist=True)
    except CheckpointError:
        raise
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        text = f"{source}: cannot be read: {_reason(error)}"
        raise CheckpointError(text, file=str(source)) from error
    return state


@contextmanager
def _alone() -> Iterator[None]:
    """Torch warns that it is not distributed, and tells its errors with their traces; neither is news."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The innermost cause, in a line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Unpickler(pickle.Unpickler):
    """Looks up the classes of a DCP's metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in CLASSES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no DCP consists of")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Torch's reader, with metadata that cannot call anything and files that lie in the folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The folder's metadata; CheckpointError where it is none."""
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
            assert isinstance(found, Metadata)
            names = {info.relative_path for info in found.storage_data.values()}
        except Exception as error:  # a damaged pickle raises anything
            raise CheckpointError(
                f"{path}: no metadata of a DCP: {error}", file=str(path)
            ) from error
        outside = sorted(n for n in names if Path(n).name != n)
        if outside:
            text = f"{path}: names {outside[0]!r}, a file outside the folder"
            raise CheckpointError(text, file=str(path))
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found
