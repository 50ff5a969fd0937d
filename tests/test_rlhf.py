"""Estimators and losses against loops written from the papers' equations; the PPO trainer against what must hold."""

import json
import math
import statistics
import unittest
from unittest import mock

import torch

from mingpt import rlhf
from mingpt.chars import CharTokenizer
from mingpt.datasets import Comparisons, Completions, read_jsonl
from mingpt.rlhf import ActorCritic, DPOLoss, PPOTrainer, RewardError, RewardModel, TextReward, ValueHead, ValueModel
from mingpt.run_folder import read_metrics
from mingpt.trainer import Trainer
from mingpt.utils import set_seed
from tests.common import TempDirTestCase, tiny_gpt


def example(seed=0, B=4, T=9):
    """Random (B, T) tensors in double precision with a mask that begins and ends somewhere in each row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        first = int(torch.randint(0, 3, (), generator=generator))
        mask[b, first:first + int(torch.randint(1, T - 2, (), generator=generator))] = True
    return mask, lambda: torch.randn(B, T, dtype=torch.double, generator=generator)


def gradient(f, *inputs):
    """Gradients of the scalar f(*inputs) by autograd."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*inputs), inputs)


def numeric_gradient(f, *inputs, h=1e-6):
    """The same by central differences, an entry at a time."""
    gradients = []
    for k, x in enumerate(inputs):
        g = torch.zeros_like(x)
        for i in range(x.numel()):
            up, down = x.clone(), x.clone()
            up.view(-1)[i] += h
            down.view(-1)[i] -= h
            g.view(-1)[i] = (f(*inputs[:k], up, *inputs[k + 1:]) - f(*inputs[:k], down, *inputs[k + 1:])) / (2 * h)
        gradients.append(g)
    return gradients


class TestEstimators(unittest.TestCase):

    def test_gae_equals_the_sum_it_is_defined_as(self):
        mask, new = example()
        rewards, values = new(), new()
        for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)):
            advantages, returns = rlhf.gae(rewards, values, mask, gamma, lam)
            for b in range(len(mask)):
                steps = mask[b].nonzero()[:, 0].tolist()
                for t in range(mask.size(1)):
                    expected = 0.0
                    for k, s in enumerate(range(t, steps[-1] + 1)):  # equation 16: sum of (γλ)^k δ_{t+k}
                        next_value = values[b, s + 1] if s < steps[-1] else 0.0
                        expected += (gamma * lam) ** k * (rewards[b, s] + gamma * next_value - values[b, s])
                    if t not in steps:
                        self.assertEqual((advantages[b, t].item(), returns[b, t].item()), (0.0, 0.0))
                    else:
                        self.assertAlmostEqual(advantages[b, t].item(), expected.item(), places=10)
                        self.assertAlmostEqual(returns[b, t].item(), (expected + values[b, t]).item(), places=10)

    def test_gradients_by_central_differences(self):
        mask, new = example()
        a, b, c, d = (0.3 * new() for _ in range(4))
        for f, inputs in (
            (lambda r, v: (rlhf.gae(r, v, mask, 0.9, 0.8)[0] * c).sum(), (a, b)),
            (lambda x: rlhf.ppo_policy_loss(x, b, c, mask, 0.2)[0], (a,)),
            (lambda x: rlhf.value_loss(x, b, d, mask, 0.2), (a,)),
            (lambda x: (rlhf.masked_whiten(x, mask) * c).sum(), (a,)),
            (lambda x: rlhf.masked_mean(rlhf.kl_estimate(x, b, "k3"), mask), (a,)),
            (lambda x, y: rlhf.reward_loss(x, y, 0.5), (a, b)),
        ):
            for exact, numeric in zip(gradient(f, *inputs), numeric_gradient(f, *inputs)):
                torch.testing.assert_close(exact, numeric, atol=1e-6, rtol=1e-4)

    def test_ppo_policy_loss_token_by_token(self):
        mask, new = example()
        log_probs, old, advantages = 0.3 * new(), 0.3 * new(), new()
        loss, clip_fraction = rlhf.ppo_policy_loss(log_probs, old, advantages, mask, 0.2)
        terms, clipped = [], []
        for b, t in mask.nonzero().tolist():
            ratio, A = math.exp(log_probs[b, t] - old[b, t]), advantages[b, t].item()
            bounded = min(max(ratio, 0.8), 1.2)
            terms.append(min(ratio * A, bounded * A))
            clipped.append((A > 0 and ratio > 1.2) or (A < 0 and ratio < 0.8))
        self.assertAlmostEqual(loss.item(), -sum(terms) / len(terms), places=10)
        self.assertAlmostEqual(clip_fraction.item(), sum(clipped) / len(clipped), places=10)
        self.assertTrue(0 < sum(clipped) < len(clipped))

    def test_value_loss_token_by_token(self):
        mask, new = example()
        values, old, returns = new(), new(), new()
        terms = []
        for b, t in mask.nonzero().tolist():
            v, v0, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
            bounded = min(max(v, v0 - 0.2), v0 + 0.2)
            terms.append(0.5 * max((v - r) ** 2, (bounded - r) ** 2))
        self.assertAlmostEqual(rlhf.value_loss(values, old, returns, mask, 0.2).item(), sum(terms) / len(terms), places=10)

    def test_masked_mean_and_whiten(self):
        mask, new = example()
        x = new() * 3 + 5
        real = x[mask]
        self.assertAlmostEqual(rlhf.masked_mean(x, mask).item(), real.mean().item(), places=10)
        torch.testing.assert_close(rlhf.masked_mean(x, mask, dim=1), torch.stack([x[b][mask[b]].mean() for b in range(4)]))
        self.assertEqual(rlhf.masked_mean(x, torch.zeros_like(mask)).item(), 0.0)
        white = rlhf.masked_whiten(x, mask)
        self.assertAlmostEqual(white[mask].mean().item(), 0.0, places=7)
        self.assertAlmostEqual(white[mask].std(unbiased=False).item(), 1.0, places=6)
        self.assertTrue((white[~mask] == 0).all())
        constant = rlhf.masked_whiten(torch.full((4, 9), 0.3), mask)
        self.assertLess(constant.abs().max().item(), 1e-2)  # rounding errors are not blown up
        kept = rlhf.masked_whiten(x, mask, shift_mean=False)[mask]
        self.assertAlmostEqual(kept.mean().item(), real.mean().item(), places=7)
        self.assertAlmostEqual(kept.std(unbiased=False).item(), 1.0, places=6)

    def test_kl_estimates_meet_the_exact_kl(self):
        logits = torch.tensor([[0.1, 1.0, -0.5, 0.3], [0.4, 0.2, 0.1, -0.2]], dtype=torch.double)
        log_p, log_q = logits.log_softmax(-1)
        exact = (log_p.exp() * (log_p - log_q)).sum()
        mean = {kind: (log_p.exp() * rlhf.kl_estimate(log_p, log_q, kind)).sum() for kind in ("k1", "k2", "k3")}
        self.assertAlmostEqual(mean["k1"].item(), exact.item(), places=10)  # unbiased
        self.assertAlmostEqual(mean["k3"].item(), exact.item(), places=10)  # unbiased
        self.assertAlmostEqual(mean["k2"].item(), (log_p.exp() * (log_p - log_q) ** 2 / 2).sum().item(), places=10)
        self.assertTrue((rlhf.kl_estimate(log_p, log_q, "k3") >= 0).all())
        self.assertRaisesRegex(ValueError, "must be k1, k2 or k3", rlhf.kl_estimate, log_p, log_q, "k4")

    def test_reward_loss_is_bradley_terry(self):
        chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 1.5])
        p = [1 / (1 + math.exp(-(c - r - 0.3))) for c, r in ((2.0, 1.0), (0.5, 1.5))]
        self.assertAlmostEqual(rlhf.reward_loss(chosen, rejected, 0.3).item(), -sum(map(math.log, p)) / 2, places=6)

    def test_dpo_loss_is_bradley_terry_of_implicit_rewards(self):
        chosen, rejected, ref_chosen, ref_rejected = inputs = [torch.randn(6, dtype=torch.double) * 5 for _ in range(4)]
        expected = 0.0
        for c, r, rc, rr in zip(*(x.tolist() for x in inputs)):
            expected -= math.log(1 / (1 + math.exp(-0.3 * ((c - rc) - (r - rr))))) / 6
        self.assertAlmostEqual(rlhf.dpo_loss(*inputs, beta=0.3).item(), expected, places=9)
        self.assertAlmostEqual(rlhf.dpo_loss(chosen, rejected, chosen, rejected).item(), math.log(2), places=9)
        loss = lambda c, r: rlhf.dpo_loss(c, r, ref_chosen, ref_rejected, beta=0.3)
        for ours, theirs in zip(gradient(loss, chosen, rejected), numeric_gradient(loss, chosen, rejected)):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)

    def test_group_advantages_one_by_one(self):
        scores = torch.randn(12, dtype=torch.double)
        for k in (2, 3, 4, 12):
            for i, s in enumerate(scores.tolist()):
                group = scores.tolist()[i - i % k:i - i % k + k]
                others = [x for j, x in enumerate(group) if j != i % k]
                self.assertAlmostEqual(rlhf.rloo_advantages(scores, k)[i].item(), s - sum(others) / len(others), places=9)
                self.assertAlmostEqual(rlhf.grpo_advantages(scores, k)[i].item(), (s - statistics.mean(group)) / statistics.stdev(group), places=5)
        for same in (1.0, 0.3, 100.3):  # a mean of 32-bit numbers is not quite the number
            self.assertEqual(rlhf.grpo_advantages(torch.full((16,), same), 16).tolist(), [0.0] * 16)
        for k in (0, 1, 5):
            self.assertRaisesRegex(ValueError, f"group_size={k}", rlhf.rloo_advantages, scores, k)

    def test_junk_off_the_mask_reaches_no_value_and_no_gradient(self):
        mask, new = example()
        clean = [0.3 * new() for _ in range(3)]
        functions = (lambda x, y, z: rlhf.gae(x, y, mask)[0].sum() + rlhf.gae(x, y, mask)[1].sum(),
                     lambda x, y, z: rlhf.ppo_policy_loss(x, y, z, mask)[0],
                     lambda x, y, z: rlhf.value_loss(x, y, z, mask),
                     lambda x, y, z: (rlhf.masked_whiten(x, mask) * torch.where(mask, y, 0)).sum(),
                     lambda x, y, z: rlhf.masked_mean(x, mask))
        for junk in (math.nan, math.inf, -math.inf, 1e30):
            dirty = [torch.where(mask, x, junk) for x in clean]
            for f in functions:
                torch.testing.assert_close(f(*dirty), f(*clean))
                leaves = [[x.clone().requires_grad_() for x in xs] for xs in (dirty, clean)]
                found, expected = (torch.autograd.grad(f(*xs), xs, allow_unused=True, materialize_grads=True) for xs in leaves)
                for g, e in zip(found, expected):
                    torch.testing.assert_close(g, e)


class TestModels(unittest.TestCase):

    def test_reward_is_read_at_the_last_real_token(self):
        model = RewardModel.from_gpt(tiny_gpt())
        rows = [torch.randint(11, (n,)) for n in (6, 2, 4)]
        alone = torch.cat([model(row[None]) for row in rows])
        for left in (True, False):
            pad = lambda x: torch.nn.functional.pad(x, (6 - len(x), 0) if left else (0, 6 - len(x)))
            together = model(torch.stack([pad(r) for r in rows]), torch.stack([pad(torch.ones_like(r)) for r in rows]))
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)

    def test_heads(self):
        gpt = tiny_gpt(n_embd=64)
        idx = torch.randint(11, (2, 5))
        self.assertEqual(ValueModel.from_gpt(gpt)(idx).tolist(), torch.zeros(2, 5).tolist())
        weights = torch.cat([RewardModel.from_gpt(gpt).head.weight.flatten() for _ in range(20)])
        self.assertAlmostEqual(weights.std().item(), 65 ** -0.5, delta=0.01)
        reward_model = RewardModel.from_gpt(gpt)  # a value function that starts as a reward model agrees with it on whole texts
        torch.testing.assert_close(ValueModel.from_gpt(reward_model)(idx)[:, -1], reward_model(idx))

    def test_normalized_on_reference_texts(self):
        model, idx = RewardModel.from_gpt(tiny_gpt()), torch.randint(11, (50, 6))
        before = model(idx)
        model.normalize(before)
        torch.testing.assert_close(model(idx), before - before.mean(), atol=1e-5, rtol=0)
        model.normalize(model(idx), unit_variance=True)
        torch.testing.assert_close(model(idx), (before - before.mean()) / before.std(unbiased=False), atol=1e-4, rtol=0)

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
        self.assertIsNone(rlhf.needed(idx, mask))
        hole = torch.tensor([[True] * 2 + [False] * 2 + [True] * 4] * 3)  # as behind a prompt that was padded on the right
        for other in (mask.flip(1), hole, mask[:, :4], mask[:1]):
            self.assertIs(rlhf.needed(idx, other), other)
        torch.testing.assert_close(model(idx, mask), torch.cat([model(row[keep][None]) for row, keep in zip(idx, mask)]))


ROWS = [{"prompt": "ab", "chosen": "cd", "rejected": "cdefg"}, {"prompt": "abcde", "chosen": "f", "rejected": "ga"}, {"chosen": "a", "rejected": "bc"}]


class TestComparisons(TempDirTestCase):
    """Learning from what people chose and wrote."""

    def test_read_jsonl(self):
        path = self.folder / "rows.jsonl"
        path.write_text("\n\n".join(json.dumps({**row, "more": 1}) for row in ROWS[:2]), encoding="utf-8-sig")
        self.assertEqual([row["rejected"] for row in read_jsonl(path, "prompt", "chosen", "rejected")], ["cdefg", "ga"])
        for line in ("{", "3", '{"prompt": "a", "chosen": "b"}', '{"prompt": "a", "chosen": "b", "rejected": 3}'):
            path.write_text(json.dumps(ROWS[0]) + "\n" + line)
            self.assertRaisesRegex(ValueError, "rows.jsonl, line 2: must be JSON like {.prompt", read_jsonl, path, "prompt", "chosen", "rejected")

    def test_comparison_and_dpo_losses_row_by_row(self):
        tokenizer, reward_model, policy, reference = CharTokenizer("abcdefghij"), RewardModel.from_gpt(tiny_gpt()), tiny_gpt(1), tiny_gpt(2)
        data = Comparisons(ROWS, tokenizer, 12)
        batch = Comparisons.collate([data[i] for i in range(3)])
        reward, implicit = 0.0, 0.0
        for row in ROWS:
            prompt, r, rho = tokenizer.encode(row.get("prompt", "")) or [10], [], []
            for name in ("chosen", "rejected"):
                ids = [*prompt, *tokenizer.encode(row[name]), 10]
                r.append(reward_model(torch.tensor([ids])).item())
                log_ratio = policy.log_probs(torch.tensor([ids])) - reference.log_probs(torch.tensor([ids]))
                rho.append(0.3 * log_ratio[0, len(prompt) - 1:].sum().item())
            reward, implicit = (total - math.log(1 / (1 + math.exp(y - x))) / 3 for total, (x, y) in ((reward, r), (implicit, rho)))
        self.assertAlmostEqual(rlhf.comparison_loss(reward_model, batch)[0].item(), reward, places=5)
        self.assertAlmostEqual(DPOLoss(reference, 0.3)(ActorCritic(policy), batch)[0].item(), implicit, places=5)
        self.assertRaisesRegex(ValueError, "row 0 has 8 tokens.*takes 7", Comparisons, ROWS, tokenizer, 7)

    def test_learn_from_comparisons(self):
        tokenizer = CharTokenizer("abcdefghij")
        rows = [{"chosen": "a" * (1 + i % 3), "rejected": "b" * (1 + i % 2)} for i in range(16)]
        reward_model, policy = RewardModel.from_gpt(tiny_gpt()), tiny_gpt()
        for model, loss_fn in ((reward_model, rlhf.comparison_loss), (ActorCritic(policy), DPOLoss(tiny_gpt()))):
            C = Trainer.get_default_config()
            C.merge_from_dict({"device": "cpu", "max_iters": 30, "batch_size": 16, "learning_rate": 1e-2, "micro_batch_size": 5})
            trainer = Trainer(C, model, Comparisons(rows, tokenizer, 12), loss_fn=loss_fn, collate_fn=Comparisons.collate)
            trainer.run()
            self.assertLess(trainer.metrics["loss"], 0.3)
            self.assertEqual(trainer.metrics["accuracy"], 1.0)

    def test_the_loss_of_demonstrations_is_the_completions(self):
        tokenizer, model = CharTokenizer("abcdefghij"), tiny_gpt()
        data = Completions([{"prompt": "abc", "completion": "de"}, {"text": "fghij"}], tokenizer, 12)
        batch = Completions.collate([data[0], data[1]])
        log_probs = [model.log_probs(torch.tensor([[*prompt, *completion, 10]]))[0, len(prompt) - 1:]
                     for prompt, completion in (([0, 1, 2], [3, 4]), ([10], [5, 6, 7, 8, 9]))]
        torch.testing.assert_close(model(*batch)[1], -torch.cat(log_probs).mean())
        self.assertEqual(Completions.weight(batch), 3 + 6)


def count_token(token):
    """A reward function: the share of the completion that is `token`."""
    return lambda idx, attention_mask, completion_mask: (((idx == token) & completion_mask).sum(1) / 8).float()


def ppo_config(**options):
    config = PPOTrainer.get_default_config()
    config.merge_from_dict({"device": "cpu", "batch_size": 16, "max_new_tokens": 8, "stop_token": 0, "max_iters": 3,
                            "learning_rate": 3e-3, **options})
    return config


def train(policy, prompts=([1],), **options):
    """The rows of metrics of a run that rewards 3s."""
    trainer, rows = PPOTrainer(ppo_config(**options), policy, count_token(3), prompts), []
    trainer.add_callback("on_log", lambda trainer: rows.append(trainer.metrics))
    trainer.run()
    return rows


class TestPPOTrainer(TempDirTestCase):

    def rollout(self, prompts, reward=count_token(3), **options):
        set_seed(0)
        trainer = PPOTrainer(ppo_config(**options), tiny_gpt(), reward, prompts)
        return trainer, trainer.rollout(*rlhf.left_pad([torch.tensor(p) for p in prompts] * 8))

    def test_masks_of_a_rollout(self):
        trainer, r = self.rollout([[1], [4, 0, 5]])  # the 0, a stop token, in a prompt means nothing
        shifted = r["mask"]
        for b, row in enumerate(r["idx"].tolist()):
            prompt = [1] if b % 2 == 0 else [4, 0, 5]
            self.assertEqual(row[:3], [0] * (3 - len(prompt)) + prompt)
            new = row[3:]
            n = new.index(0) + 1 if 0 in new else len(new)
            self.assertEqual(r["attention_mask"][b].tolist(), [i >= 3 - len(prompt) and i < 3 + n for i in range(len(row))])
            self.assertEqual(shifted[b].tolist(), [2 <= t < 2 + n for t in range(len(row) - 1)])
        for name in ("kl", "old_values", "returns", "advantages"):
            self.assertTrue((r[name][~shifted] == 0).all(), name)
        self.assertTrue((~shifted[:, 2:]).any())  # some did stop early

    def test_what_follows_the_stop_token_changes_no_loss(self):
        for algorithm in ("ppo", "grpo"):
            self.follows_the_stop_token(*self.rollout([[1], [4, 2, 5]], algorithm=algorithm))

    def follows_the_stop_token(self, trainer, r):
        behind = ~r["attention_mask"]
        behind[:, :3] = False  # what follows, not the padding in front of the prompt
        self.assertTrue(behind.any())
        changed = {**r, "idx": torch.where(behind, 9, r["idx"])}
        for name in ("old_log_probs", "ref_log_probs", "old_values", "returns", "advantages"):
            changed[name] = torch.where(r["mask"], r[name], math.nan)
        gradients = []
        for batch in (r, changed):
            trainer.model.zero_grad()
            loss, metrics = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            gradients.append([loss.detach(), *(p.grad.clone() for p in trainer.model.parameters())])
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)

    def test_score_stands_on_the_last_token(self):
        reward = lambda idx, attention_mask, completion_mask: torch.arange(16.0)
        trainer, r = self.rollout([[1], [4, 2, 5]], reward, kl_coef=0.0, gae_lambda=1.0)
        for b in range(16):  # without KL, every step returns the score
            self.assertTrue(torch.allclose(r["returns"][b][r["mask"][b]], torch.tensor(float(b))))

    def test_kl_shaped_reward(self):
        set_seed(0)
        policy, reference = tiny_gpt(1), tiny_gpt(2)
        trainer = PPOTrainer(ppo_config(kl_coef=0.3, gae_lambda=1.0), policy, count_token(3), [[1]], ref_policy=reference)
        r = trainer.rollout(*rlhf.left_pad([torch.tensor([1])] * 16))
        log_ratio = policy.log_probs(r["idx"]) - reference.log_probs(r["idx"])
        for b in range(16):
            steps = r["mask"][b].nonzero()[:, 0].tolist()
            for t in steps:
                expected = r["scores"][b] - 0.3 * sum(log_ratio[b, s] for s in steps if s >= t)
                self.assertAlmostEqual(r["returns"][b, t].item(), expected.item(), places=4)
        self.assertGreater(r["kl"].sum(1).mean().item(), 0.1)

    def test_ratio_starts_at_one(self):
        for options in ({}, {"temperature": 0.7, "shared_trunk": True}, {"minibatch_size": 5, "ppo_epochs": 2}, {"micro_batch_size": 1},
                        {"precision": "bf16"}):
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
        for options in ({"whiten_rewards": True, "gae_lambda": 1.0}, {"algorithm": "reinforce"}, {"algorithm": "reinforce", "baseline": False}):
            _, r = self.rollout([[1], [4, 2, 5]], kl_coef=0.0, **options)
            rewards = [[0.0] * (len(steps) - 1) + [score] for steps, score in zip([row.nonzero() for row in r["mask"]], r["scores"].tolist())]
            if "whiten_rewards" in options:  # to unit variance, around the mean that they had
                flat = sum(rewards, [])
                mean, std = statistics.mean(flat), statistics.pstdev(flat)
                rewards = [[mean + (x - mean) / std for x in row] for row in rewards]
            returns = [sum(row[t:]) for row in rewards for t in range(len(row))]  # γ = λ = 1
            torch.testing.assert_close(r["returns"][r["mask"]], torch.tensor(returns), atol=1e-4, rtol=1e-4)
            mean, std = (statistics.mean(returns), statistics.pstdev(returns)) if options.get("baseline", True) else (0.0, 1.0)
            expected = [(x - mean) / std for x in returns]
            torch.testing.assert_close(r["advantages"][r["mask"]], torch.tensor(expected), atol=1e-3, rtol=1e-3)

    def test_missing_end_of_text(self):
        (_, free), (trainer, paid) = (self.rollout([[1], [4, 0, 5]], missing_eos_penalty=penalty) for penalty in (0.0, 0.7))
        ends = [0 in row[3:] for row in paid["idx"].tolist()]
        self.assertTrue(0 < sum(ends) < 16)
        self.assertEqual(paid["ended"].tolist(), ends)
        torch.testing.assert_close(free["scores"] - paid["scores"], torch.tensor([0.0 if end else 0.7 for end in ends]))

    def test_epochs_end_where_the_policy_went_too_far(self):
        for bound, steps in ((None, 16), (1e-6, 4), (1e3, 16)):  # four minibatches an epoch; after the first step the policy has moved
            trainer, r = self.rollout([[1], [4, 2, 5]], ppo_epochs=4, minibatch_size=4, approxkl_max=bound)
            with mock.patch.object(trainer, "optimizer_step", wraps=trainer.optimizer_step) as step:
                trainer.update(r)
            self.assertEqual(step.call_count, steps)

    def test_another_reference_policy_is_no_resume(self):
        for seed, iterations in ((1, 1), (1, 2), (2, 3)):
            trainer = PPOTrainer(ppo_config(work_dir=str(self.folder), max_iters=iterations), tiny_gpt(), count_token(3), [[1]], ref_policy=tiny_gpt(seed))
            if seed == 1:
                trainer.run()
        self.assertRaisesRegex(ValueError, "another reference policy", trainer.run)

    def test_a_reward_function_that_fails_loses_nothing(self):
        tokenizer, failing = CharTokenizer("abcdefghij"), []

        def reward(completions, prompts):
            if failing and any(len(completion) > 3 for completion in completions):
                raise KeyError("no network")
            return [len(completion) / 8 for completion in completions]

        def train(name, fail_after=None):
            set_seed(5)
            config = ppo_config(stop_token=None, max_iters=4, work_dir=str(self.folder / name))
            trainer = PPOTrainer(config, tiny_gpt(), TextReward(reward, tokenizer), ["ab", "cd"], tokenizer=tokenizer)
            trainer.add_callback("on_batch_end", lambda trainer: failing.append(trainer.iter_num) if trainer.iter_num == fail_after else None)
            trainer.run()
            return trainer

        whole = train("whole")
        with self.assertRaisesRegex(RewardError, r"KeyError: 'no network' -- for sample \d+, text '(ab|cd)\w{4,}") as raised:
            train("parts", fail_after=1)
        self.assertIsInstance(raised.exception.__cause__, KeyError)
        failing.clear()
        for a, b in zip(whole.model.parameters(), train("parts").model.parameters()):
            self.assertTrue(torch.equal(a, b))

    def test_any_policy_with_log_probs_and_generate(self):
        class Recurrent(torch.nn.Module):
            """A GRU that reads one token after the other."""

            def __init__(self):
                super().__init__()
                self.embedding, self.gru, self.head = torch.nn.Embedding(11, 16), torch.nn.GRU(16, 16, batch_first=True), torch.nn.Linear(16, 11)

            def next(self, idx, temperature):
                return (self.head(self.gru(self.embedding(idx))[0]) / temperature).log_softmax(-1)

            def log_probs(self, idx, attention_mask=None, temperature=1.0):
                return self.next(idx[:, :-1], temperature).gather(2, idx[:, 1:, None])[..., 0]

            def generate(self, idx, max_new_tokens, temperature, do_sample, attention_mask, stop_token, return_log_probs):
                log_probs = []
                for _ in range(max_new_tokens):
                    log_p = self.next(idx, temperature)[:, -1]
                    token = log_p.exp().multinomial(1)
                    idx, log_probs = torch.cat([idx, token], dim=1), [*log_probs, log_p.gather(1, token)]
                return idx, torch.cat(log_probs, dim=1)

        for algorithm in ("ppo", "rloo"):
            set_seed(1)
            policy = Recurrent()
            value_model = ValueModel.from_gpt(tiny_gpt()) if algorithm == "ppo" else None
            trainer = PPOTrainer(ppo_config(algorithm=algorithm, max_iters=40, kl_coef=0.0, learning_rate=2e-2, batch_size=32), policy, count_token(3),
                                 [[1]], value_model=value_model)
            first = trainer.rollout(*rlhf.left_pad([torch.tensor([1])] * 32))["scores"].mean()
            trainer.run()
            self.assertLess(trainer.metrics["log_prob_error"], 1e-4)
            self.assertGreater(trainer.metrics["objective/scores"], first + 0.4)

    def test_groups_share_a_prompt_and_their_advantages_follow_the_paper(self):
        for algorithm in ("rloo", "grpo"):
            policy, reference = tiny_gpt(seed=1), tiny_gpt(seed=2)
            trainer = PPOTrainer(ppo_config(algorithm=algorithm, group_size=2, batch_size=8, kl_coef=0.3), policy, count_token(3),
                                 [[i, i + 1] for i in range(8)], ref_policy=reference)
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
        policy, reference = tiny_gpt(seed=1), tiny_gpt(seed=2)
        trainer = PPOTrainer(ppo_config(algorithm="grpo", kl_coef=0.3), policy, count_token(3), [[1]], ref_policy=reference)
        r = trainer.rollout(*rlhf.left_pad([torch.tensor([1])] * 8))
        r["advantages"] = torch.zeros_like(r["kl"])  # leaves the penalty alone
        loss, _ = trainer.policy_and_value_loss(trainer.model, r)
        log_ratio = [(policy.log_probs(r["idx"]) - reference.log_probs(r["idx"]))[b, t].item() for b, t in r["mask"].nonzero().tolist()]
        expected = 0.3 * sum(math.exp(-x) - 1 + x for x in log_ratio) / len(log_ratio)
        self.assertAlmostEqual(loss.item(), expected, places=4)

    def test_kl_penalty_holds_the_policy_near_the_reference(self):
        free, held = (train(tiny_gpt(1), max_iters=25, batch_size=32, kl_coef=kl_coef)[-1]["objective/kl"] for kl_coef in (0.0, 1.0))
        self.assertLess(held, 0.5 * free)

    def test_a_reward_model_is_a_reward_function_without_dropout(self):
        reward_model = RewardModel.from_gpt(tiny_gpt(resid_pdrop=0.5, block_size=16)).train()
        trainer = PPOTrainer(ppo_config(), tiny_gpt(), reward_model, [[1], [4, 2]])
        r = trainer.rollout(*rlhf.left_pad([torch.tensor([1]), torch.tensor([4, 2])] * 4))
        alone = [reward_model(row[keep][None]).item() for row, keep in zip(r["idx"], r["attention_mask"])]
        torch.testing.assert_close(r["scores"], torch.tensor(alone), atol=1e-5, rtol=0)

    def test_the_optimizer_is_the_papers(self):
        trainer = PPOTrainer(ppo_config(learning_rate=0.01, value_lr_ratio=3.0, lr_schedule="linear", max_iters=4), tiny_gpt(), count_token(3), [[1]])
        rates = []
        trainer.add_callback("on_batch_end", lambda trainer: rates.append(sorted({group["lr"] for group in trainer.optimizer.param_groups})))
        trainer.run()
        self.assertEqual({(group["eps"], group["weight_decay"]) for group in trainer.optimizer.param_groups}, {(1e-5, 0.0)})
        for found, left in zip(rates, (1.0, 0.75, 0.5, 0.25)):
            self.assertEqual([round(rate, 9) for rate in found], [round(0.01 * left, 9), round(0.03 * left, 9)])

    def test_adaptive_kl_coef(self):
        trainer = PPOTrainer(ppo_config(max_iters=1, kl_coef=0.1, kl_target=5.0, kl_horizon=160), tiny_gpt(), count_token(3), [[1]])
        trainer.run()  # KL 0 is far below the target: the error is cut off at -0.2, and 16 of 160 episodes went by
        self.assertAlmostEqual(trainer.kl_coef, 0.1 * (1 - 0.2 * 16 / 160), places=6)

    def test_the_update_does_not_depend_on_the_micro_batch(self):
        weights = []
        for size in (None, 5, 1):
            train(policy := tiny_gpt(3), [[1], [4, 2, 5]], micro_batch_size=size, max_iters=2, learning_rate=1e-2, eps=1e-3)
            weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
        for other in weights[1:]:
            torch.testing.assert_close(other, weights[0], atol=1e-4, rtol=0)

    def test_resume_is_exact(self):
        def train(folder, until):
            set_seed(5)
            trainer = PPOTrainer(ppo_config(work_dir=str(folder), max_iters=until, kl_target=1.0), tiny_gpt(), count_token(3),
                                 [[1], [4, 2, 5], [7, 7]])
            trainer.run()
            return trainer

        whole = train(self.folder / "whole", 6)
        for until in (2, 5, 6):
            resumed = train(self.folder / "parts", until)
        for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
            self.assertTrue(torch.equal(a, b), name)
        self.assertEqual(whole.kl_coef, resumed.kl_coef)
        timeless = lambda folder: [{k: v for k, v in row.items() if k not in ("seconds", "tokens/s")} for row in read_metrics(folder / "metrics.jsonl")]
        self.assertEqual(timeless(self.folder / "whole"), timeless(self.folder / "parts"))

    def test_text_reward_and_text_prompts(self):
        tokenizer = CharTokenizer("abcdefghij")  # its end of text is id 10
        seen = []

        reward = lambda completions, prompts: seen.extend(zip(prompts, completions)) or [float(len(c)) for c in completions]
        trainer = PPOTrainer(ppo_config(stop_token=None, max_iters=1, batch_size=4), tiny_gpt(), TextReward(reward, tokenizer),
                             ["ab", "cde"], tokenizer=tokenizer)
        trainer.run()
        self.assertEqual(trainer.stop_token, 10)
        self.assertEqual({prompt for prompt, _ in seen}, {"ab", "cde"})
        self.assertTrue(all(set(completion) <= set("abcdefghij") for _, completion in seen))

    def test_bad_rewards_and_prompts(self):
        for words, reward in (("shape \\(16,\\)", lambda *_: torch.zeros(3)), ("not list", lambda *_: [0.0] * 16),
                              ("gave nan to sample 4", lambda *_: torch.tensor([0.0] * 4 + [math.nan] * 12))):
            self.assertRaisesRegex(RewardError, words, PPOTrainer(ppo_config(), tiny_gpt(), reward, [[1]]).run)
        for words, prompts in (("is text", ["hello"]), ("one token or more", [[]]), ("empty", [])):
            self.assertRaisesRegex(ValueError, words, PPOTrainer, ppo_config(), tiny_gpt(), count_token(3), prompts)
        for words, options in (("clip_range=-0.2", {"clip_range": -0.2}), ("minibatch_size=0", {"minibatch_size": 0}),
                               ("kl_target=0", {"kl_target": 0}), ("gamma=1.5", {"gamma": 1.5}), ("ppo_epochs=0", {"ppo_epochs": 0}),
                               ("do not fit into the policy's block_size=12", {"max_new_tokens": 13})):
            self.assertRaisesRegex(ValueError, words, train, tiny_gpt(), **options)
        with self.assertRaisesRegex(ValueError, "is no GPT to make a value function from"):
            PPOTrainer(ppo_config(), torch.nn.Linear(1, 1), count_token(3), [[1]])
        self.assertRaisesRegex(ValueError, "must be ppo, reinforce, rloo or grpo", train, tiny_gpt(), algorithm="a2c")
        for options in ({"algorithm": "rloo"}, {"shared_trunk": True}):
            with self.assertRaisesRegex(ValueError, "has no use for a value_model|does not go with a value_model"):
                PPOTrainer(ppo_config(**options), tiny_gpt(), count_token(3), [[1]], value_model=ValueModel.from_gpt(tiny_gpt()))
        with self.assertRaisesRegex(ValueError, "ref_policy is the policy itself"):
            PPOTrainer(ppo_config(), policy := tiny_gpt(), count_token(3), [[1]], ref_policy=policy)
