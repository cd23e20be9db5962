"""The jobs of the covering array: a row's plan for a small model of its family."""

from dataclasses import replace

import covering
import image_jobs
import verify_jobs

from partita.base.errors import PartitaError, PlanError
from partita.parallel.laid import lay
from partita.simulate.predict import request_of

ROWS = covering.rows()
# Two stages with halves on both ends, backward out of order: what no name makes
LISTS = """0F0,0F1,0F2,0I0,0F3,0I2,0W0,0I1,0W2,0W1,0I3,0W3
1F0,1I0,1F1,1F2,1I2,1W0,1I1,1F3,1I3,1W1,1W2,1W3
"""


def job(folder, row):
    """Three layers on at most two stages, four on four. Qwen's heads are wide enough for norms of heads to be
    no sums of numbers that cancel (docs/verify.md)."""
    given = folder / "lists.csv"
    given.write_text(LISTS)
    plan, (family, *words) = covering.line(row, str(given)), row["family"].split()
    if family == "alexnet":
        low = {"lora_rank": 2, "lora_dropout": 0.1, "lora_targets": ("linear", "kernel")}
        low = low if row["trains"] == "lora" else {}
        return trained(row, image_jobs.job(folder, plan, batch=16, **low))
    model = {"layers": 4 if covering.kind(row) in covering.CHUNKS else 3}
    if family == "moe":
        every = 1 if words or row["experts"] or row["slices"] else 2
        family, model = "llama", {**verify_jobs.EXPERTS, **model, "expert_every": every}
    if family == "qwen":
        family, model = "llama", {**verify_jobs.QWEN, **model, "tied": True, "head_dim": 8}
    if "mla" in words:
        model |= {**verify_jobs.MLA, "router": "sigmoid", "router_groups": 2}
    if row["slices"] and "experts" in model:
        model["shared_gate"] = True
    if family == "gpt_neox":
        model |= {"parallel_residual": True, "rotary_pct": 0.5}
    if family == "gpt2":
        model["dropout"] = 0.1
    if row["sees"] == "window":
        model |= {"sliding_window": 3, "attention_pattern": "sf"}
        if family in ("llama", "gpt_neox"):
            pattern = "sf" if "latent" in model else "sfn"
            model |= {"attention_pattern": pattern, "local_rope_theta": 50.0}
    if row["sees"] == "documents" and ("qk_norm" in model or family == "gpt_neox"):
        model["causal"] = False  # an encoder, of masked tokens
    if row["trains"] == "lora":
        targets = ("wq", "wo", *(("expert_gate_up", "expert_down") if "experts" in model else ()))
        model |= {"lora_rank": 2, "lora_targets": targets, "lora_dropout": 0.1}
    packed, batch = row["sees"] == "documents", 16 if row["replicas"] and row["shards"] else 8
    return trained(row, verify_jobs.job(folder, plan, family, batch, packed, **model))


def trained(row, made):
    """Some weights frozen, or none; without a global norm where stages update on their own."""
    clips = 0.0 if covering.kind(row) == "versions" else made.train.clip_grad_norm
    frozen = ("embedding.*", "blocks.1.*") if row["trains"] == "frozen" else ()
    return replace(made, train=replace(made.train, clip_grad_norm=clips, frozen=frozen))


def refusals(folder, pair):
    """What says no to a pair, in the plan of several that least else is wrong with; each is refused."""
    a, x, b, y = pair
    plain = {name: values[0] for name, values in covering.FEATURES.items()}
    bases = (
        {**plain, "family": family, "shards": shards, "precision": "bf16", a: x, b: y}
        for family in ("gpt_neox", "moe", "alexnet")
        for shards in ("", "dp_shard2.zero1", "dp_shard2.zero3")
    )
    found = []
    for row in {covering.name(row): row for row in bases}.values():
        try:
            lay(request_of(job(folder, row)))
        except PlanError as error:
            found.append([f"`{p.room}`, {p.rule}: {p.message}" for p in error.problems])
        except PartitaError as error:
            found.append([str(error)])
        else:
            raise AssertionError(f"{covering.name(row)} is laid, and {pair} is left out")
    return min(found, key=len)
