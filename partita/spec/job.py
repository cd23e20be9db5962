"""A job: a model, a cluster, a plan, data and how to train. One TOML file; every verb reads it.

    global_batch_size = micro_batch_size * num_microbatches * dp_replicate * dp_shard

The job owns the first and the plan num_microbatches; a plan that leaves it open gets it here, from
micro_batch_size (1 unless stated).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from partita.base.config import decode, encode, to_toml
from partita.base.errors import PlanError, Problem, UsageError
from partita.spec.cluster import Cluster
from partita.spec.frozen import Frozen
from partita.spec.lora import A, B
from partita.spec.model import ModelSpec
from partita.spec.plan import Plan
from partita.spec.train import DataSpec, TrainSpec

MLM = 0.15  # of an encoder's tokens, where a job says nothing: BERT's
ADAPTERS = Frozen(trainable=(f"*{A}", f"*{B}"))
__all__ = ["DataSpec", "Job", "TrainSpec"]


def require_job(given: object, what: str) -> None:
    """Raises UsageError where a caller gave `what` something else than a Job, a path perhaps."""
    if not isinstance(given, Job):
        raise UsageError(
            f"{what} takes a Job, not {type(given).__name__}: Job.load reads a job file or a table,"
            " Job.of makes one from a model, a cluster and a plan"
        )


@dataclass(frozen=True)
class Job:
    """What every verb reads. `plan` is resolved: its num_microbatches is set. `model_path` is the
    folder of the weights when `init` is pretrained, `adapter_path` that of LoRA's; `file` where the job was
    read. `auto`: the plan is still to be searched for (`partita.planner.answers.ask.resolved`), `plan` is
    empty until then."""

    model: ModelSpec
    cluster: Cluster
    train: TrainSpec
    plan: Plan = field(default_factory=Plan)
    data: DataSpec = field(default_factory=DataSpec)
    name: str = "run"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    init: Literal["random", "pretrained"] = "random"
    model_path: str | None = None
    adapter_path: str | None = None
    file: str | None = field(default=None, compare=False)
    auto: bool = False
    survive: tuple[str, ...] = ()  # plans for fewer ranks, where some are lost

    def __post_init__(self) -> None:
        for line in self.survive:
            _plan_of(line, "survive")
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", self.name):
            text = f"{self.name[:100]!r} names a folder: letters, digits, dot, dash and underscore"
            raise UsageError(text, key="name")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"{self.seed} is not within 0 <= seed < 2^63", key="seed")
        if self.init == "pretrained" and self.model_path is None:
            raise UsageError(
                "'pretrained' takes the weights of model.path, which is missing", key="model.init"
            )
        if self.plan.pipeline.num_microbatches is None:
            samples = (self.train.micro_batch_size or 1) * self.plan.data_parallel_size
            m = max(self.train.global_batch_size // samples, 1)
            object.__setattr__(self, "plan", self.plan.with_("pipeline", num_microbatches=m))

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one microbatch on one data-parallel rank."""
        if self.train.micro_batch_size is not None:
            return self.train.micro_batch_size
        ways = self.plan.num_microbatches * self.plan.data_parallel_size
        return max(self.train.global_batch_size // ways, 1)

    @property
    def mlm_probability(self) -> float:
        """The share of tokens that are guessed from those around them; 0: each token's next one is."""
        stated = self.data.mlm_probability
        return (0.0 if self.model.causal else MLM) if stated is None else stated

    @property
    def frozen(self) -> Frozen:
        """Which weights are not trained; with LoRA, unless patterns say otherwise, all but its own."""
        stated = Frozen(self.train.frozen, self.train.trainable)
        return ADAPTERS if self.model.lora_rank and not stated else stated

    @staticmethod
    def load(source: str | Path | Mapping[str, Any], *overrides: str) -> Job:
        """A job from its TOML file or a table, with overrides 'section.field=value', 'plan=<line>' and
        'plan.section.field=value'. Relative paths stand relative to the file's folder.

        Raises UsageError that names file and key."""
        from partita.spec.job_read import read_job

        return read_job(source, overrides)

    @staticmethod
    def of(
        model: str | Path | Mapping[str, Any],
        cluster: str | Path | Mapping[str, Any],
        plan: str | Plan = "",
        *,
        micro_batch_size: int | None = None,
        **train: Any,
    ) -> Job:
        """A job from its parts, for `simulate` and `plan`: global_batch_size and seq_len are wanted.

        >>> Job.of("llama3-8b", "8xh100", "tp8+sp", global_batch_size=8, seq_len=8192).micro_batch_size
        1
        """
        stated = {"micro_batch_size": micro_batch_size} if micro_batch_size is not None else {}
        return Job(
            model=ModelSpec.load(model),
            cluster=Cluster.load(cluster),
            plan=_plan_of(plan),
            train=decode(TrainSpec, {**stated, **train}),
        )

    def with_plan(self, plan: Plan | str) -> Job:
        """The same job under another plan."""
        return replace(self, plan=_plan_of(plan), auto=False)

    def for_ranks(self, ranks: int) -> Job:
        """The same job under the first plan of `survive` that has so many ranks; itself where its own has
        them, or none does."""
        lines = () if ranks == self.plan.world_size else self.survive
        plans = (_plan_of(line, "survive") for line in lines)
        return next((self.with_plan(p) for p in plans if p.world_size == ranks), self)

    def problems(self) -> list[Problem]:
        """What the job's arithmetic alone shows; the rooms find the rest."""
        from partita.spec.job_check import problems_of_job

        return problems_of_job(self)

    def require_legal(self) -> None:
        """Raises PlanError with what `problems` refuses, on however many devices the ranks are."""
        wrong = [p for p in self.problems() if p.severity == "error" and p.rule != "world"]
        if wrong:
            raise PlanError(f"{self.plan} cannot run {self.name}", wrong)

    def to_table(self) -> dict[str, Any]:
        """The job file as resolved: no preset, no path that is relative, the plan as its line."""
        model = {"init": self.init, **self.model.to_toml()}
        if self.model_path is not None:
            model["path"] = self.model_path
        if self.adapter_path is not None:
            model["adapter"] = self.adapter_path
        return {
            "name": self.name,
            "seed": self.seed,
            "device": self.device,
            "plan": "auto" if self.auto else str(self.plan),
            **({"survive": list(self.survive)} if self.survive else {}),
            "model": model,
            "cluster": self.cluster.to_toml(),
            "data": encode(self.data),
            "train": encode(self.train),
        }

    def to_toml(self) -> str:
        """The text of the job file as resolved; Job.load reads it back as an equal job."""
        return to_toml(self.to_table())


def _plan_of(stated: Plan | str, key: str = "plan") -> Plan:
    """A plan, or that of a line. Raises UsageError under the key."""
    if isinstance(stated, Plan):
        return stated
    try:
        return Plan.parse(stated)
    except UsageError as error:
        error.key = key
        raise
