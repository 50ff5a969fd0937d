"""The table of algorithms: each row as a whole against a loop from its paper, and its choices."""

import dataclasses
import math
import statistics
import unittest
from unittest import mock

import torch

from mingpt.rlhf import ALGORITHMS, CHOICES, PPOTrainer, choose
from tests.common import tiny_gpt
from tests.test_ppo import ppo_trainer

SCORES = [1.0, -0.5, 0.3, 2.0, 0.7, 0.7]  # three groups of two; the last is one of equals
MAX_NEW_TOKENS = 6


@dataclasses.dataclass
class Episode:
    """What the papers' formulas speak of, one number a token, as plain lists."""

    new: list[float]  # log π
    old: list[float]  # log π_old
    ref: list[float]  # log π_ref
    values: list[float]  # V, of the updated value function
    old_values: list[float]
    score: float

    @property
    def tokens(self):
        return range(len(self.new))

    def ratio(self, t):
        return math.exp(self.new[t] - self.old[t])

    def sequence_ratio(self):
        return math.exp(statistics.mean(self.new[t] - self.old[t] for t in self.tokens))

    def k3(self, t):
        log_ratio = self.ref[t] - self.new[t]
        return math.exp(log_ratio) - 1 - log_ratio

    def rewards(self, beta):
        """Ziegler et al. 2019: the penalty on each token, the score on the last."""
        rewards = [-beta * (self.old[t] - self.ref[t]) for t in self.tokens]
        rewards[-1] += self.score
        return rewards


def surrogate(ratio, advantage, below=0.2, above=0.2):
    """What PPO maximises for one ratio."""
    return min(ratio * advantage, min(max(ratio, 1 - below), 1 + above) * advantage)


def whitened(numbers):
    mean, std = statistics.mean(numbers), statistics.pstdev(numbers)
    return [(x - mean) / std for x in numbers]


def group_advantages(scores, scaled):
    """Less the group's mean, and if scaled in its standard deviations (n - 1); groups of two."""
    advantages = []
    for i in range(0, len(scores), 2):
        mean, std = statistics.mean(scores[i : i + 2]), statistics.stdev(scores[i : i + 2])
        for score in scores[i : i + 2]:
            scale = std if scaled and std > 0 else 1.0
            advantages.append((score - mean) / scale)
    return advantages


def mean_over_tokens(terms):
    return statistics.mean(x for row in terms for x in row)


def mean_of_means(terms):
    return statistics.mean(statistics.mean(row) for row in terms)


class Case:
    """Six sampled episodes, and a policy and value function that have moved since."""

    def __init__(self, algorithm, **options):
        self.policy, reference = tiny_gpt(1), tiny_gpt(2)
        prompts = [[1, 2], [3, 4], [5, 6]]
        self.trainer = ppo_trainer(
            self.policy,
            prompts,
            reward=lambda *batch: torch.tensor(SCORES),
            ref_policy=reference,
            algorithm=algorithm,
            batch_size=6,
            group_size=2,
            max_new_tokens=MAX_NEW_TOKENS,
            **options,
        )
        torch.manual_seed(3)
        repeated = torch.tensor([prompt for prompt in prompts for _ in range(2)])
        mask = torch.ones_like(repeated, dtype=torch.bool)
        index = torch.tensor([0, 0, 1, 1, 2, 2])
        self.rollout = self.trainer.rollout(repeated, mask, index)
        with torch.no_grad():
            for p in self.trainer.model.parameters():
                p.add_(0.05 * torch.randn_like(p))

    def loss(self):
        [(share, micro_batch)] = self.trainer.micro_batches(self.rollout)
        loss, _ = self.trainer.policy_and_value_loss(self.trainer.model, micro_batch)
        return share * loss.item()

    def episodes(self):
        rollout = self.rollout
        mask = rollout.attention_mask
        with torch.no_grad():
            new = self.policy.log_probs(rollout.idx, mask)
            values = self.trainer.model.values(rollout.idx, mask)
        episodes = []
        for i, row in enumerate(rollout.mask):
            columns = (new, rollout.old_log_probs, rollout.ref_log_probs, values)
            lists = [x[i][row].tolist() for x in (*columns, rollout.old_values)]
            episodes.append(Episode(*lists, score=rollout.scores[i].item()))
        return episodes


class TestRows(unittest.TestCase):
    """The loss of each row of the table, on the same kind of batch."""

    def assert_loss(self, case, expected):
        lengths = {len(episode.new) for episode in case.episodes()}
        self.assertGreater(len(lengths), 1)  # otherwise the means could not differ
        self.assertAlmostEqual(case.loss(), expected, places=4)

    def test_ppo(self):
        case = Case("ppo", kl_coef=0.3, gae_lambda=0.9, gamma=0.95, value_coef=0.5)
        advantages, returns = [], []
        for episode in case.episodes():
            rewards, V = episode.rewards(0.3), [*episode.old_values, 0.0]
            deltas = [rewards[t] + 0.95 * V[t + 1] - V[t] for t in episode.tokens]
            for t in episode.tokens:
                decays = [(0.95 * 0.9) ** k for k in range(len(deltas) - t)]
                A = sum(d * delta for d, delta in zip(decays, deltas[t:], strict=True))
                advantages.append(A)
                returns.append(A + V[t])
        flat = iter(zip(whitened(advantages), returns, strict=True))
        policy_terms, value_terms = [], []
        for episode in case.episodes():
            for t in episode.tokens:
                A, R = next(flat)
                policy_terms.append(surrogate(episode.ratio(t), A))
                V, old = episode.values[t], episode.old_values[t]
                clipped = min(max(V, old - 0.2), old + 0.2)
                value_terms.append(max((V - R) ** 2, (clipped - R) ** 2))
        value_loss = 0.5 * statistics.mean(value_terms)
        self.assert_loss(case, -statistics.mean(policy_terms) + 0.5 * value_loss)

    def returns_case(self, algorithm):
        case = Case(algorithm, kl_coef=0.3)
        episodes = case.episodes()
        returns = [sum(e.rewards(0.3)[t:]) for e in episodes for t in e.tokens]
        advantages = iter(whitened(returns))
        terms = [[surrogate(e.ratio(t), next(advantages)) for t in e.tokens] for e in episodes]
        self.assert_loss(case, -mean_over_tokens(terms))

    def test_reinforce(self):
        self.returns_case("reinforce")

    def test_reinforce_pp(self):
        self.returns_case("reinforce_pp")

    def test_rloo(self):
        case = Case("rloo", kl_coef=0.3)
        episodes = case.episodes()
        totals = [sum(episode.rewards(0.3)) for episode in episodes]
        terms = []
        for i, episode in enumerate(episodes):
            A = totals[i] - totals[i ^ 1]  # the other one of its group
            terms.append([surrogate(episode.ratio(t), A) for t in episode.tokens])
        self.assert_loss(case, -mean_over_tokens(terms))

    def test_grpo(self):
        case = Case("grpo")
        terms = []
        advantages = group_advantages(SCORES, scaled=True)
        for episode, A in zip(case.episodes(), advantages, strict=True):
            tokens = episode.tokens
            terms.append([surrogate(episode.ratio(t), A) - 0.04 * episode.k3(t) for t in tokens])
        self.assert_loss(case, -mean_of_means(terms))

    def test_grpo_with_a_mean_over_tokens(self):
        case = Case("grpo", loss_mean="token", kl_coef=0.05)
        terms = []
        advantages = group_advantages(SCORES, scaled=True)
        for episode, A in zip(case.episodes(), advantages, strict=True):
            tokens = episode.tokens
            terms.append([surrogate(episode.ratio(t), A) - 0.05 * episode.k3(t) for t in tokens])
        self.assert_loss(case, -mean_over_tokens(terms))

    def test_dr_grpo(self):
        case = Case("dr_grpo")
        sums = []
        advantages = group_advantages(SCORES, scaled=False)
        for episode, A in zip(case.episodes(), advantages, strict=True):
            sums.append(sum(surrogate(episode.ratio(t), A) for t in episode.tokens))
        self.assert_loss(case, -statistics.mean(sums) / MAX_NEW_TOKENS)

    def test_dapo(self):
        case = Case("dapo")
        terms = []
        advantages = group_advantages(SCORES, scaled=True)
        for episode, A in list(zip(case.episodes(), advantages, strict=True))[:4]:  # not the equals
            terms.append([surrogate(episode.ratio(t), A, 0.2, 0.28) for t in episode.tokens])
        self.assert_loss(case, -mean_over_tokens(terms))

    def test_gspo(self):
        case = Case("gspo")
        terms = []
        advantages = group_advantages(SCORES, scaled=True)
        for episode, A in zip(case.episodes(), advantages, strict=True):
            terms.append(surrogate(episode.sequence_ratio(), A, 3e-4, 4e-4))
        self.assert_loss(case, -statistics.mean(terms))

    def test_all_of_them_are_tested_here(self):
        tested = {name.removeprefix("test_") for name in dir(self) if name.startswith("test_")}
        self.assertEqual(set(ALGORITHMS) - tested, set())


class TestChoices(unittest.TestCase):
    def chosen(self, algorithm, **options):
        config = PPOTrainer.get_default_config()
        config.merge_from_dict({"algorithm": algorithm, **options})
        return choose(config)

    def test_none_is_the_rows(self):
        for name, row in ALGORITHMS.items():
            self.assertEqual(self.chosen(name), row)

    def test_each_can_be_set_by_itself(self):
        others = {
            "advantage": "leave_one_out",
            "whiten_advantages": True,
            "kl_penalty": "reward",
            "kl_estimator": "k2",
            "kl_coef": 0.7,
            "loss_mean": "constant",
            "ratio": "sequence",
            "clip_range": (0.1, 0.5),
            "skip_equal_groups": True,
            "ppo_epochs": 7,
            "group_size": 9,
        }
        self.assertEqual(set(others), set(CHOICES))
        for name, value in others.items():
            chosen = self.chosen("grpo", **{name: value})
            self.assertEqual(chosen, dataclasses.replace(ALGORITHMS["grpo"], **{name: value}))

    def test_false_and_zero_are_no_none(self):
        self.assertFalse(self.chosen("reinforce", whiten_advantages=False).whiten_advantages)
        self.assertEqual(self.chosen("ppo", kl_coef=0.0).kl_coef, 0.0)

    def test_what_does_not_exist_is_refused(self):
        with self.assertRaisesRegex(ValueError, "algorithm='a2c' must be one of ppo, reinforce"):
            self.chosen("a2c")
        for name, value in (
            ("advantage", "td"),
            ("kl_penalty", "score"),
            ("kl_estimator", "k4"),
            ("loss_mean", "batch"),
            ("ratio", "word"),
            ("whiten_advantages", "yes"),
            ("clip_range", -0.1),
            ("clip_range", (0.1, 0.2, 0.3)),
            ("ppo_epochs", 0),
            ("group_size", 1.5),
            ("kl_coef", -1),
        ):
            self.assertRaisesRegex(ValueError, name, self.chosen, "ppo", **{name: value})

    def test_what_does_not_go_together_is_refused(self):
        for words, algorithm, options in (
            ("samples only one", "grpo", {"group_size": 1}),
            ("would skip every episode", "ppo", {"skip_equal_groups": True}),
            ("ratio=sequence needs one advantage", "ppo", {"ratio": "sequence"}),
            ("ratio=sequence needs one advantage", "reinforce", {"ratio": "sequence"}),
            ("kl_coef=0.1 has no effect", "dapo", {"kl_coef": 0.1}),
            ("gradient of zero on average", "grpo", {"kl_estimator": "k1"}),
        ):
            with self.subTest(words):
                self.assertRaisesRegex(ValueError, words, self.chosen, algorithm, **options)


class TestEqualGroups(unittest.TestCase):
    """DAPO leaves out groups of equal scores, from which nothing is learned."""

    def test_they_have_no_part_in_the_loss_nor_in_what_it_is_divided_by(self):
        case = Case("dapo")
        self.assertEqual(case.rollout.counted.tolist(), [True] * 4 + [False] * 2)
        [(_, micro_batch)] = case.trainer.micro_batches(case.rollout)
        self.assertEqual(micro_batch.tokens, case.rollout.mask[:4].sum().item())
        four = case.rollout.select(slice(0, 4))
        [(_, expected)] = case.trainer.micro_batches(four)
        model = case.trainer.model
        loss, _ = case.trainer.policy_and_value_loss(model, micro_batch)
        loss_of_four, _ = case.trainer.policy_and_value_loss(model, expected)
        torch.testing.assert_close(loss, loss_of_four)

    def test_others_keep_them(self):
        self.assertTrue(Case("gspo").rollout.counted.all())

    def run_with(self, scores):
        policy = tiny_gpt(1)
        before = [p.clone() for p in policy.parameters()]
        trainer = ppo_trainer(
            policy,
            [[1], [2]],
            reward=lambda *batch: torch.tensor(scores),
            algorithm="dapo",
            group_size=2,
            batch_size=4,
            max_iters=1,
            minibatch_size=4,
            ppo_epochs=3,
        )
        trainer.run()
        pairs = zip(before, policy.parameters(), strict=True)
        return trainer, all(torch.equal(a, b) for a, b in pairs)

    def test_where_all_groups_are_equal_no_step_is_taken(self):
        trainer, unchanged = self.run_with([0.3, 0.3, 1.0, 1.0])
        self.assertTrue(unchanged)
        self.assertEqual(trainer.metrics["skipped_steps"], 3)
        self.assertEqual(trainer.metrics["equal_groups"], 1.0)
        self.assertEqual(trainer.loss.item(), 0.0)

    def test_where_one_differs_steps_are_taken(self):
        trainer, unchanged = self.run_with([0.3, 0.3, 1.0, 0.0])
        self.assertFalse(unchanged)
        self.assertEqual(trainer.metrics["skipped_steps"], 0)
        self.assertEqual(trainer.metrics["equal_groups"], 0.5)


class TestGroups(unittest.TestCase):
    def test_a_prompt_stands_in_adjacent_rows(self):
        for algorithm in ("rloo", "grpo", "ppo"):
            prompts = [[i, i + 1] for i in range(8)]
            trainer = ppo_trainer(
                tiny_gpt(1), prompts, algorithm=algorithm, group_size=2, batch_size=8
            )
            idx, _, index = next(trainer.batches())
            self.assertEqual(idx[0::2].tolist(), idx[1::2].tolist())
            self.assertEqual(index[0::2].tolist(), index[1::2].tolist())
            self.assertEqual(len(set(map(tuple, idx.tolist()))), 4)

    def test_minibatches_keep_them_together(self):
        case = Case("grpo", minibatch_size=2)
        seen = []
        with mock.patch.object(
            case.trainer, "optimizer_step", side_effect=case.trainer.optimizer_step
        ) as step:
            case.trainer.update(case.rollout)
        for call in step.call_args_list:
            [(_, micro_batch)] = call.args[0]
            seen.append(set(micro_batch.episodes.prompt_index.tolist()))
        self.assertTrue(all(len(prompts) == 1 for prompts in seen))
        self.assertEqual(set.union(*seen), {0, 1, 2})
