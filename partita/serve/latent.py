"""Latent attention over pages of latents (DeepSeek-V2, 2405.04434, sec. 2.1.2): of a token the latent and the
shared key are kept, for all heads at once, instead of every head's key and value.

    score = q . (Wk c) = (Wk' q) . c        out = sum p (Wv c) = Wv (sum p c)

so that heads attend to the latents c themselves, as to one key head of kv + rope numbers whose values are its
first kv, and Wk, Wv are applied to queries and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partita.model.latent import LatentAttention
from partita.model.rope import Rotate, halves
from partita.serve.paged import Paged, Step


@dataclass(frozen=True, eq=False)
class OverLatents:
    """A layer's latent attention in this form; `core` has pages for one key head, of which
    its values are a part."""

    of: LatentAttention
    core: Paged

    def __call__(self, x: Tensor, batch: Step, step: int, training: bool) -> Tensor:
        """x + attention(norm(x))."""
        of, sizes = self.of, self.of.sizes
        h = of.norm(x)
        made = [sizes.q] * bool(sizes.q) + [sizes.kv, sizes.rope]
        *queries, latent, k_pe = (t.contiguous() for t in of.down(h).split(made, -1))
        q = of.wq(h if of.q_norm is None else of.q_norm(queries[0]))
        latent = of.wkv.region.forward(of.kv_norm(latent))
        k_pe = of.k_pe(k_pe)
        cos, sin = batch.tables(of.rope)
        q = q.unflatten(-1, (of.heads, -1))
        nope = q.shape[-1] - sizes.rope
        q, q_pe = q.split([nope, sizes.rope], -1)
        q_pe = Rotate.apply(halves(q_pe), cos.unsqueeze(2), sin.unsqueeze(2))
        k_pe = Rotate.apply(halves(k_pe), cos, sin)
        held = [m.value for m in of.wkv.matrices]
        weights = held[0] if len(held) == 1 else torch.cat(held)
        wk, wv = (
            w.unflatten(0, (of.heads, -1))
            for w in weights.split([of.heads * nope, of.heads * sizes.v])
        )
        q = torch.cat([torch.einsum("bshn,hnl->bshl", q, wk), q_pe], -1).transpose(1, 2)  # type: ignore
        k = torch.cat([latent, k_pe], -1).unsqueeze(1)  # type: ignore
        a = self.core(q, k, latent.unsqueeze(1), batch, step, training)
        return x + of.wo(torch.einsum("bhsl,hvl->bshv", a, wv).flatten(2))
