"""
The fast ways of large products, against the same products in double precision.
"""

import contextlib
import itertools
import unittest
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mingpt.unembed import (
    LARGE_MATRIX,
    PART,
    PIECE,
    Linear,
    few_rows,
    next_logits,
    pays,
    row_log_probs,
)

ROWS = (1, 2, 3, 8, 32, 33)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within, PyTorch computes with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matrix(out: int, width: int, is_transposed: bool) -> Tensor:
    """A random (out, width) matrix, laid out as in nn.Linear or, transposed, as in GPT-2's file."""
    if is_transposed:
        return torch.randn(width, out).t()
    return torch.randn(out, width)


class TestFewRows(unittest.TestCase):
    def test_every_way_gives_the_product(self):
        # 402 and 401 rows of the matrix: with and without a rest behind equal parts. 2,000 rows
        # make more than one part for each thread.
        outs = (402, 401, 2000)
        for count, out, is_transposed in itertools.product((1, 2, 3), outs, (False, True)):
            weight = matrix(out, 250, is_transposed)
            self.assertGreater(weight.numel(), LARGE_MATRIX)
            for rows in ROWS:
                x = torch.randn(rows, 250)
                expected = x.double() @ weight.double().t()
                with self.subTest(threads=count, out=out, rows=rows), threads(count):
                    for y in (few_rows(x, weight), next_logits(x, weight)):
                        torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=0)
        self.assertGreater(weight.numel(), PART)

    def test_what_it_pays_for(self):
        weight = torch.randn(402, 250)
        for rows in ROWS:
            self.assertEqual(pays(torch.randn(rows, 250), weight, max_rows=32), rows <= 32)
        self.assertFalse(pays(torch.randn(0, 250), weight, 32))
        self.assertFalse(pays(torch.randn(1, 250), weight.double(), 32))
        self.assertFalse(pays(torch.randn(1, 250), weight[:10], 32))
        self.assertFalse(pays(torch.randn(1, 250).bfloat16(), weight.bfloat16(), 32))
        self.assertFalse(pays(torch.randn(1, 250, device="meta"), weight.to("meta"), 32))


class TestLinear(unittest.TestCase):
    def test_few_rows_give_what_many_rows_give(self):
        for bias in (True, False):
            layer = Linear(250, 402, bias=bias)
            for shape in ((1, 1), (1, 3), (3, 1), (40, 1), (2, 0)):
                x = torch.randn(*shape, 250)
                with torch.no_grad():
                    y = layer(x)
                expected = F.linear(x, layer.weight, layer.bias)
                torch.testing.assert_close(y, expected.detach(), atol=1e-5, rtol=0)
                torch.testing.assert_close(layer(x), expected, atol=0, rtol=0)  # with gradients


class TestTokenLogProbs(unittest.TestCase):
    """Against F.cross_entropy in double precision; three rows make more than one piece."""

    def setUp(self):
        self.logits = (5 * torch.randn(3, PIECE // 2)).requires_grad_()
        self.tokens = torch.tensor([0, 7, PIECE // 2 - 1])

    def expected(self, logits):
        return -F.cross_entropy(logits.double(), self.tokens, reduction="none")

    def test_values_and_gradients(self):
        log_probs = row_log_probs(self.logits, self.tokens)
        self.assertEqual(log_probs.grad_fn.name(), "TokenLogProbsBackward")
        expected = self.expected(self.logits)
        torch.testing.assert_close(log_probs.double(), expected, atol=1e-5, rtol=0)
        weights = torch.tensor([1.0, -2.0, 0.5])
        [ours] = torch.autograd.grad(weights @ log_probs, self.logits)
        [theirs] = torch.autograd.grad(weights.double() @ expected, self.logits)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)

    def test_gradients_per_example_with_torch_func(self):
        def log_prob(row, token):
            return row_log_probs(row[None], token[None])[0]

        rows = self.logits.detach()
        ours = torch.func.vmap(torch.func.grad(log_prob))(rows, self.tokens)
        [theirs] = torch.autograd.grad(self.expected(self.logits).sum(), self.logits)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)

    def test_the_gradient_of_the_gradient(self):
        def second(log_probs):
            [gradient] = torch.autograd.grad(log_probs.sum(), self.logits, create_graph=True)
            return torch.autograd.grad(gradient.square().sum(), self.logits)[0]

        ours = second(row_log_probs(self.logits, self.tokens))
        theirs = second(self.expected(self.logits))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    def test_a_token_outside_the_vocabulary(self):
        with self.assertRaises(RuntimeError):
            row_log_probs(self.logits, torch.tensor([0, 7, PIECE]))


if __name__ == "__main__":
    unittest.main()
