"""Families: a model's shape becomes a Program. One file a family; `program` finds the right one."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from partita.spec.families.image import image_program
from partita.spec.families.transformer import transformer_program
from partita.spec.lora import adapt

if TYPE_CHECKING:
    from partita.spec.model import ModelSpec
    from partita.spec.program import Program


@lru_cache(maxsize=64)
def program(spec: ModelSpec, batch: int = 1, seq_len: int = 0) -> Program:
    """What one microbatch of `batch` samples (all data-parallel ranks together) of `seq_len` tokens
    computes, before any room has cut it; one value for equal questions. seq_len 0 means the model's
    max_seq_len."""
    if spec.image is not None:
        return adapt(image_program(spec, batch), spec)
    return adapt(transformer_program(spec, batch, seq_len or spec.max_seq_len), spec)
