"""
The texts HappyGPT learns from: tweets and snippets of reviews and news, with people's ratings.

They come with "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text"
(Hutto & Gilbert, ICWSM 2014), inside the source distribution of the Python package vaderSentiment
(MIT licence), from where mingpt/packages.py takes them.
"""

import html
import re
import statistics
import tarfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mingpt.datasets import read_jsonl
from mingpt.packages import from_package

PACKAGE = ("vaderSentiment", "3.3.2")
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
CORPORA = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SOURCES = {
    "tweets": "tweets",
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
}


# --------------------------------------------------------------------------------------------------
# fetching the corpora


def fetch() -> Path:
    """Path of the corpora, a .tar.gz, which is fetched into the cache if need be.

    Raises ConnectionError, which says what to do, if they are not there and cannot be fetched.
    """
    return from_package(
        *PACKAGE,
        SHA256,
        CORPORA,
        otherwise="train on texts of your own with --data.path=FILE",
    )


# --------------------------------------------------------------------------------------------------
# reading texts


def load_icwsm(path: Path) -> list[dict]:
    """Read the corpora, which `fetch` has fetched.

    Each row is a dict: text, source (a key of SOURCES), ratings (one number from -4 to 4 for each
    rater) and rating, their mean. The mean is taken afresh, because for 196 tweets the published
    mean is not that of the published ratings.
    """
    rows = []
    with tarfile.open(path) as tar:
        for source, name in SOURCES.items():
            ratings = {
                key: as_ratings(column)
                for key, _, _, column in read_table(tar, f"{name}_anonDataRatings")
            }
            for key, _, text in read_table(tar, f"{name}_GroundTruth"):
                rows.append({
                    "text": clean(text),
                    "source": source,
                    "ratings": ratings[key],
                    "rating": statistics.fmean(ratings[key]),
                })
    return rows


def read_table(tar: tarfile.TarFile, name: str) -> list[list[str]]:
    """The rows of a table of the corpora, as lists of columns."""
    content = tar.extractfile(f"hutto_ICWSM_2014/{name}.txt").read().decode("utf-8-sig")
    return [line.split("\t") for line in content.splitlines() if line.strip()]


def as_ratings(column: str) -> list[int]:
    """The numbers in a column like "[2, 3, -1]".

    The brackets are not read, because lists of many raters are cut off in the original.
    """
    return [int(number) for number in re.findall(r"-?\d+", column)]


def load_jsonl(path: str) -> list[dict]:
    """The user's own texts: JSON lines with `text` and an optional `rating` (or `label`)."""
    rows = []
    for row in read_jsonl(path, "text"):
        rating = row.get("rating", row.get("label"))
        if not isinstance(rating, (int, float, type(None))):
            raise ValueError(
                f"{path}: the rating of {row['text'][:40]!r} is {rating!r}; it must be a number, "
                "or left out"
            )
        rows.append({"text": clean(row["text"]), "source": Path(path).name, "rating": rating})
    return rows


def clean(text: str) -> str:
    """The text with HTML entities decoded and each run of whitespace replaced by one space."""
    return " ".join(html.unescape(text).split())


# --------------------------------------------------------------------------------------------------
# what a language model trains on


class Windows(Dataset):
    """Windows for next-token prediction: (x, y), (block_size,) each; y is -1 behind the text.

    A text is <eot> characters <eot>. One that fits is one item. A longer one gives as many items as
    it takes to cover it: in training its opening and windows from random places; with
    `consecutive`, for evaluation, its pieces in order.
    """

    def __init__(self, texts: list[str], tokenizer, block_size: int, consecutive: bool = False):
        eot = tokenizer.eot_token
        self.texts = [torch.tensor([eot, *tokenizer.encode(text), eot]) for text in texts]
        self.items = [
            (i, start)
            for i, text in enumerate(self.texts)
            for start in range(0, len(text) - 1, block_size)
        ]
        self.block_size = block_size
        self.consecutive = consecutive
        self.padding = eot

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        i, start = self.items[item]
        text = self.texts[i]
        if start > 0 and not self.consecutive:
            start = int(torch.randint(len(text) - self.block_size, ()))
        window = text[start : start + self.block_size + 1]
        x = torch.full((self.block_size,), self.padding)
        y = torch.full((self.block_size,), -1)
        x[: len(window) - 1] = window[:-1]
        y[: len(window) - 1] = window[1:]
        return x, y
