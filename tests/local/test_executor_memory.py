"""What the executor holds between a forward and its backward."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
from clocked_stages import clocked_executor

from partita.comm.threads.local import local
from partita.schedule.make import schedule

AT_ONCE = SimpleNamespace(F=0.0, I=0.0, W=0.0)


@pytest.mark.parametrize(("name", "v"), [("gpipe", 1), ("zb_h1", 1), ("interleaved_1f1b", 2)])
def test_an_output_that_was_sent_is_not_held_until_its_backward(name, v):
    """Of every stage but the last, whose outputs are losses: each is gone once the next action runs."""
    made = schedule(name, num_ranks=2, num_microbatches=4, virtual_stages=v)

    def outputs_at_each_forward(world):
        executor, made_by, alive = clocked_executor(world, made, AT_ONCE), [], []
        modules = executor.modules

        def watched(stage):
            def run(x, batch):
                alive.append(sum(of() is not None for of in made_by))
                y = modules[stage](x, batch)
                if stage < made.num_stages - 1:
                    made_by.append(weakref.ref(y.untyped_storage()))
                return y

            return run

        executor.modules = {s: watched(s) for s in modules}
        executor.run([None] * 4)
        return alive

    with local(2, 20) as ranks:
        for alive in ranks.run(outputs_at_each_forward):
            assert len(alive) == 4 * v
            assert max(alive) == 0
