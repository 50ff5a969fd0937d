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
import unittest.mock
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from mingpt import lora, rewards, shuffle, utils
from mingpt.bpe import *
from mingpt.chars import *
from mingpt.chat import CHATML, Chat
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
from mingpt.unembed import Unembed, next_logits
from mingpt.utils import *
from tests.common import tiny_gpt

download = importlib.import_module("mingpt.download")  # bpe's * has a function of this name

temporary = tempfile.TemporaryDirectory(prefix="fuzz-")  # removed when Python ends
FOLDER = Path(temporary.name)
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


def zip_again(source, target, cut=0):
    """Write a file of torch.save's with its records deflated; the largest one without its end."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        largest = max(old.infolist(), key=lambda record: record.file_size).filename
        for record in old.infolist():
            content = old.read(record)
            if cut and record.filename == largest:
                content = content[:-cut]
            new.writestr(record.filename, content, zipfile.ZIP_DEFLATED)


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


def new_llama(**options):
    """A tiny Llama of its own, which may be trained."""
    return tiny_gpt(4, **{"architecture": "llama", **options})


@functools.cache
def llama(**options):
    """A tiny Llama in evaluation mode. The same one for the same arguments."""
    return new_llama(**options)


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


def chat():
    """The encoder of conversations for the small tokenizer."""
    return Chat(small_bpe(), CHATML).encode


def fold(seed, n=24, vocab=VOCAB, T=6):
    """A dataset of (x, y) token ids."""
    idx = ids(seed, (n, T + 1), vocab)
    return TensorDataset(idx[:, :-1], idx[:, 1:])


def setup_logging_quietly(config):
    """setup_logging, without handlers for the fuzzer's own console."""
    with unittest.mock.patch("mingpt.utils.log_to_console"):
        utils.setup_logging(config)


# --------------------------------------------------------------------------------------------------
# Rewards


def threes(idx, attention_mask, completion_mask):
    """A reward: how often token 3 was written."""
    return ((idx == 3) & completion_mask).sum(1).float()


def length(completions, **kwargs):
    """A reward on text."""
    return [len(c) for c in completions]


def maybe(completions):
    """Abstains from empty texts."""
    return [None if c == "" else 2 for c in completions]


def gold(completions, answer):
    """Needs a column."""
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def plain(completions, prompts):
    """A function on text that has to be wrapped."""
    return [1.0 for _ in completions]


async def later(completions):
    """A coroutine function."""
    return [1.0]


def only(completions, /):
    """Takes its argument by position."""
    return [1.0]


def raises(completions):
    """Fails."""
    raise KeyError("x")


def too_many(completions):
    """Returns a reward too many."""
    return [1.0] * (len(completions) + 1)


def words(completions):
    """Returns text."""
    return ["good"] * len(completions)


def nothing(completions):
    """Abstains always."""
    return [None] * len(completions)


def not_a_number(completions):
    """Returns NaN."""
    return [math.nan] * len(completions)


def scalar(completions):
    """Returns one number for all."""
    return 1.0


class Column(nn.Module):
    """A value model that returns (B, 1)."""

    def forward(self, idx, attention_mask):
        """Zeros of the wrong shape."""
        return torch.zeros(len(idx), 1)


# --------------------------------------------------------------------------------------------------
# Runs


def trainer_config(**values):
    """The options of a short run."""
    return options(
        Trainer.get_default_config, **{"device": "cpu", "max_iters": 1, "batch_size": 2, **values}
    )


def ppo_config(**values):
    """The options of a short run of PPO."""
    short = {"device": "cpu", "max_iters": 1, "batch_size": 4, "max_new_tokens": 3}
    return options(PPOTrainer.get_default_config, **{**short, **values})


def train(config, model, train_dataset, **arguments):
    """Make a Trainer and run it."""
    trainer = Trainer(config, model, train_dataset, **arguments)
    trainer.run()
    return trainer


def train_with(**values):
    """Train with these options and the default for the others."""
    return train(options(Trainer.get_default_config, **values), new_gpt(1), fold(1))


def train_ppo(config, **arguments):
    """Make a PPOTrainer and run it."""
    trainer = PPOTrainer(config, **arguments)
    trainer.run()
    return trainer


def train_ppo_with(**values):
    """PPO with these options and the default for the others."""
    return train_ppo(
        options(PPOTrainer.get_default_config, **values),
        policy=new_gpt(1),
        reward_fn=threes,
        prompts=["ab", "cde", "f", "gh"],
        tokenizer=LETTERS,
    )


CHECKPOINT = FOLDER / "run" / "checkpoint.pt"


def kept_config(**values):
    """The options of a run that is kept in the folder."""
    return trainer_config(work_dir=FOLDER / "run", **values)


def begin_run():
    """A run of two iterations, to be resumed."""
    utils.set_seed(5)
    train(kept_config(max_iters=2), new_gpt(1), fold(1))


def resume(options, model, data, prepare):
    """Continue the run of `begin_run`, after prepare() has changed its file."""
    prepare()
    return train(kept_config(**options), model, data)


def rewrite(**values):
    """Change some entries of the checkpoint."""
    torch.save({**load_torch(CHECKPOINT), **values}, CHECKPOINT)


def drop(*names):
    """Remove some entries of the checkpoint."""
    state = load_torch(CHECKPOINT)
    torch.save({key: value for key, value in state.items() if key not in names}, CHECKPOINT)


def cut(length):
    """Cut the checkpoint off."""
    CHECKPOINT.write_bytes(CHECKPOINT.read_bytes()[:length])


def rewrite_optimizer(**values):
    """Change some entries of the optimizer's state in the checkpoint."""
    rewrite(optimizer={**load_torch(CHECKPOINT)["optimizer"], **values})


def stages_config(**values):
    """The options of a script with one stage."""
    config = CfgNode(data={"size": 3})
    config.sft = without(trainer_config(**values), "work_dir")
    return config
