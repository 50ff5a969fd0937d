"""
Stage 1, supervised fine-tuning: a GPT learns to write the summary that the text's author wrote.

    python projects/summarize_rlhf/sft.py                   a small GPT, pre-trained first on the docstrings themselves
    python projects/summarize_rlhf/sft.py --data=tldr       GPT-2 on TL;DR

The loss is that of the summary's tokens alone (Stiennon et al. 2020, section 3.4).
"""

from pathlib import Path

import torch
from torch.utils.data import TensorDataset

import pipeline
from mingpt.checkpoint import run_script
from mingpt.datasets import Completions
from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import set_seed


def run(config, corpus):
    """Pre-training, where there are no weights to start from, and fine-tuning."""
    if not config.model.name:
        pipeline.run_stage(config, "pretrain", lambda: pretrain(config, corpus))
    pipeline.run_stage(config, "sft", lambda: sft(config, corpus))


def pretrain(config, corpus):
    """A language model of the whole texts, their summaries included, in windows of block_size tokens."""
    set_seed(config.system.seed)
    model = GPT(pipeline.model_config(config, corpus.tokenizer))
    data = {split: windows(rows, corpus.tokenizer, config.model.block_size) for split, rows in corpus.rows.items()}
    return Trainer(pipeline.trainer_config(config, "pretrain"), model, data["train"], data["valid"])


def windows(rows, tokenizer, size):
    """All the texts in a row, cut into pieces: a dataset of (x, y), both (size,)."""
    ids = torch.tensor([token for row in rows for token in (*tokenizer.encode(row["text"]), tokenizer.eot_token)])
    n = (len(ids) - 1) // size
    if not n:
        raise ValueError(f"the texts of a split have {len(ids)} tokens in all, less than --model.block_size={size}: give more")
    return TensorDataset(ids[:n * size].view(n, size), ids[1:n * size + 1].view(n, size))


def sft(config, corpus):
    """From the pre-trained model, on prompts and completions: all of them where people made the comparisons, else on its part."""
    set_seed(config.system.seed + 1)
    model = pipeline.base_model(config, corpus.tokenizer)
    pipeline.write_json(Path(config.system.work_dir) / "model.json", model.config.to_dict())
    mine = corpus.rows | {"train": [row for row in corpus.rows["train"] if corpus.comparisons or row["part"] == "sft"]}
    data = {split: Completions(rows, corpus.tokenizer, config.model.block_size) for split, rows in mine.items()}
    return Trainer(pipeline.trainer_config(config, "sft"), model, data["train"], data["valid"], collate_fn=Completions.collate,
                   weight_fn=Completions.weight)


if __name__ == "__main__":
    run_script(lambda args: run(*pipeline.prepare(args, __doc__)))
