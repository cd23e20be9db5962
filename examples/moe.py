"""A mixture of experts on two ranks, ep2: each holds half of the experts, tokens travel to theirs and back.

    python examples/moe.py        # a minute at most on two cores

Trains four experts a layer, two a token, on the standard library's sources, with a balance loss of each
sequence; prints the loss, and how even the experts are, before and after.
"""

import json
from pathlib import Path

import partita as pt

job = pt.Job.load(
    {
        "name": "moe",
        "plan": "dp2 ep2 2mb",  # dp_shard2.zero0 ep2: the same ranks cut samples, and hold experts
        "model": {
            "family": "llama",
            "layers": 2,
            "hidden": 64,
            "heads": 4,
            "kv_heads": 2,
            "ffn_hidden": 128,
            "vocab": 256,
            "max_seq_len": 64,
            "experts": 4,
            "top_k": 2,
            "balance_loss": 0.01,
        },
        "cluster": {"preset": "laptop"},
        "data": {"source": "python-stdlib", "tokenizer": "byte"},
        "train": {
            "steps": 30,
            "global_batch_size": 16,
            "seq_len": 64,
            "lr": 3e-3,
            "warmup_steps": 5,
        },
    }
)
if __name__ == "__main__":
    report = pt.train(job)
    lines = [json.loads(x) for x in Path(report["run"], "metrics.jsonl").read_text().splitlines()]
    for line in (lines[0], lines[-1]):
        load = " ".join(f"{share:.0%}" for share in line["expert_load"])
        print(
            f"step {line['step']:>3}  loss {line['loss']:.3f}  rows of each expert {load}  "
            f"busiest {line['expert_imbalance']:.2f} of an even share"
        )
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["dropped_rows"] == 0
