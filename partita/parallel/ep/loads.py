"""How many rows each expert has, one expert's behind the other's: on the host, or on a device whose host does
not wait for them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class Loads:
    """Of one pass [experts]: numbers that the host has, or their sums up to each expert on the device. The
    other is made when it is asked for, once; the host then waits."""

    def __init__(self, host: Sequence[int] | None = None, ends: Tensor | None = None) -> None:
        self._host, self._ends = host, ends

    @staticmethod
    def of_sorted(chosen: Tensor, experts: int) -> Loads:
        """Of experts [slots] in order: by search, as a count of each waits."""
        every = torch.arange(experts, dtype=chosen.dtype, device=chosen.device)
        return Loads(ends=torch.searchsorted(chosen, every, right=True, out_int32=True))

    @property
    def host(self) -> Sequence[int]:
        """Rows of each expert, as numbers."""
        if self._host is None:
            self._host = self.counts.tolist()
        return self._host

    def ends(self, device: torch.device) -> Tensor:
        """int32 [experts]: the row behind each expert's last one."""
        if self._ends is None:
            assert self._host is not None
            sums = torch.tensor(list(accumulate(self._host)), dtype=torch.int32)
            self._ends = sums.to(device, non_blocking=True)
        return self._ends

    @property
    def counts(self) -> Tensor:
        """int64 [experts], where the sums are."""
        assert self._ends is not None, "the host has them"
        ends = self._ends.long()
        return ends.diff(prepend=ends.new_zeros(1))


Counts = Sequence[int] | Loads


def host_of(counts: Counts) -> Sequence[int]:
    """As numbers."""
    return counts.host if isinstance(counts, Loads) else counts


def ends_of(counts: Counts, device: torch.device) -> Tensor:
    """int32 [experts] on the device: the row behind each expert's last one."""
    return (counts if isinstance(counts, Loads) else Loads(counts)).ends(device)


def count(chosen: Tensor, experts: int) -> Tensor:
    """int64 [experts]: how often each is in `chosen`. A GPU's bincount makes the host wait for its length."""
    flat = chosen.flatten()
    if flat.device.type == "cpu":
        return torch.bincount(flat, minlength=experts)
    return flat.new_zeros(experts).scatter_add_(0, flat, flat.new_ones(1).expand_as(flat))


def is_told_late(device: torch.device) -> bool:
    """Whether numbers of rows that nobody else is sent stay on the device: the host orders work ahead."""
    return device.type != "cpu"
