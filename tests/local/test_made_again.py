"""What backward makes again in the place of what forward would keep."""

import weakref

import torch

from partita.parallel.recompute.replay import made_again


def test_what_is_made_again_is_let_go_of():
    made, leaf = [], torch.arange(6.0).view(2, 3).requires_grad_()
    x = leaf + 1
    gone = weakref.ref(x)
    with made_again(x, lambda: made.append(0) or leaf.detach() + 1, True):
        y = x * x
    del x
    assert gone() is None and not made
    y.sum().backward()
    assert made and leaf.grad is not None
    assert torch.equal(leaf.grad, 2 * (leaf.detach() + 1))


def test_a_part_that_begins_at_its_address_is_kept():
    leaf = torch.ones(2, 3, requires_grad=True)
    x = leaf + 1
    with made_again(x, lambda: leaf.detach() + 1, True):
        y = x[:1] * x[:1]
    y.sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [[4.0] * 3, [0.0] * 3]


def test_of_no_rows_another_tensor_of_none_is_kept():
    none, leaf = torch.ones(0, 4), torch.ones(0, 3, requires_grad=True)
    x, other = leaf + 1, torch.ones(0, 4, requires_grad=True)
    with made_again(x, lambda: leaf.detach() + 1, True):
        y = other * none
    y.sum().backward()
    assert other.grad is not None and other.grad.shape == (0, 4)
