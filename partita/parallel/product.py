"""How a weight is multiplied: what precision changes in a matmul, and nothing else does."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Product(Protocol):
    """How one weight [rows, columns] is multiplied, forward and backward."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., columns] -> [..., rows]."""
        ...

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy [..., rows] -> [..., columns]."""
        ...

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """dy [tokens, rows], x [tokens, columns] -> [rows, columns]."""
        ...


class Plain:
    """The matmul as it is."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W.T."""
        return x @ weight.t()

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy W."""
        return dy @ weight

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """dy.T x."""
        return dy.t() @ x


PLAIN = Plain()
