"""32,768 tokens as one sequence over four ranks: a ring, and Ulysses inside a ring, make the same loss.

    python examples/long_context.py

Attention looks at 5e8 pairs of tokens a layer and head; each rank holds a quarter of the sequence, in the
order that gives all of them the same work, and a quarter of what one device would keep for backward.
"""

from __future__ import annotations

import time

import partita as pt

SEQ_LEN = 32_768
PLANS = ("cp4:ring", "cp4:hybrid2x2")


def job_of(plan: str) -> pt.Job:
    """A small model on the standard library's sources, a byte a token."""
    return pt.Job.load(
        {
            "name": "long-context",
            "plan": f"{plan} 1mb",
            "model": {
                "family": "llama",
                "layers": 1,
                "hidden": 32,
                "heads": 2,
                "kv_heads": 1,
                "head_dim": 16,
                "ffn_hidden": 96,
                "vocab": 512,
                "max_seq_len": SEQ_LEN,
            },
            "cluster": {"preset": "laptop"},
            "data": {"source": "python-stdlib", "tokenizer": "byte", "eval_fraction": 0.0},
            "train": {"steps": 1, "global_batch_size": 1, "seq_len": SEQ_LEN},
        }
    )


def one_step(context, job: pt.Job) -> float:
    """Loss of the first step on this rank, the same on all."""
    model, optimizer, data = pt.build(job, context)
    loss = model.forward_backward(next(iter(data)))
    optimizer.step()
    return loss


def activations(job: pt.Job) -> float:
    """Megabytes that a rank keeps for backward."""
    return pt.simulate(job).ledgers[0].at_peak["activations"] / 1e6


def main() -> None:
    """One step of each plan."""
    print(
        f"one device would keep {activations(job_of('')):.0f} MB for backward of {SEQ_LEN} tokens"
    )
    losses = []
    for plan in PLANS:
        job = job_of(plan)
        start = time.perf_counter()
        with pt.local(4, job.plan) as ranks:
            (loss, *others) = ranks.run(one_step, job)
        seconds = time.perf_counter() - start
        assert others == [loss] * 3
        losses.append(loss)
        kept = activations(job)
        print(f"{plan:<14} loss {loss:.6f}, {kept:.0f} MB a rank, {seconds:.1f} s a step")
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[0]


if __name__ == "__main__":
    main()
