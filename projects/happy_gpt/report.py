"""
What came of it: tweets of each stage from the same seeds, figures in summary.json, and plots.

The yardstick is exact: how much reward the best possible policy has at a KL, and how much best-of-n
has. Both follow from tweets of the sft model, without training (mingpt/evaluation.py).
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import data
from mingpt import evaluation
from mingpt.checkpoint import read_json, to_json, write_text
from mingpt.config import CfgNode as CN
from mingpt.evaluation import Samples
from mingpt.model import GPT
from mingpt.plots import plot_metrics
from mingpt.run_folder import read_metrics, to_lines
from mingpt.stages import Stages
from mingpt.utils import peak_memory_mb

BATCH_SIZE = 512  # tweets at once: the cache of thousands would fill the memory
FIGURES = (
    *("val_loss_pretrain", "reward_pretrain", "reward_sft", "reward_rl", "kl_rl", "kl_optimal"),
    *("unique_rl", "length_sft", "length_rl"),
)
HOW_TO_USE_IT = """
To use the model from Python:

from mingpt.chars import CharTokenizer
from mingpt.evaluation import sample
from mingpt.model import GPT

model = GPT.from_pretrained("{folder}")
tokenizer = CharTokenizer.from_pretrained("{folder}")
start = [tokenizer.eot_token]
tweets = sample(model, [start], n=10, tokenizer=tokenizer, max_new_tokens=64)
print("\\n".join(tweets.texts))"""


def sample_tweets(model: GPT, tokenizer, n: int, seed: int, reward_fn=None, prompt="") -> Samples:
    """n tweets that begin with the prompt, at temperature 1; the same for the same seed."""
    ids = [tokenizer.eot_token, *tokenizer.encode(prompt)]
    return evaluation.sample(
        model,
        [ids],
        n,
        tokenizer=tokenizer,
        max_new_tokens=model.config.block_size + 1 - len(ids),  # the last one is never read
        reward_fn=reward_fn,
        seed=seed,
        batch_size=BATCH_SIZE,
    )


def score(tweets: Samples, reward_fn) -> torch.Tensor:
    """What a reward function says of each tweet, (N,)."""
    return evaluation.score(tweets, reward_fn, BATCH_SIZE)


def kl_to(reference: GPT, tweets: Samples) -> float:
    """KL(policy || reference) in nats per tweet, from tweets of the policy."""
    return evaluation.kl(tweets, reference, batch_size=BATCH_SIZE)


@torch.no_grad()
def held_out_loss(model: GPT, texts: list[str], tokenizer) -> float:
    """Mean negative log-likelihood in nats over all characters of all texts, their ends included.

    The texts are read in consecutive windows.
    """
    windows = data.Windows(texts, tokenizer, model.config.block_size, consecutive=True)
    device = model.transformer.embedding.weight.device
    total, count = 0.0, 0
    for x, y in DataLoader(windows, batch_size=256):
        characters = (y >= 0).sum().item()
        _, loss = model(x.to(device), y.to(device))
        total += loss.item() * characters
        count += characters
    return total / count


def mean_length(tweets: Samples) -> float:
    """Mean number of characters of a tweet."""
    return sum(map(len, tweets.texts)) / len(tweets.texts)


def share_distinct(tweets: Samples) -> float:
    """How many different tweets there are, as a share of all."""
    return len(set(tweets.texts)) / len(tweets.texts)


def yardsticks(rewards) -> dict[str, tuple[list[float], list[float]]]:
    """The two curves to compare a run with, {label: (KLs, rewards)}."""
    best_possible = evaluation.tilted(rewards, np.geomspace(0.04, 10, 60))
    best_of = [evaluation.best_of_n(rewards, n) for n in (1, 2, 4, 8, 16, 32, 64)]
    return {
        "best possible: tilted reference": (
            best_possible.kls.tolist(),
            best_possible.rewards.tolist(),
        ),
        "best of n = 1 ... 64": ([kl for _, kl in best_of], [reward for reward, _ in best_of]),
    }


# --------------------------------------------------------------------------------------------------
# the report


def write(
    config: CN,
    stages: Stages,
    splits: dict[str, list[dict]],
    tokenizer,
    reward_fn,
    judges: dict,
    seed: int,
    started: float,
) -> None:
    """Write everything in work_dir that is for people, and print the most important of it.

    judges: {name: another reward function, which the policy never saw}. seed: of the tweets.
    started: the time at which the run began.
    """
    work_dir = Path(config.system.work_dir)
    models = {
        stage: stages.load(stage, device=config.rl.device)
        for stage in ("pretrain", "sft", "rl")
        if stages.finished(stage)
    }
    tweets = sample_stages(config, models, tokenizer, reward_fn, seed)
    summary = dict.fromkeys(FIGURES) | stage_figures(models, tweets, splits, tokenizer)
    reference_rewards = None
    if "rl" in tweets:
        n = config.report.frontier_samples
        samples = sample_tweets(models["sft"], tokenizer, n, seed + 1, reward_fn)
        reference_rewards = samples.rewards.numpy()
        write_text(work_dir / "reference_rewards.json", to_json(reference_rewards.tolist()))
        summary |= rl_figures(config, models["sft"], tweets["rl"], reference_rewards)
    for name, judge in judges.items():
        for stage, samples in tweets.items():
            summary[f"{name}_{stage}"] = score(samples, judge).mean().item()
    metrics = {
        stage: read_metrics(stages.stage_folder(stage) / "metrics.jsonl") for stage in models
    }
    plots(work_dir, metrics, reference_rewards)
    rows = [{"stage": stage, **row} for stage, stage_rows in metrics.items() for row in stage_rows]
    write_text(work_dir / "metrics.jsonl", to_lines(rows))
    write_text(work_dir / "samples.md", side_by_side(tweets, min(20, config.report.samples)))
    summary |= {
        "seconds": round(time.time() - started, 1),
        "peak_rss_mb": peak_memory(work_dir / "summary.json"),
        "seed": seed,
    }
    write_text(work_dir / "summary.json", to_json(summary, indent=2) + "\n")
    print(table(summary, tweets, work_dir))
    print(HOW_TO_USE_IT.format(folder=stages.model_folder(list(models)[-1]).as_posix()))


def sample_stages(
    config: CN, models: dict[str, GPT], tokenizer, reward_fn, seed: int
) -> dict[str, Samples]:
    """{stage: its tweets}; best-of-n stands in the place of rl."""
    n = config.report.samples
    tweets = {
        stage: sample_tweets(model, tokenizer, n, seed, reward_fn)
        for stage, model in models.items()
    }
    if config.rl.algorithm == "best_of_n" and "sft" in models:
        group_size = config.rl.group_size
        candidates = sample_tweets(models["sft"], tokenizer, n * group_size, seed, reward_fn)
        tweets["rl"] = evaluation.best_of_each(candidates, group_size)
    return tweets


def stage_figures(
    models: dict[str, GPT], tweets: dict[str, Samples], splits: dict[str, list[dict]], tokenizer
) -> dict[str, float]:
    """The figures of each stage by itself."""
    figures = {}
    for stage, samples in tweets.items():
        figures[f"reward_{stage}"] = samples.rewards.mean().item()
    if "pretrain" in models:
        texts = [row["text"] for row in splits["test"]]
        figures["val_loss_pretrain"] = held_out_loss(models["pretrain"], texts, tokenizer)
    for stage in ("sft", "rl"):
        if stage in tweets:
            figures[f"length_{stage}"] = mean_length(tweets[stage])
    return figures


def rl_figures(config: CN, reference: GPT, tweets: Samples, reference_rewards) -> dict[str, float]:
    """What the tweets of rl cost in KL, and what the best policy of that reward would pay."""
    if config.rl.algorithm == "best_of_n":
        _, kl = evaluation.best_of_n(reference_rewards, config.rl.group_size)  # a bound
    else:
        kl = kl_to(reference, tweets)
    return {
        "kl_rl": kl,
        "kl_optimal": evaluation.kl_optimal(reference_rewards, tweets.rewards.mean().item()),
        "unique_rl": share_distinct(tweets),
    }


def peak_memory(summary_path: Path) -> int | None:
    """Peak memory in MB, of this process or of an earlier one that ran other stages."""
    peak = peak_memory_mb()
    if peak is None:
        return None
    before = 0
    if summary_path.exists():
        before = read_json(summary_path)["peak_rss_mb"] or 0
    return max(before, round(peak))


# --------------------------------------------------------------------------------------------------
# tables


def side_by_side(tweets: dict[str, Samples], n: int) -> str:
    """The first n tweets as a Markdown table: a row for each seed, a column for each stage."""
    lines = [f"| {' | '.join(tweets)} |", "| --- " * len(tweets) + "|"]
    for row in range(n):
        cells = [table_cell(samples, row) for samples in tweets.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table_cell(samples: Samples, row: int) -> str:
    """A tweet and its reward."""
    text = samples.texts[row].replace("|", "¦")
    return f"`` {text} `` {samples.rewards[row]:+.2f}"


def table(summary: dict, tweets: dict[str, Samples], work_dir: Path) -> str:
    """The stages side by side, and ten tweets of the last one, for the console."""
    lines = ["", f"{'stage':10}{'reward':>8}{'KL':>8}{'length':>8}{'distinct':>10}"]
    for stage, samples in tweets.items():
        kl = {"sft": "0.00", "rl": number(summary["kl_rl"])}.get(stage, "-")
        lines.append(
            f"{stage:10}{summary['reward_' + stage]:8.3f}{kl:>8}{mean_length(samples):8.1f}"
            f"{share_distinct(samples):10.1%}"
        )
    if summary["kl_optimal"] is not None:
        kl = number(summary["kl_optimal"])
        lines.append(f"The best policy of that reward has a KL of {kl} nats.")
    lines += ["", *list(tweets.values())[-1].texts[:10], ""]
    memory = "" if summary["peak_rss_mb"] is None else f", {summary['peak_rss_mb']} MB"
    lines.append(
        f"{summary['seconds']:.0f} s{memory}. Plots, samples and summary.json are in {work_dir}."
    )
    return "\n".join(lines)


def number(value: float | None) -> str:
    """A number with two digits, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


# --------------------------------------------------------------------------------------------------
# plots


def plots(work_dir: Path, metrics: dict[str, list[dict]], reference_rewards) -> None:
    """The PNG files of the stages that are finished. metrics: {stage: rows of its metrics}."""
    losses = {
        stage: {
            "train": curve(metrics[stage], "loss"),
            "validation": curve(metrics[stage], "valid_loss"),
        }
        for stage in ("pretrain", "sft")
        if stage in metrics
    }
    if losses:
        plot_metrics(work_dir / "losses.png", losses, "loss, nats per character")
    if "rl" in metrics:
        plot_rl(work_dir, metrics["rl"], reference_rewards)


def plot_rl(work_dir: Path, rows: list[dict], reference_rewards) -> None:
    """Reward, KL and length; what PPO did; and reward against KL."""
    rollouts = [row for row in rows if "objective/kl" in row]  # dpo has none
    looks = [row for row in rows if "eval/kl" in row]
    reward = {"fresh tweets": curve(looks, "eval/scores")}
    kl = {"fresh tweets": curve(looks, "eval/kl")}
    panels = {}
    if rollouts:
        reward = {"rollouts": curve(rollouts, "objective/scores"), **reward}
        kl = {"rollouts": curve(rollouts, "objective/kl"), **kl}
        panels["length, characters"] = {"rollouts": curve(rollouts, "episode_length")}
    panels = {"reward": reward, "KL to sft, nats per tweet": kl, **panels}
    plot_metrics(work_dir / "reward_and_kl.png", panels)
    if rollouts:
        panels = {"clip fraction": {"policy/clipfrac": curve(rollouts, "policy/clipfrac")}}
        if "loss/value" in rollouts[0]:  # not every algorithm has a value function
            panels["value"] = {"loss/value": curve(rollouts, "loss/value")}
        panels["ratio π / π_old"] = {"val/ratio": curve(rollouts, "val/ratio")}
        plot_metrics(work_dir / "ppo.png", panels)
    path_of_run = means_of_five(rollouts)
    if not rollouts:
        path_of_run = ([row["eval/kl"] for row in looks], [row["eval/scores"] for row in looks])
    # The run begins as the sft model: at a KL of 0, with its reward.
    kls, rewards = path_of_run
    path_of_run = ([0.0, *kls], [float(np.mean(reference_rewards)), *rewards])
    plot_metrics(
        work_dir / "frontier.png",
        {"reward against KL": {"this run": path_of_run, **yardsticks(reference_rewards)}},
        xlabel="KL to the sft model, nats per tweet",
    )


def curve(rows: list[dict], name: str) -> tuple[list, list]:
    """(iterations, values) of one of the metrics."""
    return [row["iter"] for row in rows], [row.get(name) for row in rows]


def means_of_five(rollouts: list[dict]) -> tuple[list[float], list[float]]:
    """(KLs, rewards), each the mean of five rollouts, because a single one is a noisy estimate."""
    kls, rewards = [], []
    for start in range(0, len(rollouts), 5):
        rows = rollouts[start : start + 5]
        kls.append(float(np.mean([row["objective/kl"] for row in rows])))
        rewards.append(float(np.mean([row["objective/scores"] for row in rows])))
    return kls, rewards
