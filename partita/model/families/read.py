"""A Hugging Face folder read slice by slice: a rank reads the boxes it holds and nothing else.

Names and shapes of all files are checked before the first slice is read. Files are named by the folder's
index, so a name that leaves the folder is refused; pickles are never opened.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from partita.base.config import load_json
from partita.base.errors import CheckpointError, UsageError
from partita.model.families.names import NO_WEIGHTS, OLD_NORMS, WORDS, Source, names
from partita.spec.layout import Box
from partita.spec.model import ModelSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.bin.index.json")
DTYPES = ("F64", "F32", "F16", "BF16")
TOLD = 10  # tensors that are wrong, by name
COMPARED_ROWS = 4096  # of two tables that should be one


class Reader:
    """The weights of one folder. `read` may be called in any order; nothing is kept between calls."""

    def __init__(self, files: dict[str, _File], sources: Sequence[Source]) -> None:
        self._files = files
        self._sources: defaultdict[str, list[Source]] = defaultdict(list)
        for source in sources:
            self._sources[source.name].append(source)

    def read(self, name: str, box: Box) -> Tensor:
        """The elements of `box` of the logical tensor, in the file's dtype, shaped like the box; where ours
        are theirs and a number, in fp32 or fp64."""
        parts = {s.part: s for s in self._sources[name]}
        size = [b - a for a, b in box]
        if prod(size) == 0:
            return torch.empty(size)
        k = len(next(iter(parts)))
        at = product(*(range(a, b) for a, b in box[:k]))
        return torch.stack([self._read(parts[p], box[k:]) for p in at]).view(size)

    def _read(self, source: Source, box: Box) -> Tensor:
        k = source.rows
        sizes = source.dims[:k]
        if source.step:
            sizes = (sizes[0], source.step)
        first, rows = _fold(box[:k], sizes)
        run = slice(source.offset + first, source.offset + first + int(rows[-1]) + 1)
        spans: tuple[slice, ...] = (run,)
        columns = None
        if k < len(source.dims):
            start, columns = _fold(box[k:], source.dims[k:])
            spans = (run, slice(start, start + int(columns[-1]) + 1))
        stored = self._files[source.file_name].slice(source.file_name)
        found = stored[spans[::-1] if source.transposed else spans]
        found = found.t() if source.transposed else found
        found = _pick(found, 0, rows)
        if columns is not None:
            found = _pick(found, 1, columns)
        if source.plus:
            found = (found if found.dtype == torch.float64 else found.float()) + source.plus
        return found.reshape([b - a for a, b in box])


def _fold(box: Box, sizes: Sequence[int]) -> tuple[int, Tensor]:
    """The box's places along the folded dim: the first one, and all of them counted from it."""
    places, first = torch.zeros(1, dtype=torch.int64), 0
    for (a, b), size in zip(box, sizes, strict=True):
        places = (places.unsqueeze(-1) * size + torch.arange(b - a)).flatten()
        first = first * size + a
    return first, places


def _pick(x: Tensor, dim: int, places: Tensor) -> Tensor:
    """The box's places of the run that was read; the run itself where the box has no gaps."""
    return x if x.shape[dim] == places.numel() else x.index_select(dim, places)


class _File:
    """One safetensors file: mapped, its header read; tensors are read when sliced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._opened: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a readable safetensors file: {error}", file=str(path)
            ) from error
        self.stored = {plain: plain for plain in self._opened.keys()}  # noqa: SIM118

    def slice(self, name: str) -> Any:
        """safetensors' view of a tensor, by the name that the family gives it."""
        return self._opened.get_slice(self.stored[name])


def read_slices(folder: str | Path, spec: ModelSpec) -> Reader:
    """Opens a folder with `model.safetensors`, or the files that its index names.

    Raises CheckpointError, naming file and tensor, for what is missing, left over, or of another shape
    or dtype than `spec` says, for files outside the folder, and for folders that hold only pickles.
    """
    folder = Path(folder)
    sources = names(spec)
    files: dict[str, _File] = {}
    for path, listed in _paths(folder):
        file = _File(path)
        for name in listed:
            if name not in file.stored:
                raise _bad(path, name, f"{INDEX} says that it holds {name}; it does not")
        file.stored = {_full_name(n, spec): n for n in file.stored}
        for name, stored in file.stored.items():
            if name in files:
                raise _bad(path, stored, f"{stored} is also in {files[name].path.name}")
            files[name] = file
    _check(folder, spec, files, sources)
    return Reader(files, sources)


def _paths(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Files to read, each with the tensors that the index expects in it."""
    if (folder / INDEX).is_file():
        yield from _indexed(folder)
    elif (folder / SINGLE).is_file():
        yield folder / SINGLE, []
    else:
        pickled = sorted(p.name for pattern in PICKLED for p in folder.glob(pattern))
        why = f"{folder}: neither {SINGLE} nor {INDEX} is there"
        if pickled:
            why += (
                f"; {', '.join(pickled[:3])} would have to be unpickled, which can run any code: save "
                "it again with transformers, save_pretrained(folder), which writes safetensors"
            )
        elif shards := sorted(p.name for p in folder.glob("*.safetensors")):
            why += (
                f"; {', '.join(shards[:3])} would have to be named in an index: copy {INDEX} too, or save "
                "the model again with transformers, save_pretrained(folder)"
            )
        raise CheckpointError(why, file=str(folder))


def _indexed(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    index = folder / INDEX
    try:
        table = load_json(index).get("weight_map")
    except UsageError as error:
        raise CheckpointError(error.message, file=str(index)) from error
    if not isinstance(table, dict) or not all(isinstance(f, str) for f in table.values()):
        raise _bad(index, "weight_map", "weight_map: names of tensors and their files are wanted")
    listed: defaultdict[str, list[str]] = defaultdict(list)
    for name, file in table.items():
        listed[file].append(name)
    for file, expected in listed.items():
        if not _is_plain(file):
            text = f"{expected[0]}: {file!r} is not a safetensors file inside the folder"
            raise _bad(index, expected[0], text)
        if not (folder / file).is_file():
            raise _bad(folder / file, expected[0], f"missing; {INDEX} says it holds {expected[0]}")
        yield folder / file, expected


def _is_plain(file: str) -> bool:
    """A relative name without steps upward. Links are followed: a download cache is made of them."""
    outside = PurePosixPath(file).is_absolute() or PureWindowsPath(file).anchor
    climbs = ".." in PureWindowsPath(file).parts  # splits at both kinds of slash
    return file.endswith(".safetensors") and not outside and not climbs


def _full_name(name: str, spec: ModelSpec) -> str:
    """Bare models are saved without the prefix of the model with a head."""
    words = WORDS[spec.family]
    for old, new in OLD_NORMS.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    whole = name == words.output or name.startswith((words.prefix, words.beside))
    return name if whole else words.prefix + name


def _check(
    folder: Path, spec: ModelSpec, files: dict[str, _File], sources: Sequence[Source]
) -> None:
    """Raises CheckpointError of all tensors that are not as the model has them."""
    wanted = {s.file_name: s for s in sources}
    wrong = list(_wrong(folder, spec, files, wanted))
    if wrong:
        path, name, text = wrong[0]
        more = [f"  {p}: {t}" for p, _, t in wrong[1:TOLD]]
        more += [f"  and {len(wrong) - TOLD} more"] * (len(wrong) > TOLD)
        count = f" (and {len(wrong) - 1} more)" if more else ""
        raise _bad(path, name, "\n".join([text + count, *more]))
    output = WORDS[spec.family].output
    if spec.tied and output in files:
        _check_tied(output, files[output], files[sources[0].file_name], sources[0].file_name)


def _wrong(
    folder: Path, spec: ModelSpec, files: dict[str, _File], wanted: dict[str, Source]
) -> Iterator[tuple[Path, str, str]]:
    """Where, which tensor, what is wrong with it."""
    output = WORDS[spec.family].output
    for name, source in wanted.items():
        if name not in files:
            hint = ": state model.tied = true where it is the token table" if name == output else ""
            yield folder, name, f"{name} ({source.name}) is missing from the folder{hint}"
            continue
        path, stored = files[name].path, files[name].slice(name)
        shape = tuple(stored.get_shape())
        if shape != source.file_shape:
            text = f"{name} is {list(shape)}; the model has {list(source.file_shape)}"
            yield path, name, f"{text} ({source.name})"
        if stored.get_dtype() not in DTYPES:
            yield path, name, f"{name} is {stored.get_dtype()}; accepted: {', '.join(DTYPES)}"
    for name, file in files.items():
        if name not in wanted and name != output and not NO_WEIGHTS.search(name):
            text = f"{file.stored[name]} is no tensor of the model (family {spec.family}, "
            yield file.path, name, f"{text}{spec.layers} layers, tied = {spec.tied})"


def _check_tied(name: str, file: _File, table_file: _File, table: str) -> None:
    """Some folders hold a tied table twice; that must be the same values."""
    a, b = file.slice(name), table_file.slice(table)
    same = a.get_shape() == b.get_shape() and all(
        torch.equal(a[i : i + COMPARED_ROWS], b[i : i + COMPARED_ROWS])
        for i in range(0, a.get_shape()[0], COMPARED_ROWS)
    )
    if not same:
        text = f"{name} differs from {table}, though the model is tied (state tied = false)"
        raise _bad(file.path, name, text)


def _bad(path: Path, name: str, text: str) -> CheckpointError:
    return CheckpointError(f"{path}: {text}", file=str(path), key=name)
