"""What pieces of layers take on this machine, forward and backward, by size: modules that train, each alone.

    linear, norm, layer_norm, rotate, split, attention, gate, gelu, bias, add, drop, lookup, loss
    grouped                       experts of a layer, on their rows
    dispatch                      rows to their experts and back to their tokens
    route                         all else of such a segment but its norm: scores, choice, residual
    update                        zeroed gradients, their norm, the clip and the optimizer, by bytes moved
    action                        an F and a B of the executor, of a stage that does nothing

Modules come out of models of a few layers and sizes, so that a piece is what a model runs, its host's work
included. Several of a piece run forward, then backward in the reverse order, and find the caches as in a
model: what a piece is given was made just now; what its forward kept, the memory that it takes and a linear's
weights and gradients have been away since other layers ran. Medians count. No model, loss or step is ever
run as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from math import prod
from typing import Any

import torch
from torch import Tensor

from partita.comm.protocol import Where
from partita.comm.single import SingleWorld
from partita.cost.pieces import ATTENTION
from partita.model.attention import Attention
from partita.model.moe import MoE
from partita.model.rope import Rotate
from partita.parallel.deferred import WeightQueue
from partita.parallel.ep.dispatch import Arrive, Leave, Rows
from partita.parallel.ep.experts import Grouped
from partita.parallel.laid import lay
from partita.parallel.pp.executor import Executor
from partita.parallel.pp.pieces import Live, run
from partita.parallel.read import state_bytes
from partita.parallel.tp.linear import AddBias, Column, Row
from partita.parallel.units import Unit
from partita.schedule.make import schedule as make_schedule
from partita.simulate.predict import request_of
from partita.simulate.step import update_bytes
from partita.spec.job import Job
from partita.train.build import make_context, make_model, microbatch
from partita.train.data.dataset import Batch
from partita.train.launch.timing import median_seconds
from partita.train.step import Model
from partita.train.update import make_update
from partita.tune.turns import BYTES, LAYERS, Piece, both_ways

# samples, positions, hidden, vocabulary: a microbatch of small and middling blocks
Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = (
    (1, 16, 32, 64),
    (2, 128, 128, 512),
    (4, 128, 256, 2048),
    (2, 512, 384, 4096),
)
HEAD = 32
ACTIONS = 16  # microbatches
Made = dict[str, dict[str, float]]  # piece -> size -> seconds
# what pieces that take turns, of inputs, take in so many seconds, each forward and backward
Both = Callable[[Sequence[Piece], Sequence[Tensor], float], tuple[float, float]]


def measure_pieces(dtype: str, seconds_each: float, shapes: Sequence[Shape]) -> Made:
    """Every piece of every shape in a dtype, on the CPU."""
    made: Made = {}
    for shape in shapes:
        measure_shape(dtype, shape, seconds_each, made, On())
    measure_action(made, seconds_each)
    with_any_keys(made, shapes[0][1])
    return made


def measure_shape(dtype: str, shape: Shape, seconds_each: float, made: Made, on: On) -> None:
    """Every piece of a shape."""
    dense(Bench(dtype, shape, seconds_each, made, {}, on))
    plain(Bench(dtype, shape, seconds_each, made, {"family": "gpt2", "dropout": 0.1}, on))
    sparse = {"experts": 4, "top_k": 2, "expert_ffn_hidden": shape[2]}
    experts(Bench(dtype, shape, seconds_each, made, sparse, on))


def with_any_keys(made: Made, keys: int) -> None:
    """What the smallest attention takes holds with any keys: it is the host's, or a kernel's start."""
    for name, points in made.items():
        if name.startswith(ATTENTION):
            points.update(made[f"{name.partition(' ')[0]} {keys}"] | points)


@dataclass(frozen=True)
class On:
    """Where pieces are measured, with heads of what width, and how: `both` and `one` find out what a piece,
    and a call without a backward, take."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    head: int = HEAD
    both: Both = both_ways
    one: Callable[[Callable[[], object], float], float] = median_seconds


@dataclass
class Bench:
    """A model of a few layers, and where its pieces' times go."""

    dtype: str
    shape: Shape
    seconds_each: float
    made: Made
    more: Mapping[str, Any] = field(default_factory=dict)
    on: On = field(default_factory=On)

    def __post_init__(self) -> None:
        samples, seq, hidden, vocab = self.shape
        heads = max(hidden // self.on.head, 1)
        kv_heads = heads if self.more.get("family") == "gpt2" else max(heads // 2, 1)
        model = {
            "family": "llama", "layers": _layers(hidden), "hidden": hidden, "heads": heads,
            "kv_heads": kv_heads, "ffn_hidden": 11 * hidden // 4, "vocab": vocab, "max_seq_len": seq,
            **self.more,
        }  # fmt: skip
        plan = f"1mb {self.dtype}".replace(" fp32", "")
        table = {
            "name": "pieces", "plan": plan, "model": model, "cluster": {"preset": "laptop"},
            "train": {"global_batch_size": samples, "seq_len": seq},
        }  # fmt: skip
        self.job = Job.load(table)
        laid = lay(request_of(self.job))
        device = self.on.device
        context = make_context(laid, self.job, SingleWorld(), Where(), device=device)
        self.model: Model = make_model(self.job, laid, context, _fill)
        self.embedding, *self.layers, self.head = self.model.blocks
        self.layer = self.layers[0]
        self.wide = torch.float32 if self.dtype == "fp32" else torch.bfloat16
        ids = torch.arange(samples * seq).view(samples, seq) % vocab
        valid = torch.ones(samples, seq, dtype=torch.bool)
        self.batch = microbatch(Batch(ids, ids, valid, None), range(samples)).to(device)

    def ones(self, *shape: int) -> Tensor:
        """A tensor of the dtype whose elements differ."""
        line = torch.linspace(-1, 1, prod(shape), device=self.on.device)
        return line.sin_().view(shape).to(self.wide)

    def time(self, name: str, size: float, piece: Piece, *inputs: Tensor) -> None:
        """Seconds of one forward and one backward of a piece of inputs that want gradients."""
        there, back = self.on.both([piece], inputs, self.seconds_each)
        self.keep(name, size, there)
        self.keep(f"{name}.back", size, back)

    def keep(self, name: str, size: float, seconds: float) -> None:
        """One more point of a curve."""
        self.made.setdefault(name, {})[str(int(size))] = seconds


def _layers(hidden: int) -> int:
    """Whose weights, of some 11 hidden^2 each, and fp32 gradients fill the caches, at most LAYERS."""
    return min(LAYERS, -(-BYTES // (8 * 11 * hidden**2)))


def _fill(unit: Unit) -> None:
    """Weights that differ, so that a router does not choose one expert alone."""
    generator = torch.Generator(unit.master.device).manual_seed(0)
    unit.master.uniform_(-0.1, 0.1, generator=generator)


def dense(b: Bench) -> None:
    """The pieces of a Llama's layer, its embedding, head and update."""
    samples, seq, hidden, _ = b.shape
    attention, mlp, rows = b.layer.attention, b.layer.mlp, samples * seq
    x = b.ones(samples, seq, hidden)
    b.time("norm", x.numel(), attention.norm, x)
    _add(b, x)
    _linears(b, [layer.attention.wo for layer in b.layers])
    _linears(b, [layer.mlp.up for layer in b.layers])
    _linears(b, [layer.mlp.down for layer in b.layers])
    h = b.ones(samples, seq, mlp.up.matrices[0].shape[0])
    b.time("gate", h.numel() // 2, mlp.activate, h)
    _attention(b, attention)
    b.time("lookup", x.numel(), lambda x: b.embedding(x, b.batch), b.ones(0))
    logits = b.ones(samples, seq, b.head.loss.rows)
    valid = b.batch.valid
    b.time("loss", logits.numel(), lambda y: b.head.loss(y, b.batch.ids, valid, rows), logits)
    _update(b)


def _add(b: Bench, x: Tensor) -> None:
    """A residual to what was made just now, and in backward the residual's gradient."""
    away = cycle([x.clone() for _ in range(2 * LAYERS)])
    seconds = b.on.one(lambda: x + next(away), b.seconds_each)
    b.keep("add", x.numel(), seconds)
    b.keep("add.back", x.numel(), seconds)


def _linears(b: Bench, linears: Sequence[Column | Row]) -> None:
    """Linears of several layers in turn."""
    matrices = [x.matrices[0] if isinstance(x, Column) else x.matrix for x in linears]
    (samples, seq, _, _), (out, inside) = b.shape, matrices[0].shape
    x, dy = b.ones(samples, seq, inside), b.ones(samples * seq, out)
    flops = 2 * samples * seq * inside * out
    grow = [partial(m.accumulate, dy, x.flatten(0, 1).clone()) for m in matrices]
    _halves(b, "linear", flops, linears, grow, x, matrices[0].queue)


def _grouped(b: Bench, layers: Sequence[Grouped], rows: int) -> None:
    """Experts of several layers in turn, each on its own rows, never quite even; by those of one."""
    experts, inside = layers[0].weight.shape[0], layers[0].weight.shape[-1]
    out = prod(layers[0].weight.shape[1:-1])
    x, dy = b.ones(rows, inside), b.ones(rows, out)
    runs, grow = [], []
    for i, layer in enumerate(layers):
        counts = _uneven(rows, experts, i)
        runs.append(partial(layer, counts=counts))
        grow.append(partial(layer.accumulate, dy, x.clone(), counts))
    flops = 2 * rows // experts * inside * out
    _halves(b, "grouped", flops, runs, grow, x, layers[0].weight.queue, experts)


def _uneven(rows: int, experts: int, seed: int) -> list[int]:
    """Rows of each expert, as a router chooses that has learnt nothing yet."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(experts, (rows,), generator=generator)
    return torch.bincount(chosen, minlength=experts).tolist()


def _halves(
    b: Bench, name: str, flops: int, runs: Sequence[Piece], grow: Sequence[Callable[[], None]], x: Tensor,
    queue: WeightQueue, each: int = 1,
) -> None:  # fmt: skip
    """Forward, the gradient of the input, and of the weight: halves of a backward that is split, neither a
    difference of two measurements. A call is `each` products."""
    queue.split(0, 0)  # what is kept goes with the next split
    there, back = b.on.both(runs, [x], b.seconds_each)
    queue.close()
    turns = cycle(grow)
    weight = b.on.one(lambda: next(turns)(), b.seconds_each)
    for half, seconds in (("", there), (".back", back), (".weight", weight)):
        b.keep(f"{name}{half}", flops, seconds / each)


def _attention(b: Bench, a: Attention) -> None:
    """Positions, the core by its keys, and what lies between the linears and it."""
    samples, seq, _, _ = b.shape
    q = b.ones(samples, seq, a.heads, b.on.head)
    k = b.ones(samples, seq, a.kv_heads, b.on.head)
    if a.rope is not None:
        cos, sin = (t.unsqueeze(1) for t in a.rope)
        both = b.ones(samples, seq, a.heads + a.kv_heads, b.on.head)  # queries and keys, as one
        b.time("rotate", both.numel(), lambda x: Rotate.apply(x, cos, sin), both)
    heads = [t.transpose(1, 2) for t in (q, k, k)]
    points = q.numel() * seq
    b.time(f"attention {seq}", points, lambda q, k, v: a.core(q, k, v, b.batch, 0, True), *heads)
    seconds = b.made.pop(f"attention {seq}.back")
    b.made.setdefault(f"attention.back {seq}", {}).update(seconds)
    sizes = [n * b.on.head for n in (a.heads, a.kv_heads, a.kv_heads)]

    def split(x: Tensor) -> Tensor:
        q, k, v = (t.view(samples, seq, -1, b.on.head).transpose(1, 2) for t in x.split(sizes, -1))
        y: Tensor = _Free.apply(q, k, v.contiguous())  # type: ignore[assignment]
        return y.transpose(1, 2).reshape(samples, seq, -1)

    qkv = b.ones(samples, seq, sum(sizes))
    b.time("split", qkv.numel(), split, qkv)


class _Free(torch.autograd.Function):
    """Attention or experts that do nothing: x on, and gradients of the right shapes back."""

    @staticmethod
    def forward(ctx, x: Tensor, *others: Tensor) -> Tensor:
        """x, laid as attention's kernel lays its output from q."""
        ctx.save_for_backward(*others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """g, and what was kept for it."""
        return g, *ctx.saved_tensors


def plain(b: Bench) -> None:
    """What a GPT-2's layer has that a Llama's has not."""
    samples, seq, hidden, _ = b.shape
    x, wide = b.ones(samples, seq, hidden), b.ones(samples, seq, 11 * hidden // 4)
    b.time("layer_norm", x.numel(), b.layer.attention.norm, x)
    b.time("gelu", wide.numel(), b.layer.mlp.activate, wide)
    b.time("bias", x.numel(), lambda x: AddBias.apply(x, b.layer.mlp.down.bias), x)
    b.time("drop", x.numel(), lambda x: b.layer.mlp.drop_residual(x, 0, b.batch), x)


def experts(b: Bench) -> None:
    """The segment of a rank alone, in three: experts on their rows; rows there and back; all the rest but the
    norm, as the model runs it."""
    moe: MoE = b.layer.mlp
    samples, seq, hidden, _ = b.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, seq, hidden, generator=generator).to(b.on.device, b.wide)
    logits = torch.rand(samples, seq, moe.exchange.experts, generator=generator).to(b.on.device)
    _, chosen = moe.router(logits, False)
    gates = torch.ones(samples * seq, moe.exchange.top_k, device=b.on.device)
    chunks = moe.exchange.plan(chosen)
    idle, apart = _Idle(**vars(moe)), _Apart(**{**vars(moe), "norm": lambda x: x})

    def travel(x: Tensor, gates: Tensor) -> Tensor:
        return run(idle.experts(x, gates, chunks))[0]  # type: ignore[arg-type]

    rows, blocks = gates.numel(), [layer.mlp for layer in b.layers]
    _grouped(b, [block.gate_up for block in blocks], rows)
    _grouped(b, [block.down for block in blocks], rows)
    b.time("route", rows, lambda x: apart(x, b.batch, 0, True), x)
    b.time("dispatch", rows * hidden, travel, x.flatten(0, 1), gates)


class _Idle(MoE):
    """Experts that hand rows back as they came."""

    def compute(self, coming: Tensor, rows: Rows) -> Tensor:
        """They arrive and leave."""
        return Leave.apply(Arrive.apply(coming, rows), rows)  # type: ignore[return-value]


class _Apart(MoE):
    """The segment without rows: what is added to a token is itself."""

    def experts(
        self, x: Tensor, gates: Tensor, chunks: Sequence[Rows], stays: Live = ()
    ) -> Generator[Live, Live, Live]:
        """Nothing travels."""
        yield from ()
        return (_Free.apply(x, gates), *stays)  # type: ignore[return-value]


def _update(b: Bench) -> None:
    """By the bytes that the simulator says an update moves."""
    laid, update = b.model.laid, make_update(b.model, b.job.train)
    blocks = [block for s in laid.stages for block in s.blocks]
    states = sum((state_bytes(block, laid.sizes) for block in blocks), start=Counter[str]())

    def run() -> None:
        b.model.reducer.begin()
        update.model.units[0].gradient[:1].fill_(2.0)  # so that it is clipped
        update.step()

    b.keep("update", update_bytes(states), b.on.one(run, 2 * b.seconds_each))


def measure_action(made: Made, seconds_each: float) -> None:
    """What the executor takes for an F and a B, of the host."""
    anchor = torch.zeros((), requires_grad=True)
    schedule = make_schedule("1f1b", num_ranks=1, num_microbatches=ACTIONS)
    executor = Executor(
        {0: lambda x, batch: anchor.view_as(anchor)}, schedule, 0, {}, Where(),
        lambda stage, batch, what: anchor,
    )  # fmt: skip
    seconds = median_seconds(lambda: executor.run([None] * ACTIONS), seconds_each)
    made["action"] = {"1": seconds / ACTIONS}
