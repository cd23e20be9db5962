"""The judge's start and updates, which share no line with those they judge: weights drawn from their
definition (model/reference_draws.py); torch.optim's plain loops, one tensor a weight; the rate, the clip and
which weights decay as docs/data.md and the job file promise them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import cos, pi
from typing import Any

import torch
from torch import Tensor

from partita.model.reference import weight_shapes
from partita.model.reference_draws import new_weight, normals, rounded
from partita.spec.families import program
from partita.spec.job import Job
from partita.spec.model import ModelSpec
from partita.spec.train import TrainSpec
from partita.train.build import DTYPES

WITHOUT_DECAY = ("norm", "bias")  # ops whose weights are vectors in other models' files
MOVED_BY_ROWS = ".router.balance_bias"


def optimizers(train: TrainSpec, delayed: bool = False) -> list[TrainSpec]:
    """SGD with momentum at a large rate, while it warms up; AdamW, while it falls; then the job's own, if it
    is another, as AdamW. Decay and clipping are
    active in both. Delayed updates have no norm to clip by, and are several a step, at smaller rates: AdamW
    turns a rounding into a whole step."""
    active = replace(train, weight_decay=0.1, clip_grad_norm=0.0 if delayed else 0.5, steps=4)
    rate, small = (0.01, 1e-3) if delayed else (0.5, 1e-2)
    sgd = replace(
        active, optimizer="sgd", lr=rate, momentum=0.9, warmup_steps=2, lr_schedule="constant"
    )
    adamw = replace(
        active, optimizer="adamw", lr=small, warmup_steps=1, lr_schedule="cosine", min_lr=small / 10
    )
    if train.optimizer in ("sgd", "adamw"):
        return [sgd, adamw]
    return [sgd, adamw, replace(adamw, optimizer=train.optimizer, momentum=train.momentum)]


def rate_of(train: TrainSpec, update: int) -> float:
    """lr * min(1, s / warmup_steps) of update s, from 1; then cosine from lr to min_lr at `steps`."""
    if update <= train.warmup_steps:
        return train.lr * update / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.lr
    done = (update - train.warmup_steps) / (train.steps - train.warmup_steps)
    return train.min_lr + (train.lr - train.min_lr) * (1 + cos(pi * min(done, 1))) / 2


def vectors(model: ModelSpec) -> frozenset[str]:
    """Full names of the scales and biases: what has one dim, however it is cut here."""
    made = program(model)
    return frozenset(
        made.full_name(i, w)
        for i, block in enumerate(made.blocks)
        for op in block.ops()
        if op.kind in WITHOUT_DECAY
        for w in op.weights
    )


def wide_dtype(job: Job) -> torch.dtype:
    """Of masters, gradients and the judge's weights."""
    return torch.float64 if job.plan.precision.dtype == "fp64" else torch.float32


def noise(job: Job, dtype: torch.dtype) -> dict[str, Tensor]:
    """What every weight is perturbed by, on both sides: shared, never to be written to."""
    return _noise(job.model, job.seed, dtype)


@lru_cache(maxsize=4)  # a plan's ranks, its judge and its trials start alike
def _noise(model: ModelSpec, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = weight_shapes(model).items()
    return {n: normals(seed, f"verify/{n}", shape, 0.05).to(dtype) for n, shape in shapes}


@lru_cache(maxsize=4)
def _new(model: ModelSpec, seed: int) -> dict[str, Tensor]:
    return {n: new_weight(seed, n, x, model.layers) for n, x in weight_shapes(model).items()}


def start_weights(job: Job, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight as both runs start from it. Frozen ones have no masters, nor has any where updates are
    rounded at random: they are what the compute dtype holds of them."""
    new, off = _new(job.model, job.seed), noise(job, dtype)
    weights = {n: w.to(dtype) + off[n] for n, w in new.items()}
    compute = DTYPES[job.plan.precision.dtype]
    if job.plan.precision.rounding == "stochastic":
        return {n: w.to(compute).to(dtype) for n, w in weights.items()}
    return weights | {n: w.to(compute).to(dtype) for n, w in weights.items() if job.frozen.holds(n)}


def _optimizer(
    train: TrainSpec, groups: list[dict[str, Any]], plain: dict[str, Any]
) -> torch.optim.Optimizer:
    (b1, b2), eps, momentum = train.betas, train.eps, train.momentum
    match train.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, momentum=momentum, **plain)
        case "adam":
            return torch.optim.Adam(groups, betas=(b1, b2), eps=eps, **plain)
        case "adamax":
            return torch.optim.Adamax(groups, betas=(b1, b2), eps=eps, **plain)
        case "radam":
            return torch.optim.RAdam(groups, betas=(b1, b2), eps=eps, **plain)
        case "adagrad":
            return torch.optim.Adagrad(groups, eps=eps, **plain)
        case "adadelta":
            return torch.optim.Adadelta(groups, rho=b2, eps=eps, **plain)
        case "rmsprop":
            return torch.optim.RMSprop(groups, alpha=b2, eps=eps, momentum=momentum, **plain)
        case "nadam":
            return torch.optim.NAdam(groups, betas=(b1, b2), eps=eps, **plain)
        case "asgd":
            return torch.optim.ASGD(groups, **plain)
        case "rprop":
            return torch.optim.Rprop(groups, **plain)
        case _:
            return torch.optim.AdamW(groups, betas=(b1, b2), eps=eps, **plain)


@dataclass(frozen=True)
class JudgeUpdate:
    """The judge's optimizer; an expert's balance bias moves by its rows instead."""

    job: Job
    weights: dict[str, Tensor]
    biases: list[str]
    frozen: frozenset[str]
    optimizer: torch.optim.Optimizer

    @staticmethod
    def of(job: Job, dtype: torch.dtype) -> JudgeUpdate:
        """Over every weight that is trained."""
        weights, train = start_weights(job, dtype), job.train
        frozen = frozenset(n for n in weights if job.frozen.holds(n))
        biases = [n for n in weights if n not in frozen and n.endswith(MOVED_BY_ROWS)]
        moved, flat = (
            [n for n in weights if n not in frozen and n not in biases],
            vectors(job.model),
        )
        groups = [
            {"params": [weights[n] for n in moved if n not in flat], "weight_decay": train.weight_decay},
            {"params": [weights[n] for n in moved if n in flat], "weight_decay": 0.0},
        ]  # fmt: skip
        groups, plain = [g for g in groups if g["params"]], {"lr": 0.0, "foreach": False}
        return JudgeUpdate(job, weights, biases, frozen, _optimizer(train, groups, plain))

    def restart(self, weights: dict[str, Tensor]) -> None:
        """Goes on from these weights."""
        for name, value in weights.items():
            self.weights[name].copy_(value)

    def norm(self, gradients: dict[str, Tensor]) -> float:
        """The 2-norm of all gradients; where a bias has its own stand rows."""
        squares = [g.double().square().sum() for n, g in gradients.items() if n not in self.biases]
        return float(torch.stack(squares).sum().sqrt())

    def step(
        self, gradients: dict[str, Tensor], norm: float, step: int, update: int | None = None
    ) -> None:
        """Clips the gradients by their norm, in place, and updates the weights that have one; steps count
        from 0, as do updates within one, whose number `update` is where a step has several."""
        limit = self.job.train.clip_grad_norm
        if limit:
            for g in (g for n, g in gradients.items() if n not in self.biases):
                g.mul_(min(1.0, limit / (norm + 1e-6)))  # torch.nn.utils.clip_grad_norm_'s
        for group in self.optimizer.param_groups:
            group["lr"] = rate_of(self.job.train, step + 1)
        for n, w in self.weights.items():
            w.grad = gradients.get(n)
        self.optimizer.step()
        for n in (n for n in self.biases if n in gradients):
            rows = gradients[n]
            self.weights[n] += self.job.model.router_bias_rate * (rows.mean() - rows).sign()
        if self.job.plan.precision.rounding == "stochastic":
            for n in gradients.keys() - self.frozen:
                w, number = self.weights[n], (step if update is None else update) + 1
                half = self.job.plan.precision.dtype == "fp16"
                w.copy_(rounded(w, self.job.seed, number, n, half))
