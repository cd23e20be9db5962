"""AlexNet (Krizhevsky et al. 2012) as a Program: convolutions in groups, pooling, fully connected layers.

    first   embedding   convolution over colors, as every other; its block is the one that reads data
    then    blocks.i    convolutions, fully connected layers
    last    head        the classes and cross-entropy by parts, as of a token

Channels are [groups, channels] and hidden units [groups, units]. What is not among `joins` knows its own
group alone: nothing is summed over groups. Where groups meet, an op `join` hands on the whole input, its
dim `groups` by the name `sources`: a view, for which the input must be whole along groups. The classes sum
over groups, as over units. docs/map.md has the table of ops, tensors and weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from partita.spec.families.loss import loss
from partita.spec.families.writer import Writer
from partita.spec.image import POOL, POOL_STRIDE, Conv
from partita.spec.program import Block, Program

if TYPE_CHECKING:
    from partita.spec.model import ModelSpec

MAP = "batch groups channels height width"  # between blocks
INSIDE = "batch groups filters rows columns"
UNITS = "batch groups units"


@dataclass(frozen=True)
class Images:
    """A model's shape with one microbatch's size."""

    spec: ModelSpec
    batch: int
    groups: int

    def writer(self, name: str, **sizes: int) -> Writer:
        """A writer that knows this block's dims."""
        groups = self.groups
        return Writer(name, {"batch": self.batch, "groups": groups, "sources": groups, **sizes})

    def conv(self, name: str, segment: str, conv: Conv, reads: str) -> Block:
        """Convolution, bias, ReLU, response norm, pooling; the last of them writes what leaves."""
        sizes = {"filters": conv.filters, "rows": conv.out, "columns": conv.out}
        sizes |= {"kernel_height": conv.kernel, "kernel_width": conv.kernel}
        first = reads == "colors"
        sizes |= {reads: conv.channels, "height": conv.size, "width": conv.size}
        w = self.writer(name, **sizes)
        before = f"batch {'' if first else 'groups '}{reads} height width"
        x = start = w.tensor("x", before, "data" if first else "value")
        if conv.sources:
            x = join(w, segment, x, before)
        inputs = f"{'sources ' if conv.sources else ''}{reads} kernel_height kernel_width"
        weight = f"groups filters {inputs}"
        y = w.op(
            f"{segment}.kernel", "conv", x, ("y.mm", INSIDE), weights={f"{segment}.kernel": weight},
            sums=tuple(inputs.split()), saves=x,
            space=f"batch groups filters rows columns {inputs}",
            window=(conv.kernel, conv.stride, conv.padding),
        )  # fmt: skip
        y = w.bias(f"{segment}.kernel", y, ("y", INSIDE), "groups filters")
        ends = "relu" if not (conv.norm or conv.pool) else "norm" if not conv.pool else "pool"
        for kind, held, out in (
            ("relu", True, "r"),
            ("norm", conv.norm, "n"),
            ("pool", conv.pool, "p"),
        ):
            if held:
                y = self.after(w, (segment, kind), y, out, ends == kind, conv)
        return w.block(start, y)

    def after(
        self, w: Writer, name: tuple[str, str], x: str, out: str, leaves: bool, conv: Conv
    ) -> str:
        """One op behind the bias. ReLU keeps its output, the norm its input, pooling its input and which
        element of each window was largest."""
        segment, kind = name
        if leaves:
            size = conv.pooled
            w.sizes = {**w.sizes, "channels": conv.filters, "height": size, "width": size}
        dims = MAP if leaves else INSIDE
        if kind == "relu":
            return w.op(f"{segment}.relu", "relu", x, (out, dims), saves=out)
        if kind == "norm":
            whole = ((x, "filters"),)
            return w.op(f"{segment}.response", "response", x, (out, dims), whole=whole, saves=x)
        w.tensor("pick", dims, "route")
        whole = ((x, "rows"), (x, "columns"))
        return w.op(
            f"{segment}.pool", "pool", x, (out, dims), whole=whole, saves=f"{x} pick",
            window=(POOL, POOL_STRIDE, 0),
        )  # fmt: skip

    def dense(self, name: str, segment: str, sizes: dict[str, int]) -> Block:
        """A fully connected layer: it sees all groups; bias, ReLU, dropout."""
        seen, units = tuple(sizes), self.spec.hidden // self.groups
        w = self.writer(name, **sizes)
        before = " ".join(("batch", "groups", *seen))
        start = w.tensor("x", before)
        inputs = tuple("inputs" if d == "units" else d for d in seen)
        w.sizes = {**w.sizes, **{i: sizes[d] for i, d in zip(inputs, seen, strict=True)}}
        x = join(w, segment, start, " ".join(("batch", "groups", *inputs)))
        w.sizes = {**w.sizes, "units": units}
        weight = " ".join(("groups", "units", "sources", *inputs))
        sums = " ".join(("sources", *inputs))
        y = w.linear(f"{segment}.linear", x, ("y.mm", UNITS), weight, sums)
        y = w.bias(f"{segment}.linear", y, ("y", UNITS), "groups units")
        y = w.op(f"{segment}.relu", "relu", y, ("r", UNITS), saves="r")
        if self.spec.dropout:
            w.op(f"{segment}.mask", "mask", "", ("r_mask", UNITS), role="mask")
            y = w.op(f"{segment}.dropout", "map", f"{y} r_mask", ("d", UNITS), saves="r_mask")
        return w.block(start, y)

    def head(self) -> Block:
        """The classes sum over groups and units; then the loss of an image."""
        w = self.writer("head", units=self.spec.hidden // self.groups, vocab=self.spec.vocab)
        x = w.tensor("x", UNITS)
        y = w.linear(
            "head.project", x, ("logits.mm", "batch vocab"), "vocab groups units", "groups units"
        )
        y = w.bias("head.project", y, ("logits", "batch vocab"), "vocab")
        return w.block(x, loss(w, y, "batch"))


def join(w: Writer, segment: str, x: str, dims: str) -> str:
    """Hands on the whole of x: groups become sources, a dim of its own."""
    out = dims.replace("groups", "sources")
    return w.op(f"{segment}.join", "join", x, ("j", out), whole=((x, "groups"),))


def image_program(spec: ModelSpec, batch: int) -> Program:
    """Convolutions, fully connected layers, classes."""
    image = spec.image
    assert image is not None
    family = Images(spec, batch, image.groups)
    blocks, names = [], ["embedding", *(f"blocks.{i}" for i in range(spec.layers)), "head"]
    for i, conv in enumerate(image.convs):
        what, segment = ("colors", "embedding") if i == 0 else ("channels", "conv")
        blocks.append(family.conv("embedding" if i == 0 else "layer", segment, conv, what))
    last = image.convs[-1]
    before = {"channels": last.filters, "height": last.pooled, "width": last.pooled}
    for _ in range(image.dense):
        blocks.append(family.dense("layer", "dense", before))
        before = {"units": spec.hidden // image.groups}
    return Program((*blocks, family.head()), tuple(names))
