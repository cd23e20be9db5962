"""Greedy generation without a cache: the whole window again for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from partita.model.reference import Reference


def greedy(
    blocks: Sequence[Any], ids: Sequence[int], new_tokens: int, window: int, vocab: int
) -> list[int]:
    """Appends the likeliest token `new_tokens` times; sees the last `window` tokens. The blocks are
    embedding, layers and head of one rank. Returns the new ids."""
    *body, head = blocks

    def last(seen: Tensor) -> Tensor:
        batch = SimpleNamespace(ids=seen, documents=None, samples=None, split=None)
        x = None
        for block in body:
            x = block(x, batch)
        assert x is not None
        return head.logits(x[:, -1:])[0, -1, :vocab]

    return _continue(last, ids, new_tokens, window)


def generate(reference: Reference, ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """The same on the reference model, dropout off; sees the last max_seq_len tokens. Returns the new
    ids."""
    judge = Reference(reference.spec, reference.weights, reference.dtype)
    judge.training = False

    def last(seen: Tensor) -> Tensor:
        return judge.logits(seen)[0, -1]

    return _continue(last, ids, max_new_tokens, reference.spec.max_seq_len)


def _continue(
    last: Callable[[Tensor], Tensor], ids: Sequence[int], new_tokens: int, window: int
) -> list[int]:
    """`last` maps ids [1, seq] to the logits [vocab] of the token that follows them."""
    found = list(ids)
    with torch.no_grad():
        for _ in range(new_tokens):
            seen = torch.tensor([found[-window:]], dtype=torch.int64)
            found.append(int(last(seen).argmax()))
    return found[len(ids) :]
