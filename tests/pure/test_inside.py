"""The worst moment inside a block, by hand; and of a stage, where the blocks behind are gone."""

import pytest

from partita.parallel.laid import Laid, lay
from partita.parallel.read import bytes_of, kept_bytes
from partita.parallel.room import Request
from partita.simulate.inside import DRAWN_BYTES, transient_bytes
from partita.simulate.memory import kept_at_once, stage_ledger, worst_moment
from partita.spec.model import ModelSpec
from partita.spec.plan import Plan
from partita.spec.program import DRAWN_AT_ONCE, well_formed

SIZES = {"layers": 2, "hidden": 64, "heads": 4, "ffn_hidden": 256, "max_seq_len": 512}


def laid(line: str, vocab: int = 16, **more: object) -> Laid:
    model = ModelSpec(**{"family": "llama", "vocab": vocab, **SIZES, **more})  # type: ignore[arg-type]
    return lay(Request(Plan.parse(line), model, 512))


def test_a_layers_worst_moment_is_the_backward_of_its_activation() -> None:
    """The gradients of both halves, of their product and of the residual, less the product itself: what the
    last linear read is gone."""
    found = laid("1mb")
    layer = found.program.blocks[1]
    each = bytes_of(layer, found.sizes)
    assert {"gu", "act"} <= layer.kept
    assert (
        transient_bytes(layer, found.sizes) == each["gu"] + each["act"] + each["x1"] - each["act"]
    )


def test_a_layer_made_again_holds_its_output_and_what_is_still_to_come() -> None:
    found = laid("1mb recompute:full")
    layer = found.program.blocks[1]
    each = bytes_of(layer, found.sizes)
    made = sum(each[t] for t in ("n1", "qr", "kr", "v", "a", "lse", "x1", "n2", "gu"))
    gradients = each["gu"] + each["act"] + each["x1"]
    assert transient_bytes(layer, found.sizes) == made + gradients + each["x2"]


def test_a_norm_is_made_again_where_it_is_wanted() -> None:
    """It does not stand beside the wide gradients of the mlp."""
    words = "recompute:selective recompute.modules=norm"
    apart, whole = laid(f"1mb {words}"), laid("1mb")
    inside = [transient_bytes(x.program.blocks[1], x.sizes) for x in (apart, whole)]
    assert inside[0] == inside[1]


def test_a_head_holds_its_logits_beside_what_it_keeps_of_them() -> None:
    """Once: their gradient is made in place of the probabilities."""
    found = laid("1mb", vocab=4096)
    head = found.program.blocks[-1]
    each = bytes_of(head, found.sizes)
    assert each["probs"] == each["logits"] and "probs" in head.kept
    small = each["row_sum"] + each["row_max"]
    assert transient_bytes(head, found.sizes) == pytest.approx(each["logits"], abs=2 * small)


def test_a_mask_is_drawn_in_parts() -> None:
    with_mask, without = (
        laid("1mb", family="gpt2", dropout=p).program.blocks[0] for p in (0.1, 0.0)
    )
    assert DRAWN_AT_ONCE > 512 * 64
    sizes = laid("1mb").sizes
    more = transient_bytes(with_mask, sizes) - transient_bytes(without, sizes)
    assert 0 < more <= DRAWN_BYTES * 512 * 64


@pytest.mark.parametrize("line", ["1mb", "tp2+sp", "cp2:ring", "cp2:ulysses tp2", "cp2:all_gather"])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_packed_documents_have_a_mask_of_each_sample(line: str, family: str) -> None:
    """Of two samples two: beside the scores of none there is nothing."""
    model = ModelSpec(**{"family": family, "vocab": 16, **SIZES, "ffn_hidden": 64})  # type: ignore[arg-type]
    found = []
    for packed in (False, True):
        laid = lay(Request(Plan.parse(line), model, 512, 2, packed=packed))
        layer = laid.program.blocks[1]
        assert not well_formed(layer)
        found.append((transient_bytes(layer, laid.sizes), laid.program.blocks[1].kept))
    assert found[0][0] < found[1][0] and found[0][1] == found[1][1]


@pytest.mark.parametrize("vocab", [16, 4096])
@pytest.mark.parametrize("line", ["1mb", "1mb recompute:full", "pp2:zb_h1/4mb", "pp2:1f1b/4mb"])
def test_what_blocks_behind_keep_is_not_there(line: str, vocab: int) -> None:
    """Forward has not come to them, backward has left them; of halves, what weight halves read is there."""
    found = laid(line, vocab)
    sizes, head = found.sizes, found.program.blocks[-1]
    last = found.stages[-1].blocks
    inside, layer = (transient_bytes(b, sizes) for b in (head, last[-2]))
    most, gone, where = worst_moment(found, last, found.schedule)
    assert most >= max(inside, layer - kept_bytes(head, sizes)) and most <= max(inside, layer)
    if "zb" not in line:
        assert most == max(inside, layer - kept_bytes(head, sizes))
    assert where.name == ("head" if vocab > 16 else "layer")
    ledger = stage_ledger(found, len(found.stages) - 1, found.schedule)
    assert ledger.at_peak["buffers"] == most + gone
    kept, _ = kept_at_once(found, len(found.stages) - 1, found.schedule)
    assert ledger.at_peak["activations"] == kept - gone
