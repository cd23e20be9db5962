"""Hugging Face folders: the judge against transformers, slices in, whole folders out, bad folders."""

import json
import random
import resource
import struct
from itertools import pairwise

import hf_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from partita.base.errors import CheckpointError, UsageError, WriteError
from partita.model.families.export import export
from partita.model.families.names import names
from partita.model.families.read import read_slices
from partita.model.generate import generate
from partita.model.reference import Reference, loss_and_gradients, weight_shapes
from partita.spec.model import ModelSpec
from partita.train.step import Microbatch

KINDS = list(hf_models.CONFIGS)
STOCK = {  # their fp32 islands, norms of heads among them, leave as much in one weight
    "qwen3-moe": 3e-6, "llama-biased": 3e-6, "gemma2": 3e-6, "gemma3": 1e-5,
}  # fmt: skip


def whole(shape):
    return tuple((0, n) for n in shape)


def read_all(folder):
    spec = ModelSpec.from_hf_config(folder)
    reader = read_slices(folder, spec)
    return spec, {n: reader.read(n, whole(s)) for n, s in weight_shapes(spec).items()}


def tokens(vocab=61, batch=3):
    """ids [batch, SEQ], targets, and what is counted: unevenly, a sample without any."""
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(0, vocab, (batch, hf_models.SEQ + 1), generator=generator)
    valid = torch.rand(batch, hf_models.SEQ, generator=generator) < 0.7
    valid[0] = False
    return row[:, :-1], row[:, 1:].contiguous(), valid


def theirs(folder, documents=None):
    """transformers' logits, loss and gradients by the name in the file."""
    model = hf_models.load_model(folder)
    ids, targets, valid = tokens()
    labels = targets.masked_fill(~valid, -100)
    mask = None
    if documents is not None:
        same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
        seen = (same & torch.ones_like(same).tril()).unsqueeze(1)
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill_(~seen, -torch.inf)
    out = model(input_ids=ids, attention_mask=mask, use_cache=False)
    loss = model.loss_function(
        out.logits, labels=None, shift_labels=labels, vocab_size=61, num_items_in_batch=valid.sum()
    )
    loss.backward()
    mixtral = model.config.model_type == "mixtral"
    gradients = hf_models.by_file_name({n: p.grad for n, p in model.named_parameters()}, mixtral)
    return out.logits.detach(), loss.item(), gradients


def ours(folder, documents=None):
    spec, weights = read_all(folder)
    judge = Reference(spec, weights)
    ids, targets, valid = tokens()
    batch = Microbatch(ids, targets, valid, documents, torch.arange(len(ids)))
    loss, gradients = loss_and_gradients(judge, [batch])
    return judge.logits(ids, documents), loss, gradients


def as_theirs(spec, gradients, tmp_path):
    """Gradients under the names and shapes of the file: an export is linear, but for what it takes off."""
    for source in names(spec):
        gradients[source.name] = gradients[source.name] + source.plus
    export(tmp_path / "gradients", spec, gradients.__getitem__, dtype=torch.float64)
    return load_file(tmp_path / "gradients" / "model.safetensors")


def compare(folder, tmp_path, bound, documents=None):
    logits, loss, gradients = ours(folder, documents)
    logits_hf, loss_hf, gradients_hf = theirs(folder, documents)
    found = as_theirs(ModelSpec.from_hf_config(folder), gradients, tmp_path)
    assert {n for n in found if not n.endswith(hf_models.BALANCE)} == gradients_hf.keys()
    pairs = {n: (found[n], g) for n, g in gradients_hf.items()}
    pairs |= {"logits": (logits, logits_hf), "loss": (torch.tensor(loss), torch.tensor(loss_hf))}
    errors = {n: float((a - b).abs().max() / b.abs().max()) for n, (a, b) in pairs.items()}
    assert min(float(b.abs().max()) for _, b in pairs.values()) > 0
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= bound, (worst, errors[worst])
    return errors[worst]


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_equals_transformers_in_float64(kind, tmp_path, monkeypatch):
    folder = hf_models.save_model(tmp_path / "model", kind)
    hf_models.widen_islands(monkeypatch)
    compare(folder, tmp_path, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_equals_stock_transformers(kind, tmp_path):
    folder = hf_models.save_model(tmp_path / "model", kind)
    assert compare(folder, tmp_path, STOCK.get(kind, 1e-6)) > 1e-10, (
        "the islands are gone: drop the helper"
    )


@pytest.mark.parametrize("kind", ["llama3-rope", "gpt2", "gpt-neox"])
def test_documents_equal_a_block_mask_of_transformers(kind, tmp_path, monkeypatch):
    folder = hf_models.save_model(tmp_path / "model", kind)
    hf_models.widen_islands(monkeypatch)
    cuts = torch.tensor([[5, 11], [1, 20], [23, 24]])
    places = torch.arange(hf_models.SEQ)
    documents = (places >= cuts[:, :1]).long() + (places >= cuts[:, 1:]).long()
    compare(folder, tmp_path, 1e-10, documents)


def test_an_island_that_is_gone_is_noticed(monkeypatch):
    gone = (hf_models.llama.LlamaRMSNorm, "forward", (("torch.float16", 1, "torch.float64"),))
    monkeypatch.setattr(hf_models, "ISLANDS", [gone])
    with pytest.raises(AssertionError, match=r"forward of transformers has 0 x 'torch.float16'"):
        hf_models.widen_islands(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_equals_transformers(kind, tmp_path):
    folder = hf_models.save_model(tmp_path / "model", kind)
    model, ids = hf_models.load_model(folder), tokens(batch=1)[0][:, :6]
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False
    )
    assert generate(Reference(*read_all(folder)), ids[0].tolist(), 9) == expected[0, 6:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_names_tile_every_weight_and_every_file_tensor(kind, tmp_path):
    spec = ModelSpec.from_hf_config(hf_models.save_model(tmp_path / "model", kind))
    sources = names(spec)
    shapes = weight_shapes(spec)
    assert {s.name for s in sources} == set(shapes)
    held: dict[str, int] = {}
    for s in sources:
        held[s.file_name] = held.get(s.file_name, 0) + torch.Size(s.dims).numel()
    assert held == {s.file_name: torch.Size(s.file_shape).numel() for s in sources}
    assert sum(held.values()) == spec.parameters()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_any_box_is_the_slice_of_the_whole(kind, tmp_path):
    folder = hf_models.save_model(tmp_path / "model", kind)
    spec, weights = read_all(folder)
    reader, draw = read_slices(folder, spec), random.Random(0)
    for name, value in weights.items():
        for _ in range(6):
            box = tuple(
                tuple(sorted((draw.randint(0, n), draw.randint(0, n)))) for n in value.shape
            )
            found = reader.read(name, box)
            assert torch.equal(found, value[tuple(slice(a, b) for a, b in box)].to(found.dtype))
        cuts = [0, *sorted(draw.sample(range(1, value.shape[0]), min(1, value.shape[0] - 1)))]
        parts = [
            reader.read(name, ((a, b), *whole(value.shape[1:])))
            for a, b in pairwise([*cuts, value.shape[0]])
        ]
        assert torch.equal(torch.cat(parts), value)


def test_a_slice_of_a_huge_table_costs_the_slice(tmp_path):
    """A table of 4 GB, a hole in the file: a rank that holds 8 rows of it reads those."""
    rows, width = 2**28, 8
    spec = ModelSpec(
        family="gpt2", layers=1, hidden=width, heads=1, vocab=rows, max_seq_len=4, name="huge"
    )
    header, end = {}, 0
    for s in names(spec):
        size = torch.Size(s.file_shape).numel() * 2
        place = [end, end + size] if s.file_name not in header else None
        if place:
            header[s.file_name] = {"dtype": "BF16", "shape": s.file_shape, "data_offsets": place}
            end += size
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_slices(tmp_path, spec).read("embedding.table", ((rows - 8, rows), (0, width)))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert found.shape == (8, width) and not found.any()
    assert grown < 200_000, f"{grown} kB for 128 bytes"


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("kind", KINDS)
def test_import_then_export_gives_equal_logits(kind, shard_bytes, tmp_path):
    folder = hf_models.save_model(tmp_path / "model", kind)
    spec, weights = read_all(folder)
    (tmp_path / "tokenizer.json").write_text("{}")
    done = export(
        tmp_path / "out", spec, weights.__getitem__, dtype=torch.float64,
        along=[tmp_path / "tokenizer.json"], shard_bytes=shard_bytes,
    )  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (len(done.files) > 1)
    assert (shard_bytes > 1e6) == (len(done.files) == 1)
    assert done.bytes == 8 * spec.parameters()
    ids = tokens()[0]
    before, after = hf_models.load_model(folder), hf_models.load_model(tmp_path / "out")
    assert torch.equal(before(ids).logits, after(ids).logits)
    again, same = read_all(tmp_path / "out")
    assert again.to_toml() | {"name": ""} == spec.to_toml() | {"name": ""}
    assert all(torch.equal(same[n], w) for n, w in weights.items())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not list(tmp_path.glob(".*.tmp"))


def test_export_rounds_to_the_asked_dtype_and_overwrites_nothing(tmp_path, monkeypatch):
    spec, weights = read_all(hf_models.save_model(tmp_path / "model", "llama"))
    export(tmp_path / "out", spec, weights.__getitem__, dtype=torch.bfloat16)
    assert read_all(tmp_path / "out")[1]["head.table"].dtype == torch.bfloat16
    stored = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="holds something already"):
        export(tmp_path / "out", spec, weights.__getitem__)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == stored
    with pytest.raises(WriteError, match="cannot be written"):
        export(tmp_path / "model" / "config.json" / "x", spec, weights.__getitem__)


def test_a_folder_of_several_files_as_transformers_writes_it(tmp_path):
    one = read_all(hf_models.save_model(tmp_path / "one", "gpt2"))[1]
    many = hf_models.save_model(tmp_path / "many", "gpt2", max_shard_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    assert all(torch.equal(one[n], w) for n, w in read_all(many)[1].items())


def test_a_bare_model_without_prefix_and_old_buffers(tmp_path):
    folder = hf_models.save_model(tmp_path / "model", "gpt2")
    expected = read_all(folder)[1]
    path = folder / "model.safetensors"
    bare = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8)
    save_file(bare, path)
    assert all(torch.equal(expected[n], w) for n, w in read_all(folder)[1].items())


def test_a_tied_table_may_stand_twice_if_it_is_the_same(tmp_path):
    folder = hf_models.save_model(tmp_path / "model", "llama-tied")
    path = folder / "model.safetensors"
    stored = load_file(path)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, path)
    assert "head.table" not in read_all(folder)[1]
    stored["lm_head.weight"][60, 0] += 1
    save_file(stored, path)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens"):
        read_all(folder)


def missing(t):
    del t["model.layers.1.mlp.up_proj.weight"]


def headless(t):
    del t["lm_head.weight"]


def several(t):
    """All are told at once."""
    t["model.embed_tokens.weight"] = t["model.embed_tokens.weight"].to(torch.int64)
    missing(t)
    misshaped(t)
    t["model.layers.3.mlp.up_proj.weight"] = torch.zeros(2)


def extra(t):
    t["model.layers.3.mlp.up_proj.weight"] = t["model.layers.1.mlp.up_proj.weight"].clone()


def misshaped(t):
    t["model.norm.weight"] = t["model.norm.weight"][:-1].clone()


def integers(t):
    t["model.norm.weight"] = t["model.norm.weight"].to(torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (several, r"embed_tokens.weight is I64; [^\n]+ \(and 3 more\)(\n  .+){3}$"),
        (
            headless,
            r"lm_head.weight \(head.table\) is missing from .+: state model.tied = true where",
        ),
        (missing, r"model.layers.1.mlp.up_proj.weight \(blocks.1.mlp.gate_up\) is missing"),
        (extra, r"model.safetensors: model.layers.3.mlp.up_proj.weight is no tensor of the model"),
        (misshaped, r"model.safetensors: model.norm.weight is \[31\]; the model has \[32\]"),
        (integers, r"model.safetensors: model.norm.weight is I64; accepted"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(change, message, tmp_path):
    folder = hf_models.save_model(tmp_path / "model", "llama")
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_all(folder)
    assert caught.value.file and caught.value.key


def test_shards_without_their_index_are_named(tmp_path):
    folder = hf_models.save_model(tmp_path / "model", "gpt2", max_shard_size="20KB")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-\S+, .+ named in an index: copy"):
        read_all(folder)


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        "C:\\x.safetensors",
        "m.bin",
    ],
)
def test_an_index_cannot_point_elsewhere(file, tmp_path):
    folder = hf_models.save_model(tmp_path / "model", "gpt2", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["transformer.wte.weight"] = file
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="is not a safetensors file inside the folder"):
        read_all(folder)


def test_an_index_must_tell_the_truth(tmp_path):
    folder = hf_models.save_model(tmp_path / "model", "gpt2", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    files = sorted(set(table["weight_map"].values()))
    first = next(n for n, f in table["weight_map"].items() if f == files[0])
    table["weight_map"][first] = files[-1]
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=f"{files[-1]}: .*says that it holds {first}"):
        read_all(folder)
    (folder / files[-1]).unlink()
    with pytest.raises(CheckpointError, match=f"{files[-1]}: missing"):
        read_all(folder)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_all(folder)


def test_pickles_are_never_opened(tmp_path):
    folder = hf_models.save_model(tmp_path / "model", "gpt2")
    stored = folder / "model.safetensors"
    torch.save({}, folder / "pytorch_model.bin")
    read_all(folder)  # safetensors stand beside it
    stored.unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin would have to be unpickled"):
        read_all(folder)
    (folder / "pytorch_model.bin").rename(stored)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_all(folder)


def test_a_truncated_file_is_refused(tmp_path):
    path = hf_models.save_model(tmp_path / "model", "llama") / "model.safetensors"
    raw = path.read_bytes()
    for size in (0, 5, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            read_all(path.parent)
