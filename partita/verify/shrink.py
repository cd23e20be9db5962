"""A job too big for this machine, made small with every relation kept.

kept     kv_heads < tp, layers modulo pp, vocab modulo tp, biases, tied or not, replicas >= 2
changed  widths, layers to two or three a stage, vocabulary, sequence, samples, axes of more than 2 or 4
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from partita.simulate.predict import request_of
from partita.spec.job import Job
from partita.spec.model import ModelSpec
from partita.spec.plan import Plan

MAX_PARAMETERS, MAX_RANKS, MAX_TOKENS = 4_000_000, 64, 8192


def too_big(job: Job) -> bool:
    """Whether thread ranks of this machine should not run it whole, in float64, several times."""
    tokens = job.train.global_batch_size * job.train.seq_len
    big = job.model.parameters() > MAX_PARAMETERS or tokens > MAX_TOKENS
    return big or job.plan.world_size > MAX_RANKS


def shrink(job: Job) -> tuple[Job, str | None]:
    """(the job to verify, what was changed or None)."""
    if not too_big(job):
        return job, None
    plan = job.plan
    mesh, pipe = plan.mesh, plan.pipeline
    small = {"pp": min(mesh.pp, 4), "tp": min(mesh.tp, 4), "dp_replicate": min(mesh.dp_replicate, 2),
             "dp_shard": min(mesh.dp_shard, 2), "cp": _context(plan)}  # fmt: skip
    small |= _expert_axes(plan, small["dp_shard"] * small["cp"] * small["tp"], small["tp"])
    microbatches = min(plan.num_microbatches, 2 * small["pp"])
    plan = replace(
        plan,
        mesh=replace(mesh, **small),
        pipeline=replace(pipe, num_microbatches=microbatches, split=()),
    )
    if plan.context.method == "hybrid":
        plan = plan.with_("context", ulysses=2)
    heads_ways = small["tp"] * plan.sizes["ulysses"]
    spec = _model(job.model, mesh.tp * job.plan.sizes["ulysses"], heads_ways, small["pp"])
    seq_len = min(job.train.seq_len, 16 * small["tp"] * small["cp"])
    seq_len -= seq_len < job.train.seq_len and _fills_up(job)  # it still does
    spec = replace(spec, max_seq_len=max(seq_len, 1) if spec.has_positions else spec.max_seq_len)
    batch = microbatches * plan.data_parallel_size
    train = replace(job.train, global_batch_size=batch, seq_len=seq_len, micro_batch_size=None)
    out = replace(job, plan=plan, model=spec, train=train)
    size = f"{spec.layers} layers, hidden {spec.hidden}, vocab {spec.vocab}"
    return out, f"{size}, plan {plan}, {batch} x {seq_len} tokens"


def _fills_up(job: Job) -> bool:
    """Whether sequences are filled up until they can be cut."""
    asked = request_of(job)
    return asked.laid_len > asked.seq_len


def _context(plan: Plan) -> int:
    """4 ranks of context parallelism where there were more, so that a hybrid stays one."""
    return min(plan.mesh.cp, 4)


def _model(spec: ModelSpec, tp: int, small_tp: int, pp: int) -> ModelSpec:
    """Few heads, but as many as tp wants, and key/value heads that stay fewer than tp where they were. Of an
    image model two channels of a group for each rank of tp."""
    if spec.image is not None:
        groups = spec.image.groups
        image = replace(spec.image, channels=(2 * groups * small_tp,) * len(spec.image.channels))
        hidden = 4 * groups * small_tp
        return replace(spec, image=image, hidden=hidden, head_dim=0, vocab=min(spec.vocab, 16))
    group = max(spec.heads // spec.kv_heads, 1)
    kv_heads = max(small_tp // 2, 1) if spec.kv_heads < tp else small_tp
    heads = max(kv_heads * min(group, 4), small_tp)
    kv_heads = heads if spec.latent else kv_heads
    layers = 2 * pp + (1 if spec.layers % max(pp, 2) else 0)
    vocab = 96 + spec.vocab % 32 if spec.vocab > 512 else spec.vocab
    return replace(
        spec, layers=layers, hidden=8 * heads, heads=heads, kv_heads=kv_heads, head_dim=8,
        ffn_hidden=12 * small_tp, vocab=vocab, **_latent(spec), **_experts(spec, small_tp),
    )  # fmt: skip


def _latent(spec: ModelSpec) -> dict[str, Any]:
    """Latents narrower than what is made of them; half of a head is rotated."""
    if spec.latent is None:
        return {}
    q = 12 if spec.latent.q else 0
    return {"latent": replace(spec.latent, kv=10, q=q, rope=4, v=6)}


def _expert_axes(plan: Plan, fold: int, tp: int) -> dict[str, int]:
    """ep and etp of 2 where they were more than 1 and the small ranks allow it; etp stays tp where it was."""
    mesh = plan.mesh
    etp = tp if mesh.etp == mesh.tp and not mesh.sp else min(mesh.etp, 2)
    etp = etp if fold % etp == 0 else 1
    return {"etp": etp, "ep": min(mesh.ep, 2) if fold // etp % 2 == 0 else 1}


def _experts(spec: ModelSpec, small_tp: int) -> dict[str, int]:
    """Eight experts or fewer, in as many groups where there are groups; at most one dense layer."""
    if not spec.experts:
        return {}
    experts = min(spec.experts, 8)
    groups = spec.router_groups if experts % spec.router_groups == 0 else 1
    return {
        "experts": experts, "top_k": min(spec.top_k, 2), "expert_ffn_hidden": 12 * small_tp,
        "router_groups": groups, "router_top_groups": min(spec.router_top_groups, groups),
        "dense_layers": min(spec.dense_layers, 1), "expert_every": min(spec.expert_every, 2),
        "shared_experts": min(spec.shared_experts, 1),
    }  # fmt: skip
