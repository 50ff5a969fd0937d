"""The GPT against loops written from the papers' equations, and against itself.

Against itself: padding, cache, sliding window, streaming and stop tokens must change no number.
"""

import inspect
import math
import unittest

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import TopPLogitsWarper

from mingpt.model import GPT, PRESETS, draw, next_token_log_probs, nucleus
from mingpt.unembed import LARGE_VOCABULARY
from tests.common import tiny_gpt


def slow_layer_norm(x, weights, name):
    """LayerNorm (Ba et al. 2016), written out: (T, C) -> (T, C)."""
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, unbiased=False, keepdim=True)
    x = (x - mean) / (variance + 1e-5).sqrt()
    return x * weights[name + ".weight"] + weights[name + ".bias"]


def slow_linear(x, weights, name):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def slow_attention(x, weights, name, n_head):
    """Causal attention (Vaswani et al. 2017, equation 1), a head and a query at a time."""
    T, n_embd = x.shape
    hs = n_embd // n_head
    q_all, k_all, v_all = slow_linear(x, weights, name + ".c_attn").split(n_embd, dim=1)
    heads = torch.zeros_like(x)
    for head in range(n_head):
        columns = slice(head * hs, (head + 1) * hs)
        q, k, v = q_all[:, columns], k_all[:, columns], v_all[:, columns]
        for t in range(T):
            scores = torch.stack([q[t] @ k[s] / math.sqrt(hs) for s in range(t + 1)])
            attention = torch.softmax(scores, 0)
            heads[t, columns] = sum(attention[s] * v[s] for s in range(t + 1))
    return slow_linear(heads, weights, name + ".c_proj")


def slow_mlp(x, weights, name):
    u = slow_linear(x, weights, name + ".c_fc")
    u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return slow_linear(u, weights, name + ".c_proj")


def slow_logits(model, tokens):
    """GPT-2's equations for one row of token ids, in double precision: (T, V)."""
    weights = {name: p.detach().double() for name, p in model.state_dict().items()}
    x = torch.stack(
        [
            weights["transformer.wte.weight"][token] + weights["transformer.wpe.weight"][t]
            for t, token in enumerate(tokens)
        ]
    )
    for layer in range(model.config.n_layer):
        name = f"transformer.h.{layer}"
        normed = slow_layer_norm(x, weights, name + ".ln_1")
        x = x + slow_attention(normed, weights, name + ".attn", model.config.n_head)
        normed = slow_layer_norm(x, weights, name + ".ln_2")
        x = x + slow_mlp(normed, weights, name + ".mlp")
    x = slow_layer_norm(x, weights, "transformer.ln_f")
    return x @ weights["lm_head.weight"].T


def next_distribution(model, idx):
    """p(next token) after idx (1, T), from nothing but forward on the last block_size tokens."""
    logits, _ = model(idx[:, -model.config.block_size:])
    return logits[:, -1].softmax(-1)


def slow_greedy(model, idx, max_new_tokens, stops=()):
    """Greedy decoding of idx (B, T), a row at a time: forward, argmax, append, all anew each time.

    A row that generates one of the stops is filled with it. Returns lists of ids.
    """
    rows = []
    for row in idx:
        tokens = row[None]
        new = None
        for _ in range(max_new_tokens):
            if new not in stops:
                new = next_distribution(model, tokens).argmax().item()
            tokens = torch.cat([tokens, torch.tensor([[new]])], dim=1)
        rows.append(tokens[0].tolist())
    return rows


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class TestForward(unittest.TestCase):
    def test_logits_and_loss_follow_the_equations(self):
        for tied in (True, False):
            with self.subTest(tied=tied):
                model = tiny_gpt(tie_weights=tied)
                self.assertEqual(model.lm_head.weight is model.transformer.wte.weight, tied)
                idx, targets = torch.randint(11, (2, 3, 9))
                targets[0, :4] = -1
                logits, loss = model(idx, targets)
                expected = torch.stack([slow_logits(model, row.tolist()) for row in idx])
                torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)
                log_p = expected.log_softmax(-1)
                terms = []
                for b in range(3):
                    for t in range(9):
                        if targets[b, t] >= 0:
                            terms.append(-log_p[b, t, targets[b, t]])
                mean = sum(terms) / len(terms)
                self.assertAlmostEqual(loss.item(), mean.item(), places=4)

    def test_without_targets_there_is_no_loss(self):
        self.assertIsNone(tiny_gpt()(torch.randint(11, (3, 9)))[1])

    def test_gpt2_has_as_many_parameters_as_published(self):
        config = GPT.get_default_config()
        config.merge_from_dict({"model_type": "gpt2", "vocab_size": 50257, "block_size": 1024})
        with torch.device("meta"):
            model = GPT(config)
        self.assertEqual(sum(p.numel() for p in model.parameters()), 124_439_808)

    def test_initialisation_is_smaller_for_residual_projections(self):
        config = GPT.get_default_config()
        config.merge_from_dict({"model_type": "gpt-micro", "vocab_size": 96, "block_size": 64})
        std = {name: p.std().item() for name, p in GPT(config).named_parameters()}
        self.assertAlmostEqual(std["transformer.h.0.attn.c_attn.weight"], 0.02, delta=0.001)
        scaled = 0.02 / math.sqrt(8)  # 4 layers, two residual projections each
        self.assertAlmostEqual(std["transformer.h.3.mlp.c_proj.weight"], scaled, delta=0.0005)

    def test_a_new_cache_has_the_trunks_type_and_room_for_max_length(self):
        cache = tiny_gpt().bfloat16().transformer.new_cache(3, 7)
        self.assertEqual(cache.length, 0)
        self.assertEqual((len(cache.keys), len(cache.values)), (2, 2))  # n_layer
        for tensor in cache.keys + cache.values:
            self.assertEqual(tensor.shape, (3, 2, 7, 8))  # (B, nh, max_length, hs)
            self.assertEqual(tensor.dtype, torch.bfloat16)


class TestUnembed(unittest.TestCase):
    """The tied head computes its gradients itself; they must be those of F.linear."""

    def setUp(self):
        self.model = tiny_gpt()
        self.idx = torch.randint(11, (3, 9))

    def loss(self):
        return self.model(self.idx[:, :-1], self.idx[:, 1:])[1]

    def gradients(self, loss):
        return torch.autograd.grad(loss, list(self.model.parameters()))

    def expected_gradients(self):
        hidden = self.model.transformer(self.idx[:, :-1])
        logits = F.linear(hidden, self.model.lm_head.weight)
        loss = F.cross_entropy(logits.flatten(0, 1), self.idx[:, 1:].flatten())
        return self.gradients(loss)

    def test_gradients_are_those_of_a_linear_layer(self):
        torch.testing.assert_close(self.gradients(self.loss()), self.expected_gradients())

    def test_gradients_under_activation_checkpointing(self):
        loss = checkpoint(self.loss, use_reentrant=False)
        torch.testing.assert_close(self.gradients(loss), self.expected_gradients())

    def test_gradients_under_autocast_are_close_and_in_full_precision(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.loss()
        for ours, expected in zip(self.gradients(loss), self.expected_gradients(), strict=True):
            self.assertEqual(ours.dtype, torch.float32)
            self.assertLess((ours - expected).norm(), 0.05 * expected.norm() + 1e-4)

    def test_gradients_per_example_with_torch_func(self):
        def loss_of_row(parameters, row):
            inputs = (row[None, :-1], row[None, 1:])
            return torch.func.functional_call(self.model, parameters, inputs)[1]

        parameters = dict(self.model.named_parameters())
        per_example = torch.func.vmap(torch.func.grad(loss_of_row), in_dims=(None, 0))
        gradients = per_example(parameters, self.idx)
        means = tuple(gradient.mean(0) for gradient in gradients.values())
        torch.testing.assert_close(means, self.expected_gradients())


class TestDraw(unittest.TestCase):
    """Drawing from a large vocabulary, which has a way of its own on a CPU."""

    def test_tokens_come_as_often_as_their_probabilities_say(self):
        V = LARGE_VOCABULARY + 1
        probs = torch.zeros(V)
        likely = torch.tensor([0, 17, V - 1])
        probs[likely] = torch.tensor([0.2, 0.5, 0.3])
        n = 20_000
        generator = torch.Generator().manual_seed(1)
        for rows in (100, n):
            tokens = torch.cat([draw(probs.expand(rows, V), generator) for _ in range(n // rows)])
            self.assertEqual(tokens.shape, (n, 1))
            counts = tokens.flatten().bincount(minlength=V)
            self.assertEqual(counts.nonzero().flatten().tolist(), likely.tolist())
            # The standard error of a frequency is at most 0.5 / sqrt(n).
            errors = (counts / n - probs).abs()
            self.assertLess(errors.max(), 4 * 0.5 / math.sqrt(n))

    def test_a_generator_repeats_itself(self):
        probs = torch.rand(5, LARGE_VOCABULARY + 1).softmax(1)
        first, second = (draw(probs, torch.Generator().manual_seed(3)) for _ in range(2))
        self.assertTrue(torch.equal(first, second))

    def test_nan_is_refused(self):
        for V in (5, LARGE_VOCABULARY + 1):
            with self.assertRaisesRegex(RuntimeError, "nan"):
                draw(torch.full((1, V), torch.nan), None)


class TestNucleus(unittest.TestCase):
    """top_p's tokens, of which few are sorted where the vocabulary is large."""

    SIZES = (11, LARGE_VOCABULARY + 1, 3 * LARGE_VOCABULARY)

    def test_it_is_transformers(self):
        torch.manual_seed(0)
        for V in self.SIZES:
            for top_p in (1e-9, 0.3, 0.9, 0.999):
                with self.subTest(V=V, top_p=top_p):
                    logits = torch.randn(6, V) * torch.tensor([0.5, 1, 2, 3, 5, 9])[:, None]
                    theirs = TopPLogitsWarper(top_p)(None, logits).isfinite()
                    kept = nucleus(logits.softmax(1), top_p)
                    self.assertTrue(kept.any(1).all())
                    # Sums of thousands of numbers round differently: a token at the edge may be
                    # in or out.
                    self.assertLessEqual((kept != theirs).sum(1).max(), V // 4096 + 1)

    def test_it_is_the_shortest_list_of_likely_tokens_that_reaches_p(self):
        for V in self.SIZES:
            with self.subTest(V=V):
                probs = torch.full((2, V), 0.25 / (V - 4))
                probs[0, [3, 1, 8, V - 1]] = torch.tensor([0.3, 0.2, 0.2, 0.05])
                probs[1, [V - 2, 0, 2, 5]] = torch.tensor([0.5, 0.1, 0.1, 0.05])
                expected = [[1, 3, 8], [0, V - 2]]  # of 0 and 2, which are equal, the first
                kept = nucleus(probs, 0.58)
                self.assertEqual([row.nonzero().flatten().tolist() for row in kept], expected)

    def test_all_tokens_equal(self):
        for V in self.SIZES:
            kept = nucleus(torch.full((1, V), 1 / V, dtype=torch.float64), 0.5)
            self.assertAlmostEqual(kept.sum().item(), V / 2, delta=1)  # of sums of rounded 1 / V


class TestGenerate(unittest.TestCase):
    def test_greedy_equals_recomputing_also_past_block_size(self):
        model, idx = tiny_gpt(), torch.randint(11, (3, 4))
        self.assertEqual(model.generate(idx, 20).tolist(), slow_greedy(model, idx, 20))

    def check_samples(self, q, **options):
        """4000 samples after one prompt are distributed as q (V,), and their log-probs say so."""
        out, log_probs = self.model.generate(
            self.prompt.expand(4000, -1),
            1,
            do_sample=True,
            return_log_probs=True,
            generator=seeded(),
            **options,
        )
        counts = torch.bincount(out[:, 3], minlength=11)
        self.assertTrue((counts[q == 0] == 0).all())
        tolerance = 4 * (q * (1 - q) / 4000).sqrt() + 1e-6
        self.assertTrue(((counts / 4000 - q).abs() <= tolerance).all(), (counts, q))
        torch.testing.assert_close(log_probs[:, 0], q[out[:, 3]].log(), atol=1e-4, rtol=0)

    def test_samples_have_the_distribution_they_claim(self):
        self.model, self.prompt = tiny_gpt(), torch.tensor([[3, 1, 4]])
        p = next_distribution(self.model, self.prompt)[0]
        order = p.argsort(descending=True)

        with self.subTest("the full softmax"):
            self.check_samples(p)

        with self.subTest("top_k"):
            q = p.clone()
            q[order[3:]] = 0
            self.check_samples(q / q.sum(), top_k=3)

        with self.subTest("top_p"):
            kept = 1
            while p[order[:kept]].sum() < 0.6:  # the shortest prefix that reaches top_p
                kept += 1
            q = p.clone()
            q[order[kept:]] = 0
            self.check_samples(q / q.sum(), top_p=0.6)

        with self.subTest("temperature"):
            q = p ** (1 / 2.0)
            self.check_samples(q / q.sum(), temperature=2.0)

    def test_greedy_is_the_limit_of_every_filter(self):
        logits = torch.randn(5, 11)
        for options in ({"top_k": 1}, {"top_p": 1e-9}):
            log_p = next_token_log_probs(logits, **options)
            self.assertEqual(log_p.argmax(1).tolist(), logits.argmax(1).tolist())
            self.assertTrue(((log_p == 0).sum(1) == 1).all())

    def test_numpy_numbers_are_numbers(self):
        model, idx = tiny_gpt(), torch.randint(11, (2, 3))
        numbers = {"temperature": np.float32(0.5), "top_k": np.int64(3), "stop_token": np.int64(7)}
        ours = model.generate(idx, np.int64(5), do_sample=True, generator=seeded(), **numbers)
        plain = {"temperature": 0.5, "top_k": 3, "stop_token": 7}
        expected = model.generate(idx, 5, do_sample=True, generator=seeded(), **plain)
        self.assertEqual(ours.tolist(), expected.tolist())


class TestTemperatureZero(unittest.TestCase):
    def setUp(self):
        self.model = tiny_gpt()
        self.idx = torch.randint(11, (3, 4))

    def test_generate_is_greedy_even_with_do_sample(self):
        greedy = self.model.generate(self.idx, 20)
        for do_sample in (False, True):
            out = self.model.generate(self.idx, 20, temperature=0, do_sample=do_sample)
            self.assertEqual(out.tolist(), greedy.tolist())

    def test_stream_is_greedy_even_with_do_sample(self):
        columns = list(self.model.stream(self.idx, 8, temperature=0.0, do_sample=True))
        greedy = self.model.generate(self.idx, 8)
        self.assertEqual(torch.cat(columns, 1).tolist(), greedy[:, 4:].tolist())

    def test_log_probs_are_those_of_temperature_1(self):
        out, log_probs = self.model.generate(self.idx, 8, temperature=0, return_log_probs=True)
        expected = self.model.log_probs(out)[:, 3:]
        torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)

    def test_it_draws_no_random_numbers(self):
        before = torch.get_rng_state()
        self.model.generate(self.idx, 8, temperature=0, do_sample=True)
        self.assertTrue(torch.equal(torch.get_rng_state(), before))

    def test_log_probs_of_given_tokens_go_on_refusing_it(self):
        with self.assertRaisesRegex(ValueError, "temperature=0 must be a number in"):
            self.model.log_probs(self.idx, temperature=0)


class TestStopTokens(unittest.TestCase):
    def setUp(self):
        self.model = tiny_gpt(1)
        self.idx = torch.randint(11, (40, 2))

    def check_rows(self, idx, out, log_probs, stops):
        """Each row is filled with its first generated stop, with log-probs 0; returns lengths."""
        lengths = set()
        for row, log_p in zip(out[:, idx.size(1):].tolist(), log_probs, strict=True):
            n = next((t + 1 for t, token in enumerate(row) if token in stops), len(row))
            self.assertEqual(row[n:], [row[n - 1]] * (len(row) - n))
            self.assertTrue((log_p[:n] < 0).all())
            self.assertTrue((log_p[n:] == 0).all())
            lengths.add(n)
        return lengths

    def test_rows_stop_one_by_one_and_only_at_generated_stops(self):
        idx = self.idx
        first_sample = self.model.generate(idx, 10, do_sample=True, generator=seeded(0))
        stop = first_sample[0, 5].item()
        idx[3, 0] = stop  # in the prompt it means nothing
        out, log_probs = self.model.generate(
            idx,
            10,
            do_sample=True,
            stop_token=stop,
            return_log_probs=True,
            generator=seeded(1),
        )
        self.assertGreater(len(self.check_rows(idx, out, log_probs, {stop})), 3)

    def test_each_of_several_stops_fills_its_own_row(self):
        stops = [2, 7, 9]
        out, log_probs = self.model.generate(
            self.idx,
            10,
            do_sample=True,
            stop_token=stops,
            return_log_probs=True,
            generator=seeded(1),
        )
        self.check_rows(self.idx, out, log_probs, stops)
        self.assertEqual(set(stops) & set(out[:, -1].tolist()), set(stops))  # each ended some row

    def test_several_stops_equal_a_loop_over_forward(self):
        idx = self.idx[:10]
        endless = slow_greedy(self.model, idx, 8)
        # Stops that greedy decoding does generate, at different times.
        stops = sorted({row[4] for row in endless} | {row[7] for row in endless})[:3]
        self.assertEqual(len(stops), 3)
        expected = slow_greedy(self.model, idx, 8, stops)
        ended_by = {row[-1] for row in expected} & set(stops)
        self.assertGreater(len(ended_by), 1)
        for stop_token in (stops, tuple(stops)):
            out = self.model.generate(idx, 8, stop_token=stop_token)
            n = out.size(1)  # generation ends early when all rows have ended
            self.assertEqual(out.tolist(), [row[:n] for row in expected])

    def test_a_list_of_one_is_that_one(self):
        one = self.model.generate(self.idx, 8, stop_token=4)
        self.assertEqual(self.model.generate(self.idx, 8, stop_token=[4]).tolist(), one.tolist())

    def test_generation_ends_when_all_rows_have(self):
        every_id = list(range(11))
        options = {"stop_token": every_id, "return_log_probs": True}
        out, log_probs = self.model.generate(self.idx, 10, **options)
        self.assertEqual(out.shape, (40, 3))
        self.assertEqual(log_probs.shape, (40, 1))


class TestStream(unittest.TestCase):
    def setUp(self):
        self.model = tiny_gpt(1)
        self.idx = torch.randint(11, (5, 3))

    def test_it_takes_the_arguments_of_generate(self):
        ours = inspect.signature(GPT.stream).parameters
        self.assertEqual(ours, inspect.signature(GPT.generate).parameters)

    def check_columns(self, **options):
        """The columns of stream are the new ones of generate, (B, 1) each, bit for bit."""
        columns = list(self.model.stream(self.idx, 14, generator=seeded(), **options))
        out = self.model.generate(self.idx, 14, generator=seeded(), **options)
        self.assertEqual({column.shape for column in columns}, {(5, 1)})
        self.assertEqual({column.dtype for column in columns}, {torch.long})
        self.assertTrue(torch.equal(torch.cat(columns, 1), out[:, 3:]))

    def test_greedy_columns_are_those_of_generate(self):
        self.check_columns()

    def test_sampled_columns_are_those_of_generate(self):
        self.check_columns(do_sample=True, temperature=1.2, top_k=8, top_p=0.9)

    def test_padded_prompts_give_the_columns_of_generate(self):
        mask = torch.ones(5, 3)
        mask[1, 0] = 0
        mask[2, 2] = 0
        columns = list(self.model.stream(self.idx, 8, attention_mask=mask))
        out = self.model.generate(self.idx, 8, attention_mask=mask)
        self.assertTrue(torch.equal(torch.cat(columns, 1), out[:, 3:]))

    def test_with_log_probs_it_yields_pairs(self):
        options = {"do_sample": True, "stop_token": [3, 5], "return_log_probs": True}
        pairs = list(self.model.stream(self.idx, 14, generator=seeded(), **options))
        out, log_probs = self.model.generate(self.idx, 14, generator=seeded(), **options)
        columns, log_prob_columns = zip(*pairs, strict=True)
        self.assertEqual({column.shape for column in log_prob_columns}, {(5, 1)})
        self.assertTrue(torch.equal(torch.cat(columns, 1), out[:, 3:]))
        self.assertTrue(torch.equal(torch.cat(log_prob_columns, 1), log_probs))

    def test_it_ends_when_all_rows_have(self):
        stops = [3, 5, 7]
        options = {"do_sample": True, "stop_token": stops, "generator": seeded()}
        columns = list(self.model.stream(self.idx, 500, **options))
        self.assertLess(len(columns), 500)
        self.assertTrue(set(columns[-1].flatten().tolist()) <= set(stops))
        self.assertFalse(set(columns[-2].flatten().tolist()) <= set(stops))

    def test_arguments_are_checked_by_the_call(self):
        for name, value in (("max_new_tokens", 0), ("temperature", -1), ("stop_token", 11)):
            options = {"max_new_tokens": 1, name: value}
            with self.subTest(name), self.assertRaisesRegex(ValueError, f"{name}={value}"):
                self.model.stream(self.idx, **options)
        with self.assertRaisesRegex(ValueError, "the vocabulary has 0 to 10"):
            self.model.stream(self.idx + 10, 1)

    def test_nothing_is_computed_before_the_first_next(self):
        calls = []
        self.model.transformer.register_forward_hook(lambda *args: calls.append(1))
        stream = self.model.stream(self.idx, 3)
        self.assertEqual(len(calls), 0)
        next(stream)
        self.assertEqual(len(calls), 1)

    def test_the_callers_gradients_stay_on_between_columns(self):
        weight = self.model.lm_head.weight
        for column, log_p in self.model.stream(self.idx, 3, return_log_probs=True):
            self.assertTrue(torch.is_grad_enabled())
            self.assertTrue((weight.sum() * 2).requires_grad)
            self.assertFalse(log_p.requires_grad)
            self.assertEqual(column.shape, (5, 1))
        with torch.no_grad():
            for _ in self.model.stream(self.idx, 3):
                self.assertFalse(torch.is_grad_enabled())

    def test_what_the_caller_does_to_a_column_changes_nothing(self):
        expected = self.model.generate(self.idx, 14, stop_token=3)[:, 3:]
        columns = []
        for column in self.model.stream(self.idx, 14, stop_token=3):
            columns.append(column.clone())
            column.fill_(0)
        self.assertTrue(torch.equal(torch.cat(columns, 1), expected))


class TestBadInput(unittest.TestCase):
    def test_config(self):
        no_sizes = {"n_layer": None, "n_head": None, "n_embd": None}
        for options, words in (
            ({"model_type": "gpt-nano"}, "model_type='gpt-nano' and sizes .* not both"),
            ({"n_embd": None}, "'n_embd': None}: set either model_type or all three sizes"),
            ({"n_embd": 15}, "not divisible"),
            ({"vocab_size": 0}, "vocab_size=0"),
            ({"attn_pdrop": 1.5}, "attn_pdrop=1.5"),
            ({"embd_pdrop": 1.0}, "embd_pdrop=1.0"),
            ({"model_type": "gpt-9", **no_sizes}, "model_type='gpt-9' is unknown; .*gpt2-xl"),
        ):
            with self.subTest(options), self.assertRaisesRegex(ValueError, words):
                tiny_gpt(**options)
        self.assertIn("gpt2-xl", PRESETS)

    def test_forward(self):
        model, idx = tiny_gpt(), torch.ones(2, 4, dtype=torch.long)
        with self.assertRaisesRegex(ValueError, "longer than block_size=12"):
            model(torch.ones(1, 13, dtype=torch.long))
        with self.assertRaisesRegex(ValueError, "must be \\(B, T\\)"):
            model(idx[0])
        with self.assertRaisesRegex(ValueError, "must be equal"):
            model(idx, targets=idx[:, :3])
        with self.assertRaisesRegex(ValueError, "ids from -1 to 1; the vocabulary has 0 to 10"):
            model(torch.tensor([[1, -1]]))
        with self.assertRaisesRegex(ValueError, "must be \\(2, 4\\)"):
            model(idx, attention_mask=torch.ones(2, 3))

    def test_log_probs(self):
        model, idx = tiny_gpt(), torch.ones(2, 4, dtype=torch.long)
        with self.assertRaisesRegex(ValueError, "two tokens or more"):
            model.log_probs(idx[:, :1])
        with self.assertRaisesRegex(ValueError, "temperature=-1"):
            model.log_probs(idx, temperature=-1)

    def test_prompts_of_generate(self):
        model, idx = tiny_gpt(), torch.ones(2, 4, dtype=torch.long)
        with self.assertRaisesRegex(ValueError, "the vocabulary has 0 to 10"):
            model.generate(idx + 10, 1)
        with self.assertRaisesRegex(ValueError, "with T >= 1"):
            model.generate(idx[:, :0], 1)
        with self.assertRaisesRegex(ValueError, "LongTensor"):
            model.generate(idx.float(), 1)
        all_padding = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])
        with self.assertRaisesRegex(ValueError, "a real token in every row"):
            model.generate(idx, 1, attention_mask=all_padding)
        padded = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1]])
        with self.assertRaisesRegex(ValueError, "do not fit into block_size=12"):
            model.generate(idx, 10, attention_mask=padded)

    def test_options_of_generate(self):
        model, idx = tiny_gpt(), torch.ones(2, 4, dtype=torch.long)
        for name, value in (
            ("temperature", -1),
            ("temperature", 1e-7),
            ("temperature", math.nan),
            ("temperature", False),
            ("top_k", 0),
            ("top_k", 12),
            ("top_p", 0),
            ("top_p", 1.1),
            ("stop_token", 11),
            ("stop_token", -1),
            ("stop_token", True),
            ("max_new_tokens", 0),
        ):
            options = {"max_new_tokens": 1, name: value}
            words = f"{name}={value}"
            with self.subTest(words), self.assertRaisesRegex(ValueError, words):
                model.generate(idx, **options)

    def test_lists_of_stop_tokens(self):
        model, idx = tiny_gpt(), torch.ones(2, 4, dtype=torch.long)
        for stop_token, words in (
            ([], "stop_token is an empty list"),
            ((), "stop_token is an empty list"),
            ([1, 11], "stop_token=11 must be a whole number in \\[0, 10\\]"),
            ((-1, 1), "stop_token=-1"),
            ([1, True], "stop_token=True"),
            ([1, None], "stop_token=None"),
            ([[1]], "stop_token=\\[1\\]"),
            ({1, 2}, "stop_token={1, 2}"),
            ("1", "stop_token='1'"),
        ):
            with self.subTest(stop_token), self.assertRaisesRegex(ValueError, words):
                model.generate(idx, 1, stop_token=stop_token)
