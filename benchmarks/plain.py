"""A Llama as anyone would write it in plain PyTorch: what the peers parallelise."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from partita.model.rope import rotate, tables
from partita.spec.model import ModelSpec


class Attention(nn.Module):
    def __init__(self, s: ModelSpec) -> None:
        super().__init__()
        self.dim = s.head_dim
        self.wq = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.wk = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.wv = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.wo = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = (
            w(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.wo(a.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, s: ModelSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(s.hidden, s.ffn_hidden, bias=False)
        self.up = nn.Linear(s.hidden, s.ffn_hidden, bias=False)
        self.down = nn.Linear(s.ffn_hidden, s.hidden, bias=False)

    def forward(self, x):
        return self.down(silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """A loop over the experts, as models are first written: what dropless dispatch is held against."""

    def __init__(self, s: ModelSpec) -> None:
        super().__init__()
        one = replace(
            s,
            experts=0,
            top_k=0,
            shared_experts=0,
            ffn_hidden=s.expert_ffn_hidden,
            expert_ffn_hidden=0,
        )
        shared = replace(one, ffn_hidden=s.shared_experts * s.expert_ffn_hidden)
        self.router = nn.Linear(s.hidden, s.experts, bias=False)
        self.experts = nn.ModuleList(MLP(one) for _ in range(s.experts))
        self.shared = MLP(shared)
        self.top_k, self.normalises = s.top_k, s.normalise_top_k

    def forward(self, x):
        flat = x.flatten(0, 1)
        gates, chosen = self.router(flat).float().softmax(-1).topk(self.top_k, -1)
        if self.normalises:
            gates = gates / gates.sum(-1, keepdim=True)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, pick = (chosen == e).nonzero(as_tuple=True)
            out = gates[token, pick].unsqueeze(-1) * expert(flat[token])
            y.index_add_(0, token, out.to(y.dtype))
        return y.view_as(x) + self.shared(x)


class Layer(nn.Module):
    def __init__(self, s: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(s.hidden, s.norm_eps)
        self.attention = Attention(s)
        self.mlp_norm = nn.RMSNorm(s.hidden, s.norm_eps)
        self.mlp = Experts(s) if s.experts else MLP(s)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Embedding, layers, norm, head; some may be missing on a pipeline stage."""

    def __init__(
        self, s: ModelSpec, seq_len: int, layers: range, first: bool = True, last: bool = True
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(s.vocab, s.hidden) if first else None
        self.layers = nn.ModuleDict({str(i): Layer(s) for i in layers})
        self.norm = nn.RMSNorm(s.hidden, s.norm_eps) if last else None
        self.head = nn.Linear(s.hidden, s.vocab, bias=False) if last else None
        cos, sin = tables(s, seq_len, torch.float32)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x):
        if self.table is not None:
            x = self.table(x)
        for layer in self.layers.values():
            x = layer(x, self.cos, self.sin)
        return x if self.head is None else self.head(self.norm(x))


def loss_of(logits, targets):
    """Token mean."""
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Checkpointed(nn.Module):
    """A layer under torch.utils.checkpoint."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return checkpoint(self.layer, *inputs, use_reentrant=False)
