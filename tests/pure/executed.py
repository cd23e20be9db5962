"""Executed plans beside one device: used by tests of the executor and of the rooms."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from partita.parallel.ep.counts import Routing
from partita.parallel.exact.algebra import ExecuteError
from partita.parallel.exact.execute import Execution, Outcome, execute
from partita.parallel.laid import Laid, Request, lay
from partita.record.transfer import TrafficLine
from partita.spec.model import Latent, ModelSpec
from partita.spec.plan_text import parse
from partita.spec.program import Block, Op

SAMPLES, SEQ = 4, 4


def model(family: str = "llama", **changes: object) -> ModelSpec:
    """Small, odd where a plan allows it: 3 layers, a vocabulary of 7, ffn of 5."""
    sizes = {"layers": 3, "hidden": 8, "heads": 4, "kv_heads": 4, "head_dim": 2, "ffn_hidden": 5}
    sizes |= {"vocab": 7, "max_seq_len": 5} | changes
    return ModelSpec(family=family, **sizes)  # type: ignore[arg-type]


LLAMA = model(kv_heads=2)
TIED = model(tied=True)
MLA = model(head_dim=6, latent=Latent(q=3, kv=5, rope=2, v=3))
MLA_PLAIN = model(head_dim=6, latent=Latent(kv=5, rope=2, v=3))
QWEN = model(kv_heads=2, qkv_bias=True, qk_norm=True)
GPT2 = model("gpt2")
DROPS = model("gpt2", dropout=0.1, tied=False)
NEOX = model("gpt_neox", parallel_residual=True)
BLOOM = model("bloom")
BERT = model("bert")
MOE = model(
    experts=4, top_k=2, expert_ffn_hidden=3, shared_experts=1, dense_layers=1, router_bias=True,
    balance_loss=0.1, z_loss=0.1, shared_gate=True,
)  # fmt: skip


def request(spec: ModelSpec, line: str) -> Request:
    """The plan at SAMPLES a step."""
    plan = parse(line)
    each = SAMPLES // (plan.num_microbatches * plan.data_parallel_size)
    return Request(plan, spec, SEQ, each)


@cache
def laid(spec: ModelSpec, line: str) -> Laid:
    """The plan laid on the model."""
    return lay(request(spec, line))


@cache
def one_device(spec: ModelSpec, steps: int, seq: int = SEQ) -> Outcome:
    """The judge: all samples in one microbatch on one rank."""
    return execute(lay(replace(request(spec, "fp32"), seq_len=seq)), steps)


def difference(spec: ModelSpec, got: Outcome, steps: int, seq: int = SEQ) -> str:
    """What differs from one device first: loss, norm, a gradient, a weight; '' when nothing."""
    want = one_device(spec, steps, seq)
    for step in range(steps):
        for what in ("losses", "auxiliary", "norms"):
            one, all_ranks = getattr(want, what)[step][0], range(len(got.traffic))
            if getattr(got, what)[step] != dict.fromkeys(all_ranks, one):
                return f"step {step}: {what}"
        wrong = unequal(got.gradients[step], want.gradients[step])
        if wrong:
            return f"step {step}: gradient of {wrong}"
    wrong = unequal(got.weights, want.weights)
    return f"weight {wrong}" if wrong else ""


def unequal(got: dict, want: dict) -> str:
    """The first tensor that differs from the same place of the whole one; all must be there, whole."""
    seen = {n: np.zeros(x[0].values.shape, bool) for (_, n), x in want.items()}
    for (rank, name), boxes in got.items():
        for x in boxes:
            at = tuple(slice(s.start, s.stop) for s in x.spans)
            if not np.array_equal(want[0, name][0].values[at], x.values):
                return f"{name} on rank {rank}"
            seen[name][at] = True
    missing = [n for n, there in seen.items() if not there.all()]
    return f"{missing} nobody stores" if missing else ""


def declared(whole: Laid, got: Outcome, rank: int) -> list[TrafficLine]:
    """What a rank is to send, for what its routers chose."""
    routing = Routing(whole.mesh, whole.replicates_tokens, got.routed)
    return whole.traffic(rank, routing)


def found_wrong(spec: ModelSpec, changed: Laid, steps: int = 1, **faults: str) -> bool:
    """Whether running a changed program is noticed within a step; a stale shard shows in the second."""
    try:
        run = Execution(changed, **faults)
        for step in range(steps):
            run.train_step(step)
            if difference(spec, run.outcome, step + 1):
                return True
    except ExecuteError:
        return True
    return False


Site = tuple[str, Op]  # a block's name ('layer' for all equal ones, '' once a step), and a region


def change_region(whole: Laid, site: Site, new: tuple[Op, ...]) -> Laid:
    """A laid plan with other regions in the place of one."""
    name, region = site

    def change(ops: tuple[Op, ...], where: str) -> tuple[Op, ...]:
        return tuple(x for op in ops for x in (new if (where, op) == (name, region) else (op,)))

    def block(b: Block) -> Block:
        segments = tuple(replace(s, ops=change(s.ops, b.name)) for s in b.segments)
        return replace(b, segments=segments, regions=change(b.regions, b.name))

    stages = tuple(replace(s, blocks=tuple(map(block, s.blocks))) for s in whole.stages)
    step = change(whole.program.step, "")
    return replace(whole, stages=stages, program=replace(whole.program, step=step))


def regions(whole: Laid) -> list[Site]:
    """Every distinct region of the plan."""
    blocks = [b for s in whole.stages for b in s.blocks]
    ops = [(b.name, op) for b in blocks for op in (*b.ops(), *b.regions) if op.is_region]
    found = {(n, op.name, op.axes, op.events): (n, op) for n, op in ops}
    return [*found.values(), *(("", op) for op in whole.program.step)]
