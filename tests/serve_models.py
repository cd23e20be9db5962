"""Small models of every family with random weights, for runners and what stands on them; and a walk through
sequences in random pieces."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from partita.model.reference import Reference, weight_shapes
from partita.serve.part import Opening
from partita.serve.piece import Piece
from partita.serve.weights import fill_from
from partita.simulate.serving.served import request_of
from partita.spec.model import ModelSpec
from partita.spec.model_parts import Latent
from partita.spec.plan import Plan

PAGE, PAGES, MAX_LEN = 4, 40, 48
LLAMA = {"family": "llama", "kv_heads": 2, "ffn_hidden": 36}
MOE = {**LLAMA, "experts": 4, "top_k": 2, "expert_ffn_hidden": 12}
FAMILIES = {
    "llama": LLAMA,
    "sliding": {
        **LLAMA, "layers": 3, "sliding_window": 7, "attention_pattern": "sfn", "local_rope_theta": 50.0,
    },
    "gemma": {
        **LLAMA, "sliding_window": 7, "attention_pattern": "sf", "norm_placement": "both", "gate": "gelu",
        "attention_softcap": 1.5, "logit_softcap": 2.0, "query_scalar": 7, "embedding_scale": 4.0,
        "tied": True,
    },
    "qwen2": {**LLAMA, "qkv_bias": True, "tied": True},
    "qwen3": {**LLAMA, "qk_norm": True},
    "gpt2": {"family": "gpt2"},
    "neox": {"family": "gpt_neox", "parallel_residual": True, "rotary_pct": 0.5, "gelu": "erf"},
    "bloom": {"family": "bloom"},
    "latent": {
        **LLAMA, "kv_heads": 4, "head_dim": 12, "latent": Latent(kv=8, rope=4, v=6, q=10),
    },
    "lora": {**LLAMA, "lora_rank": 2, "lora_dropout": 0.5},
    "moe": MOE,
    "switch": {**MOE, "top_k": 1, "capacity_factor": 8.0, "shared_experts": 1, "balance_loss": 0.01},
}  # fmt: skip


def model(name: str, **changes: object) -> ModelSpec:
    """A model of a family, two layers."""
    sizes = {"layers": 2, "hidden": 32, "heads": 4, "vocab": 37, "max_seq_len": MAX_LEN}
    return ModelSpec(**{**sizes, **FAMILIES[name], **changes})


@dataclass
class Random:
    """Weights of a seed, fp64; norms about 1."""

    spec: ModelSpec
    seed: int = 0

    def values(self) -> dict[str, Tensor]:
        """All logical tensors by name."""
        draw = torch.Generator().manual_seed(self.seed)
        made = {}
        for name, shape in weight_shapes(self.spec).items():
            x = torch.randn(shape, generator=draw, dtype=torch.float64) * 0.3
            made[name] = x + 1 if name.endswith("norm") else x
        return made

    def fill(self, laid, rank, units) -> None:
        """What a rank holds."""
        held = self.values()
        fill_from(lambda n, box: held[n][tuple(slice(*b) for b in box)], laid, rank, units)

    def reference(self) -> Reference:
        """The judge."""
        judge = Reference(self.spec, self.values())
        judge.training = False
        return judge


def opening(spec: ModelSpec, plan: str = "", dtype: str = "fp64", device: str = "cpu") -> Opening:
    """What ranks of a plan are given."""
    request = request_of(spec, Plan.parse(plan), dtype)
    return Opening(request, Random(spec), PAGES, PAGE, device)


def sequences(spec: ModelSpec, *lengths: int) -> list[list[int]]:
    """Random ids."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(spec.vocab, (n,), generator=draw).tolist() for n in lengths]


def walk(ids: list[list[int]], seed: int = 0, sizes=(1, 1, 2, 5, 19)) -> Iterator[list[Piece]]:
    """Steps that run all sequences to their ends in pieces of random sizes, some or all of them in a step, in
    any order, in pages of any order; logits of every token are wanted."""
    draw = random.Random(seed)
    free = list(range(PAGES))
    draw.shuffle(free)
    tables = [[free.pop() for _ in range(-(-len(x) // PAGE))] for x in ids]
    at = [0] * len(ids)
    while left := [i for i, x in enumerate(ids) if at[i] < len(x)]:
        step = []
        for i in draw.sample(left, draw.randint(1, len(left))):
            end = min(at[i] + draw.choice(sizes), len(ids[i]))
            tokens = tuple(ids[i][at[i] : end])
            step.append(Piece(tokens, at[i], tuple(tables[i]), len(tokens)))
            at[i] = end
        yield step


def greatest_difference(runner, spec: ModelSpec, seed: int = 0, lengths=(31, 9, 1)) -> float:
    """Between a runner's logits on a walk and the reference's on whole sequences."""
    ids = sequences(spec, *lengths)
    judge = Random(spec).reference()
    whole = [judge.logits(torch.tensor([x]))[0] for x in ids]
    worst = 0.0
    for step in walk(ids, seed):
        made = runner.run(step)
        for piece in step:
            mine, made = made[: piece.want], made[piece.want :]
            of = next(
                i for i, x in enumerate(ids) if piece.tokens == tuple(x[piece.start : piece.end])
            )
            right = whole[of][piece.start : piece.end]
            worst = max(worst, (mine - right).abs().max().item())
        assert not len(made)
    return worst
