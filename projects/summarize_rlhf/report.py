"""
What came of it: summaries of held-out texts by the sft model and by PPO's, beside their authors'.

    summary.json      all figures
    samples.md        the texts, with the three summaries and their scores
    plots/            losses and accuracies; reward, KL and length during PPO
    model/            PPO's model and the vocabulary, for from_pretrained

All of them go into the run's folder, and the main figures to the console.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import pipeline
import reward
from mingpt import evaluation
from mingpt.bpe import BPETokenizer
from mingpt.checkpoint import read_json, write_text
from mingpt.datasets import pad_and_mask
from mingpt.evaluation import Samples
from mingpt.plots import plot_metrics
from mingpt.rlhf import RewardModel
from mingpt.run_folder import read_metrics
from mingpt.utils import import_extra, peak_memory_mb
from pipeline import Run

HOW_TO_USE_IT = """
To use the model from Python:

from mingpt.bpe import BPETokenizer
from mingpt.evaluation import sample
from mingpt.model import GPT

model = GPT.from_pretrained("{folder}")
tokenizer = BPETokenizer.from_pretrained("{folder}")
text = "Returns:\\nThe Euclidean length of the vector.\\nTL;DR:"
print(sample(model, [text], tokenizer=tokenizer, max_new_tokens=24).texts[0])"""


@dataclass
class Outcome:
    """What a stage's model wrote for the N held-out texts."""

    samples: Samples
    scores: dict[str, Tensor]  # (N,) each: what the reward model and the judge say of them


def write(run: Run) -> None:
    """Everything that the run's folder has for people."""
    config, tokenizer = run.config, run.corpus.tokenizer
    rows = pipeline.draw_rows(config, run.corpus.rows["test"], config.report.samples)
    prompts = [row["prompt"] for row in rows]
    authors = [row["completion"].strip() for row in rows]

    # The same seed for both: each text's two summaries come from the same random numbers.
    sft, ppo = pipeline.load_model(run, "sft"), pipeline.load_model(run, "ppo")
    reward_models = reward.load(run)
    outcomes = {}
    for stage, model in (("sft", sft), ("ppo", ppo)):
        samples = pipeline.summarize(config, model, tokenizer, prompts, config.system.seed)
        scores = {}
        for name, reward_model in reward_models.items():
            scores[name] = evaluation.score(samples, reward_model)
        outcomes[stage] = Outcome(samples, scores)

    summary = {
        "accuracy": read_json(run.work_dir / "accuracy.json"),
        "texts": len(rows),
        **figures_of_authors(reward_models, rows, tokenizer),
        **figures_of_stages(outcomes, authors),
        "kl_ppo": evaluation.kl(outcomes["ppo"].samples, sft, config.ppo.temperature),
        "seconds": seconds_of_stages(run),
        "peak_rss_mb": peak_memory(run.work_dir / "summary.json"),
        "seed": config.system.seed,
    }
    write_text(run.work_dir / "samples.md", side_by_side(rows, authors, outcomes))
    plot_training(run)
    plot_ppo(run)
    ppo.save_pretrained(run.work_dir / "model")
    tokenizer.save_pretrained(run.work_dir / "model")
    pipeline.write_json(run.work_dir / "summary.json", summary)
    print(table(summary, run.work_dir))
    print(HOW_TO_USE_IT.format(folder=(run.work_dir / "model").as_posix()))


# --------------------------------------------------------------------------------------------------
# figures


@torch.no_grad()
def figures_of_authors(
    reward_models: dict[str, RewardModel],
    rows: list[dict],
    tokenizer: BPETokenizer,
    batch_size: int = 256,
) -> dict[str, float]:
    """What reward model and judge think of the authors' own summaries, and how long those are."""
    texts = []
    total_length = 0
    for row in rows:
        completion = [*tokenizer.encode(row["completion"]), tokenizer.eot_token]
        texts.append(torch.tensor([*tokenizer.encode(row["prompt"]), *completion]))
        total_length += len(completion)
    idx, attention_mask = pad_and_mask(texts)

    figures = {}
    for name, model in reward_models.items():
        device = model.head.weight.device
        scores = []
        for first in range(0, len(rows), batch_size):
            batch = slice(first, first + batch_size)
            scores.append(model(idx[batch].to(device), attention_mask[batch].to(device)))
        figures[f"{name}_authors"] = torch.cat(scores).mean().item()
    figures["length_authors"] = total_length / len(rows)
    return figures


def figures_of_stages(outcomes: dict[str, Outcome], authors: list[str]) -> dict[str, float]:
    """Means over the held-out texts, {figure_stage: value}; and how the two stages compare."""
    figures = {}
    for stage, outcome in outcomes.items():
        samples = outcome.samples
        for name, scores in outcome.scores.items():
            figures[f"{name}_{stage}"] = scores.mean().item()
        figures[f"rouge_l_{stage}"] = rouge_l(authors, samples.texts)
        figures[f"ended_{stage}"] = samples.ended.float().mean().item()
        figures[f"length_{stage}"] = samples.lengths.float().mean().item()
        figures[f"distinct_{stage}"] = len(set(samples.texts)) / len(authors)
    sft, ppo = outcomes["sft"].scores, outcomes["ppo"].scores
    figures["reward_sft_std"] = sft["reward"].std().item()
    figures["judge_prefers_ppo"] = (ppo["judge"] > sft["judge"]).float().mean().item()
    return figures


def rouge_l(references: list[str], texts: list[str]) -> float:
    """Mean ROUGE-L F-measure with stemming, from 0 to 1 (Lin 2004)."""
    rouge_scorer = import_extra("rouge_score.rouge_scorer", "projects")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    f_measures = [
        scorer.score(reference, text)["rougeL"].fmeasure
        for reference, text in zip(references, texts, strict=True)
    ]
    return sum(f_measures) / len(texts)


def seconds_of_stages(run: Run) -> dict[str, int]:
    """How long each stage trained, interruptions left out."""
    seconds = {}
    for stage in run.stages.names:
        path = run.stages.stage_folder(stage) / "finished.json"
        seconds[stage] = round(read_json(path)["seconds"])
    return seconds


def peak_memory(path: Path) -> int | None:
    """The most MB that this process held, or an earlier one that wrote the summary at `path`.

    None where the system does not count it.
    """
    peak = peak_memory_mb()
    if peak is None:
        return None
    before = 0
    if path.exists():
        before = read_json(path)["peak_rss_mb"] or 0
    return max(before, round(peak))


# --------------------------------------------------------------------------------------------------
# for people to read


def side_by_side(rows: list[dict], authors: list[str], outcomes: dict[str, Outcome]) -> str:
    """A Markdown table: each prompt, and its three summaries with their scores."""
    lines = [
        "# Held-out texts, chosen at random",
        "",
        "(reward model, judge) in standard deviations of the sft model's summaries.",
        "",
        "| text | author | sft | ppo |",
        "| --- | --- | --- | --- |",
    ]
    for i, row in enumerate(rows):
        cells = [row["prompt"], authors[i]]
        for outcome in outcomes.values():
            by_reward_model, by_judge = outcome.scores["reward"][i], outcome.scores["judge"][i]
            cells.append(f"{outcome.samples.texts[i]} ({by_reward_model:+.1f}, {by_judge:+.1f})")
        lines.append(f"| {' | '.join(one_line(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def one_line(text: str) -> str:
    """The text as a cell of a Markdown table."""
    return text.replace("|", "¦").replace("\n", " ")


def table(summary: dict, work_dir: Path) -> str:
    """The main figures, for the console."""
    lines = [
        "",
        f"{'':8}{'reward':>8}{'judge':>8}{'ROUGE-L':>9}{'ended':>8}{'length':>8}{'distinct':>10}",
        f"{'authors':8}{summary['reward_authors']:8.2f}{summary['judge_authors']:8.2f}"
        f"{'':25}{summary['length_authors']:8.1f}",
    ]
    for stage in ("sft", "ppo"):
        lines.append(
            f"{stage:8}{summary[f'reward_{stage}']:8.2f}{summary[f'judge_{stage}']:8.2f}"
            f"{summary[f'rouge_l_{stage}']:9.3f}{summary[f'ended_{stage}']:8.1%}"
            f"{summary[f'length_{stage}']:8.1f}{summary[f'distinct_{stage}']:10.1%}"
        )
    memory = "" if summary["peak_rss_mb"] is None else f", {summary['peak_rss_mb']} MB"
    lines += [
        "",
        f"Of {summary['texts']} held-out texts the judge prefers PPO's summary for "
        f"{summary['judge_prefers_ppo']:.1%},",
        f"at a KL of {summary['kl_ppo']:.2f} nats.",
        f"{sum(summary['seconds'].values())} s in the stages{memory}.",
        f"samples.md, summary.json, the plots and the model are in {work_dir}.",
    ]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# plots


class Metrics:
    """A stage's metrics over its iterations, as curves to plot."""

    def __init__(self, run: Run, stage: str):
        self.rows = read_metrics(run.stages.stage_folder(stage) / "metrics.jsonl")

    def curve(self, name: str) -> tuple[list, list]:
        """(iterations, values); a value is None where it was not measured."""
        iterations = [row["iter"] for row in self.rows]
        values = [row.get(name) for row in self.rows]
        return iterations, values


def plot_training(run: Run) -> None:
    """Losses of the language models; losses and accuracies of reward model and judge."""
    panels = {}
    for stage in ("pretrain", "sft"):
        if stage in run.stages.names:  # with other people's weights there is no pre-training
            metrics = Metrics(run, stage)
            panels[f"{stage}: loss"] = {
                "train": metrics.curve("loss"),
                "validation": metrics.curve("valid_loss"),
            }
    reward_model, judge = Metrics(run, "reward"), Metrics(run, "judge")
    for name in ("loss", "accuracy"):
        panels[f"comparisons: {name}"] = {
            "reward model": reward_model.curve(f"valid_{name}"),
            "judge": judge.curve(f"valid_{name}"),
        }
    plot_metrics(run.work_dir / "plots" / "training.png", panels)


def plot_ppo(run: Run) -> None:
    """Reward, KL and length during PPO: of the rollouts, and of summaries of held-out texts."""
    metrics = Metrics(run, "ppo")
    panels = {
        "reward": {
            "rollouts": metrics.curve("objective/scores"),
            "held-out": metrics.curve("eval/reward"),
            "held-out, by the judge": metrics.curve("eval/judge"),
        },
        "KL to sft, nats per summary": {
            "rollouts": metrics.curve("objective/kl"),
            "held-out": metrics.curve("eval/kl"),
        },
        "length, tokens": {"rollouts": metrics.curve("episode_length")},
        "ended": {"rollouts": metrics.curve("ended")},
    }
    plot_metrics(run.work_dir / "plots" / "ppo.png", panels)
