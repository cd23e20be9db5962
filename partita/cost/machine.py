"""What a device and its software really reach: facts of the device, and a few fitted constants.

    facts       compute units of a device; what a program fuses, overlaps and keeps (software.toml): public
                data and source code, nothing fitted
    Constants   at most eight a device, fitted once on published runs by `python -m validation.fit`
    Software    at most two a software era, fitted, or inferred of it

All constants stand in constants.toml, what every device shares in empirical.py; `partita validate` prints
them. A machine that was measured (`partita calibrate`) has no constants: its rates are what programs reach,
and pieces of layers take what was measured of them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any

from partita.base.errors import UsageError
from partita.cost.empirical import HOST_S, OLD_UNITS, RESTART
from partita.cost.pieces import ATTENTION, CROWDED, Seconds, between, curve, nearest
from partita.spec.cluster import Cluster
from partita.spec.corrected import slowed
from partita.spec.hardware import sustained
from partita.spec.unequal import weakest_of

Curve = tuple[tuple[float, float], ...]
FILE = Path(__file__).parent / "constants.toml"
FACTS = Path(__file__).parent / "software.toml"

# compute units of a device (SMs, CUs); 0: no tiles to count, a measured CPU or a systolic array
UNITS = {
    "V100": 80, "A100": 108, "H100": 132, "B200": 148, "B300": 148,
    "MI250X": 208, "MI300X": 304, "TPU": 0, "CPU": 0, "GPU": 108,
}  # fmt: skip
AFTER_AMPERE = ("H100", "B200", "B300")  # whose matmuls have instructions of their own
# rows of hardware.csv that share constants, by the beginning of their name; the first that fits counts
CLASSES = (
    ("H100", "H100"), ("H200", "H100"), ("H800", "H100"),
    ("GH200", "H100"), ("A100", "A100"), ("A800", "A100"), ("V100", "V100"), ("GB200", "B200"),
    ("B200", "B200"), ("GB300", "B300"), ("B300", "B300"), ("MI250X", "MI250X"),
    ("MI300X", "MI300X"), ("TPU", "TPU"), ("CPU", "CPU"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Constants:
    """Fractions of published rates that programs reach, and two times. At most eight a device."""

    matmul: float  # of the 16-bit peak (and wider), by large matmuls
    matmul_fp8: float  # of the fp8 peak
    matmul_fp4: float  # of the fp4 peak
    attention: float  # of the 16-bit peak, by fused attention of long sequences
    memory: float  # of the memory's rate
    inner: float  # of the inner link's rate
    outer: float  # of the outer links' rates
    launch_s: float  # between two kernels on the device


@dataclass(frozen=True, slots=True)
class Software:
    """What a training program adds: `host_s` seconds of the host a kernel (a device waits for a slow
    host), and what routing costs beyond its kernels (`experts`). The rest are facts: is attention fused,
    which collectives run beside compute."""

    name: str = "current"
    flash: bool = True
    flash_of_ampere: bool = False  # made of Ampere's instructions, on a later device too
    host_s: float = HOST_S
    # every kernel from dispatch to combine but matmuls, and the exchanges, take so many times as long
    experts: float = 1.0
    restart: float = RESTART  # kernels' worth of host time from a message to the next, if it syncs
    overlaps_backward: bool = True  # tp's collectives beside the weight gradients
    overlaps_forward: bool = False  # tp's collectives cut in pieces beside their matmuls
    softmax_of: int = 1  # scores' matrices that one kernel scales, masks and normalises at a time
    replays_layers: bool = (
        False  # full recomputation runs all of a layer again, its last matmul too
    )
    validates_after: bool = False  # zero-bubble schedules: steps follow rank by rank, checked later
    sends_block: bool = False  # a stage waits for its messages, in and out
    syncs_host: bool = False  # and the host for both: an empty device waits for its next kernels
    fuses_loss: bool = True  # else each step of the loss passes over 32-bit logits
    scatters_sends: bool = False  # tp ranks with equal tensors send a share each
    overlaps_gradients: bool = True  # their reduction runs beside the last backward
    gathers_again: bool = (
        False  # ZeRO-3: a layer that is run again is gathered for that, and after it
    )
    gathers_one_ahead: bool = False  # ZeRO-3: a matrix beside the compute of the one before
    leaves_once: bool = False  # rings leave a node over one adapter, each once
    reduces_whole: bool = False  # ZeRO-1 adds whole gradients everywhere, and keeps a part
    overlaps_exchanges: bool = False  # experts' rows travel beside another microbatch's compute
    overlaps_rings: bool = True  # cp's messages beside attention
    repeats_keys: bool = False  # what goes to cp's other ranks are keys of all heads, alike or not
    gradient_bytes: int = 4  # an element of a gradient, that waits and that is reduced
    keeps_fp8: bool = False  # under fp8 linears keep their inputs in 8 bits (TransformerEngine)
    keeps_gates_fp8: bool = False  # and what gates read too
    moment_bytes: int = 4  # an element of an optimizer's moment
    weighs_inside: bool = (
        False  # gates weigh what experts activate: what they hand back is not kept
    )
    keeps_remainders: bool = False  # of a master the 16 bits that its bf16 weight has not (apex)
    # FSDP under a pipeline: gathered weights and whole gradients stay from one microbatch to the next
    keeps_whole: bool = False
    loss_bytes: int = 0  # a logit, that an eager loss holds at once; 0: its own tensors alone
    shards_gradients: bool = False  # FSDP that gathers once a step keeps shards of gradients alone
    # moved to add an element of a weight's new gradient, or to lay it for its reduction, and a gathered
    # weight for its matmuls; 0: the matmul adds
    added_bytes: int = 0
    eager: tuple[str, ...] = ()  # pieces of layers that are a kernel for each of PyTorch's ops
    cast_bytes: int = 4  # moved as an element becomes one of 8 bits
    starts_each_expert: bool = False  # what experts multiply is a kernel for each of them
    fuses_experts: bool = False  # that kernel activates, and narrows what the next one reads
    small_kernels: bool = False  # it starts the unpriced ones of Megatron-Core's experts too
    starts_experts: bool = False  # the host does, whatever else of a layer a graph holds
    sends_rows_once: bool = False  # a token goes once to a node that holds several of its experts
    sorts_rows: bool = False  # and elsewhere rows are put by expert where they arrive

    @property
    def restart_s(self) -> float:
        """Seconds of the host between a message and the next kernel, where it waited for the message."""
        return self.restart * self.host_s if self.syncs_host else 0.0


MEASURED = Constants(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Rates:
    """What kernels of a dtype reach: compute units that are counted, FLOP/s of large matmuls and of
    attention, bytes a second, and what measured matmuls reach by size."""

    units: int
    flops: float
    attention: float
    memory: float
    reached: Curve


_rates = lru_cache(maxsize=4096)(Rates)  # one object for equal rates


@dataclass(frozen=True)
class Machine:
    """A cluster with what it reaches. `class_` names the constants."""

    cluster: Cluster
    class_: str
    constants: Constants
    software: Software

    @property
    def units(self) -> int:
        """Compute units that work on tiles; 0 where they are not counted."""
        return UNITS[self.class_]

    @property
    def memory_rate(self) -> float:
        """Bytes a second that elementwise kernels move."""
        return self.cluster.memory_bytes_per_s * self.constants.memory

    def rates(self, dtype: str) -> Rates:
        """What kernels of a dtype reach: one object for equal ones, by which caches may key."""
        if dtype not in self._known:
            told = self.rate(dtype), self.attention_rate, self.memory_rate
            self._known[dtype] = _rates(self.units, *told, self.reached(dtype))
        return self._known[dtype]

    @cached_property
    def _known(self) -> dict[str, Rates]:
        return {}

    def of_nodes(self, groups: frozenset[int]) -> Machine:
        """What the ranks on some groups of unequal nodes reach that go at one pace."""
        if groups not in self._parts:
            part = weakest_of(self.cluster, groups)
            class_ = device_class(part.device)
            constants = self.constants if class_ == self.class_ else constants_of(class_)
            self._parts[groups] = Machine(part, class_, constants, self.software)
        return self._parts[groups]

    @cached_property
    def _parts(self) -> dict[frozenset[int], Machine]:
        return {}

    def rate(self, dtype: str) -> float:
        """FLOP/s that large matmuls of a dtype reach."""
        c, clock = self.constants, sustained(self.cluster.device)
        if dtype == "fp4" and "fp4" in self.cluster.peak_flops:
            return clock * self.cluster.peak_flops["fp4"] * c.matmul_fp4
        low = dtype in ("fp8", "fp4")
        part = c.matmul_fp8 if low else c.matmul
        return clock * self.cluster.peak("fp8" if low else dtype) * part

    def reached(self, dtype: str) -> Curve:
        """What measured matmuls of a dtype reach: (FLOPs, FLOP/s) by size; empty where none was measured."""
        return self._reached.get(dtype, ())

    @cached_property
    def _reached(self) -> dict[str, Curve]:
        measured = self.cluster.matmul_flops_per_s or {}
        return {
            dtype: tuple(sorted((2.0 * prod(map(int, s.split("x"))), r) for s, r in rates.items()))
            for dtype, rates in measured.items()
        }

    def piece(self, name: str, dtype: str, keys: int = 0) -> Seconds | None:
        """Measured seconds of a piece of a layer by size, attention's of that many `keys`; None where it was
        not measured."""
        if name.startswith(ATTENTION):
            by_keys = self._attention.get((name, dtype))
            return between(max(keys, 1), by_keys) if by_keys else None
        return self._pieces.get((name, dtype))

    @cached_property
    def _pieces(self) -> dict[tuple[str, str], Seconds]:
        measured = self.cluster.piece_seconds or {}
        return {
            (name, dtype): curve(by_size)
            for dtype, by_name in measured.items()
            for name, by_size in by_name.items()
        }

    @cached_property
    def _attention(self) -> dict[tuple[str, str], dict[int, Seconds]]:
        found: dict[tuple[str, str], dict[int, Seconds]] = {}
        for (name, dtype), seconds in self._pieces.items():
            head, _, keys = name.partition(" ")
            if keys:
                found.setdefault((head, dtype), {})[int(keys)] = seconds
        return found

    def collective(self, name: str, ranks: int, crowded: bool = False) -> Seconds | None:
        """Measured seconds of a collective by bytes handed in, over the number of ranks that is nearest; of a
        `crowded` one beside groups with which it takes turns, where that was measured."""
        beside = self._collectives.get(name + CROWDED, {})
        if crowded and ranks in beside:
            return beside[ranks]
        by_ranks = self._collectives.get(name)
        return nearest(ranks, by_ranks) if by_ranks else None

    @cached_property
    def _collectives(self) -> dict[str, dict[int, Seconds]]:
        measured = self.cluster.collective_seconds or {}
        return {
            name: {int(n): curve(by_size) for n, by_size in by_ranks.items()}
            for name, by_ranks in measured.items()
        }

    @property
    def attention_rate(self) -> float:
        """FLOP/s of fused attention in 16 bits; it never runs in fewer."""
        peak = sustained(self.cluster.device) * self.cluster.peak("bf16")
        is_old = self.software.flash_of_ampere and self.class_ in AFTER_AMPERE
        return peak * self.constants.attention * (OLD_UNITS if is_old else 1)


def device_class(device: str) -> str:
    """The name of the constants of a device of hardware.csv."""
    return next((c for start, c in CLASSES if device.upper().startswith(start.upper())), "GPU")


@cache
def table(file: Path = FILE) -> dict[str, Any]:
    """The constants as stated, with each era's facts: {'device': {class: ...}, 'software': {name: ...}}."""
    found = tomllib.loads(file.read_text(encoding="utf-8"))
    eras = facts()
    fitted = found.get("software", {})
    return {**found, "software": {n: {**own, **fitted.get(n, {})} for n, own in eras.items()}}


@cache
def facts() -> dict[str, dict[str, Any]]:
    """What each software era does, those it is like included."""
    stated = tomllib.loads(FACTS.read_text(encoding="utf-8"))

    def whole(name: str) -> dict[str, Any]:
        own = dict(stated[name])
        return {**(whole(own.pop("like")) if "like" in own else {}), **own}

    return {name: whole(name) for name in stated}


def constants_of(class_: str, stated: Mapping[str, Any] | None = None) -> Constants:
    """The constants of a class of devices; a class without its own takes the GPU's."""
    if class_ == "CPU":
        return MEASURED
    devices = (stated or table())["device"]
    known = {f.name for f in fields(Constants)}
    values = {**devices.get("GPU", {}), **devices.get(class_, {})}
    if set(values) - known:
        raise UsageError(f"no constant '{min(set(values) - known)}' of a device", key=class_)
    return Constants(**values)


def software_of(name: str, stated: Mapping[str, Any] | None = None) -> Software:
    """A software era by name. Raises UsageError with the known ones."""
    eras = (stated or table())["software"]
    if name not in eras:
        raise UsageError(f"no software '{name}', only {', '.join(eras)}", key="software")
    return Software(name=name, **eras[name])


def machine_of(
    cluster: Cluster, software: str = "current", stated: Mapping[str, Any] | None = None
) -> Machine:
    """The cluster, as much slower as plans were on it, with the constants of its device and of a software
    era."""
    cluster = slowed(cluster)
    class_ = device_class(cluster.device)
    era = software_of(software, stated)
    if class_ == "CPU":
        # its cores copy what they send: nothing travels under compute
        era = replace(
            era, host_s=0.0, overlaps_backward=False, overlaps_forward=False, overlaps_gradients=False,
            overlaps_rings=False, sends_block=True,
        )  # fmt: skip
    return Machine(cluster, class_, constants_of(class_, stated), era)
