"""Fits the constants of partita/cost/constants.toml on published runs: `python -m validation.fit`.

Gauss-Newton on log(predicted / measured), with the share of the bubble held while slopes are taken.
Each group weighs the same, whatever its number of rows; a row far off weighs less (soft L1 at SCALE); a
constant stays near its first guess where the data say nothing (one standard deviation: PRIOR of its
logarithm). The fit starts at the first guesses too (guesses.toml), alike for every device and era: the same
table and model give the same constants, whatever stands in constants.toml. Of vtrain-single every fourth row
is used. A constant is varied on the rows that depend on it: those of its device, or of its software era.

A group is left out by fitting again without its rows, with slopes of the optimum, until no constant
moves by SETTLED; so is every source with several groups, as `bridge-*`. The constants that this changes are
written to constants_left_out.toml; what they predict is then asked of the model itself.
"""

from __future__ import annotations

import argparse
import copy
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from partita.cost.empirical import HOST_S, RESTART
from partita.cost.machine import FILE, Constants, device_class, facts
from partita.simulate.published.validate import Scored, read_rows, score, work_seconds

HERE = Path(__file__).parent
GUESSES = HERE / "guesses.toml"
SCALE, PRIOR, STEP, SETTLED = 0.08, 0.5, 0.02, 1e-4
THINNED = {"vtrain-single": 4}
# Groups that take part in no fit: one row, or software that nobody else describes
REPORTED_ONLY = (
    "megatron-v1", "opt", "nnscaler", "zero", "sc21-fig18", "ds-ulysses", "deepseek-v3", "mcore-moe",
    "pytorch-fsdp", "bridge-skill",
)  # fmt: skip
HEADER = "# Fitted by `python -m validation.fit`; docs/validation.md says on what.\n"


def names_of(scored: Sequence[Scored]) -> list[tuple[str, str, str]]:
    """The constants that the rows depend on: (device | software, class, constant)."""
    classes = sorted({device_class(s.case.cluster.device) for s in scored})
    eras = sorted({s.case.software for s in scored})
    found = [("device", c, n) for c in classes for n in _constants(c, scored)]
    found += [("software", e, "host_s") for e in eras if facts()[e].get("host_s", HOST_S)]
    found += [("software", e, "restart") for e in eras if facts()[e].get("syncs_host")]
    sparse = {s.case.software for s in scored if s.case.model.experts}
    return found + [("software", e, "experts") for e in sorted(sparse)]


def _constants(class_: str, scored: Sequence[Scored]) -> list[str]:
    own = [s for s in scored if device_class(s.case.cluster.device) == class_]
    low = {s.row["precision"][:5] for s in own}
    skip = set()
    if not any(p.startswith(("fp8", "mxfp8")) for p in low):
        skip.add("matmul_fp8")
    if "nvfp4" not in low:
        skip.add("matmul_fp4")
    if class_ == "TPU":
        skip.add("launch_s")
    return [n for n in Constants.__dataclass_fields__ if n not in skip]


def rounded(kind: str, value: float) -> float:
    """Four digits; a fraction of a device's rate is at most 1."""
    return float(f"{min(value, 1.0) if kind == 'device' else value:.4g}")


COMMON = {"host_s": HOST_S, "experts": 1.0, "restart": float(RESTART)}


class Fit:
    """Rows, constants and their Jacobian."""

    def __init__(self, rows: Sequence[dict[str, str]]) -> None:
        self.table: dict[str, Any] = tomllib.loads(GUESSES.read_text(encoding="utf-8"))
        self.table["software"] = copy.deepcopy(facts())
        self.rows = rows
        self.scored = score(rows, self.table)[0]
        self.names = names_of(self.scored)
        self.first = np.log([self.get(n) for n in self.names])
        groups = Counter(s.row["group"] for s in self.scored)
        self.weight = np.array([groups[s.row["group"]] ** -0.5 for s in self.scored])
        self.groups = np.array([s.row["group"] for s in self.scored])

    def get(self, name: tuple[str, str, str]) -> float:
        """A constant's value."""
        kind, member, constant = name
        other = self.table["device"]["GPU"] if kind == "device" else COMMON
        return self.table[kind].get(member, {}).get(constant, other[constant])

    def put(self, x: np.ndarray) -> None:
        """Sets all constants from their logarithms."""
        for (kind, member, constant), value in zip(self.names, np.exp(x), strict=True):
            self.table[kind].setdefault(member, {})[constant] = rounded(kind, value)

    def residuals(self, which: np.ndarray | None = None) -> np.ndarray:
        """log(predicted / measured) of all rows, or of some."""
        rows = [s.row for s, w in zip(self.scored, _all(which, self.scored), strict=True) if w]
        found = {s.row["id"]: s for s in score(rows, self.table)[0]}
        return np.array(
            [np.log(found[r["id"]].predicted_s / found[r["id"]].measured_s) for r in rows]
        )

    def jacobian(self, x: np.ndarray, r: np.ndarray) -> np.ndarray:
        """Differences, each constant on the rows that depend on it."""
        found = np.zeros((len(r), len(x)))
        still = self.unplayed(np.ones(len(r), bool))
        for j, (kind, member, _) in enumerate(self.names):
            mine = np.array([self._depends(s, kind, member) for s in self.scored])
            moved = x.copy()
            moved[j] += STEP
            self.put(moved)
            found[mine, j] = (self.unplayed(mine) - still[mine]) / STEP
        self.put(x)
        return found

    def unplayed(self, which: np.ndarray) -> np.ndarray:
        """log of the busiest rank's work and of what follows it: a step without its bubble."""
        cases = [s.case for s, w in zip(self.scored, which, strict=True) if w]
        return np.log([work_seconds(c, self.table) for c in cases])

    @staticmethod
    def _depends(s: Scored, kind: str, member: str) -> bool:
        is_device = kind == "device"
        return (device_class(s.case.cluster.device) if is_device else s.case.software) == member

    def step(self, x: np.ndarray, r: np.ndarray, j: np.ndarray, used: np.ndarray) -> np.ndarray:
        """One damped Gauss-Newton step."""
        robust = (1 + (r / SCALE) ** 2) ** -0.25
        w = self.weight * robust * used / SCALE
        a = np.vstack([w[:, None] * j, np.eye(len(x)) / PRIOR])
        b = np.concatenate([-w * r, (self.first - x) / PRIOR])
        change = np.linalg.lstsq(a, b, rcond=None)[0]
        return x + np.clip(change, -0.3, 0.3)

    def cost(self, x: np.ndarray, r: np.ndarray, used: np.ndarray) -> float:
        """What is made least."""
        each = 2 * ((1 + (r / SCALE) ** 2) ** 0.5 - 1) * self.weight**2 * used
        return float(each.sum() + (((x - self.first) / PRIOR) ** 2).sum())


def _all(which: np.ndarray | None, scored: Sequence[Scored]) -> Sequence[bool]:
    return [True] * len(scored) if which is None else list(which)


def fit(rows: Sequence[dict[str, str]], rounds: int) -> tuple[Fit, np.ndarray, np.ndarray]:
    """The fit, its optimum and the Jacobian there."""
    f = Fit(rows)
    used = np.ones(len(f.scored))
    x = f.first.copy()
    r = f.residuals()
    for turn in range(rounds):
        j = f.jacobian(x, r)
        new = f.step(x, r, j, used)
        for _ in range(4):
            f.put(new)
            moved = f.residuals()
            if f.cost(new, moved, used) < f.cost(x, r, used):
                break
            new = (x + new) / 2
        else:
            break
        print(
            f"round {turn}: {f.cost(x, r, used):.4f} -> {f.cost(new, moved, used):.4f}", flush=True
        )
        gain = f.cost(x, r, used) - f.cost(new, moved, used)
        x, r = new, moved
        if gain < 1e-3 * f.cost(x, r, used):
            break
    f.put(x)
    return f, x, f.jacobian(x, r)


def leave_out(f: Fit, x: np.ndarray, r: np.ndarray, j: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The optimum of a fit without the rows that are `out`, of the model that is linear about `x`."""
    used, y = (~out).astype(float), x
    for _ in range(100):
        before, y = y, f.step(y, r + j @ (y - x), j, used)
        if float(np.abs(y - before).max()) < SETTLED:
            break
    return y


def changed(f: Fit, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """The constants that are another by more than 0.1 %."""
    found: dict[str, Any] = {}
    for (kind, member, constant), a, b in zip(f.names, x, y, strict=True):
        if abs(a - b) > 1e-3:
            found.setdefault(kind, {}).setdefault(member, {})[constant] = rounded(kind, np.exp(b))
    return found


def sources(groups: Sequence[str]) -> dict[str, list[str]]:
    """What is left out: each group, and together those of a source that has several: by their names' first
    parts."""
    found = {g: [g] for g in sorted(set(groups))}
    for start in sorted({g.partition("-")[0] for g in groups}):
        own = [g for g in found if g.partition("-")[0] == start and not g.endswith("*")]
        if len(own) > 1:
            found[f"{start}-*"] = own
    return found


def stated(f: Fit) -> dict[str, Any]:
    """What is written of a fit: devices' constants, and an era's where it is not everybody's."""
    eras: dict[str, Any] = {}
    for kind, era, constant in f.names:
        value = f.get((kind, era, constant))
        if kind == "software" and abs(value / COMMON[constant] - 1) > 0.02:
            eras.setdefault(era, {})[constant] = value
    on = {"groups": sorted(set(f.groups))}
    return {"device": f.table["device"], "software": eras, "fitted_on": on}


def main() -> None:
    """Fits, writes both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--groups", default="", help="only these, separated by commas; nothing is left out"
    )
    words = parser.parse_args()
    seen: Counter[str] = Counter()
    rows = []
    for row in read_rows(HERE / "measurements.csv"):
        seen[row["group"]] += 1
        chosen = not words.groups or row["group"] in words.groups.split(",")
        if row["group"] in REPORTED_ONLY or not chosen:
            continue
        if seen[row["group"]] % THINNED.get(row["group"], 1) == 0:
            rows.append(row)
    f, x, j = fit(rows, words.rounds)
    FILE.write_text(HEADER + tomli_w.dumps(stated(f)), encoding="utf-8")
    for name in f.names:
        print(*name, f.get(name))
    if not words.groups:
        r = f.residuals()
        out = {}
        for name, gone in sources(list(f.groups)).items():
            y = leave_out(f, x, r, j, np.isin(f.groups, gone))
            out[name] = changed(f, x, y)
        path = FILE.parent / "constants_left_out.toml"
        path.write_text(HEADER + tomli_w.dumps(out), encoding="utf-8")


if __name__ == "__main__":
    main()
