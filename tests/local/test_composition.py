"""Features compose: plans that hold every legal pair of them, each equal to one device: in float64 (SGD), and
at its own precision (AdamW) within the bounds of docs/verify.md."""

import covering
import covering_docs
import covering_jobs
import pytest

from partita.verify.parity import verify

# The heaviest rows train eight thread ranks for many seconds, on a starved machine for more than a minute
pytestmark = pytest.mark.timeout(240)


def test_every_legal_pair_stands_in_a_plan():
    covered = set().union(*map(covering.pairs, covering_jobs.ROWS))
    assert covering.wanted().keys() <= covered
    assert all(map(covering.legal, covering_jobs.ROWS))
    fewer = "python tests/local/covering_search.py looks for fewer"
    assert 60 <= len(covering_jobs.ROWS) <= 90, fewer


def test_the_page_names_every_plan_and_what_refuses_the_rest(tmp_path):
    made = covering_docs.page(tmp_path)
    assert covering_docs.PAGE.read_text() == made, "python tests/local/covering_docs.py writes it"


ONLY = ("fp64", "plan")
WAYS = [
    pytest.param(row, way, marks=pytest.mark.slow if part else [])
    for part in range(2)
    for row in covering.third(covering_jobs.ROWS, part)
    for way in ONLY
]


@pytest.mark.turns(2)
@pytest.mark.parametrize(("row", "only"), WAYS, ids=lambda x: x if x in ONLY else covering.name(x))
def test_a_plan_of_many_features_equals_one_device(row, only, tmp_path):
    """In float64 one half of them, at its own precision the other, as they take turns."""
    found = verify(covering_jobs.job(tmp_path, row), brief=True, only=only)
    assert found.equal, str(found)
