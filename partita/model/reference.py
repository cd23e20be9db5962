"""The judge: Llama (with experts or without), GPT-2, GPT-NeoX, BLOOM and BERT in plain PyTorch, on one
device.

Weights are a dict of logical tensors by full name ('blocks.3.attention.wq' [heads, head_dim, hidden]; see
docs/map.md). Under bf16 it makes the casts that every plan makes, and no others:

    weights       fp32, rounded to bf16 where they are used; gradients come back in fp32
    activations   bf16; norms compute in fp32, round, then scale; softmax and loss in fp32

and under fp8 those of reference_fp8.py in the layers' matmuls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from partita.model.reference_draws import kept
from partita.model.reference_images import image_logits
from partita.model.reference_moe import Auxiliary, Told, moe
from partita.model.reference_rope import pairs_apart, slopes, turned, turns
from partita.spec.families import program
from partita.spec.model import ModelSpec


class Batch(Protocol):
    """[batch, seq] each; `samples` are places in the step's global batch, which dropout is keyed by."""

    ids: Tensor
    targets: Tensor
    valid: Tensor
    documents: Tensor | None
    samples: Tensor


def counted(batch: Batch) -> Tensor:
    """bool [batch, seq]: the targets that the loss counts; a target of -100 never is."""
    return batch.valid.bool() & (batch.targets >= 0)


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Full name -> logical shape, in program order."""
    made = program(spec, 1)
    found: dict[str, tuple[int, ...]] = {}
    for i, block in enumerate(made.blocks):
        for w in block.weights():
            found.setdefault(made.full_name(i, w.name), tuple(d.size for d in w.dims))
    return found


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x W.T as it is."""
    return x @ weight.t()


class Reference:
    """The whole model. `dtype` is what it computes in; `see(name, x)` is told every segment's output."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        seed: int = 0,
        see: Callable[[str, Tensor], None] = lambda name, x: None,
        linear: Callable[[Tensor, Tensor], Tensor] = times,
        told: Told | None = None,
    ) -> None:
        self.spec, self.weights, self.seed, self.see = spec, weights, seed, see
        self.linear = linear  # x W.T of a layer's matmuls
        self.told = told  # experts that another run chose
        self.dtype = dtype or next(iter(weights.values())).dtype
        self.training, self.step = True, 0
        self.samples: Tensor | None = None  # of the pass, for what adapters drop
        self.auxiliary = Auxiliary()  # of the experts, since `loss` or `logits` was called last

    def weight(self, name: str) -> Tensor:
        """A weight in the compute dtype."""
        return self.weights[name].to(self.dtype)

    def hidden(self, ids: Tensor, documents: Tensor | None, samples: Tensor | None) -> Tensor:
        """[batch, seq, hidden] before the head."""
        s, self.auxiliary, self.samples = self.spec, Auxiliary(), samples
        x = self.weight("embedding.table")[ids.clamp(min=0)] * s.embedding_scale
        if s.has_positions:
            x = x + self.weight("embedding.position")[: ids.shape[1]]
        if s.token_types:
            x = x + self.weight("embedding.type")[0]
        if s.embedding_norm:
            x = self.norm("embedding.norm", x)
        x = self.drop("embedding.dropout", x, samples)
        self.see("embedding", x)
        for i in range(s.layers):
            name, read = f"blocks.{i}", x
            x = x + self.drop(
                f"{name}.attention.residual", self.attention(name, x, documents, samples), samples
            )
            if s.post_norm:
                read = x = self.norm(f"{name}.attention.norm", x)
            elif not s.parallel_residual:
                self.see(f"{name}.attention", x)
                read = x
            x = x + self.drop(f"{name}.mlp.residual", self.mlp(name, read), samples)
            if s.post_norm:
                x = self.norm(f"{name}.mlp.norm", x)
            self.see(f"{name}.mlp", x)
        return x

    def logits(
        self, ids: Tensor, documents: Tensor | None = None, samples: Tensor | None = None
    ) -> Tensor:
        """[batch, seq, vocab]; of images [batch, 1, vocab]."""
        if self.spec.image is not None:
            self.auxiliary, self.samples = Auxiliary(), samples
            return image_logits(self, ids, samples)
        x = self.hidden(ids, documents, samples)
        if self.spec.post_norm:
            x = x @ self.weight("head.transform").t() + self.weight("head.transform_bias")
            x = self.gelu(x)
        x = self.norm("head.norm", x)
        x = x @ self.weight("embedding.table" if self.spec.tied else "head.table").t()
        if self.spec.post_norm:
            x = x + self.weight("head.project_bias")
        cap = self.spec.logit_softcap
        return (x / cap).tanh() * cap if cap else x

    def gelu(self, x: Tensor) -> Tensor:
        """The exact one, or by tanh."""
        return gelu(x, approximate="none" if self.spec.gelu == "erf" else "tanh")

    def loss(self, batch: Batch, total_valid: int) -> Tensor:
        """Sum of the valid tokens' losses over `total_valid`, in fp32 (fp64 under fp64)."""
        logits = self.logits(batch.ids, batch.documents, batch.samples)
        logits = logits.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
        target = logits.gather(-1, batch.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return ((logits.logsumexp(-1) - target) * counted(batch)).sum() / total_valid

    def attention(
        self, name: str, x: Tensor, documents: Tensor | None, samples: Tensor | None
    ) -> Tensor:
        """Norm, q k v, positions, attention within documents, output projection."""
        s = self.spec
        bare = s.post_norm or s.norm_placement == "post"
        h = x if bare else self.norm(f"{name}.attention.norm", x)
        if s.latent is not None:
            q, k, v = self.latent_heads(f"{name}.attention", h)
        else:
            q, k, v = (self.heads(f"{name}.attention.{w}", h) for w in ("wq", "wk", "wv"))
        if s.qk_norm:
            q, k = (
                self.norm(f"{name}.attention.q_norm", q),
                self.norm(f"{name}.attention.k_norm", k),
            )
        layer = int(name.rpartition(".")[2])
        window = s.sliding_window if s.sees(layer) == "s" else 0
        if s.rotates and s.latent is None and s.sees(layer) != "n":
            cos, sin = self.turns(layer, h)
            q, k = turned(q, cos, sin), turned(k, cos, sin)
        group = s.heads // s.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        if s.causal or window:
            mask = mask.tril(0 if s.causal else window - 1)
        if window:
            mask = mask.triu(1 - window)
        if documents is not None:
            mask = (mask & (documents.unsqueeze(-1) == documents.unsqueeze(-2))).unsqueeze(1)
        if s.dropout and self.training:
            scores = (q @ k.transpose(-1, -2) * s.head_dim**-0.5).masked_fill(~mask, -torch.inf)
            a = self.drop(f"{name}.attention.core", scores.softmax(-1), samples) @ v
        elif s.attention_softcap:
            a = self.capped(q, k, v, mask)
        else:
            plain = documents is None and not window and not s.alibi
            mask = self.falling(mask) if s.alibi else mask
            a = scaled_dot_product_attention(
                q,
                k,
                v,
                None if plain else mask,
                is_causal=plain and s.causal,
                scale=s.softmax_scale,
            )
        wo = self.weight(f"{name}.attention.wo").flatten(1)
        a = a.transpose(1, 2).flatten(2)
        y = self.adapted(f"{name}.attention.wo", a, self.linear(a, wo))
        y = y + self.weight(f"{name}.attention.wo_bias") if s.has_biases or s.wo_bias else y
        return y if s.norm_placement == "pre" else self.norm(f"{name}.attention.post_norm", y)

    def capped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention whose scores go through a tanh, made whole in the wide dtype."""
        cap, dtype = self.spec.attention_softcap, torch.float32
        q, k, values = (
            t.to(torch.float64 if self.dtype == torch.float64 else dtype) for t in (q, k, v)
        )
        scores = cap * torch.tanh(q @ k.transpose(-1, -2) * self.spec.softmax_scale / cap)
        return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values).to(v.dtype)

    def turns(self, layer: int, x: Tensor) -> list[Tensor]:
        """cos and sin of the positions of x [batch, seq, ...]; one with a window may have its own base."""
        local = self.spec.local_rope_theta > 0 and self.spec.sees(layer) == "s"
        return [t.to(x.device) for t in turns(self.spec, x.shape[1], self.dtype, local)]

    def falling(self, mask: Tensor) -> Tensor:
        """What ALiBi adds to scores, -inf where `mask` hides a key."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        at = torch.arange(mask.shape[-1], device=mask.device, dtype=dtype)
        slope = slopes(self.spec.heads).to(mask.device, dtype).view(-1, 1, 1)
        return (slope * (at - at.unsqueeze(-1))).masked_fill(~mask, -torch.inf)

    def latent_heads(self, name: str, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [batch, heads, seq, dim] made of latents; the last part of q and k rotated."""
        made, eps = self.spec.latent, self.spec.latent.norm_eps  # type: ignore[union-attr]
        assert made is not None
        x = h
        if made.q:
            x = self.norm(f"{name}.q_norm", self.dense(f"{name}.q_a", h), eps)
        q = self.heads(f"{name}.wq", x)
        latent = self.norm(f"{name}.kv_norm", self.dense(f"{name}.kv_a", h), eps)
        k, v = self.heads(f"{name}.wk", latent), self.heads(f"{name}.wv", latent)
        k_pe = self.dense(f"{name}.k_pe", h).unsqueeze(1)
        cos, sin = self.turns(int(name.split(".")[1]), h)
        q, q_pe = q.split([k.shape[-1], made.rope], -1)
        q_pe, k_pe = (turned(pairs_apart(x), cos, sin) for x in (q_pe, k_pe))
        k_pe = k_pe.expand(-1, k.shape[1], -1, -1)
        return torch.cat([q, q_pe], -1), torch.cat([k, k_pe], -1), v

    def heads(self, name: str, h: Tensor) -> Tensor:
        """[batch, heads, seq, head_dim] of a projection [heads, head_dim, hidden]."""
        w = self.weight(name)
        y = self.adapted(name, h, self.linear(h, w.flatten(0, 1)))
        if f"{name}_bias" in self.weights:
            y = y + self.weight(f"{name}_bias").flatten()
        return y.unflatten(-1, w.shape[:2]).transpose(1, 2)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        """Norm, then experts, SwiGLU, or GELU with biases."""
        bare = self.spec.post_norm or self.spec.norm_placement == "post"
        h = x if bare else self.norm(f"{name}.mlp.norm", x)
        if self.spec.has_experts(int(name.rpartition(".")[2])):
            return moe(self, name, h)
        if self.spec.family == "llama":
            gate, up = (self.dense(f"{name}.mlp.gate_up", h, i) for i in (0, 1))
            made = silu(gate) if self.spec.gate == "silu" else gelu(gate, approximate="tanh")
            y = self.dense(f"{name}.mlp.down", made * up)
            if self.spec.mlp_bias:
                y = y + self.weight(f"{name}.mlp.down_bias")
            return y if self.spec.norm_placement == "pre" else self.norm(f"{name}.mlp.post_norm", y)
        h = self.dense(f"{name}.mlp.fc1", h) + self.weight(f"{name}.mlp.fc1_bias")
        h = self.dense(f"{name}.mlp.fc2", self.gelu(h))
        return h + self.weight(f"{name}.mlp.fc2_bias")

    def dense(self, name: str, x: Tensor, part: int | None = None) -> Tensor:
        """A matrix, or the `part` of a pair of them, with its adapter."""
        w = self.weight(name)
        y = self.adapted(name, x, self.linear(x, w if part is None else w[part]), part)
        if self.spec.mlp_bias and name.endswith("mlp.gate_up"):
            y = y + self.weight(f"{name}_bias")[part]
        return y

    def adapted(
        self,
        name: str,
        x: Tensor,
        y: Tensor,
        part: int | tuple[int, ...] | None = None,
        stays: Tensor | None = None,
    ) -> Tensor:
        """y + (alpha / rank) B A x, where the linear has LoRA's A and B; x times `stays`, where that is
        given, in the place of its own dropout."""
        if f"{name}_lora_a" not in self.weights:
            return y
        a, b = self.weight(f"{name}_lora_a"), self.weight(f"{name}_lora_b")
        a, b = (a, b) if part is None else (a[part], b[part])
        if stays is None:
            x = self.drop(f"{name}.lora", x, self.samples, self.spec.lora_dropout)
        else:
            x = (x * stays).to(x.dtype)
        h = x @ a.flatten(1).t()
        return torch.add(y, h @ b.flatten(0, -2).t(), alpha=self.spec.lora_scale)

    def norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        """RMSNorm, or LayerNorm where the family has biases."""
        wide = x if x.dtype == torch.float64 else x.float()
        w = self.weight(name)
        if not self.spec.has_biases:
            eps = self.spec.norm_eps if eps is None else eps
            scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
            return (wide * scale).to(x.dtype) * w
        centred = wide - wide.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.spec.norm_eps).rsqrt()
        bias = self.weight(f"{name}_bias").to(wide.dtype)
        return (centred * scale * w.to(wide.dtype) + bias).to(x.dtype)

    def drop(self, site: str, x: Tensor, samples: Tensor | None, p: float | None = None) -> Tensor:
        """Dropout by counter, while training; `p` is the model's where it is left out."""
        p = self.spec.dropout if p is None else p
        if not p or not self.training or samples is None:
            return x
        mask = kept(self.seed, self.step, site, samples.tolist(), x.shape[1:], p).to(x.device)
        return x * mask / (1.0 - p)


def loss_and_gradients(
    reference: Reference,
    microbatches: Sequence[Batch],
    scale: float = 1.0,
    whole: Sequence[Batch] = (),
    frozen: Collection[str] = (),
) -> tuple[float, dict[str, Tensor]]:
    """The step's loss and the gradient of every weight but the frozen ones, microbatch by microbatch. The
    experts' auxiliary losses are means over the step's samples; they are in the gradients and not in the
    loss. A balance bias has no gradient: its experts' counts stand there. Backward starts from `scale`, a
    power of two, which gradients are divided by at the end. Where these are not all microbatches of the
    step, `whole` are: loss and gradients are then these ones' part."""
    leaves = {n: w.detach().requires_grad_(n not in frozen) for n, w in reference.weights.items()}
    judge = Reference(
        reference.spec, leaves, reference.dtype, reference.seed, reference.see, reference.linear,
        reference.told,
    )  # fmt: skip
    judge.step, judge.training = reference.step, reference.training
    whole = whole or microbatches
    total = max(sum(int(counted(b).sum()) for b in whole), 1)
    samples = sum(b.ids.shape[0] for b in whole)
    gradients = {n: torch.zeros_like(w) for n, w in leaves.items() if n not in frozen}
    loss, seen = 0.0, Auxiliary()
    for batch in microbatches:
        part = judge.loss(batch, total)
        (scale * (part + judge.auxiliary.loss / samples)).backward()
        loss += float(part.detach())
        seen.add(judge.auxiliary)
    reference.auxiliary = seen
    gradients |= {n: w.grad.div_(scale) for n, w in leaves.items() if w.grad is not None}
    if reference.spec.router_bias:
        for name, counts in seen.counts.items():
            bias = f"{name}.router.balance_bias"
            if bias in gradients:
                gradients[bias] = counts.to(gradients[bias].dtype)
    return loss, gradients
