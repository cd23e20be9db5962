"""A Product as one function that autograd follows."""

from typing import Any

import torch
from torch import Tensor

from partita.parallel.kernels.product import Product


class Multiplied(torch.autograd.Function):
    """x W.T by a Product, for a weight that autograd follows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, product: Product) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product.forward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx = ctx.product.input_gradient(dy, weight)
        rows, columns = weight.shape
        dw = ctx.product.weight_gradient(dy.reshape(-1, rows), x.reshape(-1, columns))
        return dx, dw, None
