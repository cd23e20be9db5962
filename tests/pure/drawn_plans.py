"""Plans whose every choice is made by chance."""

import random
from dataclasses import replace

from partita.planner.search.search import Node, Search, searcher
from partita.planner.space import Leaf, MeshChoice
from partita.spec.job import Job


def wide(model: str, cluster: str, batch: int, layers: int = 8) -> Search:
    """A search whose random plans show every bound; 'tiny-moe' has one layer without experts."""
    small_one = model.startswith("tiny")
    seq_len = 64 if small_one else 2048
    job = Job.of(
        "tiny" if small_one else model, cluster, "", global_batch_size=batch, seq_len=seq_len
    )
    layers = min(job.model.layers, layers) if not small_one else layers
    spec = replace(job.model, layers=layers)
    if model == "tiny-moe":
        spec = replace(
            spec, experts=8, top_k=2, dense_layers=1, expert_ffn_hidden=64, shared_experts=1
        )
    return searcher(replace(job, model=spec))


def random_leaf(search: Search, rng: random.Random, meshes: list[MeshChoice]) -> Node | None:
    """A plan with every choice made by chance; None where there is no such plan."""
    s, mesh = search.space, rng.choice(meshes)
    shape, tokens = rng.choice(s.shapes(mesh)), rng.choice(s.tokens(mesh))
    states = s.states(mesh, shape)
    if not states or s.batch // mesh.dp // tokens.micro > 32:
        return None
    leaf = Leaf(*rng.choice(s.schedules(mesh)), *rng.choice(states))
    return Node(4, 0.0, 0.0, 1, mesh, shape, tokens, leaf)
