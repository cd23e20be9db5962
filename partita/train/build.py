"""Builds a rank's part of a job. The order is fixed:

    1 lay the plan        2 join groups (one order on all ranks)    3 create flat units from layouts
    4 fill them by counter or from a folder's slices                5 build blocks on views of them
    6 executor, reducer   7 optimizer over masters                  8 data

Weights are created from the laid program's layouts and modules take their regions from it by site, so
nothing here computes a shape or chooses a collective.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from partita.comm.context import Context, Named
from partita.comm.protocol import Where, World
from partita.comm.random.seeds import initial_value
from partita.comm.ranks import here, require_ranks
from partita.comm.threads.local import LocalWorld
from partita.model.transformer import build_blocks
from partita.parallel.cp.split import Split
from partita.parallel.deferred import WeightQueue
from partita.parallel.laid import Laid, lay
from partita.parallel.offload.arenas import Arenas
from partita.parallel.offload.cpu import Moves
from partita.parallel.precision.fp8 import Products
from partita.parallel.precision.scaler import LossScaler
from partita.parallel.units import Unit, make_units
from partita.simulate.away import slots
from partita.simulate.predict import request_of
from partita.spec.job import Job, require_job
from partita.spec.layout import Box, product_coordinate
from partita.spec.lora import is_adapter
from partita.train.data.dataset import Dataset, open_dataset
from partita.train.data.streams import Batch
from partita.train.devices import computes_on_gpu, device_of
from partita.train.pipeline import data_parallel, make_evaluator, make_executor, make_flow
from partita.train.step import Microbatch, Model, StepBatch, Update
from partita.train.sums import step_comms
from partita.train.update import make_update

DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
    "fp8": torch.bfloat16,
}  # fmt: skip
EVAL_SEQUENCES = 128
CACHE = Path("~/.cache/partita").expanduser()
# np.load parses a header as source, which CPython 3.11 cannot do in two threads at once ("AST constructor
# recursion depth mismatch")
_OPENING = threading.Lock()


@dataclass
class Built:
    """Everything a loop needs on one rank."""

    job: Job
    context: Context
    model: Model
    update: Update
    data: Dataset

    def batch(self, step: int, drains: bool = True) -> StepBatch:
        """This rank's microbatches of a step (from 0). An asynchronous pipeline that does not drain
        after it is given the next step's too."""
        flow = self.model.flow
        stays = flow is not None and flow.runs_ahead and not drains
        following = self._microbatches(step + 1) if stays else ()
        return StepBatch(step, self._microbatches(step), following, drains)

    def _microbatches(self, step: int) -> list[Microbatch]:
        reads = self._reads_pictures
        found = ((s, self.data.microbatch(step, s, reads)) for s in self.samples())
        return [self.own(microbatch(b, s, step)) for s, b in found]

    def own(self, whole: Microbatch) -> Microbatch:
        """Of samples whole along seq, the share that context parallelism gives this rank, in laid order, on
        its device."""
        return self._share(whole).to(self.context.device)

    def _share(self, whole: Microbatch) -> Microbatch:
        sizes, at = self.model.laid.sizes, self.context.coords
        ways, mine = product_coordinate(sizes, at, ("cp", "ulysses"))
        request = self.model.laid.request
        if request.model.image is not None:
            return whole  # pixels are cut where they are read
        whole = filled(whole, request.laid_len, request.model.causal)
        if ways == 1:
            return whole
        split = self._split if whole.documents is None else self._split_of(whole.documents)
        ids, targets, valid = split.take((whole.ids, whole.targets, whole.valid), mine, ways)
        documents = split.tokens.documents
        return Microbatch(ids, targets, valid, documents, whole.samples, split, whole.step)

    @property
    def _reads_pictures(self) -> bool:
        """Whether images are read here, which the first stage alone does."""
        return any(s.index == 0 for s in self.model.laid.stages_of(self.model.place))

    def _split_of(self, documents: Tensor | None) -> Split:
        return Split.of(self.model.laid.request, documents)

    @cached_property
    def _split(self) -> Split:
        """Of every microbatch without documents."""
        return self._split_of(None)

    def samples(self) -> list[range]:
        """This rank's samples of each microbatch: m * (micro_batch_size * dp) + place in the batch dim
        (docs/map.md, sample order)."""
        size, ways = self.job.micro_batch_size, self.job.plan.data_parallel_size
        first = self.data_rank * size
        starts = [m * size * ways + first for m in range(self.job.plan.num_microbatches)]
        return [range(s, s + size) for s in starts]

    @property
    def data_rank(self) -> int:
        """Place among the data-parallel ranks, dp_replicate outermost."""
        at = self.context.coords
        return at["dp_replicate"] * self.job.plan.mesh.dp_shard + at["dp_shard"]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share of tokenizer and data."""
        return fingerprint(self.data)

    def __iter__(self) -> Iterator[StepBatch]:
        """Steps of the job, from the first that is not done."""
        for step in range(self.update.updates, self.job.train.steps):
            yield self.batch(step)

    def agree(self, ok: bool) -> bool:
        """Whether all ranks are well; a collective of checkpoints, outside any step."""
        comm = self.context.comm("world", lane="host")
        found = comm.all_reduce(
            torch.tensor([0.0 if ok else 1.0]), site="checkpoint:agree", op="max"
        )
        return not bool(found)

    def exchange(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's values, by rank; a collective of ranks that share no file, outside any step."""
        comm = self.context.comm("world", lane="host")
        mine = torch.tensor([list(values)], dtype=torch.int64)
        return comm.all_gather(mine, site="checkpoint:exchange").tolist()

    def waited(self) -> float:
        """Seconds spent waiting in collectives since the last call."""
        return self.context.recorder.take_wait_s()

    def mfu(self, tokens_per_s: float) -> float:
        """Model FLOP/s (model_causal) over the peak of the compute units that do the work."""
        c, plan = self.job.cluster, self.job.plan
        peak = c.peak(plan.precision.dtype) * c.units(plan.world_size)
        flops = self.job.model.train_flops_per_token(self.job.train.seq_len, "model_causal")
        return tokens_per_s * flops / peak

    def eval_batches(self) -> Iterator[tuple[StepBatch, int]]:
        """The first EVAL_SEQUENCES held-out sequences, whatever the plan, with the valid tokens of all
        ranks; the last batch is filled up with sequences that do not count."""
        size = self.job.micro_batch_size
        whole = size * self.job.plan.data_parallel_size
        first = self.data_rank * size
        for batch in self.data.eval_batches(whole, limit=EVAL_SEQUENCES):
            rows = torch.arange(first, first + size)
            real = rows < batch.ids.shape[0]
            at = rows.clamp(max=batch.ids.shape[0] - 1)
            valid = batch.valid[at] & real.unsqueeze(1)
            documents = None if batch.documents is None else batch.documents[at]
            part = Batch(batch.ids[at], batch.targets[at], valid, documents)
            places = range(first, first + size)
            whole = microbatch(part, places)
            yield StepBatch(0, [self.own(whole)]), int(batch.valid.sum())

    def held_out(self) -> dict[str, float]:
        """Token mean of the loss on held-out sequences, forward only; of images how many are known, too."""
        total = tokens = 0.0
        with torch.no_grad():
            for batch, valid in self.eval_batches():
                total += self.model.evaluate(batch) * valid
                tokens += valid
        mean = total / tokens if tokens else math.nan  # every held-out target is masked
        if self.job.model.image is None:
            return {"eval_loss": mean}
        known = sum(n for (n,) in self.exchange((self.model.take_known(),)))
        return {"eval_loss": mean, "eval_accuracy": known / tokens if tokens else math.nan}


def microbatch(batch: Batch, samples: Sequence[int], step: int = 0) -> Microbatch:
    """A batch with its samples' places in the step (counted from 0)."""
    places = torch.tensor(list(samples), dtype=torch.int64)
    return Microbatch(batch.ids, batch.targets, batch.valid, batch.documents, places, step=step)


def filled(batch: Microbatch, length: int, causal: bool = True) -> Microbatch:
    """The same of `length` tokens a sample: what is added has no target, and is a document of its own where
    there are such, or where attention would see it else."""
    more, documents = length - batch.ids.shape[1], batch.documents
    if not more:
        return batch
    if documents is None and not causal:
        documents = torch.zeros_like(batch.ids)
    if documents is not None:
        documents = pad(documents, (0, more), value=int(documents.min()) - 1)
    ids, targets, valid = (pad(t, (0, more)) for t in (batch.ids, batch.targets, batch.valid))
    return replace(batch, ids=ids, targets=targets, valid=valid, documents=documents)


def make_context(
    laid: Laid, job: Job, world: World, where: Where, recorder: Any = None,
    device: torch.device | None = None,
) -> Context:  # fmt: skip
    """The rank's Context with every group the laid program speaks on, made in one order."""
    groups = [*laid.groups, (("world",), "host")]
    context = Context.create(
        job.plan, laid.mesh, world, groups=groups, named=Named(job.model.kv_heads, laid.pairs),
        seed=job.seed, where=where, recorder=recorder,
    )  # fmt: skip
    return context if device is None else replace(context, device=device)


def make_model(job: Job, laid: Laid, context: Context, fill: Callable[[Unit], None]) -> Model:
    """Units, blocks, executors and reducer of this rank's stages; `fill` sets the units' masters."""
    place, precision = context.coords["pp"], job.plan.precision
    flows = laid.schedule.is_asynchronous
    dtype, products = DTYPES[precision.dtype], Products(precision)
    moves = Moves(context.recorder, context.where)
    arenas = Arenas.of(job.plan, context.where, moves, job.cluster.disk_folder)
    elsewhere = arenas.elsewhere()
    units = make_units(
        laid, context.rank, dtype, context.device, WeightQueue(), products.of,
        flows or "optimizer" in elsewhere, elsewhere,
    )  # fmt: skip
    for unit in units:
        fill(unit)
    blocks = build_blocks(job.model, laid, place, context, units)
    trained = [unit for unit in units if not unit.spec.frozen]
    reducer, parameters, data = data_parallel(
        laid, context, units, arenas.gradients(trained), arenas.shards(units)
    )
    parameters.refresh()
    names = {s.index: s.names for s in laid.stages_of(place)}
    kept = arenas.activations(names, slots(laid, place))
    executor = make_executor(laid, context, blocks, data, dtype, kept)
    row = [block for stage in blocks.values() for block in stage]
    model = Model(
        laid, context, place, row, units, executor, reducer, parameters, step_comms(laid, context),
        make_evaluator(executor), arenas=arenas, products=products,
    )  # fmt: skip
    if flows:
        model.flow = make_flow(executor, laid, units, parameters, reducer, "optimizer" in elsewhere)
    model.scaler = LossScaler() if job.plan.precision.dtype == "fp16" else None
    return model


def new_values(
    job: Job, laid: Laid, device: torch.device | str = "cpu"
) -> Callable[[str, Box], Tensor]:
    """The value of a box of a weight before training: by counter, drawn on `device`, or from the slices of a
    Hugging Face folder; LoRA's from one of peft's."""
    if job.init == "pretrained" and job.model_path is not None:
        from partita.model.families.read import read_slices

        read = read_slices(Path(job.model_path), job.model).read
    else:
        read = None

    low: dict[str, Tensor] = {}
    if job.adapter_path is not None:
        from partita.model.families.adapters import read_adapter

        shapes = {n: x.shape for n, x in laid.layouts.items()}
        low = read_adapter(Path(job.adapter_path), job.model, shapes)

    def value(name: str, box: Box) -> Tensor:
        if is_adapter(name) and low:
            return low[name][tuple(slice(a, b) for a, b in box)]
        if read is not None and not is_adapter(name):
            return read(name, box)
        shape, layers = laid.layouts[name].shape, job.model.layers
        return initial_value(job.seed, name, shape, box, layers=layers, device=device)

    return value


def fill_unit(
    unit: Unit, laid: Laid, context: Context, value: Callable[[str, Box], Tensor]
) -> None:
    """Puts into a unit's master, box by box, what this rank holds of its weights."""
    for weight, *_ in unit.places:
        for piece in laid.pieces(weight, context.rank):
            part = unit.master[piece.start : piece.start + piece.numel()]
            part.copy_(value(weight, piece.box).reshape(-1))


def assemble(
    job: Job, world: World, where: Where | None = None, recorder: Any = None,
    device: torch.device | None = None,
) -> Built:  # fmt: skip
    """A rank's part of the job, ready to train; on `device`, else that which devices.py finds."""
    laid = lay(request_of(job))
    found = device or device_of(job, world.rank)
    context = make_context(laid, job, world, where or Where(), recorder, found)
    value = new_values(job, laid, found)
    model = make_model(job, laid, context, lambda unit: fill_unit(unit, laid, context, value))
    update = make_update(model, job.train)
    data = open_job_data(job)
    return Built(job, context, model, update, data)


def fingerprint(data: Dataset) -> dict[str, Any]:
    """What a resumed run must share of tokenizer and data."""
    name = data.tokenizer.fingerprint() if data.tokenizer is not None else "tokens"
    return {"tokenizer": {"digest": name}, "data": data.fingerprint()}


def open_job_data(job: Job) -> Dataset:
    """The job's data, with the tokenizer's cache shared by all ranks of the host; one thread at a time."""
    spec, data = job.model, replace(job.data, mlm_probability=job.mlm_probability)
    with _OPENING:
        return open_dataset(
            data, job.train, vocab=spec.vocab, seed=job.seed, cache=CACHE, image=spec.image
        )


def build(job: Job, context: Context | None = None) -> tuple[Model, Update, Built]:
    """(model, optimizer, data) for a loop of your own, on every rank; the schedule runs inside.

    for batch in data: loss = model.forward_backward(batch); norm = optimizer.step()

    The ranks are those of `context`, or of the caller: threads of `pt.local(n)`, which compute on the CPU,
    processes of torchrun, or one alone. A new Context, with the groups that the job's plan speaks on, is
    `data.context`. Raises PlanError for an illegal plan, DataError for bad data.
    """
    require_job(job, "build")
    job.require_legal()
    if context is None:
        world, where = here(job.plan, job.train.comm_timeout_s, computes_on_gpu(job))
    else:
        world, where = context.world, context.where
        require_ranks(job.plan, world)
    device = torch.device("cpu") if isinstance(world, LocalWorld) else None
    built = assemble(job, world, where, device=device)
    return built.model, built.update, built
