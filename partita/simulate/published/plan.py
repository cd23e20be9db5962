"""The plan of a row of published runs, as its columns tell it."""

from __future__ import annotations

import re

from partita.simulate.published.cells import Row, UnpredictableError, method, number
from partita.spec.plan import Plan

RAN_AGAIN = 7 / 6  # HFU over MFU: half way from a forward that is not run again to one that is
SCHEDULES = {
    "": "1f1b", "none": "1f1b", "1f1b": "1f1b", "1f1b-interleaved": "interleaved_1f1b",
    "1f1b-interleaved(tunable n)": "interleaved_1f1b", "zb-1p": "zb_h1", "zb-h1": "zb_h1",
    "zb-2p": "zb_h2", "zb-h2": "zb_h2", "dualpipe": "dualpipe",
}  # fmt: skip
FINEST = ("zb-", "llama3")  # interleaved as finely as can be: one layer a chunk
BUT = "full(but "  # what of layers that run again is kept
GATHERS = (
    "titan",
)  # cp gathers keys and values whole (context_parallel_rotate_method "allgather")
REPLICAS = "DP over DCN"  # MaxText: each slice holds the whole model, cut over its own devices


def plan_of(row: Row, batch: int) -> tuple[Plan, int]:
    """The plan of a row and its microbatch size."""
    tp, pp, cp = (number(row, a, 1) for a in ("tp", "pp", "cp"))
    devices = number(row, "n_gpus")
    dp = number(row, "dp", max(devices // (tp * pp * cp), 1))
    micro = number(row, "microbatch_size", 1)
    if tp * pp * cp * dp != devices:
        ranks = f"{tp}*{pp}*{cp}*{dp} ranks"
        raise UnpredictableError(f"a contradiction: {ranks} are not {devices} devices")
    if batch % (micro * dp):
        raise UnpredictableError(f"a contradiction: {batch} is no multiple of {micro} * {dp}")
    vpp = number(row, "vpp", 1)
    name = SCHEDULES.get(row["schedule"].lower())
    if name is None:
        raise UnpredictableError(f"a schedule that is not described: {row['schedule']}")
    if name == "interleaved_1f1b" and row["group"].startswith(FINEST):
        vpp = -(-number(row, "layers") // pp)
    if pp == 1 or (name == "interleaved_1f1b" and vpp == 1):
        name, vpp = "1f1b", 1
    ep, etp = number(row, "ep", 1), number(row, "etp", 1)
    sp = row["seqpar"] == "yes" and tp > 1
    plan = Plan().with_("mesh", pp=pp, tp=tp, cp=cp, ep=ep, etp=etp, sp=sp)
    plan = plan.with_(
        "pipeline", schedule=name, virtual_stages=vpp, num_microbatches=batch // (micro * dp)
    )
    if cp > 1 and row["group"].startswith(GATHERS):
        plan = plan.with_("context", method="all_gather")
    plan = _sharded(_even(plan, row), row, dp)
    mode = "none" if row["recompute"].startswith(BUT) else recompute_of(row)  # works.py
    return plan.with_("recompute", mode=mode).with_("precision", dtype=_dtype(row)), micro


def _even(plan: Plan, row: Row) -> Plan:
    """As many layers on every stage, where they divide; one fewer on the first and the last, where then
    they divide; else the balanced split stands."""
    layers, stages = number(row, "layers"), plan.mesh.pp * plan.pipeline.virtual_stages
    if stages == 1:
        return plan
    if method(row) == "redis":
        return plan.with_("pipeline", split=_redistributed(row, layers, stages))
    if layers % stages == 0:
        return plan.with_("pipeline", split=(layers // stages,) * stages)
    if (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        return plan.with_("pipeline", split=(each - 1, *(each,) * (stages - 2), each - 1))
    return plan


def _redistributed(row: Row, layers: int, stages: int) -> tuple[int, ...]:
    """Layers so that the dearest stage has the least FLOPs, the head counted, which may have its stage alone;
    ties go to the fullest last stage, and long stages come last (Yeung et al. 2024, 2411.05288)."""
    seq, hidden, vocab = (number(row, c) for c in ("seq_len", "hidden", "vocab"))
    head = vocab / (12 * hidden * (1 + seq / (6 * hidden)))  # in layers (Narayanan et al. 2021)
    last = min(range(layers), key=lambda k: (max(-(-(layers - k) // (stages - 1)), k + head), -k))
    each, more = divmod(layers - last, stages - 1)
    return (*(each + (i >= stages - 1 - more) for i in range(stages - 1)), last)


def _sharded(plan: Plan, row: Row, dp: int) -> Plan:
    """ZeRO's stage, over as many ranks as stand in brackets; else over a node's or slice's, or all."""
    text = row["zero_or_fsdp"]
    stages = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp(zero2-like)": 1, "fsdp": 3, "hsdp": 3}
    stage = next((s for start, s in stages.items() if text.startswith(start)), 0)
    if not stage:
        return plan.with_("mesh", dp_replicate=dp)
    mesh = {"dp_replicate": 1, "dp_shard": dp}
    if over := re.search(r"\((\d+)\)$", text):
        ranks = int(over[1])
        if not ranks or dp % ranks:
            raise UnpredictableError(f"a contradiction: {text} of {dp} data parallel ranks")
        mesh = {"dp_replicate": dp // ranks, "dp_shard": ranks}
    elif REPLICAS in row["notes"] or text.startswith("hsdp"):
        slices = number(row, "n_gpus") // number(row, "gpus_per_node")
        mesh = {"dp_replicate": slices, "dp_shard": dp // slices}
    return plan.with_("mesh", **mesh).with_("data", zero_stage=stage)


def recompute_of(row: Row) -> str:
    """A row that says nothing but HFU beside MFU runs its forward again where the two are so far apart."""
    text = row["recompute"]
    hardware = re.search(r"HFU (\d+\.?\d*)%", row["notes"])
    if not text and hardware and row["metric"] == "mfu":
        return "full" if float(hardware[1]) > RAN_AGAIN * float(row["value"]) else "none"
    if text.startswith("full"):
        return "none" if "layer" in text else "full"
    return "selective" if text.startswith("selective") else "none"


def _dtype(row: Row) -> str:
    text = row["precision"]
    return "fp8" if text.startswith(("fp8", "mxfp8", "nvfp4")) else "bf16"
