"""Whose kernel makes an fp32 product changes its last bits alone, and nothing where sizes are small."""

from threading import Thread
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from partita.comm.protocol import Where
from partita.parallel.kernels import brgemm, brgemm16, paired, product
from partita.parallel.kernels.product import (
    PLAIN,
    add_narrow,
    add_steady,
    add_varied,
    is_small,
    times_into,
)
from partita.parallel.units import add_product
from partita.train.allocation import Allocations

COUNTS = [0, 3, 130, 67, 257, 0, 128]  # rows of experts
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
    monkeypatch.setattr(product, "executes_whole", lambda: True)
    monkeypatch.setattr(product, "_onednn", onednn)
    monkeypatch.setattr(product.brgemm, "kernels", lambda: None)
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


def test_a_narrower_product_is_added_in_parts_as_in_one(monkeypatch):
    monkeypatch.setattr(product, "WIDENED", 100)
    made, wide = torch.randn(33, 40).bfloat16(), torch.randn(33, 40)
    found = wide.clone()
    add_narrow(found, made)
    assert torch.equal(found, wide + made)


def test_small_gradients_of_16_bits_are_not_rounded_before_they_are_added(monkeypatch):
    """Where no kernel adds up any: of 64 by 96, up to 255 tokens; of more, or beside a narrow weight, the
    product is rounded."""
    monkeypatch.setattr(paired, "kernels", lambda: None)
    for tokens, rows, exact in ((48, 64, True), (255, 64, True), (256, 64, False), (48, 8, False)):
        dy, x = torch.randn(tokens, rows).bfloat16(), torch.randn(tokens, 96).bfloat16()
        assert is_small(dy, x) == exact and not is_small(dy.float(), x.float())
        found = torch.ones(rows, 96)
        add_product(found, dy, x, PLAIN)
        expected = 1 + dy.double().t() @ x.double()
        error = (found - expected).norm() / expected.norm()
        assert error < 1e-6 if exact else 1e-6 < error < 1e-2


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


@pytest.mark.parametrize(
    "maker, family, model, whole",
    [
        ("AuthenticAMD", 25, 17, False),
        ("AuthenticAMD", 26, 2, True),
        ("AuthenticAMD", 26, 0x24, False),
        ("AuthenticAMD", 26, 0x44, True),
        ("HygonGenuine", 25, 17, True),
    ],
)
def test_which_cpus_execute_a_vector_whole(maker, family, model, whole, monkeypatch):
    text = f"vendor_id\t: {maker}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD\n"
    monkeypatch.setattr(product.Path, "read_text", lambda path: text + "\n" + text)
    assert product.executes_whole.__wrapped__() == whole


def test_in_halves_large_products_alone_are_onednns(calls, monkeypatch):
    monkeypatch.setattr(product, "executes_whole", lambda: False)
    x, dy, w = (torch.randn(s) for s in ((128, 512), (128, 512), (512, 512)))
    near(PLAIN.forward(x, w), x.double() @ w.double().t())
    near(PLAIN.input_gradient(dy, w), dy.double() @ w.double())
    assert len(calls) == 2
    add_steady(torch.zeros(512, 512), dy, x)
    add_varied(torch.zeros(512, 512), dy, x)
    PLAIN.forward(x[:32], w)
    assert len(calls) == 2


def test_in_halves_small_matrices_keep_their_kernel(little, monkeypatch):
    monkeypatch.setattr(product, "executes_whole", lambda: False)
    x, w = torch.randn(48, 128), torch.randn(88, 128)
    near(PLAIN.forward(x, w), x.double() @ w.double().t())
    assert little and product.little_of(x, (48, 88, 128)) is brgemm


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


@pytest.fixture
def little(monkeypatch):
    """The small-matrix kernel wherever sizes call for it; how often it was called."""
    if brgemm.kernels() is None:
        pytest.skip("this torch exports no kernel for small matrices")
    multiply, turn = brgemm.kernels()
    made = []

    def counted(*of):
        made.append(tuple(getattr(size, "value", size) for size in of[:3]))
        multiply(*of)

    monkeypatch.setattr(product, "has_wider_kernels", lambda: True)
    monkeypatch.setattr(product, "executes_whole", lambda: True)
    monkeypatch.setattr(brgemm, "kernels", lambda: (counted, turn))
    return made


def pieces(rows):
    """At most 128 at a time: a product of any number of rows is made by no more kernels than these."""
    return brgemm.blocks(rows)


def test_many_numbers_of_rows_are_few_sizes_of_blocks():
    for count in range(1000):
        found = brgemm.blocks(count)
        assert sum(found) == sum(rows for rows, _ in brgemm.given(count)) == count
        assert len(found) == -(-count // 128) and max(found, default=0) <= 128
        assert all(rows <= more < rows + 8 for rows, more in brgemm.given(count))
    assert len({n for count in range(129, 1000) for n in brgemm.blocks(count)}) == 23
    assert len({n for count in range(64, 129) for _, n in brgemm.given(count)}) == 9


def at_a_time(rows, columns, summed, each=0):
    """Calls of the kernel, of `each` rows."""
    parts = [min(each, rows - at) for at in range(0, rows, each)] if each else pieces(rows)
    return [(some, columns, summed) for some in parts]


@pytest.mark.parametrize("sizes", ((64, 96, 40), (130, 16, 512), (1, 1024, 80), (16, 300, 96)))
def test_small_matrices_are_multiplied_as_they_lie(sizes, little):
    tokens, rows, columns = sizes
    x, w, dy = (torch.randn(s) for s in ((2, tokens, columns), (rows, columns), (tokens, rows + 5)))
    part = dy[:, 5:]  # of rows that lie further apart
    near(PLAIN.forward(x, w), x.double() @ w.double().t())
    near(PLAIN.input_gradient(part, w), part.double() @ w.double())
    start = torch.randn(rows, columns)
    expected = start.double() + part.double().t() @ x[0].double()
    add_steady(start, part, x[0])
    near(start, expected)
    few = 2 * tokens * (rows + columns) <= rows * columns  # then these are turned, not the weight
    assert little == [
        *([(rows, 2 * tokens, columns)] if few else at_a_time(2 * tokens, rows, columns)),
        *at_a_time(tokens, columns, rows),
        *(
            ((rows, columns, some) for some in pieces(tokens))
            if tokens > 128
            else at_a_time(rows, columns, tokens, brgemm.LITTLE_HELD // columns // 16 * 16)
        ),
    ]
    spread = torch.randn(tokens, 2 * columns)[:, ::2]  # no rows: copies, held while they are used
    near(PLAIN.forward(spread, w), spread.double() @ w.double().t())
    row = torch.randn(1, columns).expand(2 * tokens, columns)
    near(PLAIN.forward(row, w), row.double() @ w.double().t())
    near(brgemm.turned(torch.randn(70, 96)[:, ::2].fill_(2)), torch.full((48, 70), 2.0).double())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_experts_of_few_rows(dtype, little, monkeypatch):
    """As many at a time as fit, each with its own rows, 128 of them a call."""
    monkeypatch.setattr(brgemm, "FITS", 3 * 40 * 96)
    x, dy = (torch.randn(sum(COUNTS), n).to(dtype) for n in (96, 40))
    weights = torch.randn(len(COUNTS), 40, 96).to(dtype)
    y, dx, gradients = torch.empty_like(dy), torch.empty_like(x), torch.ones(len(COUNTS), 40, 96)
    brgemm.grouped(y, x, weights, COUNTS, back=False)
    given = [3, 16, 114, 72, 128, 16, 113, 128]  # 5 rows of 72 are made again by who follows
    assert [rows for rows, *_ in little] == given
    brgemm.grouped(dx, dy, weights, COUNTS, back=True)
    brgemm.add_grouped(gradients, dy, x, COUNTS)
    each = list(
        zip(weights.double(), x.double().split(COUNTS), dy.double().split(COUNTS), strict=True)
    )
    rounded = 2e-6 if dtype == torch.float32 else 2**-8
    for found, expected in (
        (y, torch.cat([x @ w.t() for w, x, _ in each])),
        (dx, torch.cat([dy @ w for w, _, dy in each])),
    ):
        assert (found.double() - expected).abs().max() <= rounded * expected.abs().max()
    near(gradients, 1 + torch.stack([dy.t() @ x for _, x, dy in each]))


@pytest.mark.parametrize("tokens", [3, 8, 33])
def test_a_large_weight_is_not_turned_for_few_tokens(tokens, monkeypatch):
    """The same product, in rows, by operators that are counted."""
    monkeypatch.setattr(product, "has_mkls_kernels", lambda: True)
    monkeypatch.setattr(product, "has_wider_kernels", lambda: False)
    x, w = torch.randn(tokens, 2, 520)[:, 1], torch.randn(520, 520)
    assert product.is_turned(x, w) and not product.is_turned(x, w.t())
    assert not product.is_turned(x, w[:500]) and not product.is_turned(x.double(), w.double())
    counter = FlopCounterMode(display=False)
    with counter:
        found = PLAIN.forward(x.view(1, tokens, 520), w)
    assert found.is_contiguous() and counter.get_total_flops() == 2 * tokens * 520 * 520
    near(found[0], x.double() @ w.double().t())


def test_a_step_that_is_measured_computes_as_any_other(little):
    """Who counts operators sees torch's; who looks at storages, or at another thread, changes nothing."""
    x, w = torch.randn(48, 128), torch.randn(88, 128)
    with Allocations(Where()).watch():
        PLAIN.forward(x, w)
    counter = FlopCounterMode(display=False)
    with counter:
        thread = Thread(target=PLAIN.forward, args=(x, w))
        thread.start()
        thread.join()
        assert len(little) == 2
        PLAIN.forward(x, w)
    assert len(little) == 2 and counter.get_total_flops() == 2 * 48 * 128 * 88


def test_where_small_matrices_are_meant(little):
    cpu, fp32 = torch.device("cpu"), torch.float32
    assert product.is_little(fp32, cpu, (48, 88, 128))
    assert not product.is_little(fp32, cpu, (2, 88, 128))  # too few multiplications
    assert not product.is_little(fp32, cpu, (48, 8, 4096))  # too narrow
    assert not product.is_little(fp32, cpu, (48, 512, 512))  # the matrix does not fit
    assert not product.is_little(torch.float64, cpu, (48, 88, 128))


@pytest.mark.parametrize("sizes", ((16, 64, 96), (64, 384, 128), (147, 700, 520), (21, 3000, 40)))
def test_gradients_of_bf16_are_added_up_in_fp32_as_they_are_made(sizes, monkeypatch):
    """Some rows at a time, of operands whose rows lie apart, or which are one row over and over."""
    if paired.kernels() is None:
        pytest.skip("this CPU has no bf16 products, or this torch exports no kernel of them")
    multiply, *others = paired.kernels()
    made = []

    def counted(*of):
        made.append(of[:3])
        multiply(*of)

    monkeypatch.setattr(paired, "kernels", lambda: (counted, *others))
    tokens, rows, columns = sizes
    both, row = torch.randn(tokens, rows + 3).bfloat16(), torch.randn(1, columns).bfloat16()
    start = torch.randn(rows, columns)
    for dy, x in (
        (both[:, 3:], torch.randn(tokens, 2 * columns).bfloat16()[:, :columns]),
        (both[:, 3:], row.expand(tokens, columns)),
        (both[:, :1].expand(tokens, rows), torch.randn(columns, tokens).bfloat16().t()),
    ):
        made.clear()
        found, again = start.clone(), start.clone()
        add_product(found, dy, x, PLAIN, True)
        add_product(again, dy, x, PLAIN, True)
        near(found, start.double() + dy.double().t() @ x.double())
        assert torch.equal(found, again)
        each = max(paired.BLOCK // columns // 16, 1) * 16
        parts = [min(each, rows - at) for at in range(0, rows, each)]
        summed = [128, 32] if tokens == 147 else [-(-tokens // 16) * 16]
        assert made == [(part, columns, some) for part in parts for some in summed] * 2


def test_which_gradients_of_bf16_are_added_up_as_they_are_made(monkeypatch):
    monkeypatch.setattr(paired, "kernels", lambda: (print,) * 4)

    def meant(tokens, rows, columns, dtype=torch.bfloat16, steady=True):
        dy, x = (torch.empty(tokens, n, dtype=dtype) for n in (rows, columns))
        return product.is_paired(dy, x, steady)

    assert meant(128, 512, 512) and meant(64, 128, 128) and meant(127, 512, 512)
    assert not meant(128, 512, 512, torch.float16) and not meant(128, 512, 512, torch.float32)
    assert not meant(130, 128, 128)  # what is turned would be larger than the product
    assert meant(130, 128, 128, steady=False) and not meant(600, 4096, 4096)
    assert not meant(64, 8, 4096) and not meant(2, 512, 512)  # too thin
    with FlopCounterMode(display=False):
        assert not meant(128, 512, 512)
    monkeypatch.setattr(paired, "kernels", lambda: None)
    assert not meant(128, 512, 512)


def test_whose_kernel_makes_experts_of_16_bits(little, monkeypatch):
    narrow, half = (torch.empty(1, dtype=t) for t in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(paired, "kernels", lambda: None)
    assert product.little_of(narrow, (48, 88, 128)) is brgemm
    assert product.little_of(narrow, (480, 88, 128)) is None  # a linear is faster
    monkeypatch.setattr(paired, "kernels", tuple)
    assert product.little_of(narrow, (480, 88, 128)) is brgemm16
    assert product.little_of(narrow, (48, 89, 128)) is brgemm  # not by pairs
    assert product.little_of(half, (48, 88, 128)) is brgemm
    assert product.little_of(narrow, (48, 512, 512)) is None
    assert product.little_of(narrow.float(), (48, 88, 128)) is brgemm
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # its call would not return
    assert product.little_of(narrow, (48, 88, 128)) is brgemm


@pytest.fixture
def little_16(monkeypatch):
    """The 16-bit form wherever sizes call for it; how often it was called."""
    if brgemm.kernels() is None or paired.kernels() is None:
        pytest.skip("this torch exports no such kernel, or this CPU lacks its instructions")
    multiply, *turns = paired.kernels()
    made = []

    def counted(*of):
        made.append(of[0])
        multiply(*of)

    monkeypatch.setattr(product, "has_wider_kernels", lambda: True)
    monkeypatch.setattr(brgemm16, "kernels", lambda: (counted, *turns))
    return made


def rounded_near(found, expected):
    assert (found.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.parametrize("sizes", ((65, 96, 40), (130, 16, 512), (1, 1024, 80)))
def test_gradients_of_small_weights_of_16_bits_and_many_tokens(sizes, little_16, monkeypatch):
    """In fp32; an odd last token has nothing beside it."""
    tokens, rows, columns = sizes
    x, dy = torch.randn(tokens, columns).bfloat16(), torch.randn(tokens, rows + 5).bfloat16()[:, 5:]
    monkeypatch.setattr(paired, "MOST", 0)
    start = torch.randn(rows, columns)
    expected = start.double() + dy.double().t() @ x.double()
    add_product(start, dy, x, PLAIN)
    near(start, expected)
    assert len(little_16) == len(pieces(tokens))


def test_experts_of_16_bits(little_16, monkeypatch):
    """As many at a time as fit; rows of odd numbers, and none, beside rows that are infinite."""
    monkeypatch.setattr(brgemm, "FITS", 3 * 40 * 96)
    x, dy = (torch.randn(sum(COUNTS), n).bfloat16() for n in (96, 40))
    dy[3 + 130 - 1] = torch.inf  # the last of an expert's, read by no other
    weights = torch.randn(len(COUNTS), 40, 96).bfloat16()
    y, dx, gradients = torch.empty_like(dy), torch.empty_like(x), torch.ones(len(COUNTS), 40, 96)
    brgemm16.grouped(y, x, weights, COUNTS, back=False)
    brgemm16.grouped(dx, dy, weights, COUNTS, back=True)
    brgemm16.add_grouped(gradients, dy, x, COUNTS)
    each = zip(COUNTS, weights.double(), x.split(COUNTS), dy.split(COUNTS), strict=True)
    split = zip(each, y.split(COUNTS), dx.split(COUNTS), gradients, strict=True)
    for (count, w, rows, d), made, back, gradient in split:
        if count in (0, 130):
            assert not count or not gradient.isfinite().all()
            continue
        rounded_near(made, rows.double() @ w.t())
        rounded_near(back, d.double() @ w)
        near(gradient, 1 + d.double().t() @ rows.double())


def test_onednn_that_is_told_to_do_without_instructions_is_not_asked_for_them(monkeypatch):
    """On a CPU that has them, or would say so: the kernels are found and not called."""
    for place, name, answer in (
        (torch.cpu, "_is_avx512_bf16_supported", True),
        (torch.cpu, "_is_amx_tile_supported", False),
        (torch.ops.mkldnn, "_is_mkldnn_bf16_supported", True),
    ):
        monkeypatch.setattr(place, name, lambda answer=answer: answer, raising=False)
    monkeypatch.setattr(paired, "library", lambda names: (Mock(),) * len(names))
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    assert paired.kernels.__wrapped__() is not None
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        with monkeypatch.context() as within:
            within.setenv(name, "AVX512_CORE")
            assert paired.kernels.__wrapped__() is None
