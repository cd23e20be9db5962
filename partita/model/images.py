"""The blocks of a convolutional model, built from the laid program as a transformer's are.

    ConvLayers   x -> [gather] -> convolution -> ReLU -> [response norm] -> [max pooling]
    DenseLayers  x -> [gather] -> linear -> ReLU -> [dropout]
    Classes      x -> linear (its partial sums added up over split) -> cross-entropy

Between blocks lie [batch, groups of this rank, channels, height, width] and [batch, groups, units].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from partita.model.dropout import Dropout
from partita.model.maker import Maker
from partita.parallel.read import replayed
from partita.parallel.recompute.replay import Recomputed
from partita.parallel.regions import IDENTITY, Region
from partita.parallel.split.conv import Convolution
from partita.parallel.tp.linear import Column, Row
from partita.parallel.tp.loss import CrossEntropy
from partita.spec.image import POOL, POOL_STRIDE, Conv

WINDOW, ALPHA, BETA, K = 5, 1e-4, 0.75, 2.0  # of the response norm (sec. 3.3)


def window_sums(x: Tensor) -> Tensor:
    """[b, groups, channels, ...]: of each channel and WINDOW // 2 on both sides of it, within a group."""
    half, channels = WINDOW // 2, x.shape[2]
    wide = pad(x, (0, 0, 0, 0, half, half))
    return sum((wide.narrow(2, i, channels) for i in range(1, WINDOW)), wide.narrow(2, 0, channels))


class ResponseNorm(torch.autograd.Function):
    """x / (K + ALPHA sum of squares over neighbouring channels) ** BETA, within a group; keeps x alone.
    Statistics are fp32 (fp64 under fp64)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """[b, groups, channels, rows, columns]."""
        ctx.save_for_backward(x)
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * _scale(wide).pow_(-BETA)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        """dy s^-b - 2 a b x sum(dy x s^(-b-1)), s the scale."""
        (x,) = ctx.saved_tensors
        wide = x if x.dtype == torch.float64 else x.float()
        dy = dy.to(wide.dtype)
        scale = _scale(wide)
        power = scale.pow(-BETA)
        inner = window_sums(dy * wide * power / scale)
        return (dy * power - (2 * ALPHA * BETA) * wide * inner).to(x.dtype)


def _scale(x: Tensor) -> Tensor:
    return window_sums(x.square()).mul_(ALPHA).add_(K)


class ImageBlock:
    """One block of layers; `run` is what recomputation calls."""

    def __init__(self, make: Maker, layers: Layers) -> None:
        self.training, self.loss_scale = True, 1.0
        self.recomputes, self.tape = bool(replayed(make.block)), make.regions.tape
        self.layers = layers

    def __call__(self, x: Tensor | None, batch: Any) -> Tensor:
        """The block; under full recomputation x is kept, and what its tape keeps."""
        if self.recomputes and torch.is_grad_enabled():
            return Recomputed.apply(x, self, batch)  # type: ignore[return-value]
        return self.run(x, batch)

    def run(self, x: Tensor | None, batch: Any, replay: bool = False) -> Tensor:
        """The layers in order. What backward does not need is cheap here: a replay makes all of it."""
        return self.layers(x, batch, batch.step if self.training else -1)


class Layers(Protocol):
    """(input, microbatch, step) -> output; step -1 where nothing is dropped."""

    def __call__(self, x: Tensor | None, batch: Any, step: int) -> Tensor:
        """Runs them."""
        ...


@dataclass(frozen=True)
class ConvLayers:
    """Convolution, ReLU, response norm, max pooling. `region` gathers what the convolution sees; the first
    one sees the pixels, and x is an empty place for backward to end at."""

    convolution: Convolution
    region: Region
    sizes: Conv
    is_first: bool

    def __call__(self, x: Tensor | None, batch: Any, step: int) -> Tensor:
        """[batch, groups, channels, height, width] to the next one's."""
        if self.is_first:
            entry = torch.empty(0, requires_grad=True) if x is None else x
            y = self.convolution(batch.ids.to(self.convolution.kernel.value.dtype), entry)
        else:
            assert x is not None
            y = self.convolution(self.region(x))
        y = y.relu()
        if self.sizes.norm:
            y = ResponseNorm.apply(y)
        if self.sizes.pool:
            groups = y.shape[1:3]
            y = max_pool2d(y.flatten(1, 2), POOL, POOL_STRIDE).unflatten(1, groups)
        return y  # type: ignore[return-value]


@dataclass(frozen=True)
class DenseLayers:
    """A fully connected layer on all that `region` gathers, ReLU, dropout."""

    linear: Column
    region: Region
    shape: tuple[int, ...]  # of what it makes of an image: groups, units
    drop: Dropout | None

    def __call__(self, x: Tensor | None, batch: Any, step: int) -> Tensor:
        """[batch, groups, ...] -> [batch, groups, units]."""
        assert x is not None
        y = self.linear(self.region(x).flatten(1)).unflatten(1, self.shape).relu()
        return y if self.drop is None or step < 0 else self.drop(y, step, batch)


class Classes:
    """x -> this rank's share of the step's loss. While evaluating it counts the images it knows."""

    def __init__(self, make: Maker) -> None:
        self.training, self.total_valid, self.loss_scale = True, 1, 1.0
        bias = make.weight("head.project_bias")
        self.project = Row.of(make.weight("head.project"), make.regions.at("head.project"), bias)
        self.loss = CrossEntropy(0, bias.shape[0], IDENTITY, IDENTITY, IDENTITY)
        self.known: Tensor | int = (
            0  # images whose likeliest class was theirs, since it was set to 0
        )

    def __call__(self, x: Tensor, batch: Any) -> Tensor:
        """Sum of the valid images' losses over the step's valid images."""
        logits = self.project(x.flatten(1)).unsqueeze(1)
        if not self.training:
            hit = (logits.argmax(-1) == batch.targets) & batch.valid
            self.known = self.known + hit.sum()
        return self.loss(logits, batch.targets, batch.valid, self.total_valid, self.loss_scale)


def image_block(make: Maker) -> ImageBlock | Classes:
    """The block of a laid one, by its place in the model."""
    if make.name == "head":
        return Classes(make)
    image = make.spec.image
    assert image is not None
    at = 0 if make.name == "embedding" else 1 + int(make.name.rpartition(".")[2])
    if at < len(image.channels):
        sizes, segment = image.convs[at], "embedding" if at == 0 else "conv"
        kernel, bias = (make.weight(f"{segment}.kernel{b}") for b in ("", "_bias"))
        own = at > 0 and not sizes.sources
        layer = Convolution(kernel, bias, sizes.stride, sizes.padding, own)
        region = make.regions.at(f"{segment}.join")
        return ImageBlock(make, ConvLayers(layer, region, sizes, at == 0))
    weight, bias = make.weight("dense.linear"), make.weight("dense.linear_bias")
    linear = Column((weight.matrix(columns=len(weight.shape) - 2),), (bias,), IDENTITY)
    drop = make.dropout("dense.dropout", "r_mask")
    return ImageBlock(make, DenseLayers(linear, make.regions.at("dense.join"), bias.shape, drop))
