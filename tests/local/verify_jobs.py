"""Tiny jobs for verify: odd sizes, both families, tokens from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from partita.comm.single import SingleWorld
from partita.spec.job import Job
from partita.spec.plan import Plan

__all__ = ["EXPERTS", "MLA", "QWEN", "SEQ", "SingleWorld", "job", "tokens"]

SEQ = 8
ONE_STAGE = ("1f1b", "gpipe", "zb_h1", "zb_h2", "pipedream", "pipedream_2bw")  # of each rank
MLA: dict[str, Any] = {
    "kv_heads": 4, "head_dim": 6, "latent": {"q": 7, "kv": 9, "rope": 4, "v": 5, "norm_eps": 1e-5},
}  # fmt: skip
QWEN = {"qkv_bias": True, "qk_norm": True}
EXPERTS: dict[str, Any] = {
    "experts": 4, "top_k": 2, "expert_ffn_hidden": 11, "shared_experts": 1, "dense_layers": 1, "layers": 3,
    "router_bias": True, "balance_loss": 0.1, "z_loss": 0.01,
}  # fmt: skip


def tokens(folder: Path, vocab: int = 127) -> Path:
    path = folder / "tokens.npy"
    if not path.exists():
        np.save(path, np.random.default_rng(0).integers(0, vocab, 2000))
    return path


def documents(folder: Path) -> Path:
    """Packed documents of one to nine tokens; numbers return."""
    path = folder / "documents.npy"
    if not path.exists():
        dice = np.random.default_rng(1)
        lengths = dice.integers(1, 10, 2000)
        np.save(path, np.repeat(dice.integers(0, 50, 2000), lengths)[:2000])
    return path


def few_layers(plan: str) -> int:
    """3: a first, a middle, a last one, and two stages that differ; 5 where there are more stages."""
    read = Plan.parse(plan)
    few = read.mesh.pp == 1 or (read.mesh.pp == 2 and read.pipeline.schedule in ONE_STAGE)
    return 3 if few else 5


def job(
    folder: Path,
    plan: str,
    family: str = "llama",
    batch: int = 8,
    packed: bool = False,
    seq: int = SEQ,
    **model,
) -> Job:
    """kv_heads 2 (fewer than tp4), vocab 127 and ffn 23 (padded), 3 or 5 layers (uneven stages)."""
    spec = {
        "family": family, "layers": few_layers(plan), "hidden": 16, "heads": 4, "ffn_hidden": 23,
        "vocab": 127, "max_seq_len": seq, "tied": family in ("gpt2", "bloom"),
    }  # fmt: skip
    if family == "llama":
        spec["kv_heads"] = 2
    return Job.load(
        {
            "name": "tiny",
            "seed": 3,
            "plan": plan,
            "model": {**spec, **model},
            "cluster": {"preset": "laptop", "devices": 64, "memory_bytes": 1e9},
            "data": {"source": f"tokens:{tokens(folder)}"}
            | ({"documents": str(documents(folder))} if packed else {})
            | ({} if model.get("causal", True) else {"mlm_token": 126}),
            "train": {"steps": 2, "global_batch_size": batch, "seq_len": seq, "comm_timeout_s": 20},
        }
    )
