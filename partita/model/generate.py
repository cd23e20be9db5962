"""Greedy generation without a cache: the whole window again for each token, on blocks of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch


def greedy(
    blocks: Sequence[Any], ids: Sequence[int], new_tokens: int, window: int, vocab: int
) -> list[int]:
    """Appends the likeliest token `new_tokens` times; sees the last `window` tokens. The blocks are
    embedding, layers and head of one rank. Returns the new ids."""
    *body, head = blocks
    found = list(ids)
    with torch.no_grad():
        for _ in range(new_tokens):
            seen = torch.tensor([found[-window:]], dtype=torch.int64)
            batch = SimpleNamespace(ids=seen, documents=None, samples=None)
            x = None
            for block in body:
                x = block(x, batch)
            assert x is not None
            logits = head.logits(x[:, -1:])[0, -1, :vocab]
            found.append(int(logits.argmax()))
    return found[len(ids) :]
