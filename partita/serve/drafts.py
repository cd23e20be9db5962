"""Guesses of what follows, looked up in what stands already (prompt lookup, a form of speculative decoding:
Leviathan et al. 2023): where the last tokens stood before, what followed them there.

A guess costs a row of the step and changes no token: the model's choice at each place is made as without it,
and the first that differs ends what counts.
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (3, 2)  # tokens looked up, the longest first


class Lookup:
    """Where each run of tokens of one sequence was seen last."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}  # run -> the place behind it
        self._seen = 0

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, which have only grown since the last call."""
        for end in range(
            max(self._seen, 1), len(tokens)
        ):  # a run at the very end has nothing behind it
            for size in SIZES:
                if end >= size:
                    self._behind[tuple(tokens[end - size : end])] = end
        self._seen = len(tokens)
        for size in SIZES:
            at = self._behind.get(tuple(tokens[-size:]))
            if at is not None:
                return list(tokens[at : at + most])
        return []
