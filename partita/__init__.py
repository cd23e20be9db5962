"""Partita: one plan for a model too big for one device: find it, check it, run it, see it.

Everything that needs torch is imported when it is first used, so that planning for thousands of
devices starts in a fraction of a second.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Job": "partita.spec.job",
    "Plan": "partita.spec.plan",
    "ModelSpec": "partita.spec.model",
    "Cluster": "partita.spec.cluster",
    "schedule": "partita.schedule.make",
    "simulate": "partita.simulate.predict",
    "verify": "partita.verify.parity",
    "train": "partita.train.launch.launcher",
    "build": "partita.train.build",
    "local": "partita.comm.ranks",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    """Finds public names where they live, on first use."""
    if name not in _WHERE:
        raise AttributeError(f"partita has no '{name}'; it has {', '.join(sorted(_WHERE))}")
    return getattr(import_module(_WHERE[name]), name)
