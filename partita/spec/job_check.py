"""What a job's arithmetic alone shows: ranks, batch, sequence; and the nearest plan that keeps the rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches

from partita.base.errors import Problem
from partita.spec.families import program
from partita.spec.job import Job
from partita.spec.mesh import divisors
from partita.spec.plan import ASYNCHRONOUS, AXES, Plan


def problems_of_job(job: Job) -> list[Problem]:
    """Every problem at once, errors before warnings."""
    found = [
        *_auto(job), *_ranks(job), *_batch(job), *_sequence(job), *_clip(job), *_replay(job), *_frozen(job),
        *_held_out(job), *_objective(job),
    ]  # fmt: skip
    return sorted(found, key=lambda p: p.severity != "error")


def _auto(job: Job) -> Iterator[Problem]:
    if job.auto:
        yield Problem(
            "plan",
            "auto",
            "plan = 'auto' stands for no plan until partita.planner.answers.ask.resolved(job) has searched",
            asked="auto",
            limit="a plan",
        )


def _ranks(job: Job) -> Iterator[Problem]:
    plan, devices = job.plan, job.cluster.devices
    sizes = {axis: getattr(plan.mesh, axis) for axis in (*AXES, "split")}
    larger = {axis: size for axis, size in sizes.items() if size > 1}
    factors = f"{'*'.join(larger)} = " if larger else ""
    factors += f"{'*'.join(map(str, larger.values()))} = " if len(larger) > 1 else ""
    product = f"{factors}{plan.world_size} rank{'s' * (plan.world_size > 1)}"
    if plan.world_size > devices:
        yield Problem(
            "mesh",
            "world",
            f"{product}, the cluster has {devices}",
            asked=str(plan.world_size),
            limit=str(devices),
            nearest=_line(nearest_plan(job)),
        )
    elif plan.world_size < devices:
        yield Problem(
            "mesh",
            "spare",
            f"{product}, {devices - plan.world_size} of {devices} devices stay idle",
            asked=str(plan.world_size),
            limit=str(devices),
            severity="warning",
        )


def _batch(job: Job) -> Iterator[Problem]:
    plan, batch, micro = job.plan, job.train.global_batch_size, job.micro_batch_size
    made = micro * plan.num_microbatches * plan.data_parallel_size
    if made != batch:
        yield Problem(
            "data",
            "batch",
            "micro_batch_size * num_microbatches * dp_replicate * dp_shard = "
            f"{micro}*{plan.num_microbatches}*{plan.mesh.dp_replicate}*{plan.mesh.dp_shard} = {made}, "
            f"global_batch_size is {batch}",
            asked=str(made),
            limit=str(batch),
            nearest=_line(nearest_plan(job)),
        )


def _sequence(job: Job) -> Iterator[Problem]:
    seq_len, longest = job.train.seq_len, job.model.max_seq_len
    if job.model.image is not None and seq_len != 1:
        message = f"an image has one label: train.seq_len is 1, not {seq_len}"
        yield Problem("model", "seq_len", message, asked=str(seq_len), limit="1")
        return
    if seq_len > longest:
        learned = job.model.has_positions
        yield Problem(
            "model",
            "seq_len",
            f"seq_len {seq_len} is longer than max_seq_len {longest}"
            + ("; it has no positions beyond" if learned else "; RoPE was made for no more"),
            asked=str(seq_len),
            limit=str(longest),
            severity="error" if learned else "warning",
        )


def _clip(job: Job) -> Iterator[Problem]:
    """Clipping wants the norm of a whole step's gradient before any of it is applied."""
    name, limit = job.plan.pipeline.schedule, job.train.clip_grad_norm
    if job.plan.mesh.pp > 1 and name in ASYNCHRONOUS and limit:
        yield Problem(
            "pp",
            "clip_grad_norm",
            f"{name} updates stage by stage, so that no gradient norm is there to clip by; "
            f"train.clip_grad_norm is {limit:g}",
            asked=f"train.clip_grad_norm={limit:g}",
            limit="train.clip_grad_norm=0",
            nearest=str(job.plan.with_("pipeline", schedule="1f1b", vertical_sync=False)),
        )


def _replay(job: Job) -> Iterator[Problem]:
    """A step is computed twice from the same weights."""
    pipeline, every = job.plan.pipeline, job.train.replay_every
    asynchronous = job.plan.mesh.pp > 1 and pipeline.schedule in ASYNCHRONOUS
    if every and (asynchronous or pipeline.post_validation):
        what = pipeline.schedule if asynchronous else "pipeline.post_validation"
        yield Problem(
            "pp",
            "replay_every",
            f"{what} updates weights within the step, which so cannot be computed twice; "
            f"train.replay_every is {every}",
            asked=f"train.replay_every={every}",
            limit="train.replay_every=0",
        )


def _frozen(job: Job) -> Iterator[Problem]:
    """Each pattern names a weight, and some weight is left to train."""
    if not job.frozen:
        return
    made = program(job.model, 1, 1)
    names = {made.full_name(i, w.name) for i, b in enumerate(made.blocks) for w in b.weights()}
    for pattern in job.frozen.idle(names):
        near = get_close_matches(pattern, names, 1, 0.3)
        hint = f"; a name is {near[0]}" if near else ""
        message = f"'{pattern}' matches no weight of the model{hint}"
        yield Problem(
            "model", "frozen", message, asked=pattern, limit="a pattern of weights' names"
        )
    if all(map(job.frozen.holds, names)):
        message = f"all {len(names)} weights are frozen: nothing is left to train"
        yield Problem("model", "trainable", message, asked="0", limit="1 trainable weight at least")


def _held_out(job: Job) -> Iterator[Problem]:
    """A share of the source that was asked for, and is trained on all the same."""
    data = job.data
    if not data.eval_fraction:
        return
    if data.eval_source:
        why = "data.eval_source is what is evaluated on, all of data.source is trained on"
    elif data.source.startswith("tokens:"):
        why = (
            "tokens: are trained on as they stand; data.eval_source = 'tokens:FILE.npy' is held out"
        )
    else:
        return
    asked = f"{data.eval_fraction:g}"
    message = f"data.eval_fraction {asked} holds nothing out: {why}"
    yield Problem("data", "eval_fraction", message, asked=asked, limit="0", severity="warning")


def _objective(job: Job) -> Iterator[Problem]:
    """Next tokens are no task for tokens that see them."""
    if job.model.causal and job.mlm_probability:
        asked = f"{job.mlm_probability:g}"
        message = (
            f"data.mlm_probability {asked} masks tokens of a causal model, which guesses them from what "
            "stands before them alone; model.causal = false sees both sides"
        )
        yield Problem("data", "mlm", message, asked=asked, limit="0", severity="warning")
    if not job.model.causal and not job.mlm_probability:
        message = (
            "next tokens are the targets (data.mlm_probability = 0), and with model.causal = false each "
            "token sees its own: mask tokens, or let the model be causal"
        )
        yield Problem(
            "data", "mlm", message, asked="0", limit="data.mlm_probability > 0, e.g. 0.15"
        )


def _line(plan: Plan | None) -> str | None:
    return None if plan is None else str(plan)


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(d for d in divisors(number) if d <= max(limit, 1))


def nearest_plan(job: Job) -> Plan | None:
    """The plan with as little changed as makes ranks and batch come out: replicas go first, then
    shards, context, stages and tensor parallelism; then microbatches. None where micro_batch_size
    alone does not divide the batch."""
    plan, batch = job.plan, job.train.global_batch_size
    micro = job.train.micro_batch_size or 1
    if batch % micro:
        return None
    mesh = plan.mesh
    for axis in ("dp_replicate", "dp_shard", "cp", "pp", "tp", "split"):
        world = replace(plan, mesh=mesh).world_size
        if world > job.cluster.devices:
            size = getattr(mesh, axis)
            room = job.cluster.devices // (world // size)
            mesh = replace(mesh, **{axis: _largest_divisor(size, room)})
    samples = batch // micro
    for axis, other in (("dp_replicate", "dp_shard"), ("dp_shard", "dp_replicate")):
        ways = mesh.dp_replicate * mesh.dp_shard
        if samples % ways:
            kept = getattr(mesh, other)
            fits = [d for d in divisors(getattr(mesh, axis)) if samples % (d * kept) == 0]
            mesh = replace(mesh, **{axis: max(fits, default=1)})
    ways = mesh.dp_replicate * mesh.dp_shard
    if job.train.micro_batch_size is not None:
        m = samples // ways
    else:
        m = _largest_divisor(samples // ways, plan.num_microbatches)
    ulysses = plan.context.ulysses if mesh.cp % max(plan.context.ulysses, 1) == 0 else 1
    split = plan.pipeline.split if mesh.pp == plan.mesh.pp else ()
    changed = replace(plan, mesh=mesh, context=replace(plan.context, ulysses=ulysses))
    pipe = {} if mesh.pp == plan.mesh.pp else {"costs": (), "limit": 0, "copies": 1}
    return changed.with_("pipeline", num_microbatches=m, split=split, **pipe)
