"""
What came of the teaching: figures in summary.json, answers before and after, and plots.

Two questions are asked of fresh prompts, on which nothing was trained: does the taught model earn
more reward, and what did that cost, in KL, in length, in answers that do not end. A third one is
asked of 30 questions with known answers: does it still know what it knew?
"""

import logging
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import answers
from answers import ChatModel
from judge import Judge
from mingpt import evaluation, lora
from mingpt.checkpoint import to_json, write_text
from mingpt.config import CfgNode
from mingpt.datasets import read_jsonl
from mingpt.evaluation import Samples, WinRate
from mingpt.plots import plot_metrics
from mingpt.run_folder import read_metrics
from mingpt.stages import Stages
from mingpt.utils import peak_memory_mb

logger = logging.getLogger("mingpt.chat")

HERE = Path(__file__).parent
KNOWN = HERE / "known.jsonl"
LICENSE = HERE / "LICENSE-SmolLM2"
BINS = 5  # of the calibration
SHOWN = 20  # prompts in samples.md
CURVES = ("loss", "accuracy", "held_out_accuracy")  # in losses.png


# --------------------------------------------------------------------------------------------------
# How good the reward model is, on labels that it has not learned from


def accuracy(margins: Tensor) -> WinRate:
    """How often the chosen answer has the higher reward, with its 95% interval."""
    return evaluation.win_rate(margins, torch.zeros_like(margins))


def calibration(margins: Tensor) -> tuple[list[float], list[float], float]:
    """(how sure it is, how often it is right then, the expected calibration error).

    Bradley-Terry says that the answer with the higher reward is the chosen one with the probability
    σ(difference). The labels are sorted by it into BINS groups of about the same size. The error is
    the mean distance of the two over all labels (Guo et al. 2017, section 2).
    """
    sure = torch.sigmoid(margins.abs()).numpy()
    right = (margins > 0).float().numpy()
    order = np.argsort(sure)
    groups = [group for group in np.array_split(order, BINS) if len(group)]
    predicted = [float(sure[group].mean()) for group in groups]
    observed = [float(right[group].mean()) for group in groups]
    sizes = [len(group) / len(order) for group in groups]
    distances = np.abs(np.array(predicted) - np.array(observed))
    return predicted, observed, float(distances @ np.array(sizes))


def in_words(rate: WinRate) -> str:
    """What the held-out accuracy means, for a person."""
    lines = [
        "Reward models that have learned from four fifths of the labels agree with "
        f"{rate.rate:.0%} of the others, {rate.n} in all (95% interval: {rate.low:.0%} to "
        f"{rate.high:.0%}). Guessing gives 50%."
    ]
    if rate.low <= 0.5:
        lines.append(
            "That may be luck: it may have learned nothing. Label more, or be more consistent: "
            "nothing below means much until it does better."
        )
    return " ".join(lines)


# --------------------------------------------------------------------------------------------------
# What the models answer


def known_answers(model: ChatModel, ask: CfgNode) -> list[bool]:
    """Which of the known questions the model answers right, when it writes what is likeliest."""
    rows = read_jsonl(KNOWN, "question")
    greedy = CfgNode(**{**ask.to_dict(), "temperature": 0.0})
    samples = model.sample(greedy, [row["question"] for row in rows], 1, seed=0)
    return [
        any(answer.lower() in text.lower() for answer in row["answers"])
        for row, text in zip(rows, samples.texts, strict=True)
    ]


def figures(samples: Samples) -> dict[str, float]:
    """What can be counted of some answers."""
    result = {
        "length": samples.lengths.float().mean().item(),
        "ended": samples.ended.float().mean().item(),
    }
    if samples.rewards is not None:
        result["reward"] = samples.rewards.mean().item()
    return result


def side_by_side(prompts: list[str], before: Samples, after: Samples) -> str:
    """A Markdown table of prompts, and the answers before and after."""
    lines = ["| prompt | before | after |", "| --- | --- | --- |"]
    for prompt, left, right in list(zip(prompts, before.texts, after.texts, strict=True))[:SHOWN]:
        lines.append(f"| {cell(prompt)} | {cell(left)} | {cell(right)} |")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """A text in a cell of a Markdown table: on one line, and as code, so that it stays as it is."""
    text = " ".join(text.split()).replace("|", "¦").replace("`", "'")
    return f"`` {text} ``"


# --------------------------------------------------------------------------------------------------
# The report


def write(
    config: CfgNode,
    stages: Stages,
    before: ChatModel,
    after: ChatModel,
    judge: Judge | None,
    margins: dict[str, Tensor],
    started: float,
) -> None:
    """Write everything in work_dir that is for people, and print the most important of it.

    before, after: the models. margins: of the judge, {"held_out": ..., "test": ...}, as far
    as there are such labels. started: when the run began.
    """
    work_dir = Path(config.system.work_dir)
    prompts = answers.read_prompts(config.report.prompts or str(answers.FRESH))
    samples = {
        "before": sample(config, before, prompts, judge),
        "after": sample(config, after, prompts, judge),
    }
    summary: dict = {}
    for name in samples:
        for figure, value in figures(samples[name]).items():
            summary[f"{figure}_{name}"] = value
    summary["kl"] = evaluation.kl(
        samples["after"], before.model, config.ask.temperature, config.report.batch_size
    )
    summary |= knowledge(before, after, config.ask)
    if judge is not None:
        summary |= reward_figures(samples, margins)
    write_text(work_dir / "samples.md", side_by_side(prompts, samples["before"], samples["after"]))
    plots(work_dir, stages, margins.get("held_out"))
    memory = peak_memory_mb()
    summary |= {
        "method": config.method,
        "seconds": round(time.time() - started, 1),
        "peak_rss_mb": None if memory is None else round(memory),
        "seed": config.system.seed,
    }
    write_text(work_dir / "summary.json", to_json(summary, indent=2) + "\n")
    print(table(summary))
    print(f"{summary['seconds']:.0f} s; samples.md, plots and summary.json are in {work_dir}")
    folder = stages.model_folder(stages.names[-1])
    print(f"Talk to it: python projects/chat/talk.py --model={folder}")


def sample(
    config: CfgNode, model: ChatModel, prompts: list[str], judge: Judge | None
) -> Samples:
    """A model's answers to the prompts, with their rewards if there is a reward model."""
    batch_size = config.report.batch_size
    samples = model.sample(config.ask, prompts, 1, config.system.seed, batch_size)
    if judge is not None:
        samples.rewards = evaluation.score(samples, judge, batch_size)
    return samples


def reward_figures(samples: dict[str, Samples], margins: dict[str, Tensor]) -> dict:
    """How good the reward model is, which is also printed, and what it says of the answers."""
    print(in_words(accuracy(margins["held_out"])))
    *_, calibration_error = calibration(margins["held_out"])
    preferred = evaluation.win_rate(samples["after"].rewards, samples["before"].rewards)
    accuracies = {f"{name}_accuracy": vars(accuracy(margins[name])) for name in margins}
    return {
        **accuracies,
        "calibration_error": calibration_error,
        "preferred_by_reward_model": vars(preferred),
    }


def knowledge(before: ChatModel, after: ChatModel, ask: CfgNode) -> dict[str, int]:
    """How many of the known questions both models answer right, and how many were lost."""
    knew = known_answers(before, ask)
    knows = known_answers(after, ask)
    lost = [a and not b for a, b in zip(knew, knows, strict=True)]
    return {"known_before": sum(knew), "known_after": sum(knows), "known_lost": sum(lost)}


def table(summary: dict) -> str:
    """Before and after, side by side, for the console."""
    lines = [f"{'':22}{'before':>10}{'after':>10}"]
    for figure, form in (("reward", ".2f"), ("length", ".1f"), ("ended", ".0%"), ("known", "d")):
        if f"{figure}_before" in summary:
            values = [format(summary[f"{figure}_{name}"], form) for name in ("before", "after")]
            lines.append(f"{figure:22}{values[0]:>10}{values[1]:>10}")
    lines.append(f"{'KL, nats an answer':22}{'':10}{summary['kl']:10.1f}")
    lines.append(f"{'known before, not now':22}{'':10}{summary['known_lost']:10d}")
    return "\n".join(lines)


def plots(work_dir: Path, stages: Stages, margins: Tensor | None) -> None:
    """The PNG files of the stages that took place."""
    metrics = {
        stage: read_metrics(stages.stage_folder(stage) / "metrics.jsonl") for stage in stages.names
    }
    if margins is not None:
        predicted, observed, _ = calibration(margins)
        plot_metrics(
            work_dir / "calibration.png",
            {
                "how often it is right": {
                    "the reward model": (predicted, observed),
                    "as sure as it should be": ([0.5, 1.0], [0.5, 1.0]),
                }
            },
            xlabel="how sure the reward model is",
        )
    losses = {
        stage: {name: curve(rows, name) for name in CURVES if name in rows[0]}
        for stage, rows in metrics.items()
        if rows and "loss" in rows[0]
    }
    if losses:
        plot_metrics(work_dir / "losses.png", losses)
    rollouts = [row for row in metrics.get("rl", []) if "objective/kl" in row]
    if rollouts:
        plot_rl(work_dir, rollouts)


def plot_rl(work_dir: Path, rollouts: list[dict]) -> None:
    """What the policy's answers were like during PPO, and reward against KL."""
    names = {
        "reward": "objective/scores",
        "KL, nats an answer": "objective/kl",
        "length, tokens": "episode_length",
        "share that ends by itself": "ended",
    }
    plot_metrics(
        work_dir / "rl.png",
        {title: {"rollouts": curve(rollouts, name)} for title, name in names.items()},
    )
    path = (
        [row["objective/kl"] for row in rollouts],
        [row["objective/scores"] for row in rollouts],
    )
    plot_metrics(
        work_dir / "reward_and_kl.png",
        {"reward against KL": {"rollouts": path}},
        xlabel="KL to the reference, nats an answer",
    )


def curve(rows: list[dict], name: str) -> tuple[list, list]:
    """(iterations, values) of one of the metrics."""
    return [row["iter"] for row in rows], [row.get(name) for row in rows]


# --------------------------------------------------------------------------------------------------
# A whole model


def write_merged(adapter: Path, folder: Path) -> None:
    """Write the model with its adapter merged into it, which needs no base any more."""
    chat_model = ChatModel.load(str(adapter), "cpu")
    lora.merge(chat_model.model)
    chat_model.model.save_pretrained(folder)
    chat_model.chat.save_pretrained(folder)
    base = answers.base_of(str(adapter))
    assert base is not None
    original = base["name"]
    if original == "smollm2":
        original = "SmolLM2-135M-Instruct"
        write_text(folder / "LICENSE", LICENSE.read_text(encoding="utf-8"))
    lines = [
        f"# Modified from {original}",
        "",
        f"This model is {original}, modified: it was fine-tuned on somebody's preferences with "
        "projects/chat of minRLHF. The licence of the original holds for it as well.",
        "",
        f"SHA-256 of the original's weights, as minRLHF reads them: {base['sha256']}",
    ]
    write_text(folder / "README.md", "\n".join(lines) + "\n")
    print(f"The whole model is in {folder}.")
