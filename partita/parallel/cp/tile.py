"""Attention of one tile, and how tiles are put together: exact whatever the order they come in.

A tile gives its rows' output and the log of their sum of exponentials (lse). Two tiles of the same rows:

    lse = log(e^lse_a + e^lse_b)        out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b

in fp32 (fp64 under fp64). Backward of a tile needs the rows' final output and lse alone, so tiles' gradients
add up. Shapes: q, out [batch, heads, queries, head_dim]; k, v [batch, kv_heads, keys, head_dim]; out and v
may be narrower (latent attention): the kernel is then given v with zeros to the width of k.

`scale` is what products are multiplied by, head_dim^-0.5 where None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from partita.parallel.cp import fused
from partita.parallel.cp.split import Tile

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


SHORT, NARROW = 160, 64  # queries and head_dim, as measured
CHUNK = 2**15  # elements of q that go back in fp32 at a time: they stay in a core's cache


def is_short(q: Tensor) -> bool:
    """Whether the CPU's 16-bit backward of queries [batch, heads, queries, head_dim] takes longer than
    fp32's of a few samples at a time: it packs its operands for blocks that so few do not fill (32 queries
    0.15 to 0.28 times, 64 0.22 to 0.36, 128 0.33 to 0.52, 192 0.75 to 0.93, 256 0.75 to 1.04; of 128
    elements each 0.8 or more)."""
    low = q.dtype in (torch.bfloat16, torch.float16)
    return low and q.device.type == "cpu" and q.shape[-2] <= SHORT and q.shape[-1] <= NARROW


@dataclass(frozen=True, slots=True)
class Capped:
    """What scores become: s = `scale` q k, then `cap` tanh(s / cap) (Gemma 2, 2408.00118). No kernel has it:
    scores are made whole."""

    scale: float
    cap: float


Scale = float | Capped | None  # None: head_dim^-0.5


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: Scale = None
) -> tuple[Tensor, Tensor]:
    """(output, lse) of one tile; lse is -inf where a query sees none of the keys. `seen` bool [batch or 1,
    1, queries, keys], or all, or what is added to scores [batch or 1, heads, queries, keys] (alibi.py), -inf
    where nothing is seen; `causal`: the upper half is hidden."""
    if isinstance(scale, Capped):
        return plain(q, k, v, seen, causal, scale)
    if q.device.type != "cpu":
        own = fused.attend if fused.takes(q) else plain
        return own(q, k, v, seen, causal, scale)
    padded = _padded(v, q.shape[-1])
    out, lse = _FLASH(q, k, padded, 0.0, causal, attn_mask=_added(seen, q), scale=scale)
    if padded is not v:  # as narrow as it is laid, and as the kernel lays its output
        out = out.transpose(1, 2)[..., : v.shape[-1]].contiguous().transpose(1, 2)
    if seen is not None:  # the kernel says 0 for such a row
        some = (seen if seen.dtype == torch.bool else seen > -torch.inf).any(-1)
        lse = lse.masked_fill(~some.expand(lse.shape), -torch.inf)
    return out, lse


def attend_back(
    g: Tensor,
    qkv: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    seen: Tensor | None,
    causal: bool,
    scale: Scale = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v of one tile, from its rows' final output and lse."""
    if isinstance(scale, Capped):
        return plain_back(g, qkv, out, lse, seen, causal, scale)
    if g.device.type != "cpu":
        own = fused.attend_back if fused.takes(g) else plain_back
        return own(g, qkv, out, lse, seen, causal, scale)
    q, k, v = qkv
    g, wide_v, out = (_padded(t, q.shape[-1]) for t in (g, v, out))
    tensors, mask = (g, q, k, wide_v, out, lse), _added(seen, g)
    back = _back_in_chunks if is_short(q) else _back
    dq, dk, dv = back(tensors, mask, causal, scale)
    return dq, dk, dv if wide_v is v else dv[..., : v.shape[-1]]


def _back(
    tensors: Sequence[Tensor], mask: Tensor | None, causal: bool, scale: float | None
) -> Sequence[Tensor]:
    """The kernel: dq, dk, dv."""
    return _FLASH_BACK(*tensors, 0.0, causal, attn_mask=mask, scale=scale)


def _back_in_chunks(
    tensors: Sequence[Tensor], mask: Tensor | None, causal: bool, scale: float | None
) -> Sequence[Tensor]:
    """The same in fp32, some samples at a time."""
    q = tensors[1]
    count = max(CHUNK // q[0].numel(), 1)
    if count >= q.shape[0]:
        return [part.to(q.dtype) for part in _back_wide(tensors, mask, causal, scale)]
    made = [torch.empty_like(t) for t in tensors[1:4]]
    for start in range(0, q.shape[0], count):
        some = slice(start, start + count)
        seen = mask if mask is None or mask.shape[0] == 1 else mask[some]
        found = _back_wide([t[some] for t in tensors], seen, causal, scale)
        for whole, part in zip(made, found, strict=True):
            whole[some].copy_(part)
    return made


def _back_wide(
    tensors: Sequence[Tensor], mask: Tensor | None, causal: bool, scale: float | None
) -> Sequence[Tensor]:
    """The kernel in fp32."""
    seen = None if mask is None else mask.float()
    return _back([t.float() for t in tensors], seen, causal, scale)


def _padded(x: Tensor, width: int) -> Tensor:
    """x with zeros behind its last dim; itself where it is as wide."""
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def plain(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: Scale = None
) -> tuple[Tensor, Tensor]:
    """attend without a kernel: scores are made whole, in the wide dtype."""
    scores = _scores(q, k, seen, causal, scale)
    lse = scores.logsumexp(-1)
    probs = (scores - lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)).exp()
    out = torch.einsum("bkgqs,bksd->bqkgd", probs, v.to(probs.dtype))
    return out.flatten(2, 3).to(q.dtype).transpose(1, 2), lse.flatten(1, 2)  # laid as kernels do


def plain_back(
    g: Tensor,
    qkv: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    seen: Tensor | None,
    causal: bool,
    scale: Scale = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """attend_back without a kernel."""
    q, k, v = qkv
    kv = k.shape[1]
    scores = _scores(q, k, seen, causal, scale)
    probs = (scores - lse.unflatten(1, (kv, -1)).unsqueeze(-1)).exp()
    wide_q, wide_g, wide_out = (t.to(probs.dtype).unflatten(1, (kv, -1)) for t in (q, g, out))
    wide_k, wide_v = k.to(probs.dtype), v.to(probs.dtype)
    slope = torch.einsum("bkgqd,bksd->bkgqs", wide_g, wide_v)
    slope = probs * (slope - (wide_g * wide_out).sum(-1, keepdim=True)) * _scale(q, scale)
    if isinstance(scale, Capped):  # hidden scores have no slope, whatever they are
        slope *= 1 - (scores.clamp(min=-scale.cap) / scale.cap).square()
    dq = torch.einsum("bkgqs,bksd->bkgqd", slope, wide_k).flatten(1, 2)
    dk = torch.einsum("bkgqs,bkgqd->bksd", slope, wide_q)
    return dq, dk, torch.einsum("bkgqs,bkgqd->bksd", probs, wide_g)


def _added(seen: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask as the kernel wants it: 0 or -inf, in q's dtype."""
    if seen is None or seen.dtype != torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)


def _scale(q: Tensor, scale: Scale) -> float:
    if isinstance(scale, Capped):
        return scale.scale
    return q.shape[-1] ** -0.5 if scale is None else scale


def _scores(q: Tensor, k: Tensor, seen: Tensor | None, causal: bool, scale: Scale) -> Tensor:
    """[batch, kv_heads, group, queries, keys], hidden ones -inf."""
    dtype = wide(q.dtype)
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bkgqd,bksd->bkgqs", grouped, k.to(dtype)) * _scale(q, scale)
    if isinstance(scale, Capped):
        scores = (scores / scale.cap).tanh() * scale.cap
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril_()
    elif seen is not None and seen.dtype != torch.bool:
        alike = seen.shape[1] == 1
        return scores + (seen.unsqueeze(1) if alike else seen.unflatten(1, (k.shape[1], -1)))
    elif seen is not None:
        seen = seen.unsqueeze(1)
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


class Merged:
    """Tiles of this rank's queries added up; `out`, as wide as values, and `lse` when all are in."""

    def __init__(self, q: Tensor, dim: int) -> None:
        b, heads, s, _ = q.shape
        self._dtype = q.dtype
        self._sum = q.new_zeros(b, s, heads, dim, dtype=wide(q.dtype)).transpose(1, 2)
        self.lse = q.new_full((b, heads, s), -torch.inf, dtype=wide(q.dtype))

    def add(self, tile: Tile, out: Tensor, lse: Tensor) -> None:
        """One tile's rows."""
        mine, held = self._sum[tile.rows, :, tile.q], self.lse[tile.rows, :, tile.q]
        both = torch.logaddexp(held, lse)
        finite = both.clamp(min=torch.finfo(both.dtype).min)  # a row that has seen nothing yet
        mine.mul_((held - finite).exp().unsqueeze(-1))
        mine.addcmul_(out.to(mine.dtype), (lse - finite).exp().unsqueeze(-1))
        held.copy_(both)

    @property
    def out(self) -> Tensor:
        """In the compute dtype."""
        return self._sum.to(self._dtype)
