"""A Hugging Face folder into ranks, and a checkpoint of ranks into a Hugging Face folder."""

import hf_models
import pytest
import torch
import verify_jobs
from saves import save_run

from partita.base.errors import CheckpointError
from partita.comm.local import local
from partita.comm.single import SingleWorld
from partita.model.families.read import Reader, read_slices
from partita.model.reference import Reference, weight_shapes
from partita.spec.job import Job
from partita.spec.model import ModelSpec
from partita.train.build import assemble
from partita.train.checkpoint import Ranks
from partita.train.export import export_checkpoint
from partita.verify.runs import boxes


def job(folder, tmp_path, plan, **model):
    return Job.load(
        {
            "name": "pretrained",
            "plan": plan,
            "model": {"path": str(folder), "init": "pretrained", **model},
            "cluster": {"preset": "laptop", "devices": 8, "memory_bytes": 1e9},
            "data": {"source": f"tokens:{verify_jobs.tokens(tmp_path, vocab=61)}"},
            "train": {"steps": 1, "global_batch_size": 4, "seq_len": 8, "comm_timeout_s": 20},
        }
    )


def whole(folder):
    spec = ModelSpec.from_hf_config(folder)
    reader = read_slices(folder, spec)
    shapes = weight_shapes(spec)
    return spec, {n: reader.read(n, tuple((0, k) for k in s)) for n, s in shapes.items()}


@pytest.mark.parametrize("plan", ["tp4+sp", "tp2 pp2/2mb", "dp2 tp2+sp pp2/2mb bf16"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_each_rank_reads_its_slices(kind, plan, tmp_path, monkeypatch):
    folder = hf_models.save_model(tmp_path / "model", kind, torch.float32)
    _, weights = whole(folder)
    asked = []
    read = Reader.read

    def counted(self, name, box):
        found = read(self, name, box)
        asked.append(found.numel())
        return found

    monkeypatch.setattr(Reader, "read", counted)
    stated = job(folder, tmp_path, plan)

    def one(world):
        return boxes(assemble(stated, world).model, lambda unit: unit.master)

    mesh = stated.plan.mesh
    with local(mesh.pp * mesh.dp_replicate * mesh.dp_shard * mesh.tp) as ranks:
        found = ranks.run(one)
    held = 0
    for rank in found:
        for name, parts in rank.items():
            for box, value in parts:
                assert torch.equal(value, weights[name][tuple(slice(a, b) for a, b in box)]), name
                held += value.numel()
    assert sum(asked) == held
    assert {n for rank in found for n in rank} == set(weights)


@pytest.mark.parametrize("kind", ["llama", "llama3-rope", "gpt2"])
def test_a_checkpoint_is_exported_with_equal_logits(kind, tmp_path):
    folder = hf_models.save_model(tmp_path / "model", kind, torch.float32)
    stated = job(folder, tmp_path, "1mb")
    built = assemble(stated, SingleWorld())
    plain = {"tokenizer": {}, "data": {}}
    saved = save_run(tmp_path / "run", 1, stated, built.model, built.update, plain, Ranks())
    done = export_checkpoint(saved, tmp_path / "out")
    spec, weights = whole(tmp_path / "out")
    assert done["bytes"] == 4 * spec.parameters() and not done["tokenizer"]
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        before, after = (
            hf_models.load_model(f, torch.float32)(ids).logits for f in (folder, tmp_path / "out")
        )
    assert torch.equal(before, after)
    ours = Reference(spec, weights).logits(ids)
    assert float((ours - before).abs().max() / before.abs().max()) < 1e-5
    piece = next(saved.glob("*.safetensors"))
    raw = bytearray(piece.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little")] ^= 1  # the first byte of the first weight
    piece.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"rank-0.safetensors"):
        export_checkpoint(saved, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_folder_of_another_size_than_the_job_says_is_refused(tmp_path):
    folder = hf_models.save_model(tmp_path / "model", "llama", torch.float32)
    with pytest.raises(CheckpointError, match=r"model.layers.2.\S+ is no tensor of the model"):
        assemble(job(folder, tmp_path, "1mb", layers=2), SingleWorld())
