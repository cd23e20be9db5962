"""What serving a plan will do, before anything starts: memory, time to the first token, time between tokens,
tokens a second. dp_replicate is so many engines, each a server of its own with its share of the requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from partita.base.errors import Problem, UsageError
from partita.base.units import format_bytes
from partita.cost.machine import Machine, machine_of
from partita.parallel.laid import Laid, lay, problems
from partita.simulate.serving.cut import Shape
from partita.simulate.serving.memory import Held, fullest, held
from partita.simulate.serving.rates import Load, Rates, rates
from partita.simulate.serving.served import request_of
from partita.simulate.serving.step import Steps
from partita.simulate.serving.works import SERVERS, Server
from partita.spec.cluster import Cluster
from partita.spec.model import ModelSpec
from partita.spec.plan import Plan

FORWARD = 1 / 3  # of a training step's FLOPs


@dataclass(frozen=True)
class Asked:
    """A model on a cluster, in a dtype, under a load, by a server."""

    model: ModelSpec
    cluster: Cluster
    load: Load
    dtype: str = "bf16"
    server: Server = SERVERS["partita"]

    @property
    def machine(self) -> Machine:
        """The cluster with what it reaches."""
        return machine_of(self.cluster)


@dataclass(frozen=True)
class Serving:
    """The answer for one plan; numbers are None where it cannot be served, or does not fit."""

    plan: Plan
    asked: Asked
    problems: tuple[Problem, ...] = ()
    held: tuple[Held, ...] = ()
    kv_tokens: int = 0  # that an engine's pages hold
    rates: Rates | None = None
    laid: Laid | None = field(default=None, compare=False, repr=False)

    @property
    def line(self) -> str:
        """The plan's line, with its dtype."""
        return str(self.plan.with_("precision", dtype=self.asked.dtype))

    @property
    def fits(self) -> bool:
        """Whether it can be served and one request has room."""
        return self.rates is not None

    @property
    def engines(self) -> int:
        """Servers of their own."""
        return self.plan.mesh.dp_replicate

    @property
    def each(self) -> int:
        """Requests at once of an engine that has most."""
        return -(-self.asked.load.concurrency // self.engines)

    @property
    def most_sequences(self) -> int:
        """Requests of the load's length that an engine's pages hold whole."""
        return max(self.kv_tokens, 0) // self.asked.load.tokens

    @property
    def fullest(self) -> Held:
        """Ranks with the least room."""
        return fullest(self.held, self.limit_bytes, self.asked.load.page_size)

    @property
    def limit_bytes(self) -> int:
        """What a rank may hold."""
        return self.asked.cluster.memory_limit_bytes

    @property
    def pages(self) -> int:
        """Of an engine."""
        return max(self.kv_tokens, 0) // self.asked.load.page_size

    @property
    def _requests_per_s(self) -> float:
        """Of all engines: one that has fewer requests than another ends as many fewer."""
        assert self.rates is not None
        shared = self.asked.load.concurrency / (self.each * self.engines)
        full = self.rates.running < self.each
        return self.engines * self.rates.requests_per_s * (1.0 if full else shared)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens that are written a second, by all engines."""
        if self.rates is None:
            return None
        return self._requests_per_s * self.asked.load.output_len

    @property
    def tokens_per_s_per_device(self) -> float | None:
        """The same, of a device that serves."""
        found = self.tokens_per_s
        return None if found is None else found / self.plan.world_size

    @property
    def request_s(self) -> float:
        """Seconds of a whole request under the load."""
        assert self.rates is not None
        return self.rates.ttft_s + (self.asked.load.output_len - 1) * self.rates.itl_s

    @property
    def mfu(self) -> float | None:
        """The model's own FLOPs of prompts and answers, of the devices' peak."""
        if self.rates is None:
            return None
        load, model, cluster = self.asked.load, self.asked.model, self.asked.cluster
        each = FORWARD * model.train_flops_per_token(load.tokens, "model_causal") * load.tokens
        peak = cluster.peak(self.asked.dtype) * self.plan.world_size
        return self._requests_per_s * each / peak

    @property
    def mbu(self) -> float | None:
        """What kernels move, of the memory's rate."""
        if self.rates is None:
            return None
        return self.rates.bytes_per_s / self.asked.cluster.memory_bytes_per_s

    @property
    def binds(self) -> str:
        """What most of a step is; 'memory' where nothing fits."""
        if self.rates is None:
            return "memory"
        causes = self.rates.cycle
        return max(causes, key=lambda name: causes[name])


def predict(asked: Asked, plan: Plan, steps: Steps | None = None) -> Serving:
    """What a plan does under the load; never raises for a plan that cannot be served. `steps`: a plan's that
    differs in its engines alone."""
    found = Serving(plan, asked)
    if steps is None:
        wrong = wrongs(asked, plan)
        if wrong:
            return replace(found, problems=tuple(wrong))
        steps = steps_of(asked, plan)
    steps = replace(steps, engines=found.engines)  # what is known of blocks is shared
    laid, load = steps.laid, asked.load
    found = _with_room(found, laid, None)
    running = min(found.each, found.most_sequences)
    while running:  # fewer at once need less beside the pages
        found = _with_room(found, laid, _largest(load, running, laid.sizes["pp"]))
        if found.most_sequences >= running:
            break
        running = found.most_sequences
    if not found.most_sequences:
        return replace(found, problems=(_too_big(found),))
    told = (_waits(found, running),) if running < found.each else ()
    return replace(found, problems=told, rates=rates(steps, load, running))


def _with_room(found: Serving, laid: Laid, most: Shape | None) -> Serving:
    """With what its ranks hold, where `most` is the largest step."""
    asked = found.asked
    stages = tuple(held(laid, most, asked.server, asked.load.page_size))
    limit = asked.cluster.memory_limit_bytes
    room = min(h.room(limit, asked.load.page_size) for h in stages)
    return replace(found, held=stages, kv_tokens=room, laid=laid)


def steps_of(asked: Asked, plan: Plan) -> Steps:
    """The steps of one engine of a plan that can be served."""
    return Steps(
        lay(request_of(asked.model, engine(plan), asked.dtype)), asked.machine, asked.server
    )


def engine(plan: Plan) -> Plan:
    """One of the plan's engines."""
    return plan.with_("mesh", dp_replicate=1)


def wrongs(asked: Asked, plan: Plan) -> list[Problem]:
    """Why a plan serves nothing; empty where it may."""
    load, spec = asked.load, asked.model
    try:
        request = request_of(spec, engine(plan), asked.dtype)
    except UsageError as error:
        return [Problem("serve", error.key or "plan", error.message, asked=str(plan))]
    found = [p for p in problems(request) if p.severity == "error"]
    if plan.world_size > asked.cluster.devices:
        text = f"{plan} has {plan.world_size} ranks, the cluster {asked.cluster.devices} devices"
        limit = f"{asked.cluster.devices} ranks"
        found.append(Problem("mesh", "devices", text, asked=str(plan.world_size), limit=limit))
    if load.tokens > spec.max_seq_len:
        text = (
            f"a prompt of {load.prompt_len} and an answer of {load.output_len} tokens are {load.tokens}, "
            f"the model sees {spec.max_seq_len}"
        )
        found.append(Problem("serve", "length", text, limit=f"{spec.max_seq_len} tokens"))
    return found


def _largest(load: Load, running: int, depth: int) -> Shape:
    """The step that needs most: as many write as may beside a chunk of a prompt that is nearly read."""
    room = -(-load.max_batch_tokens // depth)
    decode = min(-(-running // depth), room)
    chunk = min(max(room - decode, 0), load.prompt_len * max(running, 1))
    return Shape(decode, load.tokens, chunk, load.prompt_len, decode + (1 if chunk else 0))


def _too_big(found: Serving) -> Problem:
    limit = f"{found.limit_bytes} bytes a rank"
    return Problem("memory", "fits", too_big(found), limit=limit)


def too_big(p: Serving) -> str:
    """Why not one request has room."""
    h, load = p.fullest, p.asked.load
    beside = f"weights of {format_bytes(h.weights)}"
    beside += f" and a step's {format_bytes(h.step)}" if h.step else ""
    room = format_bytes(p.limit_bytes)
    if p.kv_tokens <= 0:
        return f"{beside} leave no page of keys and values in {room} a rank"
    return f"beside {beside} pages hold {p.kv_tokens} tokens in {room} a rank, a request has {load.tokens}"


def _waits(found: Serving, running: int) -> Problem:
    text = (
        f"an engine's pages hold {running} of its {found.each} requests whole: the others wait, or give "
        "their pages up and are computed again"
    )
    limit = f"{running * found.engines} at once"
    asked = str(found.asked.load.concurrency)
    return Problem("memory", "waiting", text, asked=asked, limit=limit, severity="warning")


__all__ = ["Asked", "Load", "Serving", "predict", "steps_of", "wrongs"]
