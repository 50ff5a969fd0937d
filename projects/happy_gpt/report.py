"""
What came of it: tweets of each stage from the same seeds, the figures in summary.json, and the plots.

The yardstick is exact. Of all policies that earn a mean reward R, the one nearest to the reference π_ref (in KL) is the
reference tilted by the reward, π*(x) ∝ π_ref(x) exp(r(x)/β), which is also the optimum of the KL-penalised objective with
kl_coef = β (Ziegler et al. 2019, section 2; Rafailov et al. 2023, equation 4). Samples of π_ref with self-normalised weights
give its reward and its KL, without any training.
"""

import json
import math
import resource
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

import data
from mingpt.checkpoint import write_text
from mingpt.rlhf import written_mask
from mingpt.run_folder import read_metrics
from mingpt.plots import plot_metrics


@dataclass
class Tweets:
    """Samples: their texts, ids (B, T) with the mask of what was written, log-probs (B, T-1) and rewards (B,)."""
    texts: list
    idx: torch.Tensor
    mask: torch.Tensor
    log_probs: torch.Tensor
    rewards: torch.Tensor


@torch.no_grad()
def sample(model, tokenizer, reward, n, seed, prompt=""):
    """n tweets at temperature 1, the same for the same seed. Without a reward function their rewards are 0."""
    eot, device, T = tokenizer.eot_token, model.transformer.wte.weight.device, model.config.block_size + 1
    start = torch.tensor([[eot, *tokenizer.encode(prompt)]], device=device)
    generator, parts, was_training = torch.Generator(device).manual_seed(seed), [], model.training
    model.eval()
    for size in [512] * (n // 512) + [n % 512] * (n % 512 > 0):  # the cache of thousands at once would fill the memory
        idx, log_probs = model.generate(start.expand(size, -1), T - start.size(1), do_sample=True, stop_token=eot,
                                        generator=generator, return_log_probs=True)
        parts.append((F.pad(idx, (0, T - idx.size(1)), value=eot), F.pad(log_probs, (start.size(1) - 1, T - idx.size(1)))))
    model.train(was_training)
    idx, log_probs = map(torch.cat, zip(*parts))
    texts = [tokenizer.decode([i for i in row if i != eot]) for row in idx.tolist()]
    tweets = Tweets(texts, idx, written_mask(idx, start.size(1), eot)[:, 1:], log_probs, torch.zeros(n))
    return replace(tweets, rewards=judged(reward, tweets)) if reward else tweets


def judged(reward, tweets):
    """What a reward function says of each tweet, (B,)."""
    written = F.pad(tweets.mask, (1, 0))
    attention_mask = written | (torch.arange(tweets.idx.size(1), device=written.device) <= tweets.mask.int().argmax(1, keepdim=True))
    return reward(tweets.idx, attention_mask, written).cpu()


def best_of_each(tweets, n):
    """Of every n tweets in a row the one of most reward."""
    best = tweets.rewards.view(-1, n).argmax(1) + torch.arange(0, len(tweets.rewards), n)
    return Tweets([tweets.texts[i] for i in best], *(x[best.to(x.device)] for x in (tweets.idx, tweets.mask, tweets.log_probs, tweets.rewards)))


@torch.no_grad()
def kl_to(reference, tweets):
    """KL(policy || reference) in nats per tweet, from tweets that the policy wrote."""
    log_ratio = (tweets.log_probs - reference.log_probs(tweets.idx)) * tweets.mask
    return log_ratio.sum(1).mean().item()


@torch.no_grad()
def held_out_loss(model, texts, tokenizer):
    """Mean negative log-likelihood in nats over all characters of all texts (their ends too), in consecutive windows."""
    windows = data.Windows(texts, tokenizer, model.config.block_size, consecutive=True)
    device, total, count = model.transformer.wte.weight.device, 0.0, 0
    for x, y in torch.utils.data.DataLoader(windows, batch_size=256):
        n = (y >= 0).sum().item()
        total, count = total + model(x.to(device), y.to(device))[1].item() * n, count + n
    return total / count


# ---------------------------------------------------------------------------------------------------------------------
# how good a policy could be


def tilted(rewards, beta):
    """(mean reward, KL to the reference) of the reference tilted by exp(reward / beta), from the reference's rewards."""
    log_w = np.asarray(rewards, dtype=np.float64) / beta
    log_w -= np.logaddexp.reduce(log_w)  # weights add up to 1
    w = np.exp(log_w)
    return float(w @ rewards), float(w @ log_w + math.log(len(w)))


def kl_optimal(rewards, reward):
    """The KL that the best policy of this mean reward has; 0 where the reference does as well, None beyond its samples."""
    low, high = math.log(1e-3), math.log(1e3)
    if reward <= np.mean(rewards):
        return 0.0
    if reward >= np.max(rewards):
        return None
    for _ in range(60):  # bisection: the tilted reward falls as beta grows
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(rewards, math.exp(middle))[0] > reward else (low, middle)
    return tilted(rewards, math.exp(low))[1]


def best_of_n(rewards, n):
    """(mean reward, bound on the KL) of taking the best of n samples: the expected maximum, and log n - (n-1)/n."""
    ranks = np.arange(len(rewards) + 1) / len(rewards)
    return float(np.diff(ranks ** n) @ np.sort(rewards)), math.log(n) - (n - 1) / n


def yardsticks(rewards):
    """The two curves to compare with, {label: (KLs, rewards)}."""
    tilt = [tilted(rewards, beta) for beta in np.geomspace(0.04, 10, 60)]
    best = [best_of_n(rewards, n) for n in (1, 2, 4, 8, 16, 32, 64)]
    return {"best possible: tilted reference": ([kl for _, kl in tilt], [r for r, _ in tilt]),
            "best of n = 1 ... 64": ([kl for _, kl in best], [r for r, _ in best])}


# ---------------------------------------------------------------------------------------------------------------------
# the report


def write(config, work_dir, models, splits, tokenizer, reward, judges, start):
    """Everything in work_dir that is for people; models are those of the stages that are done, judges further reward functions, by name."""
    seed, n = config.system.seed, config.report.samples
    tweets = {stage: sample(model, tokenizer, reward, n, seed) for stage, model in models.items()}
    metrics = {stage: read_metrics(work_dir / stage / "metrics.jsonl") for stage in models}
    best_of = config.rl.group_size if config.rl.algorithm == "best_of_n" and "sft" in models else None
    if best_of:
        tweets["rl"] = best_of_each(sample(models["sft"], tokenizer, reward, n * best_of, seed), best_of)

    summary = dict.fromkeys(("val_loss_pretrain", "reward_pretrain", "reward_sft", "reward_rl", "kl_rl", "kl_optimal",
                             "unique_rl", "length_sft", "length_rl"))
    for stage, t in tweets.items():
        summary[f"reward_{stage}"] = t.rewards.mean().item()
    if "pretrain" in models:
        summary["val_loss_pretrain"] = held_out_loss(models["pretrain"], [row["text"] for row in splits["test"]], tokenizer)
    if "sft" in models:
        summary["length_sft"] = mean_length(tweets["sft"])
    reference_rewards = None
    if "rl" in tweets:
        reference_rewards = sample(models["sft"], tokenizer, reward, config.report.frontier_samples, seed + 1).rewards.numpy()
        summary |= {"kl_rl": best_of_n(reference_rewards, best_of)[1] if best_of else kl_to(models["sft"], tweets["rl"]),
                    "kl_optimal": kl_optimal(reference_rewards, summary["reward_rl"]),
                    "unique_rl": len(set(tweets["rl"].texts)) / n, "length_rl": mean_length(tweets["rl"])}
        write_text(work_dir / "reference_rewards.json", json.dumps(reference_rewards.tolist()))
    summary |= {f"{name}_{stage}": judged(judge, t).mean().item() for name, judge in judges.items() for stage, t in tweets.items()}
    plots(work_dir, metrics, reference_rewards)
    write_text(work_dir / "metrics.jsonl", "".join(json.dumps({"stage": stage, **row}) + "\n"
                                                   for stage, rows in metrics.items() for row in rows))
    write_text(work_dir / "samples.md", side_by_side(tweets, min(20, n)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    path = work_dir / "summary.json"
    before = json.loads(path.read_text(encoding="utf-8"))["peak_rss_mb"] if path.exists() else 0  # stages can run one by one
    summary |= {"seconds": round(time.time() - start, 1), "peak_rss_mb": max(before, round(peak)), "seed": seed}
    write_text(path, json.dumps(summary, indent=2) + "\n")
    print(table(summary, tweets, work_dir))


def mean_length(tweets):
    return sum(map(len, tweets.texts)) / len(tweets.texts)


def side_by_side(tweets, n):
    """A Markdown table: a row a seed, a column a stage."""
    cell = lambda t, i: f"`` {t.texts[i].replace('|', '¦')} `` {t.rewards[i]:+.2f}"
    rows = [f"| {' | '.join(tweets)} |", "| --- " * len(tweets) + "|"]
    return "\n".join(rows + [f"| {' | '.join(cell(t, i) for t in tweets.values())} |" for i in range(n)]) + "\n"


def table(summary, tweets, work_dir):
    """The before/after table and ten tweets of the last stage, for the console."""
    show = lambda value, form: "-" if value is None else format(value, form)
    lines = ["", f"{'stage':10}{'reward':>8}{'KL':>8}{'length':>8}{'distinct':>10}"]
    for stage, t in tweets.items():
        kl = {"rl": summary["kl_rl"], "sft": 0.0}.get(stage)
        lines.append(f"{stage:10}{summary['reward_' + stage]:8.3f}{show(kl, '.2f'):>8}{mean_length(t):8.1f}"
                     f"{len(set(t.texts)) / len(t.texts):10.1%}")
    if summary["kl_optimal"] is not None:
        lines.append(f"The best policy of that reward has a KL of {summary['kl_optimal']:.2f} nats.")
    lines += ["", *list(tweets.values())[-1].texts[:10], "",
              f"{summary['seconds']:.0f} s, {summary['peak_rss_mb']} MB; plots, samples and summary.json are in {work_dir}"]
    return "\n".join(lines)


def plots(work_dir, metrics, reference_rewards):
    column = lambda rows, name: ([row["iter"] for row in rows], [row.get(name) for row in rows])
    panels = {stage: {"train": column(metrics[stage], "loss"), "validation": column(metrics[stage], "valid_loss")}
              for stage in ("pretrain", "sft") if stage in metrics}
    if panels:
        plot_metrics(work_dir / "losses.png", panels, "loss, nats per character")
    if "rl" not in metrics:
        return
    rollouts = [row for row in metrics["rl"] if "objective/kl" in row]  # dpo has none
    looks = [row for row in metrics["rl"] if "eval/kl" in row]
    plot_metrics(work_dir / "reward_and_kl.png", {
        "reward": {"rollouts": column(rollouts, "objective/scores"), "fresh tweets": column(looks, "eval/scores")},
        "KL to sft, nats per tweet": {"rollouts": column(rollouts, "objective/kl"), "fresh tweets": column(looks, "eval/kl")},
        "length, characters": {"rollouts": column(rollouts, "episode_length")}})
    if rollouts:
        plot_metrics(work_dir / "ppo.png", {"clip fraction": {"policy/clipfrac": column(rollouts, "policy/clipfrac")},
                                            "value": {"loss/value": column(rollouts, "loss/value")},
                                            "ratio π / π_old": {"val/ratio": column(rollouts, "val/ratio")}})
    five = [rollouts[i:i + 5] for i in range(0, len(rollouts), 5)]  # a rollout is a noisy estimate: show means of five
    run = [[float(np.mean([row[f"objective/{name}"] for row in part])) for part in five] or [row[f"eval/{name}"] for row in looks]
           for name in ("kl", "scores")]
    plot_metrics(work_dir / "frontier.png", {"reward against KL": {"this run": tuple(run), **yardsticks(reference_rewards)}},
                 xlabel="KL to the sft model, nats per tweet")
