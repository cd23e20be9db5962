"""Our tensors beside Hugging Face's: which file tensor holds which part of which logical one.

                ours                                    transformers
llama           attention.wq [heads, head_dim, hidden]  self_attn.q_proj [heads * head_dim, hidden]
                mlp.gate_up [2, ffn, hidden]            mlp.gate_proj, mlp.up_proj [ffn, hidden]
qwen2           attention.wq_bias [heads, head_dim]     self_attn.q_proj.bias
qwen3           attention.q_norm [head_dim]             self_attn.q_norm
mixtral         router.gate [experts, hidden]           block_sparse_moe.gate
                experts.gate_up [experts, 2, ffn, hidden]   block_sparse_moe.experts.E.w1, w3 [ffn, hidden]
                experts.down [experts, hidden, ffn]     block_sparse_moe.experts.E.w2 [hidden, ffn]
qwen moe        experts.gate_up                         mlp.experts.E.gate_proj, up_proj; mlp.gate
                shared.gate_up, shared.gate [1, hidden] mlp.shared_expert.*_proj, mlp.shared_expert_gate
deepseek        attention.q_a, wq [heads, head_dim, q]  self_attn.q_a_proj, q_b_proj (without q: q_proj)
                attention.kv_a [kv, hidden], k_pe       self_attn.kv_a_proj_with_mqa [kv + rope, hidden]
                attention.wk, wv [heads, ..., kv]       self_attn.kv_b_proj [heads * (nope + v), kv]
                router.balance_bias [experts]           mlp.gate.e_score_correction_bias
gemma           attention.norm + 1 and the like         input_layernorm; pre_feedforward_layernorm, post_*
phi3            attention.wq, wk, wv; mlp.gate_up       self_attn.qkv_proj; mlp.gate_up_proj, rows joined
gpt2 (Conv1D)   attention.wq, wk, wv                    attn.c_attn [hidden, 3 * hidden], transposed
                mlp.fc1 [ffn, hidden]                   mlp.c_fc [hidden, ffn], transposed
gpt_neox, bloom attention.wq, wk, wv                    *.query_key_value [heads * 3 * head_dim, hidden]: each
                                                        head's q, k, v behind each other, weights and biases
                mlp.fc1, fc2                            mlp.dense_h_to_4h, dense_4h_to_h
bloom           embedding.norm [hidden]                 word_embeddings_layernorm
bert            attention.wq                            attention.self.query [heads * head_dim, hidden]
                attention.norm, mlp.norm                attention.output.LayerNorm, output.LayerNorm
                head.transform, head.norm               cls.predictions.transform.dense, transform.LayerNorm
                head.project_bias [vocab]               cls.predictions.bias (not tied: decoder.bias)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from partita.base.errors import UsageError
from partita.spec.hf_kinds import GEMMAS, kind_of
from partita.spec.model import ModelSpec

# What older releases of transformers saved though it is no weight: masks, rotary tables; and what BERT has
# for sentences, or a second time.
NO_WEIGHTS = re.compile(
    r"(^|\.)(attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias|rotary_emb\.inv_freq)$"
    r"|^bert\.(pooler\.|embeddings\.position_ids$)|^cls\.(seq_relationship\.|predictions\.(decoder\.)?bias$)"
)
OLD_NORMS = {".gamma": ".weight", ".beta": ".bias"}  # as BERT's first files call what norms have


@dataclass(frozen=True, slots=True)
class Words:
    """What a family calls what stands around its layers: behind `prefix` the table, the positions and the
    norm of the first block; by their whole names the last norm, the output and, by its beginning, what else
    stands `beside` those with the prefix."""

    prefix: str
    table: str
    norm: str
    output: str = "lm_head.weight"
    first_norm: str = "word_embeddings_layernorm"
    position: str = "wpe"
    beside: str = "lm_head."


WORDS = {
    "llama": Words("model.", "embed_tokens", "model.norm"),
    "gpt2": Words("transformer.", "wte", "transformer.ln_f"),
    "gpt_neox": Words("gpt_neox.", "embed_in", "gpt_neox.final_layer_norm", "embed_out.weight"),
    "bloom": Words("transformer.", "word_embeddings", "transformer.ln_f"),
    "bert": Words(
        "bert.", "embeddings.word_embeddings", "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder.weight", "embeddings.LayerNorm", "embeddings.position_embeddings", "cls.",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """The file tensor that holds one of our tensors, or its slice at `part` of the first dims.

    `dims` are the logical sizes that it holds. The first `rows` of them fold into its rows, the others
    into its columns; rows = len(dims) makes a vector. A `transposed` matrix lies with its columns
    first. Ours starts at row `offset` of `total` where several share one file tensor; with `step` each
    index of the first dim begins so many rows behind the one before, and others lie between. Ours are
    theirs `plus` a number (Gemma multiplies by 1 + weight).
    """

    name: str
    file_name: str
    dims: tuple[int, ...]
    rows: int
    transposed: bool = False
    offset: int = 0
    total: int = 0
    part: tuple[int, ...] = ()
    step: int = 0
    plus: float = 0.0

    @property
    def num_rows(self) -> int:
        """Rows of the file tensor that are ours."""
        return prod(self.dims[: self.rows])

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape that the file tensor must have."""
        rows = self.total or self.num_rows
        if self.rows == len(self.dims):
            return (rows,)
        columns = prod(self.dims[self.rows :])
        return (columns, rows) if self.transposed else (rows, columns)


_BEHIND = {
    "attention.post_norm": "post_attention_layernorm",
    "mlp.post_norm": "post_feedforward_layernorm",
}
NORMS = {  # by where they stand
    "pre": {"attention.norm": "input_layernorm", "mlp.norm": "post_attention_layernorm"},
    "post": _BEHIND,
    "both": {
        "attention.norm": "input_layernorm",
        "mlp.norm": "pre_feedforward_layernorm",
        **_BEHIND,
    },
}


def names(spec: ModelSpec) -> tuple[Source, ...]:
    """Every tensor of the model and where it lies in a Hugging Face folder, in program order."""
    if spec.family not in WORDS:
        raise UsageError(f"family {spec.family} has no Hugging Face layout", key="family")
    words, hidden, tables = WORDS[spec.family], spec.hidden, (spec.vocab, spec.hidden)
    prefix, layer = words.prefix, LAYERS[spec.family]
    found = [Source("embedding.table", f"{prefix}{words.table}.weight", tables, 1)]
    if spec.embedding_norm:
        found += _norm(spec, "embedding.norm", f"{prefix}{words.first_norm}")
    if spec.has_positions:
        shape = (spec.max_seq_len, hidden)
        found.append(Source("embedding.position", f"{prefix}{words.position}.weight", shape, 1))
    if spec.token_types:
        shape, name = (spec.token_types, hidden), f"{prefix}embeddings.token_type_embeddings.weight"
        found.append(Source("embedding.type", name, shape, 1))
    for i in range(spec.layers):
        found += layer(spec, i)
    if spec.post_norm:
        found += _transform(spec)
    found += _norm(spec, "head.norm", words.norm)
    if not spec.tied:
        found.append(Source("head.table", words.output, tables, 1))
    return tuple(found)


def _transform(spec: ModelSpec) -> list[Source]:
    """What BERT's head makes of what it reads, and the biases of the output."""
    h, dense = spec.hidden, "cls.predictions.transform.dense"
    bias = "cls.predictions.bias" if spec.tied else "cls.predictions.decoder.bias"
    return [
        Source("head.transform", f"{dense}.weight", (h, h), 1),
        Source("head.transform_bias", f"{dense}.bias", (h,), 1),
        Source("head.project_bias", bias, (spec.vocab,), 1),
    ]


def _plus(spec: ModelSpec) -> float:
    """What a norm multiplies by, beside its weight."""
    return 1.0 if spec.family == "llama" and kind_of(spec) in GEMMAS else 0.0


def _norm(spec: ModelSpec, ours: str, theirs: str) -> list[Source]:
    """Scales, and biases where the family has them."""
    found = [Source(ours, f"{theirs}.weight", (spec.hidden,), 1, plus=_plus(spec))]
    if spec.has_biases:
        found.append(Source(f"{ours}_bias", f"{theirs}.bias", (spec.hidden,), 1))
    return found


def _llama_layer(spec: ModelSpec, i: int) -> list[Source]:
    ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
    attention = f"{theirs}self_attn."
    heads = _heads if spec.latent is None else _latent
    heads = _fused_heads if spec.layout == "phi3" else heads
    found = heads(spec, f"{ours}attention.", attention)
    for norm, name in NORMS[spec.norm_placement].items():
        found += _norm(spec, f"{ours}{norm}", f"{theirs}{name}")
    if spec.has_experts(i):
        return found + _experts(spec, ours, theirs)
    names = tuple(f"{theirs}mlp.{n}_proj" for n in ("gate", "up", "down"))
    if spec.layout == "phi3":
        return found + _fused_mlp(spec, f"{ours}mlp", f"{theirs}mlp.")
    found += _swiglu(spec, f"{ours}mlp", names, spec.ffn_hidden)
    if spec.mlp_bias:
        for name, at in ((names[0], (0,)), (names[1], (1,))):
            found.append(
                Source(f"{ours}mlp.gate_up_bias", f"{name}.bias", (spec.ffn_hidden,), 1, part=at)
            )
        found.append(Source(f"{ours}mlp.down_bias", f"{names[2]}.bias", (spec.hidden,), 1))
    return found


def _fused_mlp(spec: ModelSpec, ours: str, theirs: str) -> list[Source]:
    """Phi-3: gate and up share a file tensor."""
    wide, file = (spec.ffn_hidden, spec.hidden), f"{theirs}gate_up_proj.weight"
    halves = [
        Source(f"{ours}.gate_up", file, wide, 1, offset=i * wide[0], total=2 * wide[0], part=(i,))
        for i in (0, 1)
    ]
    return [*halves, Source(f"{ours}.down", f"{theirs}down_proj.weight", wide[::-1], 1)]


def _fused_heads(spec: ModelSpec, ours: str, theirs: str) -> list[Source]:
    """Phi-3: all heads' queries, then keys, then values in one file tensor."""
    counts = {"wq": spec.heads, "wk": spec.kv_heads, "wv": spec.kv_heads}
    total, at, found = sum(counts.values()) * spec.head_dim, 0, []
    for w, heads in counts.items():
        dims = (heads, spec.head_dim, spec.hidden)
        found.append(
            Source(f"{ours}{w}", f"{theirs}qkv_proj.weight", dims, 2, offset=at, total=total)
        )
        at += heads * spec.head_dim
    wo = (spec.hidden, spec.heads, spec.head_dim)
    return [*found, Source(f"{ours}wo", f"{theirs}o_proj.weight", wo, 1)]


def _latent(spec: ModelSpec, ours: str, theirs: str) -> list[Source]:
    """kv_a and k_pe share one file tensor; in another each head's keys and values follow each other."""
    made, hidden = spec.latent, spec.hidden
    assert made is not None
    nope, both = spec.head_dim - made.rope, spec.head_dim - made.rope + made.v
    down, up = f"{theirs}kv_a_proj_with_mqa.weight", f"{theirs}kv_b_proj.weight"
    rows, all_rows = made.kv + made.rope, spec.heads * both
    q = Source(f"{ours}wq", f"{theirs}q_proj.weight", (spec.heads, spec.head_dim, hidden), 2)
    queries = [q]
    if made.q:
        queries = [
            Source(f"{ours}q_a", f"{theirs}q_a_proj.weight", (made.q, hidden), 1),
            Source(f"{ours}q_norm", f"{theirs}q_a_layernorm.weight", (made.q,), 1),
            Source(q.name, f"{theirs}q_b_proj.weight", (spec.heads, spec.head_dim, made.q), 2),
        ]
    wo = (hidden, spec.heads, made.v)
    return [
        *queries,
        Source(f"{ours}kv_a", down, (made.kv, hidden), 1, total=rows),
        Source(f"{ours}k_pe", down, (made.rope, hidden), 1, offset=made.kv, total=rows),
        Source(f"{ours}kv_norm", f"{theirs}kv_a_layernorm.weight", (made.kv,), 1),
        Source(f"{ours}wk", up, (spec.heads, nope, made.kv), 2, total=all_rows, step=both),
        Source(
            f"{ours}wv",
            up,
            (spec.heads, made.v, made.kv),
            2,
            offset=nope,
            total=all_rows,
            step=both,
        ),
        Source(f"{ours}wo", f"{theirs}o_proj.weight", wo, 1),
    ]


def _heads(spec: ModelSpec, ours: str, theirs: str) -> list[Source]:
    q = (spec.heads, spec.head_dim, spec.hidden)
    kv = (spec.kv_heads, spec.head_dim, spec.hidden)
    found = [
        Source(f"{ours}wq", f"{theirs}q_proj.weight", q, 2),
        Source(f"{ours}wk", f"{theirs}k_proj.weight", kv, 2),
        Source(f"{ours}wv", f"{theirs}v_proj.weight", kv, 2),
        Source(f"{ours}wo", f"{theirs}o_proj.weight", (spec.hidden, *q[:2]), 1),
    ]
    if spec.qkv_bias:
        for n, dims in (("q", q[:2]), ("k", kv[:2]), ("v", kv[:2])):
            found.append(Source(f"{ours}w{n}_bias", f"{theirs}{n}_proj.bias", dims, 2))
    if spec.wo_bias:
        found.append(Source(f"{ours}wo_bias", f"{theirs}o_proj.bias", (spec.hidden,), 1))
    if spec.qk_norm:
        for n in ("q_norm", "k_norm"):
            found.append(Source(f"{ours}{n}", f"{theirs}{n}.weight", kv[1:2], 1, plus=_plus(spec)))
    return found


def _swiglu(
    spec: ModelSpec, ours: str, theirs: tuple[str, str, str], width: int, part: tuple[int, ...] = ()
) -> list[Source]:
    """gate, up and down of one mlp, or of one expert."""
    wide, (gate, up, down) = (width, spec.hidden), theirs
    return [
        Source(f"{ours}.gate_up", f"{gate}.weight", wide, 1, part=(*part, 0)),
        Source(f"{ours}.gate_up", f"{up}.weight", wide, 1, part=(*part, 1)),
        Source(f"{ours}.down", f"{down}.weight", wide[::-1], 1, part=part),
    ]


def _experts(spec: ModelSpec, ours: str, theirs: str) -> list[Source]:
    mixtral, gate_dims = kind_of(spec) == "mixtral", (spec.experts, spec.hidden)
    theirs += "block_sparse_moe." if mixtral else "mlp."
    parts = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found = [Source(f"{ours}router.gate", f"{theirs}gate.weight", gate_dims, 1)]
    if spec.router_bias:
        bias = f"{theirs}gate.e_score_correction_bias"
        found.append(Source(f"{ours}router.balance_bias", bias, gate_dims[:1], 1))
    for e in range(spec.experts):
        names = (f"{theirs}experts.{e}.{w}" for w in parts)
        found += _swiglu(spec, f"{ours}experts", tuple(names), spec.expert_ffn_hidden, (e,))
    if spec.shared_experts:
        shared = f"{theirs}shared_expert{'s' if spec.latent else ''}."
        names, width = (shared + w for w in parts), spec.shared_experts * spec.expert_ffn_hidden
        found += _swiglu(spec, f"{ours}shared", tuple(names), width)
    if spec.shared_gate:
        gate = f"{theirs}shared_expert_gate.weight"
        found.append(Source(f"{ours}shared.gate", gate, (1, spec.hidden), 1))
    return found


def _gpt2_layer(spec: ModelSpec, i: int) -> list[Source]:
    ours, theirs, h = f"blocks.{i}.", f"transformer.h.{i}.", spec.hidden
    head = (spec.heads, spec.head_dim)
    found = _norm(spec, f"{ours}attention.norm", f"{theirs}ln_1")
    fused = f"{theirs}attn.c_attn."
    for at, w in enumerate(("wq", "wk", "wv")):
        name, place = f"{ours}attention.{w}", (at * h, 3 * h)
        found.append(Source(name, f"{fused}weight", (*head, h), 2, True, *place))
        found.append(Source(f"{name}_bias", f"{fused}bias", head, 2, False, *place))
    linears = ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    found += _biased(spec, ours, [f"{theirs}{n}" for n in linears], transposed=True)
    return found + _norm(spec, f"{ours}mlp.norm", f"{theirs}ln_2")


def _biased(
    spec: ModelSpec, ours: str, theirs: Sequence[str], transposed: bool = False
) -> list[Source]:
    """wo, fc1 and fc2 with their biases."""
    h, found = spec.hidden, []
    dims = ((h, spec.heads, spec.head_dim), (spec.ffn_hidden, h), (h, spec.ffn_hidden))
    for w, name, shape in zip(("attention.wo", "mlp.fc1", "mlp.fc2"), theirs, dims, strict=True):
        found.append(Source(f"{ours}{w}", f"{name}.weight", shape, 1, transposed))
        found.append(Source(f"{ours}{w}_bias", f"{name}.bias", shape[:1], 1))
    return found


def _fused_layer(spec: ModelSpec, i: int) -> list[Source]:
    """GPT-NeoX and BLOOM: q, k and v of one head behind each other."""
    layers, segment = ("layers", "attention")
    if spec.family == "bloom":
        layers, segment = ("h", "self_attention")
    ours, theirs = f"blocks.{i}.", f"{WORDS[spec.family].prefix}{layers}.{i}."
    head, step = (spec.heads, spec.head_dim), 3 * spec.head_dim
    found = _norm(spec, f"{ours}attention.norm", f"{theirs}input_layernorm")
    fused, total = f"{theirs}{segment}.query_key_value", spec.heads * step
    for at, w in enumerate(("wq", "wk", "wv")):
        for name, file, dims in (
            (f"{ours}attention.{w}", f"{fused}.weight", (*head, spec.hidden)),
            (f"{ours}attention.{w}_bias", f"{fused}.bias", head),
        ):
            offset = at * spec.head_dim
            found.append(Source(name, file, dims, 2, offset=offset, total=total, step=step))
    linears = (f"{segment}.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    found += _biased(spec, ours, [f"{theirs}{n}" for n in linears])
    return found + _norm(spec, f"{ours}mlp.norm", f"{theirs}post_attention_layernorm")


def _bert_layer(spec: ModelSpec, i: int) -> list[Source]:
    ours, theirs = f"blocks.{i}.", f"bert.encoder.layer.{i}."
    head, found = (spec.heads, spec.head_dim), []
    for w, name in (("wq", "query"), ("wk", "key"), ("wv", "value")):
        file = f"{theirs}attention.self.{name}"
        found.append(Source(f"{ours}attention.{w}", f"{file}.weight", (*head, spec.hidden), 2))
        found.append(Source(f"{ours}attention.{w}_bias", f"{file}.bias", head, 2))
    linears = ("attention.output.dense", "intermediate.dense", "output.dense")
    found += _biased(spec, ours, [f"{theirs}{n}" for n in linears])
    found += _norm(spec, f"{ours}attention.norm", f"{theirs}attention.output.LayerNorm")
    return found + _norm(spec, f"{ours}mlp.norm", f"{theirs}output.LayerNorm")


LAYERS = {
    "llama": _llama_layer,
    "gpt2": _gpt2_layer,
    "gpt_neox": _fused_layer,
    "bloom": _fused_layer,
    "bert": _bert_layer,
}
