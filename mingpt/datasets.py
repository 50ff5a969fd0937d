"""
What people give to RLHF: texts, demonstrations and comparisons, from JSON lines to padded batches.

    {"text": ...}                                      to pre-train on
    {"prompt": ..., "completion": ...}                 demonstrations, for supervised fine-tuning
    {"prompt": ..., "chosen": ..., "rejected": ...}    comparisons, for a reward model or DPO

    rows = read_jsonl("comparisons.jsonl", "prompt", "chosen", "rejected")
    Trainer(config, reward_model, Comparisons(rows, tokenizer, block_size), loss_fn=comparison_loss, collate_fn=Comparisons.collate).run()
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset


def read_jsonl(path: str | Path, *fields: str) -> list[dict]:
    """The objects of a file of JSON lines; ValueError, with its number, for a line that lacks one of the fields as text."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):  # U+2028 ends no line of JSON
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            good = isinstance(row, dict) and all(isinstance(row.get(field), str) for field in fields)
        except json.JSONDecodeError:
            good = False
        if not good:
            example = json.dumps({field: "..." for field in fields})
            raise ValueError(f"{path}, line {number}: must be JSON like {example}, not {line[:60]!r}")
        rows.append(row)
    return rows


class Completions(Dataset):
    """Demonstrations for `Trainer(..., collate_fn=Completions.collate, weight_fn=Completions.weight)`: the loss is the completion's.

    rows: dicts with `prompt` and `completion`, or with `text`, which is a completion of the end-of-text token. An item is
    (x, y), y = -1 on the prompt. Each completion ends with the end-of-text token. ValueError for a row that is too long.
    """

    def __init__(self, rows: Iterable[dict], tokenizer, block_size: int):
        self.items = []
        for i, row in enumerate(rows):
            prompt = tokenizer.encode(row["prompt"]) if row.get("prompt") else [tokenizer.eot_token]
            ids = [*prompt, *tokenizer.encode(row["completion"] if "completion" in row else row["text"]), tokenizer.eot_token]
            check_length(i, ids, block_size + 1)  # the last token is only predicted
            self.items.append((torch.tensor(ids[:-1]), torch.tensor([-1] * (len(prompt) - 1) + ids[len(prompt):])))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.items[i]

    @staticmethod
    def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(idx, targets), both (B, T), padded on the right; causal attention never looks there."""
        return pad([x for x, _ in items]), pad([y for _, y in items], value=-1)

    @staticmethod
    def weight(batch: tuple[Tensor, Tensor]) -> int:
        """The number of tokens that the loss is a mean over."""
        return int((batch[1] >= 0).sum())


class Comparisons(Dataset):
    """Completions of one prompt, of which people chose one, for `comparison_loss` and `DPOLoss`.

    rows: dicts with `chosen`, `rejected` and, unless it is empty, `prompt`; `rejected` may be a list, as long in every row. It is
    then the chosen one against each, in one item: in items of their own a model would learn the chosen by heart (Ouyang et al.
    2022, section 3.5). Each ends with the end-of-text token, unless `ended`, a list of bools for the chosen one and the rejected, says
    that its sampler was cut off: a reward model can only judge such texts if it has seen some. ValueError for a row that is too long.
    """

    def __init__(self, rows: Iterable[dict], tokenizer, block_size: int):
        self.items = []
        for i, row in enumerate(rows):
            prompt = tokenizer.encode(row["prompt"]) if row.get("prompt") else [tokenizer.eot_token]
            rejected = [row["rejected"]] if isinstance(row["rejected"], str) else row["rejected"]
            texts = (row["chosen"], *rejected)
            ended = row.get("ended", [True] * len(texts))
            if not isinstance(ended, list) or [type(end) for end in ended] != [bool] * len(texts):
                raise ValueError(f"row {i} has ended={ended} for {len(texts)} completions: give a list of one bool for each, the chosen one first")
            completions = [[*tokenizer.encode(text), *[tokenizer.eot_token] * end] for text, end in zip(texts, ended)]
            if not all(completions):
                raise ValueError(f"row {i} has a completion that is empty and has not ended: leave it out")
            check_length(i, [*prompt, *max(completions, key=len)], block_size)
            self.items.append((torch.tensor(prompt), [*map(torch.tensor, completions)]))
            if len(completions) != len(self.items[0][1]) or not rejected:
                raise ValueError(f"row {i} has {len(rejected)} rejected completions; every row must have as many as the first, and one or more")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, list[Tensor]]:
        return self.items[i]

    @staticmethod
    def collate(items: list[tuple[Tensor, list[Tensor]]]) -> tuple[Tensor, Tensor, Tensor]:
        """(idx, attention_mask, completion_mask), all (B, K, T), the chosen one first.

        The prompts are padded on the left, so that all completions begin in the same column; these on the right.
        """
        K = len(items[0][1])
        prompts, prompt_mask = (x.repeat_interleave(K, 0) for x in left_pad([prompt for prompt, _ in items]))
        completions, written = pad_and_mask([ids for _, texts in items for ids in texts])
        parts = ((prompts, completions), (prompt_mask, written), (torch.zeros_like(prompt_mask), written))
        return tuple(torch.cat(part, dim=1).view(len(items), K, -1) for part in parts)


def check_length(row: int, ids: list[int], most: int) -> None:
    if len(ids) > most:
        raise ValueError(f"row {row} has {len(ids)} tokens, prompt and ends included; the model takes {most}: shorten it or leave it out")


def encode_prompts(prompts, tokenizer=None) -> list[Tensor]:
    """Prompts as a list of 1-D LongTensors: from strings, lists of ids or a (N, T) tensor. ValueError for an empty one."""
    def encode(prompt):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(f"prompt {prompt!r} is text: pass the tokenizer that encodes it")
            prompt = tokenizer.encode(prompt)
        return torch.as_tensor(prompt, dtype=torch.long)

    encoded = [encode(prompt) for prompt in prompts]
    for prompt in encoded:
        if prompt.dim() != 1 or len(prompt) == 0:
            raise ValueError(f"prompt of shape {tuple(prompt.shape)}: each must be a row of one token or more "
                             "(the end-of-text token, say, to start from nothing)")
    return encoded


def pad(rows: list[Tensor], value: int = 0, left: bool = False) -> Tensor:
    """Stack rows of unlike lengths: (B, T), filled up with value on the right, or on the left."""
    T = max(map(len, rows))
    return torch.stack([F.pad(row, (T - len(row), 0) if left else (0, T - len(row)), value=value) for row in rows])


def pad_and_mask(rows: list[Tensor], left: bool = False) -> tuple[Tensor, Tensor]:
    """(idx (B, T), attention_mask (B, T)) of rows of unlike lengths."""
    return pad(rows, left=left), pad([torch.ones_like(row, dtype=torch.bool) for row in rows], left=left)


def left_pad(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Collate prompts of unlike lengths, to be continued: (idx (B, T), attention_mask (B, T)), padded on the left."""
    return pad_and_mask(prompts, left=True)
