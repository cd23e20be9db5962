"""How one engine goes under a load: time to the first token, time between tokens, requests a second.

Requests of one length come as fast as others end, so many at once. What the scheduler does, in the mean of
many steps: each sequence that writes is in every cycle, a prompt takes what room a step has left. With d
sequences that write, w = output - 1 tokens each behind the first, and a step's room of B - d for prompts of
P tokens:

    a prompt is read in       n = max(1, P / (B - d)) cycles
    of all C requests         d (1 + n / w) = C write, unless d P / w prompt tokens a cycle find no room

A share of the steps has a chunk of a prompt, the others have none: a cycle takes their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from partita.simulate.serving.cut import Shape
from partita.simulate.serving.step import Step, Steps

PAGE_SIZE = 16
BATCH_TOKENS = 512  # of a step, where nothing is said: `partita serve`'s


@dataclass(frozen=True)
class Load:
    """What is asked of a server: requests of one length, so many at once."""

    prompt_len: int
    output_len: int
    concurrency: int = 1
    max_batch_tokens: int = BATCH_TOKENS
    page_size: int = PAGE_SIZE

    @property
    def tokens(self) -> int:
        """Of a whole request."""
        return self.prompt_len + self.output_len

    @property
    def context(self) -> float:
        """Tokens before the one that is written, in the mean."""
        return self.prompt_len + self.output_len / 2


@dataclass(frozen=True)
class Rates:
    """How one engine goes under a load. `cycle`: the mean step by cause, of all stages."""

    running: int
    writing: float
    ttft_s: float
    ttft_alone_s: float
    itl_s: float
    itl_alone_s: float
    requests_per_s: float
    cycle: dict[str, float]
    bytes_per_s: float  # that kernels of a rank move, in the mean


def rates(steps: Steps, load: Load, running: int) -> Rates:
    """How an engine goes with so many requests at once."""
    depth = steps.laid.sizes["pp"]
    writing = writing_of(load, running, depth)
    room = _part(load.max_batch_tokens, depth)
    after = load.output_len - 1
    under_way = min(float(depth), max(writing, 1.0)) if after else float(min(depth, running))
    each = max(round(writing / under_way), 1) if after else 0
    left = max(room - each, 1)
    ready = writing / after if after else float(running)  # prompts to read in a cycle
    asked = ready / under_way * load.prompt_len
    chunk = max(min(max(min(load.prompt_len, left), round(asked)), left), 1)
    share = min(asked / chunk, 1.0)
    mixed = _shape(load, each, chunk)
    plain = _shape(load, each, 0)
    with_chunk = steps.step(mixed, under_way)
    without = steps.step(plain, under_way) if each else with_chunk
    cycle = share * with_chunk.cycle_s(under_way) + (1 - share) * without.cycle_s(under_way)
    ended = writing / after if after else chunk * under_way / load.prompt_len  # in a cycle
    reads = max(1.0, load.prompt_len / left, (running - writing) / ended)
    waits = cycle / 2 if running > 1 else 0.0
    causes, moved = _mean(with_chunk, without, share)
    return Rates(
        running=running,
        writing=writing,
        ttft_s=reads * with_chunk.cycle_s(under_way) + waits,
        ttft_alone_s=first_alone_s(steps, load),
        itl_s=cycle,
        itl_alone_s=steps.step(_shape(load, 1, 0)).latency_s,
        requests_per_s=ended / cycle,
        cycle=causes,
        bytes_per_s=moved * under_way / depth / cycle,
    )


def writing_of(load: Load, running: int, depth: int) -> float:
    """How many of so many requests write, in the mean, while the others are read."""
    after, prompt = load.output_len - 1, load.prompt_len
    if not after:
        return 0.0
    room = _part(load.max_batch_tokens, depth)

    def all_of(d: float) -> float:
        left = max(room - d / min(depth, max(d, 1.0)), 1.0)
        return d * (1 + max(1.0, prompt / left) / after)

    low, high = 0.0, float(min(running, room * depth))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if all_of(middle) < running else (low, middle)
    return min(low, depth * room / (1 + prompt / after))


def first_alone_s(steps: Steps, load: Load) -> float:
    """Seconds to the first token of a request that is alone: each chunk waits for the one before."""
    room = min(_part(load.max_batch_tokens, steps.laid.sizes["pp"]), load.prompt_len)
    count = ceil(load.prompt_len / room)
    chunk = ceil(load.prompt_len / count)
    before = (count - 1) / 2 * chunk
    last = steps.step(Shape(chunk=chunk, before=before, wanted=1)).latency_s
    if count == 1:
        return last
    return last + (count - 1) * steps.step(Shape(chunk=chunk, before=before)).latency_s


def batch_s(steps: Steps, load: Load) -> tuple[float, float]:
    """Seconds of a batch of `concurrency` requests that begin and end together: their prompts at once, and
    all their further tokens."""
    many, depth = load.concurrency, steps.laid.sizes["pp"]
    at_once = max(load.max_batch_tokens // load.prompt_len, 1)
    prompts = min(at_once, many)
    read = Shape(chunk=prompts * load.prompt_len, wanted=prompts, prompts=prompts)
    first = steps.step(read, depth).cycle_s(1.0) * ceil(many / prompts)
    write = Shape(decode=many, context=load.context, wanted=many)
    return first, (load.output_len - 1) * steps.step(write).latency_s


def _shape(load: Load, writing: int, chunk: int) -> Shape:
    """A step of the load; a chunk of more than a prompt is of several."""
    prompts = max(round(chunk / load.prompt_len), 1)
    before = max(load.prompt_len - chunk / prompts, 0.0) / 2 if chunk else 0.0
    ended = min(1, chunk)
    return Shape(writing, load.context, chunk, before, writing + ended, prompts)


def _mean(first: Step, second: Step, share: float) -> tuple[dict[str, float], float]:
    """Causes of the mean step, of all stages and messages, and the bytes that kernels move in it."""
    causes: dict[str, float] = {}
    moved = 0.0
    for step, part in ((first, share), (second, 1 - share)):
        for stage in step.stages:
            moved += part * stage.bytes
            for name, s in stage.causes.items():
                causes[name] = causes.get(name, 0.0) + part * s
        causes["pp"] = causes.get("pp", 0.0) + part * sum(step.sends_s)
    return {name: s for name, s in causes.items() if s}, moved


def _part(whole: int, depth: int) -> int:
    return -(-whole // depth)
