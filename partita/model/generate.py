"""Generation without a cache, greedy or drawn: the whole window again for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from partita.comm.random.seeds import uniform
from partita.model.reference import Reference

Choice = Callable[[Tensor, int], int]  # logits [vocab] and the token's number -> its id


def likeliest(logits: Tensor, number: int) -> int:
    """The greedy choice."""
    return int(logits.argmax())


def drawn(seed: int, temperature: float) -> Choice:
    """A choice by softmax(logits / temperature), a function of (seed, token's number) and the logits:
    the largest of logits / temperature + Gumbel noise (Maddison et al. 2014)."""

    def choose(logits: Tensor, number: int) -> int:
        vocab = logits.shape[0]
        u = uniform(seed, "sample", torch.arange(vocab, device=logits.device) + number * vocab)
        noise = -torch.log(-torch.log(u.clamp(2.0**-33, 1 - 2.0**-33)))
        return int((logits.double() / temperature + noise).argmax())

    return choose


def continued(
    blocks: Sequence[Any], ids: Sequence[int], new_tokens: int, window: int, vocab: int,
    choose: Choice = likeliest, device: torch.device | str = "cpu",
) -> list[int]:  # fmt: skip
    """Appends `new_tokens` chosen tokens; sees the last `window` tokens. The blocks are embedding, layers
    and head of one rank, on `device`. Returns the new ids."""
    *body, head = blocks

    def last(seen: Tensor) -> Tensor:
        seen = seen.to(device)
        batch = SimpleNamespace(ids=seen, documents=None, samples=None, split=None, step=0)
        x = None
        for block in body:
            x = block(x, batch)
        assert x is not None
        return head.logits(x[:, -1:])[0, -1, :vocab]

    return _continue(last, ids, new_tokens, window, choose)


def generate(reference: Reference, ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy on the reference model, dropout off; sees the last max_seq_len tokens. Returns the new
    ids."""
    judge = Reference(reference.spec, reference.weights, reference.dtype)
    judge.training = False

    def last(seen: Tensor) -> Tensor:
        return judge.logits(seen)[0, -1]

    return _continue(last, ids, max_new_tokens, reference.spec.max_seq_len, likeliest)


def _continue(
    last: Callable[[Tensor], Tensor], ids: Sequence[int], new_tokens: int, window: int,
    choose: Choice,
) -> list[int]:  # fmt: skip
    """`last` maps ids [1, seq] to the logits [vocab] of the token that follows them."""
    found = list(ids)
    with torch.no_grad():
        for number in range(new_tokens):
            seen = torch.tensor([found[-window:]], dtype=torch.int64)
            found.append(choose(last(seen), number))
    return found[len(ids) :]
