"""heads.py and prefix.py: models that give numbers; prompts that are read once for many rows."""

import unittest

import torch
from torch import nn

from mingpt.datasets import left_pad, pad_and_mask
from mingpt.heads import ActorCritic, RewardModel, ValueHead, ValueModel
from mingpt.prefix import needed_mask
from tests.common import random_ids, tiny_gpt


class TestScalarModels(unittest.TestCase):
    def test_heads(self):
        """How they start: a value function at zero, a reward model's head as N(0, 1/(C + 1))."""
        gpt = tiny_gpt(n_embd=64)
        idx = torch.randint(11, (2, 5))
        self.assertFalse(ValueModel.from_gpt(gpt)(idx).any())
        weights = [RewardModel.from_gpt(gpt).head.weight for _ in range(20)]
        self.assertAlmostEqual(torch.cat(weights).std().item(), 65**-0.5, delta=0.01)

    def test_a_value_function_may_start_as_a_reward_model(self):
        reward_model = RewardModel.from_gpt(tiny_gpt(n_embd=64))
        idx = torch.randint(11, (2, 5))
        values = ValueModel.from_gpt(reward_model)(idx)
        torch.testing.assert_close(values[:, -1], reward_model(idx))  # they agree on whole texts

    def test_reward_is_read_at_the_last_real_token(self):
        model = RewardModel.from_gpt(tiny_gpt())
        rows = random_ids(6, 2, 4)
        expected = torch.cat([model(row[None]) for row in rows])
        for left in (True, False):
            with self.subTest(left=left):
                rewards = model(*pad_and_mask(rows, left))
                torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)

    def test_padding_on_the_right_changes_no_reward(self):
        model = RewardModel.from_gpt(tiny_gpt())
        idx = torch.randint(11, (3, 8))
        mask = torch.arange(8) < torch.tensor([[8], [3], [5]])
        expected = [model(row[keep][None]) for row, keep in zip(idx, mask, strict=True)]
        torch.testing.assert_close(model(idx, mask), torch.cat(expected))

    def test_rows_that_share_a_prompt_need_the_completion_mask(self):
        model = RewardModel.from_gpt(tiny_gpt())
        idx, mask = pad_and_mask(random_ids(6, 4))
        with self.assertRaisesRegex(ValueError, "rows_per_prompt=2 needs the completion_mask"):
            model(idx, mask, rows_per_prompt=2)


class TestNormalize(unittest.TestCase):
    def setUp(self):
        self.model = RewardModel.from_gpt(tiny_gpt())
        self.idx = torch.randint(11, (50, 6))

    def test_normalized_on_reference_texts(self):
        before = self.model(self.idx)
        self.model.normalize(before)
        expected = before - before.mean()
        torch.testing.assert_close(self.model(self.idx), expected, atol=1e-5, rtol=0)

    def test_normalized_to_unit_variance(self):
        before = self.model(self.idx)
        self.model.normalize(before)
        self.model.normalize(self.model(self.idx), unit_variance=True)
        expected = (before - before.mean()) / before.std(unbiased=False)
        torch.testing.assert_close(self.model(self.idx), expected, atol=1e-4, rtol=0)

    def test_equal_scores_have_no_variance(self):
        with self.assertRaisesRegex(ValueError, "5 equal scores cannot be scaled to variance 1"):
            self.model.normalize(torch.ones(5), unit_variance=True)


class TestValueHead(unittest.TestCase):
    def setUp(self):
        self.policy = tiny_gpt()
        self.head = ValueHead(16)
        nn.init.normal_(self.head.weight)
        self.value_model = ValueModel.from_gpt(self.policy)  # has a trunk of its own
        self.value_model.head.load_state_dict(self.head.state_dict())
        self.idx, self.mask = left_pad(random_ids(8, 5))

    def test_value_head_reads_the_trunk_of_the_policy(self):
        log_probs, values = ActorCritic(self.policy, self.head)(self.idx, self.mask, 0.7)
        separate = ActorCritic(self.policy, self.value_model)
        expected_log_probs, expected_values = separate(self.idx, self.mask, 0.7)
        torch.testing.assert_close(log_probs, expected_log_probs)
        torch.testing.assert_close(values, expected_values)

    def test_its_values_alone(self):
        values = ActorCritic(self.policy, self.head).values(self.idx, self.mask)
        expected = self.value_model(self.idx, self.mask)[:, :-1]
        torch.testing.assert_close(values, expected)


class TestNeededMask(unittest.TestCase):
    """Attention without an explicit mask is faster, and causal attention never looks right."""

    def setUp(self):
        self.idx = torch.randint(11, (3, 8))
        self.mask = torch.arange(8) < torch.tensor([[8], [3], [5]])

    def test_padding_on_the_right_needs_no_mask(self):
        self.assertIsNone(needed_mask(self.idx, self.mask))

    def test_padding_on_the_left_does(self):
        mask = self.mask.flip(1)
        self.assertIs(needed_mask(self.idx, mask), mask)

    def test_a_hole_does(self):
        # as behind a prompt that was padded on the right
        row = [True, True, False, False, True, True, True, True]
        mask = torch.tensor([row] * 3)
        self.assertIs(needed_mask(self.idx, mask), mask)

    def test_a_mask_of_the_wrong_shape_is_kept_for_the_trunk_to_refuse(self):
        for mask in (self.mask[:, :4], self.mask[:1]):
            self.assertIs(needed_mask(self.idx, mask), mask)
