"""Hundreds of requests that end at any moment leave every page free."""

import random

import pytest
import torch

from partita.serve.core import Core
from partita.serve.request import SamplingParams
from partita.serve.runner import Ready
from partita.serve.stream import Asked, Stream
from partita.serve.text import Vocabulary
from partita.train.data.tokenizer import Tokenizer

REQUESTS = 200


class Cyclic:
    """A model whose next token follows from the last: texts repeat themselves, so that drafts hold."""

    def __init__(self, depth: int) -> None:
        self.vocab, self.max_len, self.pages, self.page_size, self.depth = 256, 200, 16, 4, depth

    def start(self, pieces):
        wanted = [t for p in pieces for t in p.tokens[len(p.tokens) - p.want :]]
        return Ready(
            torch.nn.functional.one_hot((torch.tensor(wanted, dtype=torch.int64) + 1) % 5, 256)
            * 9.0
        )


@pytest.mark.parametrize(("depth", "speculate"), [(1, 0), (1, 3), (3, 0)])
def test_cancels_at_any_moment_leave_every_page_free(depth, speculate):
    dice, told = random.Random(depth + speculate), []
    core = Core(
        Cyclic(depth), Vocabulary(Tokenizer("byte")), (), max_batch_tokens=24, max_sequences=6,
        speculate=speculate,
    )  # fmt: skip
    streams = []
    for number in range(REQUESTS):
        prompt = tuple(dice.choices(range(5), k=dice.randint(1, 30)))
        params = SamplingParams(
            max_tokens=dice.randint(1, 20), temperature=0.0, n=dice.randint(1, 3)
        )
        asked = Asked(number, prompt, params, dice.randrange(9), 0.0)
        streams.append(Stream(asked, lambda stream: None, told.append))
        core.add(streams[-1])
        for _ in range(dice.randint(0, 3)):
            core.step()
        core.cancel(dice.choice(streams))
        core.pool.check()
    while core.busy:
        core.step()
    while core._under_way:  # of those that were cancelled while a step had them
        core.step()
    core.pool.check()
    assert core.pool.free == core.pool.pages and not core.scheduler.running
    assert all(stream.done for stream in streams)
    ends = sum(delta.finish_reason is not None for delta in told)
    assert ends == sum(s.params.n for s in streams) == sum(core.counts.finished.values())
    assert core.counts.finished["abort"] > 50 < core.counts.finished["length"]
    assert core.scheduler.preemptions > 0
