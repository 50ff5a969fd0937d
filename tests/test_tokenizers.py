"""Tokenizers of other families, against the package `tokenizers`, token for token."""

import json
import unicodedata
import unittest
from functools import cache
from pathlib import Path

import tokenizers
import torch
import transformers
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, models, pre_tokenizers

from mingpt.bpe import BPETokenizer, bytes_to_unicode
from mingpt.tokenizer_files import from_gguf
from mingpt.words import WORD_RULES
from tests import tokenizer_fixtures as fixtures
from tests.common import TempDirTestCase
from tests.tokenizer_fixtures import FAMILIES

# Characters that both sides know: they follow different versions of Unicode.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))
HARD = [
    *("I'll", "WE'VE", "'s", "'T", "’s", "'ſ", "'"),
    *(" ", "  ", "\n\n", "\t", "\r\n", "\x1c", "\x85", "\u00a0", "\u3000", "\u200d"),
    *("🙂", "👩‍👩‍👧", "e\u0301", "é", "ﬁ", "\u212a", "\uac00\u11a8"),
    *("42", "12345", "٣", "½", "_"),
    *("你好", "שלום", ".", "!?", "<", "|>"),
]
# Tokens with each rule, and texts that they stand in.
ADDED = [
    AddedToken("<mark>", lstrip=True, normalized=False),
    AddedToken("word", single_word=True, normalized=True),
    AddedToken("<é>", rstrip=True, normalized=True),
    AddedToken("<|im_", normalized=False),
]
ADDED_SPECIAL = [
    AddedToken("<both>", lstrip=True, rstrip=True),
    AddedToken("<|im_end|><|im_start|>"),
    AddedToken("  <x>"),
]
NAMES = ["<mark>", "word", "<é>", "<e\u0301>", "<|im_", "<both>", "<x>", *fixtures.SPECIAL]
TEXTS = st.lists(st.one_of(st.text(ASSIGNED), st.sampled_from(HARD)), max_size=12).map("".join)
SPECIAL_TEXTS = st.lists(
    st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES + HARD), st.text(ASSIGNED, max_size=2)),
    max_size=12,
).map("".join)


def as_written(tokenizer):
    """Our tokenizer, made of a tokenizer.json that `tokenizers` has written."""
    with fixtures.folder() as folder:
        fixtures.save(tokenizer, folder)
        return BPETokenizer.from_pretrained(folder)


@cache
def pair(family):
    """(theirs, ours) of a family. Theirs takes special tokens for text, as ours does."""
    theirs = fixtures.make(family)
    ours = as_written(theirs)
    theirs.encode_special_tokens = True
    return theirs, ours


@cache
def pair_with_added_tokens(family):
    """(theirs, ours) with added tokens of every rule."""
    theirs = fixtures.make(family)
    theirs.add_tokens(ADDED)
    theirs.add_special_tokens(ADDED_SPECIAL)
    return theirs, as_written(theirs)


class TestEqualsTokenizers(unittest.TestCase):
    """Every family, on the same texts."""

    def check(self, family, text):
        theirs, ours = pair(family)
        ids = ours.encode(text)
        # Not assertEqual, which would take minutes to show how two long lists differ.
        self.assertTrue(ids == theirs.encode(text).ids, f"{family}: {text!r:.200}")
        return ids

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def test_any_text(self, text):
        for family in FAMILIES:
            self.check(family, text)

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def test_a_text_comes_back(self, text):
        for family in FAMILIES:
            ours = pair(family)[1]
            expected = unicodedata.normalize("NFC", text) if family == "qwen2" else text
            self.assertEqual(ours.decode(ours.encode(text)), expected)

    def test_every_code_point(self):
        every = map(chr, range(0x110000))
        known = [c for c in every if unicodedata.category(c) not in ("Cs", "Cn")]
        for family in FAMILIES:
            self.check(family, "\n".join(f"{c}a {c}{c} 1{c}'{c}" for c in known[::11]))
            self.check(family, " ".join(known))

    def test_source_code(self):
        for path in sorted(Path(torch.__file__).parent.rglob("*.py"))[::80]:
            text = path.read_text(encoding="utf-8")
            for family in FAMILIES:
                self.check(family, text)

    def test_both_patterns_of_a_rule_cut_ascii_texts_alike(self):
        @settings(max_examples=300, deadline=None)
        @given(st.text(st.sampled_from("aB'sS1 .\n\r\t\x1c_"), max_size=30))
        def cut(text):
            for rule in WORD_RULES:
                words = rule.ascii_pattern.findall(text)
                self.assertEqual(words, rule.pattern.findall(text))
                self.assertEqual("".join(words), text)

        cut()


class TestAddedTokens(unittest.TestCase):
    @settings(max_examples=300, deadline=None)
    @given(SPECIAL_TEXTS)
    def test_all_special_tokens_allowed(self, text):
        for family in FAMILIES:
            theirs, ours = pair_with_added_tokens(family)
            theirs.encode_special_tokens = False
            expected = theirs.encode(text).ids
            self.assertEqual(ours.encode(text, allowed_special=ours.special), expected)

    @settings(max_examples=300, deadline=None)
    @given(SPECIAL_TEXTS)
    def test_special_tokens_are_text_unless_allowed(self, text):
        for family in FAMILIES:
            theirs, ours = pair_with_added_tokens(family)
            theirs.encode_special_tokens = True
            ids = ours.encode(text)
            self.assertEqual(ids, theirs.encode(text).ids)
            self.assertFalse(set(ids) & set(ours.special.values()))

    def test_only_the_allowed_one_is_found(self):
        ours = pair("smollm")[1]
        start, end = ours.special["<|im_start|>"], ours.special["<|im_end|>"]
        ids = ours.encode("<|im_start|>a<|im_end|>", allowed_special={"<|im_end|>"})
        self.assertEqual(ids[-1], end)
        self.assertNotIn(start, ids)

    def test_an_unknown_special_token_is_refused(self):
        with self.assertRaisesRegex(ValueError, r"got allowed_special=\['<\|eot_id\|>'\]"):
            pair("llama3")[1].encode("a", allowed_special={"<|eot_id|>"})

    def test_the_end_token_is_the_one_that_the_config_names(self):
        for family in FAMILIES:
            ours = pair(family)[1]
            self.assertEqual(ours.eot_token, ours.special["<|im_end|>"])

    def test_half_a_surrogate_beside_a_special_token(self):
        ours = pair("smollm")[1]
        ids = ours.encode("\ud800<|im_end|>", allowed_special=["<|im_end|>"])
        self.assertEqual(ours.decode(ids), "\ufffd<|im_end|>")


class TestSaving(TempDirTestCase):
    TEXT = "I'M here.\n\nIt's  12345 <|im_end|> é e\u0301 <mark> word words<both> 你好"

    def test_others_and_we_read_what_we_wrote(self):
        for family in FAMILIES:
            theirs, ours = pair_with_added_tokens(family)
            theirs.encode_special_tokens = False
            expected = theirs.encode(self.TEXT).ids
            ours.save_pretrained(self.folder / family)

            again = BPETokenizer.from_pretrained(self.folder / family)
            self.assertEqual(again.vocabulary, ours.vocabulary)
            fast = tokenizers.Tokenizer.from_file(str(self.folder / family / "tokenizer.json"))
            self.assertEqual(fast.encode(self.TEXT).ids, expected)
            auto = transformers.AutoTokenizer.from_pretrained(self.folder / family)
            self.assertEqual(auto.encode(self.TEXT), expected)
            self.assertEqual(auto.eos_token_id, ours.eot_token)
            self.assertEqual(auto.decode(expected), ours.decode(expected))

    def test_a_tokenizer_takes_the_place_of_one_of_the_other_kind(self):
        plain = BPETokenizer.train([fixtures.TRAINING_TEXT], 300)
        ours = pair("qwen2")[1]
        for saved in (plain, ours, plain):
            saved.save_pretrained(self.folder)
            again = BPETokenizer.from_pretrained(self.folder)
            self.assertEqual(again.vocabulary, saved.vocabulary)


class TestTraining(unittest.TestCase):
    def test_special_tokens_of_ones_own(self):
        special = ["<|im_start|>", "<|im_end|>"]
        ours = BPETokenizer.train([fixtures.TRAINING_TEXT], 300, special_tokens=special)
        self.assertEqual(ours.vocab_size, 300)
        self.assertEqual(list(ours.special.values()), [297, 298, 299])
        self.assertEqual(ours.encode("<|im_end|>", allowed_special=special), [299])
        self.assertNotIn(299, ours.encode("<|im_end|>"))

    def test_special_tokens_that_are_tokens_already(self):
        with self.assertRaisesRegex(ValueError, "some are tokens already"):
            BPETokenizer.train([fixtures.TRAINING_TEXT], 300, special_tokens=["a"])
        with self.assertRaisesRegex(ValueError, "it must be 258 or more"):
            BPETokenizer.train([fixtures.TRAINING_TEXT], 257, special_tokens=["<x>"])


class TestRefused(TempDirTestCase):
    """Whatever would give other tokens is refused, by its name and with a way out."""

    def refused(self, words, **changes):
        content = json.loads(pair("gpt2")[0].to_str())
        model = content["model"] | changes.pop("model", {})
        content = content | {"model": model} | changes
        (self.folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        with self.assertRaisesRegex(ValueError, words) as caught:
            BPETokenizer.from_pretrained(self.folder)
        return str(caught.exception)

    def test_other_models(self):
        for kind in ("Unigram", "WordPiece", "WordLevel"):
            message = self.refused(kind, model={"type": kind})
            self.assertIn("Use transformers' own instead", message)

    def test_other_settings_of_bpe(self):
        self.refused("byte_fallback", model={"byte_fallback": True})
        self.refused("end_of_word_suffix", model={"end_of_word_suffix": "</w>"})
        self.refused("continuing_subword_prefix", model={"continuing_subword_prefix": "##"})
        self.refused("dropout", model={"dropout": 0.1})

    def test_other_normalizers(self):
        self.refused("Lowercase", normalizer={"type": "Lowercase"})
        sequence = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}
        self.refused("NFKC", normalizer=sequence)

    def test_other_decoders(self):
        self.refused("Metaspace", decoder={"type": "Metaspace"})

    def test_other_pre_tokenizers(self):
        self.refused("pre_tokenizer", pre_tokenizer=None)
        self.refused("Whitespace", pre_tokenizer={"type": "Whitespace"})
        prefix_space = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
        self.refused("add_prefix_space", pre_tokenizer=prefix_space)

    def test_an_unknown_pattern(self):
        split = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex("[a-z]+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        theirs = fixtures.make("gpt2")
        theirs.pre_tokenizer = split
        self.refused(r"\[a-z\]\+", pre_tokenizer=json.loads(theirs.to_str())["pre_tokenizer"])

    def test_a_byte_level_without_bytes(self):
        self.refused("no token for 256 of the 256 bytes", model={"vocab": {}, "merges": []})

    def test_damaged_files(self):
        self.refused("the merge", model={"merges": ["a b c"]})
        for part in ({"model": {"vocab": [1]}}, {"pre_tokenizer": 1}, {"added_tokens": 7}):
            self.refused("is damaged; expected a tokenizer", **part)
        self.refused("among its added tokens", added_tokens=[{"content": "<x>"}])
        (self.folder / "tokenizer.json").write_text("{")
        with self.assertRaisesRegex(ValueError, "damaged"):
            BPETokenizer.from_pretrained(self.folder)

    def test_a_special_token_that_text_becomes_by_itself(self):
        token = {"content": "!", "id": 0, "special": True}
        vocab = json.loads(pair("gpt2")[0].to_str())["model"]["vocab"]
        self.refused("ordinary text becomes", added_tokens=[token | {"id": vocab["!"]}])


class TestVariants(unittest.TestCase):
    """Ways of writing the same, and rare settings."""

    def test_merges_as_texts(self):
        theirs, ours = pair("smollm")
        content = json.loads(theirs.to_str())
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
        with fixtures.folder() as folder:
            (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
            self.assertEqual(BPETokenizer.from_pretrained(folder).merge_list, ours.merge_list)

    def test_cl100ks_way_to_write_the_rule_of_llama_3(self):
        theirs = fixtures.make("llama3")
        pattern = tokenizers.Regex(fixtures.LLAMA3)
        theirs.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        text = "I'M 12345.\n\n"
        self.assertEqual(as_written(theirs).encode(text), theirs.encode(text).ids)

    def test_words_that_are_tokens_by_themselves(self):
        # Without merges, only ignore_merges makes a token of a word.
        characters = sorted(bytes_to_unicode().values())
        vocab = {character: i for i, character in enumerate([*characters, "Ġword"])}
        for ignore_merges in (True, False):
            theirs = tokenizers.Tokenizer(models.BPE(vocab, [], ignore_merges=ignore_merges))
            theirs.pre_tokenizer = fixtures.pre_tokenizer("llama3")
            ids = as_written(theirs).encode("a word")
            self.assertEqual(ids, theirs.encode("a word").ids)
            self.assertEqual(256 in ids, ignore_merges)

    def test_bytes_that_the_vocabulary_lacks(self):
        for unknown in (None, "<unk>"):
            theirs = lacking_bytes(unknown)
            ours = as_written(theirs)
            for text in ("a\x04b", "\x04", "x\x05\x04\x04 y"):
                expected = theirs.encode(text).ids
                with self.assertLogs("mingpt") if unknown is None else self.subTest(text):
                    ours.words.clear()
                    self.assertEqual(ours.encode(text), expected)


def lacking_bytes(unknown):
    """A tokenizer whose vocabulary has no token for the byte 4, as SmolLM2's."""
    characters = bytes_to_unicode()
    tokens = [characters[byte] for byte in range(256) if byte != 4]
    vocab = {token: i for i, token in enumerate([*tokens, "<unk>"])}
    theirs = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token=unknown))
    theirs.pre_tokenizer = fixtures.pre_tokenizer("gpt2")
    theirs.add_special_tokens(["<unk>"])
    return theirs


class TestGGUF(unittest.TestCase):
    """A GGUF's vocabulary, in the form in which gguf.read returns it."""

    def vocabulary(self, family, **changes):
        pre = {"gpt2": "gpt-2", "smollm": "smollm", "llama3": "llama-bpe", "qwen2": "qwen2"}
        content = json.loads(pair(family)[0].to_str())
        vocab = content["model"]["vocab"]
        special = {token["content"] for token in content["added_tokens"]}
        return {
            "tokens": sorted(vocab, key=vocab.__getitem__),
            "merges": [" ".join(merge) for merge in content["model"]["merges"]],
            "types": [3 if token in special else 1 for token in sorted(vocab, key=vocab.get)],
            "pre": pre[family],
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }

    @settings(max_examples=50, deadline=None)
    @given(SPECIAL_TEXTS)
    def test_equals_the_tokenizer_that_it_was_made_of(self, text):
        for family in FAMILIES:
            ours = gguf_tokenizer(family)
            expected = pair(family)[1]
            self.assertEqual(ours.encode(text), expected.encode(text))
            ids = ours.encode(text, allowed_special=ours.special)
            self.assertEqual(ids, expected.encode(text, allowed_special=expected.special))

    def test_end_token(self):
        self.assertEqual(gguf_tokenizer("smollm").eot_token, 2)

    def test_a_token_of_the_user_is_no_special_one(self):
        tokens = self.vocabulary("qwen2")["tokens"]
        types = [3, 3, 3, *[1] * (len(tokens) - 3), 4]
        vocabulary = self.vocabulary("qwen2", tokens=[*tokens, "<think>"], types=types)
        ours = BPETokenizer(**vars(from_gguf("a.gguf", vocabulary)))
        self.assertEqual(ours.encode("<think>"), [len(tokens)])
        self.assertNotIn("<think>", ours.special)

    def test_an_unknown_rule_is_refused(self):
        with self.assertRaisesRegex(ValueError, r"a\.gguf .* by the rule 'chameleon'"):
            from_gguf("a.gguf", self.vocabulary("gpt2", pre="chameleon"))

    def test_another_kind_is_refused(self):
        with self.assertRaisesRegex(ValueError, "kind 'llama'. Use transformers' own"):
            from_gguf("a.gguf", self.vocabulary("gpt2", model="llama"))

    def test_no_vocabulary_is_refused(self):
        with self.assertRaisesRegex(ValueError, r"a\.gguf has no vocabulary of byte-level BPE"):
            from_gguf("a.gguf", None)


@cache
def gguf_tokenizer(family):
    return BPETokenizer(**vars(from_gguf("a.gguf", TestGGUF().vocabulary(family))))


class TestSmolLM2(unittest.TestCase):
    """The real vocabulary, where its file is at hand."""

    @classmethod
    def setUpClass(cls):
        cls.ours, vocabulary = fixtures.real_smollm2()
        vocab = {token: i for i, token in enumerate(vocabulary["tokens"])}
        merges = [tuple(merge.split(" ")) for merge in vocabulary["merges"]]
        cls.theirs = tokenizers.Tokenizer(models.BPE(vocab, merges))
        cls.theirs.pre_tokenizer = fixtures.pre_tokenizer("smollm")
        kinds = zip(vocabulary["tokens"], vocabulary["types"], strict=True)
        cls.theirs.add_special_tokens([token for token, kind in kinds if kind == 3])
        cls.theirs.encode_special_tokens = True

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def test_any_text(self, text):
        self.assertEqual(self.ours.encode(text), self.theirs.encode(text).ids)

    def test_source_code(self):
        for path in sorted(Path(torch.__file__).parent.rglob("*.py"))[::80]:
            text = path.read_text(encoding="utf-8")
            self.assertTrue(self.ours.encode(text) == self.theirs.encode(text).ids, path)

    def test_names(self):
        self.assertEqual(self.ours.special["<|im_start|>"], 1)
        self.assertEqual(self.ours.eot_token, self.ours.special["<|im_end|>"])
        self.assertEqual(self.ours.vocab_size, 49152)
