"""A Hugging Face folder into ranks, and a checkpoint of ranks into a Hugging Face folder."""

import json

import hf_models
import pytest
import torch
import verify_jobs
from saves import save_run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig

from partita.base.errors import CheckpointError
from partita.comm.single import SingleWorld
from partita.comm.threads.local import local
from partita.model.families.read import Reader, read_slices
from partita.model.reference import Reference, weight_shapes
from partita.spec.job import Job
from partita.spec.model import ModelSpec
from partita.train.build import assemble
from partita.train.checkpoints.checkpoint import Ranks
from partita.train.checkpoints.export import export_checkpoint
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


def saved_run(folder, job):
    """The step folder of a run at its start."""
    built = assemble(job, SingleWorld())
    plain = {"tokenizer": {}, "data": {}}
    saved = save_run(folder / "checkpoints", 1, job, built.model, built.update, plain, Ranks())
    (folder / "job.toml").write_text(job.to_toml())
    return saved


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
    special = {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": None}
    config = json.loads((folder / "config.json").read_text()) | special
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"do_sample": true, "eos_token_id": [4, 5]}')
    stated = job(folder, tmp_path, "1mb")
    saved = saved_run(tmp_path / "run", stated)
    done = export_checkpoint(saved, tmp_path / "out")
    spec, weights = whole(tmp_path / "out")
    assert done["bytes"] == 4 * spec.parameters() and not done["tokenizer"]
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        before, after = (
            hf_models.load_model(f, torch.float32)(ids).logits for f in (folder, tmp_path / "out")
        )
    assert torch.equal(before, after)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: written[k] for k in special} == special
    generates = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generates.do_sample and generates.eos_token_id == [4, 5]
    ours = Reference(spec, weights).logits(ids)
    assert float((ours - before).abs().max() / before.abs().max()) < 1e-5
    piece = next(saved.glob("*.safetensors"))
    raw = bytearray(piece.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little")] ^= 1  # the first byte of the first weight
    piece.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"rank-0.safetensors"):
        export_checkpoint(saved, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("own", [True, False])
def test_a_tokenizer_and_what_ends_a_text_go_along(own, tmp_path):
    """The base's, with what stands beside it; trained on bytes a model ends nothing by the base's ids."""
    folder = hf_models.save_model(tmp_path / "model", "llama", torch.float32)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    words = {"a": 0, "b": 1, "</s>": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="b"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "text.txt").write_text("a b " * 100)
    data = {"source": str(tmp_path / "text.txt"), "tokenizer": str(folder) if own else "byte"}
    vocab = {} if own else {"vocab": 256, "init": "random"}
    table = job(folder, tmp_path, "1mb").to_table()
    stated = Job.load(table | {"data": data, "model": table["model"] | vocab})
    saved = saved_run(tmp_path / "run", stated)
    assert export_checkpoint(saved, tmp_path / "out")["tokenizer"] == own
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == (
        2 if own else None
    )
    assert (tmp_path / "out" / "tokenizer_config.json").exists() == own


def test_a_folder_of_another_size_than_the_job_says_is_refused(tmp_path):
    folder = hf_models.save_model(tmp_path / "model", "llama", torch.float32)
    with pytest.raises(CheckpointError, match=r"model.layers.2.\S+ is no tensor of the model"):
        assemble(job(folder, tmp_path, "1mb", layers=2), SingleWorld())
