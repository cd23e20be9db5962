"""What published runs compute and keep that no plan says: a vocabulary that all stages share, inputs of
linears in 8 bits, gradients in 16."""

from __future__ import annotations

from dataclasses import replace

from partita.cost.machine import Software, software_of
from partita.parallel.laid import Laid, lay
from partita.record.ledger import Ledger
from partita.simulate.memory import stage_ledger
from partita.simulate.published import Case
from partita.simulate.stage import Work, Works, works_of
from partita.spec.program import Block


def case_works(found: Case, laid: Laid) -> Works:
    """The work of a case that was laid."""
    works = works_of(laid, found.matmul_dtype)
    return spread(works) if found.spread else works


def spread(works: Works) -> Works:
    """Embedding and head cut over all stages along the vocabulary (Yeung et al. 2024, 2411.05288): each
    does its share of both. Their barriers are beside compute and not priced."""
    first, last = works.stages[0].parts[0], works.stages[-1].parts[-1]
    share = [replace(p, times=p.times / len(works.stages)) for p in (first, last)]

    def with_share(w: Work) -> Work:
        layers = [p for p in w.parts if p is not first and p is not last]
        return replace(w, parts=(*layers, *share))

    return Works(tuple(map(with_share, works.stages)), works.once)


def fullest(found: Case) -> Ledger:
    """The fullest rank of a case, as its software keeps what it keeps. Raises PlanError."""
    request = found.request(found.plan)
    laid, era = lay(request), software_of(found.software)
    if era.keeps_fp8 and found.plan.precision.dtype == "fp8":
        laid = in_8_bits(laid)
    each = (stage_ledger(laid, p, laid.schedule) for p in range(laid.sizes["pp"]))
    return max((_narrow(x, era) for x in each), key=lambda x: x.peak_bytes)


def in_8_bits(laid: Laid) -> Laid:
    """What linears of layers alone keep, in 8 bits; what another op wants too stays as it is."""
    known: dict[int, Block] = {}

    def narrow(block: Block) -> Block:
        if id(block) not in known:
            savers: dict[str, set[str]] = {}
            for op in block.ops():
                for name in op.saves:
                    savers.setdefault(name, set()).add(op.kind)
            alone = {n for n in block.kept if savers.get(n) == {"linear"} and n != block.input}
            tensors = {
                n: replace(t, dtype="fp8") if n in alone and t.dtype == "bf16" else t
                for n, t in block.tensors.items()
            }
            known[id(block)] = replace(block, tensors=tensors) if block.name != "head" else block
        return known[id(block)]

    stages = tuple(replace(s, blocks=tuple(map(narrow, s.blocks))) for s in laid.stages)
    return replace(laid, stages=stages)


def _narrow(ledger: Ledger, era: Software) -> Ledger:
    """Gradients as wide as they are stored, no wider than they are reduced."""
    width = min(era.stored_gradient_bytes, era.gradient_bytes)
    gradients = ledger.at_peak.get("gradients", 0) * width // 4
    return replace(ledger, at_peak={**ledger.at_peak, "gradients": gradients})
