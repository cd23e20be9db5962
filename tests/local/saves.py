"""Small checkpoints, saved and loaded by several threads under any cut."""

import errno
import threading

import torch

from partita.train.checkpoints import background_save, checkpoint
from partita.train.checkpoints.checkpoint import Piece, Ranks, Wanted
from partita.train.checkpoints.resume import begin_save, pieces

SHAPES = {"blocks.0.wq": (8, 6), "blocks.0.norm": (6,), "embedding.table": (11, 6)}
ROLES = ("weight", "exp_avg")


def header(**fields):
    stated = {"plan": "tp2", "tensors": SHAPES, "roles": ROLES, "model": {"layers": 1}}
    return checkpoint.Header(**{**stated, **fields})


def value(name, role, step, dtype=torch.float32):
    count = torch.Size(SHAPES[name]).numel()
    start = 1000 * step + 100 * ROLES.index(role) + 10 * len(name)
    return (torch.arange(count, dtype=dtype) + start).view(SHAPES[name])


def boxes(shape, dim, ways):
    """The shape cut along `dim` in uneven parts."""
    edges = [shape[dim] * i // ways for i in range(ways + 1)]
    return [
        tuple((edges[i], edges[i + 1]) if d == dim else (0, n) for d, n in enumerate(shape))
        for i in range(ways)
    ]


def cut(rank, world, step, dim, dtype=torch.float32):
    for name, shape in SHAPES.items():
        for role in ROLES:
            box = boxes(shape, min(dim, len(shape) - 1), world)[rank]
            part = value(name, role, step, dtype)[tuple(slice(a, b) for a, b in box)]
            yield Piece(name, role, box, part)


class Meeting:
    """`agree` of several threads."""

    def __init__(self, world):
        self.barrier = threading.Barrier(world)
        self.said = [True] * world

    def ranks(self, rank, world):
        def agree(ok):
            self.said[rank] = ok
            self.barrier.wait(10)
            result = all(self.said)
            self.barrier.wait(10)
            return result

        return Ranks(rank, world, agree)


def save(folder, step, *, world=2, dim=0, dtype=torch.float32, keep_last=2, hurt=None, **fields):
    """Saves from `world` threads; returns the first rank's path, or raises what rank 0 raised."""
    meeting, results = Meeting(world), [None] * world

    def one(rank):
        try:
            parts = list(cut(rank, world, step, dim, dtype))
            if hurt == rank:
                parts[-1] = BrokenDisk(*(getattr(parts[-1], f) for f in Piece.__slots__))
            results[rank] = finished(
                folder, step, parts, header(**fields), meeting.ranks(rank, world), keep_last
            )
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(r,)) for r in range(world)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    assert len(set(results)) == 1
    return results[0]


def finished(folder, step, parts, head=None, ranks=checkpoint.ALONE, keep_last=2):
    """A save that is waited for; where it lies."""
    saving = checkpoint.Saving(folder, step, head or header(), ranks, keep_last)
    saves = background_save.Behind()
    saves.start(saving, parts)
    saves.finish()
    return saving.final


def alone(folder, step, keep_last=2):
    """A save of one rank, to its end."""
    return finished(folder, step, cut(0, 1, step, 0), keep_last=keep_last)


class Inline:
    """A thread that runs at once, in its caller's."""

    def __init__(self, target=None, **_):
        self.start = target

    def is_alive(self):
        return False

    def join(self, timeout):
        pass


class BrokenDisk(Piece):
    """A piece that no disk takes."""

    def copied(self):
        return self

    def raw(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def load(folder, *, world=1, dim=0, dtype=torch.float32):
    """Every role of every tensor, put together from what `world` ranks load."""
    whole = {(n, r): torch.zeros(s, dtype=dtype) for n, s in SHAPES.items() for r in ROLES}
    for rank in range(world):
        wanted = []
        for (name, role), tensor in whole.items():
            shape = SHAPES[name]
            box = boxes(shape, min(dim, len(shape) - 1), world)[rank]
            part = torch.full_like(tensor[tuple(slice(a, b) for a, b in box)], -1).contiguous()
            wanted.append((Wanted(name, role, shape, box, part.view(-1)), tensor, part))
        checkpoint.load(folder, [w for w, _, _ in wanted])
        for w, tensor, part in wanted:
            tensor[tuple(slice(a, b) for a, b in w.box)] = part
    return whole


def is_step(folder, step):
    whole = load(folder)
    return all(torch.equal(t, value(n, r, step)) for (n, r), t in whole.items())


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def flip(path, at, bit=1):
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def save_run(folder, step, job, model, update, data, ranks):
    """A run's checkpoint, written before it returns; each rank calls it."""
    saving = begin_save(folder, step, job, model, update, data, ranks)
    writer = background_save.Behind()
    writer.start(saving, pieces(model, update, job))
    if writer.in_flight:
        writer.finish()
    return saving.final
