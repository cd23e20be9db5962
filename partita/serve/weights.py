"""Where a server's weights come from: a checkpoint's step folder, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from partita.base.errors import CheckpointError
from partita.model.families.read import read_slices
from partita.parallel.laid import Laid
from partita.parallel.units import Unit
from partita.spec.layout import Box
from partita.spec.model import ModelSpec
from partita.train.checkpoints.checkpoint import load, newest_complete
from partita.train.checkpoints.manifest import MANIFEST, read_manifest
from partita.train.checkpoints.pieces import Wanted
from partita.train.checkpoints.resume import stated_model


@dataclass(frozen=True)
class StepWeights:
    """A checkpoint's, runs/NAME/checkpoints/step-N, saved under any plan."""

    folder: Path

    def fill(self, laid: Laid, rank: int, units: Sequence[Unit]) -> None:
        """Reads the boxes that the rank holds; digests of what is read are verified."""
        wanted = [
            Wanted(name, "weight", laid.layouts[name].shape, box, values)
            for name, box, values in boxes(laid, rank, units)
        ]
        load(self.folder, wanted)


@dataclass(frozen=True)
class FolderWeights:
    """A Hugging Face folder's."""

    folder: Path
    spec: ModelSpec

    def fill(self, laid: Laid, rank: int, units: Sequence[Unit]) -> None:
        """Reads the slices that the rank holds."""
        fill_from(read_slices(self.folder, self.spec).read, laid, rank, units)


def fill_from(
    value: Callable[[str, Box], Tensor], laid: Laid, rank: int, units: Sequence[Unit]
) -> None:
    """Puts the value of every box that the rank holds into its units."""
    for name, box, values in boxes(laid, rank, units):
        values.copy_(value(name, box))


def boxes(laid: Laid, rank: int, units: Sequence[Unit]) -> Iterator[tuple[str, Box, Tensor]]:
    """(weight, box, where its values lie) of all that the rank holds."""
    for unit in units:
        for name, *_ in unit.places:
            for piece in laid.pieces(name, rank):
                part = unit.master[piece.start : piece.start + piece.numel()]
                yield name, piece.box, part.view([b - a for a, b in piece.box])


def found(folder: str | Path) -> tuple[ModelSpec, StepWeights | FolderWeights]:
    """The model and its weights of a step folder, a run folder (its newest whole checkpoint), or a Hugging
    Face folder. Raises CheckpointError for any other."""
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return stated_model(folder, read_manifest(folder).header), StepWeights(folder)
    if (folder / "checkpoints").is_dir():
        newest = newest_complete(
            folder / "checkpoints", check=read_manifest
        )  # `fill` reads digests
        if newest is None:
            raise CheckpointError(f"{folder} holds no whole checkpoint", file=str(folder))
        return found(newest)
    if (folder / "config.json").is_file():
        spec = ModelSpec.from_hf_config(folder)
        return spec, FolderWeights(folder, spec)
    raise CheckpointError(
        f"{folder} is neither a checkpoint of a run (runs/NAME or runs/NAME/checkpoints/step-N, with "
        f"{MANIFEST}) nor a Hugging Face folder (config.json and safetensors)",
        file=str(folder),
    )
