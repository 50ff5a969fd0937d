"""The GPT against a loop written from the papers' equations, and against itself: padding, cache, windows, stops."""

import math
import unittest

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mingpt.datasets import pad, pad_and_mask
from mingpt.model import GPT, PRESETS, KVCache, next_token_log_probs
from tests.common import tiny_gpt


def slow_logits(model, tokens):
    """GPT-2's equations for one row of ids, a query, a head and a layer at a time."""
    w = {name: p.detach().double() for name, p in model.state_dict().items()}
    n_head, n_embd = model.config.n_head, model.config.n_embd
    hs = n_embd // n_head

    def layer_norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x = torch.stack([w["transformer.wte.weight"][i] + w["transformer.wpe.weight"][t] for t, i in enumerate(tokens)])
    for layer in range(model.config.n_layer):
        name = f"transformer.h.{layer}"
        qkv = linear(layer_norm(x, name + ".ln_1"), name + ".attn.c_attn")
        heads = torch.zeros_like(x)
        for h in range(n_head):
            q, k, v = (qkv[:, part * n_embd + h * hs:part * n_embd + (h + 1) * hs] for part in range(3))
            for t in range(len(tokens)):
                weights = torch.softmax(torch.stack([q[t] @ k[s] / math.sqrt(hs) for s in range(t + 1)]), 0)
                heads[t, h * hs:(h + 1) * hs] = sum(weights[s] * v[s] for s in range(t + 1))
        x = x + linear(heads, name + ".attn.c_proj")
        u = linear(layer_norm(x, name + ".ln_2"), name + ".mlp.c_fc")
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        x = x + linear(u, name + ".mlp.c_proj")
    return layer_norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def next_distribution(model, idx):
    """The model's probabilities behind idx (1, T), computed from nothing but forward on the last block_size tokens."""
    return model(idx[:, -model.config.block_size:])[0][:, -1].softmax(-1)


class TestForward(unittest.TestCase):
    def test_logits_and_loss_follow_the_equations(self):
        for tied in (True, False):
            model = tiny_gpt(tie_weights=tied)
            self.assertEqual(model.lm_head.weight is model.transformer.wte.weight, tied)
            idx, targets = torch.randint(11, (2, 3, 9))
            targets[0, :4] = -1
            logits, loss = model(idx, targets)
            expected = torch.stack([slow_logits(model, row.tolist()) for row in idx])
            torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)
            log_p = expected.log_softmax(-1)
            terms = [-log_p[b, t, targets[b, t]] for b in range(3) for t in range(9) if targets[b, t] >= 0]
            self.assertAlmostEqual(loss.item(), (sum(terms) / len(terms)).item(), places=4)
            self.assertIsNone(model(idx)[1])

    def test_initialisation_and_size_of_gpt2(self):
        config = GPT.get_default_config()
        config.merge_from_dict({"model_type": "gpt2", "vocab_size": 50257, "block_size": 1024})
        with torch.device("meta"):
            self.assertEqual(sum(p.numel() for p in GPT(config).parameters()), 124_439_808)  # GPT-2 small, as published
        config.merge_from_dict({"model_type": "gpt-micro", "vocab_size": 96, "block_size": 64})
        std = {name: p.std().item() for name, p in GPT(config).named_parameters()}
        self.assertAlmostEqual(std["transformer.h.0.attn.c_attn.weight"], 0.02, delta=0.001)
        self.assertAlmostEqual(std["transformer.h.3.mlp.c_proj.weight"], 0.02 / math.sqrt(8), delta=0.0005)

    def test_padding_on_either_side_changes_no_row_and_gets_no_gradient(self):
        model, rows = tiny_gpt(), [torch.randint(11, (n,)) for n in (7, 3, 1, 5)]
        for left in (True, False):
            idx, mask = pad(rows, 5, left), pad([torch.ones_like(row) for row in rows], 0, left)
            logits, _ = model(idx, attention_mask=mask)
            log_probs = model.log_probs(idx, mask)
            for b, row in enumerate(rows):
                start = 7 - len(row) if left else 0
                torch.testing.assert_close(logits[b, start:start + len(row)], model(row[None])[0][0], atol=1e-5, rtol=0)
                if len(row) > 1:
                    torch.testing.assert_close(log_probs[b, start:start + len(row) - 1], model.log_probs(row[None])[0], atol=1e-5, rtol=0)
            self.assertTrue(torch.isfinite(logits).all() and torch.isfinite(log_probs).all())
        idx, mask = torch.tensor([[9, 9, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1, 1]])
        masked = model.log_probs(idx, mask) * mask[:, 1:] * mask[:, :-1]
        gradients = [torch.autograd.grad(x.sum(), list(model.parameters())) for x in (masked, model.log_probs(idx[:, 2:]))]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)

    def test_log_probs_are_those_of_the_softmax(self):
        model, idx = tiny_gpt(), torch.randint(11, (2, 13))  # one more than block_size: the last token is only predicted
        expected = (model(idx[:, :-1])[0] / 0.7).softmax(-1).log().gather(2, idx[:, 1:, None])[:, :, 0]
        torch.testing.assert_close(model.log_probs(idx, temperature=0.7), expected, atol=5e-6, rtol=0)

    def test_cache_equals_the_whole(self):
        model, idx = tiny_gpt(), torch.randint(11, (2, 10))
        cache = KVCache(model.config, 2, 12, like=model.lm_head.weight)
        pieces = [model(piece, cache=cache)[0] for piece in idx.split([4, 3, 1, 2], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(idx)[0], atol=1e-5, rtol=0)


class TestGenerate(unittest.TestCase):
    def test_greedy_equals_recomputing_also_past_block_size(self):
        model, idx = tiny_gpt(), torch.randint(11, (3, 4))
        expected = idx
        for _ in range(20):
            best = [next_distribution(model, row[None]).argmax(-1, keepdim=True) for row in expected]
            expected = torch.cat([expected, torch.cat(best)], 1)
        self.assertEqual(model.generate(idx, 20).tolist(), expected.tolist())

    def test_a_row_does_not_depend_on_its_neighbours_or_padding(self):
        model, rows = tiny_gpt(), [torch.randint(11, (n,)) for n in (5, 2, 1)]
        for left in (True, False):
            idx, mask = pad_and_mask(rows, left)
            for row, new in zip(rows, model.generate(idx, 7, attention_mask=mask)[:, 5:]):
                self.assertEqual(new.tolist(), model.generate(row[None], 7)[0, len(row):].tolist())

    def test_rows_stop_one_by_one_and_only_at_generated_stops(self):
        model, idx = tiny_gpt(1), torch.randint(11, (40, 2))
        stop = model.generate(idx, 10, do_sample=True, generator=torch.Generator().manual_seed(0))[0, 5].item()
        idx[3, 0] = stop  # in the prompt it means nothing
        generator, lengths = torch.Generator().manual_seed(1), set()
        out, log_probs = model.generate(idx, 10, do_sample=True, stop_token=stop, return_log_probs=True, generator=generator)
        for row, lp in zip(out[:, 2:].tolist(), log_probs):
            n = row.index(stop) + 1 if stop in row else len(row)
            self.assertEqual(set(row[n:]) | {stop}, {stop})
            self.assertTrue((lp[:n] < 0).all() and (lp[n:] == 0).all())
            lengths.add(n)
        self.assertGreater(len(lengths), 3)

    def test_recorded_log_probs_equal_recomputed_ones(self):
        model, idx = tiny_gpt(), torch.randint(11, (3, 3))
        mask = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]])
        out, log_probs = model.generate(idx, 9, temperature=1.3, do_sample=True, attention_mask=mask, return_log_probs=True)
        recomputed = model.log_probs(out, F.pad(mask, (0, 9), value=1), temperature=1.3)[:, 2:]
        torch.testing.assert_close(log_probs, recomputed, atol=1e-5, rtol=0)

    def test_samples_have_the_distribution_they_claim(self):
        model, start = tiny_gpt(), torch.tensor([[3, 1, 4]])
        p = next_distribution(model, start)[0]
        for options in ({}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 2.0}):
            out, log_probs = model.generate(start.expand(4000, -1), 1, do_sample=True, return_log_probs=True, **options,
                                            generator=torch.Generator().manual_seed(0))
            q = p ** (1 / options.get("temperature", 1))
            order = q.argsort(descending=True)
            # the shortest prefix that reaches top_p
            n = options.get("top_k") or next(k for k in range(1, 12) if k == 11 or p[order[:k]].sum() >= options.get("top_p", 1.0))
            q[order[n:]] = 0
            q /= q.sum()
            counts = torch.bincount(out[:, 3], minlength=11)
            self.assertTrue((counts[q == 0] == 0).all())
            tolerance = 4 * (q * (1 - q) / 4000).sqrt() + 1e-6
            self.assertTrue(((counts / 4000 - q).abs() <= tolerance).all(), (options, counts, q))
            torch.testing.assert_close(log_probs[:, 0], q[out[:, 3]].log(), atol=1e-4, rtol=0)

    def test_greedy_is_the_limit_of_every_filter(self):
        logits = torch.randn(5, 11)
        for log_p in (next_token_log_probs(logits, top_k=1), next_token_log_probs(logits, top_p=1e-9)):
            self.assertEqual(log_p.argmax(1).tolist(), logits.argmax(1).tolist())
            self.assertTrue(((log_p == 0).sum(1) == 1).all())

    def test_the_unembeddings_gradients_are_those_of_a_linear_layer(self):
        tied, idx = tiny_gpt(), torch.randint(11, (3, 9))
        gradient = lambda value: torch.autograd.grad(value, list(tied.parameters()))
        logits = F.linear(tied.transformer(idx[:, :-1]), tied.lm_head.weight)
        expected = gradient(F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()))
        loss = lambda: tied(idx[:, :-1], idx[:, 1:])[1]
        for value in (loss(), checkpoint(loss, use_reentrant=False)):
            torch.testing.assert_close(gradient(value), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = loss()
        for ours, theirs in zip(gradient(half), expected):
            self.assertEqual(ours.dtype, torch.float32)
            self.assertLess((ours - theirs).norm(), 0.05 * theirs.norm() + 1e-4)
        loss_of_row = lambda p, row: torch.func.functional_call(tied, p, (row[None, :-1], row[None, 1:]))[1]
        per_sample = torch.func.vmap(torch.func.grad(loss_of_row), in_dims=(None, 0))(dict(tied.named_parameters()), idx)
        torch.testing.assert_close(tuple(ours.mean(0) for ours in per_sample.values()), expected)


class TestBadInput(unittest.TestCase):
    def test_config(self):
        for options, words in (({"model_type": "gpt-nano"}, "not both"), ({"n_embd": None}, "all the others"), ({"n_embd": 15}, "not divisible"),
                               ({"vocab_size": 0}, "vocab_size=0"), ({"attn_pdrop": 1.5}, "attn_pdrop=1.5"), ({"embd_pdrop": 1.0}, "embd_pdrop=1.0"),
                               ({"model_type": "gpt-9", "n_layer": None, "n_head": None, "n_embd": None}, "unknown")):
            with self.subTest(options), self.assertRaisesRegex(ValueError, words):
                tiny_gpt(**options)
        self.assertIn("gpt2-xl", PRESETS)

    def test_forward_and_generate(self):
        model, idx = tiny_gpt(), torch.ones(2, 4, dtype=torch.long)
        mask = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])
        for words, call in (
            ("longer than block_size=12", lambda: model(torch.ones(1, 13, dtype=torch.long))),
            ("must be \\(B, T\\)", lambda: model(idx[0])), ("must be equal", lambda: model(idx, targets=idx[:, :3])),
            ("ids from -1 to 1; the vocabulary has 0 to 10", lambda: model(torch.tensor([[1, -1]]))),
            ("must be \\(2, 4\\)", lambda: model(idx, attention_mask=mask[:, :3])), ("the vocabulary has 0 to 10", lambda: model.generate(idx + 10, 1)),
            ("with T >= 1", lambda: model.generate(idx[:, :0], 1)), ("LongTensor", lambda: model.generate(idx.float(), 1)),
            ("a real token in every row", lambda: model.generate(idx, 1, attention_mask=mask)),
            ("do not fit into", lambda: model.generate(idx, 10, attention_mask=mask.flip(0) | mask)),
            ("two tokens or more", lambda: model.log_probs(idx[:, :1])), ("temperature=-1", lambda: model.log_probs(idx, temperature=-1)),
        ):
            with self.subTest(words), self.assertRaisesRegex(ValueError, words):
                call()
        for name, value in (("temperature", 0), ("top_k", 0), ("top_k", 12), ("top_p", 0), ("top_p", 1.1), ("stop_token", 11), ("max_new_tokens", 0)):
            self.assertRaisesRegex(ValueError, f"{name}={value}", model.generate, idx, **{"max_new_tokens": 1, name: value})
