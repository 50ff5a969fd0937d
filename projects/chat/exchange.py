"""
Labels as JSON lines, as trl has them, so that they can be taken elsewhere, and brought along.

    {"prompt": [{"role": "user", "content": "..."}],
     "chosen": [{"role": "assistant", "content": "..."}],
     "rejected": [{"role": "assistant", "content": "..."}],
     "ended": [true, false],
     "id": "..."}

trl's DPOTrainer and RewardTrainer read this form, which they call conversational. `ended` says of
the chosen and of the rejected answer whether it came to its end by itself; trl takes no notice of
it. In a file from elsewhere prompt, chosen and rejected may also be plain text, and `ended` and
`id` may be missing.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from mingpt.checkpoint import write_text
from mingpt.datasets import read_jsonl
from mingpt.run_folder import to_lines
from store import Answer, Label, Pair, Store, check_encodable

# --------------------------------------------------------------------------------------------------
# Out


def export_labels(store: Store, path: str | Path) -> int:
    """Write all comparisons to a file; how many they are. Pairs that are alike are none."""
    rows = [row for label in store.labels() for row in as_rows(label)]
    write_text(path, to_lines(rows))
    return len(rows)


def as_rows(label: Label) -> list[dict[str, Any]]:
    """The rows of one label: none, one, or two if the person wrote a better answer."""
    comparisons = label.comparisons()
    return [
        {
            "prompt": label.pair.messages,
            "chosen": [{"role": "assistant", "content": chosen.text}],
            "rejected": [{"role": "assistant", "content": rejected.text}],
            "ended": [chosen.ended, rejected.ended],
            "id": label.id if len(comparisons) == 1 else f"{label.id}/{i}",
        }
        for i, (chosen, rejected) in enumerate(comparisons)
    ]


# --------------------------------------------------------------------------------------------------
# In


def import_labels(store: Store, path: str | Path, who: str) -> tuple[int, int]:
    """(how many labels of a file are new, how many there are). Nothing is imported twice.

    ValueError, with its number, for the first row that is wrong; then none is imported.
    """
    labels = []
    seen: Counter[str] = Counter()
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            pair = from_row(row)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None
        # A row without an id gets one from what it says. Equal rows are numbered.
        content = json.dumps([pair.messages, pair.left.text, pair.right.text], sort_keys=True)
        seen[content] += 1
        digest = hashlib.sha256(f"{seen[content]} {content}".encode()).hexdigest()
        labels.append((pair, id_of(row) or digest))
    known = {row["id"] for label in store.labels() for row in as_rows(label)}
    new = [(pair, id) for pair, id in labels if id not in known]
    added = sum(store.add_label(pair, id, who) for pair, id in new)
    return added, len(labels)


def id_of(row: dict[str, Any]) -> str | None:
    """The id of a row, if it has a usable one."""
    id = row.get("id")
    return id if isinstance(id, str) and 8 <= len(id) <= 120 else None


def from_row(row: dict[str, Any]) -> Pair:
    """The pair in a row; the chosen answer is the left one. ValueError if it is none."""
    messages = row.get("prompt")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    check_messages(messages)
    ended = row.get("ended", [True, True])
    if not isinstance(ended, list) or [type(value) for value in ended] != [bool, bool]:
        raise ValueError(f"ended={ended!r} must be two of true and false")
    return Pair(
        prompt=messages[-1]["content"],
        messages=messages,
        left=Answer(answer_text(row, "chosen"), ended=ended[0]),
        right=Answer(answer_text(row, "rejected"), ended=ended[1]),
        sampling={},
    )


def check_messages(messages: Any) -> None:
    """ValueError unless these are messages, of which a person wrote the last."""
    example = '[{"role": "user", "content": "..."}]'
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"the prompt must be text, or messages like {example}")
    for message in messages:
        is_message = isinstance(message, dict) and all(
            isinstance(message.get(name), str) for name in ("role", "content")
        )
        if not is_message:
            raise ValueError(f"{message!r:.60} in the prompt is no message like {example}")
        check_encodable("prompt", message["content"])
    if messages[-1]["role"] != "user":
        raise ValueError("the last message of the prompt must be the user's")


def answer_text(row: dict[str, Any], name: str) -> str:
    """The text of an answer, which may be a list of one message. It may be empty, too."""
    answer = row.get(name)
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        answer = answer[0].get("content")
    if not isinstance(answer, str):
        raise ValueError(f"{name} must be text, or a list of one message")
    check_encodable(f"{name} answer", answer)
    return answer
