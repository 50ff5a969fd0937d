"""
TL;DR: posts on Reddit, each with its author's summary, and what people said of pairs of summaries.

Both are those of Stiennon et al. 2020 (arXiv:2009.01325) and come from OpenAI's public bucket. The
posts are the filtered ones of Völske et al. 2017, in three files; the comparisons are in 19 files,
called batches.
"""

import json

from mingpt.download import download, home

BUCKET = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
BATCHES = [*range(3, 21), 22]
POST_SPLITS = ("train", "valid", "test")
COMPARISON_SPLITS = {"train": "train", "valid1": "valid", "valid2": "test"}  # {their name: ours}


def load() -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """({split: rows}, {split: comparisons}), in the form that corpus.py describes."""
    rows = {}
    for split in POST_SPLITS:
        posts = read_lines(f"datasets/tldr_3_filtered/{split}.jsonl")
        rows[split] = [demonstration(post) for post in posts]
    comparisons = {split: [] for split in COMPARISON_SPLITS.values()}
    for number in BATCHES:
        for line in read_lines(f"dataset/comparisons/batch{number}.json"):
            # some batches also compare summaries of news articles, which have no "post"
            if line.get("info", {}).get("post"):
                comparisons[COMPARISON_SPLITS[line["split"]]].append(comparison(line))
    return rows, comparisons


def read_lines(name: str) -> list[dict]:
    """The objects of one of the bucket's files, downloaded into the cache unless it is there.

    ValueError for a damaged file, which is removed, so that the next run downloads it again.
    """
    otherwise = "Or summarize texts of your own, with --data.path=FILE, or docstrings"
    file = home() / "summarize-from-feedback" / name
    path = download(f"{BUCKET}/{name}", file, otherwise=otherwise)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        path.unlink(missing_ok=True)  # another process may have removed it
        raise ValueError(
            f"{path} was damaged ({error}) and has been removed: "
            "run the same command again to download it once more"
        ) from error


def query(post: dict) -> dict:
    """A post in the paper's format. Only the body may be cut."""
    return {
        "head": f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}\n\nPOST: ",
        "body": post["post"],
        "marker": "\n\nTL;DR:",
    }


def demonstration(post: dict) -> dict:
    """A post and its author's summary."""
    return {**query(post), "completion": " " + post["summary"].strip()}


def comparison(line: dict) -> dict:
    """Two summaries of a post, of which somebody chose one.

    kind: whether one of the two is the author's own.
    """
    texts = [" " + summary["text"].strip() for summary in line["summaries"]]
    has_authors = any(summary["policy"] == "ref" for summary in line["summaries"])
    choice = line["choice"]  # 0 or 1
    return {
        **query(line["info"]),
        "chosen": texts[choice],
        "rejected": texts[1 - choice],
        "kind": "with the author's" if has_authors else "of two models",
    }
