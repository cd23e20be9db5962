"""The judge by itself: what it counts, sees, drops and casts. Its numbers are held by test_hf."""

from dataclasses import replace

import pytest
import torch

from partita.comm.random.seeds import initial_value, normal_box
from partita.model.generate import generate
from partita.model.reference import Reference, loss_and_gradients, weight_shapes
from partita.model.rope import Rotate, rotate
from partita.spec.model import ModelSpec, RopeScaling
from partita.train.step import Microbatch

SEQ, VOCAB = 10, 31
LLAMA = ModelSpec(
    family="llama", layers=2, hidden=16, heads=4, kv_heads=2, ffn_hidden=20, vocab=VOCAB,
    max_seq_len=SEQ, rope_scaling=RopeScaling(factor=4.0, original_max_seq_len=8),
)  # fmt: skip
GPT2 = ModelSpec(family="gpt2", layers=2, hidden=16, heads=4, vocab=VOCAB, max_seq_len=SEQ)
SPECS = pytest.mark.parametrize(
    "spec", [LLAMA, replace(LLAMA, tied=True), GPT2, replace(GPT2, tied=False)], ids=str
)
BLOOM = replace(GPT2, family="bloom")
FAMILIES = pytest.mark.parametrize("spec", [LLAMA, GPT2, BLOOM], ids=["llama", "gpt2", "bloom"])


def make(spec, dtype=torch.float64, compute=None):
    weights = {}
    for name, shape in weight_shapes(spec).items():
        box = tuple((0, n) for n in shape)
        value = initial_value(0, name, shape, box, layers=spec.layers, dtype=torch.float64)
        weights[name] = (value + normal_box(1, name, shape, box, std=0.1).double()).to(dtype)
    return Reference(spec, weights, compute)


def batch(samples=4, documents=None):
    generator = torch.Generator().manual_seed(2)
    row = torch.randint(0, VOCAB, (samples, SEQ + 1), generator=generator)
    valid = torch.rand(samples, SEQ, generator=generator) < 0.6
    return Microbatch(row[:, :-1], row[:, 1:], valid, documents, torch.arange(samples))


def split(whole, *sizes):
    """The batch as microbatches of these sizes."""
    parts = zip(
        *(getattr(whole, f).split(sizes) for f in ("ids", "targets", "valid", "samples")),
        strict=True,
    )
    return [Microbatch(i, t, v, None, s) for i, t, v, s in parts]


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-12, atol=1e-14), name


@SPECS
def test_weights_are_the_models_parameters(spec):
    shapes = weight_shapes(spec)
    assert sum(torch.Size(s).numel() for s in shapes.values()) == spec.parameters()
    assert next(iter(shapes)) == "embedding.table"
    assert ("head.table" in shapes) != spec.tied
    assert shapes["blocks.1.attention.wk"] == (spec.kv_heads, spec.head_dim, spec.hidden)


@SPECS
def test_gradients_equal_differences(spec):
    """Along a random direction of each weight, (f(w + h d) - f(w - h d)) / 2h."""
    judge, one = make(spec), batch(2)
    _, gradients = loss_and_gradients(judge, [one])
    for name, gradient in gradients.items():
        step = 1e-5 * normal_box(3, name, gradient.shape, [(0, n) for n in gradient.shape]).double()
        ends = []
        for sign in (1, -1):
            moved = {**judge.weights, name: judge.weights[name] + sign * step}
            ends.append(float(Reference(spec, moved).loss(one, int(one.valid.sum()))))
        slope = float((gradient * step).sum())
        assert (ends[0] - ends[1]) / 2 == pytest.approx(slope, rel=1e-6, abs=1e-12), name
        assert gradient.any(), name


@FAMILIES
def test_microbatches_of_any_size_give_the_loss_of_one_batch(spec):
    judge, whole = make(spec), batch(5)
    whole.valid[:2] = False  # a microbatch that counts nothing
    loss, gradients = loss_and_gradients(judge, [whole])
    parts = split(whole, 2, 1, 2)
    assert not parts[0].valid.any()
    loss_parts, gradients_parts = loss_and_gradients(judge, parts)
    assert loss_parts == pytest.approx(loss, rel=1e-13)
    close(gradients_parts, gradients)


def test_the_loss_is_the_mean_of_the_counted_tokens():
    judge, one = make(LLAMA), batch()
    chosen = judge.logits(one.ids).log_softmax(-1).gather(-1, one.targets.unsqueeze(-1)).squeeze(-1)
    loss, _ = loss_and_gradients(judge, [one])
    assert loss == pytest.approx(-float(chosen[one.valid].mean()), rel=1e-13)


def test_targets_that_are_not_counted_do_not_matter():
    judge, one = make(GPT2), batch()
    expected = loss_and_gradients(judge, [one])
    other = replace(one, targets=torch.where(one.valid, one.targets, (one.targets + 1) % VOCAB))
    ignored = replace(
        one, targets=one.targets.masked_fill(~one.valid, -100), valid=torch.ones_like(one.valid)
    )
    for same in (other, ignored):
        loss, gradients = loss_and_gradients(judge, [same])
        assert loss == expected[0]
        close(gradients, expected[1])


def test_nothing_counted_is_a_loss_of_zero():
    one = batch()
    loss, gradients = loss_and_gradients(
        make(LLAMA), [replace(one, valid=torch.zeros_like(one.valid))]
    )
    assert loss == 0.0 and not any(g.any() for g in gradients.values())


def test_an_input_of_minus_100_is_read_as_0():
    judge, ids = make(LLAMA), batch().ids.clone()
    ids[0, 3] = 0
    assert torch.equal(judge.logits(ids.masked_fill(ids == 0, -100)), judge.logits(ids))


@FAMILIES
def test_a_position_sees_earlier_ones_of_its_document_alone(spec):
    judge, ids = make(spec), batch(1).ids
    documents = torch.tensor([[0] * 4 + [1] * 6])
    plain, cut = judge.logits(ids), judge.logits(ids, documents)
    for place in range(SEQ):
        moved = ids.clone()
        moved[0, place] = (moved[0, place] + 1) % VOCAB
        seen = torch.arange(SEQ) >= place
        changed = (judge.logits(moved) != plain).any(-1)[0]
        assert torch.equal(changed, seen)
        changed = (judge.logits(moved, documents) != cut).any(-1)[0]
        assert torch.equal(changed, seen & (documents[0] == documents[0, place]))


@pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_window_hides_what_lies_before_it(spec):
    """One layer: a token three places back does not change a query that sees three keys."""
    judge, ids = make(replace(spec, sliding_window=3, layers=1)), batch(1).ids
    other = ids.clone()
    other[0, 2] = (other[0, 2] + 1) % 5
    changed = (judge.logits(ids) != judge.logits(other)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [2, 3, 4]


def test_positions_do_not_restart_with_a_document():
    judge, ids = make(GPT2), batch(1).ids
    cut = judge.logits(ids, torch.tensor([[0] * 4 + [1] * 6]))[:, 4:]
    assert not torch.allclose(cut, judge.logits(ids[:, 4:]))
    # Rotated positions and ALiBi's distances are relative: a document alone has the same logits.
    for judge in (make(LLAMA), make(BLOOM)):
        cut = judge.logits(ids, torch.tensor([[0] * 4 + [1] * 6]))[:, 4:]
        assert torch.allclose(cut, judge.logits(ids[:, 4:]), rtol=1e-10)


def test_dropout_follows_the_sample_not_the_batch():
    judge, whole = make(replace(GPT2, dropout=0.3)), batch(4)
    loss, gradients = loss_and_gradients(judge, [whole])
    order = torch.tensor([2, 0, 3, 1])
    mixed = Microbatch(
        *(getattr(whole, f)[order] for f in ("ids", "targets", "valid")), None, order
    )
    for other in ([mixed], split(whole, 1, 3)):
        again, gradients_again = loss_and_gradients(judge, other)
        assert again == pytest.approx(loss, rel=1e-13)
        close(gradients_again, gradients)
    judge.step = 1
    assert loss_and_gradients(judge, [whole])[0] != loss
    judge.training = False
    assert loss_and_gradients(judge, [whole])[0] == loss_and_gradients(make(GPT2), [whole])[0]


def test_every_site_drops_its_share_and_scales_the_rest():
    judge, seen = make(replace(GPT2, dropout=0.25)), {}
    drop, samples = judge.drop, torch.arange(200)

    def watched(site, x, samples):
        y = drop(site, x, samples)
        kept = y != 0
        seen[site] = float(kept[x != 0].double().mean())
        assert torch.allclose(y[kept], x[kept] / 0.75)
        return y

    judge.drop = watched
    ids = torch.randint(0, VOCAB, (200, SEQ), generator=torch.Generator().manual_seed(0))
    judge.logits(ids, None, samples)
    sites = ("attention.core", "attention.residual", "mlp.residual")
    assert set(seen) == {"embedding.dropout", *(f"blocks.{i}.{s}" for i in (0, 1) for s in sites)}
    for site, kept in seen.items():
        assert kept == pytest.approx(0.75, abs=0.02), site


@FAMILIES
def test_bf16_rounds_weights_and_activations_and_nothing_else(spec):
    one = batch()
    exact, judge = make(spec), make(spec, torch.float32, torch.bfloat16)
    assert judge.logits(one.ids).dtype == torch.bfloat16
    outputs = []
    judge.see = lambda name, x: outputs.append(x.dtype)
    loss, gradients = loss_and_gradients(judge, [one])
    assert outputs == [torch.bfloat16] * (1 + 2 * spec.layers)
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    wide_loss, wide = loss_and_gradients(exact, [one])
    assert judge.loss(one, 1).dtype == torch.float32
    assert 0 < abs(loss - wide_loss) < 2**-8 * wide_loss
    # A key's bias shifts all scores of a query alike: its gradient is rounding, so it is held to the
    # size of the others.
    floor = 0.01 * max(float(g.norm()) for g in wide.values())
    for name, g in gradients.items():
        assert float((g - wide[name]).norm()) < 0.05 * max(float(wide[name].norm()), floor), name
    rounded = {n: w.bfloat16().float() for n, w in judge.weights.items()}
    same = Reference(spec, rounded, torch.bfloat16)
    assert torch.equal(same.logits(one.ids), judge.logits(one.ids))


def test_bf16_gradients_of_microbatches_add_up_in_fp32():
    """256 equal microbatches: in bf16 the sum would stop at the 8 bits it has."""
    judge, one = make(LLAMA, torch.float32, torch.bfloat16), batch(1)
    _, single = loss_and_gradients(judge, [one])
    _, many = loss_and_gradients(judge, [one] * 256)
    for name, g in single.items():
        assert float((many[name] - g).norm() / g.norm()) < 0.01, name


def test_generation_appends_the_likeliest_token_of_a_moving_window():
    judge = make(LLAMA)
    found = generate(judge, [1, 2, 3], SEQ + 4)
    ids = [1, 2, 3]
    for token in found:
        assert token == int(judge.logits(torch.tensor([ids[-SEQ:]]))[0, -1].argmax())
        ids.append(token)
    assert len(ids) == SEQ + 7 > LLAMA.max_seq_len


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [8, 32])
def test_the_rotation_of_few_kernels_is_the_plain_one_bit_for_bit_both_ways(dtype, half):
    dice = torch.Generator().manual_seed(half)
    x, g = (torch.randn(2, 5, 3, 2 * half + 4, generator=dice).to(dtype) for _ in range(2))
    cos, sin = (torch.randn(5, 1, half, generator=dice).to(dtype) for _ in range(2))
    x.requires_grad_()
    Rotate.apply(x, cos, sin).backward(g)
    assert torch.equal(Rotate.apply(x, cos, sin), rotate(x, cos, sin))
    assert x.grad is not None and torch.equal(x.grad, rotate(g, cos, -sin))
