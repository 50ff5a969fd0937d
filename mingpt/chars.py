"""
A character tokenizer: every character is a token, and one more token ends a text.

The smallest class with the interface of `BPETokenizer`, for models that are small enough to learn
spelling by themselves.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import torch

from mingpt.bpe import END_OF_TEXT
from mingpt.checkpoint import write_text

# Stands for characters outside the vocabulary, as decoders use it for bytes that are not UTF-8.
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class CharTokenizer:
    """Characters <-> ids. Token i is `chars[i]`; the last token, `eot_token`, is the end of a text.

    A character outside the vocabulary is encoded as U+FFFD if the vocabulary contains that;
    otherwise it raises ValueError.
    """

    def __init__(self, chars: Sequence[str]):
        if len(set(chars)) != len(chars) or any(len(char) != 1 for char in chars):
            raise ValueError(f"got chars {''.join(chars)!r}; expected distinct single characters")
        self.chars = list(chars)
        self.ids = {char: i for i, char in enumerate(self.chars)}
        self.eot_token = len(self.chars)
        self.vocab_size = len(self.chars) + 1

    @classmethod
    def train(cls, texts: Iterable[str], min_count: int = 1) -> Self:
        """The characters that occur min_count times or more in the texts, sorted, and U+FFFD."""
        counts = Counter(char for text in texts for char in text)
        frequent = {char for char, count in counts.items() if count >= min_count}
        return cls(sorted(frequent | {UNKNOWN}))

    def encode(self, text: str) -> list[int]:
        """The ids of the characters of a text, as a list."""
        if UNKNOWN in self.ids:
            unknown = self.ids[UNKNOWN]
            return [self.ids.get(char, unknown) for char in text]
        strange = sorted(set(text) - self.ids.keys())
        if strange:
            raise ValueError(
                f"characters {strange} are not in the vocabulary {''.join(self.chars)!r}"
            )
        return [self.ids[char] for char in text]

    def __call__(self, text: str) -> torch.Tensor:
        """The ids of a text as a (1, T) LongTensor: a batch of one row."""
        return torch.tensor([self.encode(text)], dtype=torch.long)

    def decode(self, ids: list[int] | torch.Tensor) -> str:
        """The text of ids (a list or a 1-D tensor); the end of a text shows as <|endoftext|>.

        ValueError for an id that the vocabulary does not have.
        """
        if isinstance(ids, torch.Tensor):
            ids = ids.tolist()
        tokens = dict(enumerate([*self.chars, END_OF_TEXT]))
        try:
            return "".join(tokens[i] for i in ids)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{error} is no id of this vocabulary, which has 0 to {self.eot_token} (decode "
                "takes one row of a batch at a time)"
            ) from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the vocabulary to chars.json in the folder."""
        write_text(Path(folder) / "chars.json", json.dumps(self.chars))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read the chars.json that `save_pretrained` wrote."""
        return cls(json.loads((Path(folder) / "chars.json").read_text(encoding="utf-8")))
