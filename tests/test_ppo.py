"""PPOTrainer: what a rollout holds, what an update does, what a run learns, keeps and refuses."""

import math
import statistics
from collections import Counter
from unittest import mock

import torch
from torch import nn

from mingpt import heads, prefix
from mingpt.chars import CharTokenizer
from mingpt.rlhf import PPOTrainer, RewardError, RewardModel, TextReward, ValueModel
from mingpt.run_folder import read_metrics
from mingpt.utils import set_seed
from tests.common import TempDirTestCase, timeless, tiny_gpt

TOKENIZER = CharTokenizer("abcdefghij")  # its end of text is id 10


def count_threes(idx, attention_mask, completion_mask):
    """A reward function: the share of 8 tokens that are 3s."""
    return ((idx == 3) & completion_mask).sum(1).float() / 8


def ppo_trainer(
    policy,
    prompts=([1],),
    reward=count_threes,
    value_model=None,
    ref_policy=None,
    tokenizer=None,
    **options,
):
    """A trainer for a few short completions, which rewards 3s unless told otherwise."""
    config = PPOTrainer.get_default_config()
    config.merge_from_dict(
        {
            "device": "cpu",
            "batch_size": 16,
            "max_new_tokens": 8,
            "stop_token": 0,
            "max_iters": 3,
            "learning_rate": 3e-3,
            **options,
        }
    )
    return PPOTrainer(config, policy, reward, prompts, value_model, ref_policy, tokenizer)


def rollout(policy, prompts=([1], [4, 2, 5]), **options):
    """A trainer and its first rollout, always of the same seed."""
    set_seed(0)
    trainer = ppo_trainer(policy, prompts, **options)
    return trainer, trainer.rollout(*next(trainer.batches()))


def train(policy, prompts=([1],), **options):
    """The rows of metrics of a run that rewards 3s."""
    trainer = ppo_trainer(policy, prompts, **options)
    rows = []
    trainer.add_callback("on_log", lambda trainer: rows.append(trainer.metrics))
    trainer.run()
    return rows


class TestMasks(TempDirTestCase):
    def check(self, r, prompts, stop_tokens):
        """A rollout's masks are those of the prompts, and of tokens up to the first stop token."""
        width = max(len(prompt) for prompt in prompts)
        for b, row in enumerate(r.idx.tolist()):
            prompt = prompts[r.prompt_index[b]]
            padding = width - len(prompt)
            self.assertEqual(row[:width], [0] * padding + prompt)
            written = row[width:]
            stops = [i for i, token in enumerate(written) if token in stop_tokens]
            length = stops[0] + 1 if stops else len(written)
            real = [padding <= i < width + length for i in range(len(row))]
            actions = [width - 1 <= t < width - 1 + length for t in range(len(row) - 1)]
            self.assertEqual(r.attention_mask[b].tolist(), real)
            self.assertEqual(r.mask[b].tolist(), actions)
            self.assertEqual(r.ended[b].item(), bool(stops))
        self.assertEqual(Counter(r.prompt_index.tolist()), {0: 8, 1: 8})
        self.assertTrue((~r.mask[:, width - 1 :]).any())  # some did stop early

    def test_masks_of_a_rollout(self):
        prompts = [[1], [4, 0, 5]]  # the 0, a stop token, means nothing in a prompt
        _, r = rollout(tiny_gpt(), prompts)
        self.check(r, prompts, {0})

    def test_numbers_are_zero_off_the_mask(self):
        _, r = rollout(tiny_gpt())
        for name in ("kl", "old_values", "returns", "advantages"):
            with self.subTest(name):
                self.assertTrue((getattr(r, name)[~r.mask] == 0).all())

    def test_several_stop_tokens(self):
        prompts = [[1], [4, 0, 5]]
        _, r = rollout(tiny_gpt(), prompts, stop_token=[0, 7])
        self.check(r, prompts, {0, 7})
        last = [row[keep][-1].item() for row, keep in zip(r.idx, r.attention_mask, strict=True)]
        self.assertTrue({0, 7} <= set(last))

    def test_one_of_several_stop_tokens_is_no_missing_end(self):
        def nothing(idx, attention_mask, completion_mask):
            return torch.zeros(len(idx))

        options = {"reward": nothing, "stop_token": [0, 7], "missing_eos_penalty": 2.0}
        _, r = rollout(tiny_gpt(), **options)
        self.assertTrue(r.ended.any() and not r.ended.all())
        torch.testing.assert_close(r.scores, torch.where(r.ended, 0.0, -2.0))

    def test_what_follows_the_stop_token_changes_no_loss(self):
        for algorithm in ("ppo", "grpo", "gspo"):
            with self.subTest(algorithm):
                trainer, r = rollout(tiny_gpt(), algorithm=algorithm)
                behind = ~r.attention_mask
                behind[:, :3] = False  # what follows, not the padding in front of the prompt
                self.assertTrue(behind.any())
                changed = self.with_junk(r, behind)
                torch.testing.assert_close(
                    self.gradients(trainer, changed),
                    self.gradients(trainer, r),
                    atol=1e-6,
                    rtol=1e-4,
                )

    def with_junk(self, r, behind):
        """The rollout with other tokens where `behind` is True, and NaN off the mask."""
        changed = r.select(slice(None))
        changed.idx = torch.where(behind, 9, r.idx)
        for name in ("old_log_probs", "ref_log_probs", "old_values", "returns", "advantages"):
            setattr(changed, name, torch.where(r.mask, getattr(r, name), math.nan))
        return changed

    def gradients(self, trainer, r):
        """The loss of a whole rollout, and its gradient by every parameter."""
        [(_, batch)] = trainer.micro_batches(r)
        loss, _ = trainer.compute_loss(trainer.model, batch)
        return [loss.detach(), *torch.autograd.grad(loss, list(trainer.model.parameters()))]


class TestRewards(TempDirTestCase):
    """From the score of a text to the rewards, returns and advantages of its tokens."""

    def test_score_stands_on_the_last_token(self):
        def numbers(idx, attention_mask, completion_mask):
            return torch.arange(16.0)

        # without KL, every step returns the score
        _, r = rollout(tiny_gpt(), reward=numbers, kl_coef=0.0, gae_lambda=1.0)
        for b in range(16):
            returns = r.returns[b][r.mask[b]]
            torch.testing.assert_close(returns, torch.full_like(returns, b), atol=1e-8, rtol=1e-5)

    def test_kl_shaped_reward(self):
        policy = tiny_gpt(1)
        reference = tiny_gpt(2)
        options = {"ref_policy": reference, "kl_coef": 0.3, "gae_lambda": 1.0}
        _, r = rollout(policy, [[1]], **options)
        log_ratio = policy.log_probs(r.idx) - reference.log_probs(r.idx)
        for b in range(16):
            steps = r.mask[b].nonzero()[:, 0].tolist()
            for t in steps:
                penalty = 0.3 * sum(log_ratio[b, s].item() for s in steps if s >= t)
                expected = r.scores[b].item() - penalty
                self.assertAlmostEqual(r.returns[b, t].item(), expected, places=4)
        self.assertGreater(r.kl.sum(1).mean().item(), 0.1)

    def test_missing_end_of_text(self):
        prompts = [[1], [4, 0, 5]]
        _, free = rollout(tiny_gpt(), prompts, missing_eos_penalty=0.0)
        _, paid = rollout(tiny_gpt(), prompts, missing_eos_penalty=0.7)
        ends = [0 in row[3:] for row in paid.idx.tolist()]
        self.assertEqual(paid.ended.tolist(), ends)
        self.assertTrue(0 < sum(ends) < 16)
        expected = torch.tensor([0.0 if end else 0.7 for end in ends])
        torch.testing.assert_close(free.scores - paid.scores, expected)

    def check_returns(self, r, rewards):
        """A rollout's returns are sums of rewards, a list for each episode. Gives the returns."""
        returns = [sum(row[t:]) for row in rewards for t in range(len(row))]  # γ = λ = 1
        found = r.returns[r.mask]
        torch.testing.assert_close(found, torch.tensor(returns), atol=1e-4, rtol=1e-4)
        return returns

    def check_advantages(self, r, advantages):
        found = r.advantages[r.mask]
        torch.testing.assert_close(found, torch.tensor(advantages), atol=1e-3, rtol=1e-3)

    def scores_on_the_last_tokens(self, r):
        """The rewards of each episode's tokens, where there is no KL penalty."""
        lengths = r.mask.sum(1).tolist()
        pairs = zip(lengths, r.scores.tolist(), strict=True)
        return [[0.0] * (length - 1) + [score] for length, score in pairs]

    def whitened(self, numbers):
        mean = statistics.mean(numbers)
        deviation = statistics.pstdev(numbers)
        return [(x - mean) / deviation for x in numbers]

    def test_whitened_rewards_and_the_baseline(self):
        """Rewards are whitened around their mean; the mean of the advantages becomes 0."""
        _, r = rollout(tiny_gpt(), kl_coef=0.0, whiten_rewards=True, gae_lambda=1.0)
        rewards = self.scores_on_the_last_tokens(r)
        flat = [x for row in rewards for x in row]
        mean = statistics.mean(flat)
        deviation = statistics.pstdev(flat)
        rewards = [[mean + (x - mean) / deviation for x in row] for row in rewards]
        returns = self.check_returns(r, rewards)
        self.check_advantages(r, self.whitened(returns))

    def test_shaping_rewards_each_token_for_what_it_adds(self):
        """Where the score counts the 3s, each 3 earns its share when it is written."""
        for prompts, gamma in (([[1], [4, 3, 5]], 1.0), ([[3, 3]], 0.9)):
            options = {"kl_coef": 0.0, "gae_lambda": 1.0, "gamma": gamma, "group_size": 2}
            _, r = rollout(tiny_gpt(), prompts, shaping=True, **options)
            for b in range(16):
                written = r.idx[b, 1:][r.mask[b]].tolist()
                counts = [0, *(written[: t + 1].count(3) / 8 for t in range(len(written)))]
                potentials = [*counts[:-1], 0.0]  # after the end there is nothing
                rewards = [gamma * potentials[t + 1] - potentials[t] for t in range(len(written))]
                rewards[-1] += counts[-1]  # the score
                if gamma == 1.0:
                    shares = [(token == 3) / 8 for token in written]
                    torch.testing.assert_close(rewards, shares)
                returns = [
                    sum(gamma**i * reward for i, reward in enumerate(rewards[t:]))
                    for t in range(len(written))
                ]
                torch.testing.assert_close(r.returns[b][r.mask[b]], torch.tensor(returns))

    def test_shaped_rewards_are_whitened_as_they_are_given(self):
        options = {"kl_coef": 0.0, "gae_lambda": 1.0, "shaping": True, "whiten_rewards": True}
        _, r = rollout(tiny_gpt(), **options)
        shares = [
            [(token == 3) / 8 for token in r.idx[b, 1:][r.mask[b]].tolist()] for b in range(16)
        ]
        flat = [x for row in shares for x in row]
        mean = statistics.mean(flat)
        deviation = statistics.pstdev(flat)
        self.check_returns(r, [[mean + (x - mean) / deviation for x in row] for row in shares])

    def test_shaping_by_a_reward_model_is_one_pass_instead_of_many(self):
        reward_model = RewardModel.from_gpt(tiny_gpt(2, block_size=16))
        nn.init.normal_(reward_model.head.weight)
        options = {"prompts": [[1, 3], [4, 2, 5]], "shaping": True, "group_size": 2}
        _, one = rollout(tiny_gpt(), reward=reward_model, **options)
        _, many = rollout(tiny_gpt(), reward=lambda *batch: reward_model(*batch), **options)
        self.assertGreater(one.returns.std().item(), 0.1)
        torch.testing.assert_close(one.returns, many.returns, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.advantages, many.advantages, atol=1e-4, rtol=1e-4)

    def test_reinforce_whitens_its_returns(self):
        _, r = rollout(tiny_gpt(), kl_coef=0.0, algorithm="reinforce")
        returns = self.check_returns(r, self.scores_on_the_last_tokens(r))
        self.check_advantages(r, self.whitened(returns))

    def test_reinforce_without_whitening_takes_returns_as_they_are(self):
        options = {"algorithm": "reinforce", "whiten_advantages": False}
        _, r = rollout(tiny_gpt(), kl_coef=0.0, **options)
        returns = self.check_returns(r, self.scores_on_the_last_tokens(r))
        self.check_advantages(r, returns)

    def test_a_reward_model_is_a_reward_function_without_dropout(self):
        reward_model = RewardModel.from_gpt(tiny_gpt(resid_pdrop=0.5, block_size=16)).train()
        _, r = rollout(tiny_gpt(), [[1], [4, 2]], reward=reward_model)
        expected = [
            reward_model(row[keep][None]).item()
            for row, keep in zip(r.idx, r.attention_mask, strict=True)
        ]
        torch.testing.assert_close(r.scores, torch.tensor(expected), atol=1e-5, rtol=0)

    def test_adaptive_kl_coef(self):
        options = {"kl_coef": 0.1, "kl_target": 5.0, "kl_horizon": 160}
        trainer = ppo_trainer(tiny_gpt(), max_iters=1, **options)
        trainer.run()
        # A KL of 0 is far below the target: the error is clipped at -0.2, over 16 of 160 episodes.
        self.assertAlmostEqual(trainer.kl_coef, 0.1 * (1 - 0.2 * 16 / 160), places=6)


class TestTextRewards(TempDirTestCase):
    def trainer(self, functions, prompts, **options):
        reward = TextReward(functions, TOKENIZER)
        options = {"tokenizer": TOKENIZER, "stop_token": None, **options}
        return ppo_trainer(tiny_gpt(), prompts, reward, **options)

    def test_it_sees_prompts_and_completions(self):
        seen = []

        def length(completions, prompts):
            seen.extend(zip(prompts, completions, strict=True))
            return [len(completion) / 8 for completion in completions]

        trainer = self.trainer(length, ["ab", "cde"])
        trainer.run()
        self.assertEqual(trainer.stop_token, 10)
        self.assertEqual({prompt for prompt, _ in seen}, {"ab", "cde"})
        for _, completion in seen:
            self.assertLessEqual(set(completion), set("abcdefghij"))

    def test_columns_of_the_prompts_arrive_row_by_row(self):
        answers = {"ab": "x", "cde": "y", "f": "z", "ghi": "w"}
        seen = []

        def check(completions, prompts, answer):
            seen.append(list(zip(prompts, answer, strict=True)))
            return [0.0] * len(completions)

        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()]
        self.trainer(check, rows, group_size=2, batch_size=8).run()
        self.assertEqual(len(seen), 3)  # iterations
        orders = set()
        for pairs in seen:
            self.assertEqual(pairs[0::2], pairs[1::2])  # the two of a group
            for prompt, answer in pairs:
                self.assertEqual(answer, answers[prompt])
            orders.add(tuple(pairs))
        self.assertGreater(len(orders), 1)  # shuffled

    def test_several_functions_are_logged_by_name(self):
        def length(completions):
            return [float(len(completion)) for completion in completions]

        def short(completions):
            return [-0.25 * len(completion) for completion in completions]

        trainer = self.trainer([length, short], ["ab"], max_iters=1)
        trainer.run()
        lengths = [len(row["completion"]) for row in trainer.samples()]
        mean = statistics.mean(lengths)
        self.assertAlmostEqual(trainer.metrics["reward/length"], mean, places=5)
        self.assertAlmostEqual(trainer.metrics["reward/short"], -0.25 * mean, places=5)
        self.assertAlmostEqual(trainer.metrics["objective/scores"], 0.75 * mean, places=5)

    def test_it_knows_how_far_the_training_is(self):
        steps = []

        def state(completions, trainer_state):
            steps.append((trainer_state.global_step, trainer_state.max_steps))
            return [0.0] * len(completions)

        self.trainer(state, ["ab"]).run()
        self.assertEqual(steps, [(0, 3), (1, 3), (2, 3)])


class TestFailingReward(TempDirTestCase):
    """A reward function that fails in the middle of a run."""

    def setUp(self):
        super().setUp()
        self.is_failing = False

    def reward(self, completions, prompts):
        if self.is_failing and any(len(completion) > 3 for completion in completions):
            raise KeyError("no network")
        return [len(completion) / 8 for completion in completions]

    def train(self, name, fail_after=None):
        def fail_from_now_on(trainer):
            if trainer.iter_num == fail_after:
                self.is_failing = True

        trainer = ppo_trainer(
            tiny_gpt(),
            ["ab", "cde"],
            TextReward(self.reward, TOKENIZER),
            tokenizer=TOKENIZER,
            stop_token=None,
            max_iters=4,
            work_dir=str(self.folder / name),
        )
        trainer.add_callback("on_batch_end", fail_from_now_on)
        trainer.run()
        return trainer.model.state_dict()

    def test_rewards_of_text_and_one_that_fails_loses_nothing(self):
        expected = self.train("uninterrupted")
        message = r"KeyError: 'no network' -- for sample \d+, text '(ab|cde)\w{4,}"
        with self.assertRaisesRegex(RewardError, message) as raised:
            self.train("interrupted", fail_after=1)
        self.assertIsInstance(raised.exception.__cause__, KeyError)
        self.is_failing = False
        torch.testing.assert_close(self.train("interrupted"), expected, atol=0, rtol=0)


class TestRatio(TempDirTestCase):
    """The update's log-probs are those of the rollout, so that the ratio starts at 1."""

    def test_ratio_starts_at_one(self):
        for options in (
            {},
            {"temperature": 0.7, "shared_trunk": True},
            {"minibatch_size": 5, "ppo_epochs": 2},
            {"micro_batch_size": 1},
            {"precision": "bf16"},
            {"precision": "bf16", "group_size": 4, "minibatch_size": 8},
        ):
            with self.subTest(options):
                # dropout must not matter
                policy = tiny_gpt(embd_pdrop=0.3, resid_pdrop=0.3, attn_pdrop=0.3)
                rows = train(policy, [[1], [4, 2, 5]], **options)
                self.assertTrue(all(row["log_prob_error"] < 1e-4 for row in rows))
                self.assertLess(abs(rows[0]["objective/kl"]), 1e-4)
                self.assertGreater(abs(rows[-1]["objective/kl"]), 1e-4)  # and it did learn

    def test_learning_rate_zero_moves_nothing(self):
        rows = train(tiny_gpt(), [[1], [4, 2, 5]], learning_rate=0.0, max_iters=10)
        self.assertEqual(len(rows), 10)
        for row in rows:
            self.assertLess(abs(row["objective/kl"]), 1e-4)
            self.assertAlmostEqual(row["val/ratio"], 1.0, places=5)
            self.assertEqual(row["policy/clipfrac"], 0.0)


class TestUpdate(TempDirTestCase):
    def test_epochs_end_where_the_policy_went_too_far(self):
        # four minibatches an epoch; after the first step the policy has moved
        for bound, steps in ((None, 16), (1e-6, 4), (1e3, 16)):
            with self.subTest(approxkl_max=bound):
                options = {"ppo_epochs": 4, "minibatch_size": 4, "approxkl_max": bound}
                trainer, r = rollout(tiny_gpt(), **options)
                wrapped = mock.patch.object(
                    trainer, "optimizer_step", wraps=trainer.optimizer_step
                )
                with wrapped as step:
                    trainer.update(r)
                self.assertEqual(step.call_count, steps)

    def test_the_optimizer_is_the_papers(self):
        trainer = ppo_trainer(tiny_gpt())
        groups = trainer.optimizer.param_groups
        self.assertEqual({(g["eps"], g["weight_decay"]) for g in groups}, {(1e-5, 0.0)})

    def test_the_value_function_has_its_own_learning_rate_which_decays_too(self):
        options = {"learning_rate": 0.01, "value_lr_ratio": 3.0, "lr_schedule": "linear"}
        trainer = ppo_trainer(tiny_gpt(), max_iters=4, **options)
        rates = []

        def note_rates(trainer):
            groups = trainer.optimizer.param_groups
            rates.append(sorted({round(group["lr"], 9) for group in groups}))

        trainer.add_callback("on_batch_end", note_rates)
        trainer.run()
        fractions = (1.0, 0.75, 0.5, 0.25)
        expected = [[round(0.01 * x, 9), round(0.03 * x, 9)] for x in fractions]
        self.assertEqual(rates, expected)

    def trained_weights(self, hidden_states=prefix.hidden_states, **options):
        """A policy's weights after two iterations of two prompts.

        hidden_states: how models read prompts. eps is large, so that rounding errors of small
        gradients do not become steps.
        """
        policy = tiny_gpt(3)
        options = {"minibatch_size": 8, "max_iters": 2, "learning_rate": 1e-2, **options}
        with mock.patch.object(heads, "hidden_states", hidden_states):
            train(policy, [[1], [4, 2, 5]], eps=1e-3, **options)
        return policy.state_dict()

    def test_the_update_depends_neither_on_the_micro_batch_nor_on_how_prompts_are_read(self):
        def row_by_row(trunk, idx, attention_mask, prefix_length=0, rows_per_prompt=1):
            return prefix.hidden_states(trunk, idx, attention_mask, prefix_length)

        for group_size, sizes in ((1, (1, 5)), (4, (4,))):
            expected = self.trained_weights(group_size=group_size)
            variants = [{"micro_batch_size": size} for size in sizes]
            variants.append({"micro_batch_size": 8, "hidden_states": row_by_row})
            for variant in variants:
                with self.subTest(group_size=group_size, **variant):
                    found = self.trained_weights(group_size=group_size, **variant)
                    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    def test_the_update_depends_on_the_micro_batch_for_no_loss_mean(self):
        for loss_mean in ("token", "sequence", "constant"):
            with self.subTest(loss_mean):
                options = {"algorithm": "grpo", "loss_mean": loss_mean}
                expected = self.trained_weights(**options)
                found = self.trained_weights(**options, micro_batch_size=4)
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


class Recurrent(nn.Module):
    """A policy that is no GPT: a GRU that reads one token after the other."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 11)

    def next_log_probs(self, idx, temperature):
        hidden, _ = self.gru(self.embedding(idx))
        return (self.head(hidden) / temperature).log_softmax(-1)

    def log_probs(self, idx, attention_mask=None, temperature=1.0):
        log_probs = self.next_log_probs(idx[:, :-1], temperature)
        return log_probs.gather(2, idx[:, 1:, None])[..., 0]

    def generate(
        self,
        idx,
        max_new_tokens,
        temperature,
        do_sample,
        attention_mask,
        stop_token,
        return_log_probs,
    ):
        for _ in range(max_new_tokens):
            probabilities = self.next_log_probs(idx, temperature)[:, -1].exp()
            idx = torch.cat([idx, probabilities.multinomial(1)], dim=1)
        return idx, self.log_probs(idx, temperature=temperature)[:, -max_new_tokens:]


class TestLearning(TempDirTestCase):
    def test_learns_to_write_one_token(self):
        for algorithm, options in (
            ("ppo", {}),
            ("ppo", {"shared_trunk": True, "whiten_rewards": True}),
            ("reinforce", {}),
            ("reinforce", {"whiten_advantages": False}),
            ("rloo", {}),
            ("grpo", {}),
        ):
            with self.subTest(algorithm, **options):
                options = {"kl_coef": 0.0, "learning_rate": 1e-2, **options}
                rows = train(
                    tiny_gpt(1), algorithm=algorithm, max_iters=60, batch_size=32, **options
                )
                self.assertLess(rows[0]["objective/scores"], 0.3)
                self.assertGreater(rows[-1]["objective/scores"], 0.8)

    def test_kl_penalty_holds_the_policy_near_the_reference(self):
        def last_kl(kl_coef):
            rows = train(tiny_gpt(1), max_iters=25, batch_size=32, kl_coef=kl_coef)
            return rows[-1]["objective/kl"]

        self.assertLess(last_kl(1.0), 0.5 * last_kl(0.0))

    def check_recurrent(self, algorithm, value_model=None):
        set_seed(1)
        trainer = ppo_trainer(
            Recurrent(),
            value_model=value_model,
            algorithm=algorithm,
            max_iters=40,
            kl_coef=0.0,
            learning_rate=2e-2,
            batch_size=32,
        )
        before = trainer.rollout(*next(trainer.batches())).scores.mean().item()
        trainer.run()
        self.assertLess(trainer.metrics["log_prob_error"], 1e-4)
        self.assertGreater(trainer.metrics["objective/scores"], before + 0.4)

    def test_any_policy_with_log_probs_and_generate(self):
        self.check_recurrent("rloo")

    def test_any_policy_and_a_value_model(self):
        self.check_recurrent("ppo", ValueModel.from_gpt(tiny_gpt()))


class TestResume(TempDirTestCase):
    def train(self, folder, max_iters):
        """Weights, kl_coef and metrics of a run, from its checkpoint if there is one."""
        trainer = ppo_trainer(
            tiny_gpt(),
            [[1], [4, 2, 5], [7, 7]],
            work_dir=str(folder),
            max_iters=max_iters,
            kl_target=1.0,
        )
        trainer.run()
        return trainer.model.state_dict(), trainer.kl_coef, timeless(folder)

    def test_resume_is_exact(self):
        weights, kl_coef, rows = self.train(self.folder / "uninterrupted", 6)
        for max_iters in (2, 5, 6):
            resumed = self.train(self.folder / "resumed", max_iters)
        torch.testing.assert_close(resumed[0], weights, atol=0, rtol=0)
        self.assertEqual(resumed[1], kl_coef)
        self.assertEqual(resumed[2], rows)

    def test_another_reference_policy_is_no_resume(self):
        def trainer(reference_seed, max_iters):
            return ppo_trainer(
                tiny_gpt(),
                ref_policy=tiny_gpt(reference_seed),
                work_dir=str(self.folder),
                max_iters=max_iters,
            )

        trainer(1, 1).run()
        trainer(1, 2).run()
        self.assertRaisesRegex(ValueError, "another reference policy", trainer(2, 3).run)


class TestOldCheckpoints(TempDirTestCase):
    """Checkpoints from before the table of algorithms.

    They have `baseline`, and most choices are missing. Their losses were means over tokens.
    """

    def trainer(self, name, max_iters, **options):
        work_dir = str(self.folder / name)
        prompts = [[1], [4, 2, 5], [7, 7]]
        return ppo_trainer(tiny_gpt(), prompts, work_dir=work_dir, max_iters=max_iters, **options)

    def make_old(self, name, **options):
        """Edit a run's checkpoint to what the old trainer with these options would have left."""
        path = self.folder / name / "checkpoint.pt"
        state = torch.load(path, weights_only=True)
        config = state["config"]
        added = ("advantage", "whiten_advantages", "kl_penalty", "kl_estimator", "loss_mean")
        for option in (*added, "ratio", "skip_equal_groups", "log_samples"):
            del config[option]
        old = {"baseline": True, "kl_coef": 0.05, "clip_range": 0.2, "ppo_epochs": 4}
        config |= {**old, "group_size": None, **options}
        torch.save(state, path)

    def check(self, then, **options):
        """A run with `options`, whose checkpoint is made an old one with `then`, ends the same."""
        whole = self.trainer("uninterrupted", 4, **options)
        whole.run()
        self.trainer("resumed", 2, **options).run()
        self.make_old("resumed", **then)
        resumed = self.trainer("resumed", 4, **options)
        resumed.run()
        expected = whole.model.state_dict()
        torch.testing.assert_close(resumed.model.state_dict(), expected, atol=0, rtol=0)
        rows = timeless(self.folder / "resumed")
        self.assertEqual(rows, timeless(self.folder / "uninterrupted"))

    def check_refused(self, then, now, message):
        self.trainer("run", 2, **now).run()
        self.make_old("run", **then)
        with self.assertRaisesRegex(ValueError, message):
            self.trainer("run", 4, **now).run()

    def test_ppo(self):
        self.check({})

    def test_ppo_of_another_kl_coef(self):
        self.check_refused({"kl_coef": 0.1}, {}, "kl_coef was 0.1, is 0.05")

    def test_reinforce(self):
        self.check({}, algorithm="reinforce")

    def test_reinforce_without_a_baseline(self):
        self.check({"baseline": False}, algorithm="reinforce", whiten_advantages=False)

    def test_reinforce_without_a_baseline_does_not_become_one_with(self):
        message = "whiten_advantages was False, is True"
        self.check_refused({"baseline": False}, {"algorithm": "reinforce"}, message)

    def test_reinforce_took_one_step_whatever_the_minibatch(self):
        self.check({"minibatch_size": 8}, algorithm="reinforce")

    def test_rloo(self):
        self.check({}, algorithm="rloo")

    def test_grpo_was_a_mean_over_tokens(self):
        self.check({}, algorithm="grpo", loss_mean="token", kl_coef=0.05)

    def test_old_grpo_does_not_become_the_papers(self):
        message = "kl_coef was 0.05, is 0.04; loss_mean was 'token', is 'sequence'"
        self.check_refused({}, {"algorithm": "grpo"}, message)


class TestSamples(TempDirTestCase):
    """What the policy wrote: trainer.samples(), and samples.jsonl in the work_dir."""

    def trainer(self, name="run", tokenizer=TOKENIZER, **options):
        prompts = ["ab", "cde"] if tokenizer else [[1], [4, 2, 5]]
        options = {"stop_token": None if tokenizer else 0, "log_samples": 3, **options}
        work_dir = str(self.folder / name)
        return ppo_trainer(
            tiny_gpt(), prompts, tokenizer=tokenizer, work_dir=work_dir, **options
        )

    def rows(self, name="run"):
        return read_metrics(self.folder / name / "samples.jsonl")

    def test_a_few_rows_of_each_iteration(self):
        self.trainer().run()
        self.assertEqual([row["iter"] for row in self.rows()], [1, 1, 1, 2, 2, 2, 3, 3, 3])

    def test_a_row_is_an_episode(self):
        trainer = self.trainer(max_iters=1)
        trainer.run()
        r = trainer.last_rollout
        for i, row in enumerate(self.rows()):
            written = r.mask[i]
            text = TOKENIZER.decode([x for x in r.idx[i, 1:][written].tolist() if x != 10])
            self.assertEqual(row["prompt"], ["ab", "cde"][r.prompt_index[i]])
            self.assertEqual(row["completion"], text)
            self.assertEqual(row["length"], written.sum().item())
            self.assertAlmostEqual(row["reward"], r.scores[i].item(), places=6)
            self.assertAlmostEqual(row["kl"], r.kl[i].sum().item(), places=6)
            self.assertEqual(len(row), 6)  # and the iteration

    def test_without_a_tokenizer_they_are_ids(self):
        trainer = self.trainer(tokenizer=None, max_iters=1)
        trainer.run()
        r = trainer.last_rollout
        for i, row in enumerate(self.rows()):
            self.assertEqual(row["prompt"], [[1], [4, 2, 5]][r.prompt_index[i]])
            self.assertEqual(row["completion"], r.idx[i, 1:][r.mask[i]].tolist())

    def test_as_many_as_asked_for_when_metrics_are_logged(self):
        self.trainer(log_samples=2, log_every=2, max_iters=4).run()
        self.assertEqual([row["iter"] for row in self.rows()], [2, 2, 4, 4])

    def test_no_more_than_there_are(self):
        self.trainer(log_samples=100, max_iters=1).run()
        self.assertEqual(len(self.rows()), 16)

    def test_none(self):
        self.trainer(log_samples=0).run()
        self.assertFalse((self.folder / "run" / "samples.jsonl").exists())

    def test_they_are_cut_on_resume(self):
        def crash(trainer):
            if trainer.iter_num == 3:
                raise OSError("no space left on device")

        self.trainer("uninterrupted", max_iters=4).run()
        trainer = self.trainer("resumed", max_iters=4, checkpoint_every=2)
        trainer.add_callback("on_log", crash)
        self.assertRaises(OSError, trainer.run)
        self.assertEqual(self.rows("resumed")[-1]["iter"], 3)  # behind the last checkpoint
        self.trainer("resumed", max_iters=4, checkpoint_every=2).run()
        self.assertEqual(self.rows("resumed"), self.rows("uninterrupted"))

    def test_the_last_rollouts_are_there_when_metrics_are_logged(self):
        trainer = self.trainer()
        seen = []

        def note(trainer):
            samples = trainer.samples()
            rewards = [sample["reward"] for sample in samples]
            mean = statistics.mean(rewards)
            self.assertAlmostEqual(mean, trainer.metrics["objective/scores"], places=5)
            seen.append((len(samples), samples[:3]))

        trainer.add_callback("on_log", note)
        trainer.run()
        self.assertEqual([n for n, _ in seen], [16, 16, 16])
        for iteration, (_, samples) in enumerate(seen, 1):
            logged = [row for row in self.rows() if row["iter"] == iteration]
            self.assertEqual([{"iter": iteration, **sample} for sample in samples], logged)

    def test_before_the_first_rollout_there_are_none(self):
        self.assertEqual(self.trainer().samples(), [])


class TestRefusals(TempDirTestCase):
    """Sentences for what cannot be, before anything is sampled where that is possible."""

    def check(self, message, policy=None, **options):
        policy = tiny_gpt() if policy is None else policy
        self.assertRaisesRegex(ValueError, message, ppo_trainer, policy, **options)

    def check_reward(self, message, rewards):
        trainer = ppo_trainer(tiny_gpt(), reward=lambda *_: rewards)
        self.assertRaisesRegex(RewardError, message, trainer.run)

    def test_rewards_of_the_wrong_shape(self):
        self.check_reward("shape \\(16,\\)", torch.zeros(3))

    def test_rewards_that_are_no_tensor(self):
        self.check_reward("not list", [0.0] * 16)

    def test_rewards_that_are_not_finite(self):
        self.check_reward("gave nan to sample 4", torch.tensor([0.0] * 4 + [math.nan] * 12))

    def test_reward_functions_that_could_not_be_called(self):
        def on_text(completions, prompts):
            return [0.0] * len(completions)

        with self.assertRaisesRegex(TypeError, "wrap it in TextReward"):
            ppo_trainer(tiny_gpt(), reward=on_text)

    def test_prompts(self):
        for message, prompts in (
            ("is text", ["hello"]),
            ("one token or more", [[]]),
            ("empty", []),
        ):
            self.check(message, prompts=prompts)

    def test_numbers_out_of_range(self):
        for name, value in (
            ("clip_range", -0.2),
            ("minibatch_size", 0),
            ("minibatch_size", 17),
            ("group_size", 0),
            ("kl_target", 0),
            ("kl_horizon", 15),
            ("gamma", 1.5),
            ("gae_lambda", 1.5),
            ("ppo_epochs", 0),
            ("ppo_epochs", 1.5),
            ("kl_coef", -0.1),
            ("temperature", 0),
            ("max_new_tokens", 0),
            ("log_samples", -1),
            ("approxkl_max", 0),
            ("value_clip_range", -1),
            ("value_coef", -1),
            ("value_lr_ratio", -1),
            ("missing_eos_penalty", -1),
        ):
            with self.subTest(name, value=value):
                self.check(f"{name}={value}", **{name: value})

    def test_unknown_options(self):
        self.check("PPOTrainer has no options \\['cliprange'\\]", cliprange=0.2)

    def test_completions_that_are_too_long_for_the_policy(self):
        self.check("do not fit into the policy's block_size=12", max_new_tokens=13)

    def test_completions_that_are_too_long_for_the_reward_model(self):
        reward_model = RewardModel.from_gpt(tiny_gpt())
        message = "do not fit into the reward model's block_size=12"
        self.check(message, reward=reward_model, max_new_tokens=12)

    def test_groups_that_are_cut(self):
        for name in ("batch_size", "minibatch_size", "micro_batch_size"):
            message = f"{name}=6 must be a multiple of group_size=4"
            self.check(message, group_size=4, **{name: 6})

    def test_groups_that_are_cut_by_the_number_of_processes(self):
        config = ppo_trainer(tiny_gpt(), batch_size=12, group_size=4).config
        message = "batch_size=12 must be a multiple of group_size=4 times 2 processes"
        self.assertRaisesRegex(ValueError, message, PPOTrainer.check_config, config, 2)

    def test_a_penalty_for_a_missing_end_where_there_is_no_end(self):
        message = "missing_eos_penalty=1.0, but nothing ends an episode: set stop_token"
        self.check(message, missing_eos_penalty=1.0, stop_token=None)

    def test_a_value_model_that_has_no_use(self):
        value_model = ValueModel.from_gpt(tiny_gpt())
        message = "advantage=leave_one_out needs no value function: leave out value_model"
        self.check(message, algorithm="rloo", value_model=value_model)

    def test_a_shared_trunk_that_has_no_use(self):
        message = "advantage=leave_one_out needs no value function"
        self.check(message, algorithm="rloo", shared_trunk=True)

    def test_a_shared_trunk_and_a_value_model(self):
        value_model = ValueModel.from_gpt(tiny_gpt())
        message = "a value_model was passed: leave one of them out"
        self.check(message, shared_trunk=True, value_model=value_model)

    def test_a_policy_of_which_no_value_function_can_be_made(self):
        message = "a value function can be made from a GPT, not from a Recurrent"
        self.check(message, policy=Recurrent())

    def test_the_policy_as_its_own_reference(self):
        policy = tiny_gpt()
        self.check("ref_policy is the policy itself", policy=policy, ref_policy=policy)

    def test_rewards_of_tokens_for_whole_completions(self):
        for option in ("whiten_rewards", "shaping"):
            message = f"{option}=True needs a reward for each token, and advantage=leave_one_out"
            self.check(message, algorithm="rloo", **{option: True})

    def test_a_kl_target_without_a_penalty(self):
        message = "kl_target=1.0 adapts the weight of the KL penalty, and kl_penalty=none has none"
        self.check(message, algorithm="dapo", kl_target=1.0)

    def test_a_kl_target_that_factors_cannot_reach(self):
        message = "kl_coef=0 cannot adapt towards kl_target=1.0"
        self.check(message, kl_coef=0, kl_target=1.0)
