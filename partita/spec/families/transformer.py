"""Llama (RMSNorm, RoPE, grouped-query attention, SwiGLU), GPT-2 (LayerNorm, learned positions, GELU,
biases, dropout) and what differs from it, GPT-NeoX, BLOOM and BERT, as Programs. docs/map.md has the table of
ops, tensors and weights.

With dropout 0 attention is one op (flash: keeps q, k, v, its output and the log-sum-exp); with dropout
it is Korthikanti et al.'s explicit softmax (2205.05198, sec. 4), probabilities and masks kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from partita.spec.families.latent import latent_heads, latent_sizes
from partita.spec.families.loss import loss
from partita.spec.families.moe import expert_sizes, moe
from partita.spec.families.writer import Writer
from partita.spec.program import Block, Program

if TYPE_CHECKING:
    from partita.spec.model import ModelSpec

X = "batch seq hidden"
Q, KV = "batch seq heads head_dim", "batch seq kv_heads head_dim"
GRID = "batch heads seq keys head_dim"


@dataclass(frozen=True)
class Family:
    """A model's shape with one microbatch's size."""

    spec: ModelSpec
    batch: int
    seq: int

    @property
    def biased(self) -> bool:
        """GPT-2 and its like have biases everywhere."""
        return self.spec.has_biases

    @property
    def drops(self) -> bool:
        """Whether training drops activations."""
        return self.spec.dropout > 0

    def writer(self, name: str) -> Writer:
        """A writer that knows this model's dims."""
        s = self.spec
        return Writer(
            name,
            {
                "batch": self.batch,
                "seq": self.seq,
                "keys": self.seq,
                "hidden": s.hidden,
                "heads": s.heads,
                "kv_heads": s.kv_heads,
                "head_dim": s.head_dim,
                "ffn": s.ffn_hidden,
                "vocab": s.vocab,
                "positions": s.max_seq_len,
                "types": s.token_types,
                "transformed": s.hidden,
                "pair": 2,
                **(latent_sizes(s) if s.latent else {}),
            },
        )

    def norm(self, w: Writer, name: str, x: str, out: str, dims: str = X) -> str:
        """Normalises over the last of `dims`; keeps its input."""
        last = dims.split()[-1]
        weights = {name: last} | ({f"{name}_bias": last} if self.biased else {})
        return w.op(name, "norm", x, (out, dims), weights=weights, whole=((x, last),), saves=x)

    def residual(self, w: Writer, segment: str, x: str, y: str, out: str) -> str:
        """x + dropout(y); the mask is kept, one byte an element."""
        if not self.drops:
            return w.op(f"{segment}.residual", "map", f"{x} {y}", (out, X))
        mask = f"{y}_mask"
        w.op(f"{segment}.mask", "mask", "", (mask, X), role="mask")
        return w.op(f"{segment}.residual", "map", f"{x} {y} {mask}", (out, X), saves=mask)

    def linear(
        self, w: Writer, name: str, x: str, out: tuple[str, str], weight: str, sums: str
    ) -> str:
        """A linear, and behind it its bias over the dims of its output that the weight has; of what is added
        up before biases are, behind the sum."""
        late = self.spec.parallel_residual and out[0] in ("ao", "mo")
        if late or not self.spec.bias_of(name):
            return w.linear(name, x, out, weight, sums)
        y = w.linear(name, x, (f"{out[0]}.mm", out[1]), weight, sums)
        own = " ".join(d for d in out[1].split() if d in weight.split())
        return w.bias(name, y, out, own)

    def attention(self, w: Writer, x: str, sees: str) -> str:
        """Projections, positions, attention and the output projection. The three projections' weights
        lie side by side, so that one matmul can serve them; their biases follow."""
        if self.spec.latent is not None:
            a = self.flash(w, *latent_heads(self.spec, w, x), sees)
            return w.linear("attention.wo", a, ("ao", X), "hidden heads v_dim", "heads v_dim")
        biased = self.biased or self.spec.qkv_bias
        mm = ".mm" if biased else ""
        kv_weight = "kv_heads head_dim hidden"
        q = w.linear("attention.wq", x, (f"q{mm}", Q), "heads head_dim hidden", "hidden")
        k = w.linear("attention.wk", x, (f"k{mm}", KV), kv_weight, "hidden")
        v = w.linear("attention.wv", x, (f"v{mm}", KV), kv_weight, "hidden")
        if biased:
            q = w.bias("attention.wq", q, ("q", Q), "heads head_dim")
            k = w.bias("attention.wk", k, ("k", KV), "kv_heads head_dim")
            v = w.bias("attention.wv", v, ("v", KV), "kv_heads head_dim")
        if self.spec.qk_norm:
            q = self.norm(w, "attention.q_norm", q, "qn", Q)
            k = self.norm(w, "attention.k_norm", k, "kn", KV)
        if self.spec.rotates and sees != "n":
            q = w.op("attention.rope_q", "map", q, ("qr", Q))
            k = w.op("attention.rope_k", "map", k, ("kr", KV))
        a = self.softmax(w, q, k, v) if self.drops else self.flash(w, q, k, v, sees)
        return self.linear(
            w, "attention.wo", a, ("ao", X), "hidden heads head_dim", "heads head_dim"
        )

    def flash(self, w: Writer, q: str, k: str, v: str, sees: str) -> str:
        """FLOPs are those of the full square: 4 a point (model_full), 2 where values are narrower; `window`
        tells how much of it is seen."""
        w.tensor("lse", "batch seq heads", "stat")
        scratch, window = "", self.spec.sliding_window
        if self.spec.alibi:  # what is added to scores, and how far keys lie behind
            scratch = w.tensor("falls", "heads seq keys", "constant")
            scratch += f" {w.tensor('behind', 'seq keys', 'route')}"
        if self.spec.attention_softcap:  # no kernel has it: scores are made whole
            for name in ("scores", "slopes"):
                scratch += f" {w.tensor(name, 'batch heads seq keys', 'stat')}"
        out, grid, flops = Q, GRID, 4
        if self.spec.latent is not None:
            out, grid, flops = "batch seq heads v_dim", "batch heads seq keys qk_v", 2
        return w.op(
            "attention.core",
            "attention",
            f"{q} {k} {v}",
            ("a", out),
            whole=((k, "seq"), (v, "seq")),
            space=grid,
            flops_per_point=flops,
            saves=f"{q} {k} {v} a lse",
            scratch=scratch,
            cheap=True,
            causal=self.spec.causal,
            window=(window,) if sees == "s" and window < self.seq else (),
        )

    def softmax(self, w: Writer, q: str, k: str, v: str) -> str:
        """Explicit probabilities, for dropout on them."""
        p = "batch heads seq keys"
        w.op(
            "attention.softmax",
            "attention",
            f"{q} {k}",
            ("p", p),
            whole=((k, "seq"),),
            space=GRID,
            saves=f"{q} {k} p",
            cheap=True,
            causal=self.spec.causal,
        )
        w.op("attention.drop_mask", "mask", "", ("p_mask", p), role="mask", cheap=True)
        w.op("attention.dropout", "map", "p p_mask", ("pd", p), saves="p_mask", cheap=True)
        return w.op(
            "attention.core",
            "attention",
            f"pd {v}",
            ("a", Q),
            sums=("keys",),
            whole=((v, "seq"),),
            space=GRID,
            saves=f"pd {v}",
            cheap=True,
        )

    def mlp(self, w: Writer, x: str) -> str:
        """SwiGLU, or two linears with a GELU between."""
        if not self.biased:
            out = ("gu", "batch seq pair ffn")
            gu = self.linear(w, "mlp.gate_up", x, out, "pair ffn hidden", "hidden")
            act = w.op("mlp.act", "map", gu, ("act", "batch seq ffn"), saves=gu)
            return self.linear(w, "mlp.down", act, ("mo", X), "hidden ffn", "ffn")
        up = self.linear(w, "mlp.fc1", x, ("up", "batch seq ffn"), "ffn hidden", "hidden")
        act = w.op("mlp.act", "map", up, ("act", "batch seq ffn"), saves=up)
        return self.linear(w, "mlp.fc2", act, ("mo", X), "hidden ffn", "ffn")

    def layer(self, experts: bool = False, sees: str = "f") -> Block:
        """One transformer layer: an attention segment and an mlp segment, or those of experts (moe.py);
        `sees` is its letter of attention_pattern."""
        w = self.writer("moe_layer" if experts else "layer")
        if experts:
            w.sizes = {**w.sizes, **expert_sizes(self.spec, self.batch, self.seq)}
        x = w.tensor("x", X)
        if self.spec.post_norm:
            return w.block(x, self.behind(w, x, sees))
        ao = self.attention(w, self.before(w, "attention", x, "n1"), sees)
        if self.spec.parallel_residual:
            return w.block(x, self.beside(w, x, ao))
        x1 = self.residual(w, "attention", x, self.added(w, "attention", ao), "x1")
        n2 = self.before(w, "mlp", x1, "n2")
        if experts:
            return w.block(x, self.residual(w, "combine", x1, moe(self.spec, w, n2), "x2"))
        mo = self.added(w, "mlp", self.mlp(w, n2))
        return w.block(x, self.residual(w, "mlp", x1, mo, "x2"))

    def before(self, w: Writer, segment: str, x: str, out: str) -> str:
        """What a segment reads: x normalised, or x."""
        behind = self.spec.norm_placement == "post"
        return x if behind else self.norm(w, f"{segment}.norm", x, out)

    def added(self, w: Writer, segment: str, y: str) -> str:
        """What is added to the residual stream: what a segment made, or that normalised."""
        if self.spec.norm_placement == "pre":
            return y
        return self.norm(w, f"{segment}.post_norm", y, f"{y}n")

    def behind(self, w: Writer, x: str, sees: str) -> str:
        """Both segments, and a norm behind each sum."""
        s1 = self.residual(w, "attention", x, self.attention(w, x, sees), "s1")
        x1 = self.norm(w, "attention.norm", s1, "x1")
        s2 = self.residual(w, "mlp", x1, self.mlp(w, x1), "s2")
        return self.norm(w, "mlp.norm", s2, "x2")

    def beside(self, w: Writer, x: str, ao: str) -> str:
        """The mlp on attention's input: what both make is added up, then their biases and x."""
        mo = self.mlp(w, self.norm(w, "mlp.norm", x, "n2"))
        y = w.op("mlp.join", "map", f"{ao} {mo}", ("both", X))
        for name, out in (("attention.wo", "both_wo"), ("mlp.fc2", "both_fc2")):
            weight, last = f"{name}_bias", name.rpartition(".")[2]
            y = w.op(f"mlp.{last}_bias", "bias", y, (out, X), weights={weight: "hidden"})
        return self.residual(w, "mlp", x, y, "x2")

    def embedding(self) -> Block:
        """Token table; for GPT-2 positions and dropout, for BLOOM a norm, for BERT all that and types."""
        w = self.writer("embedding")
        ids = w.tensor("ids", "batch seq", "index")
        x = w.op(
            "embedding.lookup",
            "lookup",
            ids,
            ("e", X),
            weights={"embedding.table": "vocab hidden"},
            sums=("vocab",),
            saves=ids,
        )
        if self.spec.embedding_scale != 1.0:
            x = w.op("embedding.scale", "map", x, ("es", X))
        if self.spec.has_positions:
            x = w.op(
                "embedding.add_position",
                "map",
                x,
                ("ep", X),
                weights={"embedding.position": "positions hidden"},
            )
        if self.spec.token_types:
            types = {"embedding.type": "types hidden"}
            x = w.op("embedding.add_type", "map", x, ("et", X), weights=types)
        if self.spec.embedding_norm:
            x = self.norm(w, "embedding.norm", x, "en")
        if self.drops:
            w.op("embedding.mask", "mask", "", ("e_mask", X), role="mask")
            x = w.op("embedding.dropout", "map", f"{x} e_mask", ("ed", X), saves="e_mask")
        return w.block(ids, x)

    def head(self) -> Block:
        """Final norm, output projection and cross-entropy by parts, so that logits stay cut: the
        maximum, the sum of exponentials and the target's logit are each [batch, seq]. BERT's
        transforms what it reads first."""
        w = self.writer("head")
        x = w.tensor("x", X)
        read, dims = x, X
        if self.spec.post_norm:
            dims = "batch seq transformed"
            read = self.linear(w, "head.transform", x, ("t", dims), "transformed hidden", "hidden")
            read = w.op("head.act", "map", read, ("ta", dims), saves=read)
        n = self.norm(w, "head.norm", read, "n", dims)
        table = "embedding.table" if self.spec.tied else "head.table"
        capped = self.spec.logit_softcap > 0
        logits = "logits.mm" if capped or self.spec.post_norm else "logits"
        y = w.op(
            "head.project",
            "linear",
            n,
            (logits, "batch seq vocab"),
            weights={table: "vocab hidden"},
            sums=("hidden",),
            space="batch seq vocab hidden",
            saves=n,
        )
        if self.spec.post_norm:
            y = w.bias("head.project", y, ("logits", "batch seq vocab"), "vocab")
        if capped:
            y = w.op("head.cap", "map", y, ("logits", "batch seq vocab"), saves="logits")
        return w.block(x, loss(w, y, "batch seq"))


def transformer_program(spec: ModelSpec, batch: int, seq_len: int) -> Program:
    """Embedding, the layers (equal ones are one object), head."""
    family = Family(spec, batch, seq_len)
    keys = [(spec.has_experts(i), spec.sees(i)) for i in range(spec.layers)]
    kinds = {key: family.layer(*key) for key in dict.fromkeys(keys)}
    layers = [kinds[key] for key in keys]
    names = ("embedding", *(f"blocks.{i}" for i in range(spec.layers)), "head")
    tied = ("embedding.table",) if spec.tied else ()
    return Program((family.embedding(), *layers, family.head()), names, tied)
