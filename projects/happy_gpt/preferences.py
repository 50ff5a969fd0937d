"""
Learning from comparisons: a reward model from what people said, and the pairs that DPO learns from.

Some 20 people rated each text from -4 to 4. Of two texts from the same source whose mean ratings lie more than MARGIN apart, people
prefer the happier one, and from such comparisons a RewardModel learns to give a number (Ziegler et al. 2019, Stiennon et al. 2020).
People do not all agree: each of the 20 of one text against each of the 20 of the other is a comparison of its own, and the loss is the
mean over them all.

The reward model reads byte pairs, not letters: ten thousand ratings do not teach spelling. So it has a trunk of its own, pre-trained on
whole texts.
"""

import hashlib
import json
import logging
import math

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from mingpt.bpe import BPETokenizer
from mingpt.checkpoint import write_text
from mingpt.datasets import pad_and_mask
from mingpt.model import GPT
from mingpt.rlhf import RewardModel, TextReward
from mingpt.trainer import Trainer
from mingpt.utils import import_extra, set_seed
from stages import model_config, require, trainer_config

logger = logging.getLogger("mingpt.happy_gpt")
MARGIN = 0.5


def get_default_configs():
    """The options of the trunk's pre-training and of the reward models'; a batch is one group of texts."""
    trunk = Trainer.get_default_config()
    trunk.vocab_size = 1024
    trunk.group_size = 64            # texts in a batch
    trunk.max_iters = 3000
    trunk.batch_size = 1
    trunk.learning_rate = 4e-3
    trunk.lr_schedule = "cosine"
    trunk.warmup_iters = 100
    trunk.eval_every = 500
    reward = Trainer.get_default_config()
    reward.group_size = 64
    reward.epochs = 6
    reward.batch_size = 1
    reward.learning_rate = 5e-4
    reward.lr_schedule = "linear"
    reward.warmup_iters = 50
    reward.eval_every = 100
    return trunk, reward


class Groups(Dataset):
    """Texts in groups of like length, so that little of a batch is padding, and if `apart` is set, of one source each.

    An item is (idx (n, T), attention_mask (n, T)) and, where they are of one source, their `agreement` (n, n); a text is <eot> tokens <eot>.
    """

    def __init__(self, rows, tokenizer, size, apart):
        self.groups = []
        for source in sorted({row["source"] for row in rows}) if apart else [None]:
            mine = sorted((row for row in rows if source in (row["source"], None)), key=lambda row: len(row["text"]))
            for group in (mine[start:start + size] for start in range(0, len(mine), size)):
                texts = [torch.tensor(encode(tokenizer, row["text"])) for row in group]
                self.groups.append((*pad_and_mask(texts), *([agreement(group)] if apart else [])))

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, i):
        return self.groups[i]


def encode(tokenizer, text):
    return [tokenizer.eot_token, *tokenizer.encode(text), tokenizer.eot_token]


def train(section, work_dir, model, groups, loss_fn, weight_fn):
    """Run a Trainer on groups of texts, a group a batch."""
    C = trainer_config(section, work_dir, "vocab_size", "group_size")
    trainer = Trainer(C, model, groups["train"], groups["valid"], loss_fn, lambda items: items[0], weight_fn)
    trainer.run()
    return trainer


# ---------------------------------------------------------------------------------------------------------------------
# what people prefer


def train_trunk(config, work_dir, splits):
    """A language model of whole texts."""
    set_seed(config.system.seed + 3)
    tokenizer = words(config, splits)
    targets = lambda batch: batch[0][:, 1:].masked_fill(~batch[1][:, 1:], -1)
    groups = {name: Groups(splits[name], tokenizer, config.trunk.group_size, apart=False) for name in ("train", "valid")}
    return train(config.trunk, work_dir / "trunk", GPT(reader_config(config, splits, tokenizer)), groups,
                 loss_fn=lambda model, batch: model(batch[0][:, :-1], targets(batch))[1], weight_fn=lambda batch: int(batch[1][:, 1:].sum()))


def train_reward_model(config, work_dir, splits, stage):
    """A reward model from the comparisons within a half of the texts: one half for the stage reward, the other for judge."""
    set_seed(config.system.seed + {"reward": 4, "judge": 5}[stage])
    tokenizer = words(config, splits)
    trunk = GPT(reader_config(config, splits, tokenizer))
    trunk.load_state_dict(require(work_dir, "trunk")["model"])
    rows = {name: [row for row in splits[name] if half(row["text"]) == stage and row["rating"] is not None] for name in ("train", "valid")}
    if not all(rows.values()):
        raise ValueError("a reward model needs texts with ratings: give some, or leave --rl.reward=vader")
    groups = {name: Groups(part, tokenizer, config.reward.group_size, apart=True) for name, part in rows.items()}
    return train(config.reward, work_dir / stage, RewardModel.from_gpt(trunk), groups, group_loss,
                 weight_fn=lambda batch: int((~batch[2].isnan()).sum()))


def comparisons(rows):
    """(m, 2): all pairs (i, j) of rows where people find i happier than j, by their mean ratings."""
    rating = torch.tensor([float(row["rating"]) for row in rows])
    return (rating[:, None] - rating > MARGIN).nonzero()


def agreement(rows):
    """(n, n): which share of all raters of i against all raters of j find i happier, ties half; NaN where (i, j) is no comparison."""
    raters = [row.get("ratings", [row["rating"]]) for row in rows]
    each = torch.tensor([float(number) for numbers in raters for number in numbers])
    share = torch.block_diag(*(torch.full((1, len(numbers)), 1 / len(numbers)) for numbers in raters))  # whose ratings they are
    higher = (each[:, None] > each).float() + 0.5 * (each[:, None] == each).float()
    i, j = comparisons(rows).unbind(1)
    found = torch.full((len(rows), len(rows)), math.nan)
    found[i, j] = (share @ higher @ share.T)[i, j]
    return found


def group_loss(model, batch):
    """Bradley-Terry on all comparisons of a group in one pass, not one for each (Ouyang et al. 2022, section 3.5): (loss, metrics)."""
    idx, attention_mask, share = batch
    scores, compared = model(idx, attention_mask), ~share.isnan()
    margin, share = (scores[:, None] - scores)[compared], share[compared]
    loss = -(share * F.logsigmoid(margin) + (1 - share) * F.logsigmoid(-margin)).mean()
    return loss, {"accuracy": (margin > 0).float().mean()}


def half(text):
    """The reward model or the judge: who learns from this text, by its hash."""
    return ("reward", "judge")[hashlib.sha256(b"half " + text.encode()).digest()[0] % 2]


def words(config, splits):
    """The vocabulary of byte pairs of the training texts."""
    return BPETokenizer.train([row["text"] for row in splits["train"]], config.trunk.vocab_size)


def reader_config(config, splits, tokenizer):
    """The policy's size, at a block_size that holds every text and every tweet, with dropout: the few ratings are read several times."""
    longest = max(len(encode(tokenizer, row["text"])) for rows in splits.values() for row in rows)
    longest = max(longest, 4 * config.model.block_size + 2)  # a character has up to four bytes
    return model_config(config, tokenizer, block_size=longest, embd_pdrop=0.1, resid_pdrop=0.1, attn_pdrop=0.1)


def load_rewards(config, work_dir, splits, tweets, tokenizer):
    """{stage: its reward model as a reward_fn}, for reward and judge, of mean 0 and variance 1 on these tweets of the sft model."""
    reader = words(config, splits)
    size = reader_config(config, splits, reader)

    def load(stage):
        model = RewardModel(size)
        model.load_state_dict(require(work_dir, stage)["model"])
        model.to(tweets.idx.device)
        model.normalize(torch.tensor(judge(model, reader, tweets.texts)), unit_variance=True)
        if not (work_dir / stage / "accuracy.json").exists():
            report_accuracy(work_dir / stage, splits, lambda texts: judge(model, reader, texts))
        return TextReward(lambda completions, prompts: judge(model, reader, completions), tokenizer)

    return {stage: load(stage) for stage in ("reward", "judge")}


def report_accuracy(folder, splits, score):
    """Which share of the held-out comparisons a reward model gets right, and which VADER, into accuracy.json."""
    rows = [row for name in ("valid", "test") for row in splits[name] if row["rating"] is not None]
    texts = [row["text"] for row in rows]
    found = {folder.name: accuracies(score(texts), rows), "vader": accuracies(vader()(texts, texts), rows)}
    for name, accuracy in found.items():
        logger.info("comparisons that %s gets right: %s", name, ", ".join(f"{source} {share:.3f}" for source, share in accuracy.items()))
    write_text(folder / "accuracy.json", json.dumps(found, indent=2) + "\n")


@torch.no_grad()
def judge(model, tokenizer, texts):
    """What a reward model says of each of the texts."""
    model.eval()
    device, scores = model.head.weight.device, []
    for start in range(0, len(texts), 128):
        idx, attention_mask = pad_and_mask([torch.tensor(encode(tokenizer, text)) for text in texts[start:start + 128]])
        scores += model(idx.to(device), attention_mask.to(device)).tolist()
    return scores


def vader():
    """f(completions, prompts) -> list of compound scores in [-1, 1], by a lexicon and rules (Hutto & Gilbert 2014)."""
    analyzer = import_extra("vaderSentiment.vaderSentiment", "projects").SentimentIntensityAnalyzer()
    return lambda completions, prompts: [analyzer.polarity_scores(text)["compound"] for text in completions]


def accuracies(scores, rows):
    """{source: share of its comparisons that the scores get right}, ties counted half, and the same for all but the tweets."""
    right, total = {}, {}
    for source in sorted({row["source"] for row in rows}):
        mine = [i for i, row in enumerate(rows) if row["source"] == source]
        chosen, rejected = torch.tensor(scores)[mine][comparisons([rows[i] for i in mine])].unbind(1)
        right[source] = ((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum()).item()
        total[source] = len(chosen)
    others = [source for source in right if source != "tweets"]
    return {source: right[source] / total[source] for source in right if total[source]} | {
        "all but tweets": sum(right[source] for source in others) / max(1, sum(total[source] for source in others))}


# ---------------------------------------------------------------------------------------------------------------------
# what DPO learns from


def pairs(tweets):
    """The model's own tweets two by two, the one of more reward first; ties are left out.

    A dataset of (idx, attention_mask, completion_mask), (2, T) each, as `DPOLoss` takes them.
    """
    rewards = tweets.rewards.view(-1, 2)
    order = rewards.argsort(1, descending=True) + torch.arange(0, len(tweets.rewards), 2)[:, None]
    order = order[rewards[:, 0] != rewards[:, 1]]
    logger.info("%d pairs of tweets, %d of them of unlike reward", len(rewards), len(order))
    idx, written = tweets.idx.cpu()[order], tweets.mask.cpu()[order]
    start = torch.ones_like(idx[..., :1], dtype=torch.bool)
    return TensorDataset(idx, torch.cat([start, written], dim=-1), torch.cat([~start, written], dim=-1))
