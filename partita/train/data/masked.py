"""Masked language modelling (Devlin et al. 2019, 1810.04805, sec. 3.1): some tokens of a sequence are guessed
from those around them.

    chosen     each token that counts, alone, with a probability (0.15)
    stands as  the mask token (0.8), any token (0.1), or itself (0.1)

All three draws are Philox's, of the element index of the sample among all samples of the run, so that no plan
changes them and an epoch has other masks than the one before; of held-out text, of the sequence, so that it
is always judged by the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from partita.base.errors import UsageError
from partita.comm.random.seeds import uniform
from partita.train.data.streams import Batch
from partita.train.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from partita.spec.train import DataSpec

WORDS = ("[MASK]", "<mask>", "<|mask|>")


@dataclass(frozen=True)
class Masking:
    """How tokens are chosen and what stands in their place. `token` is the mask token's id, `size` the ids
    that any token is drawn from, `never` those that are marks and are not chosen."""

    probability: float
    stands_as: tuple[float, float, float]
    token: int
    size: int
    seed: int
    never: frozenset[int] = frozenset()

    @staticmethod
    def of(data: DataSpec, tokenizer: Tokenizer | None, vocab: int, seed: int) -> Masking | None:
        """What a job's data asks for; None where it asks for next tokens. Raises UsageError where there is no
        mask token."""
        if not data.mlm_probability:
            return None
        token = data.mlm_token if data.mlm_token is not None else _mask_of(tokenizer, vocab)
        if token >= vocab:
            text = f"{token} is outside [0, {vocab}), the model's vocabulary"
            raise UsageError(f"data.mlm_token: {text}", key="data.mlm_token")
        size = vocab if tokenizer is None else tokenizer.size
        never = frozenset() if tokenizer is None else tokenizer.specials
        return Masking(data.mlm_probability, data.mlm_as, token, size, seed, never)

    @property
    def identity(self) -> dict[str, object]:
        """What a resumed run must share."""
        return {"mlm": [self.probability, *self.stands_as, self.token]}

    def __call__(self, whole: Batch, numbers: Sequence[int], kind: str = "train") -> Batch:
        """The sequences with tokens masked, [b, S]: targets are what stood there, valid where a token was
        chosen. `numbers` are theirs in the run, or among what is held out (`kind`)."""
        seq = whole.ids.shape[1]
        first = torch.tensor(list(numbers), dtype=torch.int64).unsqueeze(1) * seq
        index = first + torch.arange(seq)

        def draw(what: str) -> Tensor:
            return uniform(self.seed, f"mlm/{kind}/{what}", index)

        chosen = whole.valid & (draw("chosen") < self.probability)
        if self.never:
            marks = torch.tensor(sorted(self.never), dtype=torch.int64)
            chosen &= torch.isin(whole.ids, marks, invert=True)
        how, (masked, any_token, _) = draw("how"), self.stands_as
        other = (draw("token") * self.size).long()
        shown = torch.where(how < masked, self.token, other)
        changed = chosen & (how < masked + any_token)
        ids = torch.where(changed, shown, whole.ids)
        targets = torch.where(chosen, whole.ids, 0)
        return replace(whole, ids=ids, targets=targets, valid=chosen)


def _mask_of(tokenizer: Tokenizer | None, vocab: int) -> int:
    """The tokenizer's mask token, or the first id that it leaves free."""
    if tokenizer is None:
        text = "data.mlm_token: tokens without a tokenizer have no mask token: state its id"
        raise UsageError(text, key="data.mlm_token")
    found = tokenizer.id_of(WORDS)
    if found is None and tokenizer.size >= vocab:
        text = (
            f"data.mlm_token: the tokenizer has none of {', '.join(WORDS)}, and its {tokenizer.size} ids "
            f"leave no other in the model's vocabulary of {vocab}: set model.vocab to "
            f"{tokenizer.size + 1} or more, or state an id"
        )
        raise UsageError(text, key="data.mlm_token")
    return tokenizer.size if found is None else found
