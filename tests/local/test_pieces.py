"""The pieces that are measured are what layers run: together they make the calls of a layer's modules (of one
with experts, where it stops as rows travel; one that does not makes three fewer of some ninety)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from partita.parallel.laid import lay
from partita.parallel.pp.pieces import run
from partita.simulate.predict import request_of
from partita.simulate.work import block_work
from partita.tune import pieces
from partita.tune.pieces import Bench, Made, On

SHAPE = (2, 16, 64, 96)


ATEN = torch.ops.aten
FREE = (
    ATEN.detach,
    ATEN._unsafe_view,
    ATEN.empty,
    ATEN.empty_like,
    ATEN.new_empty,
    ATEN.lift_fresh,
)


class Calls(TorchDispatchMode):
    """Counts kernels: calls of aten that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.overloadpacket not in FREE
        return func(*args, **(kwargs or {}))


def calls(run: Callable[[], object], _: float = 0.0) -> int:
    with Calls() as seen:
        run()
    return seen.count


def both(
    pieces: Sequence[Callable[..., Any]], inputs: Sequence[Tensor], _: float
) -> tuple[float, float]:
    made: list[Tensor] = []
    piece = pieces[-1]
    leaves = [x.clone().requires_grad_() for x in inputs]
    there = calls(lambda: made.append(piece(*leaves)))
    seed = torch.ones_like(made[0])
    return there, calls(lambda: torch.autograd.grad(made[0], leaves, seed))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("measure", "more", "within"),
    [
        (pieces.dense, {}, 0.03),
        (pieces.plain, {"family": "gpt2"}, 0.07),
        (pieces.experts, {"experts": 4, "top_k": 2, "expert_ffn_hidden": 64}, 0.03),
    ],
)
def test_pieces_make_the_calls_of_a_layer(dtype, measure, more, within) -> None:
    counts: Made = {}
    for made in ({}, counts):  # at its first call a kernel tries what it may rely on
        pieces.dense(Bench(dtype, SHAPE, 0.0, made, {}, On(both=both, one=calls)))
    bench = Bench(dtype, SHAPE, 0.0, counts, more, On(both=both, one=calls))
    if measure is pieces.plain:
        drops = Bench(dtype, SHAPE, 0.0, counts, {**more, "dropout": 0.1}, On(both=both, one=calls))
        measure(drops)
    elif measure is pieces.experts:
        measure(bench)
    samples, seq, hidden, _ = SHAPE
    laid = lay(request_of(bench.job))
    work = block_work(laid.stages[0].blocks[1], laid.sizes)

    def of(kernels: Sequence[Any]) -> float:
        found = 0.0
        for kernel in kernels:
            assert kernel.pieces, kernel
            for name, size in kernel.pieces:
                by_size = counts.get(name) or counts[f"{name} {seq}"]
                found += kernel.count * next(iter(by_size.values())) if size else 0
        return found

    if measure is pieces.experts:
        bench.layer.mlp.log.clear()  # each microbatch of a step has sums of its own, as the piece had
    x = bench.ones(samples, seq, hidden)
    there, back = both([lambda x: run(bench.layer.flow(x, bench.batch))], [x], 0.0)
    said = of(work.forward), of((*work.input, *work.weight))
    assert said == pytest.approx((there, back), rel=within)
