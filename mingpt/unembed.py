"""
The largest products of a GPT, in two fast ways.

Both compute `F.linear(x, weight)` and nothing else. They exist because these products are nearly
all that a GPT does, so that how they are done shows in the speed of the whole model:

- `Unembed` is for training. It is the product with the vocabulary's matrix, (V, C), when that is
  tied to the embedding and gets two gradients;
- `Linear` and `next_logits` are for generation on a CPU, when there are only a few rows to
  multiply, one for each text.

On a first reading, take them for `nn.Linear` and `F.linear` and go on. projects/bench/readme.md has
the timings.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Up to this many rows, and for matrices of at least this many numbers, `few_rows` is faster.
# Smaller matrices stay in the processor's cache.
MAX_FEW_ROWS = 32
LARGE_MATRIX = 100_000


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
    """F.linear for one step of generation: hidden states (B, C), weight (V, C) -> logits (B, V)."""
    return few_rows(x, weight, max_swapped=8) if pays(x, weight) else F.linear(x, weight)


class Linear(nn.Linear):
    """nn.Linear, which is faster for the few rows of a step of generation."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_grad_enabled() or not pays(x, self.weight):
            return super().forward(x)
        y = few_rows(x.flatten(0, -2), self.weight, max_swapped=2)  # (rows, out)
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, x.shape[:-1])


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_rows` is faster than F.linear for x (..., in) and weight (out, in)."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or x.dtype != torch.float32:
        return False
    return x.numel() <= MAX_FEW_ROWS * weight.size(1) and weight.numel() >= LARGE_MATRIX


def few_rows(x: Tensor, weight: Tensor, max_swapped: int) -> Tensor:
    """F.linear for a few rows: x (rows, in), weight (out, in) -> (rows, out).

    For a few rows, MKL leaves F.linear to a single thread (seen on AMD's processors). So the matrix
    is cut into a part for each thread, and torch.bmm computes all parts at once. For very few rows,
    up to max_swapped, it is faster still to compute the product the other way round, W xᵀ: then it
    takes no longer than reading the matrix once.
    """
    threads = torch.get_num_threads()
    swapped = len(x) <= max_swapped and weight.is_contiguous()
    if threads == 1 and not swapped:
        return F.linear(x, weight)
    parts = max(threads, 2)
    rest = len(weight) % parts
    weights = weight[: len(weight) - rest].unflatten(0, (parts, -1))  # (parts, out / parts, in)
    if swapped:
        columns = torch.bmm(weights, x.t().expand(parts, -1, -1))  # (parts, out / parts, rows)
        y = columns.flatten(0, 1).t()
    else:
        pieces = torch.bmm(x.expand(parts, -1, -1), weights.transpose(1, 2))
        y = pieces.transpose(0, 1).flatten(1)  # from (parts, rows, out / parts)
    if rest == 0:
        return y
    return torch.cat([y, F.linear(x, weight[-rest:])], dim=1)
