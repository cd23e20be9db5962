"""Whose kernel makes an fp32 product changes its last bits alone, and nothing where sizes are small."""

import pytest
import torch

from partita.parallel import product
from partita.parallel.product import PLAIN, add_steady, add_varied, times_into

SIZES = ((1, 1024, 1024), (48, 640, 96), (64, 64, 512), (3, 5, 7), (64, 2100, 640))


@pytest.fixture
def calls(monkeypatch):
    """oneDNN wherever sizes call for it, whatever the CPU; the shapes it was given."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    made = []

    def onednn(x, weight):
        made.append((*x.shape, *weight.shape))
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    monkeypatch.setattr(product, "has_wider_kernels", lambda: True)
    monkeypatch.setattr(product, "_onednn", onednn)
    return made


def near(found, expected):
    assert (found.double() - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_the_product(sizes, calls):
    tokens, rows, columns = sizes
    x, w, dy = (torch.randn(s) for s in ((2, tokens, columns), (rows, columns), (tokens, rows)))
    near(PLAIN.forward(x, w), x.double() @ w.double().t())
    near(PLAIN.input_gradient(dy, w), dy.double() @ w.double())
    both, start = torch.randn(2 * tokens, rows + 3)[:, 3:], torch.randn(rows, columns)
    expected = start.double() + both.double().t() @ x.flatten(0, 1).double()
    add_steady(start, both, x.flatten(0, 1))
    near(start, expected)
    assert bool(calls) == (sizes != (3, 5, 7))


def test_a_large_gradient_is_made_in_parts(calls):
    add_steady(torch.zeros(2100, 640), torch.ones(8, 2100), torch.ones(8, 640))
    assert [s[0] for s in calls] == [1638, 462]
    assert all(rows * columns <= product.PIECE for rows, _, columns, _ in calls)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_other_dtypes_are_torchs(dtype, calls):
    x, w = torch.randn(64, 512).to(dtype), torch.randn(256, 512).to(dtype)
    assert torch.equal(PLAIN.forward(x, w), x @ w.t())
    assert not calls


def test_the_same_product_has_the_same_bits(calls):
    x, w = torch.randn(64, 512), torch.randn(300, 512)
    first, gradients = PLAIN.forward(x, w), [torch.zeros(300, 512) for _ in range(2)]
    for gradient in gradients:
        add_steady(gradient, first, x)
    assert torch.equal(first, PLAIN.forward(x.clone(), w)) and torch.equal(*gradients)


def test_intels_own_cpus_keep_mkl(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not product.has_wider_kernels.__wrapped__()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for maker, wider in (("GenuineIntel", False), ("AuthenticAMD", True)):
        text = f"vendor_id : {maker}\n"
        monkeypatch.setattr(product.Path, "read_text", lambda path, text=text: text)
        found = product.has_wider_kernels.__wrapped__()
        assert found == (wider and torch.backends.mkldnn.is_available())


def test_tokens_whose_number_varies(calls):
    """Multiples of 16 are oneDNN's, the rest torch's: no kernel for each number."""
    for tokens, whole in ((7, 0), (150, 144), (160, 160)):
        x, right, dy = (torch.randn(s) for s in ((tokens, 96), (96, 160), (tokens, 160)))
        out, gradient = torch.empty(tokens, 160), torch.ones(160, 96)
        calls.clear()
        times_into(out, x, right)
        add_varied(gradient, dy, x)
        near(out, x.double() @ right.double())
        near(gradient, 1 + dy.double().t() @ x.double())
        assert calls == ([(whole, 96, 160, 96), (160, whole, 96, whole)] if whole else [])
