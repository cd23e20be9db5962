"""Attention of one tile by the kernels that torch has for NVIDIA's GPUs, with the lse that tiles are put
together by (tile.py, whose shapes these are).

    16 bits, nothing hidden but the upper half     flash (Dao 2023, 2307.08691), on Hopper of many tokens
                                                   cuDNN's, which is faster; grouped heads as they are
    16 bits, a mask; fp32                          memory-efficient (Rabe and Staats 2021); heads repeated
    16 bits, something added to scores             the same in fp32: 8 bits of a distance are too few
    fp64                                           none: scores are made whole (tile.plain)

Rows of heads are filled up with zeros to 16 bytes, which change no product. cuDNN's backward does not repeat
bit for bit: where torch is asked for that, flash makes it, from the same lse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import pad

FLASH_WIDTH = 256  # of a head, at most
CUDNN_TOKENS, CUDNN_WIDTHS = 512, (64, 128)  # at least, and multiples; fewer do not fill a GPU
ROW, BIAS, LSE = (
    8,
    16,
    32,
)  # elements that rows of heads, of what is added and of lse are a multiple of
LOW = (torch.bfloat16, torch.float16)


def takes(q: Tensor) -> bool:
    """Whether there are kernels for queries."""
    return q.device.type == "cuda" and q.dtype != torch.float64


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """As tile.attend."""
    scale, values, dtype = _scale(q, scale), v.shape[-1], q.dtype
    if _is_cudnn(q, k, v, seen, causal):
        return _cudnn(q, k, v, causal, scale)
    if _is_flash(q, seen):
        out, lse = _flash(q, k, v, causal, scale)
        return _narrowed(out, values), lse
    q, k, v = _alike(seen, q, k, v)
    made = (_filled(t, q.shape[-1]) for t in (q, *_repeated(q, k, v)))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *made, _bias(seen, q, k.shape[2]), True, 0.0, causal, scale=scale
    )
    out, lse = _narrowed(out, values).to(dtype), lse[..., : q.shape[2]].contiguous()
    if seen is None:
        return out, lse
    none = ~(seen if seen.dtype == torch.bool else seen > -inf).any(
        -1
    )  # what kernels say there varies
    return out.masked_fill(none.unsqueeze(-1), 0), lse.masked_fill(none, -inf)


def attend_back(
    g: Tensor,
    qkv: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    seen: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As tile.attend_back."""
    q, k, v = qkv
    scale, dtype, sizes = _scale(q, scale), q.dtype, [t.shape[-1] for t in qkv]
    repeats = torch.are_deterministic_algorithms_enabled()
    if not repeats and _is_cudnn(q, k, v, seen, causal):
        return _cudnn_back(g, qkv, out, lse, causal, scale)
    if _is_flash(q, seen):
        found = _flash_back(g, qkv, out, lse, causal, scale)
    else:
        g, q, k, v, out = _alike(seen, g, q, k, v, out)
        heads, bias = k.shape[1], _bias(seen, q, k.shape[2])
        k, v = _repeated(q, k, v)
        made = [_filled(t, q.shape[-1]) for t in (g, q, k, v)]
        # Of 16 bits the kernel itself sums g out, and takes out to be laid as forward's, whatever its strides
        laid = _filled(out, q.shape[-1]).transpose(1, 2).contiguous().transpose(1, 2)
        whole = pad(lse, (0, -lse.shape[-1] % LSE), value=inf).contiguous()
        found = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            *made, bias, laid, whole, *_no_state(q), 0.0, [True, True, True, False], causal,
            scale=scale,
        )[:3]  # fmt: skip
        found = found[0], *(t.unflatten(1, (heads, -1)).sum(2) for t in found[1:])
    dq, dk, dv = (t[..., :n].to(dtype) for t, n in zip(found, sizes, strict=True))
    return dq, dk, dv


def _is_flash(q: Tensor, seen: Tensor | None) -> bool:
    return seen is None and q.dtype in LOW and q.shape[-1] <= FLASH_WIDTH


def _is_cudnn(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool) -> bool:
    even = not any(n % CUDNN_TOKENS for n in (q.shape[2], k.shape[2]))
    widths = q.shape[-1] in CUDNN_WIDTHS and v.shape[-1] == q.shape[-1]
    if not (even and widths and _is_flash(q, seen)):
        return False
    return _cudnn_holds(q.device, q.dtype, q.shape[-1], q.shape[1] // k.shape[1], causal)


@cache
def _cudnn_holds(
    device: torch.device, dtype: torch.dtype, width: int, group: int, causal: bool
) -> bool:
    """Whether cuDNN has kernels for the device's own tensor cores that make what flash makes: which of them a
    version has is not told, so a few tokens are tried."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    each = CUDNN_TOKENS * width
    rows = torch.arange(3 * group * each, device=device).sin().to(dtype)
    q, g, _ = rows.view(3, 1, group, CUDNN_TOKENS, width)
    k, v = rows[: 2 * each].flip(0).view(2, 1, 1, CUDNN_TOKENS, width)
    out, lse = _flash(q, k, v, causal, width**-0.5)
    want = out, *_flash_back(g, (q, k, v), out, lse, causal, width**-0.5)
    try:
        own, log = _cudnn(q, k, v, causal, width**-0.5)
        found = own, *_cudnn_back(g, (q, k, v), own, log, causal, width**-0.5)
    except torch.OutOfMemoryError:
        raise  # which says nothing of the kernels
    except RuntimeError:
        return False
    pairs = zip((*found, log), (*want, lse), strict=True)
    return all(bool((a - b).abs().max() <= 2.0**-5 * b.abs().max()) for a, b in pairs)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse.reshape(q.shape[:3])


def _cudnn_back(
    g: Tensor, qkv: Sequence[Tensor], out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    none, lengths = _no_state(g), (g.shape[2], qkv[1].shape[2])
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        g, *qkv, out, lse.unsqueeze(-1).contiguous(), *none, None, None, None, *lengths, 0.0, causal,
        scale=scale,
    )  # fmt: skip


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    made = (_filled(t, q.shape[-1]) for t in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *made, 0.0, causal, scale=scale
    )
    return out, lse


def _flash_back(
    g: Tensor, qkv: Sequence[Tensor], out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    made = (_filled(t, qkv[0].shape[-1]) for t in (g, *qkv, out))
    lengths = g.shape[2], qkv[1].shape[2]
    with _strict():
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *made, lse.contiguous(), None, None, *lengths, 0.0, causal, *_no_state(g), scale=scale
        )


@contextmanager
def _strict() -> Iterator[None]:
    """Where torch is asked to repeat itself and else to warn: flash adds up in one order only if it may not
    warn."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if not warns:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def _no_state(like: Tensor) -> Sequence[Tensor]:
    """Of dropout, of which there is none: it is not read."""
    return torch.empty((2,), dtype=torch.int64, device=like.device).unbind()


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _alike(seen: Tensor | None, *tensors: Tensor) -> Sequence[Tensor]:
    """In fp32 where something is added to scores, else as they are."""
    adds = seen is not None and seen.dtype != torch.bool
    return [t.float() for t in tensors] if adds else tensors


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
    """Keys and values once for each query head."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else [t.repeat_interleave(group, 1) for t in (k, v)]


def _filled(x: Tensor, width: int) -> Tensor:
    """x with zeros behind its last dim, to the width of a head and a multiple of ROW."""
    missing = width + -width % ROW - x.shape[-1]
    return pad(x, (0, missing)) if missing else x


def _narrowed(out: Tensor, width: int) -> Tensor:
    """As narrow as values, and as kernels lay their output: [batch, queries, heads, width] transposed."""
    if out.shape[-1] == width:
        return out
    return out.transpose(1, 2)[..., :width].contiguous().transpose(1, 2)


def _bias(seen: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
    """What is added to scores, [batch, heads, queries, keys] in q's dtype, rows BIAS elements apart."""
    if seen is None:
        return None
    made = q.new_zeros((*seen.shape[:-1], keys + -keys % BIAS))[..., :keys]
    if seen.dtype == torch.bool:
        made.masked_fill_(~seen, -inf)
    else:
        made.copy_(seen)
    return made.expand(q.shape[0], q.shape[1], -1, -1)
