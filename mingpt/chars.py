"""
A character tokenizer: every character is a token, and one more token ends a text.

The smallest class with the interface of `BPETokenizer`, for models that are small enough to learn
spelling by themselves.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import torch

from mingpt.bpe import END_OF_TEXT, well_formed
from mingpt.checkpoint import read_json, to_json, write_text
from mingpt.config import CfgNode, check_numbers

# Stands for characters outside the vocabulary, as decoders use it for bytes that are not UTF-8.
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class CharTokenizer:
    """Characters <-> ids. Token i is `chars[i]`; the last token, `eot_token`, is the end of a text.

    A character outside the vocabulary is encoded as U+FFFD if the vocabulary contains that;
    otherwise it raises ValueError.
    """

    def __init__(self, chars: Sequence[str]):
        is_text = isinstance(chars, (str, list, tuple))
        if not is_text or not all(isinstance(char, str) for char in chars):
            raise TypeError(f"chars is {type(chars).__name__} {chars!r:.60}; expected characters")
        if len(set(chars)) != len(chars) or any(len(char) != 1 for char in chars):
            raise ValueError(
                f"got chars {''.join(chars)!r:.60}; expected distinct single characters: "
                "CharTokenizer.train([text]) collects them from texts"
            )
        self.chars = list(chars)
        self.ids = {char: i for i, char in enumerate(self.chars)}
        self.eot_token = len(self.chars)
        self.vocab_size = len(self.chars) + 1

    @classmethod
    def train(cls, texts: Iterable[str], min_count: int = 1) -> Self:
        """The characters that occur min_count times or more in the texts, sorted, and U+FFFD.

        ValueError or TypeError for anything else than texts and a whole number from 1 on.
        """
        if isinstance(texts, str):
            raise TypeError(f"got the text {texts[:60]!r}; train takes several: pass [text]")
        check_numbers(CfgNode(min_count=min_count), "min_count", low=1, whole=True)
        counts = Counter(char for text in texts for char in well_formed(text))
        frequent = {char for char, count in counts.items() if count >= min_count}
        return cls(sorted(frequent | {UNKNOWN}))

    def encode(self, text: str) -> list[int]:
        """The ids of the characters of a text, as a list. TypeError for anything but text."""
        if not isinstance(text, str):
            raise TypeError(f"got {type(text).__name__} {text!r:.60}; encode takes a text")
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
            if ids.is_floating_point():
                raise ValueError(f"got ids of {ids.dtype}; they must be whole numbers")
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
        write_text(Path(folder) / "chars.json", to_json(self.chars))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read the chars.json that `save_pretrained` wrote. ValueError if there is none."""
        path = Path(folder) / "chars.json"
        chars = read_json(path, list)
        if not all(isinstance(char, str) for char in chars):
            raise ValueError(f"{path} is no vocabulary; expected a JSON array of characters")
        return cls(chars)
