"""
The texts HappyGPT learns from: tweets and snippets of reviews and news, each rated by some 20 people.

They come with "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text" (Hutto & Gilbert, ICWSM
2014), inside the source distribution of the Python package vaderSentiment (MIT licence). pip fetches that file, so that
its mirrors, proxies and caches work, and checks its SHA-256 before anything in it runs.
"""

import hashlib
import html
import io
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset

from mingpt.datasets import read_jsonl
from mingpt.download import home

SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
# --no-build-isolation: pip asks the package's setup.py for its name, with the setuptools that requirements.txt brought
PIP = ["-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-binary=:all:", "--require-hashes",
       "--disable-pip-version-check"]
SOURCES = {"tweets": "tweets", "movies": "movieReviewSnippets", "products": "amazonReviewSnippets",
           "news": "nytEditorialSnippets"}


class FetchError(OSError):
    """The corpora are not there and can't be fetched; the message says what to do."""


def fetch():
    """Path of the checked source distribution, downloaded into the cache if it is not there. FetchError if it can't be."""
    path = home() / "icwsm2014" / SDIST
    if path.exists() and sha256(path) == SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"vaderSentiment==3.3.2 --hash=sha256:{SHA256}\n")
        pip = subprocess.run([sys.executable, *PIP, "-r", requirements, "-d", folder], capture_output=True, text=True)
        if pip.returncode or not (Path(folder) / SDIST).exists():
            reason = (pip.stderr.strip() or pip.stdout.strip() or "no output").splitlines()[-1]
            raise FetchError(
                f"{path} is missing or damaged, and pip could not fetch it ({reason}). On a machine with a network run\n"
                f"  python -m pip download --no-deps --no-binary=:all: vaderSentiment==3.3.2\n"
                f"and put {SDIST} into {path.parent}; or train on texts of your own with --data.path=FILE")
        shutil.move(Path(folder) / SDIST, path)
    return path


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_icwsm(path):
    """Read the corpora out of the source distribution at path.

    Returns a list of dicts: text, source (a key of SOURCES), ratings (one number from -4 to 4 for each rater) and rating,
    their mean. The mean is taken afresh, because for 196 tweets the published mean is not that of the published ratings.
    """
    with tarfile.open(path) as sdist:
        corpora = sdist.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    rows = []
    with tarfile.open(fileobj=io.BytesIO(corpora)) as tar:
        def lines(name):
            content = tar.extractfile(f"hutto_ICWSM_2014/{name}.txt").read().decode("utf-8-sig")
            return [line.split("\t") for line in content.splitlines() if line.strip()]

        for source, name in SOURCES.items():
            # lists of ratings are cut off in the original where raters are many: read the numbers, not the brackets
            ratings = {row[0]: [int(n) for n in re.findall(r"-?\d+", row[3])] for row in lines(f"{name}_anonDataRatings")}
            for key, _, text in lines(f"{name}_GroundTruth"):
                rows.append({"text": clean(text), "source": source, "ratings": ratings[key],
                             "rating": statistics.fmean(ratings[key])})
    return rows


def load_jsonl(path):
    """The user's own texts: one JSON object a line with `text` and an optional `rating` (or `label`), a number."""
    rows = []
    for row in read_jsonl(path, "text"):
        rating = row.get("rating", row.get("label"))
        if not isinstance(rating, (int, float, type(None))):
            raise ValueError(f"{path}: the rating of {row['text'][:40]!r} is {rating!r}; it must be a number, or left out")
        rows.append({"text": clean(row["text"]), "source": Path(path).name, "rating": rating})
    return rows


def clean(text):
    """HTML entities undone, runs of whitespace made one space."""
    return " ".join(html.unescape(text).split())


def split(rows):
    """{"train": 90%, "valid": 5%, "test": 5%} of rows, by a hash of the text: no text is in two splits, whatever its copies."""
    splits = {"train": [], "valid": [], "test": []}
    for row in rows:
        bucket = int.from_bytes(hashlib.sha256(row["text"].encode()).digest()[:8], "big") % 20
        splits[{0: "test", 1: "valid"}.get(bucket, "train")].append(row)
    return splits


class Windows(Dataset):
    """Token windows for next-token prediction: item -> (x, y), both (block_size,), y = -1 where there is nothing to predict.

    A text is <eot> characters <eot>. One that fits is one item; a longer one is as many as it needs to be covered: its
    opening and, while training, windows from random places; with `consecutive`, for evaluation, its pieces in order.
    """

    def __init__(self, texts, tokenizer, block_size, consecutive=False):
        eot = tokenizer.eot_token
        self.texts = [torch.tensor([eot, *tokenizer.encode(text), eot]) for text in texts]
        self.items = [(i, piece) for i, text in enumerate(self.texts) for piece in range(0, len(text) - 1, block_size)]
        self.block_size, self.consecutive, self.pad = block_size, consecutive, eot

    def __len__(self):
        return len(self.items)

    def __getitem__(self, item):
        i, start = self.items[item]
        text, size = self.texts[i], self.block_size
        if start and not self.consecutive:
            start = int(torch.randint(len(text) - size, ()))
        x, y = torch.full((size,), self.pad), torch.full((size,), -1)
        piece = text[start:start + size + 1]
        x[:len(piece) - 1], y[:len(piece) - 1] = piece[:-1], piece[1:]
        return x, y
