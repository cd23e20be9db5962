import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "local"))
import verify_jobs

from partita.verify.parity import verify


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize("plan", ["tp2+sp", "dp2", "pp2:1f1b/4mb", "tp2+sp pp2/2mb recompute:full"])
def test_a_plan_equals_one_device_on_processes(plan, backend, tmp_path):
    found = verify(verify_jobs.job(tmp_path, f"{plan} fp64"), backend=backend)
    assert found.equal, str(found)
