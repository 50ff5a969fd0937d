"""
The texts HappyGPT learns from: tweets and snippets of reviews and news, with people's ratings.

They come with "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text"
(Hutto & Gilbert, ICWSM 2014), inside the source distribution of the Python package vaderSentiment
(MIT licence). pip fetches that file, so that its mirrors, proxies and caches work, and checks its
SHA-256 before anything in it runs.
"""

import hashlib
import html
import io
import logging
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mingpt.datasets import read_jsonl
from mingpt.download import home, one_at_a_time

logger = logging.getLogger("mingpt")

SDIST = "vaderSentiment-3.3.2.tar.gz"
PIP_SECONDS = 600  # seconds that pip may take
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
CORPORA = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"  # inside the SDIST
SOURCES = {
    "tweets": "tweets",
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
}


# --------------------------------------------------------------------------------------------------
# fetching the corpora


class FetchError(OSError):
    """The corpora are not there and cannot be fetched; the message says what to do."""


def fetch() -> Path:
    """Path of the checked source distribution, which is downloaded into the cache if need be.

    If several processes want it, one downloads it and the others wait. Raises FetchError if it
    cannot be downloaded.
    """
    path = home() / "icwsm2014" / SDIST
    if is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(path):
        if is_whole(path):  # another process downloaded it while this one waited
            return path
        logger.info("asking pip for the corpora (2.5 MB)")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            problem = pip_download(Path(folder))
            if problem:
                raise FetchError(
                    f"{path} is missing or damaged, and pip could not fetch it "
                    f"({problem}). On a machine with a network run\n"
                    "  python -m pip download --no-deps --no-binary=:all: vaderSentiment==3.3.2\n"
                    f"and put {SDIST} into {path.parent}; or train on texts of your own with "
                    "--data.path=FILE"
                )
            (Path(folder) / SDIST).replace(path)
    return path


def is_whole(path: Path) -> bool:
    """Whether the source distribution is there, and undamaged."""
    return path.exists() and sha256(path) == SHA256


def pip_download(folder: Path) -> str:
    """Have pip download the source distribution into a folder, and check its hash.

    Returns what went wrong, "" where nothing did.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"vaderSentiment==3.3.2 --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [
        *(sys.executable, "-m", "pip", "download"),
        *("-r", requirements, "-d", folder),
        "--no-deps",
        # pip asks the package's setup.py for its name: with the setuptools that is installed here
        "--no-build-isolation",
        "--no-binary=:all:",
        "--require-hashes",
        "--disable-pip-version-check",
    ]
    try:
        pip = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=PIP_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"it was not done after {PIP_SECONDS} s"
    if pip.returncode or not (folder / SDIST).exists():
        printed = pip.stderr.strip() or pip.stdout.strip() or "no output"
        return printed.splitlines()[-1]
    return ""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# --------------------------------------------------------------------------------------------------
# reading texts


def load_icwsm(path: Path) -> list[dict]:
    """Read the corpora out of the source distribution at path.

    Each row is a dict: text, source (a key of SOURCES), ratings (one number from -4 to 4 for each
    rater) and rating, their mean. The mean is taken afresh, because for 196 tweets the published
    mean is not that of the published ratings.
    """
    with tarfile.open(path) as sdist:
        corpora = sdist.extractfile(CORPORA).read()
    rows = []
    with tarfile.open(fileobj=io.BytesIO(corpora)) as tar:
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
