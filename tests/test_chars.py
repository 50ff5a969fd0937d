"""The character tokenizer."""

import torch

from mingpt.chars import UNKNOWN, CharTokenizer
from tests.common import TempDirTestCase

TEXTS = ["hello wörld", "¡hola! 😀", "e\u0301"]


class TestCharTokenizer(TempDirTestCase):
    def test_characters_there_and_back(self):
        tokenizer = CharTokenizer.train(TEXTS)
        for text in TEXTS:
            self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)
            self.assertEqual(tokenizer(text).shape, (1, len(text)))

    def test_end_of_text(self):
        tokenizer = CharTokenizer.train(TEXTS)
        self.assertEqual(tokenizer.decode(torch.tensor([tokenizer.eot_token])), "<|endoftext|>")

    def test_the_vocabulary_is_the_texts_characters_and_two_more(self):
        tokenizer = CharTokenizer.train(TEXTS)
        characters = set("".join(TEXTS))
        self.assertEqual(tokenizer.vocab_size, len(characters) + 2)  # unknown, end of text

    def test_it_saves_and_loads(self):
        tokenizer = CharTokenizer.train(TEXTS)
        tokenizer.save_pretrained(self.folder)
        self.assertEqual(CharTokenizer.from_pretrained(self.folder).chars, tokenizer.chars)

    def test_rare_and_unknown_characters(self):
        tokenizer = CharTokenizer.train(["aaab"], min_count=2)
        self.assertEqual(tokenizer.decode(tokenizer.encode("abz")), "a" + 2 * UNKNOWN)

    def test_without_an_unknown_character_others_are_refused(self):
        with self.assertRaisesRegex(ValueError, r"characters \['z'\] are not in the vocabulary"):
            CharTokenizer("ab").encode("az")

    def test_characters_must_be_distinct(self):
        with self.assertRaisesRegex(ValueError, "distinct"):
            CharTokenizer("aa")
