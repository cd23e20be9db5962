"""Cross-entropy as ops, for every family."""

from __future__ import annotations

from partita.spec.families.writer import Writer


def loss(w: Writer, logits: str, labels: str) -> str:
    """Cross-entropy by parts of logits [labels, vocab]: the maximum, the sum of exponentials and the
    target's logit are each [labels], so that logits may stay cut."""
    targets, valid = w.tensor("targets", labels, "index"), w.tensor("valid", labels, "label")
    top = w.op("loss.max", "reduce", logits, ("row_max", labels), role="constant", sums=("vocab",))
    probs = w.op(
        "loss.exp",
        "exp",
        f"{logits} {top}",
        ("probs", f"{labels} vocab"),
        role="stat",
        saves="probs",
    )
    total = w.op("loss.sum", "reduce", probs, ("row_sum", labels), role="stat", sums=("vocab",))
    pick = w.op(
        "loss.pick",
        "reduce",
        f"{logits} {targets}",
        ("row_target", labels),
        role="stat",
        sums=("vocab",),
        saves=targets,
    )
    return w.op(
        "loss.mean",
        "reduce",
        f"{top} {total} {pick} {valid}",
        ("loss", ""),
        role="stat",
        sums=tuple(labels.split()),
        saves=f"{top} {total} {valid}",
    )
