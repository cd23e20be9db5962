"""What is predicted of published servers is as near as the page says."""

from __future__ import annotations

from statistics import fmean

from validation.serving import PAGE, groups, scored


def test_published_servers():
    rows = scored()
    page = PAGE.read_text(encoding="utf-8")
    for group in groups(rows):
        assert f"| {' | '.join(group)} |" in page
    written = [r.ratio for r in rows if r.row["metric"].endswith("tokens_per_s")]
    assert len(written) == 67 and fmean(abs(r - 1) for r in written) < 0.1
    assert abs(fmean(written) - 1) < 0.03  # neither too fast nor too slow
