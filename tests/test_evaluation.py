"""evaluation.py against brute force: a GPT so small that its completions can be enumerated."""

import itertools
import math
import random
import unittest

import numpy as np
import torch
from torch import nn

from mingpt import evaluation
from mingpt.chars import CharTokenizer
from mingpt.evaluation import (
    WinRate,
    best_of_each,
    best_of_n,
    kl,
    kl_optimal,
    sample,
    score,
    tilted,
    win_rate,
)
from mingpt.rewards import RewardError, TextReward
from mingpt.rlhf import RewardModel
from tests.common import tiny_gpt

AB = CharTokenizer("ab")  # ids 0 and 1; the end of a text is 2
END = AB.eot_token
LETTERS = CharTokenizer("abcdefghij")  # the end of a text is 10


def policy_of(seed, **options):
    """A GPT with AB's vocabulary and a distribution that is far from uniform."""
    return tiny_gpt(seed, vocab_size=3, block_size=8, **options)


def all_completions(max_new_tokens):
    """Every completion of AB's that there is: those that end, and those that are cut off."""
    for length in range(max_new_tokens):
        for letters in itertools.product((0, 1), repeat=length):
            yield [*letters, END]
    for letters in itertools.product((0, 1), repeat=max_new_tokens):
        yield list(letters)


def log_prob(model, prompt, completion, temperature=1.0):
    """log p(completion | prompt), one forward pass a token."""
    total = 0.0
    for t, token in enumerate(completion):
        logits = model(torch.tensor([prompt + completion[:t]]))[0][0, -1]
        total += (logits / temperature).log_softmax(0)[token].item()
    return total


def completion_ids(samples, row):
    return samples.idx[row][samples.completion_mask[row]].tolist()


class TestSample(unittest.TestCase):
    def test_completions_are_as_frequent_as_they_are_likely(self):
        policy = policy_of(1)
        samples = sample(policy, [[END]], 4000, tokenizer=AB, max_new_tokens=2, seed=3)
        counts = {}
        for row in range(4000):
            ids = tuple(completion_ids(samples, row))
            counts[ids] = counts.get(ids, 0) + 1
        total = 0.0
        for completion in all_completions(2):
            p = math.exp(log_prob(policy, [END], completion))
            total += p
            standard_error = math.sqrt(p * (1 - p) / 4000)
            frequency = counts.get(tuple(completion), 0) / 4000
            self.assertAlmostEqual(frequency, p, delta=4 * standard_error + 1e-9)
        self.assertAlmostEqual(total, 1.0, places=5)

    def test_log_probs_are_the_models_own_at_the_temperature(self):
        policy, prompts = policy_of(1), ["a", "bab", "ba"]
        samples = sample(policy, prompts, 5, tokenizer=AB, max_new_tokens=4, temperature=0.7)
        for row in range(15):
            prompt = AB.encode(samples.prompts[row])
            expected = log_prob(policy, prompt, completion_ids(samples, row), temperature=0.7)
            self.assertAlmostEqual(samples.log_probs[row].sum().item(), expected, places=4)
        off_the_completion = samples.log_probs[~samples.completion_mask[:, 1:]]
        self.assertTrue((off_the_completion == 0).all())

    def test_rows_of_a_prompt_are_adjacent(self):
        samples = sample(policy_of(1), ["a", "bab"], 3, tokenizer=AB, max_new_tokens=4)
        self.assertEqual(samples.prompts, ["a", "a", "a", "bab", "bab", "bab"])
        for row, prompt in enumerate(samples.prompts):
            before = samples.attention_mask[row] & ~samples.completion_mask[row]
            self.assertEqual(samples.idx[row][before].tolist(), AB.encode(prompt))

    def test_all_completions_begin_in_the_same_column(self):
        prompts = ["a", "bab"]
        samples = sample(policy_of(1), prompts, 3, tokenizer=AB, max_new_tokens=4, batch_size=2)
        self.assertEqual(samples.idx.shape, (6, 3 + 4))
        self.assertTrue(samples.completion_mask[:, 3].all())
        self.assertFalse(samples.completion_mask[:, :3].any())

    def test_a_row_does_not_depend_on_the_padding_of_its_batch(self):
        policy = policy_of(1)
        options = {"tokenizer": AB, "max_new_tokens": 4, "seed": 5, "batch_size": 4}
        narrow = sample(policy, ["a"] * 4, **options)
        wide = sample(policy, ["a"] * 4 + ["bab"], **options)
        self.assertEqual(wide.texts[:4], narrow.texts)
        self.assertTrue(torch.equal(wide.idx[:4, 2:], narrow.idx))
        self.assertFalse(wide.attention_mask[:4, :2].any())

    def test_texts_ends_and_lengths(self):
        samples = sample(policy_of(1), [[END]], 50, tokenizer=AB, max_new_tokens=3)
        self.assertTrue(0 < samples.ended.sum() < 50)  # both kinds are here
        for row in range(50):
            ids = completion_ids(samples, row)
            letters = [token for token in ids if token != END]
            self.assertEqual(samples.texts[row], AB.decode(letters))
            self.assertEqual(samples.ended[row].item(), ids[-1] == END)
            self.assertEqual(samples.lengths[row].item(), len(ids))

    def test_prompts_of_ids_are_decoded_without_the_end_token(self):
        samples = sample(policy_of(1), [[END, 0, 1]], 2, tokenizer=AB, max_new_tokens=2)
        self.assertEqual(samples.prompts, ["ab", "ab"])

    def test_the_same_seed_gives_the_same_samples(self):
        def texts(seed):
            return sample(policy_of(1), ["a"], 20, tokenizer=AB, max_new_tokens=5, seed=seed).texts

        self.assertEqual(texts(3), texts(3))
        self.assertNotEqual(texts(3), texts(4))

    def test_sampling_leaves_the_global_generator_alone(self):
        policy = policy_of(1)
        state = torch.get_rng_state()
        sample(policy, ["a"], tokenizer=AB, max_new_tokens=3)
        self.assertTrue(torch.equal(torch.get_rng_state(), state))

    def test_dropout_is_off_and_the_mode_restored(self):
        policy = policy_of(1, resid_pdrop=0.5)
        expected = sample(policy, ["a"], 20, tokenizer=AB, max_new_tokens=5)
        policy.train()
        samples = sample(policy, ["a"], 20, tokenizer=AB, max_new_tokens=5)
        self.assertEqual(samples.texts, expected.texts)
        self.assertTrue(policy.training)

    def test_another_stop_token(self):
        samples = sample(policy_of(1), ["b"], 30, tokenizer=AB, max_new_tokens=5, stop_token=0)
        self.assertTrue(samples.ended.any())
        for row in range(30):
            ids = completion_ids(samples, row)
            self.assertNotIn(0, ids[:-1])
            self.assertEqual(samples.ended[row].item(), ids[-1] == 0)
            self.assertNotIn("a", samples.texts[row])

    def test_several_stop_tokens(self):
        options = {"tokenizer": AB, "max_new_tokens": 5, "stop_token": [0, END]}
        samples = sample(policy_of(1), ["b"], 30, **options)
        ends = [completion_ids(samples, row)[-1] for row in range(30)]
        self.assertLessEqual({0, END}, set(ends))
        for row in range(30):
            self.assertEqual(set(completion_ids(samples, row)[:-1]) & {0, END}, set())
            self.assertEqual(samples.ended[row].item(), ends[row] in (0, END))

    def test_a_tokenizer_whose_end_is_eos_token_id(self):
        class Tokenizer:
            eos_token_id = END
            encode, decode = staticmethod(AB.encode), staticmethod(AB.decode)

        expected = sample(policy_of(1), ["a"], 20, tokenizer=AB, max_new_tokens=5)
        samples = sample(policy_of(1), ["a"], 20, tokenizer=Tokenizer(), max_new_tokens=5)
        self.assertEqual(samples.texts, expected.texts)

    def test_select(self):
        samples = sample(
            policy_of(1), ["a", "b"], 3, tokenizer=AB, max_new_tokens=3, reward_fn=length_of
        )
        chosen = samples.select([4, 0])
        self.assertEqual(chosen.texts, [samples.texts[4], samples.texts[0]])
        self.assertEqual(chosen.prompts, ["b", "a"])
        for name in ("idx", "attention_mask", "completion_mask", "log_probs", "ended", "rewards"):
            expected = getattr(samples, name)[[4, 0]]
            self.assertTrue(torch.equal(getattr(chosen, name), expected), name)

    def test_refusals(self):
        policy = policy_of(1)
        for options, words in (
            ({"prompts": []}, "prompts is empty"),
            ({"prompts": [[]]}, "each must be a row of one token or more"),
            ({"n": 0}, "n=0 must be a whole number"),
            ({"batch_size": 0}, "batch_size=0 must be a whole number"),
            ({"stop_strings": "ab"}, "must be a list of strings"),
            ({"stop_strings": ["a", ""]}, "give strings that are not empty"),
            ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number"),
        ):
            with self.subTest(options):
                options = {"prompts": ["a"], "tokenizer": AB, "max_new_tokens": 3, **options}
                self.assertRaisesRegex(ValueError, words, sample, policy, **options)


class TestStopStrings(unittest.TestCase):
    def test_texts_are_those_of_a_loop_over_prefixes(self):
        policy = tiny_gpt(3)
        options = {"tokenizer": LETTERS, "max_new_tokens": 10, "seed": 2}
        plain = sample(policy, [[10]], 100, **options)
        stop_strings = ["ab", "g", "cd"]
        cut = sample(policy, [[10]], 100, stop_strings=stop_strings, **options)
        changed = 0
        for row in range(100):
            ids = completion_ids(plain, row)
            text, end, ended = plain.texts[row], len(ids), plain.ended[row].item()
            for length in range(len(ids), 0, -1):  # the shortest one that holds a stop string wins
                prefix = LETTERS.decode([token for token in ids[:length] if token != 10])
                places = [prefix.index(string) for string in stop_strings if string in prefix]
                if places:
                    text, end, ended = prefix[: min(places)], length, True
            changed += end < len(ids)
            self.assertEqual(cut.texts[row], text)
            self.assertEqual(completion_ids(cut, row), ids[:end])
            self.assertEqual(cut.ended[row].item(), ended)
        self.assertGreater(changed, 20)

    def test_nothing_is_behind_the_cut(self):
        samples = sample(
            tiny_gpt(3), [[10]], 100, tokenizer=LETTERS, max_new_tokens=10, stop_strings=["g"]
        )
        self.assertTrue((samples.log_probs[~samples.completion_mask[:, 1:]] == 0).all())
        self.assertTrue(torch.equal(samples.attention_mask[:, 1:], samples.completion_mask[:, 1:]))

    def test_a_string_that_the_last_token_completes_counts_as_an_end(self):
        samples = sample(
            tiny_gpt(3), [[10]], 100, tokenizer=LETTERS, max_new_tokens=1, stop_strings=["g"]
        )
        completions = [completion_ids(samples, row) for row in range(100)]
        self.assertIn([6], completions)  # the letter g
        for row, ids in enumerate(completions):
            self.assertEqual(samples.ended[row].item(), ids in ([6], [10]))


def length_of(idx, attention_mask, completion_mask):
    """A reward function: the number of tokens written."""
    return completion_mask.sum(1).float()


class TestScore(unittest.TestCase):
    def setUp(self):
        self.samples = sample(policy_of(1), ["a", "bab"], 10, tokenizer=AB, max_new_tokens=4)

    def test_a_reward_function(self):
        scores = score(self.samples, length_of, batch_size=3)
        self.assertEqual(scores.tolist(), self.samples.lengths.tolist())

    def test_a_text_reward(self):
        reward = TextReward(lambda completions, prompts: [len(text) for text in completions], AB)
        scores = score(self.samples, reward)
        self.assertEqual(scores.tolist(), [len(text) for text in self.samples.texts])

    def test_a_reward_model_reads_each_row_bare_and_without_dropout(self):
        model = RewardModel.from_gpt(policy_of(2, resid_pdrop=0.5)).train()
        scores = score(self.samples, model, batch_size=3)
        self.assertTrue(model.training)
        model.eval()
        for row in range(20):
            bare = self.samples.idx[row][self.samples.attention_mask[row]][None]
            self.assertAlmostEqual(scores[row].item(), model(bare).item(), places=4)

    def test_sample_scores_what_it_samples(self):
        options = {"tokenizer": AB, "max_new_tokens": 4, "reward_fn": length_of}
        samples = sample(policy_of(1), ["a"], 9, **options)
        self.assertEqual(samples.rewards.tolist(), samples.lengths.tolist())

    def test_a_reward_that_is_no_number_is_refused(self):
        def bad(idx, attention_mask, completion_mask):
            return torch.full((len(idx),), math.nan)

        self.assertRaisesRegex(RewardError, "reward_fn gave nan", score, self.samples, bad)

    def test_best_of_each(self):
        rewards = torch.tensor([1.0, 3.0, 2.0, 5.0] * 5)
        self.samples.rewards = rewards
        best = best_of_each(self.samples, 4)
        self.assertEqual(best.rewards.tolist(), [5.0] * 5)
        self.assertEqual(best.texts, self.samples.texts[3::4])
        self.assertRaisesRegex(ValueError, "n must divide them", best_of_each, self.samples, 3)
        self.samples.rewards = None
        self.assertRaisesRegex(ValueError, "pass a reward_fn", best_of_each, self.samples, 4)


class TestKL(unittest.TestCase):
    def test_of_each_completion_by_hand(self):
        policy, reference, prompts = policy_of(1), policy_of(2), ["a", "bab"]
        samples = sample(policy, prompts, 8, tokenizer=AB, max_new_tokens=4, temperature=0.8)
        log_ratios = []
        for row in range(16):
            prompt, ids = AB.encode(samples.prompts[row]), completion_ids(samples, row)
            log_p, log_q = (log_prob(m, prompt, ids, 0.8) for m in (policy, reference))
            log_ratios.append(log_p - log_q)
        found = kl(samples, reference, temperature=0.8, batch_size=5)
        self.assertAlmostEqual(found, np.mean(log_ratios), places=4)

    def test_meets_the_exact_kl(self):
        policy, reference = policy_of(1), policy_of(2)
        samples = sample(policy, [[END]], 4000, tokenizer=AB, max_new_tokens=3, seed=1)
        exact, second_moment = 0.0, 0.0
        for completion in all_completions(3):
            log_p = log_prob(policy, [END], completion)
            log_ratio = log_p - log_prob(reference, [END], completion)
            exact += math.exp(log_p) * log_ratio
            second_moment += math.exp(log_p) * log_ratio**2
        standard_error = math.sqrt((second_moment - exact**2) / 4000)
        self.assertGreater(exact, 10 * standard_error)
        self.assertAlmostEqual(kl(samples, reference), exact, delta=4 * standard_error)

    def test_to_itself_it_is_zero(self):
        policy = policy_of(1)
        samples = sample(policy, ["a", "bab"], 8, tokenizer=AB, max_new_tokens=4)
        self.assertAlmostEqual(kl(samples, policy), 0.0, places=5)


class TestYardsticks(unittest.TestCase):
    def test_tilted_in_closed_form(self):
        # Rewards 0 and 1, half each: tilting gives p = e^(1/β) / (1 + e^(1/β)), KL = log 2 - H(p),
        # and N/2 samples of weight p/(N/2) beside N/2 of weight (1-p)/(N/2).
        betas = [0.2, 0.5, 1.0, 3.0]
        found = tilted([0.0, 1.0] * 50, betas)
        for i, beta in enumerate(betas):
            p = 1 / (1 + math.exp(-1 / beta))
            divergence = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
            self.assertAlmostEqual(found.rewards[i], p, places=12)
            self.assertAlmostEqual(found.kls[i], divergence, places=12)
            size = 50 / (p**2 + (1 - p) ** 2)
            self.assertAlmostEqual(found.effective_sample_sizes[i], size, places=9)

    def test_tilted_of_all_completions_of_a_model(self):
        # The reference's exact probabilities in 1/1000, as so many samples each.
        reference, rewards, weights = policy_of(2), [], []
        for completion in all_completions(3):
            rewards.append(float(completion.count(0)))
            weights.append(round(1000 * math.exp(log_prob(reference, [END], completion))))
        q = np.array(weights) / sum(weights)
        tilt = q * np.exp(np.array(rewards) / 0.5)
        p = tilt / tilt.sum()
        seen = p > 0
        found = tilted(np.repeat(rewards, weights), 0.5)
        self.assertAlmostEqual(found.rewards[0], p @ rewards, places=12)
        self.assertAlmostEqual(found.kls[0], p[seen] @ np.log(p[seen] / q[seen]), places=12)

    def test_the_effective_sample_size_falls_from_all_to_one(self):
        scores = np.random.default_rng(0).normal(size=1000)
        sizes = tilted(scores, [1e6, 1.0, 0.5, 0.2, 1e-4]).effective_sample_sizes
        self.assertAlmostEqual(sizes[0], 1000, places=3)
        self.assertTrue((np.diff(sizes) < 0).all())
        self.assertAlmostEqual(sizes[-1], 1, places=6)

    def test_kl_optimal_inverts_the_tilt(self):
        scores = [0.0, 1.0] * 50
        for beta in (0.2, 0.5, 1.0, 3.0):
            point = tilted(scores, beta)
            self.assertAlmostEqual(kl_optimal(scores, point.rewards[0]), point.kls[0], places=6)
        self.assertEqual(kl_optimal(scores, 0.4), 0.0)
        self.assertIsNone(kl_optimal(scores, 1.0))

    def test_no_other_policy_of_that_reward_is_nearer(self):
        generator = np.random.default_rng(1)
        scores = generator.normal(size=6)
        best = tilted(scores, 0.7)
        for _ in range(200):
            p = generator.dirichlet(np.ones(6))
            if p @ scores >= best.rewards[0]:
                self.assertGreater(p @ np.log(6 * p), best.kls[0])

    def test_best_of_n_is_the_expected_maximum(self):
        scores = np.array([0.3, -0.5, 0.9, 0.1])
        for n in (1, 2, 3):
            expected = np.mean([max(draw) for draw in itertools.product(scores, repeat=n)])
            reward, bound = best_of_n(scores, n)
            self.assertAlmostEqual(reward, expected, places=12)
            self.assertEqual(bound, math.log(n) - (n - 1) / n)

    def test_best_of_n_stays_within_its_bound_of_the_kl(self):
        # Of four equally likely texts the best of n is the k-th with p = (k^n - (k-1)^n) / 4^n.
        for n in (1, 2, 4, 8):
            p = np.diff((np.arange(5) / 4) ** n)
            self.assertLessEqual(p @ np.log(4 * p), best_of_n([1.0, 2.0, 3.0, 4.0], n)[1] + 1e-12)

    def test_refusals(self):
        for scores in ([], [1.0, math.nan], [math.inf], [[1.0]]):
            self.assertRaisesRegex(ValueError, "must be finite numbers", tilted, scores, 1.0)
            self.assertRaisesRegex(ValueError, "must be finite numbers", best_of_n, scores, 2)
        message = "must be one or more finite numbers above 0"
        self.assertRaisesRegex(ValueError, message, tilted, [1.0], [1.0, 0.0])
        self.assertRaisesRegex(ValueError, "n=0 must be", best_of_n, [1.0], 0)


class TestWinRate(unittest.TestCase):
    def test_ties_count_half(self):
        found = win_rate([1.0, 2.0, 3.0, 3.0], [0.0, 3.0, 3.0, 1.0])
        self.assertEqual((found.rate, found.n), (2.5 / 4, 4))

    def test_the_interval_solves_wilsons_equation(self):
        # Its ends are the rates p at which the observed one lies z standard errors away.
        for wins, n in ((0, 10), (3, 10), (50, 80), (10, 10)):
            found = win_rate([1.0] * wins + [0.0] * (n - wins), [0.5] * n)
            for p in (found.low, found.high):
                error = 1.959963984540054 * math.sqrt(p * (1 - p) / n)
                self.assertAlmostEqual(abs(found.rate - p), error, places=7)
            self.assertTrue(0 <= found.low <= found.rate <= found.high <= 1)

    def test_a_published_interval(self):
        # Newcombe 1998, table I: 81 of 263, method 3 (score, no continuity correction)
        found = win_rate([1.0] * 81 + [0.0] * 182, [0.5] * 263)
        self.assertAlmostEqual(found.low, 0.2553, places=4)
        self.assertAlmostEqual(found.high, 0.3662, places=4)

    def test_the_interval_covers_the_truth_as_often_as_it_says(self):
        generator = random.Random(0)
        for truth in (0.05, 0.3, 0.5):
            covered = 0
            for _ in range(2000):
                wins = [float(generator.random() < truth) for _ in range(60)]
                found = win_rate(wins, [0.5] * 60, confidence=0.9)
                covered += found.low <= truth <= found.high
            self.assertAlmostEqual(covered / 2000, 0.9, delta=0.05)

    def test_more_confidence_is_a_wider_interval(self):
        narrow, wide = (win_rate([1, 0, 1], [0, 1, 0], level) for level in (0.8, 0.99))
        self.assertTrue(wide.low < narrow.low < narrow.high < wide.high)

    def test_tensors_are_taken(self):
        found = win_rate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        self.assertIsInstance(found, WinRate)
        self.assertEqual(found.rate, 0.5)

    def test_refusals(self):
        self.assertRaisesRegex(ValueError, "a has 2 scores and b 1", win_rate, [1, 2], [1])
        self.assertRaisesRegex(ValueError, "must be finite", win_rate, [math.nan], [1])
        self.assertRaisesRegex(ValueError, "confidence=1", win_rate, [1], [2], confidence=1)


class TestMode(unittest.TestCase):
    def test_is_restored_after_an_error(self):
        model = nn.Dropout()
        with self.assertRaises(ZeroDivisionError), evaluation.evaluation_mode(model):
            self.assertFalse(model.training)
            _ = 1 / 0
        self.assertTrue(model.training)


if __name__ == "__main__":
    unittest.main()
