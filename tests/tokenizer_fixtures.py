"""Small tokenizers of each family, made with the package `tokenizers`, and texts to try them on."""

import contextlib
import json
import tempfile
import unittest
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from mingpt import bpe, gguf
from mingpt.bpe import BPETokenizer
from tests.test_gguf import cached_smollm2

# As the four families write them in tokenizer.json.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def split_by(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def pre_tokenizer(family):
    if family == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return split_by(LLAMA3 if family == "llama3" else QWEN2)


FAMILIES = ("gpt2", "smollm", "llama3", "qwen2")

TRAINING_TEXT = (
    Path(bpe.__file__).read_text(encoding="utf-8")
    + "naïve café 你好 你好吗 мир שלום ﬁ é " * 30
    + "I'M WE'LL it's 12345 2024 3.14159\r\n\r\n\t\tx  y\n\n\n" * 30
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make(family):
    """A tokenizer of `tokenizers`, of 600 tokens and three special ones."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizer(family)
    tokenizer.decoder = decoders.ByteLevel()
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    return tokenizer


def save(tokenizer, folder, **config):
    """Write the two files that a model's folder has; config goes into tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@contextlib.contextmanager
def folder():
    """A temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@cache
def real_smollm2():
    """(our tokenizer, the vocabulary in the file) of SmolLM2; skips the test without its file."""
    path = cached_smollm2()
    if path is None:
        raise unittest.SkipTest("smollm2 is not in the cache")
    return BPETokenizer.from_pretrained("smollm2"), gguf.read(path)[2]
