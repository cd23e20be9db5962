"""A Plan: how a model is cut, as one frozen value. It prints as one line (plan_text.py) and has no
knowledge of a model: num_microbatches may be open until it meets a job.

    world = pp * dp_replicate * dp_shard * cp * tp * split
    the ranks dp_shard * cp * tp of one replica and stage refold as efsdp * ep * etp for experts
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
ASYNCHRONOUS = ("pipedream", "pipedream_2bw")  # schedules that update stages under way
DEFAULT_ORDER = ("tp", "cp", "dp_shard", "dp_replicate", "pp")  # innermost first
_TWO_STAGES = re.compile(
    r"zb_v|v_half|v_min|v_\d+_\d+|dualpipev"
)  # two stages a rank by definition


def has_fixed_stages(schedule: str) -> bool:
    """Whether the schedule itself fixes the stages of a rank at two (zb_v, v_half, dualpipev ...)."""
    return _TWO_STAGES.fullmatch(schedule) is not None


class AxisSizes(dict[str, int]):
    """Axis -> size, which a cache may key by: nobody changes them, and their hash is worked out once."""

    def __hash__(self) -> int:  # type: ignore[override]
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(self.items()))

    def __reduce__(self) -> tuple[type[AxisSizes], tuple[dict[str, int]]]:
        return AxisSizes, (dict(self),)  # another process has other hashes


@dataclass(frozen=True, slots=True)
class MeshPlan:
    """Sizes of the mesh axes; `order` is innermost first; `sp`: sequence parallel with tp."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    sp: bool = False
    order: tuple[str, ...] = DEFAULT_ORDER
    split: int = 1  # of a convolutional model's channels; in the order it stands inside tp


@dataclass(frozen=True, slots=True, eq=False)
class PipelinePlan:
    """Which schedule, and how the layers are split (empty: balanced by cost).

    An open num_microbatches equals 1: it means one microbatch until the plan meets a job.
    """

    schedule: str = "1f1b"
    virtual_stages: int = 1
    num_microbatches: int | None = None  # None: from micro_batch_size, when the plan meets a job
    split: tuple[int, ...] = ()  # layers of each stage
    vertical_sync: bool = (
        False  # of pipedream: every stage uses the version that the first one used
    )
    post_validation: bool = False  # stages update before the step's norm is known, and undo
    costs: tuple[str, ...] = ()  # of auto: what it is made for (spec/stage_costs.py)
    limit: int = 0  # of auto: stage-microbatches that a rank holds at most; 0: any number
    copies: int = 1  # of auto: of every stage at most; 2: microbatches may go both ways

    def __post_init__(self) -> None:
        if has_fixed_stages(self.schedule):
            object.__setattr__(self, "virtual_stages", 2)

    def _key(self) -> tuple[object, ...]:
        m = self.num_microbatches or 1
        same = self.schedule, self.virtual_stages, m, self.split, self.vertical_sync
        return *same, self.post_validation, self.costs, self.limit, self.copies

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PipelinePlan) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True, slots=True)
class DataPlan:
    """ZeRO over dp_shard, in what gradients add up, and the size of reduction buckets."""

    zero_stage: int = 3
    reshard_after_forward: bool = True
    prefetch: int = 1
    bucket_bytes: int = 25_000_000
    accumulate: str = "shard"  # stages 2, 3, over microbatches: shard | whole (reduced once a step)


@dataclass(frozen=True, slots=True)
class ContextPlan:
    """How attention sees the sequence that cp cuts; `ulysses` is the inner degree of a hybrid."""

    method: str = "ring"  # ring | ulysses | hybrid | all_gather, halo of images
    ulysses: int = 1


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """Into how many chunks of its tokens a rank's dispatch is cut: rows of one travel while another's are
    computed on."""

    chunks: int = 1


@dataclass(frozen=True, slots=True)
class RecomputePlan:
    """Which activations backward makes again."""

    mode: str = "none"  # none | selective | full
    every: int = 1  # only every k-th block
    modules: tuple[str, ...] = ("core",)  # selective: core | norm | act
    collectives: str = "repeat"  # of what is replayed: repeat | keep their results


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """The dtype of compute and activations; optimizer states are fp32 (fp64 under fp64)."""

    dtype: str = "fp32"  # fp64 | fp32 | bf16 | fp16 | fp8
    fp8_format: str = "hybrid"  # hybrid (gradients e5m2) | e4m3
    fp8_granularity: str = "tensor"  # what shares a scale: tensor | row | block (of 128)
    fp8_scaling: str = "current"  # current | delayed | static
    rounding: str = (
        "nearest"  # of updated weights: nearest, from masters | stochastic, without them
    )


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """Where states and activations may go besides the device."""

    to: str = "none"  # none | cpu | nvme
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """One frozen value for planner, simulator, trainer, verifier and drawer."""

    mesh: MeshPlan = field(default_factory=MeshPlan)
    pipeline: PipelinePlan = field(default_factory=PipelinePlan)
    data: DataPlan = field(default_factory=DataPlan)
    context: ContextPlan = field(default_factory=ContextPlan)
    expert: ExpertPlan = field(default_factory=ExpertPlan)
    recompute: RecomputePlan = field(default_factory=RecomputePlan)
    precision: PrecisionPlan = field(default_factory=PrecisionPlan)
    offload: OffloadPlan = field(default_factory=OffloadPlan)

    @staticmethod
    def parse(line: str) -> Plan:
        """A plan from its line, e.g. 'pp2:1f1b/4mb tp2+sp bf16'. Raises UsageError."""
        from partita.spec.plan_text import parse

        return parse(line)

    def __str__(self) -> str:
        from partita.spec.plan_text import print_plan

        return print_plan(self)

    @property
    def slug(self) -> str:
        """The line with only [a-z0-9_-]: for file names and test ids."""
        from partita.spec.plan_text import slug

        return slug(self)

    @property
    def world_size(self) -> int:
        """Ranks the plan needs."""
        m = self.mesh
        return m.pp * m.dp_replicate * m.dp_shard * m.cp * m.tp * m.split

    @property
    def data_parallel_size(self) -> int:
        """Ways the samples of a microbatch are cut."""
        return self.mesh.dp_replicate * self.mesh.dp_shard

    @property
    def num_microbatches(self) -> int:
        """Microbatches a step; 1 while open."""
        return self.pipeline.num_microbatches or 1

    @cached_property
    def sizes(self) -> AxisSizes:
        """Size of every axis that a layout may name; cp is the ring, ulysses the inner part."""
        m = self.mesh
        ulysses = self.context.ulysses if self.context.method == "hybrid" else 1
        ulysses = m.cp if self.context.method == "ulysses" else ulysses
        fold = m.dp_shard * m.cp * m.tp
        return AxisSizes(
            pp=m.pp,
            dp_replicate=m.dp_replicate,
            dp_shard=m.dp_shard,
            cp=m.cp // ulysses,
            ulysses=ulysses,
            tp=m.tp,
            split=m.split,
            efsdp=max(fold // (m.ep * m.etp), 1),
            ep=m.ep,
            etp=m.etp,
        )

    def with_(self, section: str, **changes: object) -> Plan:
        """A plan with fields of one section changed."""
        return replace(self, **{section: replace(getattr(self, section), **changes)})
