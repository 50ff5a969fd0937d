"""
The largest tensors of a GPT, in fast ways.

Nothing here computes anything new: all of it is `F.linear(x, weight)` or `F.cross_entropy`. It
exists because nearly all the time of a GPT goes into a few large products, and into the logits:

- `Unembed` is for training. It is the product with the vocabulary's matrix, (V, C), when that is
  tied to the embedding and gets two gradients;
- `TokenLogProbs` is for training and scoring, when there are as many logits as a real model has;
- `Linear` and `next_logits` are for generation on a CPU, when there are only a few rows to
  multiply, one for each text.

On a first reading, take them for what they stand for and go on. projects/bench/readme.md has the
timings.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# With more tokens than this, log-probs are computed by `row_log_probs`, from logits as (B·T, V):
# PyTorch's softmax over a middle dimension, as in (B, V, T), is wrong by up to 1e-4 at 49,152
# tokens. (With fewer, the ways differ in the last digit only, and the runs with characters, of
# which figures have been published, keep their own.)
LARGE_VOCABULARY = 4096

# No token has this id. (By default cross_entropy ignores targets of -100, and says so to nobody.)
NO_TOKEN = -(2**62)

# The logits in each piece of `TokenLogProbs`: 8 MB of them, which fit into a processor's cache.
PIECE = 2**21

# `few_rows` is faster for matrices of at least this many numbers. Smaller ones stay in the
# processor's cache.
LARGE_MATRIX = 100_000

# The numbers in each part of a matrix, at most: 1 MB of them, which fit into a core's own cache.
PART = 2**18


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


def row_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of a token in each row, in nats: logits (N, V), tokens (N,) -> (N,), for a large V."""
    if logits.is_cpu:
        return in_pieces(logits, tokens)
    return -F.cross_entropy(logits, tokens, reduction="none", ignore_index=NO_TOKEN)


@torch.compiler.disable  # the compiler would write the pieces out one after the other
def in_pieces(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probs of `TokenLogProbs` alone."""
    log_probs, _ = TokenLogProbs.apply(logits, tokens)
    return log_probs


class TokenLogProbs(torch.autograd.Function):
    """-F.cross_entropy(logits, tokens, reduction="none"): logits (N, V), tokens (N,) -> (N,).

    F.cross_entropy keeps the log-probs of all tokens for its backward pass, which then fills two
    more matrices of that size. Such memory comes fresh from the system, and that takes longer than
    the arithmetic. This one keeps a number for each row, fills only the gradient, and goes through
    the logits in pieces that stay in the processor's cache.
    """

    generate_vmap_rule = True  # lets torch.func take per-example gradients through it

    @staticmethod
    def forward(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """log p = logit - log Σ exp(logits); also the second term, for the backward pass."""
        normalizers = torch.cat([logits[rows].logsumexp(1) for rows in pieces(logits)])  # (N,)
        return logits.gather(1, tokens[:, None])[:, 0] - normalizers, normalizers

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs and the normalizers for the backward pass."""
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        """The gradient of the logits: grad · (one-hot of the token - probabilities)."""
        logits, tokens, normalizers = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient may follow, so nothing in place
            one_hot = torch.zeros_like(logits).scatter(1, tokens[:, None], 1.0)
            return grad[:, None] * (one_hot - logits.softmax(1)), None
        grad_logits = torch.empty_like(logits)
        for rows in pieces(logits):
            piece = grad_logits[rows].copy_(logits[rows]).sub_(normalizers[rows, None])
            piece.exp_().mul_(-grad[rows, None])
        grad_logits.scatter_add_(1, tokens[:, None], grad[:, None])
        return grad_logits, None


def pieces(logits: Tensor) -> list[slice]:
    """The rows of logits (N, V), in pieces of about PIECE numbers; there is at least one."""
    N, V = logits.shape
    count = max(1, PIECE // V)
    return [slice(start, start + count) for start in range(0, max(N, 1), count)]


def next_logits(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear for one step of generation: hidden states (B, C), weight (V, C) -> logits (B, V)."""
    return few_rows(x, weight) if pays(x, weight, max_rows=128) else F.linear(x, weight)


class Linear(nn.Linear):
    """nn.Linear, which is faster for the few rows of a step of generation."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_grad_enabled() or not pays(x, self.weight, max_rows=32):
            return super().forward(x)
        y = few_rows(x, self.weight)
        return y if self.bias is None else y + self.bias


def pays(x: Tensor, weight: Tensor, max_rows: int) -> bool:
    """Whether `few_rows` is faster than F.linear for x (..., in) and weight (out, in)."""
    if weight.numel() < LARGE_MATRIX or not 0 < x.numel() <= max_rows * weight.size(1):
        return False
    return weight.is_cpu and weight.dtype == x.dtype == torch.float32


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear for a few rows: x (..., in), weight (out, in) -> (..., out).

    For a few rows, MKL leaves F.linear to a single thread (seen on AMD's processors). So the matrix
    is cut into parts, and torch.bmm gives each of them to one thread. For one row or two it is
    faster still to compute the product the other way round, W xᵀ: then it takes no longer than
    reading the matrix once.
    """
    out, width = weight.shape
    rows = x.numel() // width
    threads = torch.get_num_threads()
    is_swapped = rows <= 2 and weight.is_contiguous()
    if threads == 1 and not is_swapped:
        return F.linear(x, weight)
    # As many for each thread, and at least two: a single product would not go to bmm's own code.
    parts = max(2, threads * math.ceil(weight.numel() / PART / threads))
    rest = out % parts
    whole = weight[: out - rest] if rest else weight
    matrices = whole.view(parts, -1, width)  # (parts, out / parts, in)
    x_rows = x.reshape(rows, width)
    if is_swapped:
        columns = torch.bmm(matrices, x_rows.t().expand(parts, width, rows))
        y = columns.view(-1, rows).t()  # from (parts, out / parts, rows)
    else:
        blocks = torch.bmm(x_rows.expand(parts, rows, width), matrices.transpose(1, 2))
        y = blocks.transpose(0, 1).reshape(rows, -1)  # from (parts, rows, out / parts)
    if rest:
        y = torch.cat([y, F.linear(x_rows, weight[-rest:])], dim=1)
    return y.view(*x.shape[:-1], out)
