"""Under bf16 sums over tokens are fp32, of biases, norms and tables, and so are the logits of a router."""

import image_jobs
import pytest
import torch
import verify_jobs

from partita.comm.single import SingleWorld
from partita.parallel.ep.router import Router
from partita.train.build import assemble
from partita.verify.runs import boxes


@pytest.mark.parametrize("family", ["llama", "gpt2", "alexnet"])
def test_sums_over_tokens_are_wide(family, tmp_path):
    """Sums of 512 tokens that are bf16 numbers all through were added up, or rounded, in bf16. The judge's
    own biases are such, so that verify says nothing of them."""
    if family == "alexnet":
        made = image_jobs.job(tmp_path, "1mb bf16")
    else:
        made = verify_jobs.job(tmp_path, "1mb bf16", family, seq=64, layers=1, tied=False)
    built = assemble(made, SingleWorld())
    built.model.forward_backward(built.batch(0))
    for name, parts in boxes(built.model, lambda unit: unit.gradient, trained=True).items():
        g = parts[0][1]
        if name.endswith(("bias", "norm", ".table", ".position")) and name != "head.table":
            narrow = (g.bfloat16().float() == g).double().mean()
            assert narrow < 1, name


def test_a_router_s_logits_are_wide(tmp_path, monkeypatch):
    """Rounded to bf16 they choose other experts for tokens that are near to two: verify allows it."""
    seen, scores = [], Router.scores
    monkeypatch.setattr(
        Router, "scores", lambda self, logits: seen.append(logits) or scores(self, logits)
    )
    made = verify_jobs.job(tmp_path, "1mb bf16", **verify_jobs.EXPERTS)
    built = assemble(made, SingleWorld())
    built.model.forward_backward(built.batch(0))
    assert seen and not any(torch.equal(x.bfloat16().float(), x) for x in seen)
