"""
From labels to lessons: what the stages of teach.py learn from, and how it is held out.

Labels on one prompt are held out together. Otherwise a reward model could know the held-out answers
from its lessons, and would look better than it is.
"""

import hashlib
import random
from pathlib import Path
from typing import Any

from mingpt.checkpoint import to_json
from mingpt.datasets import read_jsonl
from store import Answer, Label, Store

FEWEST = 12  # comparisons, below which nothing is taught
FEW = 50  # comparisons, below which it is said that they are few


def read_labels(path: str) -> list[Label]:
    """All labels in a database. ValueError if there is no such file."""
    if not Path(path).exists():
        raise ValueError(f"{path}: there is no such file. First label some pairs with label.py")
    store = Store(path)
    labels = store.labels()
    store.close()
    return labels


def comparisons(labels: list[Label]) -> list[dict[str, Any]]:
    """The rows that a reward model or DPO learns from, as `Comparisons` takes them.

    Left out are texts that say the same twice, and empty ones that have not even ended.
    """
    rows = [
        as_row(label.pair.messages, chosen, rejected)
        for label in labels
        for chosen, rejected in label.comparisons()
    ]
    return [row for row in rows if is_usable(row)]


def as_row(messages: list[dict], chosen: Answer, rejected: Answer) -> dict[str, Any]:
    """Two answers to a prompt, as `Comparisons` takes them."""
    return {
        "prompt": messages,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "ended": [chosen.ended, rejected.ended],
    }


def is_usable(row: dict[str, Any]) -> bool:
    """Whether a row compares two different answers, neither of them empty and cut off."""
    texts = [row["chosen"], row["rejected"]]
    is_same = texts[0] == texts[1] and row["ended"][0] == row["ended"][1]
    is_empty = any(not text and not ended for text, ended in zip(texts, row["ended"], strict=True))
    return not is_same and not is_empty


def check_number(rows: list[dict[str, Any]], path: str) -> str:
    """What a person should know about so few rows, or "". ValueError if they are too few."""
    n = len(rows)
    if n < FEWEST:
        raise ValueError(
            f"{path} holds {n} labels that choose an answer, and {FEWEST} is the fewest that "
            "anything can be learned from: 50 are a beginning, 200 are good. Label more with "
            "label.py, which goes on where you stopped"
        )
    if n < FEW:
        return (
            f"{n} labels are few: the reward model may learn little more than chance from them, "
            f"and its held-out accuracy is uncertain. From {FEW} on it gets better"
        )
    return ""


def folds(rows: list[dict[str, Any]], n: int, seed: int) -> list[int]:
    """The part, 0 to n - 1, that each row belongs to: of about the same size, by prompt.

    ValueError if all rows are on one prompt, because then there is only one part.
    """
    by_prompt: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_prompt.setdefault(to_json(row["prompt"]), []).append(number)
    if len(by_prompt) < 2:
        raise ValueError(
            f"all {len(rows)} labels are on one prompt, so none can be held out: label answers to "
            "other prompts, too"
        )
    prompts = sorted(by_prompt)
    random.Random(f"folds {seed}").shuffle(prompts)
    result = [0] * len(rows)
    sizes = [0] * n
    for prompt in prompts:
        smallest = sizes.index(min(sizes))
        for number in by_prompt[prompt]:
            result[number] = smallest
        sizes[smallest] += len(by_prompt[prompt])
    return result


def demonstrations(labels: list[Label], source: str) -> list[dict[str, Any]]:
    """The rows that the sft stage learns from: conversations, as {"messages": [...]}.

    source: a file of JSON lines, or the word `labels` for the answers that were written on the
    page.
    """
    if source != "labels":
        rows = read_jsonl(source)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get("messages"), list):
                raise ValueError(
                    f'{source}, row {number}: must be like {{"messages": [{{"role": "user", '
                    '"content": "..."}, {"role": "assistant", "content": "..."}]}'
                )
    else:
        rows = [
            {
                "messages": [
                    *label.pair.messages,
                    {"role": "assistant", "content": label.better},
                ]
            }
            for label in labels
            if label.choice == "better"
        ]
    if not rows:
        raise ValueError(f"--sft={source} holds no conversations")
    return rows


def digest(rows: list) -> str:
    """A short hash of anything that JSON can hold, such as labels."""
    return hashlib.sha256(to_json(rows).encode()).hexdigest()[:16]
