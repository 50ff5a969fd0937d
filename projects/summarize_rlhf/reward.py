"""
Stage 2, the reward model: a GPT's trunk learns to give a summary a number, from pairs of summaries
of one text of which the better one is known.

    python projects/summarize_rlhf/reward.py           after sft.py, with the same options

For TL;DR, people made the comparisons. For docstrings the author's line counts as the better one,
against what the sft model wrote for the same text and against another text's line.

Two models learn, from different parts of the training texts: the reward model, which PPO climbs,
and the judge, which PPO never sees. Where the judge agrees that PPO's summaries are better, PPO has
learned more than the weaknesses of one reward model.
"""

import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

import pipeline
from corpus import Splits
from mingpt import evaluation
from mingpt.bpe import BPETokenizer
from mingpt.checkpoint import run_script, to_json, write_text
from mingpt.datasets import Comparisons, read_jsonl
from mingpt.model import GPT
from mingpt.plots import plot_metrics
from mingpt.rlhf import RewardModel, comparison_loss, comparison_scores
from mingpt.trainer import Trainer
from mingpt.utils import set_seed
from pipeline import Run

logger = logging.getLogger("mingpt.summarize_rlhf")

NAMES = {"reward": "reward model", "judge": "judge"}  # {stage: what it trains}
SAMPLES_PER_TEXT = 2  # by the sft model, for the comparisons
KINDS = ["author against a sample"] * SAMPLES_PER_TEXT + ["author against another's"]
NORMALIZED_ON = 500  # summaries by the sft model, whose scores get mean 0 and variance 1


def main(run: Run) -> None:
    """Make the comparisons, train both models, and measure how good they are."""
    splits = run.corpus.comparisons
    if splits is None:
        splits = comparisons_with_sft_model(run)
    for stage in NAMES:
        run.stages.run(stage, functools.partial(train, run, splits, stage))
    if not (run.work_dir / "accuracy.json").exists():
        write_accuracy(run, splits["test"])


def train(run: Run, splits: Splits, stage: str) -> Trainer:
    """A trainer for one of the two models, which starts from the sft model.

    Training texts are those of the model's own part; both are validated on the same texts.
    """
    set_seed(run.config.system.seed + {"reward": 2, "judge": 3}[stage])
    model = RewardModel.from_gpt(pipeline.load_model(run, "sft"))
    rows = [row for row in splits["train"] if row["part"] == stage]
    block_size = run.config.model.block_size
    return Trainer(
        run.stages.trainer_config(stage),
        model,
        Comparisons(rows, run.corpus.tokenizer, block_size),
        Comparisons(splits["valid"], run.corpus.tokenizer, block_size),
        loss_fn=functools.partial(comparison_loss, centering=run.config.comparisons.centering),
        collate_fn=Comparisons.collate,
    )


def load(run: Run) -> dict[str, RewardModel]:
    """{"reward", "judge"}: the two models, in standard deviations of the sft model's summaries.

    That is, their scores of these summaries have mean 0 and variance 1.
    """
    rows = pipeline.draw_rows(run.config, run.corpus.rows["valid"], NORMALIZED_ON)
    samples = pipeline.summarize(
        run.config,
        pipeline.load_model(run, "sft"),
        run.corpus.tokenizer,
        [row["prompt"] for row in rows],
        seed=run.config.system.seed + 20,
    )
    models = {stage: pipeline.load_model(run, stage) for stage in NAMES}
    for model in models.values():
        scores = evaluation.score(samples, model).to(model.head.weight.device)
        model.normalize(scores, unit_variance=True)
    return models


# --------------------------------------------------------------------------------------------------
# comparisons, where people made none


def comparisons_with_sft_model(run: Run) -> Splits:
    """{split: comparisons}, as `compare` makes them; kept in comparisons.jsonl."""
    path = comparisons_file(run)
    if not path.exists():
        model = pipeline.load_model(run, "sft")
        lines = []
        for number, (split, rows) in enumerate(run.corpus.rows.items()):
            if split == "train":
                # The sft model knows the authors' lines of its own part by heart.
                rows = [row for row in rows if row["part"] != "sft"]
            seed = run.config.system.seed + 100 * number
            for comparison in compare(run, model, rows, seed):
                lines.append(to_json({**comparison, "split": split}) + "\n")
        write_text(path, "".join(lines))
    comparisons = read_jsonl(path, "prompt", "chosen", "part", "split")
    return {
        split: [row for row in comparisons if row["split"] == split] for split in run.corpus.rows
    }


def comparisons_file(run: Run) -> Path:
    """The comparisons.jsonl of the run that trained the reward model, which may be base."""
    own = run.work_dir / "comparisons.jsonl"
    if not run.stages.finished("reward"):
        return own
    of_reward_model = run.stages.stage_folder("reward").with_name("comparisons.jsonl")
    return of_reward_model if of_reward_model.exists() else own


def compare(run: Run, model: GPT, rows: list[dict], seed: int) -> list[dict]:
    """Each author's line against samples of the sft model and against another text's line."""
    tokenizer = run.corpus.tokenizer
    prompts = [row["prompt"] for row in rows]
    samples = [
        pipeline.summarize(run.config, model, tokenizer, prompts, seed + number)
        for number in range(SAMPLES_PER_TEXT)
    ]
    others = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    comparisons = []
    for i, row in enumerate(rows):
        rejected = [" " + sample.texts[i] for sample in samples]
        rejected.append(rows[others[i]]["completion"])
        # A sample of junk may have more tokens after it has been decoded and encoded again.
        longest = max(len(tokenizer.encode(text)) for text in rejected)
        if len(tokenizer.encode(row["prompt"])) + longest >= run.config.model.block_size:
            continue
        comparison = {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": rejected,
            # A reward model can only judge texts that were cut off if it has seen some.
            "ended": [True, *(sample.ended[i].item() for sample in samples), True],
            "kinds": KINDS,
            "part": row["part"],
        }
        comparisons.append(comparison)
    return comparisons


# --------------------------------------------------------------------------------------------------
# how good the two models are


def write_accuracy(run: Run, rows: list[dict]) -> None:
    """accuracy.json: the share of held-out comparisons that each model gets right, by kind.

    plots/calibration.png: how often a model is right, against how sure it is.
    """
    kinds = [kind for row in rows for kind in row["kinds"]]
    accuracies = {}
    curves = {}
    for stage, name in NAMES.items():
        model = pipeline.load_model(run, stage)
        margins = score_margins(model, rows, run.corpus.tokenizer, run.config.model.block_size)
        accuracies[stage] = {}
        for kind in sorted(set(kinds)):
            margins_of_kind = margins[[other == kind for other in kinds]]
            accuracies[stage][kind] = accuracy(margins_of_kind)
            curves[f"{stage}, {kind}"] = calibration(margins_of_kind)
        accuracies[stage]["all"] = accuracy(margins)
        logger.info("held-out comparisons that the %s gets right:", name)
        for kind, share in accuracies[stage].items():
            logger.info("  %s: %.1f%%", kind, 100 * share)
    curves["calibrated"] = ([0.5, 1], [0.5, 1])
    plot_metrics(
        run.work_dir / "plots" / "calibration.png",
        {"share that it gets right": curves},
        xlabel="σ(|difference|): how sure the model is",
    )
    pipeline.write_json(run.work_dir / "accuracy.json", accuracies)


@torch.no_grad()
def score_margins(
    model: RewardModel,
    rows: list[dict],
    tokenizer: BPETokenizer,
    block_size: int,
    batch_size: int = 64,
) -> Tensor:
    """The score of the chosen completion less that of each rejected one, row by row, (N,)."""
    data = Comparisons(rows, tokenizer, block_size)
    margins = []
    for first in range(0, len(data), batch_size):
        batch = Comparisons.collate(data.items[first : first + batch_size])
        batch = tuple(x.to(model.head.weight.device) for x in batch)
        chosen, rejected = comparison_scores(model, batch)  # (B, 1) and (B, K-1)
        margins.append((chosen - rejected).flatten().cpu())
    return torch.cat(margins)


def accuracy(margins: Tensor) -> float:
    """The share of comparisons in which the chosen completion has the higher score."""
    return (margins > 0).float().mean().item()


def calibration(margins: Tensor, n_bins: int = 10) -> tuple[list[float], list[float]]:
    """(how sure, how often right), in bins with equal numbers of comparisons.

    Under Bradley-Terry the chosen completion is the better one with probability σ(margin). So a
    model that is calibrated is as often right as it is sure.
    """
    by_size = margins[margins.abs().argsort()]
    bins = by_size.tensor_split(min(n_bins, len(margins)))
    sure = [margins_of_bin.abs().sigmoid().mean().item() for margins_of_bin in bins]
    right = [accuracy(margins_of_bin) for margins_of_bin in bins]
    return sure, right


if __name__ == "__main__":
    run_script(lambda args: main(pipeline.prepare(args, __doc__)))
