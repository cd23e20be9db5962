"""Whether ranks that should begin from equal parameters do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from partita.base.errors import UsageError
from partita.comm.protocol import Comm

_MASK = (1 << 63) - 1


def hold_alike(comm: Comm, parameters: Sequence[tuple[str, Tensor]], site: str) -> None:
    """Raises UsageError with the first parameter that ranks of `comm` hold unlike. All of them call it with
    parameters of the same order. Sends 16 bytes a rank, and where they differ 8 a parameter more."""
    if comm.size == 1:
        return
    digests = [_digest(x) for _, x in parameters]
    place = parameters[0][1].device if parameters else torch.device("cpu")
    whole = xxhash.xxh3_64_intdigest(str(digests).encode()) & _MASK
    told = comm.counts(torch.tensor([len(digests), whole], device=place), site=site)
    numbers = [row[0] for row in told]
    if len(set(numbers)) > 1:
        each = ", ".join(f"rank {r} has {n}" for r, n in zip(comm.ranks, numbers, strict=True))
        raise UsageError(f"ranks begin from unlike modules: {each} parameters; all hold the same")
    if len({row[1] for row in told}) > 1:
        rows = comm.counts(torch.tensor(digests, device=place), site=site)
        at = next(i for i, found in enumerate(zip(*rows, strict=True)) if len(set(found)) > 1)
        other = next(i for i, row in enumerate(rows) if row[at] != rows[0][at])
        name, x = parameters[at]
        raise UsageError(
            f"ranks begin from unlike parameters: {name} {list(x.shape)} of rank {comm.ranks[other]} is not "
            f"rank {comm.ranks[0]}'s. Make modules inside `with drawing(0, 'weights'):` "
            "(partita.parallel.draws; thread ranks share torch's own generator), or load one state_dict"
        )


def _digest(x: Tensor) -> int:
    """Of shape, type and bits."""
    found = xxhash.xxh3_64(f"{x.dtype}{list(x.shape)}".encode())
    flat = x.detach().contiguous().cpu().reshape(-1)
    found.update(flat.view(torch.uint8).numpy())
    return found.intdigest() & _MASK
