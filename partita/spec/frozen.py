"""Frozen weights: which weights of a model have no gradient, as a fact of its Program.

A frozen weight is stored as it is used: no gradient, no optimizer state, no master. Backward through its
ops makes the gradient of their input alone, so that a linear keeps nothing but which tokens its rows are of,
where adapters drop. A pattern is a shell's ('*', '?', '[...]', over a whole name): `blocks.*.mlp.*`,
`embedding.table`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from partita.spec.program import Block, Op, Program

KEEP_INPUT = ("linear", "conv", "lookup")  # kinds of op that save their input for the weights alone


@dataclass(frozen=True, slots=True)
class Frozen:
    """A weight is frozen that matches one of `frozen`; where there are patterns of `trainable`, one that
    matches none of those, too."""

    frozen: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.frozen or self.trainable)

    def holds(self, name: str) -> bool:
        """Whether the weight of that full name ('blocks.3.attention.wq') is frozen."""
        if any(fnmatchcase(name, pattern) for pattern in self.frozen):
            return True
        return bool(self.trainable) and not any(fnmatchcase(name, p) for p in self.trainable)

    def idle(self, names: Iterable[str]) -> list[str]:
        """Patterns that match no name."""
        names = list(names)
        patterns = (*self.frozen, *self.trainable)
        return [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]


def freeze(program: Program, rule: Frozen) -> Program:
    """The program with its frozen weights marked; blocks that stay equal stay one object."""
    if not rule:
        return program
    done: dict[tuple[int, frozenset[str]], Block] = {}
    blocks = []
    for i, block in enumerate(program.blocks):
        held = frozenset(
            w.name for w in block.weights() if rule.holds(program.full_name(i, w.name))
        )
        key = id(block), held
        if key not in done:
            done[key] = _freeze(block, held) if held else block
        blocks.append(done[key])
    return replace(program, blocks=tuple(blocks))


def _freeze(block: Block, held: frozenset[str]) -> Block:
    def one(op: Op) -> Op:
        if not held.intersection(op.weights):
            return op
        none = held.issuperset(op.weights) and op.kind in KEEP_INPUT
        extra = op.extra
        if extra:  # h again and dA; dB
            a, b = (name not in held for name in op.weights[1:])
            extra = ((extra[0][0], 1.0 + a + b), (extra[1][0], 1.0 + b))
        saves = tuple(t for t in op.saves if block.tensors[t].role == "route" or not none)
        return replace(op, frozen=op.weights[0] in held, saves=saves, extra=extra)

    segments = tuple(replace(s, ops=tuple(map(one, s.ops))) for s in block.segments)
    tensors = {n: replace(t, frozen=n in held) for n, t in block.tensors.items()}
    kept = frozenset(t for s in segments for op in s.ops for t in op.saves)
    return replace(block, segments=segments, tensors=tensors, kept=kept)
