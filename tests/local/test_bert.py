"""BERT beside transformers' BertForMaskedLM, both ways, and under plans beside one device."""

import json

import pytest
import torch
import verify_jobs
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM

from partita.base.errors import CheckpointError, UsageError
from partita.model.families.config import hf_config
from partita.model.families.export import export
from partita.model.families.names import names
from partita.model.families.read import read_slices
from partita.model.reference import Reference, loss_and_gradients, weight_shapes
from partita.spec.model import ModelSpec
from partita.train.step import Microbatch
from partita.verify.parity import verify

VOCAB, SEQ = 61, 24
UNTIED = {"tie_word_embeddings": False}


def folder_of(tmp_path, dtype=torch.float64, **changes):
    """A folder as transformers saves it, no value of which is 0 or 1, and its model."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": SEQ, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "pad_token_id": None,  # whose row torch would not train
    }  # fmt: skip
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**{**sizes, **changes})).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", model


def read_all(folder):
    spec = ModelSpec.from_hf_config(folder)
    reader = read_slices(folder, spec)
    shapes = weight_shapes(spec).items()
    return spec, {n: reader.read(n, tuple((0, k) for k in s)) for n, s in shapes}


def masked():
    """ids, targets and which are guessed, unevenly."""
    dice = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(0, VOCAB, (2, 3, SEQ), generator=dice)
    valid = torch.rand(3, SEQ, generator=dice) < 0.3
    return ids, targets, valid


@pytest.mark.parametrize(
    ("changes", "dtype", "near"),
    [
        ({}, torch.float64, 1e-12),
        ({"hidden_act": "gelu_new", "type_vocab_size": 3, **UNTIED}, torch.float64, 1e-12),
        ({}, torch.float32, 1e-5),
    ],
)  # fmt: skip
def test_logits_loss_and_gradients_are_transformers(changes, dtype, near, tmp_path):
    folder, model = folder_of(tmp_path, dtype, **changes)
    spec, weights = read_all(folder)
    ids, targets, valid = masked()
    theirs = model(input_ids=ids).logits
    want = cross_entropy(theirs[valid], targets[valid])
    want.backward()
    judge = Reference(spec, weights)
    batch = Microbatch(ids, targets, valid, None, torch.arange(3))
    loss, gradients = loss_and_gradients(judge, [batch])
    torch.testing.assert_close(judge.logits(ids), theirs.detach(), rtol=near, atol=near)
    assert loss == pytest.approx(want.item(), rel=near)
    export(tmp_path / "gradients", spec, gradients.__getitem__, dtype=dtype)
    found = load_file(tmp_path / "gradients" / "model.safetensors")
    own = {n: p.grad for n, p in model.named_parameters() if n in found}
    assert own.keys() == found.keys() == {s.file_name for s in names(spec)}
    for name, g in found.items():
        torch.testing.assert_close(g, own[name], rtol=near, atol=near)


def test_an_export_is_what_was_read(tmp_path):
    folder, model = folder_of(tmp_path)
    spec, weights = read_all(folder)
    export(tmp_path / "ours", spec, weights.__getitem__, dtype=torch.float64)
    a, b = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "ours"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    back = BertForMaskedLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    ids = masked()[0]
    assert torch.equal(back(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert ModelSpec.from_hf_config(tmp_path / "ours").to_toml() | {
        "name": ""
    } == spec.to_toml() | {"name": ""}


def test_a_folder_of_the_first_files_is_read(tmp_path):
    """Norms have a gamma and a beta, and beside the model stands what guesses the next sentence."""
    folder, _ = folder_of(tmp_path)
    _, want = read_all(folder)
    held = load_file(folder / "model.safetensors")
    old = {}
    for name, value in held.items():
        if "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        old[name] = value
    old |= {
        "bert.pooler.dense.weight": torch.zeros(32, 32), "cls.seq_relationship.bias": torch.zeros(2),
        "cls.predictions.decoder.bias": held["cls.predictions.bias"].clone(),
    }  # fmt: skip
    save_file(old, folder / "model.safetensors")
    _, found = read_all(folder)
    assert all(torch.equal(found[n], want[n]) for n in want)
    save_file(old | {"bert.more": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"bert\.more is no tensor of the model"):
        read_all(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"is_decoder": True}, "is_decoder"), ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_act": "relu"}, "hidden_act"), ({"hidden_dropout_prob": 0.2}, "one rate"),
    ],
)  # fmt: skip
def test_what_differs_is_refused(changes, told, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BertConfig().to_dict() | changes))
    with pytest.raises(UsageError, match=told):
        ModelSpec.from_hf_config(tmp_path)


@pytest.mark.parametrize(("name", "count"), [("base", 109_514_298), ("large", 335_174_458)])
def test_presets_are_the_published_models(name, count):
    spec = ModelSpec.from_preset(f"bert-{name}")
    assert spec.parameters() == count and not spec.causal and spec.tied
    assert BertConfig().vocab_size == spec.vocab
    if name == "base":
        own = BertConfig().to_dict()
        told = hf_config(spec) | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        shared = {
            k: v for k, v in told.items() if k in own and not k.endswith(("_id", "architectures"))
        }
        assert {k: own[k] for k in shared} == shared


CASES = [
    ("cp2:ring tp2+sp fp64", {"packed": True}),
    ("pp2/2mb tp2 recompute:full fp64", {"dropout": 0.2}),
    ("dp_shard2.zero3 tp2 recompute:selective recompute.modules=core,norm,act fp64", {}),
    pytest.param("cp2:ulysses tp2+sp bf16", {"seq": 7}, marks=pytest.mark.slow),
    pytest.param("pp2:zb_h1/4mb tp2+sp offload:cpu fp64", {"dropout": 0.2}, marks=pytest.mark.slow),
    pytest.param("tp2+sp recompute:full recompute.collectives=keep fp16", {}, marks=pytest.mark.slow),
    pytest.param("tp2+sp fp8", {"hidden": 64, "ffn_hidden": 64}, marks=pytest.mark.slow),
    pytest.param("tp2 dp2 fp64", {"lora_rank": 2, "tied": False}, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "model"), CASES)
def test_a_plan_equals_one_device(plan, model, tmp_path):
    model = {"layers": 2, "causal": False, "tied": True, **model}
    found = verify(verify_jobs.job(tmp_path, plan, "bert", batch=4, **model))
    assert found.equal and found.traffic_equal, str(found)
