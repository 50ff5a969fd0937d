"""
The names that the fuzzer's calls are written in: `from tests.fuzz_names import *` runs their lines.

Everything public of mingpt, and short functions that make random tensors, models, and files in a
folder of their own.
"""

# ruff: noqa: F401, F403, F405  # everything is imported, to be used in lines of source
import functools
import importlib
import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from mingpt import rewards, shuffle, utils
from mingpt.bpe import *
from mingpt.chars import *
from mingpt.checkpoint import *
from mingpt.config import *
from mingpt.datasets import *
from mingpt.datasets import read_text as datasets_read_text
from mingpt.evaluation import *
from mingpt.evaluation import score as evaluate_score
from mingpt.heads import *
from mingpt.model import *
from mingpt.plots import plot_metrics
from mingpt.rewards import *
from mingpt.rlhf import *
from mingpt.rlhf import average, average_denominator
from mingpt.run_folder import *
from mingpt.stages import Stages
from mingpt.trainer import *
from mingpt.utils import *
from tests.common import tiny_gpt

download = importlib.import_module("mingpt.download")  # bpe's * has a function of this name

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
VOCAB = 11


def clear_folder():
    """Begin with an empty folder."""
    if any(FOLDER.iterdir()):
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir(exist_ok=True)


def write(name, content):
    """Write text or bytes to a file in the folder. Returns its path."""
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rng(seed):
    """A generator of PyTorch's."""
    return torch.Generator().manual_seed(seed)


def floats(seed, shape, scale=1.0):
    """Normal numbers."""
    return scale * torch.randn(shape, generator=rng(seed))


def ids(seed, shape, vocab=VOCAB):
    """Token ids."""
    return torch.randint(vocab, shape, generator=rng(seed))


def bits(seed, shape, kind=torch.bool):
    """A mask."""
    return (torch.rand(shape, generator=rng(seed)) < 0.6).to(kind)


def padding(seed, shape, left=False, kind=torch.bool):
    """A mask of padded rows: each has a real token or more."""
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=rng(seed))
    mask = torch.arange(shape[1]) < lengths
    return (mask.flip(1) if left else mask).to(kind)


@functools.cache
def gpt(seed=0, **options):
    """A tiny GPT in evaluation mode. The same one for the same arguments."""
    return tiny_gpt(seed, **options)


def new_gpt(seed=0, **options):
    """A tiny GPT of its own, which may be trained."""
    return tiny_gpt(seed, **options)


@functools.cache
def reward_model(seed=0):
    """A tiny RewardModel."""
    torch.manual_seed(seed)
    return RewardModel.from_gpt(gpt(seed)).eval()


@functools.cache
def value_model(seed=0):
    """A tiny ValueModel whose head is not zero."""
    model = ValueModel.from_gpt(gpt(seed)).eval()
    with torch.no_grad():
        model.head.weight.normal_(generator=rng(seed))
    return model


def options(default, **values):
    """A config: the default one with some values."""
    config = default()
    config.merge_from_dict(values)
    return config


def without(config, *names):
    """The config without some options."""
    for name in names:
        delattr(config, name)
    return config


class Letters(CharTokenizer):
    """A tokenizer of ten letters; its end of text is id 10."""

    def __init__(self):
        super().__init__("abcdefghij")


class BareTokenizer:
    """A tokenizer without an end token."""

    def encode(self, text):
        return [ord(char) % 10 for char in text]

    def decode(self, ids):
        return "".join("abcdefghij"[i] for i in ids)


LETTERS = Letters()


@functools.cache
def gpt2_tokenizer():
    """GPT-2's tokenizer."""
    return BPETokenizer()


@functools.cache
def small_bpe():
    """A tokenizer that was trained on a few words."""
    return BPETokenizer.train(["the cat sat on the mat, and the rat sat there"] * 3, 270)


def fold(seed, n=24, vocab=VOCAB, T=6):
    """A dataset of (x, y) token ids."""
    idx = ids(seed, (n, T + 1), vocab)
    return TensorDataset(idx[:, :-1], idx[:, 1:])


def threes(idx, attention_mask, completion_mask):
    """A reward: how often token 3 was written."""
    return ((idx == 3) & completion_mask).sum(1).float()
