"""AlexNet's split of 2012 on two ranks: each holds half of the channels, and they meet at three layers.

    python examples/alexnet.py        # half a minute on two cores

Trains a narrow AlexNet on scikit-learn's digits (1797 images of 8 x 8 pixels), 125 of them held out, and
prints how many of those it knows.
"""

import json
from pathlib import Path

import partita as pt

job = pt.Job.load(
    {
        "name": "alexnet",
        "plan": "split2 1mb",
        "model": {
            "family": "alexnet",
            "hidden": 64,
            "vocab": 10,
            "dropout": 0.1,
            "image": {
                "size": 8,
                "colors": 1,
                "channels": [16, 32, 48, 48, 32],
                "kernels": [3, 3, 3, 3, 3],
                "strides": [1, 1, 1, 1, 1],
                "paddings": [1, 1, 1, 1, 1],
                "norms": [1],
                "pools": [5],
            },
        },
        "cluster": {"preset": "laptop"},
        "data": {"source": "digits", "eval_fraction": 0.07},
        "train": {
            "steps": 150,
            "global_batch_size": 64,
            "seq_len": 1,
            "lr": 5e-3,
            "warmup_steps": 10,
            "lr_schedule": "cosine",
            "weight_decay": 0.01,
        },
    }
)
if __name__ == "__main__":
    report = pt.train(job)
    lines = [json.loads(x) for x in Path(report["run"], "metrics.jsonl").read_text().splitlines()]
    for line in (lines[0], lines[-1]):
        print(f"step {line['step']:>3}  loss {line['loss']:.3f}")
    print(f"held out: loss {lines[-1]['eval_loss']:.3f}, {lines[-1]['eval_accuracy']:.1%} known")
    assert lines[-1]["eval_accuracy"] >= 0.95
