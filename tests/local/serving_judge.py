"""A runner over the reference model: every piece's whole sequence again, read back from its pages.

Pages hold the ids themselves, so a page that was written by another, or not at all, gives other logits.
"""

from __future__ import annotations

from threading import Event

import torch

from partita.comm.random.seeds import initial_value
from partita.model.reference import Reference, weight_shapes
from partita.spec.model import ModelSpec

UNWRITTEN = 0
WIDE = 20  # times the weights of a new model: answers differ


class Done:
    """A step that has run."""

    def __init__(self, logits):
        self.logits = logits

    def result(self):
        return self.logits


class JudgeRunner:
    """`run` as partita/serve/piece.py tells; `writes` counts the positions of each page that were written."""

    def __init__(
        self, spec: ModelSpec, *, pages: int, page_size: int, depth: int = 1, seed: int = 3
    ) -> None:
        self.vocab, self.max_len = spec.vocab, spec.max_seq_len
        self.pages, self.page_size = pages, page_size
        weights = {
            name: (1 if len(shape) == 1 else WIDE)
            * initial_value(seed, name, shape, [(0, n) for n in shape], layers=spec.layers)
            for name, shape in weight_shapes(spec).items()
        }
        self.reference = Reference(spec, {n: w.double() for n, w in weights.items()})
        self.reference.training = False
        self.cells = torch.full((pages, page_size), UNWRITTEN)
        self.depth, self.closed = depth, False
        self.gate = Event()  # steps wait for it
        self.gate.set()
        self.runs: list[int] = []  # tokens of each step

    def run(self, pieces):
        assert self.gate.wait(30)
        self.runs.append(sum(len(p.tokens) for p in pieces))
        rows = []
        for p in pieces:
            end, size = p.start + len(p.tokens), self.page_size
            for i, token in enumerate(p.tokens, p.start):
                self.cells[p.pages[i // size], i % size] = token
            ids = torch.cat([self.cells[page] for page in p.pages])[:end]
            with torch.no_grad():
                rows.append(self.reference.logits(ids[None])[0, end - p.want : end])
        return torch.cat(rows)

    def start(self, pieces):
        return Done(self.run(pieces))

    def close(self):
        self.closed = True
