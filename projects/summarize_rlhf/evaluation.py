"""
What came of it: held-out texts, summarized by the sft model and by PPO's, side by side with their authors' summaries; figures and plots.
"""

import json
import resource
import sys
from pathlib import Path

import torch

import pipeline
import reward
from mingpt.checkpoint import write_text
from mingpt.datasets import pad_and_mask
from mingpt.run_folder import finished, read_metrics
from mingpt.config import CfgNode as CN
from mingpt.plots import plot_metrics
from mingpt.utils import import_extra


def write(config, corpus):
    """summary.json, samples.md, the plots and the finished model, in the work_dir; the figures to the console."""
    work_dir, seed = Path(config.system.work_dir), config.system.seed
    rows = pipeline.some(config, corpus.rows["test"], config.report.samples)
    models = {stage: pipeline.load_model(config, corpus.tokenizer, stage) for stage in ("sft", "ppo")}
    prompts = [row["prompt"] for row in rows]
    written = {stage: pipeline.summarize(config, model, corpus.tokenizer, prompts, seed) for stage, model in models.items()}
    judges = reward.load(config, corpus)
    scores = {stage: {name: pipeline.judged(judge, texts) for name, judge in judges.items()} for stage, texts in written.items()}
    authors = [row["completion"].strip() for row in rows]
    summary = {"accuracy": json.loads((work_dir / "accuracy.json").read_text(encoding="utf-8")), "texts": len(rows),
               **{f"{name}_authors": score for name, score in judged_authors(judges, rows, corpus.tokenizer).items()},
               "length_authors": sum(len(corpus.tokenizer.encode(row["completion"])) + 1 for row in rows) / len(rows)}
    for stage, texts in written.items():
        summary |= {f"{name}_{stage}": score.mean().item() for name, score in scores[stage].items()}
        summary |= {f"rouge_l_{stage}": rouge_l(authors, texts.texts), f"ended_{stage}": texts.ended.float().mean().item(),
                    f"length_{stage}": texts.lengths().mean().item(), f"distinct_{stage}": len(set(texts.texts)) / len(rows)}
    summary |= {"reward_sft_std": scores["sft"]["reward"].std().item(),
                "judge_prefers_ppo": (scores["ppo"]["judge"] > scores["sft"]["judge"]).float().mean().item(),
                "kl_ppo": pipeline.kl_to(models["sft"], written["ppo"], config.ppo.temperature),
                "seconds": {stage: round(state["seconds"]) for stage in pipeline.STAGES if (state := finished(work_dir / stage))},
                "peak_rss_mb": peak_memory(work_dir / "summary.json"), "seed": seed}
    write_text(work_dir / "samples.md", side_by_side(rows, authors, written, scores))
    plots(work_dir)
    for thing in (models["ppo"], corpus.tokenizer):
        thing.save_pretrained(work_dir / "model")
    pipeline.write_json(work_dir / "summary.json", summary)
    print(table(summary, work_dir))


def judged_authors(judges, rows, tokenizer):
    """{name: the mean score} that reward model and judge give the authors' own summaries."""
    ids = [[*tokenizer.encode(row["prompt"]), *tokenizer.encode(row["completion"]), tokenizer.eot_token] for row in rows]
    device = next(iter(judges.values())).head.weight.device
    idx, mask = (x.to(device) for x in pad_and_mask([torch.tensor(row) for row in ids]))
    texts = CN(idx=idx, attention_mask=mask)
    return {name: pipeline.judged(judge, texts).mean().item() for name, judge in judges.items()}


def rouge_l(references, texts):
    """Mean ROUGE-L F-measure with stemming, from 0 to 1 (Lin 2004)."""
    scorer = import_extra("rouge_score.rouge_scorer", "projects").RougeScorer(["rougeL"], use_stemmer=True)
    return sum(scorer.score(reference, text)["rougeL"].fmeasure for reference, text in zip(references, texts)) / len(texts)


def peak_memory(path):
    """MB that this process, or an earlier one that wrote a summary, took at most."""
    before = json.loads(path.read_text(encoding="utf-8"))["peak_rss_mb"] if path.exists() else 0
    return max(before, round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)))


def side_by_side(rows, authors, written, scores):
    """Markdown: of each text its beginning, and three summaries with the reward model's and the judge's scores."""
    cell = lambda text: text.replace("|", "¦").replace("\n", " ")
    lines = ["# Held-out texts, chosen at random", "", "(reward model, judge) in standard deviations of the sft model's summaries.", ""]
    lines += ["| text | author | sft | ppo |", "| --- | --- | --- | --- |"]
    for i, row in enumerate(rows):
        mine = [f"{cell(texts.texts[i])} ({scores[stage]['reward'][i]:+.1f}, {scores[stage]['judge'][i]:+.1f})"
                for stage, texts in written.items()]
        lines.append(f"| {cell(row['prompt'])} | {cell(authors[i])} | {' | '.join(mine)} |")
    return "\n".join(lines) + "\n"


def table(summary, work_dir):
    """The figures for the console."""
    lines = ["", f"{'':8}{'reward':>8}{'judge':>8}{'ROUGE-L':>9}{'ended':>8}{'length':>8}{'distinct':>10}"]
    lines.append(f"{'authors':8}{summary['reward_authors']:8.2f}{summary['judge_authors']:8.2f}{'':25}{summary['length_authors']:8.1f}")
    for stage in ("sft", "ppo"):
        figure = lambda name: summary[f"{name}_{stage}"]
        lines.append(f"{stage:8}{figure('reward'):8.2f}{figure('judge'):8.2f}{figure('rouge_l'):9.3f}{figure('ended'):8.1%}"
                     f"{figure('length'):8.1f}{figure('distinct'):10.1%}")
    lines += ["", f"Of {summary['texts']} held-out texts the judge prefers PPO's summary for {summary['judge_prefers_ppo']:.1%}, at a KL of "
              f"{summary['kl_ppo']:.2f} nats.",
              f"{sum(summary['seconds'].values())} s in the stages, {summary['peak_rss_mb']} MB; "
              f"samples.md, summary.json, the plots and the model are in {work_dir}"]
    return "\n".join(lines)


def plots(work_dir):
    """Losses, accuracy, reward, KL and length over the iterations."""
    metrics = {stage: read_metrics(work_dir / stage / "metrics.jsonl") for stage in pipeline.STAGES}
    column = lambda stage, name: ([row["iter"] for row in metrics[stage]], [row.get(name) for row in metrics[stage]])
    curves = lambda stage, name: {"train": column(stage, name), "validation": column(stage, f"valid_{name}")}
    plot_metrics(work_dir / "plots" / "training.png", {
        **{f"{stage}: loss": curves(stage, "loss") for stage in ("pretrain", "sft") if metrics[stage]},
        "comparisons: loss": {"reward model": column("reward", "valid_loss"), "judge": column("judge", "valid_loss")},
        "comparisons: accuracy": {"reward model": column("reward", "valid_accuracy"), "judge": column("judge", "valid_accuracy")}})
    plot_metrics(work_dir / "plots" / "ppo.png", {
        "reward": {"rollouts": column("ppo", "objective/scores"), "held-out": column("ppo", "eval/reward"),
                   "held-out, by the judge": column("ppo", "eval/judge")},
        "KL to sft, nats per summary": {"rollouts": column("ppo", "objective/kl"), "held-out": column("ppo", "eval/kl")},
        "length, tokens": {"rollouts": column("ppo", "episode_length")}, "ended": {"rollouts": column("ppo", "ended")}})
