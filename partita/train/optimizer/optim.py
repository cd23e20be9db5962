"""The update: torch.optim's element-wise optimizers over flat master buffers, the learning rate, the clip.

The optimizer sees one flat tensor a unit (or a shard of one); it is element-wise, so cutting
changes nothing. Decay acts on tensors of two or more dims only: each flat tensor states whether it
decays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from partita.base.errors import UsageError
from partita.spec.train import states_of

if TYPE_CHECKING:
    from partita.spec.job import TrainSpec

CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s
FUSED_DEVICES = ("cpu", "cuda")
KINDS: dict[
    str, tuple[Any, tuple[str, ...]]
] = {  # torch's class, and what of a job's [train] it takes
    "adamw": (torch.optim.AdamW, ("betas", "eps", "fused")),
    "sgd": (torch.optim.SGD, ("momentum", "fused")),
    "adam": (torch.optim.Adam, ("betas", "eps", "fused")),
    "adamax": (torch.optim.Adamax, ("betas", "eps")),
    "radam": (torch.optim.RAdam, ("betas", "eps")),
    "adagrad": (torch.optim.Adagrad, ("eps",)),
    "adadelta": (torch.optim.Adadelta, ("rho", "eps")),
    "rmsprop": (torch.optim.RMSprop, ("alpha", "eps", "momentum")),
    "nadam": (torch.optim.NAdam, ("betas", "eps")),
    "asgd": (torch.optim.ASGD, ()),
    "rprop": (torch.optim.Rprop, ()),  # which decays nothing
}


def make_optimizer(
    params: Sequence[tuple[str, Tensor, bool]], train: TrainSpec
) -> torch.optim.Optimizer:
    """torch.optim's optimizer, fused where it can be, over `params`: (name, flat master tensor, decays).

    Masters are fp32, or fp64 under fp64; their states take the same dtype. There are two groups,
    with weight decay and without; each keeps the order of `params`, and group["names"] lists their
    names. Set each group's "lr" to learning_rate(...) before `step`. Empty shards are left out.
    """
    decay = [(name, p) for name, p, decays in params if decays and p.numel()]
    plain = [(name, p) for name, p, decays in params if not decays and p.numel()]
    groups = [
        {"params": [p for _, p in group], "names": [n for n, _ in group], "weight_decay": rate}
        for group, rate in ((decay, train.weight_decay), (plain, 0.0))
        if group
    ]
    fused = _can_fuse([p for _, p in decay + plain])
    if not groups:  # a rank whose shards are all empty still steps
        groups = [{"params": [torch.zeros(0)], "names": [], "weight_decay": 0.0}]
    if train.optimizer not in KINDS:
        text = f"train.optimizer is {train.optimizer!r}; accepted: {', '.join(KINDS)}"
        raise UsageError(text, key="train.optimizer")
    kind, own = KINDS[train.optimizer]
    said = {
        "betas": tuple(train.betas), "alpha": train.betas[1], "rho": train.betas[1], "eps": train.eps,
        "momentum": train.momentum, "fused": fused,
    }  # fmt: skip
    return kind(groups, lr=train.lr, **{name: said[name] for name in own})


def state_names(train: TrainSpec) -> tuple[str, ...]:
    """The states the optimizer keeps for every element, as torch names them."""
    return states_of(train.optimizer, train.momentum)


def first_count(train: TrainSpec) -> dict[str, Tensor]:
    """What an optimizer that counts its updates keeps of a parameter besides: none yet."""
    return {} if train.optimizer == "sgd" else {"step": torch.tensor(0.0)}


def state_tensor(optimizer: torch.optim.Optimizer, param: Tensor, name: str) -> Tensor | None:
    """A state of `param`, flat as it is; None before the first step, and for an empty shard."""
    return optimizer.state[param].get(name) if param in optimizer.state else None


def restore_state(
    optimizer: torch.optim.Optimizer, param: Tensor, states: dict[str, Tensor], updates: int,
    train: TrainSpec, fresh: bool = False, step: int | None = None,
) -> None:  # fmt: skip
    """Puts the optimizer where it was after `updates` updates of `param`, by the states it had; the last was
    of step `step` (None: a step is one update). `fresh`: before the first one too, by zeros that are there
    already."""
    if not param.numel() or not (updates or fresh):
        return
    last = updates if step is None else step
    rate = learning_rate(train, last) if updates else optimizer.param_groups[0]["lr"]
    if not updates and "step_size" in states:
        states["step_size"].fill_(rate)
    scalars = _scalars(optimizer, updates, rate)
    optimizer.state[param] = {**states, **{n: x.to(param.device) for n, x in scalars.items()}}


def _scalars(optimizer: torch.optim.Optimizer, updates: int, rate: float) -> dict[str, Tensor]:
    """What torch keeps of a whole parameter after `updates` updates, the last with that rate: their number,
    and what follows from it."""
    if isinstance(optimizer, torch.optim.SGD):
        return {}
    found, group = {"step": float(updates)}, optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.NAdam):
        found["mu_product"] = _mu_product(group["betas"][0], group["momentum_decay"], updates)
    if isinstance(optimizer, torch.optim.ASGD):
        less = (1 + group["lambd"] * rate * updates) ** group["alpha"]
        found["eta"] = rate / less
        found["mu"] = 1 / max(1.0, updates - group["t0"])
    return {name: torch.tensor(x, dtype=torch.float32) for name, x in found.items()}


@lru_cache(maxsize=4)  # every part of every parameter asks for the same
def _mu_product(beta: float, decay: float, updates: int) -> float:
    """NAdam's product of momenta, each rounded to fp32 as torch rounds it; zero from some update on."""
    product = np.float32(1)
    for t in range(1, updates + 1):
        product *= np.float32(beta * (1.0 - 0.5 * 0.96 ** (t * decay)))
        if not product:
            break
    return float(product)


class PartOptimizer:
    """torch's optimizer over one part of a flat tensor at a time, its states given with it."""

    def __init__(
        self, train: TrainSpec, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        decays, self._train = (True, False), train
        self._params = {d: torch.zeros(1, dtype=dtype, device=device) for d in decays}
        named = [(str(decays), p, decays) for decays, p in self._params.items()]
        self._optimizer = make_optimizer(named, train)

    def step(
        self, part: tuple[Tensor, Tensor, dict[str, Tensor]], decays: bool, updates: int, lr: float
    ) -> None:
        """Update `updates` + 1 of (master, gradient, states), in place."""
        master, gradient, states = part
        param, optimizer = self._params[decays], self._optimizer
        set_learning_rate(optimizer, lr)
        param.data, param.grad = master, gradient
        restore_state(optimizer, param, states, updates, self._train, fresh=True)
        optimizer.step()
        optimizer.state.clear()
        param.grad = None


def learning_rate(train: TrainSpec, update: int) -> float:
    """The rate of update `update`, counted from 1.

    lr * min(1, update / warmup_steps); with "cosine", after the warm-up half a cosine from lr at
    the last warm-up update to min_lr at `steps`, where it stays.
    """
    if update < train.warmup_steps:
        return train.lr * update / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.lr
    if train.lr_schedule != "cosine":
        raise UsageError(
            f"train.lr_schedule is {train.lr_schedule!r}; accepted: constant, cosine",
            key="train.lr_schedule",
        )
    length = train.steps - train.warmup_steps
    done = min(1.0, (update - train.warmup_steps) / length) if length > 0 else 1.0
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Every group's rate for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def norm_of(squares: Tensor) -> float:
    """The 2-norm that a sum of squares gives; nan where it is not finite in the end."""
    return math.sqrt(float(squares)) if float(squares) >= 0 else math.nan


def clip_coefficient(norm: float, limit: float) -> float:
    """What gradients of this norm are multiplied by: min(1, limit / (norm + 1e-6)), as
    torch.nn.utils.clip_grad_norm_ does; 1 where `limit` is 0 (no clipping)."""
    return min(1.0, limit / (norm + CLIP_EPSILON)) if limit else 1.0


def _can_fuse(params: Sequence[Tensor]) -> bool:
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in params)
