"""Files, rows and prompts: what is read from them, and what is said of those that are wrong."""

import hashlib
import json
import random
import unittest
from types import SimpleNamespace

import torch

from mingpt.chars import CharTokenizer
from mingpt.datasets import (
    RESERVED_COLUMNS,
    Comparisons,
    Completions,
    Prompts,
    encode_prompts,
    end_token,
    left_pad,
    pad,
    pad_and_mask,
    read_jsonl,
    read_text,
    split_of,
    split_rows,
    windows,
)
from tests.common import TempDirTestCase, tiny_gpt

TOKENIZER = CharTokenizer("abcdefghij")  # its end token is id 10
END = 10

ROWS = [
    {"prompt": "ab", "chosen": "cd", "rejected": "cdefg"},
    {"prompt": "abcdeabc", "chosen": "f", "rejected": "ga"},
    {"chosen": "a", "rejected": "bc"},
]


class TokenizerOfTransformers:
    """A tokenizer whose end token has the name that `transformers` gives it."""

    eos_token_id = 4

    def encode(self, text):
        return ["abcd".index(letter) for letter in text]

    def decode(self, ids):
        return "".join("abcd"[i] for i in ids)


class TestWindows(unittest.TestCase):
    def test_cut_by_hand(self):
        ids = list(range(100, 111))
        rows = [(x.tolist(), y.tolist()) for x, y in windows(ids, 3)]
        # The last id fills no window.
        expected = [(ids[i : i + 3], ids[i + 1 : i + 4]) for i in (0, 3, 6)]
        self.assertEqual(rows, expected)

    def test_a_text_that_fills_just_one(self):
        [(x, y)] = windows(torch.tensor([5, 6, 7]), 2)
        self.assertEqual((x.tolist(), y.tolist()), ([5, 6], [6, 7]))

    def test_what_is_too_short_or_no_text_is_refused(self):
        for ids in ([1, 2], [], [[1, 2, 3]]):
            with self.assertRaisesRegex(ValueError, "needs 3 ids in a row"):
                windows(ids, 2)


class TestReadText(TempDirTestCase):
    def write(self, content):
        path = self.folder / "some.txt"
        path.write_bytes(content)
        return path

    def test_the_whole_text(self):
        path = self.write("eins\nzwölf\n猫".encode())
        self.assertEqual(read_text(path), "eins\nzwölf\n猫")
        self.assertEqual(read_text(str(path)), "eins\nzwölf\n猫")

    def test_line_ends_of_windows(self):
        self.assertEqual(read_text(self.write(b"a\r\nb\r\n")), "a\nb\n")

    def test_a_byte_order_mark_is_skipped(self):
        self.assertEqual(read_text(self.write(b"\xef\xbb\xbfabc")), "abc")

    def test_a_missing_file(self):
        with self.assertRaisesRegex(ValueError, "none.txt: there is no such file"):
            read_text(self.folder / "none.txt")

    def test_a_folder(self):
        with self.assertRaisesRegex(ValueError, f"{self.folder} is a folder: give a text file"):
            read_text(self.folder)

    def test_text_that_is_not_utf8(self):
        path = self.write(b"a" * 100_000 + b"\xe9t\xe9")
        with self.assertRaisesRegex(ValueError, "some.txt is not UTF-8 text: byte 100000 is 0xe9"):
            read_text(path)

    def test_the_byte_position_counts_the_byte_order_mark(self):
        with self.assertRaisesRegex(ValueError, "byte 4 is 0xff"):
            read_text(self.write(b"\xef\xbb\xbfa\xff"))


class TestReadJsonl(TempDirTestCase):
    FIELDS = ("prompt", "chosen", "rejected")

    def write(self, text, encoding="utf-8"):
        path = self.folder / "rows.jsonl"
        path.write_text(text, encoding=encoding)
        return path

    def test_read_jsonl(self):
        lines = [json.dumps({**row, "more": 1}) for row in ROWS[:2]]
        path = self.write("\n\n".join(lines), encoding="utf-8-sig")
        rows = read_jsonl(path, *self.FIELDS)
        self.assertEqual([row["rejected"] for row in rows], ["cdefg", "ga"])
        self.assertEqual([row["more"] for row in rows], [1, 1])

    def test_a_line_separator_in_a_string_ends_no_line(self):
        path = self.write('{"text": "a\N{LINE SEPARATOR}b"}\n')
        self.assertEqual(read_jsonl(path, "text"), [{"text": "a\N{LINE SEPARATOR}b"}])

    def test_a_wrong_line_is_named(self):
        wrong = (
            "{",
            "3",
            '{"prompt": "a", "chosen": "b"}',
            '{"prompt": "a", "chosen": "b", "rejected": 3}',
        )
        for line in wrong:
            path = self.write(json.dumps(ROWS[0]) + "\n" + line)
            words = "rows.jsonl, line 2: must be JSON like {.prompt"
            with self.subTest(line), self.assertRaisesRegex(ValueError, words):
                read_jsonl(path, *self.FIELDS)

    def test_a_missing_file(self):
        with self.assertRaisesRegex(ValueError, "none.jsonl: there is no such file"):
            read_jsonl(self.folder / "none.jsonl")

    def test_a_file_that_is_not_utf8(self):
        with self.assertRaisesRegex(
            ValueError, r"rows.jsonl is not UTF-8 text: byte 10 is 0xe9 \(.*\), in line 1"
        ):
            read_jsonl(self.write('{"text": "é"}', encoding="latin-1"), "text")


class TestSplits(unittest.TestCase):
    def test_the_split_is_a_hash_of_the_text(self):
        for number in range(200):
            text = f"text {number} é"
            digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
            bucket = int(digest[:16], 16) % 20  # the first 8 bytes, the highest one first
            expected = {0: "test", 1: "valid"}.get(bucket, "train")
            self.assertEqual(split_of(text), expected)

    def test_texts_stay_where_they_always_were(self):
        expected = {"k": "train", "l": "test", "s": "valid"}  # what the projects' own code gave
        self.assertEqual({text: split_of(text) for text in expected}, expected)

    def test_the_sizes_of_the_splits(self):
        splits = split_rows([{"text": str(number)} for number in range(10_000)], "text")
        sizes = {name: len(rows) for name, rows in splits.items()}
        self.assertEqual(list(sizes), ["train", "valid", "test"])
        self.assertAlmostEqual(sizes["valid"], 500, delta=100)
        self.assertAlmostEqual(sizes["test"], 500, delta=100)
        self.assertEqual(sum(sizes.values()), 10_000)

    def test_rows_keep_their_order_and_copies_stay_together(self):
        rows = [{"question": str(number % 500), "i": number} for number in range(1000)]
        splits = split_rows(rows, "question")
        for name, members in splits.items():
            self.assertEqual(members, sorted(members, key=lambda row: row["i"]))
            self.assertEqual({split_of(row["question"]) for row in members}, {name})

    def test_a_row_without_the_text_is_named(self):
        with self.assertRaisesRegex(ValueError, "row 1 has no field 'text'"):
            split_rows([{"text": "a"}, {"prompt": "b"}], "text")


class TestEndToken(unittest.TestCase):
    def test_of_our_tokenizers(self):
        self.assertEqual(end_token(TOKENIZER), END)

    def test_of_those_of_transformers(self):
        self.assertEqual(end_token(TokenizerOfTransformers()), 4)

    def test_eot_token_counts_first_unless_it_is_none(self):
        self.assertEqual(end_token(SimpleNamespace(eot_token=0, eos_token_id=2)), 0)
        self.assertEqual(end_token(SimpleNamespace(eot_token=None, eos_token_id=2)), 2)

    def test_none(self):
        self.assertIsNone(end_token(None))
        self.assertIsNone(end_token(SimpleNamespace(eos_token_id=None)))

    def test_it_is_a_plain_number(self):
        self.assertIs(type(end_token(SimpleNamespace(eos_token_id=torch.tensor(2)))), int)


class TestCompletions(unittest.TestCase):
    def test_items(self):
        prompted, bare = Completions(
            [{"prompt": "abc", "completion": "de"}, {"text": "f"}], TOKENIZER, 12
        )
        self.assertEqual([x.tolist() for x in prompted], [[0, 1, 2, 3, 4], [-1, -1, 3, 4, END]])
        self.assertEqual([x.tolist() for x in bare], [[END, 5], [5, END]])

    def test_an_empty_prompt_is_the_end_token(self):
        for row in ({"completion": "a"}, {"prompt": "", "completion": "a"}):
            x, _ = Completions([row], TOKENIZER, 12)[0]
            self.assertEqual(x.tolist(), [END, 0])

    def test_the_loss_of_demonstrations_is_the_completions(self):
        model = tiny_gpt()
        rows = [{"prompt": "abc", "completion": "de"}, {"text": "fghij"}]
        batch = Completions.collate(list(Completions(rows, TOKENIZER, 12)))
        log_probs = []
        for prompt, completion in (([0, 1, 2], [3, 4]), ([END], [5, 6, 7, 8, 9])):
            ids = torch.tensor([[*prompt, *completion, END]])
            log_probs.append(model.log_probs(ids)[0, len(prompt) - 1 :])
        _, loss = model(*batch)
        torch.testing.assert_close(loss, -torch.cat(log_probs).mean())
        self.assertEqual(Completions.weight(batch), 3 + 6)

    def test_a_tokenizer_of_transformers(self):
        data = Completions([{"prompt": "a", "completion": "b"}], TokenizerOfTransformers(), 12)
        self.assertEqual([x.tolist() for x in data[0]], [[0, 1], [1, 4]])

    def test_a_tokenizer_without_an_end_token(self):
        with self.assertRaisesRegex(ValueError, "SimpleNamespace has no end token"):
            Completions([], SimpleNamespace(encode=list), 12)

    def test_a_row_that_is_too_long(self):
        row = {"prompt": "abc", "completion": "abc"}  # and its end: 7 tokens, of which 6 are read
        self.assertEqual(len(Completions([row], TOKENIZER, 6)), 1)
        with self.assertRaisesRegex(ValueError, "row 0 has 7 tokens.*takes 6"):
            Completions([row], TOKENIZER, 5)

    def test_a_wrong_row_is_named(self):
        good = {"text": "a"}
        for wrong, words in (
            ({"prompt": "a"}, "row 1 has no field 'completion' or 'text', only ..prompt"),
            ({"completion": None}, "row 1 has completion=None; expected text"),
            ({"text": 3}, "row 1 has text=3; expected text"),
            ({"prompt": 3, "text": "a"}, "row 1 has prompt=3; expected text"),
            ("abc", "row 1 is 'abc'; expected a dict"),
        ):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, words):
                Completions([good, wrong], TOKENIZER, 12)


class TestComparisons(unittest.TestCase):
    def test_items(self):
        prompt, completions = Comparisons(ROWS, TOKENIZER, 12)[0]
        self.assertEqual(prompt.tolist(), [0, 1])
        self.assertEqual([x.tolist() for x in completions], [[2, 3, END], [2, 3, 4, 5, 6, END]])
        prompt, _ = Comparisons(ROWS, TOKENIZER, 12)[2]
        self.assertEqual(prompt.tolist(), [END])

    def test_several_rejected_and_one_that_was_cut_off(self):
        row = {"chosen": "a", "rejected": ["b", "c"], "ended": [True, False, True]}
        _, completions = Comparisons([row], TOKENIZER, 12)[0]
        self.assertEqual([x.tolist() for x in completions], [[0, END], [1], [2, END]])

    def test_a_batch(self):
        rows = [
            {"prompt": "abc", "chosen": "d", "rejected": "ef"},
            {"prompt": "g", "chosen": "hi", "rejected": "j"},
        ]
        batch = Comparisons.collate(list(Comparisons(rows, TOKENIZER, 12)))
        idx, attention_mask, completion_mask = batch
        self.assertEqual(
            idx.tolist(),
            [
                [[0, 1, 2, 3, END, 0], [0, 1, 2, 4, 5, END]],
                [[0, 0, 6, 7, 8, END], [0, 0, 6, 9, END, 0]],
            ],
        )
        self.assertEqual(
            attention_mask.int().tolist(),
            [
                [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
                [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]],
            ],
        )
        self.assertEqual(
            completion_mask.int().tolist(),
            [
                [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]],
                [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]],
            ],
        )

    def test_a_row_that_is_too_long(self):
        with self.assertRaisesRegex(ValueError, "row 0 has 8 tokens.*takes 7"):
            Comparisons(ROWS, TOKENIZER, 7)

    def test_ended_is_one_bool_for_each_completion(self):
        with self.assertRaisesRegex(ValueError, "row 0 has ended=.True. for 2"):
            Comparisons([{**ROWS[0], "ended": [True]}], TOKENIZER, 12)
        with self.assertRaisesRegex(ValueError, "row 0 has ended=.1, 0. for 2"):
            Comparisons([{**ROWS[0], "ended": [1, 0]}], TOKENIZER, 12)

    def test_every_row_has_as_many_rejected(self):
        rows = [ROWS[0], {**ROWS[1], "rejected": ["a", "b"]}]
        with self.assertRaisesRegex(ValueError, "row 1 has 2 rejected"):
            Comparisons(rows, TOKENIZER, 12)

    def test_at_least_one_is_rejected(self):
        with self.assertRaisesRegex(ValueError, "row 0 has 0 rejected.*at least one"):
            Comparisons([{"chosen": "a", "rejected": []}], TOKENIZER, 12)

    def test_a_completion_of_no_token(self):
        row = {"chosen": "a", "rejected": "", "ended": [True, False]}
        with self.assertRaisesRegex(ValueError, "row 0 has a completion that is empty"):
            Comparisons([row], TOKENIZER, 12)

    def test_a_wrong_row_is_named(self):
        for wrong, words in (
            ({"rejected": "a"}, "row 1 has no field 'chosen', only ..rejected"),
            ({"chosen": "a"}, "row 1 has no field 'rejected', only ..chosen"),
            ({"chosen": ["a"], "rejected": "b"}, "row 1 has chosen=..a..; expected text"),
            ({"chosen": "a", "rejected": 3}, "row 1 has rejected=3; expected text"),
            ({"chosen": "a", "rejected": [3]}, "row 1 has 3 in its list rejected"),
            ({**ROWS[0], "prompt": 3}, "row 1 has prompt=3; expected text"),
            (["a", "b"], "row 1 is ..a., .b..; expected a dict"),
        ):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, words):
                Comparisons([ROWS[0], wrong], TOKENIZER, 12)


class TestPrompts(unittest.TestCase):
    def test_text_ids_and_tensors(self):
        for prompts in (["ab", "cd"], [[0, 1], [2, 3]], torch.tensor([[0, 1], [2, 3]])):
            data = Prompts(prompts, TOKENIZER)
            self.assertEqual([ids.tolist() for ids in data.ids], [[0, 1], [2, 3]])
            self.assertTrue(all(ids.dtype == torch.long for ids in data.ids))
            self.assertEqual(data.columns, {})

    def test_rows_with_columns(self):
        rows = [
            {"prompt": "ab", "answer": 3, "level": "easy"},
            {"level": "hard", "prompt": [4], "answer": 5},
        ]
        data = Prompts(rows, TOKENIZER)
        self.assertEqual(len(data), 2)
        self.assertEqual([ids.tolist() for ids in data.ids], [[0, 1], [4]])
        self.assertEqual(data.columns, {"answer": [3, 5], "level": ["easy", "hard"]})

    def test_the_columns_of_a_batch(self):
        data = Prompts([{"prompt": "a", "answer": answer} for answer in "xyz"], TOKENIZER)
        self.assertEqual(data.columns_of(torch.tensor([2, 0, 2])), {"answer": ["z", "x", "z"]})

    def test_items_and_batches(self):
        data = Prompts(["abc", "d"], TOKENIZER)
        ids, i = data[1]
        self.assertEqual((ids.tolist(), i), ([3], 1))
        idx, attention_mask, index = Prompts.collate([data[1], data[0]])
        self.assertEqual(idx.tolist(), [[0, 0, 3], [0, 1, 2]])
        self.assertEqual(attention_mask.tolist(), [[False, False, True], [True, True, True]])
        self.assertEqual(index.tolist(), [1, 0])
        self.assertEqual(index.dtype, torch.long)

    def test_no_prompts(self):
        data = Prompts([])
        self.assertEqual((len(data), data.columns), (0, {}))

    def test_one_text_is_not_a_list_of_prompts(self):
        for wrong in ("abc", {"prompt": ["a", "b"]}):
            with self.subTest(wrong), self.assertRaisesRegex(TypeError, "expected a list"):
                Prompts(wrong, TOKENIZER)

    def test_every_row_has_the_same_columns(self):
        good = {"prompt": "a", "answer": 1}
        for wrong, words in (
            ({"prompt": "b"}, "row 1 has no column 'answer', which row 0 has"),
            ({**good, "level": 1}, "row 1 has a column 'level', which row 0 lacks"),
            ({"answer": 1}, "row 1 has no field 'prompt', only ..answer"),
            ("b", "row 1 has no column 'answer', which row 0 has"),
        ):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, words):
                Prompts([good, wrong], TOKENIZER)

    def test_names_that_a_reward_function_is_given_anyway(self):
        for name in RESERVED_COLUMNS:
            words = f"column '{name}' of row 0 is a name that TextReward uses"
            with self.subTest(name), self.assertRaisesRegex(ValueError, words):
                Prompts([{"prompt": "a", name: 1}], TOKENIZER)

    def test_the_name_of_a_column_is_text(self):
        with self.assertRaisesRegex(ValueError, "row 0 has a column 3"):
            Prompts([{"prompt": "a", 3: 1}], TOKENIZER)

    def test_a_wrong_prompt_is_named(self):
        for wrong, words in (
            ("", r"prompt 1 has shape \(0,\): each must be a row of one token or more"),
            ([], r"prompt 1 has shape \(0,\): each must be a row of one token or more"),
            ([[1]], r"prompt 1 has shape \(1, 1\)"),
            (None, "prompt 1 is None; expected text or token ids"),
            ([{"role": "user"}], "row 1 has messages, .*'user'.*: pass a Chat as the tokenizer"),
            ([1.5], "prompt 1 is .1.5.; token ids must be whole numbers"),
            ([True], "prompt 1 is .True.; token ids must be whole numbers"),
        ):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, words):
                Prompts(["a", wrong], TOKENIZER)

    def test_text_needs_a_tokenizer(self):
        with self.assertRaisesRegex(ValueError, "prompt 1, 'ab', is text: pass the tokenizer"):
            encode_prompts([[1], "ab"])


class TestPadding(unittest.TestCase):
    ROWS = (torch.tensor([1, 2, 3]), torch.tensor([4]))

    def test_pad(self):
        rows = list(self.ROWS)
        self.assertEqual(pad(rows, value=-1).tolist(), [[1, 2, 3], [4, -1, -1]])
        self.assertEqual(pad(rows, value=-1, left=True).tolist(), [[1, 2, 3], [-1, -1, 4]])

    def test_pad_and_mask(self):
        idx, mask = pad_and_mask(list(self.ROWS))
        self.assertEqual(idx.tolist(), [[1, 2, 3], [4, 0, 0]])
        self.assertEqual(mask.tolist(), [[True, True, True], [True, False, False]])

    def test_left_pad(self):
        idx, mask = left_pad(list(self.ROWS))
        self.assertEqual(idx.tolist(), [[1, 2, 3], [0, 0, 4]])
        self.assertEqual(mask.tolist(), [[True, True, True], [False, False, True]])

    def test_a_mask_finds_the_rows_again(self):
        generator = random.Random(0)
        rows = [torch.arange(generator.randint(1, 9)) for _ in range(20)]
        for left in (False, True):
            idx, mask = pad_and_mask(rows, left)
            for row, ids, real in zip(rows, idx, mask, strict=True):
                self.assertEqual(ids[real].tolist(), row.tolist())
