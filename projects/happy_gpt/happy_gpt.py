"""
HappyGPT: a character-level GPT of 0.8M parameters learns to write, then to write happy tweets.

  1. pretrain  on tweets and snippets of reviews and news: what English looks like
  2. sft       supervised fine-tuning on the texts that people rated positive
  3. rl        PPO: an episode is a tweet, its reward how happy VADER finds it, minus a penalty for
               moving away from the sft model

    python projects/happy_gpt/happy_gpt.py                       all of it, into out/happy_gpt
    python projects/happy_gpt/happy_gpt.py --prompt="I think"    ten ways to continue this text
    python projects/happy_gpt/happy_gpt.py --rl.algorithm=grpo --system.work_dir=out/grpo
    python projects/happy_gpt/happy_gpt.py --rl.kl_coef=0.3 --base=out/happy_gpt \\
        --system.work_dir=out/other                              rl alone, from the sft model there

--rl.algorithm is one of PPO's family (see mingpt/rlhf.py), dpo (on pairs of the sft model's tweets)
or best_of_n (the best of group_size tweets, without training). With --rl.reward=human a reward
model first learns what people find happy, and takes VADER's place (preferences.py). An interrupted
run continues where it stopped, and finished stages are skipped.
"""

import logging
import time
from pathlib import Path

import data
import preferences
import report
from mingpt import distributed, rlhf
from mingpt.chars import CharTokenizer
from mingpt.checkpoint import run_script, write_text
from mingpt.config import CfgNode as CN, check_numbers, documented, parse_args
from mingpt.datasets import split_rows
from mingpt.model import GPT
from mingpt.rlhf import ActorCritic, DPOLoss, PPOTrainer, TextReward
from mingpt.stages import Stages, is_finished
from mingpt.trainer import Trainer
from mingpt.utils import import_extra, log_to_console, pick_device, set_seed

logger = logging.getLogger("mingpt.happy_gpt")
STAGES = ("pretrain", "sft", "trunk", "reward", "judge", "rl")
HUMAN_STAGES = ("trunk", "reward", "judge")  # with --rl.reward=human
ALGORITHMS = (*rlhf.ALGORITHMS, "dpo", "best_of_n")
# Options of rl where a tweet earns its reward with its last character: for a learned reward, which
# is slow to ask, and for algorithms that take a whole tweet as one action.
UNSHAPED = {
    "shaping": False,
    "max_iters": 200,
    "gae_lambda": 1.0,  # at 0.95, which trusts a young value function, tweets shrink
    "value_coef": 0.1,
    "value_lr_ratio": 5.0,
    "kl_coef": 0.15,
    "kl_target": 7.5,
    "kl_horizon": 1200,
}
NORMALIZED_ON = 512  # tweets of the sft model, on which learned rewards have mean 0 and variance 1


@documented
def get_pretrain_config():
    """Options of pretrain: the Trainer's."""
    C = Trainer.get_default_config()
    C.max_iters = 3000
    C.batch_size = 32
    C.learning_rate = 4e-3
    C.lr_schedule = "cosine"
    C.warmup_iters = 100
    C.eval_every = 500
    return C


@documented
def get_sft_config():
    """Options of sft: those of pretrain, but for these."""
    C = get_pretrain_config()
    C.max_iters = 400
    C.learning_rate = 1e-3
    C.warmup_iters = 20
    C.eval_every = 100
    return C


@documented
def get_rl_config():
    """Options of rl: the PPOTrainer's, whose reward it is, and a seed of its own."""
    C = PPOTrainer.get_default_config()
    C.reward = "vader"            # who finds a tweet happy: vader, or human
    C.seed = None                 # of rl and the report; None: system.seed
    C.max_iters = 250
    C.batch_size = 128
    C.ppo_epochs = 2
    C.max_new_tokens = 64
    C.learning_rate = 2.5e-4
    C.lr_schedule = "linear"
    C.shared_trunk = True
    C.value_coef = 1.0
    C.shaping = True              # a happy word earns its reward at once, not with the tweet
    C.kl_coef = 0.4               # reward per nat: begins high, to stay close to the frontier
    C.kl_target = 6.2
    C.kl_horizon = 950
    C.group_size = 16             # tweets that are compared; of best_of_n, the n
    return C


@documented
def get_dpo_config():
    """Options of --rl.algorithm=dpo: those of sft, and DPO's own."""
    C = get_sft_config()
    C.beta = 0.1                 # strength of the penalty for leaving the sft model
    C.pairs = 12_800             # pairs of the sft model's tweets: as many as rl samples
    C.max_iters = 200
    C.batch_size = 64            # pairs
    C.lr_schedule = "linear"
    C.learning_rate = 2.5e-4
    C.log_every = 1
    return C


@documented
def get_config():
    C = CN()
    C.stages = ",".join(STAGES)      # the ones to run; those of a learned reward only where needed
    C.prompt = ""                    # text to continue with the finished model, instead of training
    C.base = ""                      # folder of another run, whose finished stages are taken

    C.system = CN()
    C.system.seed = 3407             # of everything: weights, batches, samples
    C.system.work_dir = "out/happy_gpt"  # everything that is written goes there

    C.data = CN()
    C.data.path = None               # JSON lines of text and, optionally, rating; None: ICWSM-2014
    C.data.positive = 0.8            # a text with a mean rating above this is positive
    C.data.min_count = 5             # rarer characters become U+FFFD

    C.model = GPT.get_default_config()
    C.model.model_type = "gpt-micro"
    C.model.block_size = 64
    # Probabilities of dropout: none, because four passes over the data do not overfit.
    C.model.embd_pdrop = 0.0
    C.model.resid_pdrop = 0.0
    C.model.attn_pdrop = 0.0

    C.pretrain = get_pretrain_config()
    C.sft = get_sft_config()
    C.trunk = preferences.get_trunk_config()
    C.reward = preferences.get_reward_config()

    C.rl = get_rl_config()

    # The Trainer's options for --rl.algorithm=dpo.
    C.dpo = get_dpo_config()

    # Two things are not for the user to choose: folders are named after the stages, and the
    # vocabulary follows from the texts.
    for section in (C.pretrain, C.sft, C.trunk, C.reward, C.rl, C.dpo):
        del section.work_dir
    del C.model.vocab_size

    C.report = CN()
    C.report.samples = 512           # fresh tweets of each stage, from the same seeds
    C.report.frontier_samples = 4096  # tweets of the sft model, for the yardsticks
    C.report.every = 20              # iterations of rl between looks at fresh tweets
    C.report.looked_at = 256         # tweets in such a look
    return C


def main(args):
    config = get_config()
    parse_args(config, args, __doc__)
    wanted = check_choices(config)
    log_to_console()
    if config.prompt:
        print_continuations(config)
        return
    for extra in ("matplotlib", "vaderSentiment"):
        import_extra(extra, "projects")  # before the work, not after it

    started = time.time()
    splits, tokenizer = load_data(config)
    stages = make_stages(config, tokenizer)
    seconds_before = stages.seconds()  # finished stages took this when they ran
    for stage in wanted:
        trainer = run_stage(stage, config, stages, splits, tokenizer)
        if trainer is not None:
            seconds_before += trainer.resumed_seconds  # the part before it was interrupted

    if distributed.rank() > 0:
        return
    human = config.rl.reward == "human"
    if human and not all(map(stages.finished, ("sft", "reward", "judge"))):
        logger.info("the report follows when sft, reward and judge are finished")
        return
    if stages.finished("rl"):
        stages.model_folder("sft")  # the reference: ValueError if it is neither here nor in base
    reward_fn, judges = reward_functions(config, stages, splits, tokenizer)
    started -= seconds_before  # when it would have started, had it run all at once
    report.write(config, stages, splits, tokenizer, reward_fn, judges, rl_seed(config), started)


# --------------------------------------------------------------------------------------------------
# the stages: each starts from the weights of the one before


def pretrain(config, stages, splits, tokenizer):
    """A language model of all the texts, in windows of block_size characters."""
    set_seed(config.system.seed)
    model = GPT(CN(**config.model.to_dict(), vocab_size=tokenizer.vocab_size))
    return language_model_trainer(stages, "pretrain", model, splits, tokenizer)


def sft(config, stages, splits, tokenizer):
    """The same objective, on the positive texts alone."""
    set_seed(config.system.seed + 1)
    model = stages.load("pretrain", device=config.rl.device)
    positive = positive_texts(config, splits)
    return language_model_trainer(stages, "sft", model, positive, tokenizer)


def language_model_trainer(stages, stage, model, splits, tokenizer):
    """The Trainer of a language model, which returns its cross-entropy itself: no loss_fn."""
    texts = {name: [row["text"] for row in rows] for name, rows in splits.items()}
    size = model.config.block_size
    return Trainer(
        stages.trainer_config(stage),
        model,
        data.Windows(texts["train"], tokenizer, size),
        data.Windows(texts["valid"], tokenizer, size, consecutive=True),
    )


def rl(config, stages, splits, tokenizer):
    """From the sft model, and held near to it by the KL penalty.

    Every episode begins with the end-of-text token.
    """
    seed = rl_seed(config)
    set_seed(seed + 2)
    policy = stages.load("sft", device=config.rl.device)
    reference = stages.load("sft", device=config.rl.device)
    reward_fn, judges = reward_functions(config, stages, splits, tokenizer)
    if config.rl.algorithm == "dpo":
        n = 2 * config.dpo.pairs
        tweets = report.sample_tweets(reference, tokenizer, n, seed + 7, reward_fn)
        trainer = Trainer(
            stages.trainer_config("rl"),
            ActorCritic(policy),
            preferences.pairs(tweets),
            loss_fn=DPOLoss(reference, config.dpo.beta),
        )
    else:
        trainer = PPOTrainer(
            stages.trainer_config("rl"),
            policy,
            reward_fn,
            prompts=[[tokenizer.eot_token]],
            ref_policy=reference,
            tokenizer=tokenizer,
        )

    def look(trainer):
        """Now and then: fresh tweets, and what is said of them by judges it does not learn from."""
        if (trainer.iter_num + 1) % config.report.every != 0 or trainer.rank > 0:
            return
        n = config.report.looked_at
        tweets = report.sample_tweets(policy, tokenizer, n, seed, reward_fn)
        trainer.metrics["eval/kl"] = report.kl_to(reference, tweets)
        trainer.metrics["eval/scores"] = tweets.rewards.mean().item()
        for name, judge in judges.items():
            trainer.metrics[f"eval/{name}"] = report.score(tweets, judge).mean().item()
        path = Path(config.system.work_dir) / "samples" / f"rl_{trainer.iter_num + 1:04}.txt"
        write_text(path, "\n".join(tweets.texts[:10]) + "\n")

    trainer.add_callback("on_batch_end", look)
    return trainer


# --------------------------------------------------------------------------------------------------
# running them


def make_stages(config, tokenizer):
    """The run's stages: who trains them, what they depend on, what is checked and locked."""
    if_human = Trainer if config.rl.reward == "human" else None  # None: it does not take place
    dpo = config.rl.algorithm == "dpo"
    stages = Stages(
        config,
        config.system.work_dir,
        order={
            "pretrain": Trainer,
            "sft": Trainer,
            "trunk": if_human,
            "reward": if_human,
            "judge": if_human,
            "rl": {"dpo": Trainer, "best_of_n": None}.get(config.rl.algorithm, PPOTrainer),
        },
        base=config.base,
        # judge is trained as reward is, and dpo's Trainer has a section of its own
        sections={"judge": ["reward"], "rl": ["dpo", "rl"] if dpo else ["rl", "dpo"]},
        extras={
            "trunk": ["vocab_size", "group_size"],
            "reward": ["group_size"],
            "judge": ["group_size"],
            "rl": ["beta", "pairs"] if dpo else ["reward", "seed"],
        },
        overrides={"rl": {} if dpo else algorithm_overrides(config)},
        free=["stages", "prompt", "base", "system.work_dir", "report.*"],
        facts={"vocabulary": "".join(tokenizer.chars)},
        tokenizer=tokenizer,
    )
    if distributed.rank() == 0:
        tokenizer.save_pretrained(config.system.work_dir)
    return stages


def algorithm_overrides(config):
    """What takes the place of this script's defaults, which were chosen for ppo and VADER."""
    row = rlhf.ALGORITHMS.get(config.rl.algorithm)
    if row is None:
        return {}
    advantage = config.rl.advantage or row.advantage
    others = {}
    if advantage != "gae" or config.rl.reward == "human":
        others |= UNSHAPED
    if advantage != "gae":
        others["shared_trunk"] = False  # there is no value function
    # None is the algorithm's own choice.
    if advantage not in rlhf.GROUP_ADVANTAGES:
        others["group_size"] = None  # all episodes begin alike: groups only serve to compare them
    if (config.rl.kl_penalty or row.kl_penalty) == "none":
        others |= {"kl_coef": None, "kl_target": None}
    if row.ppo_epochs == 1:
        others["ppo_epochs"] = None
    # What the user has chosen stays.
    defaults = get_config().rl
    return {
        name: value
        for name, value in others.items()
        if getattr(config.rl, name) == getattr(defaults, name)
    }


def run_stage(stage, config, stages, splits, tokenizer):
    """Run a stage, unless it is finished; its trainer, or None."""
    if stage in HUMAN_STAGES:
        return preferences.run_stage(stage, config, stages, splits)
    make_trainer = {"pretrain": pretrain, "sft": sft, "rl": rl}[stage]
    return stages.run(stage, lambda: make_trainer(config, stages, splits, tokenizer))


# --------------------------------------------------------------------------------------------------
# their parts


def reward_functions(config, stages, splits, tokenizer):
    """(the reward that the policy learns from, {name: a judge that it does not learn from})."""
    by_vader = TextReward(preferences.vader(), tokenizer)
    if config.rl.reward == "vader":
        return by_vader, {}
    reference = stages.load("sft", device=config.rl.device)
    seed = config.system.seed + 6
    tweets = report.sample_tweets(reference, tokenizer, NORMALIZED_ON, seed)
    learned = preferences.load_rewards(config, stages, splits, tweets, tokenizer)
    return learned["reward"], {"judge": learned["judge"], "vader": by_vader}


def rl_seed(config):
    """The seed of rl and of the report's tweets."""
    return config.system.seed if config.rl.seed is None else config.rl.seed


def load_data(config):
    """The splits, and the tokenizer of their characters."""
    path = config.data.path
    rows = data.load_jsonl(path) if path else data.load_icwsm(data.fetch())
    splits = split_rows(rows, "text")
    sizes = {name: len(split) for name, split in splits.items()}
    if not all(sizes.values()):
        raise ValueError(
            f"{len(rows)} texts are too few to split into train, valid and test ({sizes}): a few "
            "hundred will do"
        )
    counts = ", ".join(f"{n} {name}" for name, n in sizes.items())
    logger.info("%d texts: %s", len(rows), counts)
    texts = [row["text"] for row in splits["train"]]
    return splits, CharTokenizer.train(texts, config.data.min_count)


def positive_texts(config, splits):
    """The splits of what the sft stage learns from; where no text is rated, of all texts."""
    if all(row["rating"] is None for rows in splits.values() for row in rows):
        return splits
    positive = {
        name: [
            row
            for row in rows
            if row["rating"] is not None and row["rating"] > config.data.positive
        ]
        for name, rows in splits.items()
    }
    if not positive["train"] or not positive["valid"]:
        raise ValueError(
            f"no texts are rated above --data.positive={config.data.positive}: lower it"
        )
    return positive


def check_choices(config):
    """The stages to run. ValueError for a stage, an algorithm or a reward that does not exist."""
    wanted = config.stages.split(",")
    check_known("stages", wanted, STAGES)
    check_known("rl.algorithm", [config.rl.algorithm], ALGORITHMS)
    check_known("rl.reward", [config.rl.reward], ("vader", "human"))
    if config.rl.algorithm == "best_of_n":
        check_numbers(config.rl, "group_size", low=1, whole=True)
    check_numbers(config.dpo, "pairs", low=1, whole=True)

    unneeded = set(HUMAN_STAGES) if config.rl.reward == "vader" else set()
    if config.rl.algorithm == "best_of_n":
        unneeded.add("rl")  # which takes no training
    idle = sorted(unneeded & set(wanted))
    if idle and config.stages != ",".join(STAGES):
        raise ValueError(
            f"--stages={config.stages}: {', '.join(idle)} has nothing to do with "
            f"--rl.reward={config.rl.reward} and --rl.algorithm={config.rl.algorithm}"
        )
    return [stage for stage in STAGES if stage in wanted and stage not in unneeded]


def check_known(option, values, known):
    """ValueError where an option has a value that is none of the known ones."""
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"--{option} has {', '.join(unknown)}, which does not exist: choose from "
            f"{', '.join(known)}"
        )


def print_continuations(config):
    """Ten ways to continue --prompt, by the last stage that is finished in the work_dir."""
    work_dir = Path(config.system.work_dir)
    finished = [stage for stage in ("rl", "sft", "pretrain") if is_finished(work_dir / stage)]
    if not finished:
        raise ValueError(
            f"there is no model in {work_dir} yet: run this script without --prompt first"
        )
    folder = work_dir / finished[0] / "model"
    tokenizer = CharTokenizer.from_pretrained(folder)
    model = GPT.from_pretrained(folder).to(pick_device(config.rl.device))
    unknown = sorted(set(config.prompt) - tokenizer.ids.keys())
    if unknown:
        raise ValueError(
            f"--prompt has characters that the model has never seen: {' '.join(unknown)}"
        )
    if len(config.prompt) >= model.config.block_size:
        raise ValueError(
            f"--prompt has {len(config.prompt)} characters, which leaves no room in "
            f"{model.config.block_size}"
        )
    tweets = report.sample_tweets(model, tokenizer, 10, config.system.seed, prompt=config.prompt)
    for text in tweets.texts:
        print(config.prompt + text)


if __name__ == "__main__":
    run_script(main)
