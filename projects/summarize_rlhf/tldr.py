"""
TL;DR: posts on Reddit with their authors' summaries, and what people said of pairs of summaries (Stiennon et al. 2020, arXiv:2009.01325).

Both come from OpenAI's public bucket: the filtered posts of Völske et al. 2017, three files, and 19 batches of comparisons.
"""

import json

from mingpt.download import download, home

BUCKET = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
BATCHES = [*range(3, 21), 22]
POST_FIELDS = ("subreddit", "title", "post")
SPLITS = {"train": "train", "valid1": "valid", "valid2": "test"}  # the comparisons' names, and ours


def load():
    """({split: rows}, {split: comparisons}) of head, body and marker of the query, and completion, or chosen, rejected and kind."""
    rows = {split: [demonstration(line) for line in lines(f"datasets/tldr_3_filtered/{split}.jsonl")]
            for split in ("train", "valid", "test")}
    comparisons = {split: [] for split in SPLITS.values()}
    for number in BATCHES:
        for line in lines(f"dataset/comparisons/batch{number}.json"):
            if line.get("info", {}).get("post"):  # in some batches news articles stand among the posts
                comparisons[SPLITS[line["split"]]].append(comparison(line))
    return rows, comparisons


def lines(name):
    """The objects of one of the bucket's files, fetched into the cache; ValueError for a damaged one, which is removed."""
    path = download(f"{BUCKET}/{name}", home() / "summarize-from-feedback" / name)
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        path.unlink()
        raise ValueError(f"{path} was damaged ({error}) and is removed: run the same command again to fetch it anew") from error


def query(post):
    """The post in the paper's format; only the body may be cut."""
    return {"head": f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}\n\nPOST: ", "body": post["post"], "marker": "\n\nTL;DR:"}


def demonstration(line):
    return query(line) | {"completion": " " + line["summary"].strip()}


def comparison(line):
    """Which of two summaries somebody chose. kind: whether one of them is the post's author's own."""
    texts = [" " + summary["text"].strip() for summary in line["summaries"]]
    own = any(summary["policy"] == "ref" for summary in line["summaries"])
    return query(line["info"]) | {"chosen": texts[line["choice"]], "rejected": texts[1 - line["choice"]],
                                  "kind": "with the author's" if own else "of two models"}
