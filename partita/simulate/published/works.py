"""What published runs compute and keep that no plan says: a vocabulary that all stages share, modules that
run again, inputs of linears in 8 bits, gradients in 16, what experts hand back not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from partita.cost.kernels import Kernel
from partita.cost.machine import Software, software_of
from partita.parallel.laid import Laid, lay
from partita.parallel.read import bytes_of
from partita.record.ledger import Ledger
from partita.simulate.memory import chunk_bytes, lent_parts, stage_ledger
from partita.simulate.published.rows import Case
from partita.simulate.stage import Part, Work, Works, works_of
from partita.spec.hardware import shown_bytes
from partita.spec.plan import Plan
from partita.spec.program import Block

# what a module of a published recomputation writes: by segments, or by names of ops
AGAIN: dict[str, tuple[str, ...]] = {
    "mlp": ("mlp",),
    "moe": ("router", "dispatch", "experts", "combine", "shared"),
    "op": (
        "attention.wk", "attention.wo", "attention.rope_q", "attention.rope_k", "attention.residual",
        "mlp.act",
    ),
    "moe_act": ("experts.act",),
    "swiglu": ("experts.act", "shared.act", "mlp.act"),
    "mla_up_proj": (
        "attention.wq", "attention.wk", "attention.wv", "attention.rope_q", "attention.rope_k",
    ),
}  # fmt: skip
STAYS = ("attention.rope_q",)  # what it reads is kept, not what it writes
NORMS = ("rmsnorm", "layernorm", "op")
# bytes an element: 4 written; 2 and 4 read, 4 written; 4 and 4; 4 read, 2 written. Back: 2 and 4; 4 and 2 to
# the rows, 2 and 2 to lie side by side; 4, 4 and 4 to the biases, as much to the gates
BIASED = (28, 40)


def lay_case(found: Case, plan: Plan) -> Laid:
    """The laid plan of a case; the modules that its row names run again. Raises PlanError."""
    laid = lay(found.request(plan))
    if found.spared:
        return _changed(laid, lambda block: _but(block, found.spared))
    if not found.again:
        return laid
    wanted = {x for w in found.again for x in AGAIN.get(w, ())}
    norms = any(w in NORMS for w in found.again)

    def less(block: Block) -> Block:
        made = {
            op.writes
            for op in block.ops()
            if op.segment in wanted or op.name in wanted or (norms and op.kind == "norm")
        }
        read = {
            r for op in block.ops() for r in op.reads if op.name in STAYS and "op" in found.again
        }
        return replace(block, kept=(block.kept - made) | read)

    return _changed(laid, less)


def _but(block: Block, spared: tuple[str, ...]) -> Block:
    """A layer that keeps its input, and of some ops what they write and what only they save."""
    if block.name in ("embedding", "head"):
        return block
    written = {op.writes for op in block.ops()}
    kept = {block.input}
    for op in block.ops():
        if op.name in spared:
            kept |= {op.writes, *(t for t in op.saves if t not in written)}
    return block.keeping(frozenset(kept))


def case_works(found: Case, laid: Laid) -> Works:
    """The work of a case that was laid."""
    works = works_of(laid, found.matmul_dtype)
    if found.biased:
        works = biased(works)
    if "op" in found.again:
        works = halved(works, found)
    if found.machine().software.repeats_keys:
        works = repeated(works, found.model.heads // found.model.kv_heads)
    return spread(works) if found.spread else works


def repeated(works: Works, times: int) -> Works:
    """Keys and values of all heads, alike where heads share them, go to the other ranks of the sequence."""

    def one(part: Part) -> Part:
        calls = (replace(c, bytes=c.bytes * times) if c.axes == ("cp",) else c for c in part.calls)
        return replace(part, calls=tuple(calls))

    each = (replace(w, parts=tuple(map(one, w.parts))) for w in works.stages)
    return Works(tuple(each), works.once)


def halved(works: Works, found: Case) -> Works:
    """Of the gate and what it gates the one is run again, by torchtitan's rule of every second matmul
    (parallelize_llama.py)."""
    pair = 2 * found.model.ffn_hidden // found.plan.mesh.tp

    def one(part: Part) -> Part:
        w = part.work
        pairs = [k for k in w.forward if k.kind == "matmul" and k.n == pair]
        half = tuple(replace(k, n=k.n // 2, bytes=k.bytes / 2) for k in pairs[:1])
        return replace(part, work=replace(w, again=(*w.again, *half), known={}))

    each = (replace(w, parts=tuple(map(one, w.parts))) for w in works.stages)
    return Works(tuple(each), works.once)


def biased(works: Works) -> Works:
    """What experts hand back, with biases as Megatron-Core adds them (TEGroupedMLP._apply_bias): times the
    rows' gates in 32 bits, added expert by expert, laid side by side, narrowed; and their backward."""

    def one(part: Part) -> Part:
        if not part.has_experts:
            return part
        w = part.work
        last = [k for k in w.experts[0] if k.kind == "matmul"][-1]
        rows = float(last.m * last.n * last.count)
        f, b = (
            Kernel("memory", n * rows, dtype="bf16", each=last.each, routed=True) for n in BIASED
        )
        own = replace(w, forward=(*w.forward, f), input=(*w.input, b))
        return replace(part, work=replace(own, experts=((*w.experts[0], f), (*w.experts[1], b))))

    each = (replace(w, parts=tuple(map(one, w.parts))) for w in works.stages)
    return Works(tuple(each), works.once)


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
    laid, era = lay_case(found, found.plan), software_of(found.software)
    if era.weighs_inside:
        laid = _changed(laid, lambda b: replace(b, kept=b.kept - _handed_back(b)))
    if era.keeps_fp8 and found.plan.precision.dtype == "fp8":
        laid = in_8_bits(laid, era.keeps_gates_fp8)
    each = (_left(_narrow(laid, p, era), laid, found) for p in range(laid.sizes["pp"]))
    return max(each, key=lambda x: x.peak_bytes)


def _left(ledger: Ledger, laid: Laid, found: Case) -> Ledger:
    """Without the activations of layers that go to the host, but for one that is on its way. Layers of a case
    are alike, and no such case has a pipeline."""
    gone = found.stated.leaves - 1
    if gone <= 0:
        return ledger
    layer = chunk_bytes(laid, 0)[0][0] / found.model.layers
    at = {**ledger.at_peak, "activations": int(ledger.at_peak["activations"] - gone * layer)}
    return replace(ledger, at_peak=at)


def fits(found: Case) -> bool:
    """Whether the fullest rank holds no more than its device shows. Raises PlanError."""
    return fullest(found).peak_bytes <= shown_bytes(
        found.cluster.device, found.cluster.memory_bytes
    )


def _handed_back(block: Block) -> set[str]:
    """What experts hand back, which combine keeps for the gates' gradients."""
    return {r for op in block.ops() if op.kind == "combine" for r in op.reads[:1]}


def _changed(laid: Laid, change: Callable[[Block], Block]) -> Laid:
    """The laid program with each distinct block changed."""
    known: dict[int, Block] = {}

    def once(block: Block) -> Block:
        if id(block) not in known:
            known[id(block)] = change(block)
        return known[id(block)]

    stages = tuple(replace(s, blocks=tuple(map(once, s.blocks))) for s in laid.stages)
    return replace(laid, stages=stages)


def in_8_bits(laid: Laid, gates: bool = False) -> Laid:
    """What linears of layers alone keep (and `gates`), in 8 bits; what another op wants too stays as it is. A
    weight half that comes later multiplies gradients in 8 bits, which wait as such."""
    narrowed = {"linear", "act"} if gates else {"linear"}
    halves = any(a.kind == "W" for rank in laid.schedule.ranks for a in rank)

    def narrow(block: Block) -> Block:
        savers: dict[str, set[str]] = {}
        for op in block.ops():
            for name in op.saves:
                savers.setdefault(name, set()).add("act" if op.name.endswith(".act") else op.kind)
        alone = {n for n in block.kept if savers.get(n, {""}) <= narrowed and n != block.input}
        if halves:
            alone |= {op.writes for op in block.ops() if op.kind == "linear"} - block.kept
        tensors = {
            n: replace(t, dtype="fp8") if n in alone and t.dtype == "bf16" else t
            for n, t in block.tensors.items()
        }
        return replace(block, tensors=tensors) if block.name != "head" else block

    return _changed(laid, narrow)


def _narrow(laid: Laid, place: int, era: Software) -> Ledger:
    """A rank's ledger with gradients as wide as they wait, whole ones of ZeRO too, and as much of them as
    the software keeps between microbatches."""
    ledger = stage_ledger(laid, place, laid.schedule)
    gone = 4 - era.gradient_bytes
    whole = max(lent_parts(laid, s.blocks)["whole gradients"] for s in laid.stages_of(place))
    gradients = ledger.at_peak.get("gradients", 0) * era.gradient_bytes // 4
    states = 4 + 2 * era.moment_bytes - 2 * era.keeps_remainders
    optimizer = ledger.at_peak.get("optimizer", 0) * states // 12
    gradients //= laid.sizes["dp_shard"] if era.shards_gradients else 1
    buffers = ledger.at_peak.get("buffers", 0) - whole * gone // 4
    at = {**ledger.at_peak, "gradients": gradients, "buffers": buffers, "optimizer": optimizer}
    at["activations"] = at.get("activations", 0) + _eager_loss(laid, place, era)
    if era.keeps_whole and laid.sizes["pp"] > 1:
        at |= _whole(laid, place, at)
    return replace(ledger, at_peak=at)


def _eager_loss(laid: Laid, place: int, era: Software) -> int:
    """Bytes that a loss of PyTorch's own holds beyond its logits and their probabilities: logarithms of all
    probabilities, and two gradients of them, in 32 bits."""
    heads = [b for s in laid.stages_of(place) for b in s.blocks if b.name == "head"]
    if not (heads and era.loss_bytes):
        return 0
    each, logits = bytes_of(heads[0], laid.sizes), heads[0].tensors["logits"].local(laid.sizes)
    return max(era.loss_bytes * logits - each["logits"] - each["probs"], 0)


def _whole(laid: Laid, place: int, at: Mapping[str, int]) -> dict[str, int]:
    """Parameters, gradients and buffers of a rank under ZeRO-3 whose units stay whole all the step."""
    stages = laid.stages_of(place)
    each = [bytes_of(b, laid.sizes) for s in stages for b in s.blocks]

    def whole(of: str) -> int:
        return sum(size for e in each for name, size in e.items() if name.endswith(f"whole_{of}"))

    lent = [sum(lent_parts(laid, s.blocks).values()) for s in stages]
    return {
        "parameters": at.get("parameters", 0) + whole("parameter"),
        "gradients": whole("gradient") or at.get("gradients", 0),
        "buffers": max(at.get("buffers", 0) - max(lent), 0),
    }
