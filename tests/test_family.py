"""The family as a table: each row as a whole against its paper, choices, and what goes together.

Every row is tested on the same few hand-made episodes. The loss that PPOTrainer computes of them,
and its gradient, must be those of a plain loop in double precision, written from the row's paper.
"""

import dataclasses
import math
import statistics
import unittest
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from mingpt.rlhf import ALGORITHMS, CHOICES, PPOTrainer, choose
from tests.common import tiny_gpt
from tests.test_ppo import ppo_trainer, rollout, train

GROUP_SIZE = 4
MAX_NEW_TOKENS = 8
PROMPT_LENGTH = 2


def hand_made_lengths(count):
    """Tokens of the completions: 3, 6, 1, 4, 7, 2, 5, 8, 3, ..."""
    return [1 + (3 * i + 2) % 8 for i in range(count)]


@dataclass
class Episode:
    """A completion, one number for each of its tokens, and its score."""

    log_probs: list[Tensor]  # of the policy that learns: scalars with a gradient
    old_log_probs: list[float]
    ref_log_probs: list[float]
    values: list[Tensor]  # of the value function that learns
    old_values: list[float]
    score: float

    @property
    def tokens(self):
        return range(len(self.log_probs))

    def ratio(self, t):
        return (self.log_probs[t] - self.old_log_probs[t]).exp()


class HandMade:
    """Three groups of four episodes of unlike lengths, as tensors and one by one.

    The scores of the last group are equal. They are fractions that 32-bit numbers hold exactly.
    """

    SCORES = (1.0, 0.25, -0.5, 0.75, 2.0, 0.0, 0.5, 0.125, 0.5, 0.5, 0.5, 0.5)

    def __init__(self, scores=SCORES, on_policy=False):
        generator = torch.Generator().manual_seed(3)
        rows = len(scores)

        def new(scale):
            shape = (rows, PROMPT_LENGTH - 1 + MAX_NEW_TOKENS)
            return scale * torch.randn(shape, dtype=torch.double, generator=generator)

        self.scores = torch.tensor(scores)
        self.old_log_probs = new(1.0) - 2
        self.ref_log_probs = self.old_log_probs + new(0.3)
        self.old_values = new(0.5)
        step = torch.zeros(()) if on_policy else new(0.25)
        self.log_probs = (self.old_log_probs + step).requires_grad_()
        self.values = (self.old_values + new(0.3)).requires_grad_()

        # Token 0 ends an episode. Behind it stand numbers that mean nothing.
        prompts = torch.tensor([[1, 2]] * rows)
        completions = torch.full((rows, MAX_NEW_TOKENS), 5)
        self.lengths = hand_made_lengths(rows)
        for row, length in zip(completions, self.lengths, strict=True):
            row[length - 1 :] = 0
        self.idx = torch.cat([prompts, completions], dim=1)

    def episodes(self):
        """The same as lists, for loops over episodes and tokens."""
        first = PROMPT_LENGTH - 1  # the column of the first action
        episodes = []
        for b, length in enumerate(self.lengths):
            tokens = slice(first, first + length)
            episodes.append(
                Episode(
                    log_probs=list(self.log_probs[b, tokens]),
                    old_log_probs=self.old_log_probs[b, tokens].tolist(),
                    ref_log_probs=self.ref_log_probs[b, tokens].tolist(),
                    values=list(self.values[b, tokens]),
                    old_values=self.old_values[b, tokens].tolist(),
                    score=self.scores[b].item(),
                )
            )
        return episodes

    def rollout(self, trainer):
        """What PPOTrainer.rollout makes of the episodes, when it is they that were sampled."""
        rows = len(self.idx)
        prompts = self.idx[:, :PROMPT_LENGTH]
        sampled = (self.idx, self.old_log_probs[:, PROMPT_LENGTH - 1 :])
        has_values = trainer.model.value_model is not None
        values = self.old_values if has_values else torch.zeros_like(self.old_values)
        with (
            mock.patch.object(trainer.policy, "generate", return_value=sampled),
            mock.patch.object(trainer, "log_probs", return_value=self.ref_log_probs),
            mock.patch.object(trainer, "values", return_value=values),
            mock.patch.object(trainer, "reward_fn", lambda *_: self.scores),
        ):
            mask = torch.ones_like(prompts, dtype=torch.bool)
            return trainer.rollout(prompts, mask, torch.zeros(rows, dtype=torch.long))

    def trainer(self, algorithm, **options):
        return ppo_trainer(
            tiny_gpt(),
            algorithm=algorithm,
            batch_size=len(self.idx),
            max_new_tokens=MAX_NEW_TOKENS,
            **options,
        )

    def loss_of(self, trainer):
        """The trainer's loss, as a function of log_probs and values."""
        [(share, batch)] = trainer.micro_batches(self.rollout(trainer))
        loss, _ = trainer.compute_loss(lambda *_: (self.log_probs, self.values), batch)
        return share * loss

    def gradients(self, loss):
        """The gradient of a loss by the log-probs and values of all tokens."""
        return torch.autograd.grad(
            loss, [self.log_probs, self.values], allow_unused=True, materialize_grads=True
        )


# --------------------------------------------------------------------------------------------------
# What the papers share


def clipped_surrogate(ratio, advantage, below=0.2, above=0.2):
    """min(ρ A, clip(ρ, 1 - below, 1 + above) A), of one token (Schulman et al. 2017)."""
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - below, 1 + above) * advantage
    return min(unclipped, clipped)


def shaped_rewards(episode, kl_coef):
    """-β (log π_old - log π_ref) for each token, plus the score for the last one."""
    rewards = [
        -kl_coef * (old - ref)
        for old, ref in zip(episode.old_log_probs, episode.ref_log_probs, strict=True)
    ]
    rewards[-1] += episode.score
    return rewards


def returns_of(rewards):
    """Sums of the rewards from each token to the end."""
    return [sum(rewards[t:]) for t in range(len(rewards))]


def gae_of(rewards, values, lam=0.95):
    """Advantages by the backward recursion of Schulman et al. 2015, with γ = 1."""
    advantages = [0.0] * len(rewards)
    next_value = 0.0
    next_advantage = 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + next_value - values[t]
        advantages[t] = next_advantage = delta + lam * next_advantage
        next_value = values[t]
    return advantages


def whitened(rows):
    """Lists of numbers, whitened all together."""
    flat = [x for row in rows for x in row]
    mean = statistics.mean(flat)
    deviation = math.sqrt(statistics.pvariance(flat) + 1e-8)
    return [[(x - mean) / deviation for x in row] for row in rows]


def groups_of(episodes):
    return [episodes[i : i + GROUP_SIZE] for i in range(0, len(episodes), GROUP_SIZE)]


def standardized(group):
    """The scores of a group less their mean, in standard deviations (n - 1)."""
    scores = [episode.score for episode in group]
    if min(scores) == max(scores):
        return [0.0] * len(group)
    return [(x - statistics.mean(scores)) / statistics.stdev(scores) for x in scores]


def k3(episode, t):
    """r - 1 - log r, with r = π_ref / π (Schulman 2020)."""
    log_r = episode.ref_log_probs[t] - episode.log_probs[t]
    return log_r.exp() - 1 - log_r


# --------------------------------------------------------------------------------------------------
# The rows, each from its paper


def token_mean_of_surrogates(episodes, advantages):
    """The mean over all tokens, with an advantage for each token."""
    terms = [
        clipped_surrogate(episode.ratio(t), row[t])
        for episode, row in zip(episodes, advantages, strict=True)
        for t in episode.tokens
    ]
    return -sum(terms) / len(terms)


def ppo_loss(episodes):
    rewards = [shaped_rewards(episode, 0.05) for episode in episodes]
    advantages = [
        gae_of(row, episode.old_values) for row, episode in zip(rewards, episodes, strict=True)
    ]
    squared_errors = []
    for episode, row in zip(episodes, advantages, strict=True):
        for t in episode.tokens:
            target = row[t] + episode.old_values[t]
            change = (episode.values[t] - episode.old_values[t]).clamp(-0.2, 0.2)
            bounded = episode.old_values[t] + change
            squared_errors.append(
                max((episode.values[t] - target) ** 2, (bounded - target) ** 2)
            )
    value_loss = sum(squared_errors) / len(squared_errors) / 2
    return token_mean_of_surrogates(episodes, whitened(advantages)) + 0.1 * value_loss


def reinforce_pp_loss(episodes):
    """PPO's objective on whitened returns (Hu 2025)."""
    returns = [returns_of(shaped_rewards(episode, 0.05)) for episode in episodes]
    return token_mean_of_surrogates(episodes, whitened(returns))


def rloo_loss(episodes):
    """The score, less the whole KL penalty, against the mean of the other ones in the group."""
    advantages = []
    for group in groups_of(episodes):
        totals = [sum(shaped_rewards(episode, 0.05)) for episode in group]
        for i, episode in enumerate(group):
            others = totals[:i] + totals[i + 1 :]
            advantage = totals[i] - statistics.mean(others)
            advantages.append([advantage for _ in episode.tokens])
    return token_mean_of_surrogates(episodes, advantages)


def grpo_loss(episodes):
    """Equation 3 of Shao et al. 2024: completions are averaged first; the penalty is k3."""
    means = []
    for group in groups_of(episodes):
        for episode, advantage in zip(group, standardized(group), strict=True):
            terms = [
                clipped_surrogate(episode.ratio(t), advantage) - 0.04 * k3(episode, t)
                for t in episode.tokens
            ]
            means.append(sum(terms) / len(terms))
    return -sum(means) / len(means)


def grpo_loss_over_tokens(episodes):
    """GRPO as this library had it first: all tokens alike, and a penalty of 0.05."""
    terms = []
    for group in groups_of(episodes):
        for episode, advantage in zip(group, standardized(group), strict=True):
            for t in episode.tokens:
                surrogate = clipped_surrogate(episode.ratio(t), advantage)
                terms.append(surrogate - 0.05 * k3(episode, t))
    return -sum(terms) / len(terms)


def dr_grpo_loss(episodes):
    """Liu et al. 2025: no deviation, and a constant instead of the completion's length."""
    sums = []
    for group in groups_of(episodes):
        mean = statistics.mean(episode.score for episode in group)
        for episode in group:
            advantage = episode.score - mean
            terms = [clipped_surrogate(episode.ratio(t), advantage) for t in episode.tokens]
            sums.append(sum(terms) / MAX_NEW_TOKENS)
    return -sum(sums) / len(sums)


def dapo_loss(episodes):
    """Equation 8 of Yu et al. 2025: groups of equal scores are left out, all tokens are alike."""
    terms = []
    for group in groups_of(episodes):
        if len({episode.score for episode in group}) == 1:
            continue
        for episode, advantage in zip(group, standardized(group), strict=True):
            for t in episode.tokens:
                terms.append(clipped_surrogate(episode.ratio(t), advantage, 0.2, 0.28))
    return -sum(terms) / len(terms)


def gspo_loss(episodes):
    """Equations 5 and 7 of Zheng et al. 2025: one ratio for the whole completion."""
    terms = []
    for group in groups_of(episodes):
        for episode, advantage in zip(group, standardized(group), strict=True):
            log_ratios = [
                episode.log_probs[t] - episode.old_log_probs[t] for t in episode.tokens
            ]
            ratio = (sum(log_ratios) / len(log_ratios)).exp()
            terms.append(clipped_surrogate(ratio, advantage, 3e-4, 4e-4))
    return -sum(terms) / len(terms)


class TestRows(unittest.TestCase):
    def check(self, loss_from_the_paper, algorithm, hand_made=None, **options):
        """The trainer's loss and gradient against a loop's."""
        if hand_made is None:
            hand_made = HandMade()
        found = hand_made.loss_of(hand_made.trainer(algorithm, **options))
        expected = loss_from_the_paper(hand_made.episodes())
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)
        found_gradients = hand_made.gradients(found)
        expected_gradients = hand_made.gradients(expected)
        torch.testing.assert_close(found_gradients, expected_gradients, atol=1e-7, rtol=1e-7)
        self.assertGreater(found_gradients[0].abs().max().item(), 1e-3)

    def test_every_row_has_a_test(self):
        for name in ALGORITHMS:
            self.assertTrue(hasattr(self, f"test_{name}"), name)

    def test_ppo(self):
        self.check(ppo_loss, "ppo")

    def test_reinforce(self):
        # One step on the policy that sampled: its gradient is that of A log π (Williams 1992).
        def loss(episodes):
            returns = [returns_of(shaped_rewards(episode, 0.05)) for episode in episodes]
            terms = [
                -advantage * (log_prob - log_prob.detach() + 1)
                for episode, row in zip(episodes, whitened(returns), strict=True)
                for log_prob, advantage in zip(episode.log_probs, row, strict=True)
            ]
            return sum(terms) / len(terms)

        self.check(loss, "reinforce", HandMade(on_policy=True))

    def test_reinforce_pp(self):
        self.check(reinforce_pp_loss, "reinforce_pp")

    def test_rloo(self):
        self.check(rloo_loss, "rloo")

    def test_grpo(self):
        self.check(grpo_loss, "grpo")

    def test_dr_grpo(self):
        self.check(dr_grpo_loss, "dr_grpo")

    def test_dapo(self):
        self.check(dapo_loss, "dapo")

    def test_gspo(self):
        self.check(gspo_loss, "gspo")

    def test_grpo_over_tokens_is_what_it_once_was(self):
        self.check(grpo_loss_over_tokens, "grpo", loss_mean="token", kl_coef=0.05)

    def test_k2_in_the_loss(self):
        def loss(episodes):
            means = []
            for episode in episodes:
                terms = [
                    (episode.log_probs[t] - episode.ref_log_probs[t]) ** 2 / 2
                    for t in episode.tokens
                ]
                means.append(sum(terms) / len(terms))
            return 0.3 * sum(means) / len(means)

        # Equal scores have no advantages, which leaves the penalty alone.
        hand_made = HandMade(scores=(0.5,) * 8)
        self.check(loss, "grpo", hand_made, kl_estimator="k2", kl_coef=0.3)

    def test_k3_in_the_reward(self):
        def loss(episodes):
            returns = []
            for episode in episodes:
                rewards = []
                for old, ref in zip(episode.old_log_probs, episode.ref_log_probs, strict=True):
                    rewards.append(-0.3 * (math.exp(ref - old) - 1 - (ref - old)))
                rewards[-1] += episode.score
                returns.append(returns_of(rewards))
            return token_mean_of_surrogates(episodes, whitened(returns))

        self.check(loss, "reinforce_pp", kl_estimator="k3", kl_coef=0.3)

    def test_passes_over_a_rollout(self):
        for algorithm in ALGORITHMS:
            with self.subTest(algorithm):
                trainer = HandMade().trainer(algorithm, minibatch_size=4)
                passes = 1 if algorithm == "reinforce" else 4
                with mock.patch.object(trainer, "minibatch_step", return_value=None) as step:
                    trainer.update(HandMade().rollout(trainer))
                self.assertEqual(step.call_count, passes * 3)

    def test_every_row_trains(self):
        for algorithm in ALGORITHMS:
            with self.subTest(algorithm):
                [row] = train(tiny_gpt(1), [[1], [4, 2, 5]], algorithm=algorithm, max_iters=1)
                self.assertLess(row["log_prob_error"], 1e-4)
                self.assertGreater(row["grad_norm"], 0)


class TestMicroBatches(unittest.TestCase):
    """The losses of a minibatch's micro-batches add up to the loss of the minibatch."""

    def check(self, algorithm, **options):
        hand_made = HandMade()
        whole = hand_made.loss_of(hand_made.trainer(algorithm, **options))
        trainer = hand_made.trainer(algorithm, micro_batch_size=4, **options)
        total = 0.0
        batches = trainer.micro_batches(hand_made.rollout(trainer))
        for i, (share, batch) in enumerate(batches):
            rows = slice(4 * i, 4 * i + 4)
            numbers = (hand_made.log_probs[rows], hand_made.values[rows])
            loss, _ = trainer.compute_loss(lambda *_, numbers=numbers: numbers, batch)
            total = total + share * loss
        self.assertEqual(len(batches), 3)
        torch.testing.assert_close(total, whole, atol=1e-12, rtol=1e-12)
        gradients = hand_made.gradients(total)
        torch.testing.assert_close(gradients, hand_made.gradients(whole), atol=1e-12, rtol=1e-12)

    def test_every_row(self):
        for algorithm in ALGORITHMS:
            with self.subTest(algorithm):
                self.check(algorithm)

    def test_every_mean(self):
        for loss_mean in ("token", "sequence", "constant"):
            for algorithm in ("ppo", "grpo"):
                with self.subTest(algorithm, loss_mean=loss_mean):
                    self.check(algorithm, loss_mean=loss_mean)

    def test_without_the_groups_that_are_skipped(self):
        for loss_mean in ("token", "sequence", "constant"):
            with self.subTest(loss_mean):
                self.check("dapo", loss_mean=loss_mean)


class TestGroups(unittest.TestCase):
    """Groups of episodes that begin with the same prompt."""

    def trainer(self, **options):
        prompts = [[i, i + 1] for i in range(8)]
        options = {"group_size": 2, "batch_size": 8, **options}
        return ppo_trainer(tiny_gpt(1), prompts, ref_policy=tiny_gpt(2), **options)

    def test_groups_share_a_prompt(self):
        for algorithm in ("rloo", "grpo", "ppo"):
            with self.subTest(algorithm):
                prompts, _, prompt_index = next(self.trainer(algorithm=algorithm).batches())
                self.assertEqual(prompts[0::2].tolist(), prompts[1::2].tolist())
                self.assertEqual(len({tuple(prompt) for prompt in prompts.tolist()}), 4)
                self.assertEqual(prompts[:, 0].tolist(), prompt_index.tolist())

    def check_advantages(self, algorithm, advantage_of):
        """advantage_of(total, total of the other one) is that of all tokens of an episode."""
        trainer = self.trainer(algorithm=algorithm, kl_coef=0.3)
        r = trainer.rollout(*next(trainer.batches()))
        totals = r.scores
        if algorithm == "rloo":
            totals = totals - 0.3 * r.kl.sum(1)  # the penalty is a part of the score
        for b in range(8):
            other = b + 1 if b % 2 == 0 else b - 1
            expected = advantage_of(totals[b].item(), totals[other].item())
            found = r.advantages[b][r.mask[b]]
            wanted = torch.full_like(found, expected)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)

    def test_groups_share_a_prompt_and_their_advantages_follow_the_paper(self):
        def leave_one_out(own, other):
            return own - other

        def standardized(own, other):
            return 0.0 if own == other else math.copysign(2**-0.5, own - other)

        self.check_advantages("rloo", leave_one_out)
        self.check_advantages("grpo", standardized)

    def test_minibatches_keep_them_together(self):
        trainer = self.trainer(algorithm="grpo", minibatch_size=2)
        r = trainer.rollout(*next(trainer.batches()))
        seen = []
        wrapped = mock.patch.object(trainer, "optimizer_step", wraps=trainer.optimizer_step)
        with wrapped as step:
            trainer.update(r)
        for call in step.call_args_list:
            [(_, batch)] = call.args[0]
            first, second = batch.episodes.prompt_index.tolist()
            self.assertEqual(first, second)
            seen.append(first)
        self.assertEqual(set(seen), set(r.prompt_index.tolist()))

    def test_grpo_penalty_is_the_mean_of_k3(self):
        policy = tiny_gpt(1)
        reference = tiny_gpt(2)
        options = {"algorithm": "grpo", "kl_coef": 0.3, "loss_mean": "token"}
        trainer, r = rollout(policy, [[1]], ref_policy=reference, **options)
        r.advantages = torch.zeros_like(r.kl)  # leaves the penalty alone
        [(_, batch)] = trainer.micro_batches(r)
        loss, _ = trainer.policy_and_value_loss(trainer.model, batch)
        log_ratio = policy.log_probs(r.idx) - reference.log_probs(r.idx)
        terms = [math.exp(-x) - 1 + x for x in log_ratio[r.mask].tolist()]
        expected = 0.3 * sum(terms) / len(terms)
        self.assertAlmostEqual(loss.item(), expected, places=4)


class TestEqualGroups(unittest.TestCase):
    """Groups whose completions all earned the same: they teach nothing, and may be left out."""

    def nothing(self, idx, attention_mask, completion_mask):
        """A reward function for which all texts are alike."""
        return torch.zeros(len(idx))

    def test_they_have_no_part_in_the_loss(self):
        hand_made = HandMade()
        penalty = {"kl_penalty": "loss", "kl_estimator": "k3", "kl_coef": 0.3}
        loss = hand_made.loss_of(hand_made.trainer("dapo", **penalty))
        gradient, _ = hand_made.gradients(loss)
        self.assertTrue(gradient[:8].any(dim=1).all())
        self.assertFalse(gradient[8:].any())  # not even in that of the penalty

    def test_they_have_no_part_in_the_denominator(self):
        # Two groups of which one is skipped, or the first one alone.
        scores = HandMade.SCORES[:4]
        for loss_mean in ("token", "sequence", "constant"):
            with self.subTest(loss_mean):
                both = HandMade(scores=(*scores, 0.5, 0.5, 0.5, 0.5))
                loss = both.loss_of(both.trainer("dapo", loss_mean=loss_mean))
                trainer = both.trainer("dapo", loss_mean=loss_mean)
                first = both.rollout(trainer).select(slice(0, 4))
                [(_, batch)] = trainer.micro_batches(first)
                numbers = (both.log_probs[:4], both.values[:4])
                alone, _ = trainer.compute_loss(lambda *_, numbers=numbers: numbers, batch)
                torch.testing.assert_close(loss, alone, atol=1e-12, rtol=1e-12)

    def test_unless_they_are_skipped_they_have(self):
        hand_made = HandMade()
        skipping = hand_made.loss_of(hand_made.trainer("dapo")).item()
        counting = hand_made.loss_of(hand_made.trainer("dapo", skip_equal_groups=False)).item()
        tokens = sum(hand_made.lengths)
        counted_tokens = sum(hand_made.lengths[:8])
        self.assertAlmostEqual(counting, skipping * counted_tokens / tokens, places=9)

    def test_minibatches_without_any_other_are_no_step(self):
        hand_made = HandMade()
        trainer = hand_made.trainer("dapo", minibatch_size=4, ppo_epochs=2)
        r = hand_made.rollout(trainer)
        with (
            mock.patch.object(trainer, "shuffled", return_value=torch.arange(12)),
            mock.patch.object(trainer, "optimizer_step", wraps=trainer.optimizer_step) as step,
        ):
            metrics = trainer.update(dataclasses.replace(r, old_log_probs=r.old_log_probs.float()))
        self.assertEqual(step.call_count, 4)
        self.assertEqual(metrics["skipped_steps"], 2)

    def test_when_all_groups_are_equal_nothing_is_learned(self):
        policy = tiny_gpt()
        before = {name: p.clone() for name, p in policy.state_dict().items()}
        options = {"algorithm": "dapo", "minibatch_size": 8, "max_iters": 2}
        trainer = ppo_trainer(policy, reward=self.nothing, weight_decay=0.1, **options)
        rows = []
        trainer.add_callback("on_log", lambda trainer: rows.append(trainer.metrics))
        trainer.run()
        torch.testing.assert_close(policy.state_dict(), before, atol=0, rtol=0)
        self.assertEqual(trainer.optimizer.state_dict()["state"], {})
        self.assertEqual([row["skipped_steps"] for row in rows], [8, 8])  # 4 passes, 2 minibatches
        self.assertEqual([row["loss"] for row in rows], [0.0, 0.0])
        self.assertEqual([row["grad_norm"] for row in rows], [0.0, 0.0])

    def test_where_one_group_differs_a_step_is_taken(self):
        def last_one_differs(idx, attention_mask, completion_mask):
            scores = torch.zeros(len(idx))
            scores[-1] = 1.0
            return scores

        policy = tiny_gpt()
        before = policy.lm_head.weight.clone()
        options = {"algorithm": "dapo", "batch_size": 8, "max_iters": 1}
        [row] = train(policy, reward=last_one_differs, **options)
        self.assertFalse(torch.equal(policy.lm_head.weight, before))
        self.assertEqual(row["skipped_steps"], 0)
        self.assertEqual(row["equal_groups"], 0.5)

    def test_other_rows_keep_them(self):
        hand_made = HandMade()
        for algorithm in ("rloo", "grpo", "dr_grpo", "gspo"):
            self.assertTrue(hand_made.rollout(hand_made.trainer(algorithm)).counted.all())

    def test_the_metric_is_the_share_of_equal_groups(self):
        hand_made = HandMade()
        for algorithm in ("rloo", "grpo", "dapo"):
            trainer = hand_made.trainer(algorithm)
            metrics = trainer.describe(hand_made.rollout(trainer))
            self.assertAlmostEqual(metrics["equal_groups"], 1 / 3, places=6)

    def test_metrics_of_groups_are_for_algorithms_that_have_them(self):
        [row] = train(tiny_gpt(), max_iters=1)
        self.assertNotIn("equal_groups", row)
        self.assertNotIn("skipped_steps", row)
        [row] = train(tiny_gpt(), algorithm="grpo", max_iters=1)
        self.assertIn("equal_groups", row)
        self.assertNotIn("skipped_steps", row)

    def test_a_penalty_in_the_reward_makes_scores_unequal(self):
        # What is compared is the score less the penalty, so equal scores may differ in it.
        hand_made = HandMade()
        trainer = hand_made.trainer("rloo", skip_equal_groups=True)
        self.assertTrue(hand_made.rollout(trainer).counted.all())


def config(**options):
    config = PPOTrainer.get_default_config()
    config.merge_from_dict(options)
    return config


class TestChoices(unittest.TestCase):
    """Each choice of an algorithm is an option of its own."""

    OTHERS = (
        ("advantage", "group_mean"),
        ("whiten_advantages", True),
        ("kl_penalty", "reward"),
        ("kl_estimator", "k2"),
        ("kl_coef", 0.3),
        ("loss_mean", "constant"),
        ("ratio", "sequence"),
        ("clip_range", (0.05, 0.3)),
        ("skip_equal_groups", True),
        ("ppo_epochs", 7),
        ("group_size", 16),
    )

    def test_an_option_of_none_is_the_rows(self):
        for algorithm, row in ALGORITHMS.items():
            with self.subTest(algorithm):
                self.assertEqual(choose(config(algorithm=algorithm)), row)

    def test_every_choice_is_an_option_whose_default_is_none(self):
        options = config()
        for name in CHOICES:
            self.assertIsNone(getattr(options, name), name)

    def test_any_choice_by_itself_overrides_the_row(self):
        self.assertEqual({name for name, _ in self.OTHERS}, set(CHOICES))
        for name, value in self.OTHERS:
            with self.subTest(name):
                found = choose(config(algorithm="grpo", **{name: value}))
                expected = dataclasses.replace(ALGORITHMS["grpo"], **{name: value})
                self.assertEqual(found, expected)
                self.assertNotEqual(found, ALGORITHMS["grpo"])

    def test_false_and_zero_override_too(self):
        found = choose(config(algorithm="ppo", whiten_advantages=False, kl_coef=0))
        self.assertFalse(found.whiten_advantages)
        self.assertEqual(found.kl_coef, 0)
        found = choose(config(algorithm="dapo", skip_equal_groups=False))
        self.assertFalse(found.skip_equal_groups)

    def test_the_trainer_follows_the_choice_and_not_the_name(self):
        hand_made = HandMade()
        # PPO with every choice of GRPO is GRPO.
        row = dataclasses.asdict(ALGORITHMS["grpo"])
        found = hand_made.loss_of(hand_made.trainer("ppo", **row))
        expected = hand_made.loss_of(hand_made.trainer("grpo"))
        self.assertEqual(found.item(), expected.item())

    def test_no_penalty_can_be_chosen_by_itself(self):
        for name in ("ppo", "rloo", "grpo"):
            config = PPOTrainer.get_default_config()
            config.merge_from_dict({"algorithm": name, "kl_penalty": "none"})
            self.assertEqual(choose(config).kl_coef, 0.0)

    def test_every_row_can_be_had_from_every_other(self):
        for name, row in ALGORITHMS.items():
            for algorithm in ALGORITHMS:
                options = dataclasses.asdict(row)
                self.assertEqual(choose(config(algorithm=algorithm, **options)), row, name)


class TestRefusals(unittest.TestCase):
    """Choices that are unknown, or that do not go together."""

    def check(self, message, **options):
        with self.assertRaisesRegex(ValueError, message):
            choose(config(**options))

    def test_unknown_algorithms(self):
        names = ", ".join(ALGORITHMS)
        self.check(f"algorithm='a2c' must be one of {names}", algorithm="a2c")

    def test_unknown_choices(self):
        for name, allowed in (
            (
                "advantage",
                "gae, return, leave_one_out, group_mean, group_standardized",
            ),
            ("kl_penalty", "reward, loss, none"),
            ("kl_estimator", "k1, k2, k3"),
            ("loss_mean", "token, sequence, constant"),
            ("ratio", "token, sequence"),
            ("whiten_advantages", "True, False"),
            ("skip_equal_groups", "True, False"),
        ):
            with self.subTest(name):
                self.check(f"{name}='other' must be one of {allowed}$", **{name: "other"})

    def test_numbers(self):
        for name, value in (
            ("ppo_epochs", 0),
            ("ppo_epochs", 1.5),
            ("group_size", 0),
            ("group_size", 2.5),
            ("kl_coef", -1),
            ("kl_coef", math.inf),
            ("clip_range", -0.2),
        ):
            with self.subTest(name, value=value):
                self.check(f"{name}={value} must be a", **{name: value})

    def test_clip_ranges_of_three(self):
        message = r"clip_range=\(0.1, 0.2, 0.3\) must be a number from 0 on, or two"
        self.check(message, clip_range=(0.1, 0.2, 0.3))

    def test_group_advantages_of_one(self):
        for algorithm in ("rloo", "grpo", "dr_grpo"):
            message = (
                f"advantage={ALGORITHMS[algorithm].advantage} compares completions of one prompt, "
                "and group_size=1 samples only one: set group_size to 2 or more"
            )
            self.check(message, algorithm=algorithm, group_size=1)

    def test_equal_groups_of_one(self):
        message = "skip_equal_groups=True with group_size=1 would skip every episode"
        self.check(message, algorithm="ppo", skip_equal_groups=True)

    def test_sequence_ratios_need_an_advantage_of_the_sequence(self):
        for algorithm, advantage in (("ppo", "gae"), ("reinforce_pp", "return")):
            message = (
                "ratio=sequence needs one advantage for the whole completion, and "
                f"advantage={advantage} gives one for each token: use leave_one_out, group_mean, "
                "group_standardized, or ratio=token"
            )
            self.check(message, algorithm=algorithm, ratio="sequence")

    def test_a_weight_of_no_penalty(self):
        message = "kl_coef=0.1 has no effect with kl_penalty=none: leave it out, or set kl_penalty"
        self.check(message, algorithm="dapo", kl_coef=0.1)

    def test_k1_in_the_loss(self):
        message = "kl_estimator=k1 in the loss has a gradient of zero on average: use k2 or k3"
        self.check(message, algorithm="grpo", kl_estimator="k1")
        self.check(message, algorithm="ppo", kl_penalty="loss")

    def test_the_trainer_refuses_them_too(self):
        with self.assertRaisesRegex(ValueError, "kl_estimator=k1 in the loss"):
            ppo_trainer(tiny_gpt(), algorithm="grpo", kl_estimator="k1")
