"""
Stage 1, supervised fine-tuning: a GPT learns to write the summary that the text's author wrote.

    python projects/summarize_rlhf/sft.py                a small GPT, pre-trained on the texts first
    python projects/summarize_rlhf/sft.py --data=tldr    GPT-2 on TL;DR

The loss is on the tokens of the summary alone (Stiennon et al. 2020, section 3.4).
"""

import functools

import torch
from torch.utils.data import TensorDataset

import pipeline
from mingpt.bpe import BPETokenizer
from mingpt.checkpoint import run_script
from mingpt.datasets import Completions
from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import set_seed
from pipeline import Run


def main(run: Run) -> None:
    """Pre-training, unless there are weights to start from, and fine-tuning."""
    if not run.config.model.name:
        run.stages.run("pretrain", functools.partial(pretrain, run))
    run.stages.run("sft", functools.partial(sft, run))


def pretrain(run: Run) -> Trainer:
    """A trainer for a language model of the whole texts, in windows of block_size tokens."""
    set_seed(run.config.system.seed)
    model = GPT(pipeline.model_config(run.config, run.corpus.tokenizer.vocab_size))
    block_size = run.config.model.block_size
    return Trainer(
        run.stages.trainer_config("pretrain"),
        model,
        windows(run.corpus.rows["train"], run.corpus.tokenizer, block_size),
        windows(run.corpus.rows["valid"], run.corpus.tokenizer, block_size),
    )


def windows(rows: list[dict], tokenizer: BPETokenizer, block_size: int) -> TensorDataset:
    """All texts one after the other, cut into pieces: items are (x, y), (block_size,) each."""
    ids = []
    for row in rows:
        ids += [*tokenizer.encode(row["text"]), tokenizer.eot_token]
    n = (len(ids) - 1) // block_size
    if n == 0:
        raise ValueError(
            f"the texts of a split have {len(ids)} tokens in all, fewer than one window of "
            f"--model.block_size={block_size} needs: give more texts"
        )
    stream = torch.tensor(ids)
    x = stream[: n * block_size].view(n, block_size)
    y = stream[1 : n * block_size + 1].view(n, block_size)  # each token's successor
    return TensorDataset(x, y)


def sft(run: Run) -> Trainer:
    """A trainer for the summaries, which starts from the pre-trained model or others' weights.

    Where people made the comparisons it learns all training texts, else those of its part.
    """
    config, tokenizer = run.config, run.corpus.tokenizer
    set_seed(config.system.seed + 1)
    if config.model.name:
        model = GPT.from_pretrained(config.model.name)
    else:
        model = pipeline.load_model(run, "pretrain")
    rows = run.corpus.rows["train"]
    if run.corpus.comparisons is None:
        rows = [row for row in rows if row["part"] == "sft"]
    return Trainer(
        run.stages.trainer_config("sft"),
        model,
        Completions(rows, tokenizer, config.model.block_size),
        Completions(run.corpus.rows["valid"], tokenizer, config.model.block_size),
        collate_fn=Completions.collate,
        weight_fn=Completions.weight,
    )


if __name__ == "__main__":
    run_script(lambda args: main(pipeline.prepare(args, __doc__)))
