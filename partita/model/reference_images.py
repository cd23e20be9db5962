"""The judge's convolutional model: grouped convolutions of torch on one device, logits of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import conv2d, local_response_norm, max_pool2d

from partita.spec.image import Conv
from partita.spec.model import ModelSpec


class Judge(Protocol):
    """The reference, as images need it."""

    spec: ModelSpec
    dtype: torch.dtype
    weights: Mapping[str, Tensor]
    samples: Tensor | None  # of the microbatch
    see: Callable[[str, Tensor], None]
    linear: Callable[[Tensor, Tensor], Tensor]  # x W.T, at the plan's precision

    def weight(self, name: str) -> Tensor:
        """A weight in the compute dtype."""
        ...

    def adapted(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y and what a linear's LoRA adds to it."""
        ...

    def drop(self, site: str, x: Tensor, samples: Tensor | None, p: float | None = None) -> Tensor:
        """Dropout by counter, while training."""
        ...


def image_logits(judge: Judge, pixels: Tensor, samples: Tensor | None) -> Tensor:
    """[batch, 1, classes] of pixels [batch, colors, height, width]."""
    image = judge.spec.image
    assert image is not None
    x, groups = pixels.to(judge.dtype), image.groups
    for i, conv in enumerate(image.convs):
        name = "embedding" if i == 0 else f"blocks.{i - 1}"
        weight = f"{name}.{'kernel' if i == 0 else 'conv.kernel'}"
        kernel, bias = judge.weight(weight), judge.weight(f"{weight}_bias")
        kernel = kernel.flatten(0, 1).flatten(1, -3)
        alone = groups if i > 0 and not conv.sources else 1
        y = conv2d(x, kernel, bias.flatten(), conv.stride, conv.padding, groups=alone)
        x = adapted(judge, weight, x, y, conv, alone).relu()
        if conv.norm:
            x = response_norm(x, groups)
        if conv.pool:
            x = max_pool2d(x, 3, 2)
        judge.see(name, x)
    for i in range(len(image.channels) - 1, image.layers):
        name = f"blocks.{i}"
        weight, bias = (judge.weight(f"{name}.dense.linear{b}") for b in ("", "_bias"))
        x, linear = x.flatten(1), f"{name}.dense.linear"
        x = judge.adapted(linear, x, judge.linear(x, weight.flatten(0, 1).flatten(1)))
        x = x + bias.flatten()
        x = judge.drop(f"{name}.dense.dropout", x.relu().unflatten(1, bias.shape), samples)
        judge.see(name, x := x.flatten(1))
    classes = judge.weight("head.project").flatten(1)
    return (x.flatten(1) @ classes.t() + judge.weight("head.project_bias")).unsqueeze(1)


def adapted(judge: Judge, name: str, x: Tensor, y: Tensor, conv: Conv, alone: int) -> Tensor:
    """y + (alpha / rank) B A x, where the convolution has LoRA's A and B: A a convolution like its own, B one
    of 1 x 1, both in groups where its own is."""
    if f"{name}_lora_a" not in judge.weights:
        return y
    a, b = judge.weight(f"{name}_lora_a"), judge.weight(f"{name}_lora_b")
    rank, groups = b.shape[-1], len(b)
    kernel = a.reshape(alone * rank, -1, *a.shape[-2:])
    apart = x if "embedding" in name else x.unflatten(1, (groups, -1))
    x = judge.drop(f"{name}.lora", apart, judge.samples, judge.spec.lora_dropout).flatten(1, -3)
    h = conv2d(x, kernel, None, conv.stride, conv.padding, groups=alone)
    low = conv2d(h, b.reshape(-1, rank, 1, 1), groups=alone)
    return torch.add(y, low, alpha=judge.spec.lora_scale)


def response_norm(x: Tensor, groups: int) -> Tensor:
    """Krizhevsky et al. 2012, sec. 3.3: n 5, k 2, alpha 1e-4 (torch's is n times that), beta 0.75, over
    the channels of a group; statistics in fp32."""
    b, channels, *plane = x.shape
    wide = x if x.dtype == torch.float64 else x.float()
    y = local_response_norm(wide.reshape(b * groups, -1, *plane), 5, 5 * 1e-4, 0.75, 2.0)
    return y.reshape(b, channels, *plane).to(x.dtype)
