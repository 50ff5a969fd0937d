"""
HappyGPT: a character-level GPT of 0.8M parameters learns to write, then to write happy tweets.

  1. pretrain  on tweets and snippets of reviews and news: what English looks like
  2. sft       supervised fine-tuning on the texts that people rated positive
  3. rl        PPO: an episode is a tweet, its reward how happy VADER finds it, minus a penalty for leaving the sft model

    python projects/happy_gpt/happy_gpt.py                       all of it, into out/happy_gpt
    python projects/happy_gpt/happy_gpt.py --prompt="I think"    let the result go on from there
    python projects/happy_gpt/happy_gpt.py --rl.algorithm=grpo --system.work_dir=out/grpo       any option below

--rl.algorithm is ppo, reinforce, rloo, grpo, dpo (on pairs of the sft model's tweets) or best_of_n (of group_size, without training).
With --rl.reward=human a reward model learns before rl what people find happy, and takes VADER's place (preferences.py).
A run that was interrupted goes on where it stopped; stages that are finished are skipped.
"""

import copy
import json
import logging
import time
from pathlib import Path

import data
import preferences
import report
from mingpt import distributed
from mingpt.chars import CharTokenizer
from mingpt.checkpoint import run_script, write_text
from mingpt.model import GPT
from mingpt.rlhf import ActorCritic, DPOLoss, PPOTrainer, TextReward
from mingpt.run_folder import RunFolder, finished
from mingpt.trainer import FREE_TO_CHANGE, Trainer
from mingpt.config import CfgNode as CN, check_numbers, parse_args
from mingpt.utils import import_extra, log_to_console, set_seed
from stages import load_model, model_config, start_from, trainer_config

logger = logging.getLogger("mingpt.happy_gpt")
STAGES = ("pretrain", "sft", "trunk", "reward", "judge", "rl")  # the middle three with --rl.reward=human
NORMALIZED_ON = 512  # tweets of the sft model, on which learned rewards have mean 0 and variance 1
ALGORITHMS = ("ppo", "reinforce", "rloo", "grpo", "dpo", "best_of_n")


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

    C.trunk, C.reward = preferences.get_default_configs()

    C.rl = PPOTrainer.get_default_config()
    C.rl.reward = "vader"            # or human
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
    C.rl.group_size = 16             # of rloo, grpo and best_of_n

    C.dpo = copy.deepcopy(C.sft)     # in the place of rl's, for --rl.algorithm=dpo
    C.dpo.beta = 0.1
    C.dpo.pairs = 12_800             # of the sft model's tweets: as many as rl samples in all
    C.dpo.max_iters = 200
    C.dpo.batch_size = 64            # of the pairs
    C.dpo.lr_schedule = "linear"
    C.dpo.learning_rate = 2.5e-4
    C.dpo.log_every = 1

    for stage in (C.pretrain, C.sft, C.trunk, C.reward, C.rl, C.dpo):
        del stage.work_dir           # these two are not for the user to choose:
    del C.model.vocab_size           # folders are named after the stages, the vocabulary follows from the texts

    C.report = CN()
    C.report.samples = 512           # fresh tweets of each stage, from the same seeds
    C.report.frontier_samples = 4096  # tweets of the sft model, for the best reward that a KL can buy
    C.report.every = 20              # iterations of rl between looks at fresh tweets,
    C.report.looked_at = 256         # so many of them
    return C


def main(args):
    config = get_config()
    parse_args(config, args, __doc__)
    stages = check_choices(config)
    work_dir = Path(config.system.work_dir)
    log_to_console()
    if config.prompt:
        return print_continuations(config, work_dir)
    for extra in ("matplotlib", "vaderSentiment"):
        import_extra(extra, "projects")  # before the work, not after it

    start = time.time()
    splits, tokenizer = load_data(config)
    claim(work_dir, config, tokenizer)
    for stage, run_stage in zip(STAGES, (pretrain, sft, trunk, reward, judge, rl), strict=True):
        if state := finished(work_dir / stage):
            start -= state["seconds"]  # what it took when it ran
        elif stage in stages:
            trainer = run_stage(config, work_dir, splits, tokenizer)
            start -= trainer.resumed_seconds  # the part before it was interrupted
    if distributed.rank() > 0:
        return
    models = {stage: load_model(config, tokenizer, state) for stage in ("pretrain", "sft", "rl") if (state := finished(work_dir / stage))}
    if config.rl.reward == "human" and not all(finished(work_dir / stage) for stage in ("sft", "reward", "judge")):
        return logger.info("the report follows when sft, reward and judge are finished")
    happiness, judges = reward_functions(config, work_dir, splits, tokenizer)
    report.write(config, work_dir, models, splits, tokenizer, happiness, judges, start)


# ---------------------------------------------------------------------------------------------------------------------
# the stages: each starts from the weights of the one before, and resumes by itself


def pretrain(config, work_dir, splits, tokenizer):
    """A language model of all the texts, in windows of block_size characters."""
    set_seed(config.system.seed)
    model = GPT(model_config(config, tokenizer))
    return train(config.pretrain, work_dir / "pretrain", model, splits, lambda row: True, tokenizer)


def sft(config, work_dir, splits, tokenizer):
    """The same objective, on the positive texts alone."""
    set_seed(config.system.seed + 1)
    model = start_from(config, work_dir, "pretrain", tokenizer)
    return train(config.sft, work_dir / "sft", model, splits, is_positive(config, splits), tokenizer)


def train(section, work_dir, model, splits, keep, tokenizer):
    size = model.config.block_size
    texts = {name: [row["text"] for row in rows if keep(row)] for name, rows in splits.items()}
    trainer = Trainer(trainer_config(section, work_dir), model, data.Windows(texts["train"], tokenizer, size),
                      data.Windows(texts["valid"], tokenizer, size, consecutive=True))
    trainer.run()
    return trainer


def trunk(config, work_dir, splits, tokenizer):
    """A language model of whole texts, for the reward models to start from."""
    return preferences.train_trunk(config, work_dir, splits)


def reward(config, work_dir, splits, tokenizer):
    """A reward model from the comparisons within one half of the texts."""
    return preferences.train_reward_model(config, work_dir, splits, "reward")


def judge(config, work_dir, splits, tokenizer):
    """Another one from the other half, which the policy never sees."""
    return preferences.train_reward_model(config, work_dir, splits, "judge")


def rl(config, work_dir, splits, tokenizer):
    """From the sft model, held near to it by the KL penalty. Every episode starts from the end-of-text token."""
    set_seed(config.system.seed + 2)
    policy, reference = (start_from(config, work_dir, "sft", tokenizer) for _ in range(2))
    happiness, judges = reward_functions(config, work_dir, splits, tokenizer)
    if config.rl.algorithm == "dpo":
        C = trainer_config(config.dpo, work_dir / "rl", "beta", "pairs")
        tweets = report.sample(reference, tokenizer, happiness, 2 * config.dpo.pairs, config.system.seed + 7)
        trainer = Trainer(C, ActorCritic(policy), preferences.pairs(tweets), loss_fn=DPOLoss(reference, config.dpo.beta))
    else:
        C = trainer_config(config.rl, work_dir / "rl", "reward")
        C.group_size = C.group_size if C.algorithm in ("rloo", "grpo") else None  # all episodes begin alike: only these compare them
        trainer = PPOTrainer(C, policy, happiness, [[tokenizer.eot_token]], ref_policy=reference, tokenizer=tokenizer)

    def look(trainer):
        """Now and then: what the policy writes, and what judges whom it does not learn from say of that."""
        if (trainer.iter_num + 1) % config.report.every == 0 and trainer.rank == 0:
            tweets = report.sample(policy, tokenizer, happiness, config.report.looked_at, config.system.seed)
            trainer.metrics |= {"eval/kl": report.kl_to(reference, tweets), "eval/scores": tweets.rewards.mean().item(),
                                **{f"eval/{name}": report.judged(judge, tweets).mean().item() for name, judge in judges.items()}}
            write_text(work_dir / "samples" / f"rl_{trainer.iter_num + 1:04}.txt", "\n".join(tweets.texts[:10]) + "\n")

    trainer.add_callback("on_batch_end", look)
    trainer.run()
    return trainer


# ---------------------------------------------------------------------------------------------------------------------
# their parts


def reward_functions(config, work_dir, splits, tokenizer):
    """(the reward that the policy learns from, {name: a judge that it never sees})."""
    by_vader = TextReward(preferences.vader(), tokenizer)
    if config.rl.reward == "vader":
        return by_vader, {}
    reference = start_from(config, work_dir, "sft", tokenizer)
    tweets = report.sample(reference, tokenizer, None, NORMALIZED_ON, config.system.seed + 6)
    learned = preferences.load_rewards(config, work_dir, splits, tweets, tokenizer)
    return learned["reward"], {"judge": learned["judge"], "vader": by_vader}


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


def check_choices(config):
    """The stages to run; ValueError for any that there is not, and so for the algorithm and the reward."""
    for name, given, known in (("stages", config.stages.split(","), STAGES), ("rl.algorithm", [config.rl.algorithm], ALGORITHMS),
                               ("rl.reward", [config.rl.reward], ("vader", "human"))):
        if unknown := set(given) - set(known):
            raise ValueError(f"--{name}={','.join(given)}: {', '.join(sorted(unknown))} is none of {','.join(known)}")
    check_numbers(config.rl, "group_size", low=1, whole=True)
    check_numbers(config.dpo, "pairs", low=1, whole=True)
    unneeded = {"trunk", "reward", "judge"} if config.rl.reward == "vader" else set()
    unneeded |= {"rl"} if config.rl.algorithm == "best_of_n" else set()
    if config.stages != ",".join(STAGES) and (idle := unneeded & set(config.stages.split(","))):
        raise ValueError(f"--stages={config.stages}: {', '.join(sorted(idle))} has nothing to do with --rl.reward={config.rl.reward} and "
                         f"--rl.algorithm={config.rl.algorithm}")
    return [stage for stage in STAGES if stage in config.stages.split(",") and stage not in unneeded]


def claim(work_dir, config, tokenizer):
    """Keep options and vocabulary in work_dir; ValueError where it holds a run with others."""
    options = dict(config.leaves()) | {"vocabulary": "".join(tokenizer.chars)}
    free = {"stages", "prompt", "system.work_dir", *(name for name in options if name.startswith("report.")),
            *(f"{stage}.{name}" for stage in (*STAGES, "dpo") for name in FREE_TO_CHANGE)}
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
    stage = next((s for s in ("rl", "sft") if finished(work_dir / s)), "pretrain")
    model = start_from(config, work_dir, stage, tokenizer)
    if strange := sorted(set(config.prompt) - tokenizer.ids.keys()):
        raise ValueError(f"--prompt has characters that the model has never seen: {' '.join(strange)}")
    if len(config.prompt) >= config.model.block_size:
        raise ValueError(f"--prompt has {len(config.prompt)} characters, which leaves no room in {config.model.block_size}")
    for text in report.sample(model, tokenizer, None, n=10, seed=config.system.seed, prompt=config.prompt).texts:
        print(text)


if __name__ == "__main__":
    run_script(main)
