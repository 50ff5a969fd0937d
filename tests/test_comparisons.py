"""Learning from comparisons: the losses of reward models and of DPO and its kin, row by row."""

import math
import statistics
import unittest

import torch

from mingpt.chars import CharTokenizer
from mingpt.datasets import Comparisons
from mingpt.rlhf import ActorCritic, DPOLoss, RewardModel, comparison_loss
from mingpt.trainer import Trainer
from tests.common import tiny_gpt

TOKENIZER = CharTokenizer("abcdefghij")
END = 10  # its end of text

PAIRS = [
    {"prompt": "ab", "chosen": "cd", "rejected": "cdefg"},
    {"prompt": "abcdeabc", "chosen": "f", "rejected": "ga"},
    {"chosen": "a", "rejected": "bc"},
]
# Two rejected completions each, of which the first was cut off before its end.
TRIPLES = [
    {**row, "rejected": [row["rejected"], "hij"], "ended": [True, False, True]} for row in PAIRS
]


def batch_of(rows):
    """The rows as a batch. The longest prompt and completion have 14 tokens, more than 12."""
    return Comparisons.collate(list(Comparisons(rows, TOKENIZER, 12)))


def completions_of(row):
    """(prompt, completion) in token ids for each completion of a row, the chosen one first."""
    prompt = TOKENIZER.encode(row.get("prompt", "")) or [END]
    rejected = row["rejected"]
    texts = [row["chosen"], *([rejected] if isinstance(rejected, str) else rejected)]
    ended = row.get("ended", [True] * len(texts))
    completions = []
    for text, has_end in zip(texts, ended, strict=True):
        ids = TOKENIZER.encode(text)
        completions.append((prompt, [*ids, END] if has_end else ids))
    return completions


def log_prob(model, prompt, completion):
    """The log-probability of a completion: the sum over its tokens."""
    ids = torch.tensor([[*prompt, *completion]])
    return model.log_probs(ids)[0, len(prompt) - 1 :].sum().item()


def softplus(x):
    """log(1 + e^x), which is -log σ(-x)."""
    return math.log(1 + math.exp(x))


class LossesTestCase(unittest.TestCase):
    def setUp(self):
        self.reward_model = RewardModel.from_gpt(tiny_gpt())
        self.policy = tiny_gpt(1)
        self.reference = tiny_gpt(2)

    def reward(self, prompt, completion):
        """What the reward model says to a text by itself."""
        return self.reward_model(torch.tensor([[*prompt, *completion]])).item()

    def log_ratio(self, prompt, completion):
        """log π(completion) / π_ref(completion)."""
        ours = log_prob(self.policy, prompt, completion)
        return ours - log_prob(self.reference, prompt, completion)

    def against_each_rejected(self, rows, number, term):
        """The mean of term(number of the chosen, number of a rejected completion)."""
        terms = []
        for row in rows:
            chosen, *rejected = (number(*pair) for pair in completions_of(row))
            terms += [term(chosen, other) for other in rejected]
        return statistics.mean(terms)


class TestComparisonLoss(LossesTestCase):
    def loss(self, rows, centering=0.0):
        loss, _ = comparison_loss(self.reward_model, batch_of(rows), centering)
        return loss.item()

    def bradley_terry(self, rows):
        def term(chosen, rejected):
            return softplus(rejected - chosen)

        return self.against_each_rejected(rows, self.reward, term)

    def dpo_loss(self, rows):
        loss, _ = DPOLoss(self.reference, 0.3)(ActorCritic(self.policy), batch_of(rows))
        return loss.item()

    def dpo(self, rows):
        def term(chosen, rejected):
            return softplus(0.3 * rejected - 0.3 * chosen)

        return self.against_each_rejected(rows, self.log_ratio, term)

    def test_comparison_and_dpo_losses_row_by_row(self):
        self.assertAlmostEqual(self.loss(PAIRS), self.bradley_terry(PAIRS), places=5)
        self.assertAlmostEqual(self.dpo_loss(PAIRS), self.dpo(PAIRS), places=5)

    def test_several_rejected_and_one_that_was_cut_off(self):
        self.assertAlmostEqual(self.loss(TRIPLES), self.bradley_terry(TRIPLES), places=5)
        self.assertAlmostEqual(self.dpo_loss(TRIPLES), self.dpo(TRIPLES), places=5)

    def test_centering_draws_the_mean_of_each_pair_to_zero(self):
        def square_of_the_sum(chosen, rejected):
            return (chosen + rejected) ** 2

        for rows in (PAIRS, TRIPLES):
            penalty = self.against_each_rejected(rows, self.reward, square_of_the_sum)
            expected = self.bradley_terry(rows) + 0.5 * penalty
            self.assertAlmostEqual(self.loss(rows, centering=0.5), expected, places=5)

    def test_a_negative_centering_is_refused(self):
        with self.assertRaisesRegex(ValueError, "centering=-1 must be a number in"):
            self.loss(PAIRS, centering=-1)


class TestDPOLoss(LossesTestCase):
    def loss(self, rows, reference, **options):
        loss_fn = DPOLoss(reference, **options)
        return loss_fn(ActorCritic(self.policy), batch_of(rows))

    def test_ipo_row_by_row(self):
        def term(chosen, rejected):
            return (chosen - rejected - 1 / (2 * 0.3)) ** 2

        for rows in (PAIRS, TRIPLES):
            loss, _ = self.loss(rows, self.reference, beta=0.3, loss="ipo")
            expected = self.against_each_rejected(rows, self.log_ratio, term)
            self.assertAlmostEqual(loss.item() / expected, 1.0, places=5)

    def test_simpo_row_by_row(self):
        def mean_log_prob(prompt, completion):
            return log_prob(self.policy, prompt, completion) / len(completion)

        def term(chosen, rejected):
            return softplus(1.5 * rejected - 1.5 * chosen + 0.7)

        for rows in (PAIRS, TRIPLES):
            loss, _ = self.loss(rows, None, beta=1.5, loss="simpo", gamma=0.7)
            expected = self.against_each_rejected(rows, mean_log_prob, term)
            self.assertAlmostEqual(loss.item(), expected, places=5)

    def test_defaults(self):
        for loss, reference, beta in (
            ("dpo", self.reference, 0.1),
            ("ipo", self.reference, 0.1),
            ("simpo", None, 2.0),
        ):
            with self.subTest(loss):
                self.assertEqual(DPOLoss(reference, loss=loss).beta, beta)
        self.assertEqual(DPOLoss(None, loss="simpo").gamma, 1.0)

    def test_accuracy_is_how_often_the_chosen_one_has_the_larger_implicit_reward(self):
        def prefers_chosen(chosen, rejected):
            return float(chosen > rejected)

        def mean_log_prob(prompt, completion):
            return log_prob(self.policy, prompt, completion) / len(completion)

        for loss, reference, number in (
            ("dpo", self.reference, self.log_ratio),
            ("ipo", self.reference, self.log_ratio),
            ("simpo", None, mean_log_prob),
        ):
            with self.subTest(loss):
                _, metrics = self.loss(TRIPLES, reference, loss=loss)
                expected = self.against_each_rejected(TRIPLES, number, prefers_chosen)
                self.assertAlmostEqual(metrics["accuracy"].item(), expected, places=6)

    def test_the_reference_is_a_frozen_copy(self):
        loss_fn = DPOLoss(self.policy)
        with torch.no_grad():
            self.policy.lm_head.weight.mul_(2)
        frozen = loss_fn.reference.policy
        self.assertFalse(torch.equal(frozen.lm_head.weight, self.policy.lm_head.weight))
        self.assertFalse(any(p.requires_grad for p in frozen.parameters()))

    def test_unknown_losses(self):
        with self.assertRaisesRegex(ValueError, "loss='kto' must be dpo, ipo or simpo"):
            DPOLoss(self.reference, loss="kto")

    def test_simpo_takes_no_reference(self):
        with self.assertRaisesRegex(ValueError, "no use for a reference policy: pass None"):
            DPOLoss(self.reference, loss="simpo")

    def test_the_others_need_one(self):
        for loss in ("dpo", "ipo"):
            with self.assertRaisesRegex(ValueError, f"loss='{loss}' needs a reference policy"):
                DPOLoss(None, loss=loss)

    def test_only_simpo_has_a_margin(self):
        for loss in ("dpo", "ipo"):
            with self.assertRaisesRegex(ValueError, f"loss='{loss}' has no margin gamma=0.5"):
                DPOLoss(self.reference, loss=loss, gamma=0.5)

    def test_beta_is_above_zero_and_gamma_not_below(self):
        for beta in (0, -0.1, math.nan):
            with self.assertRaisesRegex(ValueError, f"beta={beta} must be a number in"):
                DPOLoss(self.reference, beta)
        with self.assertRaisesRegex(ValueError, "gamma=-1 must be a number in"):
            DPOLoss(None, loss="simpo", gamma=-1)


class TestLearning(unittest.TestCase):
    def learn(self, model, loss_fn):
        """The metrics at the end of a short run; people choose what is written with `a`."""
        rows = [
            {"chosen": "a" * (1 + i % 3), "rejected": "b" * (1 + i % 2)} for i in range(16)
        ]
        config = Trainer.get_default_config()
        config.merge_from_dict(
            {
                "device": "cpu",
                "max_iters": 30,
                "batch_size": 16,
                "micro_batch_size": 5,
                "learning_rate": 1e-2,
            }
        )
        data = Comparisons(rows, TOKENIZER, 12)
        trainer = Trainer(config, model, data, loss_fn=loss_fn, collate_fn=Comparisons.collate)
        trainer.run()
        return trainer.metrics

    def test_a_reward_model_learns(self):
        metrics = self.learn(RewardModel.from_gpt(tiny_gpt()), comparison_loss)
        self.assertLess(metrics["loss"], 0.3)
        self.assertEqual(metrics["accuracy"], 1.0)

    def test_dpo_learns(self):
        metrics = self.learn(ActorCritic(tiny_gpt()), DPOLoss(tiny_gpt()))
        self.assertLess(metrics["loss"], 0.3)
        self.assertEqual(metrics["accuracy"], 1.0)

    def test_simpo_learns(self):
        metrics = self.learn(ActorCritic(tiny_gpt()), DPOLoss(None, loss="simpo"))
        self.assertLess(metrics["loss"], 0.3)
        self.assertEqual(metrics["accuracy"], 1.0)

    def test_ipo_learns(self):
        # beta 0.5 asks for log-ratios that differ by 1, which leaves a loss of 0
        metrics = self.learn(ActorCritic(tiny_gpt()), DPOLoss(tiny_gpt(), 0.5, loss="ipo"))
        self.assertLess(metrics["loss"], 0.3)
        self.assertEqual(metrics["accuracy"], 1.0)
