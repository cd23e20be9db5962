"""Sequences that what cuts them does not divide: filled up, and the same numbers as on one device."""

from dataclasses import replace

import pytest
from executed import BLOOM, DROPS, GPT2, LLAMA, MLA, MOE, declared, difference, request

from partita.parallel.exact.algebra import Place
from partita.parallel.exact.execute import execute
from partita.parallel.laid import lay, problems
from partita.parallel.read import flops, kept_bytes
from partita.spec.model import ModelSpec

SEQ = 5  # of the models' five positions: what fills up has none
LIMITED = replace(MOE, capacity_factor=1.0)
ENCODER = replace(LLAMA, causal=False)


def asked(spec: ModelSpec, line: str, seq: int = SEQ):
    return replace(request(spec, line), seq_len=seq)


CASES = [
    (LLAMA, "cp4:hybrid2x2", 8), (LLAMA, "pp2:zb_h1/4mb tp4+sp", 8), (GPT2, "cp2:ring tp2+sp", 8),
    (DROPS, "cp2:all_gather recompute:full", 6), (DROPS, "tp2+sp", 6), (BLOOM, "cp2:ulysses tp2+sp", 8),
    (MLA, "cp2:ring dp_shard2.zero3", 8), (MOE, "cp2:ring ep2 recompute:full", 8), (MOE, "tp2+sp ep2", 6),
    (ENCODER, "cp2:ring tp2+sp", 8), (ENCODER, "cp4:hybrid2x2", 8), (ENCODER, "tp2+sp", 6),
    (LIMITED, "cp2:ulysses ep2 expert.chunks=2", 6), (LIMITED, "cp2:ring dp_shard2.zero3 ep4", 8),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "line", "laid_len"), CASES)
def test_a_plan_that_fills_up_equals_one_device(spec, line, laid_len) -> None:
    """Loss, auxiliary losses, norm, gradients and weights; what is sent is what is declared."""
    whole = lay(asked(spec, line))
    assert whole.request.laid_len == laid_len
    got = execute(whole)
    assert difference(spec, got, 2, SEQ) == ""
    for rank in range(whole.mesh.world_size):
        assert got.traffic[rank] == declared(whole, got, rank)


def test_tokens_that_fill_up_would_be_seen(monkeypatch) -> None:
    """Were they routed, and counted in the auxiliary losses, numbers would be others."""
    whole = lay(asked(MOE, "tp2+sp ep2"))
    monkeypatch.setattr(
        Place, "real", lambda self, places: (self.positions(places) >= 0).astype(int)
    )
    assert difference(MOE, execute(whole, 1), 1, SEQ) != ""


@pytest.mark.parametrize(
    ("line", "seq", "laid_len"),
    [
        ("cp2:all_gather", 5, 6), ("cp2:all_gather", 6, 6), ("cp2:ring", 6, 8), ("cp4:hybrid2x2", 9, 12),
        ("tp4+sp", 9, 12), ("tp4", 9, 9), ("cp2:all_gather tp4+sp", 9, 16), ("cp4:ring", 1, 8), ("", 5, 5),
    ],
)  # fmt: skip
def test_how_long_a_sequence_is_laid(line, seq, laid_len) -> None:
    """By the ranks that cut it, of a ring by two chunks for each; what it costs is what that length costs."""
    short, full = asked(LLAMA, line, seq), asked(LLAMA, line, laid_len)
    assert short.laid_len == full.laid_len == laid_len
    a, b = (lay(r).program.blocks[1] for r in (short, full))
    sizes = short.plan.sizes
    assert kept_bytes(a, sizes) == kept_bytes(b, sizes) and flops(a, sizes) == flops(b, sizes)
    assert lay(short).traffic(0) == lay(full).traffic(0)


def test_a_warning_says_what_is_added() -> None:
    """By the room that cuts; nothing is refused."""
    for line, room, more in (
        ("cp2:ring", "cp", 3),
        ("tp4+sp", "sp", 3),
        ("cp2:all_gather tp2+sp", "cp", 3),
    ):
        (found,) = problems(asked(LLAMA, line))
        assert (found.room, found.rule, found.severity) == (room, "seq_len", "warning")
        assert f"laid as 8: {more} that fill it up" in found.message
    assert problems(asked(LLAMA, "cp2:ring tp2+sp", 8)) == []
