"""
A character tokenizer: every character is a token, and one more token ends a text.

The smallest thing with the interface of `BPETokenizer`, for models small enough to learn spelling by themselves.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from mingpt.bpe import END_OF_TEXT
from mingpt.checkpoint import write_text

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for characters outside the vocabulary, as in a decoder of broken UTF-8


class CharTokenizer:
    """Characters <-> ids. Token i is `chars[i]`; the last token, `eot_token`, is the end of a text.

    A character outside the vocabulary is encoded as U+FFFD where the vocabulary has that, and else raises ValueError.
    """

    def __init__(self, chars: Iterable[str]):
        if len(set(chars)) != len(chars) or not all(len(c) == 1 for c in chars):
            raise ValueError(f"chars must be distinct single characters, not {''.join(chars)!r}")
        self.chars = list(chars)
        self.ids = {c: i for i, c in enumerate(self.chars)}
        self.eot_token = len(self.chars)
        self.vocab_size = len(self.chars) + 1

    @classmethod
    def train(cls, texts: Iterable[str], min_count: int = 1):
        """The vocabulary of `texts`: all characters seen min_count times or more, sorted, and U+FFFD for the others."""
        counts = Counter(c for text in texts for c in text)
        return cls(sorted({c for c, n in counts.items() if n >= min_count} | {UNKNOWN}))

    def encode(self, text: str) -> list[int]:
        """Ids of the characters of text, as a list."""
        if UNKNOWN not in self.ids and (strange := sorted(set(text) - self.ids.keys())):
            raise ValueError(f"characters {strange} are not in the vocabulary {''.join(self.chars)!r}")
        return [self.ids.get(c, self.ids.get(UNKNOWN)) for c in text]

    def __call__(self, text: str) -> torch.Tensor:
        """(1, T) LongTensor of ids."""
        return torch.tensor([self.encode(text)], dtype=torch.long)

    def decode(self, ids: list[int] | torch.Tensor) -> str:
        """The text of ids (a list or a 1-D tensor); the end of a text shows as <|endoftext|>."""
        pieces = self.chars + [END_OF_TEXT]
        return "".join(pieces[i] for i in (ids.tolist() if torch.is_tensor(ids) else ids))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the vocabulary to `folder`/chars.json."""
        write_text(Path(folder) / "chars.json", json.dumps(self.chars))

    @classmethod
    def from_pretrained(cls, folder: str | Path):
        """Read what `save_pretrained` wrote."""
        return cls(json.loads((Path(folder) / "chars.json").read_text(encoding="utf-8")))
