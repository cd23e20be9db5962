"""The judge's own random numbers, drawn from their definition by lines that it shares with nobody.

Word i of a stream is word i % 4 of Philox 4x32-10 (Salmon et al., SC 2011) of the counter

    (i // 4 low, i // 4 high, sample, step)    under the key xxh3("seed\\0kind\\0name"), low word and high

    kind "value"      a new weight, sample and step 0: the normal quantile of (word + 1/2) / 2**32, in fp32
    kind "dropout"    an element of a sample stays where its word is p 2**32 or more
    kind "round"      an fp32 number goes up to the next bf16 where its 16 low bits and the word's 16 high
                      ones carry; else down. To fp16 by as many bits as it has fewer: 13, and of numbers
                      below 2^-14 by what they are above a multiple of 2^-24, in units of 2^-37

Whole tensors, one after the other: the plan draws boxes of them (comm/random/seeds.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
import xxhash
from torch import Tensor

LOW = np.uint64(0xFFFFFFFF)
HIGH = np.uint64(32)
INTO_THE_STREAM = (".attention.wo", ".mlp.down", ".mlp.fc2")
FED_TO_RELU = (".kernel", ".linear")


def words(
    seed: int, kind: str, name: str, count: int, samples: Sequence[int] = (0,), step: int = 0
) -> np.ndarray:
    """uint64 [samples, count]: the first words of a stream, each below 2**32."""
    key = xxhash.xxh3_64(f"{seed}\0{kind}\0{name}".encode()).intdigest()
    turn = [np.uint64(key % 2**32), np.uint64(key // 2**32)]
    block = np.arange(-(-count // 4), dtype=np.uint64)[None, :]
    of = np.array([s % 2**32 for s in samples], dtype=np.uint64)[:, None]
    x = [block & LOW, block >> HIGH, of, np.uint64(step % 2**32)]
    for _ in range(10):
        left, right = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [
            (right >> HIGH) ^ x[1] ^ turn[0],
            right & LOW,
            (left >> HIGH) ^ x[3] ^ turn[1],
            left & LOW,
        ]
        turn = [(turn[0] + np.uint64(0x9E3779B9)) & LOW, (turn[1] + np.uint64(0xBB67AE85)) & LOW]
    found = np.stack(np.broadcast_arrays(*x), axis=-1)
    return found.reshape(len(of), -1)[:, :count]


def normals(seed: int, name: str, shape: Sequence[int], std: float) -> Tensor:
    """A tensor of a normal distribution, fp64."""
    held = torch.from_numpy(words(seed, "value", name, prod(shape))[0].astype(np.float64))
    return (torch.special.ndtri((held + 0.5) / 2.0**32) * std).view(*shape)


def new_weight(seed: int, name: str, shape: Sequence[int], layers: int) -> Tensor:
    """A weight before training, in fp32: 1 for scales, 0 for biases and LoRA's B. Matrices normal: std 0.02;
    over root(2 layers) where added to the residual stream; root(2 / inputs) where a ReLU follows."""
    if name.endswith(("_bias", "_lora_b")):
        return torch.zeros(*shape)
    if name.endswith("norm"):
        return torch.ones(*shape)
    std = 0.02
    if name.endswith(INTO_THE_STREAM):
        std = 0.02 / (2 * layers) ** 0.5
    if name.endswith(FED_TO_RELU):
        std = (2 / prod(shape[2:])) ** 0.5
    return normals(seed, name, shape, std).float()


def kept(
    seed: int, step: int, site: str, samples: Sequence[int], shape: Sequence[int], p: float
) -> Tensor:
    """bool [samples, *shape]: which elements dropout leaves."""
    drawn = words(seed, "dropout", site, prod(shape), samples, step)
    return torch.from_numpy(drawn >= np.uint64(round(p * 2**32))).view(len(samples), *shape)


def rounded(values: Tensor, seed: int, step: int, name: str, half: bool = False) -> Tensor:
    """A whole weight, each number of it rounded at random to bf16 (`half`: fp16), in its own dtype."""
    if half:
        return _rounded_half(values, seed, step, name)
    bits = values.detach().float().contiguous().view(-1).numpy().view(np.uint32).astype(np.uint64)
    dice = words(seed, "round", name, bits.size, step=step)[0] >> np.uint64(16)
    up = (bits & np.uint64(0xFFFF)) + dice > np.uint64(0xFFFF)
    near = ((bits >> np.uint64(16)) + up.astype(np.uint64)) << np.uint64(16)
    found = torch.from_numpy(near.astype(np.uint32).view(np.float32))
    return found.to(values.dtype).view(values.shape)


def _rounded_half(values: Tensor, seed: int, step: int, name: str) -> Tensor:
    x = values.detach().float().double().contiguous().view(-1).numpy()
    dice = (words(seed, "round", name, x.size, step=step)[0] >> np.uint64(19)).astype(np.float64)
    exponent = np.maximum(np.frexp(x)[1] - 1, -14)  # fp16 has no finer numbers below 2^-14
    unit = np.exp2(exponent - 10.0)
    up = np.floor(np.abs(x) / unit + dice / 2**13) * unit
    found = torch.from_numpy(np.copysign(np.minimum(up, 65504.0), x))
    return found.to(values.dtype).view(values.shape)
