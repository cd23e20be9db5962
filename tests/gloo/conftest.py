"""Small runs of `partita train`, each in a folder and with a scratch place of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import pytest

from partita.comm.processes import start_ranks


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test's runs keep what nobody needs later, so that leftovers are seen to be its own. No
    other test's ranks are of a fork server that looks for its place there."""
    get_temp_dir()  # multiprocessing's own outlives the test
    start_ranks(0, print, ())
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    before = server._forkserver_pid
    place = Path(tempfile.mkdtemp(prefix="f-"))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    yield place
    if server._forkserver_pid != before:
        server._stop()
    shutil.rmtree(place)
