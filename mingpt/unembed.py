"""
From hidden states to logits: one product with the vocabulary's matrix, in two fast ways.

Both compute `F.linear(x, weight)` and nothing else. They exist because this matrix, (V, C),
is the largest of a small GPT, so that how its product is done shows in the speed of the
whole model:

- `Unembed` is for training, when the matrix is tied to the embedding and gets two gradients;
- `next_logits` is for generation, when there are only a few rows to multiply. `Linear` does the
  same for the other matrices of a Llama.

On a first reading, take both for `F.linear` and go on. projects/bench/readme.md has the timings.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Up to this many rows, MKL may leave F.linear to a single thread: see `next_logits`.
MAX_SWAPPED_ROWS = 8


class Unembed(torch.autograd.Function):
    """F.linear for a weight that is tied to the embedding: x (B, T, C), weight (V, C) -> (B, T, V).

    A tied weight gets two gradients, which autograd adds up. F.linear returns its own as a
    view (the transpose of what it computed). Autograd cannot add to a view in place, so it
    would fill a third matrix of that size. The gradient returned here is no view.
    """

    generate_vmap_rule = True  # lets torch.func take per-example gradients through it

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        """The logits: x Wᵀ."""
        return F.linear(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep x and the weight for the backward pass."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of x (grad W) and of the weight (gradᵀ x); grad is (B, T, V)."""
        x, weight = ctx.saved_tensors
        # Under autocast, grad is in half precision and what was saved is not.
        grad_x = grad @ weight.to(grad.dtype)
        if not ctx.needs_input_grad[1]:  # it is frozen (lora.py)
            return grad_x, None
        grad_weight = grad.flatten(0, 1).t() @ x.flatten(0, 1).to(grad.dtype)
        return grad_x, grad_weight.to(weight.dtype)


def next_logits(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear for one step of generation: hidden states (B, C), weight (V, C) -> logits (B, V).

    For a few rows, MKL computes x Wᵀ on a single thread (seen on AMD's processors). It
    computes the same product the other way round, W xᵀ, on all threads, which is 2 to 6
    times as fast.
    """
    B = len(x)
    if x.device.type != "cpu" or B > MAX_SWAPPED_ROWS:
        return F.linear(x, weight)
    # A single row would make this a product of matrix and vector, which is slow again: double it.
    rows = x.repeat(2, 1) if B == 1 else x.contiguous()
    return (weight @ rows.t()).t()[:B]


class Linear(nn.Linear):
    """nn.Linear, which takes the few rows of a step of generation as `next_logits` does."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.shape[:-1].numel()
        if torch.is_grad_enabled() or rows > MAX_SWAPPED_ROWS:
            return super().forward(x)
        y = next_logits(x.flatten(0, -2), self.weight)  # (rows, out)
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, x.shape[:-1])
