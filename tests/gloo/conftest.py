"""Small runs of `partita train`, each in a folder and with a scratch place of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing.util import get_temp_dir
from pathlib import Path

import pytest


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test's runs keep what nobody needs later, so that leftovers are seen to be its own."""
    get_temp_dir()  # multiprocessing's own outlives the test
    place = Path(tempfile.mkdtemp(prefix="f-"))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    yield place
    shutil.rmtree(place)
