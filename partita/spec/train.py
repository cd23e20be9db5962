"""The [data] and [train] tables of a job file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os.path import normpath
from pathlib import Path
from typing import Literal

from partita.base.errors import UsageError

_KEYWORDS = ("python-stdlib", "byte", "idx", "digits")
_PREFIXES = ("hf:", "train:")
TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Where tokens come from. `source` is python-stdlib, a path or glob of .txt .jsonl .parquet, a
    Megatron .bin/.idx prefix, tokens:FILE.npy or hf:NAME[:SPLIT]; of images digits or images:FILE.npz;
    `tokenizer` is byte, train:N or a path; `documents` a FILE.npy, or "idx" for those of a Megatron index.
    `mlm_...`: tokens that are guessed from those around them (masked language modelling)."""

    source: str = "python-stdlib"
    tokenizer: str = "byte"
    eval_fraction: float | None = None  # None: 0.05 of a text source, 0 of tokens:
    eval_source: str | None = None
    mask: str | None = None
    documents: str | None = None
    mlm_probability: float | None = None  # None: 0.15 of an encoder, else 0, next tokens
    mlm_as: tuple[float, float, float] = (0.8, 0.1, 0.1)  # the mask token, any token, itself
    mlm_token: int | None = (
        None  # None: the tokenizer's mask token, or the first id that it leaves free
    )

    def __post_init__(self) -> None:
        if self.eval_fraction is None:
            share = 0.0 if self.source.startswith("tokens:") or self.eval_source else 0.05
            object.__setattr__(self, "eval_fraction", share)
        _within(self, "eval_fraction", 0.0, 0.9)
        if self.mlm_probability is not None:
            _within(self, "mlm_probability", 0.0, 1.0)
        if self.mlm_token is not None:
            _within(self, "mlm_token", 0, 10**9)
        if min(self.mlm_as) < 0 or abs(sum(self.mlm_as) - 1) > 1e-6:
            text = f"{list(self.mlm_as)}: three shares that add up to 1: the mask token, any token, itself"
            raise UsageError(text, key="mlm_as")
        if not self.source:
            raise UsageError("an empty source; python-stdlib is always at hand", key="source")
        if self.tokenizer.startswith("train:"):
            size = self.tokenizer.removeprefix("train:")
            if not (size.isascii() and size.isdigit() and 1 <= int(size[:10]) <= 10_000_000):
                text = f"'{self.tokenizer}' is written train:N, N the vocabulary, e.g. train:1024"
                raise UsageError(text, key="tokenizer")

    def in_folder(self, folder: Path) -> DataSpec:
        """The same with relative paths made absolute; they stand relative to `folder`."""

        def absolute(name: str) -> str:
            if not name or name in _KEYWORDS or name.startswith(_PREFIXES):
                return name
            kind = "images:" if name.startswith("images:") else "tokens:"
            head, colon, path = name.rpartition(kind)
            return head + colon + normpath(folder.absolute() / path)

        found = {
            f: getattr(self, f) for f in ("source", "tokenizer", "eval_source", "mask", "documents")
        }
        return replace(self, **{f: absolute(v) for f, v in found.items() if v is not None})


STATES = {  # element-wise optimizers of torch.optim -> what each keeps of every element, as torch names it
    "adamw": ("exp_avg", "exp_avg_sq"), "sgd": (), "adam": ("exp_avg", "exp_avg_sq"),
    "adamax": ("exp_avg", "exp_inf"), "radam": ("exp_avg", "exp_avg_sq"), "adagrad": ("sum",),
    "adadelta": ("square_avg", "acc_delta"), "rmsprop": ("square_avg",),
    "nadam": ("exp_avg", "exp_avg_sq"), "asgd": ("ax",), "rprop": ("prev", "step_size"),
}  # fmt: skip
WITH_MOMENTUM = ("sgd", "rmsprop")
PASSES = {  # those without a fused kernel -> numbers of an element that torch's operators read and write,
    # one after the other (torch/optim/*.py, _single_tensor_*, with decay): adagrad's are the gradient and
    # decay 3, sum 3, root 2, eps 2, the weight 4
    "adamax": 19, "radam": 29, "nadam": 25, "adagrad": 14, "adadelta": 30, "rmsprop": 16, "asgd": 10,
    "rprop": 34,
}  # fmt: skip


def states_of(optimizer: str, momentum: float) -> tuple[str, ...]:
    """What an optimizer keeps of every element.

    >>> states_of("rmsprop", 0.9)
    ('square_avg', 'momentum_buffer')
    """
    moves = ("momentum_buffer",) if momentum and optimizer in WITH_MOMENTUM else ()
    return STATES[optimizer] + moves


def passes_of(optimizer: str, momentum: float) -> int:
    """Numbers of an element that an update reads and writes operator by operator; 0: one fused kernel.

    >>> passes_of("rmsprop", 0.9), passes_of("adamw", 0.0)
    (21, 0)
    """
    return PASSES.get(optimizer, 0) + 5 * bool(momentum and optimizer == "rmsprop")


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """How to train; optimizers are torch.optim's formulas, decay acts on matrices only."""

    global_batch_size: int  # sequences
    seq_len: int
    steps: int = 100
    micro_batch_size: int | None = None  # sequences; where the plan leaves num_microbatches open: 1
    optimizer: Literal[
        "adamw",
        "sgd",
        "adam",
        "adamax",
        "radam",
        "adagrad",
        "adadelta",
        "rmsprop",
        "nadam",
        "asgd",
        "rprop",
    ] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0  # 0: off
    warmup_steps: int = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    min_lr: float = 0.0
    eval_every: int = 0
    checkpoint_every: int = 0  # 0: only at the end
    keep_last: int = 2
    comm_timeout_s: float = 60.0
    replay_every: int = 0  # steps between two that are computed twice and compared; 0: never
    track: tuple[str, ...] = ()  # of TRACKERS
    frozen: tuple[str, ...] = ()  # patterns of weights' names that are not trained
    trainable: tuple[str, ...] = ()  # patterns: no other weight is trained

    def __post_init__(self) -> None:
        _within(self, "global_batch_size", 1, 10**9)
        _within(self, "seq_len", 1, 10**9)
        _within(self, "steps", 1, 10**12)
        if self.micro_batch_size is not None:
            _within(self, "micro_batch_size", 1, 10**9)
        for name in ("lr", "weight_decay", "clip_grad_norm", "min_lr"):
            _within(self, name, 0.0, 1e6)
        _within(self, "momentum", 0.0, 1.0)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UsageError(f"{list(self.betas)}: each is within 0 <= beta < 1", key="betas")
        _within(self, "eps", 1e-30, 1.0)
        for name in ("warmup_steps", "eval_every", "checkpoint_every", "replay_every"):
            _within(self, name, 0, 10**12)
        _within(self, "keep_last", 1, 10**6)
        _within(self, "comm_timeout_s", 0.1, 1e6)
        for name in self.track:
            if name not in TRACKERS:
                known = f"{', '.join(TRACKERS)}, which pip install 'partita[track]' brings"
                raise UsageError(f"'{name}' is none of {known}", key="track")
        if self.lr_schedule == "cosine" and self.min_lr > self.lr:
            raise UsageError(f"{self.min_lr} is more than lr {self.lr}", key="min_lr")

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of a step, masked ones too."""
        return self.global_batch_size * self.seq_len


def _within(spec: object, key: str, low: float, high: float) -> None:
    value = getattr(spec, key)
    if not low <= value <= high:
        raise UsageError(f"{value} is not within {low:g}..{high:g}", key=key)
