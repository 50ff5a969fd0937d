"""
HappyGPT: a character-level GPT of 0.8M parameters learns to write, then to write happy tweets.

  1. pretrain  on tweets and snippets of reviews and news: what English looks like
  2. sft       supervised fine-tuning on the texts that people rated positive
  3. rl        PPO: an episode is a tweet, its reward how happy VADER finds it, minus a penalty for leaving the sft model

    python projects/happy_gpt/happy_gpt.py                       all of it, into out/happy_gpt
    python projects/happy_gpt/happy_gpt.py --prompt="I think"    let the result go on from there
    python projects/happy_gpt/happy_gpt.py --rl.algorithm=reinforce --system.work_dir=out/reinforce     any option below

A run that was interrupted goes on where it stopped; stages that are finished are skipped.
"""

import copy
import json
import logging
import time
from pathlib import Path

import torch

import data
import report
from mingpt import distributed
from mingpt.chars import CharTokenizer
from mingpt.checkpoint import run_script, write_text
from mingpt.model import GPT
from mingpt.rlhf import PPOTrainer, TextReward
from mingpt.run_folder import RunFolder
from mingpt.trainer import FREE_TO_CHANGE, Trainer
from mingpt.utils import CfgNode as CN
from mingpt.utils import import_extra, log_to_console, parse_args, pick_device, set_seed

logger = logging.getLogger("mingpt.happy_gpt")
STAGES = ("pretrain", "sft", "rl")


def get_config():
    C = CN()
    C.stages = ",".join(STAGES)
    C.prompt = ""                    # text to continue with the finished model, instead of training

    C.system = CN()
    C.system.seed = 3407
    C.system.work_dir = "out/happy_gpt"

    C.data = CN()
    C.data.path = None               # texts of your own: JSONL with text and an optional rating; None: the ICWSM-2014 corpora
    C.data.positive = 0.8            # a text with a mean rating above this is positive
    C.data.min_count = 5             # rarer characters become U+FFFD

    C.model = GPT.get_default_config()
    C.model.model_type = "gpt-micro"
    C.model.block_size = 64
    C.model.embd_pdrop = C.model.resid_pdrop = C.model.attn_pdrop = 0.0  # four passes over the data do not overfit

    C.pretrain = Trainer.get_default_config()
    C.pretrain.max_iters = 3000
    C.pretrain.batch_size = 32
    C.pretrain.learning_rate = 4e-3
    C.pretrain.lr_schedule = "cosine"
    C.pretrain.warmup_iters = 100
    C.pretrain.eval_every = 500

    C.sft = copy.deepcopy(C.pretrain)
    C.sft.max_iters = 400
    C.sft.learning_rate = 1e-3
    C.sft.warmup_iters = 20
    C.sft.eval_every = 100

    C.rl = PPOTrainer.get_default_config()
    C.rl.max_iters = 200
    C.rl.batch_size = 128
    C.rl.ppo_epochs = 2
    C.rl.max_new_tokens = 64
    C.rl.learning_rate = 2.5e-4
    C.rl.lr_schedule = "linear"
    C.rl.value_lr_ratio = 5.0
    C.rl.gae_lambda = 1.0            # 0.95 trusts a young value function, and the tweets shrink (see readme.md)
    C.rl.kl_coef = 0.15              # begins high and falls until the KL is on target: the path hugs the frontier
    C.rl.kl_target = 7.5
    C.rl.kl_horizon = 1200

    for stage in (C.pretrain, C.sft, C.rl):
        del stage.work_dir           # these two are not for the user to choose:
    del C.model.vocab_size           # folders are named after the stages, the vocabulary follows from the texts

    C.report = CN()
    C.report.samples = 512           # fresh tweets of each stage, from the same seeds
    C.report.frontier_samples = 4096  # tweets of the sft model, for the best reward that a KL can buy
    C.report.every = 20              # iterations of rl between a few sample tweets
    return C


def main(args):
    config = get_config()
    parse_args(config, args, __doc__)
    stages = check_stages(config.stages)
    work_dir = Path(config.system.work_dir)
    log_to_console()
    if config.prompt:
        return print_continuations(config, work_dir)
    for extra in ("matplotlib", "vaderSentiment"):
        import_extra(extra, "projects")  # before the work, not after it

    start = time.time()
    splits, tokenizer = load_data(config)
    claim(work_dir, config, tokenizer)
    reward = TextReward(vader(), tokenizer)
    for stage in STAGES:
        if state := finished(work_dir, stage):
            start -= state["seconds"]  # what it took when it ran
        elif stage in stages:
            trainer = {"pretrain": pretrain, "sft": sft, "rl": rl}[stage](config, work_dir, splits, tokenizer, reward)
            start -= trainer.resumed_seconds  # the part before it was interrupted
    if distributed.rank() > 0:
        return
    models = {stage: load_model(config, tokenizer, state) for stage in STAGES if (state := finished(work_dir, stage))}
    report.write(config, work_dir, models, splits, tokenizer, reward, start)


# ---------------------------------------------------------------------------------------------------------------------
# the three stages: each starts from the weights of the one before, and resumes by itself


def pretrain(config, work_dir, splits, tokenizer, reward):
    """A language model of all the texts, in windows of block_size characters."""
    set_seed(config.system.seed)
    model = GPT(model_config(config, tokenizer))
    return train(config.pretrain, work_dir / "pretrain", model, splits, lambda row: True, tokenizer)


def sft(config, work_dir, splits, tokenizer, reward):
    """The same objective, on the positive texts alone."""
    set_seed(config.system.seed + 1)
    model = start_from(config, work_dir, "pretrain", tokenizer)
    return train(config.sft, work_dir / "sft", model, splits, is_positive(config, splits), tokenizer)


def train(trainer_config, work_dir, model, splits, keep, tokenizer):
    trainer_config.work_dir = str(work_dir)
    size = model.config.block_size
    texts = {name: [row["text"] for row in rows if keep(row)] for name, rows in splits.items()}
    trainer = Trainer(trainer_config, model, data.Windows(texts["train"], tokenizer, size),
                      data.Windows(texts["valid"], tokenizer, size, consecutive=True))
    trainer.run()
    return trainer


def rl(config, work_dir, splits, tokenizer, reward):
    """PPO from the sft model, held near to it by the KL penalty. Every episode starts from the end-of-text token."""
    set_seed(config.system.seed + 2)
    config.rl.work_dir = str(work_dir / "rl")
    policy = start_from(config, work_dir, "sft", tokenizer)
    trainer = PPOTrainer(config.rl, policy, reward, prompts=[[tokenizer.eot_token]], tokenizer=tokenizer)

    def save_samples(trainer):
        if (trainer.iter_num + 1) % config.report.every == 0 and trainer.rank == 0:
            tweets = report.sample(policy, tokenizer, None, n=10, seed=config.system.seed)
            write_text(work_dir / "samples" / f"rl_{trainer.iter_num + 1:04}.txt", "\n".join(tweets.texts) + "\n")

    trainer.add_callback("on_batch_end", save_samples)
    trainer.run()
    return trainer


# ---------------------------------------------------------------------------------------------------------------------
# their parts


def vader():
    """f(completions, prompts) -> list of compound scores in [-1, 1] (Hutto & Gilbert 2014)."""
    analyzer = import_extra("vaderSentiment.vaderSentiment", "projects").SentimentIntensityAnalyzer()
    return lambda completions, prompts: [analyzer.polarity_scores(text)["compound"] for text in completions]


def load_data(config):
    """The splits and the tokenizer of their characters."""
    rows = data.load_jsonl(config.data.path) if config.data.path else data.load_icwsm(data.fetch())
    splits = data.split(rows)
    sizes = {name: len(part) for name, part in splits.items()}
    if not all(sizes.values()):
        raise ValueError(f"{len(rows)} texts are too few to split into train, valid and test ({sizes}): a few hundred will do")
    logger.info("%d texts: %s", len(rows), ", ".join(f"{n} {name}" for name, n in sizes.items()))
    return splits, CharTokenizer.train([row["text"] for row in splits["train"]], config.data.min_count)


def is_positive(config, splits):
    """Which texts the sft stage learns from; where no text is rated, all of them."""
    if all(row["rating"] is None for rows in splits.values() for row in rows):
        return lambda row: True
    keep = lambda row: row["rating"] is not None and row["rating"] > config.data.positive
    if not (any(map(keep, splits["train"])) and any(map(keep, splits["valid"]))):
        raise ValueError(f"no texts are rated above --data.positive={config.data.positive}: lower it")
    return keep


def model_config(config, tokenizer):
    config = copy.deepcopy(config.model)
    config.vocab_size = tokenizer.vocab_size
    return config


def checkpoint(work_dir, stage):
    return work_dir / stage / "checkpoint.pt"


def finished(work_dir, stage):
    """The state that a stage's trainer ended with, or None where it has not."""
    path = checkpoint(work_dir, stage)
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {"finished": False}
    return state if state["finished"] else None


def start_from(config, work_dir, stage, tokenizer):
    """The model that a stage ended with; ValueError if it is not finished."""
    state = finished(work_dir, stage)
    if state is None:
        raise ValueError(f"the stage {stage} is not finished in {work_dir}: run it first, with --stages={stage}")
    return load_model(config, tokenizer, state)


def load_model(config, tokenizer, state):
    """The model of a trainer's state, on the device it trains on."""
    model = GPT(model_config(config, tokenizer))
    # the state of rl holds the value model beside the policy
    model.load_state_dict({name.removeprefix("policy."): weight for name, weight in state["model"].items()
                           if not name.startswith("value_model.")})
    return model.to(distributed.join(pick_device(config.rl.device))).eval()


def check_stages(stages):
    stages = stages.split(",")
    if unknown := set(stages) - set(STAGES):
        raise ValueError(f"--stages={','.join(stages)}: {', '.join(sorted(unknown))} is none of {','.join(STAGES)}")
    return [stage for stage in STAGES if stage in stages]


def claim(work_dir, config, tokenizer):
    """Keep options and vocabulary in work_dir; ValueError where it holds a run with others."""
    options = dict(config.leaves()) | {"vocabulary": "".join(tokenizer.chars)}
    free = {"stages", "prompt", "system.work_dir", *(name for name in options if name.startswith("report.")),
            *(f"{stage}.{name}" for stage in STAGES for name in FREE_TO_CHANGE)}
    RunFolder(work_dir).claim(options, free)
    if distributed.rank() == 0:
        tokenizer.save_pretrained(work_dir)


def print_continuations(config, work_dir):
    """Ten ways to go on from --prompt, by the furthest stage that is finished."""
    if not (work_dir / "config.json").exists():
        raise ValueError(f"there is no model in {work_dir} yet: run this script without --prompt first")
    for name, value in json.loads((work_dir / "config.json").read_text(encoding="utf-8")).items():
        if name.startswith("model."):
            setattr(config.model, name.removeprefix("model."), value)  # the model is what it was trained as
    tokenizer = CharTokenizer.from_pretrained(work_dir)
    stage = next((s for s in reversed(STAGES) if finished(work_dir, s)), STAGES[0])
    model = start_from(config, work_dir, stage, tokenizer)
    if strange := sorted(set(config.prompt) - tokenizer.ids.keys()):
        raise ValueError(f"--prompt has characters that the model has never seen: {' '.join(strange)}")
    if len(config.prompt) >= config.model.block_size:
        raise ValueError(f"--prompt has {len(config.prompt)} characters, which leaves no room in {config.model.block_size}")
    for text in report.sample(model, tokenizer, None, n=10, seed=config.system.seed, prompt=config.prompt).texts:
        print(text)


if __name__ == "__main__":
    run_script(main)
