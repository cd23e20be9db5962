"""The cost model's empirical numbers: how few, where from, and that all are told."""

import ast
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from partita.cost.empirical import READ, told
from partita.cost.kernels import Kernel, is_aligned, kernel_seconds
from partita.cost.machine import FILE as CONSTANTS
from partita.cost.machine import Constants, constants_of, facts, machine_of, software_of
from partita.simulate.groups import place
from partita.simulate.published.rows import case
from partita.simulate.published.validate import read_rows
from partita.spec.cluster import Cluster
from partita.spec.hardware import share_of_links
from validation.page import CAUSES, is_inferred

FILE = Path(__file__).parents[2] / "validation" / "measurements.csv"
# of the cost model: the files that price kernels, collectives and steps
PRICES = (
    "stage",
    "work",
    "step",
    "links",
    "moves",
    "groups",
    "pipeline",
    "predict",
    "memory",
    "away",
)
ALLOWED = {
    ("work", 2.5),  # attention's backward: five matmuls for two
    ("work", 0.5),  # bytes of an fp4
}


def guesses():
    return tomllib.loads((FILE.parent / "guesses.toml").read_text(encoding="utf-8"))


def test_constants_are_few_and_all_are_told():
    """At most 8 a device and 2 a software era: numbers that were fitted, and facts that were inferred of what
    the era measured. Every other fact has a source; the page says all of them, and `validate`."""
    page = (FILE.parents[1] / "docs" / "validation.md").read_text(encoding="utf-8")
    assert len(Constants.__dataclass_fields__) <= 8
    fitted = tomllib.loads(CONSTANTS.read_text(encoding="utf-8"))
    for era, own in facts().items():
        numbers = fitted["software"].get(era, {}).keys()
        assert numbers <= {"host_s", "experts", "restart"}
        inferred = {f for f in own if is_inferred(f)}
        assert len(numbers | inferred) <= 2, era
        assert own.keys() <= CAUSES["facts"].keys(), era
    for era in fitted["software"]:
        own = software_of(era)
        restart = f"{own.restart:.4g}" if own.syncs_host else ""
        assert f"| {era} | {own.host_s:.4g} | {own.experts:.4g} | {restart} |" in page
    assert fitted["device"]["GPU"] == guesses()["device"]["GPU"]  # of a device that nobody measured
    for device in fitted["device"].keys() - {"GPU"}:
        assert fitted["device"][device].keys() <= Constants.__dataclass_fields__.keys()
        own = constants_of(device)
        shown = " | ".join(f"{getattr(own, n):.4g}" for n in Constants.__dataclass_fields__)
        assert f"| {device} | {shown} |" in page
    for name, (value, origin, text) in told().items():
        assert f"| {name} | {value} | {text} | {origin} |" in page
    read = [name for name, (_, origin, _) in told().items() if origin == READ]
    assert len(read) <= 2, read  # beside a device's and an era's


def test_no_other_file_of_the_cost_model_has_an_empirical_number():
    """Fractions that stand in code are those of empirical.py, or follow (ALLOWED says from what)."""
    folder = Path(__file__).parents[2] / "partita"
    files = [*folder.glob("cost/*.py"), *(folder / "simulate" / f"{n}.py" for n in PRICES)]
    found = set()
    for file in files:
        if file.name == "empirical.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, float):
                found |= {(file.stem, node.value)} if node.value % 1 else set()
        assert "[empirical]" not in file.read_text(encoding="utf-8"), file
    assert found == ALLOWED


def test_rows_that_no_wide_load_meets_are_slow():
    """50,257 numbers in 16 bits begin at any even address, where no asynchronous copy may; Megatron-LM pads
    them, vTrain's tp 1 does not. Of 12,564 each row begins where one of 8 bytes may."""
    assert [is_aligned(2 * n) for n in (50304, 50257, 25128, 12564)] == [True, False, True, True]
    rows = read_rows(FILE)
    found = case(next(r for r in rows if r["group"] == "vtrain-single" and r["tp"] == "1"))
    machine = found.machine()
    one = Kernel("matmul", m=1024, n=50304, k=1024)
    assert kernel_seconds(replace(one, aligned=False), machine) > 1.7 * kernel_seconds(one, machine)
    assert found.model.vocab == 50257
    multi = case(next(r for r in rows if r["group"] == "vtrain-multi" and r["tp"] == "1"))
    assert multi.model.vocab == 50304


def test_a_cube_mesh_gives_a_group_its_own_lanes():
    """A DGX-1's device has 6 lanes: 1 to each of two, 2 to each of two others."""
    lanes = {n: 6 * share_of_links("V100-16GB", tuple(range(n))) for n in range(2, 9)}
    assert lanes == pytest.approx({2: 1, 3: 2, 4: 4, 5: 2, 6: 3, 7: 4, 8: 6})
    assert share_of_links("V100-32GB", (0, 1)) == 1.0
    assert 0 < share_of_links("V100-16GB", (0, 5)) < 1 / 6  # no lane: the host's bus
    machine = machine_of(Cluster.from_preset("16xv100-16gb"))
    whole, pair, both = (
        place(tuple(r), machine).inner.bytes_per_s for r in (range(8), (0, 1), (0, 4, 8, 9))
    )
    assert pair == pytest.approx(whole / 6)
    assert both == pair  # of two nodes the one with less
