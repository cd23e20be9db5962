"""The same 200 steps under six plans: one loss curve (docs/curves.md draws them). One of the six with each
commit in fp64, another in fp32."""

import pytest
from turns import in_turn

from benchmarks.curves import PLANS as DRAWN
from benchmarks.curves import apart, curve, rounding

# Of eight ranks with half the microbatches, which took half of all seconds
PLANS = (*DRAWN[:-1], "dp2 tp2+sp pp2:1f1b/2mb")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_in_fp64_the_curves_agree_at_every_step(tmp_path):
    want = curve("1mb fp64", tmp_path)
    assert len(want) == 200
    assert want[-1] < want[0]
    for plan in in_turn(PLANS, 6):
        assert apart(curve(f"{plan} fp64", tmp_path), want) <= 1e-8, plan


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_in_fp32_no_plan_leaves_further_than_order_does(tmp_path):
    want = curve("8mb fp32", tmp_path)
    chaos = apart(curve("8mb fp32", tmp_path, reverse=True), want)
    assert chaos > 0
    for plan in in_turn((*PLANS[3:], *PLANS[:3]), 6):
        assert apart(curve(f"{plan} fp32", tmp_path), want) <= 3 * chaos + rounding(want), plan
