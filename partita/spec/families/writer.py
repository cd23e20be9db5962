"""Writes a block op by op: dims by name, weights by label, what is saved by tensor name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from partita.spec.program import Block, Dim, Op, Tensor, segments_of


@dataclass
class Writer:
    """Collects the ops and tensors of one block. `sizes` gives every dim its size."""

    name: str
    sizes: Mapping[str, int]
    padded: frozenset[str] = frozenset({"vocab", "ffn", "expert_ffn"})
    folds: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"slots": ("experts", "batch", "seq")}
    )
    ops: list[Op] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def dims(self, names: str) -> tuple[Dim, ...]:
        """'batch seq hidden' as dims."""
        return tuple(
            Dim(n, self.sizes[n], of=self.folds.get(n, ()), padded=n in self.padded)
            for n in names.split()
        )

    def tensor(self, name: str, dims: str, role: str = "value") -> str:
        """Declares a tensor; returns its name."""
        self.tensors[name] = Tensor(name, self.dims(dims), role)
        return name

    def op(self, name: str, kind: str, reads: str, out: tuple[str, str], **facts: Any) -> str:
        """Appends an op that writes `out` = (tensor, dims). Facts: weights {'name': 'dims'}, role,
        space, saves and scratch as names, and any field of Op. Returns the tensor's name."""
        tensor, dims = out
        self.tensor(tensor, dims, facts.pop("role", "value"))
        weights: Mapping[str, str] = facts.pop("weights", {})
        for weight, weight_dims in weights.items():
            self.tensor(weight, weight_dims, "weight")
        space, saves = facts.pop("space", ""), facts.pop("saves", "")
        scratch: str = facts.pop("scratch", "")
        self.ops.append(
            Op(
                name,
                kind,
                tuple(reads.split()),
                tensor,
                tuple(weights),
                saves=tuple(saves.split()),
                scratch=tuple(scratch.split()),
                space=self.dims(space),
                **facts,
            )
        )
        return tensor

    def linear(self, name: str, x: str, out: tuple[str, str], weight: str, sums: str) -> str:
        """A matmul that saves its input; `weight` are the weight's dims."""
        tensor, dims = out
        free = [d for d in dims.split() if d not in weight.split()]
        return self.op(
            name,
            "linear",
            x,
            (tensor, dims),
            weights={name: weight},
            sums=tuple(sums.split()),
            space=" ".join((*free, weight)),
            saves=x,
        )

    def bias(self, name: str, x: str, out: tuple[str, str], weight: str) -> str:
        """An op of its own, since a row-parallel bias comes after the sum."""
        return self.op(f"{name}_bias", "bias", x, out, weights={f"{name}_bias": weight})

    def block(self, input: str, output: str) -> Block:
        """The block; what its ops save is what it keeps."""
        kept = frozenset(t for op in self.ops for t in op.saves)
        return Block(self.name, segments_of(self.ops), self.tensors, input, output, kept)
