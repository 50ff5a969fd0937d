"""
Learning from comparisons: a reward model from what people said, and the pairs that DPO learns from.

Some 20 people rated each text from -4 to 4. Of two texts from the same source whose mean ratings
lie more than MARGIN apart, people prefer the happier one. From such comparisons a RewardModel
learns to give a number (Ziegler et al. 2019, Stiennon et al. 2020). People do not all agree, so
each rater of one text against each rater of the other is a comparison of its own, and the loss is
the mean over them all.

The reward model reads byte pairs, not characters, because ten thousand ratings do not teach
spelling. So it has a trunk of its own, pre-trained on whole texts.
"""

import functools
import hashlib
import logging
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from mingpt.bpe import BPETokenizer
from mingpt.checkpoint import to_json, write_text
from mingpt.config import CfgNode as CN, documented
from mingpt.datasets import pad_and_mask
from mingpt.evaluation import Samples
from mingpt.model import GPT
from mingpt.rlhf import RewardModel, TextReward
from mingpt.stages import Stages
from mingpt.trainer import Trainer
from mingpt.utils import import_extra, set_seed

logger = logging.getLogger("mingpt.happy_gpt")
MARGIN = 0.5


@documented
def get_trunk_config() -> CN:
    """The options of the trunk's pre-training. An item, of batch_size 1, is a group of texts."""
    C = Trainer.get_default_config()
    C.vocab_size = 1024              # byte pairs
    C.group_size = 64                # texts in a batch
    C.max_iters = 3000
    C.batch_size = 1                 # groups
    C.learning_rate = 4e-3
    C.lr_schedule = "cosine"
    C.warmup_iters = 100
    C.eval_every = 500
    return C


@documented
def get_reward_config() -> CN:
    """The options of the reward models, of the reward and of the judge."""
    C = Trainer.get_default_config()
    C.group_size = 64                # texts in a batch, all of a source compared with each other
    C.epochs = 6
    C.batch_size = 1                 # groups
    C.learning_rate = 5e-4
    C.lr_schedule = "linear"
    C.warmup_iters = 50
    C.eval_every = 100
    return C


# --------------------------------------------------------------------------------------------------
# the stages trunk, reward and judge


def run_stage(stage: str, config: CN, stages: Stages, splits: dict) -> Trainer | None:
    """Run one of the three stages, unless it is finished; its trainer, or None."""
    if stages.finished(stage):
        return None
    if stage == "trunk":
        texts = [row["text"] for row in splits["train"]]
        reader = BPETokenizer.train(texts, config.trunk.vocab_size)
        trainer = functools.partial(trunk_trainer, config, stages, splits, reader)
    else:
        reader = load_reader(stages)
        trainer = functools.partial(reward_trainer, stage, config, stages, splits, reader)
    return stages.run(stage, trainer, tokenizer=reader)


def load_reader(stages: Stages) -> BPETokenizer:
    """The tokenizer of the trunk and the reward models."""
    return BPETokenizer.from_pretrained(stages.model_folder("trunk"))


def trunk_trainer(config: CN, stages: Stages, splits: dict, tokenizer: BPETokenizer) -> Trainer:
    """The Trainer of a language model of whole texts, for the reward models to start from."""
    set_seed(config.system.seed + 3)
    groups = {
        name: Groups(splits[name], tokenizer, config.trunk.group_size, by_source=False)
        for name in ("train", "valid")
    }
    return Trainer(
        stages.trainer_config("trunk"),
        GPT(reader_config(config, splits, tokenizer)),
        groups["train"],
        groups["valid"],
        loss_fn=language_model_loss,
        collate_fn=only_item,
        weight_fn=count_targets,
    )


def reward_trainer(
    stage: str, config: CN, stages: Stages, splits: dict, tokenizer: BPETokenizer
) -> Trainer:
    """The Trainer of a reward model, on the comparisons within one half of the texts.

    stage: reward or judge, each of which has a half of its own.
    """
    set_seed(config.system.seed + {"reward": 4, "judge": 5}[stage])
    trunk = stages.load("trunk", device="cpu")
    groups = {}
    for name in ("train", "valid"):
        rows = [
            row
            for row in splits[name]
            if half(row["text"]) == stage and row["rating"] is not None
        ]
        if not rows:
            raise ValueError(
                "a reward model needs texts with ratings: give some, or leave --rl.reward=vader"
            )
        groups[name] = Groups(rows, tokenizer, config.reward.group_size, by_source=True)
    return Trainer(
        stages.trainer_config(stage),
        RewardModel.from_gpt(trunk),
        groups["train"],
        groups["valid"],
        loss_fn=group_loss,
        collate_fn=only_item,
        weight_fn=count_comparisons,
    )


def reader_config(config: CN, splits: dict, tokenizer: BPETokenizer) -> CN:
    """The options of a model that reads whole texts: of the policy's size, with dropout.

    Its block_size holds every text and every tweet. Dropout, because the few ratings are read
    several times.
    """
    longest = max(
        len(encode(tokenizer, row["text"])) for rows in splits.values() for row in rows
    )
    longest_tweet = 4 * config.model.block_size + 2  # a character has up to four bytes
    options = config.model.to_dict()
    options |= {"vocab_size": tokenizer.vocab_size, "block_size": max(longest, longest_tweet)}
    options |= {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    return CN(**options)


def encode(tokenizer: BPETokenizer, text: str) -> list[int]:
    """The ids of <eot> text <eot>."""
    return [tokenizer.eot_token, *tokenizer.encode(text), tokenizer.eot_token]


# --------------------------------------------------------------------------------------------------
# batches and losses


class Groups(Dataset):
    """Texts in groups of like length, so that little of a batch is padding.

    An item is (idx (n, T), attention_mask (n, T)). With by_source a group's texts are of one
    source, and the item also has their `agreement` (n, n).
    """

    def __init__(self, rows: list[dict], tokenizer: BPETokenizer, size: int, by_source: bool):
        self.groups: list[tuple[Tensor, ...]] = []
        for row_set in split_by_source(rows) if by_source else [rows]:
            by_length = sorted(row_set, key=lambda row: len(row["text"]))
            for start in range(0, len(by_length), size):
                group = by_length[start : start + size]
                texts = [torch.tensor(encode(tokenizer, row["text"])) for row in group]
                idx, attention_mask = pad_and_mask(texts)
                if by_source:
                    self.groups.append((idx, attention_mask, agreement(group)))
                else:
                    self.groups.append((idx, attention_mask))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return self.groups[i]


def split_by_source(rows: list[dict]) -> list[list[dict]]:
    """The rows of each source, sources in alphabetical order."""
    sources = sorted({row["source"] for row in rows})
    return [[row for row in rows if row["source"] == source] for source in sources]


def only_item(items: list[tuple]) -> tuple:
    """Collate a batch of one item, which is a batch already."""
    return items[0]


def language_model_loss(model: GPT, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross-entropy over all tokens of a group of texts, in nats."""
    idx, attention_mask = batch
    targets = idx[:, 1:].masked_fill(~attention_mask[:, 1:], -1)
    return model(idx[:, :-1], targets)[1]


def count_targets(batch: tuple[Tensor, Tensor]) -> int:
    """How many tokens `language_model_loss` is a mean over."""
    return int(batch[1][:, 1:].sum())


def comparisons(rows: list[dict]) -> Tensor:
    """(m, 2): all pairs (i, j) of rows where people find i happier than j, by mean ratings."""
    rating = torch.tensor([float(row["rating"]) for row in rows])
    return (rating[:, None] - rating > MARGIN).nonzero()


def agreement(rows: list[dict]) -> Tensor:
    """(n, n): the share of all pairs (rater of i, rater of j) that find i happier, ties half.

    NaN where (i, j) is no comparison.
    """
    raters = [row.get("ratings", [row["rating"]]) for row in rows]
    ratings = torch.tensor([float(rating) for of_text in raters for rating in of_text])  # (R,)
    higher = (ratings[:, None] > ratings).float() + 0.5 * (ratings[:, None] == ratings).float()
    # mean_over_raters (n, R): row i averages over the raters of text i
    means = [torch.full((1, len(of_text)), 1 / len(of_text)) for of_text in raters]
    mean_over_raters = torch.block_diag(*means)
    shares = mean_over_raters @ higher @ mean_over_raters.T
    i, j = comparisons(rows).unbind(1)
    labels = torch.full((len(rows), len(rows)), math.nan)
    labels[i, j] = shares[i, j]
    return labels


def group_loss(model: RewardModel, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict]:
    """Bradley-Terry on all comparisons of a group: (loss, metrics).

    The group is read once, not once for each comparison (Ouyang et al. 2022, section 3.5).
    """
    idx, attention_mask, labels = batch
    scores = model(idx, attention_mask)  # (n,)
    compared = ~labels.isnan()
    margin = (scores[:, None] - scores)[compared]
    share = labels[compared]  # how many raters prefer the first
    loss = -(share * F.logsigmoid(margin) + (1 - share) * F.logsigmoid(-margin)).mean()
    return loss, {"accuracy": (margin > 0).float().mean()}


def count_comparisons(batch: tuple[Tensor, Tensor, Tensor]) -> int:
    """How many comparisons `group_loss` is a mean over."""
    return int((~batch[2].isnan()).sum())


def half(text: str) -> str:
    """Who learns from this text, the reward model or the judge, by its hash."""
    digest = hashlib.sha256(b"half " + text.encode()).digest()
    return ("reward", "judge")[digest[0] % 2]


# --------------------------------------------------------------------------------------------------
# rewards of tweets


def load_rewards(
    config: CN, stages: Stages, splits: dict, tweets: Samples, tokenizer
) -> dict[str, TextReward]:
    """{stage: its reward model as a reward_fn}, for reward and judge.

    tweets: samples of the sft model, on which the rewards get mean 0 and variance 1.
    """
    reader = load_reader(stages)
    reward_fns = {}
    for stage in ("reward", "judge"):
        model = stages.load(stage, RewardModel, device=str(tweets.idx.device))
        scores = torch.tensor(judge(model, reader, tweets.texts))
        model.normalize(scores, unit_variance=True)
        report_accuracy(config, stages, splits, stage, functools.partial(judge, model, reader))
        reward_fns[stage] = TextReward(judge_completions(model, reader), tokenizer)
    return reward_fns


def judge_completions(model: RewardModel, reader: BPETokenizer):
    """A TextReward's function of a reward model."""

    def rewards(completions, prompts):
        return judge(model, reader, completions)

    return rewards


@torch.no_grad()
def judge(model: RewardModel, reader: BPETokenizer, texts: list[str]) -> list[float]:
    """The reward model's score of each text."""
    model.eval()
    scores: list[float] = []
    for start in range(0, len(texts), 128):
        rows = [torch.tensor(encode(reader, text)) for text in texts[start : start + 128]]
        idx, attention_mask = pad_and_mask(rows)
        device = model.head.weight.device
        scores += model(idx.to(device), attention_mask.to(device)).tolist()
    return scores


def vader():
    """A TextReward's function: compound scores in [-1, 1], by a lexicon and rules.

    (Hutto & Gilbert 2014.)
    """
    analyzer = vader_analyzer()

    def compound(completions, prompts):
        return [analyzer.polarity_scores(text)["compound"] for text in completions]

    return compound


def vader_analyzer():
    """VADER itself: its lexicon, and its scores of a text."""
    module = import_extra("vaderSentiment.vaderSentiment", "projects")
    return module.SentimentIntensityAnalyzer()


# --------------------------------------------------------------------------------------------------
# how good a reward model is


def report_accuracy(config: CN, stages: Stages, splits: dict, stage: str, score) -> None:
    """Write accuracy.json: the share of held-out comparisons that a model and VADER get right."""
    path = Path(config.system.work_dir) / stage / "accuracy.json"
    if path.exists() or (stages.stage_folder(stage) / "accuracy.json").exists():
        return
    rows = [
        row for name in ("valid", "test") for row in splits[name] if row["rating"] is not None
    ]
    texts = [row["text"] for row in rows]
    scores = {stage: score(texts), "vader": vader()(texts, texts)}
    accuracy = {name: accuracies(values, rows) for name, values in scores.items()}
    for name, by_source in accuracy.items():
        shares = ", ".join(f"{source} {share:.3f}" for source, share in by_source.items())
        logger.info("comparisons that %s gets right: %s", name, shares)
    write_text(path, to_json(accuracy, indent=2) + "\n")


def accuracies(scores: list[float], rows: list[dict]) -> dict[str, float]:
    """{source: share of its comparisons that the scores get right}, ties counted half.

    Also of all sources but the tweets, together.
    """
    right, total = {}, {}
    for source in sorted({row["source"] for row in rows}):
        of_source = [i for i, row in enumerate(rows) if row["source"] == source]
        pairs_of_rows = comparisons([rows[i] for i in of_source])
        chosen, rejected = torch.tensor(scores)[of_source][pairs_of_rows].unbind(1)
        ties = chosen == rejected
        right[source] = ((chosen > rejected).sum() + 0.5 * ties.sum()).item()
        total[source] = len(chosen)
    shares = {source: right[source] / total[source] for source in right if total[source]}
    others = [source for source in right if source != "tweets"]
    right_of_others = sum(right[source] for source in others)
    total_of_others = sum(total[source] for source in others)
    return shares | {"all but tweets": right_of_others / max(1, total_of_others)}


# --------------------------------------------------------------------------------------------------
# what DPO learns from


def pairs(tweets: Samples) -> TensorDataset:
    """The model's own tweets two by two, the one of more reward first; ties are left out.

    Items are (idx, attention_mask, completion_mask), (2, T) each, as `DPOLoss` takes them.
    """
    rewards = tweets.rewards.view(-1, 2)
    first_of_pair = torch.arange(0, len(tweets.rewards), 2)
    order = rewards.argsort(1, descending=True) + first_of_pair[:, None]
    differ = rewards[:, 0] != rewards[:, 1]
    logger.info("%d pairs of tweets, %d of them of unlike reward", len(rewards), differ.sum())
    order = order[differ]
    tensors = (tweets.idx, tweets.attention_mask, tweets.completion_mask)
    return TensorDataset(*(x.cpu()[order] for x in tensors))
