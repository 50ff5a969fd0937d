"""
Stage 2, the reward model: from pairs of summaries of one text, the better one known, a GPT's trunk learns to give a number.

    python projects/summarize_rlhf/reward.py                after sft.py, with the same options

For TL;DR people made the comparisons. For docstrings the author's line counts as the better one: against what the sft model
wrote for the same text, and against another text's line. Two models learn from disjoint parts of the training texts: the reward
model, which PPO climbs, and the judge, which it never sees.
"""

import functools
import json
import logging
from pathlib import Path

import torch

import pipeline
from mingpt.checkpoint import run_script, write_text
from mingpt.datasets import Comparisons, read_jsonl
from mingpt.rlhf import RewardModel, comparison_loss, comparison_scores
from mingpt.trainer import Trainer
from mingpt.plots import plot_metrics
from mingpt.utils import set_seed

logger = logging.getLogger("mingpt.summarize_rlhf")
SAMPLES = 2  # of the sft model for each text, for the comparisons
KINDS = ["author against a sample"] * SAMPLES + ["author against another's"]
NORMALIZED_ON = 500  # summaries by the sft model, whose scores a reward model gives mean 0 and variance 1


def run(config, corpus):
    """Comparisons, both models, and how good they are."""
    rows = corpus.comparisons or from_sft_model(config, corpus)
    for stage in ("reward", "judge"):
        pipeline.run_stage(config, stage, lambda: reward(config, corpus, rows, stage))
    report(config, corpus, rows)


def from_sft_model(config, corpus):
    """{split: comparisons} of the authors' lines with SAMPLES by the sft model and with another text's line; kept in comparisons.jsonl."""
    path = Path(config.system.work_dir) / "comparisons.jsonl"
    if not path.exists():
        model, tokenizer, found = pipeline.load_model(config, corpus.tokenizer, "sft"), corpus.tokenizer, []
        length = lambda text: len(tokenizer.encode(text))
        for number, (split, rows) in enumerate(corpus.rows.items()):
            rows = [row for row in rows if split != "train" or row["part"] != "sft"]
            prompts, seed = [row["prompt"] for row in rows], config.system.seed + 100 * number
            samples = [pipeline.summarize(config, model, tokenizer, prompts, seed + k) for k in range(SAMPLES)]
            others = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
            for i, (row, other) in enumerate(zip(rows, others)):
                rejected = [*(" " + sample.texts[i] for sample in samples), rows[other]["completion"]]
                # junk, decoded and encoded again, may have become longer
                if length(row["prompt"]) + max(map(length, rejected)) < config.model.block_size:
                    found.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected,
                                  "ended": [True, *(sample.ended[i].item() for sample in samples), True],
                                  "kinds": KINDS, "part": row["part"], "split": split})
        write_text(path, "".join(json.dumps(row) + "\n" for row in found))
    rows = read_jsonl(path, "prompt", "chosen", "part", "split")
    return {split: [row for row in rows if row["split"] == split] for split in corpus.rows}


def reward(config, corpus, rows, stage):
    """A reward model from the comparisons of its part of the training texts; it starts from the sft model."""
    set_seed(config.system.seed + {"reward": 2, "judge": 3}[stage])
    model = RewardModel.from_gpt(pipeline.load_model(config, corpus.tokenizer, "sft"))
    parts = {"train": [row for row in rows["train"] if row["part"] == stage], "valid": rows["valid"]}
    data = {split: Comparisons(part, corpus.tokenizer, config.model.block_size) for split, part in parts.items()}
    return Trainer(pipeline.trainer_config(config, stage), model, data["train"], data["valid"],
                   functools.partial(comparison_loss, centering=config.comparisons.centering), Comparisons.collate)


def load(config, corpus):
    """{stage: its model} of reward and judge, whose scores of the sft model's summaries have mean 0 and variance 1."""
    prompts = [row["prompt"] for row in pipeline.some(config, corpus.rows["valid"], NORMALIZED_ON)]
    models = {stage: pipeline.load_model(config, corpus.tokenizer, stage) for stage in ("sft", "reward", "judge")}
    written = pipeline.summarize(config, models.pop("sft"), corpus.tokenizer, prompts, config.system.seed + 20)
    for model in models.values():
        model.normalize(pipeline.judged(model, written).to(model.head.weight.device), unit_variance=True)
    return models


# ---------------------------------------------------------------------------------------------------------------------
# how good they are


def report(config, corpus, rows):
    """Accuracy on held-out comparisons by kind, into accuracy.json; and a plot of how sure a model is against how often it is right."""
    work_dir, found, curves = Path(config.system.work_dir), {}, {}
    if (work_dir / "accuracy.json").exists():
        return
    kinds = [kind for row in rows["test"] for kind in row["kinds"]]
    for stage in ("reward", "judge"):
        margins = margin(pipeline.load_model(config, corpus.tokenizer, stage), rows["test"], corpus.tokenizer, config.model.block_size)
        of = {kind: margins[[kind == k for k in kinds]] for kind in sorted(set(kinds))}
        found[stage] = {kind: (part > 0).float().mean().item() for kind, part in of.items()} | {"all": (margins > 0).float().mean().item()}
        curves |= {f"{stage}, {kind}": calibration(part) for kind, part in of.items()}
        logger.info("held-out comparisons that the %s gets right: %s", {"reward": "reward model"}.get(stage, stage),
                    ", ".join(f"{kind} {share:.1%}" for kind, share in found[stage].items()))
    plot_metrics(work_dir / "plots" / "calibration.png", {"share that it gets right": curves | {"calibrated": ([0.5, 1], [0.5, 1])}},
                 xlabel="σ(|difference|): how sure the model is")
    pipeline.write_json(work_dir / "accuracy.json", found)


@torch.no_grad()
def margin(model, rows, tokenizer, block_size, batch_size=64):
    """The score of the chosen less that of each rejected completion, row by row, (N,)."""
    data, parts, device = Comparisons(rows, tokenizer, block_size), [], model.head.weight.device
    for i in range(0, len(data), batch_size):
        chosen, rejected = comparison_scores(model, [x.to(device) for x in Comparisons.collate(data.items[i:i + batch_size])])
        parts.append((chosen - rejected).flatten().cpu())
    return torch.cat(parts)


def calibration(margins, bins=10):
    """(how sure, how often right) in bins of as many comparisons each: under Bradley-Terry the two are equal."""
    parts = margins[margins.abs().argsort()].tensor_split(min(bins, len(margins)))
    return [part.abs().sigmoid().mean().item() for part in parts], [(part > 0).float().mean().item() for part in parts]


if __name__ == "__main__":
    run_script(lambda args: run(*pipeline.prepare(args, __doc__)))
