"""The tokenizer against tiktoken and tokenizers, and what must hold of any text."""

import json
import os
import tempfile
import unittest
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
    "gpt2", pat_str=r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    mergeable_ranks=tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(FOLDER / "vocab.bpe"), str(FOLDER / "encoder.json")),
    special_tokens={"<|endoftext|>": 50256})

# words as they come, and what makes splitting hard; of unassigned code points, regex and tiktoken know different Unicodes' letters
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))
HARD = ["I'll", "we've", "'s", "'T", "’s", " ", "  ", "\n\n", "\t", "\r\n", "\x1c", "\x85", "\u00a0", "\u3000", "🙂", "👩‍👩‍👧", "e\u0301",
        "ﬁ", "42", "٣", "½", "你好", "שלום", "<|endoftext|>", "a" * 300]
TEXTS = st.lists(st.one_of(st.text(ASSIGNED), st.sampled_from(HARD)), max_size=12).map("".join)


class TestGPT2(unittest.TestCase):
    def check(self, text):
        ids = GPT2.encode(text)
        self.assertEqual(ids, TIKTOKEN.encode_ordinary(text))
        self.assertEqual(GPT2.decode(ids), text)

    @settings(max_examples=600, deadline=None)
    @given(TEXTS)
    def test_equals_tiktoken_and_comes_back(self, text):
        self.check(text)

    def test_every_code_point_and_source_code(self):
        chars = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
        self.check(" ".join(chars))
        self.check("\n".join(f"{c}a {c}{c} 1{c}" for c in chars[::7]))  # each seventh among letters, spaces and digits
        for path in sorted(Path(torch.__file__).parent.rglob("*.py"))[::10]:
            with self.subTest(path):
                self.check(path.read_text(encoding="utf-8"))

    @settings(max_examples=50, deadline=None)
    @given(st.text(alphabet="abcàé 你", min_size=1, max_size=400))
    def test_long_words_are_merged_the_same_way(self, text):
        word = text.replace(" ", "").encode()
        ids = [GPT2.byte_ids[b] for b in word]
        short = ids.copy()
        while (rank := min((GPT2.ranks.get(pair, bpe.NEVER) for pair in zip(short, short[1:])), default=bpe.NEVER)) != bpe.NEVER:
            list(bpe.join(short, *GPT2.merges[rank]))
        self.assertEqual(bpe.merge_long(ids, GPT2.ranks, GPT2.merges), tuple(short))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, 50255), max_size=20))
    def test_any_ids_decode_as_in_tiktoken(self, ids):
        self.assertEqual(GPT2.decode(ids), TIKTOKEN.decode(ids))  # broken UTF-8 included
        self.assertEqual(GPT2.decode(torch.tensor(ids, dtype=torch.long)), TIKTOKEN.decode(ids))

    def test_files_come_from_the_bucket_where_nothing_else_has_them(self):
        files = {f"/{name}": (FOLDER / name).read_bytes() for name in bpe.GPT2_SHA256}
        with tempfile.TemporaryDirectory() as home, Server(files) as server, mock.patch.dict(os.environ, {"MINGPT_HOME": home}), \
                mock.patch.object(bpe, "GPT2_URL", server.url), mock.patch("importlib.util.find_spec", return_value=None):
            server.moods = ["corrupt"]
            self.assertRaisesRegex(ValueError, "SHA-256", BPETokenizer)
            for _ in range(2):  # the second time from the cache
                self.assertEqual(BPETokenizer().encode("Hello world"), [15496, 995])
            self.assertEqual(len(server.seen), 3)

    def test_interface_and_a_special_token_only_where_it_is_allowed(self):
        self.assertEqual((GPT2.vocab_size, GPT2.eot_token), (50257, 50256))
        ids = GPT2("Hello, world")
        self.assertEqual((ids.dtype, ids.tolist()), (torch.long, [[15496, 11, 995]]))
        self.assertEqual(GPT2.decode([50256]), "<|endoftext|>")
        self.assertRaisesRegex(ValueError, "50257: no id of the 50257 tokens", GPT2.decode, [50257])
        text = "a<|endoftext|>b"
        self.assertEqual(GPT2.encode(text), TIKTOKEN.encode_ordinary(text))
        self.assertEqual(GPT2.encode(text, allowed_special={"<|endoftext|>"}), [64, 50256, 65])
        self.assertRaisesRegex(ValueError, "allowed_special", GPT2.encode, text, allowed_special={"<|im_start|>"})

    def test_showing_the_work(self):
        work = bpe.get_encoder().encode_and_show_work("Hi, naïve 🙂")
        self.assertEqual(work["bpe_idx"], GPT2.encode("Hi, naïve 🙂"))
        self.assertEqual("".join(work["tokens"]), "Hi, naïve 🙂")
        self.assertEqual(sum((part["token_ix"] for part in work["parts"]), []), work["bpe_idx"])
        for part in work["parts"]:
            self.assertEqual("".join(part["token_merged"]), part["token_translated"])


class TestTraining(TempDirTestCase):
    TEXT = Path(bpe.__file__).read_text(encoding="utf-8") + "naïve café 你好 你好吗 " * 20 + "aaaa aaaaaaa abababa " * 50

    def test_equals_the_tokenizers_library(self):
        texts = [self.TEXT[:5000], self.TEXT[5000:]]
        ours, theirs = BPETokenizer.train(texts, 700), tokenizers.ByteLevelBPETokenizer()
        theirs.train_from_iterator(texts, vocab_size=699, min_frequency=1, show_progress=False)
        theirs.save_model(str(self.folder))
        merges = (self.folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        self.assertEqual([" ".join(pair) for pair in ours.merge_list], merges)

    def test_saved_files_are_read_by_others_and_by_us(self):
        ours = BPETokenizer.train([self.TEXT], 600)
        ours.save_pretrained(self.folder)
        again = BPETokenizer.from_pretrained(self.folder)
        names = str(self.folder / "vocab.json"), str(self.folder / "merges.txt")
        fast, slow = tokenizers.ByteLevelBPETokenizer(*names), transformers.GPT2Tokenizer(*names)
        for text in (self.TEXT.replace("<|endoftext|>", ""), "something else: ÄÖÜ 🙂\n\n  x"):
            ids = ours.encode(text)
            self.assertEqual(ours.decode(ids), text)
            self.assertEqual([again.encode(text), fast.encode(text).ids, slow(text)["input_ids"]], [ids] * 3)
        self.assertEqual((ours.vocab_size, ours.eot_token), (600, 599))

    def test_deterministic_and_refusing_what_does_not_fit(self):
        one, two = (BPETokenizer.train([self.TEXT], 500) for _ in range(2))
        self.assertEqual(one.merge_list, two.merge_list)
        self.assertRaisesRegex(ValueError, "not vocab_size=5000", BPETokenizer.train, ["a few words"], 5000)
        self.assertRaisesRegex(ValueError, "257 or more", BPETokenizer.train, ["a"], 256)
        refuses = lambda words: self.assertRaisesRegex(ValueError, words, BPETokenizer.from_pretrained, self.folder)
        refuses("holds no vocabulary")
        BPETokenizer.train([self.TEXT], 300).save_pretrained(self.folder)
        with (self.folder / "merges.txt").open("a") as f:
            f.write("q z\n")
        refuses("the two files do not fit")
        (self.folder / "vocab.json").write_text(json.dumps({"a": 0}))
        refuses("lacks the 255 bytes")
