"""Images and the convolutions over them, as numbers: AlexNet (Krizhevsky et al. 2012) at any width.

    conv 1 .. n     convolution, bias, ReLU; some followed by local response norm, some by max pooling (3, 2)
    dense 1 .. d    fully connected with bias, ReLU, dropout
    classes         fully connected with bias, cross-entropy

Channels and hidden units lie in `groups` (the two GPUs of 2012). A convolution sees the channels of its own
group alone, unless it is among `joins`: then it sees all of them, as the first one sees all colors and as
every fully connected layer sees all units. Response norm stays within a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from partita.base.errors import UsageError

POOL, POOL_STRIDE = 3, 2  # overlapping pooling (sec. 3.4)
LARGEST = 100_000


@dataclass(frozen=True, slots=True)
class Conv:
    """One convolution as sizes: of a group `channels` in and `filters` out; it sees `sources` groups (0: its
    own). `size` in, `out` behind it, `pooled` behind the pooling (out where there is none)."""

    channels: int
    filters: int
    sources: int
    kernel: int
    stride: int
    padding: int
    size: int
    out: int
    pooled: int
    norm: bool
    pool: bool

    @property
    def weights(self) -> int:
        """Elements of a group's kernels."""
        return self.filters * max(self.sources, 1) * self.channels * self.kernel**2


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """Square images of `size` pixels and the convolutions over them: lists have an entry a convolution;
    `joins`, `norms` and `pools` name convolutions, counted from 1."""

    size: int
    colors: int = 3
    channels: tuple[int, ...] = (96, 256, 384, 384, 256)
    kernels: tuple[int, ...] = (11, 5, 3, 3, 3)
    strides: tuple[int, ...] = (4, 1, 1, 1, 1)
    paddings: tuple[int, ...] = (0, 2, 1, 1, 1)
    groups: int = 2
    joins: tuple[int, ...] = (3,)
    norms: tuple[int, ...] = (1, 2)
    pools: tuple[int, ...] = (1, 2, 5)
    dense: int = 2  # fully connected layers of `hidden` units before the classes

    def __post_init__(self) -> None:
        n = len(self.channels)
        for name in ("kernels", "strides", "paddings"):
            if len(getattr(self, name)) != n:
                text = f"{len(getattr(self, name))} entries for {n} convolutions (channels)"
                raise UsageError(text, key=name)
        for name in ("joins", "norms", "pools"):
            if any(not 1 <= i <= n for i in getattr(self, name)):
                text = f"{list(getattr(self, name))}: convolutions are counted from 1 to {n}"
                raise UsageError(text, key=name)
        for name, low in (("channels", 1), ("kernels", 1), ("strides", 1), ("paddings", 0)):
            if any(not low <= x <= LARGEST for x in getattr(self, name)):
                raise UsageError(f"{list(getattr(self, name))}: from {low} on", key=name)
        for name in ("size", "colors", "groups", "dense"):
            if not 1 <= getattr(self, name) <= LARGEST:
                text = f"{getattr(self, name)} is not within 1..{LARGEST}"
                raise UsageError(text, key=name)
        if not n:
            raise UsageError("no convolution", key="channels")
        if any(c % self.groups for c in self.channels):
            text = f"{list(self.channels)} are not all divisible by groups {self.groups}"
            raise UsageError(text, key="channels")
        for i, conv in enumerate(self.convs, 1):
            if min(conv.out, conv.pooled) < 1:
                text = (
                    f"convolution {i} leaves nothing of {conv.size} pixels: kernel {conv.kernel}, stride "
                    f"{conv.stride}, padding {conv.padding}" + f", pooling {POOL}" * conv.pool
                )
                raise UsageError(text, key="size")

    @property
    def convs(self) -> list[Conv]:
        """The convolutions in order."""
        found, size, before = [], self.size, self.colors
        for i, channels in enumerate(self.channels, 1):
            kernel, stride, padding = (
                x[i - 1] for x in (self.kernels, self.strides, self.paddings)
            )
            out = (size + 2 * padding - kernel) // stride + 1
            pool = i in self.pools
            pooled = (out - POOL) // POOL_STRIDE + 1 if pool else out
            sources = self.groups if i > 1 and i in self.joins else 0
            filters = channels // self.groups
            found.append(
                Conv(before, filters, sources, kernel, stride, padding, size, out, pooled,
                     i in self.norms, pool)
            )  # fmt: skip
            size, before = pooled, filters
        return found

    @property
    def layers(self) -> int:
        """Blocks between the first convolution and the classes."""
        return len(self.channels) - 1 + self.dense

    @property
    def features(self) -> int:
        """What the first fully connected layer sees of an image."""
        last = self.convs[-1]
        return self.groups * last.filters * last.pooled**2

    def dense_inputs(self, hidden: int) -> list[int]:
        """Inputs of the fully connected layers, the classes' last."""
        return [self.features, *([hidden] * self.dense)]

    def parameters(self, hidden: int, classes: int) -> int:
        """Exact number of weights and biases."""
        convs = sum(self.groups * (c.weights + c.filters) for c in self.convs)
        outputs = [*([hidden] * self.dense), classes]
        pairs = zip(self.dense_inputs(hidden), outputs, strict=True)
        return convs + sum((n + 1) * out for n, out in pairs)

    def forward_flops(self, hidden: int, classes: int) -> list[int]:
        """FLOPs of one image, block by block: two for each multiply-add of convolutions and matmuls."""
        convs = [2 * self.groups * c.weights * c.out**2 for c in self.convs]
        outputs = [*([hidden] * self.dense), classes]
        return convs + [2 * prod(p) for p in zip(self.dense_inputs(hidden), outputs, strict=True)]
