"""Reward functions on text: what they are given, and what becomes of their rewards and errors."""

import functools
import importlib.util
import math
import unittest

import numpy
import torch

from mingpt.chars import CharTokenizer
from mingpt.datasets import RESERVED_COLUMNS
from mingpt.heads import RewardModel
from mingpt.rewards import RewardError, Scores, TextReward, check_reward_fn, score
from tests.common import tiny_gpt

TOKENIZER = CharTokenizer("abcdefghij")  # its end token is id 10
END = 10

# Three episodes of a prompt and up to three tokens. The first prompt is padded on the left. The
# third completion was cut off, so it has no end token.
IDX = torch.tensor([[0, 1, 2, 3, END], [0, 1, 4, END, END], [5, 6, 7, 8, 9]])
ATTENTION_MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
COMPLETION_MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
BATCH = (IDX, ATTENTION_MASK, COMPLETION_MASK)

PROMPTS = ["b", "ab", "fg"]
COMPLETIONS = ["cd", "e", "hij"]
COMPLETION_IDS = [[2, 3, END], [4, END], [7, 8, 9]]


def length(completions):
    return [len(completion) for completion in completions]


def constant(value):
    """A reward function that gives every completion the same."""

    def always(completions):
        return [value] * len(completions)

    return always


class TestArguments(unittest.TestCase):
    """What a function is called with."""

    def test_completions_and_prompts(self):
        seen = []

        def f(completions, prompts):
            seen.append((completions, prompts))
            return [0.5, 1, -2]

        rewards = TextReward(f, TOKENIZER)(*BATCH)
        self.assertEqual(seen, [(COMPLETIONS, PROMPTS)])
        self.assertEqual(rewards.tolist(), [0.5, 1.0, -2.0])
        self.assertEqual(rewards.dtype, torch.float32)

    def test_arguments_go_by_name_not_by_place(self):
        def f(prompts, completions):
            self.assertEqual((prompts, completions), (PROMPTS, COMPLETIONS))
            return [0.0] * 3

        TextReward(f, TOKENIZER)(*BATCH)

    def test_completion_ids_have_the_end_token(self):
        def f(completion_ids):
            self.assertEqual(completion_ids, COMPLETION_IDS)
            return [0.0] * 3

        TextReward(f, TOKENIZER)(*BATCH)

    def test_a_column_that_it_names(self):
        def correct(completions, answer):
            return [float(a in c) for a, c in zip(answer, completions, strict=True)]

        columns = {"answer": ["c", "c", "ij"], "level": [1, 2, 3]}
        scores = TextReward(correct, TOKENIZER).scores(*BATCH, columns=columns)
        self.assertEqual(scores.rewards.tolist(), [1.0, 0.0, 1.0])

    def test_keyword_arguments_get_everything(self):
        def f(**kwargs):
            self.assertEqual(set(kwargs), {*RESERVED_COLUMNS, "answer", "level"})
            self.assertEqual(kwargs["level"], [1, 2, 3])
            self.assertEqual(kwargs["completions"], COMPLETIONS)
            return [0.0] * 3

        columns = {"answer": ["c", "c", "ij"], "level": [1, 2, 3]}
        TextReward(f, TOKENIZER).scores(*BATCH, columns=columns)

    def test_the_state_of_the_trainer(self):
        def f(completions, trainer_state):
            return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

        scores = TextReward(f, TOKENIZER).scores(*BATCH, step=3, max_steps=4)
        self.assertEqual(scores.rewards.tolist(), [0.75] * 3)

    def test_a_parameter_with_a_default_may_be_missing(self):
        def f(completions, bonus=(5, 5, 5)):
            return list(bonus)

        text_reward = TextReward(f, TOKENIZER)
        self.assertEqual(text_reward(*BATCH).tolist(), [5.0, 5.0, 5.0])
        scores = text_reward.scores(*BATCH, columns={"bonus": [1, 2, 3]})
        self.assertEqual(scores.rewards.tolist(), [1.0, 2.0, 3.0])

    def test_a_function_that_changes_a_list_does_not_change_it_for_the_next(self):
        def greedy(completions, answer):
            completions.clear()
            answer.clear()
            return [0.0] * 3

        def f(completions, answer):
            self.assertEqual((completions, answer), (COMPLETIONS, ["x", "y", "z"]))
            return [0.0] * 3

        columns = {"answer": ["x", "y", "z"]}
        TextReward([greedy, f], TOKENIZER).scores(*BATCH, columns=columns)
        self.assertEqual(columns, {"answer": ["x", "y", "z"]})

    def test_methods_partials_and_callable_objects(self):
        class Judge:
            def __call__(self, completions):
                return self.judge(completions)

            def judge(self, completions):
                return length(completions)

        def scaled(completions, scale):
            return [scale * len(completion) for completion in completions]

        for f in (Judge(), Judge().judge, functools.partial(scaled, scale=1)):
            self.assertEqual(TextReward(f, TOKENIZER)(*BATCH).tolist(), [2.0, 1.0, 3.0])

    def test_a_tokenizer_of_transformers(self):
        class Tokenizer:
            eos_token_id = END

            def decode(self, ids):
                return " ".join(map(str, ids))

        def f(completions):
            self.assertEqual(completions, ["2 3", "4", "7 8 9"])
            return [0.0] * 3

        TextReward(f, Tokenizer())(*BATCH)


class TestSignatures(unittest.TestCase):
    """Functions that cannot be called are refused, with the reason."""

    def test_a_parameter_that_nobody_gives(self):
        def f(completions, answer):
            return [0.0] * len(completions)

        words = "function f requires 'answer'.*Available are completions, prompts,.*, level: add"
        text_reward = TextReward(f, TOKENIZER)
        with self.assertRaisesRegex(TypeError, words):
            text_reward.scores(*BATCH, columns={"level": [1, 2, 3]})
        with self.assertRaisesRegex(TypeError, words):
            score(text_reward, *BATCH, columns={"level": [1, 2, 3]})
        with self.assertRaisesRegex(TypeError, words):
            check_reward_fn(text_reward, ["level"])
        check_reward_fn(text_reward, ["level", "answer"])

    def test_a_function_that_names_nothing(self):
        for f in (lambda: [0.0] * 3, lambda *args: [0.0] * 3, lambda scale=1: [0.0] * 3):
            with self.assertRaisesRegex(TypeError, "<lambda> names none of completions, prompts"):
                TextReward(f, TOKENIZER)(*BATCH)

    def test_parameters_by_position_only(self):
        def f(completions, /, prompts):
            return [0.0] * len(completions)

        with self.assertRaisesRegex(TypeError, "f takes 'completions' by position only"):
            TextReward(f, TOKENIZER)

    def test_coroutine_functions(self):
        async def f(completions):
            return [0.0] * len(completions)

        class Judge:
            async def __call__(self, completions):
                return [0.0] * len(completions)

        words = "is a coroutine function.*give a plain function"
        for function in (f, functools.partial(f), Judge()):
            with self.assertRaisesRegex(TypeError, words):
                TextReward(function, TOKENIZER)

    def test_what_is_no_function(self):
        with self.assertRaisesRegex(TypeError, "got 3; expected a function"):
            TextReward([length, 3], TOKENIZER)

    def test_no_function(self):
        with self.assertRaisesRegex(ValueError, "no function to ask"):
            TextReward([], TOKENIZER)

    def test_columns_with_the_name_of_an_argument(self):
        with self.assertRaisesRegex(ValueError, "column 'prompts' has a name that TextReward uses"):
            TextReward(length, TOKENIZER).scores(*BATCH, columns={"prompts": [1, 2, 3]})

    def test_columns_of_another_length(self):
        with self.assertRaisesRegex(ValueError, "column 'answer' has 2 values for 3 rows"):
            TextReward(length, TOKENIZER).scores(*BATCH, columns={"answer": [1, 2]})


class TestReturnValues(unittest.TestCase):
    """What a function may return."""

    def test_lists_tensors_and_arrays(self):
        for result in (
            [2, True, 0.5],
            (2.0, 1.0, 0.5),
            torch.tensor([2.0, 1.0, 0.5], requires_grad=True),
            numpy.array([2.0, 1.0, 0.5]),
            [numpy.float32(2.0), numpy.int64(1), torch.tensor(0.5)],
            (x for x in (2.0, 1.0, 0.5)),
        ):
            rewards = TextReward(lambda completions, result=result: result, TOKENIZER)(*BATCH)
            self.assertEqual(rewards.tolist(), [2.0, 1.0, 0.5])

    def test_too_few(self):
        def f(completions):
            return [0.0] * 2

        with self.assertRaisesRegex(ValueError, "f must return a reward for each of the 3 .*not 2"):
            TextReward(f, TOKENIZER)(*BATCH)

    def test_what_is_no_number(self):
        def f(completions):
            return [1.0, "good", 2.0]

        with self.assertRaisesRegex(TypeError, "f gave 'good' for 'e'; a reward must be a number"):
            TextReward(f, TOKENIZER)(*BATCH)

    def test_what_is_no_list(self):
        for result in (0.5, None, "abc", {0: 1.0, 1: 1.0, 2: 1.0}):
            text_reward = TextReward(lambda completions, result=result: result, TOKENIZER)
            with self.assertRaisesRegex(TypeError, "returned .*; expected a list of rewards"):
                text_reward(*BATCH)


class TestSeveralFunctions(unittest.TestCase):
    def test_the_weighted_sum(self):
        text_reward = TextReward([length, constant(10)], TOKENIZER, weights=[0.5, 3])
        scores = text_reward.scores(*BATCH)
        self.assertEqual(scores.rewards.tolist(), [31.0, 30.5, 31.5])
        self.assertEqual(scores.by_function["length"].tolist(), [2.0, 1.0, 3.0])
        self.assertEqual(scores.by_function["always"].tolist(), [10.0] * 3)
        self.assertEqual(scores.metrics, {"reward/length": 2.0, "reward/always": 10.0})

    def test_weights_are_one_unless_given(self):
        text_reward = TextReward([length, constant(10)], TOKENIZER)
        self.assertEqual(text_reward(*BATCH).tolist(), [12.0, 11.0, 13.0])

    def test_a_weight_counts_for_a_single_function_too(self):
        self.assertEqual(TextReward(length, TOKENIZER, [2])(*BATCH).tolist(), [4.0, 2.0, 6.0])

    def test_a_single_function_has_no_metric_of_its_own(self):
        scores = TextReward(length, TOKENIZER).scores(*BATCH)
        self.assertEqual(scores.metrics, {})
        self.assertEqual(list(scores.by_function), ["length"])

    def test_names_are_unique(self):
        functions = [constant(1), constant(2), length, constant(3)]
        scores = TextReward(functions, TOKENIZER).scores(*BATCH)
        self.assertEqual(list(scores.by_function), ["always", "always_2", "length", "always_3"])
        self.assertEqual(scores.metrics["reward/always_3"], 3.0)

    def test_wrong_weights(self):
        for weights, words in (
            ([1.0], "weights has 1 numbers for 2 functions .length, always"),
            ([1.0, 2.0, 3.0], "weights has 3 numbers for 2 functions"),
            ([1.0, math.nan], "weights has nan; each must be a finite number"),
            ([1.0, math.inf], "weights has inf; each must be a finite number"),
            ([1.0, "2"], "weights has '2'; each must be a finite number"),
            (2.0, "weights=2.0 must be a list"),
        ):
            with self.subTest(weights), self.assertRaisesRegex(ValueError, words):
                TextReward([length, constant(1)], TOKENIZER, weights)


class TestAbstaining(unittest.TestCase):
    """A function that returns None has no opinion on that sample."""

    @staticmethod
    def short_only(completions):
        return [1.0 if len(completion) < 3 else None for completion in completions]

    def test_the_others_decide(self):
        text_reward = TextReward([self.short_only, length], TOKENIZER, weights=[10, 1])
        scores = text_reward.scores(*BATCH)
        self.assertEqual(scores.rewards.tolist(), [12.0, 11.0, 3.0])
        self.assertEqual(scores.by_function["short_only"][:2].tolist(), [1.0, 1.0])
        self.assertTrue(scores.by_function["short_only"][2].isnan())

    def test_the_mean_is_over_those_that_it_judged(self):
        scores = TextReward([self.short_only, length], TOKENIZER).scores(*BATCH)
        self.assertEqual(scores.metrics["reward/short_only"], 1.0)

    def test_a_function_that_always_abstains_has_no_mean(self):
        scores = TextReward([constant(None), length], TOKENIZER).scores(*BATCH)
        self.assertEqual(scores.metrics, {"reward/length": 2.0})
        self.assertEqual(scores.rewards.tolist(), [2.0, 1.0, 3.0])

    def test_somebody_must_judge(self):
        text_reward = TextReward([self.short_only, constant(None)], TOKENIZER)
        words = "short_only, always.* returned None for sample 2, 'hij'"
        with self.assertRaisesRegex(ValueError, words):
            text_reward(*BATCH)
        with self.assertRaisesRegex(RewardError, words + ".*for sample 2, text 'fghij'"):
            score(text_reward, *BATCH, TOKENIZER)

    def test_nan_is_no_abstention(self):
        def f(completions):
            return [1.0, math.nan, 1.0]

        with self.assertRaisesRegex(RewardError, "gave nan to sample 1, text 'abe"):
            score(TextReward([f, length], TOKENIZER), *BATCH, TOKENIZER)


class TestLogging(unittest.TestCase):
    """trl's callbacks log_metric and log_extra."""

    def test_metrics_are_averaged(self):
        def f(completions, log_metric):
            log_metric("accuracy", 1.0)
            log_metric("accuracy", torch.tensor(0.5))
            log_metric("longest", max(map(len, completions)))
            return [0.0] * len(completions)

        scores = TextReward(f, TOKENIZER).scores(*BATCH)
        self.assertEqual(scores.metrics, {"accuracy": 0.75, "longest": 3.0})

    def test_metrics_are_of_one_call(self):
        def f(completions, log_metric, trainer_state):
            log_metric("step", trainer_state.global_step)
            return [0.0] * len(completions)

        text_reward = TextReward(f, TOKENIZER)
        for step in (1, 2):
            self.assertEqual(text_reward.scores(*BATCH, step=step).metrics, {"step": step})

    def test_a_metric_is_finite(self):
        def f(completions, log_metric):
            log_metric("accuracy", math.nan)
            return [0.0] * len(completions)

        with self.assertRaisesRegex(ValueError, "'accuracy', nan.: expected a finite number"):
            TextReward(f, TOKENIZER)(*BATCH)

    def test_extra_columns(self):
        def f(completions, log_extra):
            log_extra("shouted", [completion.upper() for completion in completions])
            return [0.0] * len(completions)

        scores = TextReward(f, TOKENIZER).scores(*BATCH)
        self.assertEqual(scores.extra, {"shouted": ["CD", "E", "HIJ"]})

    def test_an_extra_column_has_a_value_for_each(self):
        def f(completions, log_extra):
            log_extra("shouted", ["CD"])
            return [0.0] * len(completions)

        with self.assertRaisesRegex(ValueError, "log_extra.'shouted'. got 1 values for 3"):
            TextReward(f, TOKENIZER)(*BATCH)


def as_documented_by_trl(prompts, completions, completion_ids, answer, log_extra=None, **kwargs):
    """A function with the arguments that trl's documentation of custom rewards describes."""
    assert {"trainer_state", "log_metric", "level"} <= set(kwargs)
    kwargs["log_metric"]("progress", kwargs["trainer_state"].global_step)
    if log_extra is not None:
        log_extra("gold", list(answer))
    rewards = []
    for prompt, completion, ids, gold in zip(
        prompts, completions, completion_ids, answer, strict=True
    ):
        right = gold in completion and prompt not in completion
        rewards.append(None if gold is None else right + 0.1 * len(ids))
    return rewards


class TestFunctionsOfTrl(unittest.TestCase):
    def setUp(self):
        self.columns = {"answer": ["d", "x", "h"], "level": [1, 2, 3]}

    def test_one_as_trl_documents_it(self):
        text_reward = TextReward(as_documented_by_trl, TOKENIZER)
        scores = score(text_reward, *BATCH, TOKENIZER, columns=self.columns, step=7)
        torch.testing.assert_close(scores.rewards, torch.tensor([1.3, 0.2, 1.3]))
        self.assertEqual(scores.metrics, {"progress": 7.0})
        self.assertEqual(scores.extra, {"gold": ["d", "x", "h"]})

    @unittest.skipUnless(importlib.util.find_spec("trl"), "trl is not installed")
    def test_its_own_that_read_ids(self):
        from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

        functions = [
            get_soft_overlong_punishment(max_completion_len=3, soft_punish_cache=2),
            get_repetition_penalty_reward(ngram_size=1, max_penalty=-1.0),
        ]
        scores = score(TextReward(functions, TOKENIZER), *BATCH, columns=self.columns)
        self.assertEqual(
            {name: rewards.tolist() for name, rewards in scores.by_function.items()},
            {
                "soft_overlong_punishment_reward": [-1.0, -0.5, -1.0],
                "repetition_penalty_reward": [0.0, 0.0, 0.0],
            },
        )
        self.assertEqual(scores.rewards.tolist(), [-1.0, -0.5, -1.0])


class TestScore(unittest.TestCase):
    """How the trainer calls any reward function."""

    def test_a_function_of_ids(self):
        scores = score(lambda idx, attention_mask, completion_mask: completion_mask.sum(1), *BATCH)
        self.assertIsInstance(scores, Scores)
        self.assertEqual(scores.rewards.tolist(), [3.0, 2.0, 3.0])
        self.assertEqual(scores.rewards.dtype, torch.float32)
        self.assertEqual((scores.by_function, scores.metrics, scores.extra), ({}, {}, {}))

    def test_a_reward_model(self):
        model = RewardModel.from_gpt(tiny_gpt())
        rewards = score(model, *BATCH).rewards
        self.assertFalse(rewards.requires_grad)
        torch.testing.assert_close(rewards, model(*BATCH).detach(), rtol=0, atol=0)

    def test_a_text_reward_sees_the_columns(self):
        def f(completions, answer, trainer_state):
            return [trainer_state.global_step + number for number in answer]

        scores = score(TextReward(f, TOKENIZER), *BATCH, columns={"answer": [1, 2, 3]}, step=10)
        self.assertEqual(scores.rewards.tolist(), [11.0, 12.0, 13.0])

    def test_writing_into_the_arguments_changes_nothing(self):
        def vandal(idx, attention_mask, completion_mask):
            for x in (idx, attention_mask, completion_mask):
                x.zero_()
            return torch.zeros(3)

        batch = [x.clone() for x in BATCH]
        score(vandal, *batch)
        torch.testing.assert_close(batch, list(BATCH), rtol=0, atol=0)

    def test_an_error_names_the_sample(self):
        def f(completions):
            if "e" in completions:
                raise KeyError("no network")
            return [0.0] * len(completions)

        words = "reward_fn raised KeyError: 'no network' -- for sample 1, text 'abe<.endoftext.>'"
        with self.assertRaisesRegex(RewardError, words) as raised:
            score(TextReward(f, TOKENIZER), *BATCH, TOKENIZER)
        self.assertIsInstance(raised.exception.__cause__, KeyError)

    def test_an_error_in_a_row_with_columns_names_the_sample(self):
        def f(completions, answer):
            return [1 / number for number in answer]

        with self.assertRaisesRegex(RewardError, "ZeroDivisionError.*for sample 2, text 'fghij'"):
            score(TextReward(f, TOKENIZER), *BATCH, TOKENIZER, columns={"answer": [1, 2, 0]})

    def test_an_error_of_the_batch_alone(self):
        def f(completions):
            if len(completions) > 1:
                raise MemoryError("too many")
            return [0.0]

        with self.assertRaisesRegex(RewardError, "for the batch, though for none of its samples"):
            score(TextReward(f, TOKENIZER), *BATCH, TOKENIZER)

    def test_without_a_tokenizer_the_sample_is_shown_as_ids(self):
        def infinite(idx, attention_mask, completion_mask):
            return torch.tensor([0.0, -math.inf, 0.0])

        with self.assertRaisesRegex(RewardError, r"gave -inf to sample 1, ids \[0, 1, 4, 10\]"):
            score(infinite, *BATCH)

    def test_a_tokenizer_that_fails_does_not_hide_the_error(self):
        def nan(idx, attention_mask, completion_mask):
            return torch.full((len(idx),), math.nan)

        class Broken:
            def decode(self, ids):
                raise UnicodeError("broken")

        with self.assertRaisesRegex(RewardError, r"gave nan to sample 0, ids \[1, 2, 3, 10\]"):
            score(nan, *BATCH, Broken())

    def test_who_takes_rows_per_prompt_is_told_and_a_sample_at_fault_is_named(self):
        calls = []

        def f(idx, attention_mask, completion_mask, rows_per_prompt=1):
            calls.append((len(idx), rows_per_prompt))
            if len(idx) % rows_per_prompt or (idx == 9).any():
                raise KeyError("nine")
            return idx.sum(1)

        batch = [x[:2] for x in BATCH]
        score(f, *batch, rows_per_prompt=2)
        score(f, *batch)
        self.assertEqual(calls, [(2, 2), (2, 1)])
        # One sample at a time shares no prompt with another.
        with self.assertRaisesRegex(RewardError, "KeyError: 'nine' -- for sample 2"):
            score(f, *BATCH, rows_per_prompt=3)
        self.assertEqual(calls[2:], [(3, 3), (1, 1), (1, 1), (1, 1)])

    def test_what_is_no_reward(self):
        for result, words in (
            (torch.zeros(2), r"shape \(3,\), one real number.*not \(2,\), torch.float32"),
            (torch.zeros(3, 1), r"not \(3, 1\), torch.float32"),
            (torch.zeros(3, dtype=torch.complex64), r"not \(3,\), torch.complex64"),
            ([0.0] * 3, "not list"),
            (None, "not NoneType"),
        ):
            with self.subTest(result), self.assertRaisesRegex(RewardError, words):
                score(lambda *batch, result=result: result, *BATCH)


class TestWhatIsNoRewardFunction(unittest.TestCase):
    def test_a_function_on_text_must_be_wrapped(self):
        def with_prompts(completions, prompts):
            return length(completions)

        def with_ids(completion_ids, **kwargs):
            return length(completion_ids)

        for f in (length, with_prompts, with_ids):
            words = rf"{f.__name__}\(comp.*wrap it in TextReward\(f, tokenizer\)"
            with self.subTest(f.__name__), self.assertRaisesRegex(TypeError, words):
                score(f, *BATCH)

    def test_what_cannot_be_called(self):
        with self.assertRaisesRegex(TypeError, "reward_fn is a list; expected a function"):
            score([length], *BATCH)

    def test_others_pass(self):
        for reward_fn in (
            lambda idx, attention_mask, completion_mask: idx.sum(1),
            lambda *batch: batch[0].sum(1),
            RewardModel.from_gpt(tiny_gpt()),
            functools.partial(RewardModel.from_gpt(tiny_gpt()), group_size=1),
            TextReward(length, TOKENIZER),
        ):
            check_reward_fn(reward_fn)
