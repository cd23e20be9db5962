"""The blocks of a convolutional model, built from the laid program as a transformer's are.

    ConvLayers   x -> [gather] -> [halo] -> convolution -> ReLU -> [[gather] -> response norm]
                 -> [[halo] -> max pooling]
    DenseLayers  x -> [gather] -> linear -> ReLU -> [dropout]
    Classes      x -> [gather] -> linear (its partial sums added up over split) -> cross-entropy

Between blocks lie [batch, groups of this rank, its channels, height, width] and [batch, groups, units]: split
cuts groups, tp the channels of each, cp the rows (padded on the last ranks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from partita.model.dropout import Dropout
from partita.model.maker import Maker
from partita.parallel.cp.halo import Window, window_of
from partita.parallel.cp.rows import Halo, RowMove, WholeMap, crop
from partita.parallel.lora import Drop
from partita.parallel.read import replayed
from partita.parallel.recompute.replay import Recomputed
from partita.parallel.regions import IDENTITY, OF_ROWS, Region
from partita.parallel.split.conv import Convolution, LowRank
from partita.parallel.tp.linear import Column, Row
from partita.parallel.tp.loss import CrossEntropy
from partita.spec.image import POOL, POOL_STRIDE, Conv
from partita.spec.lora import A, B
from partita.spec.program import NORMED_AT_ONCE as NEAR
from partita.spec.program import Tensor as Named

WINDOW, ALPHA, BETA, K = 5, 1e-4, 0.75, 2.0  # of the response norm (sec. 3.3)


def window_sums(x: Tensor) -> Tensor:
    """[b, groups, channels, ...]: of each channel and WINDOW // 2 beside it, in a group; written over x."""
    half, channels = WINDOW // 2, x.shape[2]
    wide = pad(x, (0, 0, 0, 0, half, half))
    torch.add(wide.narrow(2, 0, channels), wide.narrow(2, 1, channels), out=x)
    for i in range(2, WINDOW):
        x.add_(wide.narrow(2, i, channels))
    return x


@dataclass(frozen=True)
class Share:
    """Which channels of a group a rank norms, first..end, of so many; and what it looks at for them."""

    first: int
    end: int
    channels: int

    @property
    def sees(self) -> tuple[int, int]:
        """(first, number) of the channels within the windows."""
        first = max(self.first - WINDOW // 2, 0)
        return first, min(self.end + WINDOW // 2, self.channels) - first

    def own(self, x: Tensor) -> Tensor:
        """Its channels, of those that it sees."""
        return x.narrow(2, self.first - self.sees[0], self.end - self.first)


class ResponseNorm(torch.autograd.Function):
    """x / (K + ALPHA sum of squares over neighbouring channels) ** BETA, within a group; keeps x alone.
    Statistics are fp32 (fp64 under fp64). A few images at a time: what it makes for itself is small, and
    near."""

    @staticmethod
    def forward(ctx, x: Tensor, share: Share) -> Tensor:
        """[b, groups, channels, rows, columns] to the share's channels."""
        ctx.save_for_backward(x)
        ctx.share = share
        found = x.new_empty(*x.shape[:2], share.end - share.first, *x.shape[3:])
        for seen, to in zip(*_few(x.narrow(2, *share.sees), found), strict=True):
            wide = _wide(seen)
            to.copy_(share.own(_scale(wide)).pow_(-BETA).mul_(share.own(wide)))
        return found

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        """dy s^-b - 2 a b x sum(dy x s^(-b-1)), s the scale: this share's part of the gradient of x."""
        (x,) = ctx.saved_tensors
        share: Share = ctx.share
        found = torch.zeros_like(x)
        parts = x.narrow(2, *share.sees), dy, found.narrow(2, *share.sees)
        for seen, mine, to in zip(*_few(*parts), strict=True):
            wide, given = _wide(seen), _wide(mine)
            if given.shape != wide.shape:
                given = torch.zeros_like(wide)
                share.own(given).copy_(mine)
            scale = _scale(wide)
            power = scale.pow(-BETA).mul_(given)
            inner = window_sums((power * wide).div_(scale))
            to.copy_(power.sub_(inner.mul_(wide), alpha=2 * ALPHA * BETA))
        return found, None


def _few(first: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """As many images of each at a time as fit NEAR elements of the first, one at least."""
    number = max(1, NEAR * first.shape[0] // max(first.numel(), 1))
    return [x.split(number) for x in (first, *others)]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scale(x: Tensor) -> Tensor:
    return window_sums(x.square()).mul_(ALPHA).add_(K)


class ImageBlock:
    """One block of layers; `run` is what recomputation calls."""

    def __init__(self, make: Maker, layers: Layers) -> None:
        self.training, self.loss_scale = True, 1.0
        self.recomputes, self.tape = bool(replayed(make.block)), make.regions.tape
        self.layers, self.now = layers, make.now

    def __call__(self, x: Tensor | None, batch: Any) -> Tensor:
        """The block; under full recomputation x is kept, and what its tape keeps."""
        if self.recomputes and torch.is_grad_enabled():
            return Recomputed.apply(x, self, batch)  # type: ignore[return-value]
        return self.run(x, batch)

    def run(self, x: Tensor | None, batch: Any, replay: bool = False) -> Tensor:
        """The layers in order. What backward does not need is cheap here: a replay makes all of it."""
        self.now.batch, self.now.training = batch, self.training
        try:
            return self.layers(x, batch, batch.step if self.training else -1)
        finally:
            self.now.batch = None  # of which no picture is held until the next


class Layers(Protocol):
    """(input, microbatch, step) -> output; step -1 where nothing is dropped."""

    def __call__(self, x: Tensor | None, batch: Any, step: int) -> Tensor:
        """Runs them."""
        ...


class Moves(Protocol):
    """A Region, or what moves rows (cp/rows.py)."""

    @property
    def is_known(self) -> bool:
        """Whether it will hand out a result that was kept."""
        ...

    def __call__(self, x: Tensor, needless: bool = False) -> Tensor:
        """x, moved."""
        ...


def brought(x: Tensor, regions: Sequence[Moves]) -> Tensor:
    """x through regions; where what a later one brings is known, those before it move nothing."""
    for i, region in enumerate(regions):
        x = region(x, any(later.is_known for later in regions[i + 1 :]))
    return x


@dataclass(frozen=True)
class ConvLayers:
    """Convolution, ReLU, response norm, max pooling. `regions` bring what the convolution sees, `around` what
    the norm of a `share` does, `edges` what the pooling does; the first one sees the pixels, of which `rows`
    of a rank are cut out, and x is an empty place where backward ends."""

    convolution: Convolution
    regions: tuple[Moves, ...]
    around: Region
    share: Share
    edges: tuple[Moves, ...]
    rows: tuple[Window, int] | None
    sizes: Conv
    is_first: bool

    def __call__(self, x: Tensor | None, batch: Any, step: int) -> Tensor:
        """[batch, groups, channels, height, width] to the next one's."""
        if self.is_first:
            entry = torch.empty(0, requires_grad=True) if x is None else x
            pixels = batch.ids if self.rows is None else crop(batch.ids, *self.rows)
            y = self.convolution(pixels.to(self.convolution.kernel.value.dtype), entry)
        else:
            assert x is not None
            y = self.convolution(brought(x, self.regions))
        y = y.relu()
        if self.sizes.norm:
            y = ResponseNorm.apply(self.around(y), self.share)
        if self.sizes.pool:
            y = brought(y, self.edges)
            groups = y.shape[1:3]
            y = max_pool2d(y.flatten(1, 2), POOL, POOL_STRIDE).unflatten(1, groups)
        return y  # type: ignore[return-value]


@dataclass(frozen=True)
class DenseLayers:
    """A fully connected layer on all that `regions` gather, ReLU, dropout."""

    linear: Column
    regions: tuple[Moves, ...]
    shape: tuple[int, ...]  # of what it makes of an image: groups, units
    drop: Dropout | None

    def __call__(self, x: Tensor | None, batch: Any, step: int) -> Tensor:
        """[batch, groups, ...] -> [batch, groups, units]."""
        assert x is not None
        x = brought(x, self.regions).flatten(1)
        y = self.linear(x).unflatten(1, self.shape).relu()
        return y if self.drop is None or step < 0 else self.drop(y, step, batch)


class Classes:
    """x -> this rank's share of the step's loss. While evaluating it counts the images it knows."""

    def __init__(self, make: Maker) -> None:
        self.training, self.total_valid, self.loss_scale = True, 1, 1.0
        bias = make.weight("head.project_bias")
        self.project = Row.of(make.weight("head.project"), make.regions.at("head.project"), bias)
        at = make.regions.at
        self.region = at("input")
        first, rows = make.vocab_range("head.project")
        self.loss = CrossEntropy(first, rows, at("loss.max"), at("loss.sum"), at("loss.pick"))
        # images whose likeliest class (the first of equals) was theirs, since it was set to 0
        self.known: Tensor | int = 0

    def __call__(self, x: Tensor, batch: Any) -> Tensor:
        """Sum of the valid images' losses over the step's valid images."""
        logits = self.project(self.region(x).flatten(1)).unsqueeze(1)
        wanted = batch.targets, batch.valid, self.total_valid, self.loss_scale
        if self.training:
            return self.loss(logits, *wanted)
        hits: list[Tensor] = []
        found = self.loss(logits, *wanted, hits)
        self.known = self.known + hits[0].sum()
        return found


def image_block(make: Maker) -> ImageBlock | Classes:
    """The block of a laid one, by its place in the model."""
    if make.name == "head":
        return Classes(make)
    image = make.spec.image
    assert image is not None
    at = 0 if make.name == "embedding" else 1 + int(make.name.rpartition(".")[2])
    if at < len(image.channels):
        return ImageBlock(make, _conv_layers(make, image.convs[at], at == 0))
    weight, bias = make.weight("dense.linear"), make.weight("dense.linear_bias")
    linear = Column((weight.matrix(columns=len(weight.shape) - 2),), (bias,), IDENTITY)
    low = [make.low_rank("dense.linear")] if make.adapts("dense.linear") else []
    linear = replace(linear, low=tuple(low))
    drop = make.dropout("dense.dropout", "r_mask")
    whole = _row_moves(make, make.block.input)
    regions = make.regions.at("input"), *whole, make.regions.at("dense.join")
    return ImageBlock(make, DenseLayers(linear, regions, bias.shape, drop))


def _conv_layers(make: Maker, sizes: Conv, is_first: bool) -> ConvLayers:
    segment = "embedding" if is_first else "conv"
    name = f"{segment}.kernel"
    kernel, bias = make.weight(name), make.weight(f"{name}_bias")
    op = next(op for op in make.block.ops() if op.name == name)
    seen = make.block.tensors[op.reads[0]]
    window = window_of(seen.dims[-2].name, make.laid.sizes["cp"])
    own = not (is_first or sizes.sources)
    padding = sizes.padding if make.laid.sizes["cp"] == 1 else 0, sizes.padding
    low = _low_rank(make, name, seen, window, own) if make.adapts(name) else None
    layer = Convolution(kernel, bias, sizes.stride, padding, own, low)
    at, mine = make.regions.at, make.context.coords["cp"]
    regions = at("input"), at(f"{segment}.join"), *_row_moves(make, op.reads[0])
    first, end = make.span("y", "filters")
    share = Share(first, end, sizes.filters)
    pool = next((op.reads[0] for op in make.block.ops() if op.kind == "pool"), "")
    edges = _row_moves(make, pool)
    rows = None if window is None else (window, mine)
    return ConvLayers(layer, regions, at(f"{segment}.relu"), share, edges, rows, sizes, is_first)


def _row_moves(make: Maker, of: str) -> tuple[RowMove, ...]:
    """The region that moves rows of images and writes a tensor, or reads a block's input."""
    ways, mine = make.laid.sizes["cp"], make.context.coords["cp"]
    tensors = make.block.tensors
    kinds = {kind: iter(make.regions.of(kind)) for kind in OF_ROWS}
    for op in make.block.ops():
        if op.kind not in OF_ROWS:
            continue
        region, (*_, rows, _) = next(kinds[op.kind]), tensors[op.writes].dims
        if op.kind == "gather_map":
            return (WholeMap(region, mine, rows.size),)
        window = window_of(rows.name, ways)
        if op.writes == of and window is not None:
            return (Halo(region, mine, window),)
    return ()


def _low_rank(make: Maker, name: str, seen: Named, window: Window | None, own: bool) -> LowRank:
    """A convolution's A and B."""
    a, b = make.weight(f"{name}{A}"), make.weight(f"{name}{B}")
    found = LowRank(a, b, make.spec.lora_scale, b.shape[0] if own else 1)
    if not make.spec.lora_dropout:
        return found
    site = f"{name.removeprefix(f'{make.name}.')}.lora"
    masks = make.masks(site, seen.name, make.spec.lora_dropout)
    if window is None:
        return replace(found, drop=Drop(masks, make.now))
    rows, first = window.seen(make.context.coords["cp"]), window.first(make.context.coords["cp"])
    *channels, _, columns = masks.box
    masks = replace(
        masks,
        shape=(*masks.shape[:-2], window.size, masks.shape[-1]),
        box=(*channels, (rows.start, rows.stop), columns),
    )
    above = rows.start - first if rows else 0
    edges = above, window.needed - above - len(rows)
    return replace(found, drop=Drop(Edged(masks, edges), make.now))


@dataclass(frozen=True)
class Edged:
    """Masks of rows of an image, with `edges` of so many rows above and below that are not of it."""

    masks: Dropout
    edges: tuple[int, int]

    @property
    def probability(self) -> float:
        """Of an element to be dropped."""
        return self.masks.probability

    def mask(self, step: int, batch: Any) -> Tensor:
        """True where an element stays."""
        *channels, (first, end), (left, right) = (b for b in self.masks.box)
        if first == end:
            sizes = (b - a for a, b in channels)
            rows, like = sum(self.edges), batch.samples
            return like.new_zeros((len(like), *sizes, rows, right - left), dtype=torch.bool)
        return pad(self.masks.mask(step, batch), (0, 0, *self.edges))
