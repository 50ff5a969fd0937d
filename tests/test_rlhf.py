"""Estimators and losses against loops written from the papers' equations; the PPO trainer against what must hold."""

import math
import statistics
import unittest
from unittest import mock

import torch

from mingpt import prefix, rlhf
from mingpt.chars import CharTokenizer
from mingpt.datasets import Comparisons, pad_and_mask
from mingpt.rlhf import ActorCritic, DPOLoss, PPOTrainer, RewardError, RewardModel, TextReward, ValueHead, ValueModel
from mingpt.trainer import Trainer
from mingpt.utils import set_seed
from tests.common import TempDirTestCase, timeless, tiny_gpt

TOKENIZER = CharTokenizer("abcdefghij")  # its end of text is id 10


def example(B=4, T=9):
    """A mask that begins and ends somewhere in each row, and a function for random (B, T) tensors in double precision."""
    generator = torch.Generator().manual_seed(0)
    first, length = (torch.randint(low, high, (B, 1), generator=generator) for low, high in ((0, 3), (1, T - 2)))
    mask = (torch.arange(T) >= first) & (torch.arange(T) < first + length)
    return mask, lambda: torch.randn(B, T, dtype=torch.double, generator=generator)


def check_gradient(f, *inputs):
    """Autograd's gradient of the scalar f(*inputs) against central differences, an entry at a time."""
    torch.autograd.gradcheck(f, [x.clone().requires_grad_() for x in inputs], eps=1e-6, atol=1e-6, rtol=1e-4)


class TestEstimators(unittest.TestCase):
    def test_gae_equals_the_sum_it_is_defined_as(self):
        mask, new = example()
        rewards, values = new(), new()
        for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)):
            advantages, returns = rlhf.gae(rewards, values, mask, gamma, lam)
            self.assertFalse(advantages[~mask].any() or returns[~mask].any())
            for b, t in mask.nonzero().tolist():
                expected, last = 0.0, mask[b].nonzero().max().item()
                for k, s in enumerate(range(t, last + 1)):  # equation 16: sum of (γλ)^k δ_{t+k}
                    next_value = values[b, s + 1] if s < last else 0.0
                    expected += (gamma * lam) ** k * (rewards[b, s] + gamma * next_value - values[b, s])
                self.assertAlmostEqual(advantages[b, t].item(), expected.item(), places=10)
                self.assertAlmostEqual(returns[b, t].item(), (expected + values[b, t]).item(), places=10)

    def test_gradients_by_central_differences(self):
        mask, new = example()
        a, b, c, d = (0.3 * new() for _ in range(4))
        for f, inputs in (
            (lambda r, v: (rlhf.gae(r, v, mask, 0.9, 0.8)[0] * c).sum(), (a, b)), (lambda x: rlhf.ppo_policy_loss(x, b, c, mask, 0.2)[0], (a,)),
            (lambda x: rlhf.value_loss(x, b, d, mask, 0.2), (a,)), (lambda x: (rlhf.masked_whiten(x, mask) * c).sum(), (a,)),
            (lambda x: rlhf.masked_mean(rlhf.kl_estimate(x, b, "k3"), mask), (a,)), (lambda x, y: rlhf.reward_loss(x, y, 0.5), (a, b)),
        ):
            check_gradient(f, *inputs)

    def test_ppo_policy_loss_token_by_token(self):
        mask, new = example()
        log_probs, old, advantages = 0.3 * new(), 0.3 * new(), new()
        loss, clip_fraction = rlhf.ppo_policy_loss(log_probs, old, advantages, mask, 0.2)
        terms, clipped = [], []
        for ratio, A in zip((log_probs - old).exp()[mask].tolist(), advantages[mask].tolist()):
            terms.append(min(ratio * A, min(max(ratio, 0.8), 1.2) * A))
            clipped.append((A > 0 and ratio > 1.2) or (A < 0 and ratio < 0.8))
        self.assertAlmostEqual(loss.item(), -sum(terms) / len(terms), places=10)
        self.assertAlmostEqual(clip_fraction.item(), sum(clipped) / len(clipped), places=10)
        self.assertTrue(0 < sum(clipped) < len(clipped))

    def test_value_loss_token_by_token(self):
        mask, new = example()
        values, old, returns, terms = new(), new(), new(), []
        for v, v0, r in zip(values[mask].tolist(), old[mask].tolist(), returns[mask].tolist()):
            bounded = min(max(v, v0 - 0.2), v0 + 0.2)
            terms.append(0.5 * max((v - r) ** 2, (bounded - r) ** 2))
        self.assertAlmostEqual(rlhf.value_loss(values, old, returns, mask, 0.2).item(), sum(terms) / len(terms), places=10)

    def test_masked_mean_and_whiten(self):
        mask, new = example()
        x = new() * 3 + 5
        mean = x[mask].mean().item()
        self.assertAlmostEqual(rlhf.masked_mean(x, mask).item(), mean, places=10)
        torch.testing.assert_close(rlhf.masked_mean(x, mask, dim=1), torch.stack([x[b][mask[b]].mean() for b in range(4)]))
        self.assertEqual(rlhf.masked_mean(x, torch.zeros_like(mask)).item(), 0.0)
        for shift, expected in ((True, 0.0), (False, mean)):
            white = rlhf.masked_whiten(x, mask, shift_mean=shift)
            self.assertAlmostEqual(white[mask].mean().item(), expected, places=7)
            self.assertAlmostEqual(white[mask].std(unbiased=False).item(), 1.0, places=6)
        self.assertTrue((rlhf.masked_whiten(x, mask)[~mask] == 0).all())
        self.assertLess(rlhf.masked_whiten(torch.full((4, 9), 0.3), mask).abs().max().item(), 1e-2)  # rounding errors are not blown up

    def test_kl_estimates_meet_the_exact_kl(self):
        log_p, log_q = torch.tensor([[0.1, 1.0, -0.5, 0.3], [0.4, 0.2, 0.1, -0.2]], dtype=torch.double).log_softmax(-1)
        exact = (log_p.exp() * (log_p - log_q)).sum()
        squares = (log_p.exp() * (log_p - log_q) ** 2 / 2).sum()
        for kind, expected in (("k1", exact), ("k2", squares), ("k3", exact)):  # k1 and k3 are unbiased
            self.assertAlmostEqual((log_p.exp() * rlhf.kl_estimate(log_p, log_q, kind)).sum().item(), expected.item(), places=10)
        self.assertTrue((rlhf.kl_estimate(log_p, log_q, "k3") >= 0).all())
        self.assertRaisesRegex(ValueError, "must be k1, k2 or k3", rlhf.kl_estimate, log_p, log_q, "k4")

    def test_reward_loss_is_bradley_terry(self):
        chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 1.5])
        p = [1 / (1 + math.exp(-(c - r - 0.3))) for c, r in ((2.0, 1.0), (0.5, 1.5))]
        self.assertAlmostEqual(rlhf.reward_loss(chosen, rejected, 0.3).item(), -sum(map(math.log, p)) / 2, places=6)

    def test_dpo_loss_is_bradley_terry_of_implicit_rewards(self):
        chosen, rejected, ref_chosen, ref_rejected = inputs = [torch.randn(6, dtype=torch.double) * 5 for _ in range(4)]
        terms = [math.log(1 + math.exp(-0.3 * ((c - rc) - (r - rr)))) for c, r, rc, rr in zip(*(x.tolist() for x in inputs))]
        self.assertAlmostEqual(rlhf.dpo_loss(*inputs, beta=0.3).item(), statistics.mean(terms), places=9)
        self.assertAlmostEqual(rlhf.dpo_loss(chosen, rejected, chosen, rejected).item(), math.log(2), places=9)
        check_gradient(lambda c, r: rlhf.dpo_loss(c, r, ref_chosen, ref_rejected, beta=0.3), chosen, rejected)

    def test_group_advantages_one_by_one(self):
        scores = torch.randn(12, dtype=torch.double)
        for k in (2, 3, 4, 12):
            for i, s in enumerate(scores.tolist()):
                group = scores.tolist()[i - i % k:i - i % k + k]
                others, mean, std = group[:i % k] + group[i % k + 1:], statistics.mean(group), statistics.stdev(group)
                self.assertAlmostEqual(rlhf.rloo_advantages(scores, k)[i].item(), s - statistics.mean(others), places=9)
                self.assertAlmostEqual(rlhf.grpo_advantages(scores, k)[i].item(), (s - mean) / std, places=5)
        for same in (1.0, 0.3, 100.3):  # a mean of 32-bit numbers is not quite the number
            self.assertEqual(rlhf.grpo_advantages(torch.full((16,), same), 16).tolist(), [0.0] * 16)
        for k in (0, 1, 5):
            self.assertRaisesRegex(ValueError, f"group_size={k}", rlhf.rloo_advantages, scores, k)

    def test_junk_off_the_mask_reaches_no_value_and_no_gradient(self):
        mask, new = example()
        clean = [0.3 * new() for _ in range(3)]
        functions = (lambda x, y, z: rlhf.gae(x, y, mask)[0].sum() + rlhf.gae(x, y, mask)[1].sum(),
                     lambda x, y, z: (rlhf.masked_whiten(x, mask) * torch.where(mask, y, 0)).sum(),
                     lambda x, y, z: rlhf.ppo_policy_loss(x, y, z, mask)[0],
                     lambda x, y, z: rlhf.value_loss(x, y, z, mask), lambda x, y, z: rlhf.masked_mean(x, mask))
        for junk in (math.nan, math.inf, -math.inf, 1e30):
            dirty = [torch.where(mask, x, junk) for x in clean]
            for f in functions:
                torch.testing.assert_close(f(*dirty), f(*clean))
                leaves = [[x.clone().requires_grad_() for x in xs] for xs in (dirty, clean)]
                found, expected = (torch.autograd.grad(f(*xs), xs, allow_unused=True, materialize_grads=True) for xs in leaves)
                torch.testing.assert_close(found, expected)


class TestModels(unittest.TestCase):
    def test_reward_is_read_at_the_last_real_token(self):
        model, rows = RewardModel.from_gpt(tiny_gpt()), [torch.randint(11, (n,)) for n in (6, 2, 4)]
        alone = torch.cat([model(row[None]) for row in rows])
        for left in (True, False):
            torch.testing.assert_close(model(*pad_and_mask(rows, left)), alone, atol=1e-5, rtol=0)

    def test_heads(self):
        gpt, idx = tiny_gpt(n_embd=64), torch.randint(11, (2, 5))
        self.assertFalse(ValueModel.from_gpt(gpt)(idx).any())
        self.assertAlmostEqual(torch.cat([RewardModel.from_gpt(gpt).head.weight for _ in range(20)]).std().item(), 65 ** -0.5, delta=0.01)
        reward_model = RewardModel.from_gpt(gpt)  # a value function that starts as a reward model agrees with it on whole texts
        torch.testing.assert_close(ValueModel.from_gpt(reward_model)(idx)[:, -1], reward_model(idx))

    def test_normalized_on_reference_texts(self):
        model, idx = RewardModel.from_gpt(tiny_gpt()), torch.randint(11, (50, 6))
        before = model(idx)
        model.normalize(before)
        torch.testing.assert_close(model(idx), before - before.mean(), atol=1e-5, rtol=0)
        model.normalize(model(idx), unit_variance=True)
        torch.testing.assert_close(model(idx), (before - before.mean()) / before.std(unbiased=False), atol=1e-4, rtol=0)

    def test_a_prompt_that_rows_share_is_read_once(self):
        prompts, completions = ([torch.randint(11, (n,)) for n in lengths] for lengths in ((6, 3), (4, 1, 2, 3, 4, 2)))
        (left, front), (right, written) = rlhf.left_pad([prompt for prompt in prompts for _ in range(3)]), pad_and_mask(completions)
        idx, mask, completion_mask = torch.cat([left, right], 1), torch.cat([front, written], 1), torch.cat([torch.zeros_like(front), written], 1)
        gpt, read = tiny_gpt(), []
        gpt.transformer.wte.register_forward_hook(lambda module, inputs, _: read.append(inputs[0].numel()))
        critics = [RewardModel.from_gpt(gpt), ValueModel.from_gpt(RewardModel.from_gpt(gpt)), ValueHead(16)]
        torch.nn.init.normal_(critics[2].weight)
        written = completion_mask[:, 1:]
        both = lambda critic: lambda *group: torch.cat([x[written] for x in ActorCritic(gpt, critic)(idx, mask, 0.7, 5, *group)])
        for module, f in zip(critics, (lambda *group: critics[0](idx, mask, completion_mask, *group), both(critics[1]), both(critics[2]))):
            found, expected = f(3), f()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            weights = [gpt.transformer.wpe.weight, *module.parameters()]
            gradients = [torch.autograd.grad((x ** 2).sum(), weights, allow_unused=True, materialize_grads=True) for x in (found, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
        self.assertEqual(read[:3], [2 * 5, 6 * 4, 6 * 9])
        torch.testing.assert_close(both(None)()[:written.sum()], gpt.log_probs(idx, mask, 0.7)[written], rtol=0, atol=1e-5)
        self.assertFalse(ActorCritic(gpt)(idx, mask, 0.7, 5)[0][:, :5].any())  # prompts do not go through the vocabulary's matrix

    def test_value_head_reads_the_trunk_of_the_policy(self):
        policy, head = tiny_gpt(), ValueHead(16)
        torch.nn.init.normal_(head.weight)
        apart = ValueModel.from_gpt(policy)
        apart.head.load_state_dict(head.state_dict())
        idx, mask = rlhf.left_pad([torch.randint(11, (n,)) for n in (8, 5)])
        for found, expected in zip(ActorCritic(policy, head)(idx, mask, 0.7), ActorCritic(policy, apart)(idx, mask, 0.7)):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(ActorCritic(policy, head).values(idx, mask), apart(idx, mask)[:, :-1])

    def test_padding_on_the_right_needs_no_mask(self):
        model, idx = RewardModel.from_gpt(tiny_gpt()), torch.randint(11, (3, 8))
        mask = torch.arange(8) < torch.tensor([[8], [3], [5]])
        self.assertIsNone(prefix.needed(idx, mask))
        hole = torch.tensor([[True] * 2 + [False] * 2 + [True] * 4] * 3)  # as behind a prompt that was padded on the right
        for other in (mask.flip(1), hole, mask[:, :4], mask[:1]):
            self.assertIs(prefix.needed(idx, other), other)
        torch.testing.assert_close(model(idx, mask), torch.cat([model(row[keep][None]) for row, keep in zip(idx, mask)]))


ROWS = [{"prompt": "ab", "chosen": "cd", "rejected": "cdefg"}, {"prompt": "abcdeabc", "chosen": "f", "rejected": "ga"},
        {"chosen": "a", "rejected": "bc"}]


class TestComparisons(TempDirTestCase):
    """Learning from what people chose and wrote."""

    def test_comparison_and_dpo_losses_row_by_row(self):
        reward_model, policy, reference = RewardModel.from_gpt(tiny_gpt()), tiny_gpt(1), tiny_gpt(2)
        for rows in (ROWS, [{**row, "rejected": [row["rejected"], "hij"], "ended": [True, False, True]} for row in ROWS]):
            batch = Comparisons.collate(list(Comparisons(rows, TOKENIZER, 12)))  # the longest prompt and completion have 14 tokens
            reward, implicit, means = [], [], []
            for row in rows:
                prompt, r, rho = TOKENIZER.encode(row.get("prompt", "")) or [10], [], []
                texts = (row["chosen"], *([row["rejected"]] if isinstance(row["rejected"], str) else row["rejected"]))
                for text, end in zip(texts, row.get("ended", (True, True))):
                    ids = torch.tensor([[*prompt, *TOKENIZER.encode(text), *[10] * end]])
                    r.append(reward_model(ids).item())
                    rho.append(0.3 * (policy.log_probs(ids) - reference.log_probs(ids))[0, len(prompt) - 1:].sum().item())
                for terms, (chosen, *rejected) in ((reward, r), (implicit, rho)):
                    terms.extend(math.log(1 + math.exp(x - chosen)) for x in rejected)
                means.extend((r[0] + x) / 2 for x in r[1:])
            for centering in (0.0, 0.5):
                expected = statistics.mean(reward) + centering * statistics.mean(4 * mean ** 2 for mean in means)
                self.assertAlmostEqual(rlhf.comparison_loss(reward_model, batch, centering)[0].item(), expected, places=5)
            self.assertAlmostEqual(DPOLoss(reference, 0.3)(ActorCritic(policy), batch)[0].item(), statistics.mean(implicit), places=5)

    def test_learn_from_comparisons(self):
        rows = [{"chosen": "a" * (1 + i % 3), "rejected": "b" * (1 + i % 2)} for i in range(16)]
        C = Trainer.get_default_config()
        C.merge_from_dict({"device": "cpu", "max_iters": 30, "batch_size": 16, "learning_rate": 1e-2, "micro_batch_size": 5})
        for model, loss_fn in ((RewardModel.from_gpt(tiny_gpt()), rlhf.comparison_loss), (ActorCritic(tiny_gpt()), DPOLoss(tiny_gpt()))):
            trainer = Trainer(C, model, Comparisons(rows, TOKENIZER, 12), loss_fn=loss_fn, collate_fn=Comparisons.collate)
            trainer.run()
            self.assertLess(trainer.metrics["loss"], 0.3)
            self.assertEqual(trainer.metrics["accuracy"], 1.0)


def count_token(token):
    """A reward function: the share of the completion that is `token`."""
    return lambda idx, attention_mask, completion_mask: (((idx == token) & completion_mask).sum(1) / 8).float()


def ppo_trainer(policy, prompts=([1],), reward=count_token(3), value_model=None, ref_policy=None, tokenizer=None, **options):
    """A trainer for a few short completions, which rewards 3s unless told otherwise."""
    config = PPOTrainer.get_default_config()
    base = {"device": "cpu", "batch_size": 16, "max_new_tokens": 8, "stop_token": 0, "max_iters": 3, "learning_rate": 3e-3}
    config.merge_from_dict({**base, **options})
    return PPOTrainer(config, policy, reward, prompts, value_model, ref_policy, tokenizer)


def train(policy, prompts=([1],), **options):
    """The rows of metrics of a run that rewards 3s."""
    trainer, rows = ppo_trainer(policy, prompts, **options), []
    trainer.add_callback("on_log", lambda trainer: rows.append(trainer.metrics))
    trainer.run()
    return rows


class TestPPOTrainer(TempDirTestCase):
    def rollout(self, prompts=([1], [4, 2, 5]), policy=None, **options):
        set_seed(0)
        trainer = ppo_trainer(policy or tiny_gpt(), prompts, **options)
        return trainer, trainer.rollout(*rlhf.left_pad([torch.tensor(p) for p in prompts] * (16 // len(prompts))))

    def test_masks_of_a_rollout(self):
        _, r = self.rollout([[1], [4, 0, 5]])  # the 0, a stop token, in a prompt means nothing
        for b, row in enumerate(r["idx"].tolist()):
            prompt = [1] if b % 2 == 0 else [4, 0, 5]
            self.assertEqual(row[:3], [0] * (3 - len(prompt)) + prompt)
            new = row[3:]
            n = new.index(0) + 1 if 0 in new else len(new)
            self.assertEqual(r["attention_mask"][b].tolist(), [i >= 3 - len(prompt) and i < 3 + n for i in range(len(row))])
            self.assertEqual(r["mask"][b].tolist(), [2 <= t < 2 + n for t in range(len(row) - 1)])
        for name in ("kl", "old_values", "returns", "advantages"):
            self.assertTrue((r[name][~r["mask"]] == 0).all(), name)
        self.assertTrue((~r["mask"][:, 2:]).any())  # some did stop early

    def test_what_follows_the_stop_token_changes_no_loss(self):
        for algorithm in ("ppo", "grpo"):
            trainer, r = self.rollout(algorithm=algorithm)
            behind = ~r["attention_mask"]
            behind[:, :3] = False  # what follows, not the padding in front of the prompt
            self.assertTrue(behind.any())
            changed, gradients = {**r, "idx": torch.where(behind, 9, r["idx"])}, []
            for name in ("old_log_probs", "ref_log_probs", "old_values", "returns", "advantages"):
                changed[name] = torch.where(r["mask"], r[name], math.nan)
            for batch in (r, changed):
                loss, _ = trainer.compute_loss(trainer.model, batch)
                gradients.append([loss.detach(), *torch.autograd.grad(loss, list(trainer.model.parameters()))])
            torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)

    def test_score_stands_on_the_last_token(self):
        _, r = self.rollout(reward=lambda idx, attention_mask, completion_mask: torch.arange(16.0), kl_coef=0.0, gae_lambda=1.0)
        for b in range(16):  # without KL, every step returns the score
            self.assertTrue(torch.allclose(r["returns"][b][r["mask"][b]], torch.tensor(float(b))))

    def test_kl_shaped_reward(self):
        policy, reference = tiny_gpt(1), tiny_gpt(2)
        _, r = self.rollout([[1]], policy=policy, ref_policy=reference, kl_coef=0.3, gae_lambda=1.0)
        log_ratio = policy.log_probs(r["idx"]) - reference.log_probs(r["idx"])
        for b in range(16):
            steps = r["mask"][b].nonzero()[:, 0].tolist()
            for t in steps:
                expected = r["scores"][b] - 0.3 * sum(log_ratio[b, s] for s in steps if s >= t)
                self.assertAlmostEqual(r["returns"][b, t].item(), expected.item(), places=4)
        self.assertGreater(r["kl"].sum(1).mean().item(), 0.1)

    def test_ratio_starts_at_one(self):
        for options in ({}, {"temperature": 0.7, "shared_trunk": True}, {"minibatch_size": 5, "ppo_epochs": 2}, {"micro_batch_size": 1},
                        {"precision": "bf16"}, {"precision": "bf16", "group_size": 4, "minibatch_size": 8}):
            with self.subTest(options):  # dropout must not matter
                rows = train(tiny_gpt(embd_pdrop=0.3, resid_pdrop=0.3, attn_pdrop=0.3), [[1], [4, 2, 5]], **options)
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

    def test_learns_to_write_one_token(self):
        for algorithm, options in (("ppo", {}), ("ppo", {"shared_trunk": True, "whiten_rewards": True}), ("reinforce", {}),
                                   ("reinforce", {"baseline": False}), ("rloo", {}), ("grpo", {})):
            rows = train(tiny_gpt(1), algorithm=algorithm, max_iters=60, batch_size=32, kl_coef=0.0, learning_rate=1e-2, **options)
            self.assertLess(rows[0]["objective/scores"], 0.3)
            self.assertGreater(rows[-1]["objective/scores"], 0.8, algorithm)

    def test_whitened_rewards_and_the_baseline(self):
        reinforce = {"algorithm": "reinforce"}
        for options in ({"whiten_rewards": True, "gae_lambda": 1.0}, reinforce, {**reinforce, "baseline": False}):
            _, r = self.rollout(kl_coef=0.0, **options)
            rewards = [[0.0] * (n - 1) + [score] for n, score in zip(r["mask"].sum(1).tolist(), r["scores"].tolist())]
            if "whiten_rewards" in options:  # to unit variance, around the mean that they had
                flat = sum(rewards, [])
                mean, std = statistics.mean(flat), statistics.pstdev(flat)
                rewards = [[mean + (x - mean) / std for x in row] for row in rewards]
            returns = [sum(row[t:]) for row in rewards for t in range(len(row))]  # γ = λ = 1
            torch.testing.assert_close(r["returns"][r["mask"]], torch.tensor(returns), atol=1e-4, rtol=1e-4)
            mean, std = (statistics.mean(returns), statistics.pstdev(returns)) if options.get("baseline", True) else (0.0, 1.0)
            torch.testing.assert_close(r["advantages"][r["mask"]], (torch.tensor(returns) - mean) / std, atol=1e-3, rtol=1e-3)

    def test_missing_end_of_text(self):
        (_, free), (trainer, paid) = (self.rollout([[1], [4, 0, 5]], missing_eos_penalty=penalty) for penalty in (0.0, 0.7))
        self.assertEqual(paid["ended"].tolist(), ends := [0 in row[3:] for row in paid["idx"].tolist()])
        self.assertTrue(0 < sum(ends) < 16)
        torch.testing.assert_close(free["scores"] - paid["scores"], torch.tensor([0.0 if end else 0.7 for end in ends]))

    def test_epochs_end_where_the_policy_went_too_far(self):
        for bound, steps in ((None, 16), (1e-6, 4), (1e3, 16)):  # four minibatches an epoch; after the first step the policy has moved
            trainer, r = self.rollout(ppo_epochs=4, minibatch_size=4, approxkl_max=bound)
            with mock.patch.object(trainer, "optimizer_step", wraps=trainer.optimizer_step) as step:
                trainer.update(r)
                self.assertEqual(step.call_count, steps)

    def test_another_reference_policy_is_no_resume(self):
        for seed, iterations in ((1, 1), (1, 2), (2, 3)):
            trainer = ppo_trainer(tiny_gpt(), ref_policy=tiny_gpt(seed), work_dir=str(self.folder), max_iters=iterations)
            if seed == 1:
                trainer.run()
        self.assertRaisesRegex(ValueError, "another reference policy", trainer.run)

    def test_rewards_of_text_and_one_that_fails_loses_nothing(self):
        failing, seen = [], []

        def reward(completions, prompts):
            if failing and any(len(completion) > 3 for completion in completions):
                raise KeyError("no network")
            seen.extend(zip(prompts, completions))
            return [len(completion) / 8 for completion in completions]
        def train(name, fail_after=None):
            options = {"tokenizer": TOKENIZER, "stop_token": None, "max_iters": 4, "work_dir": str(self.folder / name)}
            trainer = ppo_trainer(tiny_gpt(), ["ab", "cde"], TextReward(reward, TOKENIZER), **options)
            trainer.add_callback("on_batch_end", lambda trainer: trainer.iter_num == fail_after and failing.append(True))
            trainer.run()
            self.assertEqual(trainer.stop_token, 10)
            return trainer.model.state_dict()
        whole = train("whole")
        self.assertEqual({prompt for prompt, _ in seen}, {"ab", "cde"})
        self.assertTrue(all(set(completion) <= set("abcdefghij") for _, completion in seen))
        with self.assertRaisesRegex(RewardError, r"KeyError: 'no network' -- for sample \d+, text '(ab|cde)\w{4,}") as raised:
            train("parts", fail_after=1)
        self.assertIsInstance(raised.exception.__cause__, KeyError)
        failing.clear()
        torch.testing.assert_close(train("parts"), whole, atol=0, rtol=0)

    def test_any_policy_with_log_probs_and_generate(self):
        class Recurrent(torch.nn.Module):
            """A GRU that reads one token after the other."""

            def __init__(self):
                super().__init__()
                self.embedding, self.head = torch.nn.Embedding(11, 16), torch.nn.Linear(16, 11)
                self.gru = torch.nn.GRU(16, 16, batch_first=True)

            def next(self, idx, temperature):
                return (self.head(self.gru(self.embedding(idx))[0]) / temperature).log_softmax(-1)

            def log_probs(self, idx, attention_mask=None, temperature=1.0):
                return self.next(idx[:, :-1], temperature).gather(2, idx[:, 1:, None])[..., 0]

            def generate(self, idx, max_new_tokens, temperature, do_sample, attention_mask, stop_token, return_log_probs):
                for _ in range(max_new_tokens):
                    idx = torch.cat([idx, self.next(idx, temperature)[:, -1].exp().multinomial(1)], dim=1)
                return idx, self.log_probs(idx, temperature=temperature)[:, -max_new_tokens:]
        for algorithm in ("ppo", "rloo"):
            set_seed(1)
            options = {"algorithm": algorithm, "max_iters": 40, "kl_coef": 0.0, "learning_rate": 2e-2, "batch_size": 32}
            trainer = ppo_trainer(Recurrent(), value_model=ValueModel.from_gpt(tiny_gpt()) if algorithm == "ppo" else None, **options)
            first = trainer.rollout(*rlhf.left_pad([torch.tensor([1])] * 32))["scores"].mean()
            trainer.run()
            self.assertLess(trainer.metrics["log_prob_error"], 1e-4)
            self.assertGreater(trainer.metrics["objective/scores"], first + 0.4)

    def test_groups_share_a_prompt_and_their_advantages_follow_the_paper(self):
        for algorithm in ("rloo", "grpo"):
            options = {"algorithm": algorithm, "group_size": 2, "batch_size": 8, "kl_coef": 0.3}
            trainer = ppo_trainer(tiny_gpt(1), [[i, i + 1] for i in range(8)], ref_policy=tiny_gpt(2), **options)
            prompts, mask = next(trainer.batches())
            self.assertEqual(prompts[0::2].tolist(), prompts[1::2].tolist())
            self.assertEqual(len(set(map(tuple, prompts.tolist()))), 4)
            r = trainer.rollout(prompts, mask)
            total = r["scores"] - (0.3 * r["kl"].sum(1) if algorithm == "rloo" else 0)
            for b in range(8):
                mine, other = total[b].item(), total[b ^ 1].item()
                expected = mine - other if algorithm == "rloo" else 0.0 if mine == other else math.copysign(2 ** -0.5, mine - other)
                self.assertTrue(torch.allclose(r["advantages"][b][r["mask"][b]], torch.tensor(expected), atol=1e-4), algorithm)

    def test_grpo_penalty_is_the_mean_of_k3(self):
        policy, reference = tiny_gpt(1), tiny_gpt(2)
        trainer, r = self.rollout([[1]], policy=policy, ref_policy=reference, algorithm="grpo", kl_coef=0.3)
        r["advantages"] = torch.zeros_like(r["kl"])  # leaves the penalty alone
        loss, _ = trainer.policy_and_value_loss(trainer.model, r)
        log_ratio = (policy.log_probs(r["idx"]) - reference.log_probs(r["idx"]))[r["mask"]].tolist()
        expected = 0.3 * sum(math.exp(-x) - 1 + x for x in log_ratio) / len(log_ratio)
        self.assertAlmostEqual(loss.item(), expected, places=4)

    def test_kl_penalty_holds_the_policy_near_the_reference(self):
        free, held = (train(tiny_gpt(1), max_iters=25, batch_size=32, kl_coef=kl_coef)[-1]["objective/kl"] for kl_coef in (0.0, 1.0))
        self.assertLess(held, 0.5 * free)

    def test_a_reward_model_is_a_reward_function_without_dropout(self):
        reward_model = RewardModel.from_gpt(tiny_gpt(resid_pdrop=0.5, block_size=16)).train()
        _, r = self.rollout([[1], [4, 2]], reward=reward_model)
        alone = [reward_model(row[keep][None]).item() for row, keep in zip(r["idx"], r["attention_mask"])]
        torch.testing.assert_close(r["scores"], torch.tensor(alone), atol=1e-5, rtol=0)

    def test_the_optimizer_is_the_papers(self):
        trainer, rates = ppo_trainer(tiny_gpt(), learning_rate=0.01, value_lr_ratio=3.0, lr_schedule="linear", max_iters=4), []
        trainer.add_callback("on_batch_end", lambda t: rates.append(sorted({group["lr"] for group in t.optimizer.param_groups})))
        trainer.run()
        self.assertEqual({(group["eps"], group["weight_decay"]) for group in trainer.optimizer.param_groups}, {(1e-5, 0.0)})
        for found, left in zip(rates, (1.0, 0.75, 0.5, 0.25)):
            self.assertEqual([round(rate, 9) for rate in found], [round(0.01 * left, 9), round(0.03 * left, 9)])

    def test_adaptive_kl_coef(self):
        trainer = ppo_trainer(tiny_gpt(), max_iters=1, kl_coef=0.1, kl_target=5.0, kl_horizon=160)
        trainer.run()  # KL 0 is far below the target: the error is cut off at -0.2, and 16 of 160 episodes went by
        self.assertAlmostEqual(trainer.kl_coef, 0.1 * (1 - 0.2 * 16 / 160), places=6)

    def test_the_update_depends_neither_on_the_micro_batch_nor_on_how_prompts_are_read(self):
        for group_size in (1, 4):
            weights, apart = [], lambda *args: prefix.read(*args[:4])
            for size, read in ((None, prefix.read), (5 if group_size == 1 else 4, prefix.read), (group_size, prefix.read), (8, apart)):
                with mock.patch("mingpt.heads.read", read):
                    train(policy := tiny_gpt(3), [[1], [4, 2, 5]], micro_batch_size=size, group_size=group_size, minibatch_size=8, max_iters=2,
                          learning_rate=1e-2, eps=1e-3)
                weights.append(policy.state_dict())
                torch.testing.assert_close(weights[-1], weights[0], atol=1e-4, rtol=0)

    def test_resume_is_exact(self):
        def train(folder, until):
            trainer = ppo_trainer(tiny_gpt(), [[1], [4, 2, 5], [7, 7]], work_dir=str(folder), max_iters=until, kl_target=1.0)
            trainer.run()
            return trainer.model.state_dict(), (trainer.kl_coef, timeless(folder))
        whole, logged = train(self.folder / "whole", 6)
        for until in (2, 5, 6):
            parts, logged_in_parts = train(self.folder / "parts", until)
        torch.testing.assert_close(parts, whole, atol=0, rtol=0)
        self.assertEqual(logged_in_parts, logged)

    def test_bad_rewards_and_prompts(self):
        for words, reward in (("shape \\(16,\\)", lambda *_: torch.zeros(3)), ("not list", lambda *_: [0.0] * 16),
                              ("gave nan to sample 4", lambda *_: torch.tensor([0.0] * 4 + [math.nan] * 12))):
            self.assertRaisesRegex(RewardError, words, ppo_trainer(tiny_gpt(), reward=reward).run)
        for words, prompts in (("is text", ["hello"]), ("one token or more", [[]]), ("empty", [])):
            self.assertRaisesRegex(ValueError, words, ppo_trainer, tiny_gpt(), prompts)
        for name, value in (("clip_range", -0.2), ("minibatch_size", 0), ("group_size", 0), ("kl_target", 0), ("gamma", 1.5), ("ppo_epochs", 0)):
            self.assertRaisesRegex(ValueError, f"{name}={value}", train, tiny_gpt(), **{name: value})
        gpt, linear, value_model = tiny_gpt(), torch.nn.Linear(1, 1), {"value_model": ValueModel.from_gpt(tiny_gpt())}
        for words, policy, options in (
            ("do not fit into the policy's block_size=12", gpt, {"max_new_tokens": 13}),
            ("micro_batch_size=6 must be a multiple of group_size=4", gpt, {"group_size": 4, "micro_batch_size": 6}),
            ("must be ppo, reinforce, rloo or grpo", gpt, {"algorithm": "a2c"}),
            ("has no use for a value_model", gpt, {"algorithm": "rloo", **value_model}),
            ("does not go with a value_model", gpt, {"shared_trunk": True, **value_model}),
            ("ref_policy is the policy itself", gpt, {"ref_policy": gpt}), ("is no GPT to make a value function from", linear, {}),
        ):
            self.assertRaisesRegex(ValueError, words, ppo_trainer, policy, **options)
