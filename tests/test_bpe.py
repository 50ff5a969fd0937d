"""The tokenizer against tiktoken and tokenizers, and what must hold of any text."""

import json
import os
import tempfile
import unittest
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from unittest import mock

import tiktoken.load
import tokenizers
import torch
import transformers
from hypothesis import given, settings, strategies as st

from mingpt import bpe
from mingpt.bpe import BPETokenizer
from tests.common import Server, TempDirTestCase

GPT2 = BPETokenizer()
FOLDER = bpe.gpt2_folder()
TIKTOKEN = tiktoken.Encoding(
    "gpt2",
    pat_str=r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    mergeable_ranks=tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(FOLDER / "vocab.bpe"), str(FOLDER / "encoder.json")
    ),
    special_tokens={"<|endoftext|>": 50256},
)

# Any characters, and pieces that are hard to split. Without unassigned code points (Cn): regex and
# tiktoken follow different versions of Unicode, and may call different ones of them letters.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))
HARD = [
    *("I'll", "we've", "'s", "'T", "’s"),
    *(" ", "  ", "\n\n", "\t", "\r\n", "\x1c", "\x85", "\u00a0", "\u3000"),
    *("🙂", "👩‍👩‍👧", "e\u0301", "ﬁ"),
    *("42", "٣", "½"),
    *("你好", "שלום"),
    *("<|endoftext|>", "a" * 300),
]
TEXTS = st.lists(st.one_of(st.text(ASSIGNED), st.sampled_from(HARD)), max_size=12).map("".join)


TOKENS = st.integers(0, 2)  # so few that pairs occur often, and overlap


class TestTheIdea(unittest.TestCase):
    """The slow definition, and that the fast code computes the same."""

    def test_the_example_at_the_top_of_the_file(self):
        merges = bpe.simple_train(list(b"banana band"), n_merges=2)
        self.assertEqual(merges, {(ord("a"), ord("n")): 256, (ord("b"), 256): 257})
        ids = bpe.simple_encode(list(b"banana band"), merges)
        self.assertEqual(ids, [257, 256, ord("a"), ord(" "), 257, ord("d")])

    @settings(max_examples=100, deadline=None)
    @given(st.text(alphabet="abc", max_size=60))
    def test_training_finds_the_same_pairs(self, text):
        ids = list(text.encode())
        expected = list(bpe.simple_train(ids, n_merges=20))
        self.assertEqual(list(bpe.most_frequent_pairs([ids], [1], n=20)), expected)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(TOKENS, max_size=20), st.tuples(TOKENS, TOKENS))
    def test_joining_in_a_word_tells_what_changes(self, word, pair):
        counts = Counter(pairwise(word))
        expected = bpe.replace_pair(word, pair, 9)
        changes = bpe.join_in_word(word, pair, 9)
        self.assertEqual(word, expected)
        # adding the changes gives the counts of the new word, but for the pair that was joined
        counts.subtract(old_pair for old_pair, _ in changes)
        counts.update(new_pair for _, new_pair in changes)
        counts.pop(pair, None)
        remaining = {pair: count for pair, count in counts.items() if count != 0}
        self.assertEqual(remaining, Counter(pairwise(word)))

    @settings(max_examples=50, deadline=None)
    @given(st.text(alphabet="abcàé 你", min_size=1, max_size=400))
    def test_long_words_are_merged_the_same_way(self, text):
        word = text.replace(" ", "").encode()
        ids = [GPT2.byte_ids[byte] for byte in word]
        merges = {(left, right): new_id for left, right, new_id in GPT2.merges}
        expected = tuple(bpe.simple_encode(ids, merges))
        self.assertEqual(bpe.merge_short(ids.copy(), GPT2.ranks, GPT2.merges), expected)
        self.assertEqual(bpe.merge_long(ids.copy(), GPT2.ranks, GPT2.merges), expected)


class TestGPT2(unittest.TestCase):
    def check(self, text):
        ids = GPT2.encode(text)
        self.assertEqual(ids, TIKTOKEN.encode_ordinary(text))
        self.assertEqual(GPT2.decode(ids), text)

    @settings(max_examples=600, deadline=None)
    @given(TEXTS)
    def test_equals_tiktoken_and_comes_back(self, text):
        self.check(text)

    def test_every_code_point(self):
        chars = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
        self.check(" ".join(chars))
        # every seventh one among letters, spaces and digits
        self.check("\n".join(f"{c}a {c}{c} 1{c}" for c in chars[::7]))

    def test_source_code(self):
        for path in sorted(Path(torch.__file__).parent.rglob("*.py"))[::10]:
            with self.subTest(path):
                self.check(path.read_text(encoding="utf-8"))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, 50255), max_size=20))
    def test_any_ids_decode_as_in_tiktoken(self, ids):
        expected = TIKTOKEN.decode(ids)  # broken UTF-8 included
        self.assertEqual(GPT2.decode(ids), expected)
        self.assertEqual(GPT2.decode(torch.tensor(ids, dtype=torch.long)), expected)

    def test_vocabulary_and_end_of_text(self):
        self.assertEqual(GPT2.vocab_size, 50257)
        self.assertEqual(GPT2.eot_token, 50256)
        self.assertEqual(GPT2.decode([50256]), "<|endoftext|>")

    def test_calling_it_gives_a_batch_of_one_row(self):
        ids = GPT2("Hello, world")
        self.assertEqual(ids.dtype, torch.long)
        self.assertEqual(ids.tolist(), [[15496, 11, 995]])

    def test_unknown_ids_are_refused(self):
        message = "got 50257; expected the ids of this vocabulary's 50257 tokens"
        self.assertRaisesRegex(ValueError, message, GPT2.decode, [50257])

    def test_a_whole_batch_is_refused(self):
        message = "decode one row of a batch at a time"
        self.assertRaisesRegex(ValueError, message, GPT2.decode, torch.tensor([[1, 2], [3, 4]]))

    def test_a_special_token_is_text_unless_it_is_allowed(self):
        text = "a<|endoftext|>b"
        self.assertEqual(GPT2.encode(text), TIKTOKEN.encode_ordinary(text))
        ids = GPT2.encode(text, allowed_special={"<|endoftext|>"})
        self.assertEqual(ids, [64, 50256, 65])

    def test_an_unknown_special_token_is_refused(self):
        with self.assertRaisesRegex(ValueError, r"got allowed_special=\['<\|im_start\|>'\]"):
            GPT2.encode("a<|endoftext|>b", allowed_special={"<|im_start|>"})

    def test_one_file_without_the_other_is_refused(self):
        message = "got only one of vocab and merges"
        self.assertRaisesRegex(ValueError, message, BPETokenizer, vocab=GPT2.vocab)
        self.assertRaisesRegex(ValueError, message, BPETokenizer, merges=GPT2.merge_list)

    def test_showing_the_work(self):
        text = "Hi, naïve 🙂"
        work = bpe.get_encoder().encode_and_show_work(text)
        self.assertEqual(work["bpe_idx"], GPT2.encode(text))
        self.assertEqual("".join(work["tokens"]), text)
        ids = chain.from_iterable(part["token_ix"] for part in work["parts"])
        self.assertEqual(list(ids), work["bpe_idx"])
        for part in work["parts"]:
            self.assertEqual("".join(part["token_merged"]), part["token_translated"])


class TestGPT2Files(unittest.TestCase):
    def test_files_come_from_the_bucket_where_nothing_else_has_them(self):
        files = {f"/{name}": (FOLDER / name).read_bytes() for name in bpe.GPT2_SHA256}
        server = self.enterContext(Server(files))
        home = self.enterContext(tempfile.TemporaryDirectory())
        self.enterContext(mock.patch.dict(os.environ, {"MINGPT_HOME": home}))
        self.enterContext(mock.patch.object(bpe, "GPT2_URL", server.url))
        self.enterContext(mock.patch("importlib.util.find_spec", return_value=None))

        server.moods = ["corrupt"]
        self.assertRaisesRegex(ValueError, "SHA-256", BPETokenizer)
        for _ in range(2):  # the second time from the cache
            self.assertEqual(BPETokenizer().encode("Hello world"), [15496, 995])
        self.assertEqual(len(server.seen), 3)  # the corrupt file, and then two good ones


class TestTraining(TempDirTestCase):
    TEXT = (
        Path(bpe.__file__).read_text(encoding="utf-8")
        + "naïve café 你好 你好吗 " * 20
        + "aaaa aaaaaaa abababa " * 50
    )

    def test_equals_the_tokenizers_library(self):
        texts = [self.TEXT[:5000], self.TEXT[5000:]]
        theirs = tokenizers.ByteLevelBPETokenizer()
        theirs.train_from_iterator(texts, vocab_size=699, min_frequency=1, show_progress=False)
        theirs.save_model(str(self.folder))
        expected = (self.folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]

        ours = BPETokenizer.train(texts, 700)  # one more: the end of a text
        self.assertEqual([" ".join(pair) for pair in ours.merge_list], expected)

    def test_saved_files_are_read_by_others_and_by_us(self):
        ours = BPETokenizer.train([self.TEXT], 600)
        ours.save_pretrained(self.folder)
        again = BPETokenizer.from_pretrained(self.folder)
        files = (str(self.folder / "vocab.json"), str(self.folder / "merges.txt"))
        fast = tokenizers.ByteLevelBPETokenizer(*files)
        slow = transformers.GPT2Tokenizer(*files)
        texts = [
            self.TEXT.replace("<|endoftext|>", ""),
            "something else: ÄÖÜ 🙂\n\n  x",
        ]
        for text in texts:
            ids = ours.encode(text)
            self.assertEqual(ours.decode(ids), text)
            self.assertEqual(again.encode(text), ids)
            self.assertEqual(fast.encode(text).ids, ids)
            self.assertEqual(slow(text)["input_ids"], ids)

    def test_the_end_of_a_text_is_the_last_token(self):
        tokenizer = BPETokenizer.train([self.TEXT], 600)
        self.assertEqual(tokenizer.vocab_size, 600)
        self.assertEqual(tokenizer.eot_token, 599)

    def test_deterministic(self):
        one = BPETokenizer.train([self.TEXT], 500)
        two = BPETokenizer.train([self.TEXT], 500)
        self.assertEqual(one.merge_list, two.merge_list)

    def test_too_little_text_is_refused(self):
        with self.assertRaisesRegex(ValueError, "not vocab_size=5000: pass more text"):
            BPETokenizer.train(["a few words"], 5000)

    def test_too_small_a_vocabulary_is_refused(self):
        with self.assertRaisesRegex(ValueError, "vocab_size=256; it must be 257 or more"):
            BPETokenizer.train(["a"], 256)


class TestLoading(TempDirTestCase):
    def assert_refused(self, message):
        self.assertRaisesRegex(ValueError, message, BPETokenizer.from_pretrained, self.folder)

    def test_a_folder_without_a_vocabulary(self):
        self.assert_refused("contains no vocabulary")

    def test_merges_of_another_vocabulary(self):
        BPETokenizer.train([TestTraining.TEXT], 300).save_pretrained(self.folder)
        with (self.folder / "merges.txt").open("a") as f:
            f.write("q z\n")
        self.assert_refused("the token 'qz', which is not in the vocabulary")

    def test_a_vocabulary_without_the_bytes(self):
        (self.folder / "vocab.json").write_text(json.dumps({"a": 0}))
        (self.folder / "merges.txt").write_text("#version: 0.2\n")
        self.assert_refused("no token for 255 of the 256 bytes")
