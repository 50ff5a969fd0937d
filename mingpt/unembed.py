"""
Hidden states to logits: the product with the vocabulary's matrix, the largest of a small GPT, which may be the embedding's as well.

A product is a product, but not on every processor as fast: these two are `F.linear`, done in the way that suits their shapes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 8  # rows


class Unembed(torch.autograd.Function):
    """F.linear for a tied weight: its gradient is no view, so that autograd adds the embedding's to it without a third matrix."""

    generate_vmap_rule = True  # for torch.func
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors  # under autocast they have more bits than grad
        return grad @ weight.to(grad.dtype), (grad.flatten(0, 1).t() @ x.flatten(0, 1).to(grad.dtype)).to(weight.dtype)


def next_logits(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear of a decoding step: hidden states (B, C), weight (V, C) -> logits (B, V).

    Where MKL gives x Wᵀ of up to 8 rows to one thread only, as on AMD's processors, W xᵀ is shared by all, and 2 to 6 times as fast; a
    single row must be there twice for that, or it becomes a product with a vector (projects/bench).
    """
    B = len(x)
    if x.device.type != "cpu" or B > FEW:
        return F.linear(x, weight)
    return (weight @ x.repeat(1 + (B == 1), 1).t()).t()[:B]
