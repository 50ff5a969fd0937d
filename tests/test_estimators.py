"""The pure functions of rlhf.py, each against a loop written from its paper's equation."""

import math
import statistics
import unittest

import numpy as np
import torch

from mingpt import rlhf


def example(B=4, T=9):
    """A mask that begins and ends somewhere in each row, and a function for random (B, T) tensors.

    In double precision, from a generator of their own.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 3, (B, 1), generator=generator)
    length = torch.randint(1, T - 2, (B, 1), generator=generator)
    columns = torch.arange(T)
    mask = (columns >= first) & (columns < first + length)

    def new():
        return torch.randn(B, T, dtype=torch.double, generator=generator)

    return mask, new


def rows_under(mask, x):
    """The entries of each row of x that are under the mask, as lists of Python numbers."""
    return [row[keep].tolist() for row, keep in zip(x, mask, strict=True)]


def check_gradient(f, *inputs):
    """Autograd's gradient of the scalar f(*inputs) against central differences, entry by entry."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


class TestMasks(unittest.TestCase):
    def setUp(self):
        self.mask, new = example()
        self.x = new() * 3 + 5

    def test_masked_mean_and_whiten(self):
        entries = self.x[self.mask].tolist()
        mean = statistics.mean(entries)
        deviation = statistics.pstdev(entries)
        self.assertAlmostEqual(rlhf.masked_mean(self.x, self.mask).item(), mean, places=10)
        white = rlhf.masked_whiten(self.x, self.mask)[self.mask]
        for x, whitened in zip(entries, white.tolist(), strict=True):
            self.assertAlmostEqual(whitened, (x - mean) / deviation, places=6)

    def test_the_mean_of_each_row(self):
        expected = [statistics.mean(row) for row in rows_under(self.mask, self.x)]
        found = rlhf.masked_mean(self.x, self.mask, dim=1)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double))

    def test_the_mean_of_nothing_is_zero(self):
        self.assertEqual(rlhf.masked_mean(self.x, torch.zeros_like(self.mask)).item(), 0.0)

    def test_whitened_numbers_have_mean_0_and_variance_1(self):
        white = rlhf.masked_whiten(self.x, self.mask)[self.mask]
        self.assertAlmostEqual(white.mean().item(), 0.0, places=7)
        self.assertAlmostEqual(white.std(unbiased=False).item(), 1.0, places=6)

    def test_whitening_may_keep_the_mean(self):
        white = rlhf.masked_whiten(self.x, self.mask, shift_mean=False)[self.mask]
        mean = self.x[self.mask].mean().item()
        self.assertAlmostEqual(white.mean().item(), mean, places=7)
        self.assertAlmostEqual(white.std(unbiased=False).item(), 1.0, places=6)

    def test_whitened_numbers_are_zero_off_the_mask(self):
        white = rlhf.masked_whiten(self.x, self.mask)
        self.assertTrue((white[~self.mask] == 0).all())

    def test_whitening_does_not_blow_up_rounding_errors(self):
        constant = torch.full((4, 9), 0.3)
        self.assertLess(rlhf.masked_whiten(constant, self.mask).abs().max().item(), 1e-2)


class TestGAE(unittest.TestCase):
    def test_gae_equals_the_sum_it_is_defined_as(self):
        mask, new = example()
        rewards, values = new(), new()
        for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)):
            with self.subTest(gamma=gamma, lam=lam):
                advantages, returns = rlhf.gae(rewards, values, mask, gamma, lam)
                self.assertFalse(advantages[~mask].any() or returns[~mask].any())
                for b, t in mask.nonzero().tolist():
                    last = mask[b].nonzero().max().item()
                    expected = self.sum_of_deltas(rewards[b], values[b], t, last, gamma, lam)
                    self.assertAlmostEqual(advantages[b, t].item(), expected, places=10)
                    value = values[b, t].item()
                    self.assertAlmostEqual(returns[b, t].item(), expected + value, places=10)

    def sum_of_deltas(self, rewards, values, t, last, gamma, lam):
        """Equation 16 of the paper: the sum of (γλ)^k δ_{t+k}, up to the last token."""
        total = 0.0
        for k, s in enumerate(range(t, last + 1)):
            next_value = values[s + 1].item() if s < last else 0.0
            delta = rewards[s].item() + gamma * next_value - values[s].item()
            total += (gamma * lam) ** k * delta
        return total


class TestShaping(unittest.TestCase):
    def test_potentials_cancel_in_the_sum_over_an_episode(self):
        mask, new = example()
        rewards, potentials = new(), new()
        for gamma in (1.0, 0.9):
            changed = rlhf.shaped(rewards, potentials, mask, gamma)
            self.assertFalse(changed[~mask].any())
            for b in range(len(mask)):
                discounts = gamma ** torch.arange(int(mask[b].sum()), dtype=torch.double)
                before = (discounts * rewards[b][mask[b]]).sum()
                after = (discounts * changed[b][mask[b]]).sum()
                first = potentials[b][mask[b]][0]
                self.assertAlmostEqual(after.item(), (before - first).item(), places=10)


class TestGroupAdvantages(unittest.TestCase):
    """Scores against those of the other completions of the same prompt."""

    SIZES = (2, 3, 4, 12)

    def setUp(self):
        generator = torch.Generator().manual_seed(0)
        self.scores = torch.randn(12, dtype=torch.double, generator=generator)

    def check(self, estimate, advantage_of, places):
        """estimate(scores, k) against advantage_of(score, its group, the others in it)."""
        scores = self.scores.tolist()
        for k in self.SIZES:
            found = estimate(self.scores, k).tolist()
            for i, score in enumerate(scores):
                first = i - i % k
                group = scores[first : first + k]
                others = scores[first:i] + scores[i + 1 : first + k]
                expected = advantage_of(score, group, others)
                self.assertAlmostEqual(found[i], expected, places=places)

    def test_group_advantages_one_by_one(self):
        def leave_one_out(score, group, others):
            return score - statistics.mean(others)

        def standardized(score, group, others):
            return (score - statistics.mean(group)) / statistics.stdev(group)

        self.check(rlhf.rloo_advantages, leave_one_out, places=9)
        self.check(rlhf.grpo_advantages, standardized, places=5)

    def test_group_mean_advantages_one_by_one(self):
        def centred(score, group, others):
            return score - statistics.mean(group)

        self.check(rlhf.group_mean_advantages, centred, places=9)

    def test_equal_scores_give_advantages_of_exactly_zero(self):
        for estimate in (rlhf.grpo_advantages, rlhf.group_mean_advantages):
            for score in (1.0, 0.3, 100.3):  # a mean of 32-bit numbers is not quite the number
                with self.subTest(estimate.__name__, score=score):
                    scores = torch.full((16,), score)
                    self.assertEqual(estimate(scores, 16).tolist(), [0.0] * 16)

    def test_one_group_of_equal_scores_leaves_the_others_as_they_are(self):
        scores = torch.tensor([0.3, 0.3, 0.3, 1.0, 2.0, 6.0])
        self.assertEqual(rlhf.group_mean_advantages(scores, 3).tolist(), [0, 0, 0, -2, -1, 3])

    def test_groups_that_do_not_fit(self):
        for estimate in (rlhf.rloo_advantages, rlhf.grpo_advantages, rlhf.group_mean_advantages):
            for k in (0, 1, 5):
                with self.subTest(estimate.__name__, k=k):
                    message = f"group_size={k} must be 2 or more and divide the 12 scores"
                    self.assertRaisesRegex(ValueError, message, estimate, self.scores, k)


class TestKL(unittest.TestCase):
    """kl_estimate, on a policy and a reference whose KL can be computed exactly."""

    def setUp(self):
        logits = [[0.1, 1.0, -0.5, 0.3], [0.4, 0.2, 0.1, -0.2]]
        self.log_p, self.log_q = torch.tensor(logits, dtype=torch.double).log_softmax(-1)

    def expectation(self, kind):
        """The mean of the estimates, each token weighted by its probability under p."""
        estimates = rlhf.kl_estimate(self.log_p, self.log_q, kind)
        return (self.log_p.exp() * estimates).sum().item()

    def test_kl_estimates_meet_the_exact_kl(self):
        pairs = list(zip(self.log_p.tolist(), self.log_q.tolist(), strict=True))
        exact = sum(math.exp(p) * (p - q) for p, q in pairs)
        squares = sum(math.exp(p) * (p - q) ** 2 / 2 for p, q in pairs)
        self.assertAlmostEqual(self.expectation("k1"), exact, places=10)  # unbiased
        self.assertAlmostEqual(self.expectation("k2"), squares, places=10)
        self.assertAlmostEqual(self.expectation("k3"), exact, places=10)  # unbiased

    def test_k3_is_never_negative(self):
        self.assertTrue((rlhf.kl_estimate(self.log_p, self.log_q, "k3") >= 0).all())

    def test_unknown_estimators(self):
        with self.assertRaisesRegex(ValueError, "kind='k4' must be k1, k2 or k3"):
            rlhf.kl_estimate(self.log_p, self.log_q, "k4")


class TestGradientOfKL(unittest.TestCase):
    """Which estimator may stand in the loss: its gradient on policy, against that of the KL.

    A policy over three tokens. The gradient that a loss follows on average is that of the estimate
    of each token, weighted by the probability with which the token is sampled. The weights are held
    fixed, since sampling is not differentiated.
    """

    def setUp(self):
        self.logits = torch.tensor([0.5, -0.3, 1.1], dtype=torch.double, requires_grad=True)
        self.log_policy = self.logits.log_softmax(0)
        logits = torch.tensor([-0.2, 0.9, 0.4], dtype=torch.double)
        self.log_reference = logits.log_softmax(0)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.logits, retain_graph=True)[0]

    def gradient_on_policy(self, kind):
        probabilities = self.log_policy.exp().detach()
        estimates = rlhf.kl_estimate(self.log_policy, self.log_reference, kind)
        return self.gradient((probabilities * estimates).sum())

    def gradient_of_kl(self):
        """Of KL(π || π_ref), exactly."""
        log_ratio = self.log_policy - self.log_reference
        return self.gradient((self.log_policy.exp() * log_ratio).sum())

    def gradient_of_reverse_kl(self):
        """Of KL(π_ref || π), exactly."""
        log_ratio = self.log_reference - self.log_policy
        return self.gradient((self.log_reference.exp() * log_ratio).sum())

    def test_the_directions_differ(self):
        difference = self.gradient_of_kl() - self.gradient_of_reverse_kl()
        self.assertGreater(difference.abs().max().item(), 0.05)

    def test_k1_in_the_loss_has_no_gradient(self):
        found = self.gradient_on_policy("k1")
        torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)
        self.assertGreater(self.gradient_of_kl().abs().max().item(), 0.1)

    def test_k2_in_the_loss_has_the_gradient_of_the_kl(self):
        found = self.gradient_on_policy("k2")
        torch.testing.assert_close(found, self.gradient_of_kl(), atol=1e-12, rtol=0)

    def gradient_in_the_reward(self, kind):
        """The same for an estimate that is a part of the reward: a number times ∇ log π."""
        probabilities = self.log_policy.exp().detach()
        estimates = rlhf.kl_estimate(self.log_policy.detach(), self.log_reference, kind)
        return self.gradient((probabilities * estimates * self.log_policy).sum())

    def test_k1_in_the_reward_has_the_gradient_of_the_kl(self):
        found = self.gradient_in_the_reward("k1")
        torch.testing.assert_close(found, self.gradient_of_kl(), atol=1e-12, rtol=0)

    def test_k3_in_the_reward_has_the_difference_of_both_directions(self):
        found = self.gradient_in_the_reward("k3")
        expected = self.gradient_of_kl() - self.gradient_of_reverse_kl()
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)

    def test_k3_in_the_loss_has_the_gradient_of_the_other_directions_kl(self):
        found = self.gradient_on_policy("k3")
        torch.testing.assert_close(found, self.gradient_of_reverse_kl(), atol=1e-12, rtol=0)


class TestAverage(unittest.TestCase):
    """What a loss is averaged over."""

    def setUp(self):
        self.mask, new = example()
        self.mask[2] = False  # an episode without a part in the loss
        self.x = new()
        self.rows = [row for row in rows_under(self.mask, self.x) if row]

    def test_token(self):
        entries = [x for row in self.rows for x in row]
        expected = sum(entries) / len(entries)
        self.assertAlmostEqual(rlhf.average(self.x, self.mask).item(), expected, places=12)

    def test_sequence(self):
        means = [sum(row) / len(row) for row in self.rows]
        expected = sum(means) / len(means)
        found = rlhf.average(self.x, self.mask, "sequence")
        self.assertAlmostEqual(found.item(), expected, places=12)

    def test_constant(self):
        sums = [sum(row) / 7 for row in self.rows]
        expected = sum(sums) / len(sums)
        found = rlhf.average(self.x, self.mask, "constant", max_new_tokens=7)
        self.assertAlmostEqual(found.item(), expected, places=12)

    def test_the_three_differ(self):
        results = {
            rlhf.average(self.x, self.mask, loss_mean, max_new_tokens=7).item()
            for loss_mean in ("token", "sequence", "constant")
        }
        self.assertEqual(len(results), 3)

    def test_parts_add_up_to_the_whole(self):
        for loss_mean in ("token", "sequence", "constant"):
            with self.subTest(loss_mean):
                expected = rlhf.average(self.x, self.mask, loss_mean, 7).item()
                denominator = rlhf.average_denominator(self.mask, loss_mean, 7)
                total = 0.0
                for rows in (slice(0, 1), slice(1, 4)):
                    x, mask = self.x[rows], self.mask[rows]
                    total += rlhf.average(x, mask, loss_mean, 7, denominator).item()
                self.assertAlmostEqual(total, expected, places=12)

    def test_nothing_is_zero(self):
        nothing = torch.zeros_like(self.mask)
        for loss_mean in ("token", "sequence", "constant"):
            with self.subTest(loss_mean):
                self.assertEqual(rlhf.average(self.x, nothing, loss_mean, 7).item(), 0.0)

    def test_unknown_means(self):
        with self.assertRaisesRegex(ValueError, "loss_mean='word' must be token, sequence, or"):
            rlhf.average(self.x, self.mask, "word")

    def test_constant_needs_the_number_of_tokens(self):
        message = "max_new_tokens=None must be a whole number in"
        with self.assertRaisesRegex(ValueError, message):
            rlhf.average(self.x, self.mask, "constant")


class TestPolicyLoss(unittest.TestCase):
    def setUp(self):
        self.mask, new = example()
        self.log_probs = 0.3 * new()
        self.old_log_probs = 0.3 * new()
        self.advantages = new()

    def loss(self, clip_range=0.2, **options):
        loss, clip_fraction = rlhf.ppo_policy_loss(
            self.log_probs, self.old_log_probs, self.advantages, self.mask, clip_range, **options
        )
        return loss.item(), clip_fraction.item()

    def token_by_token(self, below, above):
        """The terms min(ρA, clip(ρ)A) of all tokens, and for which the clipped one is smaller."""
        ratios = (self.log_probs - self.old_log_probs).exp()[self.mask].tolist()
        advantages = self.advantages[self.mask].tolist()
        terms = []
        clipped = []
        for ratio, A in zip(ratios, advantages, strict=True):
            bounded = min(max(ratio, 1 - below), 1 + above)
            terms.append(min(ratio * A, bounded * A))
            clipped.append((A > 0 and ratio > 1 + above) or (A < 0 and ratio < 1 - below))
        return terms, clipped

    def test_ppo_policy_loss_token_by_token(self):
        loss, clip_fraction = self.loss(0.2)
        terms, clipped = self.token_by_token(0.2, 0.2)
        self.assertAlmostEqual(loss, -sum(terms) / len(terms), places=10)
        self.assertAlmostEqual(clip_fraction, sum(clipped) / len(clipped), places=10)
        self.assertTrue(0 < sum(clipped) < len(clipped))

    def test_the_bounds_may_differ(self):
        loss, clip_fraction = self.loss((0.1, 0.4))
        terms, clipped = self.token_by_token(0.1, 0.4)
        self.assertAlmostEqual(loss, -sum(terms) / len(terms), places=10)
        self.assertAlmostEqual(clip_fraction, sum(clipped) / len(clipped), places=10)
        self.assertNotAlmostEqual(loss, self.loss((0.4, 0.1))[0], places=3)

    def test_the_ratio_of_a_sequence(self):
        # GSPO's equations 5 and 7: one advantage and one ratio s for each completion, where s is
        # (π(y) / π_old(y))^(1/|y|). The mean is over completions.
        self.advantages = self.advantages[:, :1].expand_as(self.advantages)
        ratios = rows_under(self.mask, (self.log_probs - self.old_log_probs).exp())
        terms = []
        clipped_tokens = 0
        for row, A in zip(ratios, self.advantages[:, 0].tolist(), strict=True):
            s = math.prod(row) ** (1 / len(row))
            bounded = min(max(s, 1 - 0.05), 1 + 0.1)
            terms.append(min(s * A, bounded * A))
            if bounded * A < s * A:
                clipped_tokens += len(row)
        loss, clip_fraction = self.loss((0.05, 0.1), ratio="sequence", loss_mean="sequence")
        self.assertAlmostEqual(loss, -sum(terms) / len(terms), places=10)
        tokens = self.mask.sum().item()
        self.assertAlmostEqual(clip_fraction, clipped_tokens / tokens, places=10)
        self.assertTrue(0 < clipped_tokens < tokens)

    def test_what_it_is_averaged_over(self):
        terms, _ = self.token_by_token(0.2, 0.2)
        remaining = iter(terms)
        lengths = self.mask.sum(1).tolist()
        rows = [[next(remaining) for _ in range(length)] for length in lengths]
        expected = {
            "token": sum(terms) / len(terms),
            "sequence": sum(sum(row) / len(row) for row in rows) / len(rows),
            "constant": sum(sum(row) / 7 for row in rows) / len(rows),
        }
        for loss_mean, mean in expected.items():
            with self.subTest(loss_mean):
                loss, _ = self.loss(loss_mean=loss_mean, max_new_tokens=7)
                self.assertAlmostEqual(loss, -mean, places=10)

    def test_unknown_ratios(self):
        with self.assertRaisesRegex(ValueError, "ratio='word' must be token or sequence"):
            self.loss(ratio="word")


class TestClipBounds(unittest.TestCase):
    def test_one_number_is_for_both(self):
        self.assertEqual(rlhf.clip_bounds(0.2), (0.2, 0.2))
        self.assertEqual(rlhf.clip_bounds(0), (0, 0))
        self.assertEqual(rlhf.clip_bounds(np.float32(0.25)), (0.25, 0.25))

    def test_two_numbers_are_below_and_above(self):
        self.assertEqual(rlhf.clip_bounds((0.2, 0.28)), (0.2, 0.28))
        self.assertEqual(rlhf.clip_bounds([0.2, 0.28]), (0.2, 0.28))

    def test_anything_else_is_refused(self):
        wrong = (-0.2, math.nan, math.inf, True, None, "0.2", "ab", (0.2,), (0.1, 0.2, 0.3))
        wrong_pairs = ((0.2, -0.1), (math.nan, 0.2), (0.2, math.inf), (None, 0.2), (True, 0.2))
        for clip_range in (*wrong, *wrong_pairs):
            with self.subTest(clip_range=clip_range):
                message = "must be a number from 0 on, or two"
                self.assertRaisesRegex(ValueError, message, rlhf.clip_bounds, clip_range)


class TestValueLoss(unittest.TestCase):
    def test_value_loss_token_by_token(self):
        mask, new = example()
        values, old_values, returns = new(), new(), new()
        terms = []
        triples = zip(*(x[mask].tolist() for x in (values, old_values, returns)), strict=True)
        for value, old_value, target in triples:
            bounded = min(max(value, old_value - 0.2), old_value + 0.2)
            terms.append(0.5 * max((value - target) ** 2, (bounded - target) ** 2))
        loss = rlhf.value_loss(values, old_values, returns, mask, 0.2).item()
        self.assertAlmostEqual(loss, sum(terms) / len(terms), places=10)

    def test_parts_add_up_to_the_whole(self):
        mask, new = example()
        tensors = (new(), new(), new(), mask)
        tokens = mask.sum().item()
        total = 0.0
        for rows in (slice(0, 3), slice(3, 4)):
            total += rlhf.value_loss(*(x[rows] for x in tensors), denominator=tokens).item()
        self.assertAlmostEqual(total, rlhf.value_loss(*tensors).item(), places=12)


class TestLossesOnComparisons(unittest.TestCase):
    """Losses on the rewards or log-probs of a chosen and a rejected completion."""

    def setUp(self):
        generator = torch.Generator().manual_seed(0)

        def new():
            return 5 * torch.randn(6, dtype=torch.double, generator=generator)

        self.chosen, self.rejected = new(), new()
        self.ref_chosen, self.ref_rejected = new(), new()
        self.all = (self.chosen, self.rejected, self.ref_chosen, self.ref_rejected)

    def rows(self):
        """(chosen, rejected, ref_chosen, ref_rejected) of each comparison, as Python numbers."""
        return list(zip(*(x.tolist() for x in self.all), strict=True))

    def test_reward_loss_is_bradley_terry(self):
        chosen = torch.tensor([2.0, 0.5])
        rejected = torch.tensor([1.0, 1.5])
        first = 1 / (1 + math.exp(-(2.0 - 1.0 - 0.3)))
        second = 1 / (1 + math.exp(-(0.5 - 1.5 - 0.3)))
        expected = -(math.log(first) + math.log(second)) / 2
        loss = rlhf.reward_loss(chosen, rejected, 0.3).item()
        self.assertAlmostEqual(loss, expected, places=6)

    def test_dpo_loss_is_bradley_terry_of_implicit_rewards(self):
        terms = []
        for chosen, rejected, ref_chosen, ref_rejected in self.rows():
            difference = (chosen - ref_chosen) - (rejected - ref_rejected)
            terms.append(math.log(1 + math.exp(-0.3 * difference)))
        loss = rlhf.dpo_loss(*self.all, beta=0.3).item()
        self.assertAlmostEqual(loss, statistics.mean(terms), places=9)

    def test_dpo_loss_of_the_reference_itself_is_log_2(self):
        loss = rlhf.dpo_loss(self.chosen, self.rejected, self.chosen, self.rejected)
        self.assertAlmostEqual(loss.item(), math.log(2), places=9)

    def test_ipo_loss_is_the_papers(self):
        # Azar et al. 2023, equation 17: (h - 1/(2τ))² with
        # h = log (π(chosen) π_ref(rejected)) / (π(rejected) π_ref(chosen))
        terms = []
        for chosen, rejected, ref_chosen, ref_rejected in self.rows():
            h = chosen + ref_rejected - rejected - ref_chosen
            terms.append((h - 1 / (2 * 0.3)) ** 2)
        loss = rlhf.ipo_loss(*self.all, beta=0.3).item()
        self.assertAlmostEqual(loss, statistics.mean(terms), places=9)

    def test_ipo_loss_has_its_minimum_at_a_finite_distance(self):
        zero = torch.zeros(1)
        at_the_target = rlhf.ipo_loss(torch.tensor([5.0]), zero, zero, zero, beta=0.1)
        beyond_it = rlhf.ipo_loss(torch.tensor([6.0]), zero, zero, zero, beta=0.1)
        self.assertEqual(at_the_target.item(), 0.0)
        self.assertEqual(beyond_it.item(), 1.0)

    def test_simpo_loss_is_the_papers(self):
        # Meng et al. 2024, equation 6: rewards are β times the mean log-prob of a token
        chosen_lengths = torch.tensor([1, 2, 3, 4, 5, 6])
        rejected_lengths = torch.tensor([4, 1, 3, 9, 2, 5])
        lengths = zip(chosen_lengths.tolist(), rejected_lengths.tolist(), strict=True)
        terms = []
        for (chosen, rejected, *_), (n, m) in zip(self.rows(), lengths, strict=True):
            margin = 1.5 * chosen / n - 1.5 * rejected / m - 0.7
            terms.append(-math.log(1 / (1 + math.exp(-margin))))
        loss = rlhf.simpo_loss(
            self.chosen, self.rejected, chosen_lengths, rejected_lengths, beta=1.5, gamma=0.7
        )
        self.assertAlmostEqual(loss.item(), statistics.mean(terms), places=9)


class TestGradients(unittest.TestCase):
    def check(self, functions):
        """functions: {function: its inputs}."""
        for function, inputs in functions.items():
            with self.subTest(function.__name__):
                check_gradient(function, *inputs)

    def test_gradients_by_central_differences(self):
        mask, new = example()
        a, b, c, d = 0.3 * new(), 0.3 * new(), 0.3 * new(), 0.3 * new()

        def gae(rewards, values):
            return (rlhf.gae(rewards, values, mask, 0.9, 0.8)[0] * c).sum()

        def policy_loss(log_probs):
            return rlhf.ppo_policy_loss(log_probs, b, c, mask, 0.2)[0]

        def policy_loss_of_sequences(log_probs):
            advantages = c[:, :1].expand_as(c)
            return rlhf.ppo_policy_loss(
                log_probs, b, advantages, mask, (0.1, 0.2), "sequence", "sequence"
            )[0]

        def policy_loss_over_a_constant(log_probs):
            return rlhf.ppo_policy_loss(log_probs, b, c, mask, 0.2, "token", "constant", 7)[0]

        def value_loss(values):
            return rlhf.value_loss(values, b, d, mask, 0.2)

        def whiten(x):
            return (rlhf.masked_whiten(x, mask) * c).sum()

        def k2(log_probs):
            return rlhf.masked_mean(rlhf.kl_estimate(log_probs, b, "k2"), mask)

        def k3(log_probs):
            return rlhf.masked_mean(rlhf.kl_estimate(log_probs, b, "k3"), mask)

        self.check(
            {
                gae: (a, b),
                policy_loss: (a,),
                policy_loss_of_sequences: (a,),
                policy_loss_over_a_constant: (a,),
                value_loss: (a,),
                whiten: (a,),
                k2: (a,),
                k3: (a,),
            }
        )

    def test_gradients_of_losses_on_comparisons_by_central_differences(self):
        _, new = example()
        chosen, rejected = 5 * new(), 5 * new()
        ref_chosen, ref_rejected = 5 * new(), 5 * new()
        lengths = torch.arange(1, 10)

        def reward_loss(chosen, rejected):
            return rlhf.reward_loss(chosen, rejected, 0.5)

        def dpo_loss(chosen, rejected):
            return rlhf.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)

        def ipo_loss(chosen, rejected):
            return rlhf.ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)

        def simpo_loss(chosen, rejected):
            return rlhf.simpo_loss(chosen, rejected, lengths, lengths.flip(0), 1.5, 0.7)

        functions = (reward_loss, dpo_loss, ipo_loss, simpo_loss)
        self.check(dict.fromkeys(functions, (chosen, rejected)))


class TestJunkOffTheMask(unittest.TestCase):
    def check(self, function, clean, dirty):
        """function(*xs) has the same value and the same gradient for clean and for dirty xs."""
        results = []
        for tensors in (clean, dirty):
            leaves = [x.clone().requires_grad_() for x in tensors]
            value = function(*leaves)
            gradient = torch.autograd.grad(
                value, leaves, allow_unused=True, materialize_grads=True
            )
            results.append((value, gradient))
        torch.testing.assert_close(results[1], results[0])

    def test_junk_off_the_mask_reaches_no_value_and_no_gradient(self):
        mask, new = example()
        clean = [0.3 * new(), 0.3 * new(), 0.3 * new()]

        def gae(x, y, z):
            advantages, returns = rlhf.gae(x, y, mask)
            return advantages.sum() + returns.sum()

        def shaped(x, y, z):
            return (rlhf.shaped(x, y, mask, 0.9) * torch.where(mask, z, 0)).sum()

        def whiten(x, y, z):
            return (rlhf.masked_whiten(x, mask) * torch.where(mask, y, 0)).sum()

        def policy_loss(x, y, z):
            return rlhf.ppo_policy_loss(x, y, z, mask)[0]

        def policy_loss_of_sequences(x, y, z):
            return rlhf.ppo_policy_loss(x, y, z, mask, 0.2, "sequence", "sequence")[0]

        def value_loss(x, y, z):
            return rlhf.value_loss(x, y, z, mask)

        def mean(x, y, z):
            return rlhf.masked_mean(x, mask)

        def average_of_sequences(x, y, z):
            return rlhf.average(x, mask, "sequence")

        def average_over_a_constant(x, y, z):
            return rlhf.average(x, mask, "constant", 7)

        functions = (gae, shaped, whiten, policy_loss, policy_loss_of_sequences, value_loss, mean)
        for function in (*functions, average_of_sequences, average_over_a_constant):
            for junk in (math.nan, math.inf, -math.inf, 1e30):
                with self.subTest(function.__name__, junk=junk):
                    dirty = [torch.where(mask, x, junk) for x in clean]
                    self.check(function, clean, dirty)
