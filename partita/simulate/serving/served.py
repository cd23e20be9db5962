"""What of a plan and a model serves: the mesh of tp, pp and ep; nothing that only training has.

    pp<n> tp<n>[+sp] ep<n> etp<n> dp_shard<n>      dp_shard only as experts need it: dp_shard * tp = ep * etp

Schedule, microbatches, ZeRO, recompute and offload say how to train and are left out. Replicas are servers of
their own, and cp cuts long sequences of training: a plan with either is refused.
"""

from __future__ import annotations

from dataclasses import replace

from partita.base.errors import UsageError
from partita.parallel.room import Request
from partita.spec.frozen import Frozen
from partita.spec.model import ModelSpec
from partita.spec.plan import DataPlan, MeshPlan, PipelinePlan, Plan, PrecisionPlan

DTYPES = ("fp32", "bf16", "fp16", "fp64")
EVERYTHING = Frozen(frozen=("*",))


def request_of(spec: ModelSpec, plan: Plan, dtype: str) -> Request:
    """What the rooms are asked for inference: every weight frozen, one of the longest sequences. Raises
    UsageError for what cannot be served."""
    _require(spec, plan, dtype)
    mesh = plan.mesh
    served = Plan(
        mesh=MeshPlan(
            pp=mesh.pp, dp_shard=mesh.dp_shard, tp=mesh.tp, ep=mesh.ep, etp=mesh.etp, sp=mesh.sp,
            order=mesh.order,
        ),
        pipeline=PipelinePlan(num_microbatches=1, split=_split(plan)),
        data=DataPlan(zero_stage=0),
        precision=PrecisionPlan(dtype=dtype),
    )  # fmt: skip
    unit = mesh.tp if mesh.sp else 1
    return Request(served, _still(spec), -(-spec.max_seq_len // unit) * unit, frozen=EVERYTHING)


def _split(plan: Plan) -> tuple[int, ...]:
    """Layers of each stage, where the plan states them for one stage a rank."""
    return plan.pipeline.split if len(plan.pipeline.split) == plan.mesh.pp else ()


def _still(spec: ModelSpec) -> ModelSpec:
    """The model as it is after training: nothing dropped, no auxiliary loss, no expert that is full."""
    changes: dict[str, object] = {"dropout": 0.0, "lora_dropout": 0.0}
    if spec.experts:
        changes |= {"balance_loss": 0.0, "z_loss": 0.0, "capacity_factor": None}
    return replace(spec, **changes)  # type: ignore[arg-type]


def _require(spec: ModelSpec, plan: Plan, dtype: str) -> None:
    mesh = plan.mesh
    if spec.image is not None:
        raise UsageError("a model of images writes no text: there is nothing to serve", key="model")
    if not spec.causal:
        text = "an encoder (causal = false) writes no text: its tokens see what follows them, so none is next"
        raise UsageError(text, key="model")
    if dtype not in DTYPES:
        raise UsageError(f"'{dtype}' is none of {', '.join(DTYPES)}", key="dtype")
    for axis, why in (
        ("dp_replicate", "replicas are servers of their own: start one for each"),
        ("cp", "context parallelism cuts the sequences of training alone: use tp"),
        ("split", "it cuts convolutions"),
    ):
        if getattr(mesh, axis) > 1:
            size = getattr(mesh, axis)
            raise UsageError(f"{axis}{size} serves nothing: {why}", key="plan")
    if mesh.dp_shard > 1 and mesh.dp_shard * mesh.tp != mesh.ep * mesh.etp:
        raise UsageError(
            f"dp_shard{mesh.dp_shard} with tp{mesh.tp} ep{mesh.ep} etp{mesh.etp}: ranks of dp_shard serve as "
            f"places of experts, so dp_shard * tp = ep * etp: {mesh.dp_shard * mesh.tp} is not "
            f"{mesh.ep * mesh.etp}",
            key="plan",
        )
