"""Images as data: what is read, in which order, what is held out, and what is said of bad files."""

from dataclasses import replace

import image_jobs
import numpy as np
import pytest
import torch

from partita.base.errors import DataError, UsageError
from partita.spec.image import ImageSpec
from partita.spec.train import DataSpec
from partita.train.build import open_job_data


def opened(folder, source=None, fraction=0.25, **changed):
    job = image_jobs.job(folder, "1mb")
    source = source or image_jobs.write(folder, **changed)
    return open_job_data(replace(job, data=DataSpec(source=source, eval_fraction=fraction)))


def test_every_image_is_seen_once_an_epoch_less_the_mean_of_those_trained_on(tmp_path):
    data = opened(tmp_path)
    assert (data.num_sequences, data.num_eval_sequences) == (18, 6)
    with np.load(tmp_path / "images.npz") as held:
        images, labels = held["images"] / np.float32(255), held["labels"]
    mean = images[:18].mean(0, dtype=np.float64).astype(np.float32)
    order = [data.sample(step, i) for step in range(9) for i in range(8)]
    assert sorted(order[:18]) == sorted(order[18:36]) == list(range(18)) != order[:18]
    batch = data.microbatch(0, [0, 3])
    at = [data.sample(0, 0), data.sample(0, 3)]
    assert torch.equal(batch.ids, torch.from_numpy(images[at] - mean))
    assert batch.targets.tolist() == [[int(labels[i])] for i in at] and batch.valid.all()
    (held_out,) = data.eval_batches(8)
    assert torch.equal(held_out.ids, torch.from_numpy(images[18:] - mean))


def test_an_image_of_label_minus_100_is_not_counted(tmp_path):
    labels = np.full(24, -100)
    labels[::2] = 3
    batch = opened(tmp_path, fraction=0.0, labels=labels).train.batch(range(4), 1)
    assert batch.valid.tolist() == [[True], [False], [True], [False]]
    assert batch.targets.tolist() == [[3], [0], [3], [0]]


def test_digits_are_scikit_learns(tmp_path):
    job = image_jobs.job(tmp_path, "1mb", image={"size": 8, "colors": 1, "pools": [1]}, vocab=10)
    data = open_job_data(replace(job, data=DataSpec(source="digits")))
    assert data.num_sequences + data.num_eval_sequences == 1797
    assert data.unigram_entropy() == pytest.approx(np.log(10), abs=0.02)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"labels": np.full(24, 7)}, "label 0 is 7, outside [0, 7)"),
        ({"labels": np.zeros(23, int)}, "whole numbers [n] are needed"),
        ({"images": np.zeros((24, 2, 9, 8))}, "the model sees [2, 9, 9]"),
        ({"images": np.zeros((24, 9))}, "[n, h, w] or [n, colors, h, w]"),
        ({"labels": np.zeros(24)}, "whole numbers [n] are needed"),
    ],
)
def test_bad_content_is_said(changed, said, tmp_path):
    with pytest.raises(DataError) as error:
        opened(tmp_path, **changed)
    assert said in str(error.value)


def test_a_source_of_another_kind_is_said(tmp_path):
    for source in ("python-stdlib", f"images:{tmp_path / 'none.npz'}"):
        with pytest.raises(UsageError, match=r"data\.source"):
            opened(tmp_path, source)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="images"):
        opened(tmp_path, f"images:{tmp_path / 'text.npz'}")
    with pytest.raises(UsageError, match="leaves nothing"):
        ImageSpec(size=8)
