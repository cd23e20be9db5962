"""The norm of a gradient is as exact for a large tensor as for a small one."""

import pytest
import torch

from partita.train.optimizer.offloaded_update import PART, Given, parts_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_gradients_norm_is_exact(dtype):
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(1449, 1449, generator=generator, dtype=dtype)
    small = torch.randn(3, generator=generator, dtype=dtype)
    norms = torch.stack(tuple(Given(()).norms([large, small]))).double()
    want = torch.cat([large.double().flatten(), small.double()]).norm()
    assert abs(float(norms.square().sum().sqrt() / want) - 1) < 16 * 2**-24


def test_parts_are_views_of_all_elements_and_what_is_not_contiguous_stays_whole():
    large = torch.arange(2.0 * PART + 5)
    parts = parts_of([large, large[::2], large[:3]])
    assert [p.numel() for p in parts] == [PART, PART, 5, PART + 3, 3]
    assert (
        torch.equal(torch.cat(parts[:3]), large) and parts[1].data_ptr() == large[PART:].data_ptr()
    )
