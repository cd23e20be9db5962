"""Kernels of a serving step: the laid program's at its rows, but for two that a step has otherwise.

    attention   writes its sequences' keys into pages and reads all that stand there: a token that is written
                reads as many as stand before it, a chunk of a prompt those too and, causally, its own
    experts     a step of few tokens meets few of them: of E experts, k a token chosen evenly, n tokens meet

                    E (1 - (1 - k/E)^n)

                and the weights of no other are read

Latents (DeepSeek) are attended to as they lie in pages, by all heads as one: scores over kv + rope numbers,
values of kv. What makes keys and values of them multiplies queries and outputs, at the same cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod

from partita.cost.kernels import Kernel
from partita.cost.pieces import ATTENTION
from partita.parallel.laid import Laid
from partita.parallel.read import BYTES, bytes_of
from partita.simulate.serving.cut import Piece, Shape
from partita.simulate.serving.kept import keeps_latents, token_bytes
from partita.simulate.work import block_work
from partita.spec.program import Block, Op


@dataclass(frozen=True)
class Server:
    """What a program that serves does beside its kernels. `gathers`: keys and values are copied from their
    pages, then attended to. `graphs`: no host starts kernels one by one. `expands`: of a prompt's chunk keys
    and values are made of their latents, as in training."""

    name: str
    gathers: bool
    graphs: bool
    expands: bool


SERVERS = {
    "partita": Server("partita", gathers=True, graphs=False, expands=False),
    "graphs": Server("graphs", gathers=False, graphs=True, expands=True),
}


def kernels_of(piece: Piece, laid: Laid, shape: Shape, server: Server) -> list[Kernel]:
    """What one block of a piece runs in a step."""
    block, found = piece.block, list[Kernel]()
    for kernel in block_work(block, laid.sizes).forward:
        if kernel.kind == "attention":
            core = next(op for op in block.ops() if op.kind == "attention")
            found += _attention(core, block, laid, shape, server)
        elif kernel.pieces and kernel.pieces[0][0] == "grouped":
            found.append(_met(kernel, laid, shape.tokens))
        else:
            found.append(kernel)
    return found


def touched(laid: Laid, tokens: int) -> tuple[float, float]:
    """(experts of a rank that some token meets, rows that come to them) where a step has so many tokens."""
    spec, sizes = laid.request.model, laid.sizes
    group = tokens / sizes["efsdp"] if laid.request.plan.mesh.sp else float(tokens)
    here = spec.experts / sizes["ep"]
    return here * (1 - (1 - spec.top_k / spec.experts) ** group), group * spec.top_k / sizes["ep"]


def _met(kernel: Kernel, laid: Laid, tokens: int) -> Kernel:
    """A product of experts, by those that are met."""
    experts, rows = touched(laid, tokens)
    count = max(ceil(experts), 1)
    m = max(ceil(rows / count), 1)
    size = BYTES[kernel.dtype]
    moved = size * (experts * kernel.k * kernel.n + rows * (kernel.k + kernel.n))
    pieces = (("grouped", 2.0 * m * kernel.n * kernel.k),)
    return replace(kernel, m=m, count=count, each=count, bytes=moved, pieces=pieces)


def _attention(
    core: Op, block: Block, laid: Laid, shape: Shape, server: Server
) -> Iterator[Kernel]:
    """Of the tokens that are written, and of the chunks; with the copies out of the pages."""
    each, dtype = token_bytes(laid), block.tensors[core.reads[0]].dtype
    handed = bytes_of(block, laid.sizes)
    own = (handed[core.reads[0]] + handed[core.writes]) / shape.tokens
    elements = sum(block.tensors[n].local(laid.sizes) for n in core.reads)
    split = (("split", float(elements)),)
    if shape.decode:
        keys = shape.decode * (shape.context + 1)
        yield from _copied(shape.decode * shape.context * each, dtype, server)
        moved = keys * each + shape.decode * own
        pair = _pair(core, laid, server, chunk=False)
        yield _kernel(moved, keys * pair, shape.context + 1, dtype, pair, split)
    if shape.chunk:
        alone = shape.chunk / shape.prompts
        pairs = shape.chunk * (shape.before + (alone + 1) / 2)
        yield from _copied(shape.prompts * shape.before * each, dtype, server)
        moved = (shape.prompts * shape.before + shape.chunk) * each + shape.chunk * own
        pair = _pair(core, laid, server, chunk=True)
        yield _kernel(moved, pairs * pair, shape.before + alone, dtype, pair, split)


def _copied(size: float, dtype: str, server: Server) -> Iterator[Kernel]:
    """Read from pages, written side by side."""
    if server.gathers and size:
        yield Kernel("memory", 2 * size, dtype=dtype)


def _kernel(
    moved: float, flops: float, keys: float, dtype: str, pair: float,
    split: tuple[tuple[str, float], ...],
) -> Kernel:  # fmt: skip
    """Pieces are measured by the points of a whole square, of which causal attention computes half: two
    points a multiply-add."""
    pieces = ((ATTENTION, flops / 2), *split)
    return Kernel("attention", moved, k=ceil(keys), flops=flops, dtype=dtype, pieces=pieces)


def _pair(core: Op, laid: Laid, server: Server, chunk: bool) -> float:
    """FLOPs of a query and a key, all heads of the rank."""
    local = {d.name: d.local(laid.sizes) for d in core.space}
    latent = laid.request.model.latent
    if latent is not None and keeps_latents(laid.request.model) and not (chunk and server.expands):
        return 2.0 * local["heads"] * (2 * latent.kv + latent.rope)
    inner = prod(n for name, n in local.items() if name not in ("batch", "seq", "keys"))
    return float(core.flops_per_point * inner)
