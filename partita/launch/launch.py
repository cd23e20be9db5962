"""A job file and its plan -> the script or manifest that starts torchrun on every host of it.

    hosts x ranks = the plan's world, ranks of a host side by side as the cluster's nodes hold them

What is written stops as `partita train` does (one checkpoint at SIGTERM) and goes on from the newest
checkpoint when it is started again, so that a time limit, a lost node or an eviction costs the steps since
then. The plan stands in it as a line: 'auto' is searched for once, here, and not by each rank.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from partita.base.errors import UsageError, raise_all
from partita.base.text import did_you_mean
from partita.spec.job import Job

COMMON = {"python": "", "port": "29500", "restarts": "3", "grace_s": "120"}
SETTINGS: dict[str, dict[str, str | None]] = {  # and their defaults; None: must be set
    "slurm": {**COMMON, "port": "", "time": "24:00:00", "requeues": "10", "output": "%x-%j.out"},
    "kubernetes": {
        **COMMON, "image": None, "claim": None, "mount": "/work", "namespace": "default",
        "cpus": "", "memory": "", "shm": "16Gi", "failures": "10",
    },
    "ray": {**COMMON, "cpus": "1", "address": "auto"},
}  # fmt: skip
WHAT = {
    "image": "the container image that has partita",
    "claim": "the PersistentVolumeClaim that holds the run folder, read and written by all hosts",
}
FILES = {"slurm": "slurm.sh.j2", "kubernetes": "kubernetes.yaml.j2", "ray": "ray.py.j2"}
NUMBERS = ("port", "restarts", "grace_s", "requeues", "failures")
SBATCH = re.compile(r"[a-z][a-z-]*")  # a long option of sbatch
LONGEST = 52  # of a name, to which Kubernetes adds a pod's number and five characters of its own


@dataclass(frozen=True)
class Launch:
    """What a job asks of whoever starts it."""

    job: Path
    words: tuple[str, ...]  # behind the job's file: overrides and the plan
    name: str
    hosts: int
    ranks: int  # of a host
    cuda: bool

    @classmethod
    def of(cls, job: Job, path: str, overrides: Sequence[str] = ()) -> Launch:
        """For a loaded job. Raises UsageError where its ranks do not fill nodes."""
        world, node = job.plan.world_size, job.cluster.devices_per_node
        hosts = max(1, world // node)
        if world > node and world % node:
            less = world // node * node
            raise UsageError(
                f"the plan {job.plan} has {world} ranks, a node of {job.cluster.name} {node} devices: "
                f"torchrun starts as many on every host, so plans of {less} or {less + node} ranks "
                "can be launched"
            )
        words = (*(w for w in overrides if not w.startswith("plan=")), f"plan={job.plan}")
        return cls(
            Path(path).resolve(), words, job.name, hosts, world // hosts, job.device == "cuda"
        )


def text(launch: Launch, where: str, stated: Sequence[str], folder: Path) -> str:
    """What `where` (slurm, kubernetes, ray) is given. `stated` are KEY=VALUE; ranks run in `folder`, in a
    container in what is mounted. Raises UsageError for all that is wrong with them at once."""
    if where not in FILES:
        raise UsageError(
            f"launch knows {', '.join(FILES)}, not {where}{did_you_mean(where, tuple(FILES))}"
        )
    settings, options = read_settings(where, stated)
    environment = Environment(
        loader=PackageLoader("partita", "launch"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["sh"] = shlex.quote
    environment.filters["literal"] = repr
    environment.filters["json"] = _json
    if not settings["python"]:
        settings["python"] = "python" if where == "kubernetes" else sys.executable
    return environment.get_template(FILES[where]).render(
        launch=launch, set=settings, options=options, folder=str(folder), label=_label(launch.name),
        lines=launch.job.read_text().splitlines(),
    )  # fmt: skip


def read_settings(where: str, stated: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """KEY=VALUE as ({a setting: its value, defaults too}, {an option of sbatch: its value})."""
    known, problems = SETTINGS[where], []
    found, options = {k: v for k, v in known.items() if v is not None}, {}
    for item in stated:
        key, equals, value = item.partition("=")
        if not equals or "\n" in value:
            problems.append(
                (
                    None,
                    f"--set takes KEY=VALUE, not {item!r} (of an option without a value {item}=)",
                )
            )
        elif key in known:
            found[key] = value
            problems += _wrong(key, value)
        elif where == "slurm" and SBATCH.fullmatch(key):
            options[key] = value
        else:
            hint = did_you_mean(key, tuple(known))
            problems.append(
                (key, f"{where} has no setting {key!r}{hint}; it has {', '.join(known)}")
            )
    problems += [(k, f"{where} needs --set {k}=..., {WHAT[k]}") for k in known if k not in found]
    raise_all(problems)
    return found, options


def _wrong(key: str, value: str) -> list[tuple[str, str]]:
    """What is wrong with a number."""
    if key not in NUMBERS or (not value and key == "port"):
        return []
    most = 65535 if key == "port" else 10**6
    if not value.isdecimal() or not int(key == "port") <= int(value) <= most:
        return [(key, f"{key} = {value!r} is no whole number of at most {most}")]
    return []


def _label(name: str) -> str:
    """A name that DNS takes: letters, digits and hyphens, a letter first."""
    found = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    found = found if found[:1].isalpha() else f"job-{found}"
    return found[:LONGEST].rstrip("-")


def _json(value: object) -> str:
    """A string that YAML reads as it is."""
    return json.dumps(value)
