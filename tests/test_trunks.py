"""What holds for every trunk, GPT-2's and those of the Llama family: each test runs on all of them.

Padding, a cache, the neighbours in a batch and a prompt that rows share must change no number.
"""

import unittest
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from mingpt.datasets import left_pad, pad, pad_and_mask
from mingpt.heads import ActorCritic, RewardModel, ValueHead, ValueModel
from tests.common import random_ids, tiny_gpt


class Reading:
    """What forward and log_probs say of given tokens."""

    options: ClassVar[dict]  # of the model, beside those of tiny_gpt

    def setUp(self):
        self.model = tiny_gpt(**self.options)

    def test_padding_on_either_side_changes_no_row(self):
        model = self.model
        rows = [torch.randint(11, (n,)) for n in (7, 3, 1, 5)]
        for left in (True, False):
            idx = pad(rows, 5, left)
            mask = pad([torch.ones_like(row) for row in rows], 0, left)
            logits, _ = model(idx, attention_mask=mask)
            log_probs = model.log_probs(idx, mask)
            self.assertTrue(torch.isfinite(logits).all())
            self.assertTrue(torch.isfinite(log_probs).all())
            for b, row in enumerate(rows):
                start = 7 - len(row) if left else 0
                end = start + len(row)
                expected = model(row[None])[0][0]
                torch.testing.assert_close(logits[b, start:end], expected, atol=1e-5, rtol=0)
                if len(row) > 1:
                    expected = model.log_probs(row[None])[0]
                    ours = log_probs[b, start:end - 1]
                    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)

    def test_padding_gets_no_gradient(self):
        model = self.model
        idx, mask = torch.tensor([[9, 9, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1, 1]])
        padded = model.log_probs(idx, mask) * mask[:, 1:] * mask[:, :-1]
        bare = model.log_probs(idx[:, 2:])
        parameters = list(model.parameters())
        ours = torch.autograd.grad(padded.sum(), parameters)
        expected = torch.autograd.grad(bare.sum(), parameters)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)

    def test_log_probs_are_those_of_the_softmax(self):
        model = self.model
        idx = torch.randint(11, (2, 13))  # one more than block_size: the last is only predicted
        probs = (model(idx[:, :-1])[0] / 0.7).softmax(-1)
        expected = probs.log().gather(2, idx[:, 1:, None])[:, :, 0]
        ours = model.log_probs(idx, temperature=0.7)
        torch.testing.assert_close(ours, expected, atol=5e-6, rtol=0)

    def test_reading_in_pieces_with_a_cache_equals_reading_at_once(self):
        model, idx = self.model, torch.randint(11, (2, 10))
        cache = model.transformer.new_cache(2, 12)
        pieces = [model(piece, cache=cache)[0] for piece in idx.split([4, 3, 1, 2], dim=1)]
        self.assertEqual(cache.length, 10)
        torch.testing.assert_close(torch.cat(pieces, 1), model(idx)[0], atol=1e-5, rtol=0)

    def test_later_tokens_change_nothing(self):
        idx = torch.randint(11, (2, 10))
        changed = idx.clone()
        changed[:, 6:] = (idx[:, 6:] + 1) % 11
        logits, other = self.model(idx)[0], self.model(changed)[0]
        torch.testing.assert_close(other[:, :6], logits[:, :6], atol=1e-5, rtol=0)
        self.assertGreater((other[:, 6:] - logits[:, 6:]).abs().min(dim=2).values.max(), 1e-3)

    def test_more_than_block_size_is_refused(self):
        with self.assertRaisesRegex(ValueError, "longer than block_size=12"):
            self.model(torch.ones(1, 13, dtype=torch.long))

    def test_an_id_outside_the_vocabulary_is_refused(self):
        for token in (-1, 11):
            with self.subTest(token), self.assertRaisesRegex(ValueError, "vocabulary has 0 to 10"):
                self.model(torch.tensor([[1, token]]))

    def test_half_precision_is_close(self):
        idx = torch.randint(11, (2, 12))
        expected = self.model(idx)[0].log_softmax(-1)
        ours = tiny_gpt(**self.options).bfloat16()(idx)[0].float().log_softmax(-1)
        self.assertLess((ours - expected).abs().mean(), 0.1)

class Generating:
    """What generate does with a cache, beside recomputing without one."""

    def test_greedy_equals_recomputing(self):
        prompts = torch.randint(11, (3, 4))
        expected = prompts
        for _ in range(9):  # up to block_size, and one token more, which is not read
            logits, _ = self.model(expected)
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
        self.assertEqual(self.model.generate(prompts, 9).tolist(), expected.tolist())

    def test_a_row_does_not_depend_on_its_neighbours_or_padding(self):
        model = self.model
        rows = [torch.randint(11, (n,)) for n in (5, 2, 1)]
        for left in (True, False):
            idx, mask = pad_and_mask(rows, left)
            out = model.generate(idx, 7, attention_mask=mask)
            for row, new in zip(rows, out[:, 5:], strict=True):
                expected = model.generate(row[None], 7)[0, len(row):]
                self.assertEqual(new.tolist(), expected.tolist())

    def test_recorded_log_probs_equal_recomputed_ones(self):
        model, idx = self.model, torch.randint(11, (3, 3))
        mask = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]])
        out, log_probs = model.generate(
            idx,
            9,
            temperature=1.3,
            do_sample=True,
            attention_mask=mask,
            return_log_probs=True,
        )
        full_mask = F.pad(mask, (0, 9), value=1)
        recomputed = model.log_probs(out, full_mask, temperature=1.3)[:, 2:]
        torch.testing.assert_close(log_probs, recomputed, atol=1e-5, rtol=0)


class SharedPrompts:
    """Two prompts with three completions each, all of unlike lengths."""

    PREFIX_LENGTH = 5  # the prompts have 6 columns, and the last one holds the first state

    def setUp(self):
        super().setUp()
        prompts = random_ids(6, 3)
        completions = random_ids(4, 1, 2, 3, 4, 2)
        left, front = left_pad([prompt for prompt in prompts for _ in range(3)])
        right, written = pad_and_mask(completions)
        self.idx = torch.cat([left, right], dim=1)
        self.mask = torch.cat([front, written], dim=1)
        self.completion_mask = torch.cat([torch.zeros_like(front), written], dim=1)
        self.written = self.completion_mask[:, 1:]
        self.gpt = self.model

    def rewards(self, model, rows_per_prompt):
        return model(self.idx, self.mask, self.completion_mask, rows_per_prompt)

    def log_probs_and_values(self, value_model, rows_per_prompt):
        """The completions' log-probs, and then the values of the same states."""
        model = ActorCritic(self.gpt, value_model)
        log_probs, values = model(self.idx, self.mask, 0.7, self.PREFIX_LENGTH, rows_per_prompt)
        return torch.cat([log_probs[self.written], values[self.written]])

    def check(self, function, model):
        """function(model, rows_per_prompt) and its gradient, with prompts read once or row by row.

        The gradient is taken by the policy's embedding and the model's weights.
        """
        shared = function(model, 3)
        separate = function(model, 1)
        torch.testing.assert_close(shared, separate, rtol=0, atol=1e-5)
        weights = [self.gpt.transformer.embedding.weight, *model.parameters()]
        gradients = [
            torch.autograd.grad(
                (x**2).sum(), weights, allow_unused=True, materialize_grads=True
            )
            for x in (shared, separate)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)

    def test_a_prompt_that_rows_share_is_read_once(self):
        read = []
        self.gpt.transformer.embedding.register_forward_hook(
            lambda module, inputs, output: read.append(tuple(inputs[0].shape))
        )
        self.log_probs_and_values(None, 3)
        self.assertEqual(read, [(2, 5), (6, 4)])  # the prompts, then what follows them
        read.clear()
        self.log_probs_and_values(None, 1)
        self.assertEqual(read, [(6, 9)])

    def test_a_reward_model_gives_the_same(self):
        self.check(self.rewards, RewardModel.from_gpt(self.gpt))

    def test_a_value_model_gives_the_same(self):
        value_model = ValueModel.from_gpt(RewardModel.from_gpt(self.gpt))
        self.check(self.log_probs_and_values, value_model)

    def test_a_value_head_gives_the_same(self):
        head = ValueHead(16)
        nn.init.normal_(head.weight)
        self.check(self.log_probs_and_values, head)

    def test_the_log_probs_are_those_of_the_policy(self):
        found = self.log_probs_and_values(None, 3)[: self.written.sum()]
        expected = self.gpt.log_probs(self.idx, self.mask, 0.7)[self.written]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_prompts_do_not_go_through_the_matrix_of_the_vocabulary(self):
        positions = []
        self.gpt.lm_head.register_forward_hook(
            lambda module, inputs, output: positions.append(inputs[0].size(1))
        )
        log_probs, _ = ActorCritic(self.gpt)(self.idx, self.mask, 0.7, self.PREFIX_LENGTH)
        self.assertFalse(log_probs[:, : self.PREFIX_LENGTH].any())
        self.assertEqual(positions, [4])


class EveryTest(SharedPrompts, Generating, Reading):
    """All of the above, for the trunks below."""


class TestGPT2(EveryTest, unittest.TestCase):
    options: ClassVar = {}


class TestLlama(EveryTest, unittest.TestCase):
    options: ClassVar = {"architecture": "llama", "n_kv_head": 1, "tie_weights": False}


class TestLlamaWithScaledPositions(EveryTest, unittest.TestCase):
    options: ClassVar = {
        "architecture": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 6,
        },
    }


class TestMistral(EveryTest, unittest.TestCase):
    options: ClassVar = {"architecture": "llama", "n_kv_head": 1, "sliding_window": 3}


class TestQwen2(EveryTest, unittest.TestCase):
    options: ClassVar = {"architecture": "llama", "n_kv_head": 1, "attention_bias": True}


class TestQwen3(EveryTest, unittest.TestCase):
    options: ClassVar = {
        "architecture": "llama",
        "n_kv_head": 1,
        "head_size": 10,
        "query_key_norm": True,
    }
