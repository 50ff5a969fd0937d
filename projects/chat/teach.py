"""
Teach a chat model what you like, from the labels of label.py.

  1. sft      only with --sft: fine-tuning on conversations, on the assistant's turns alone
  2. reward   a reward model learns which answers you choose (judge.py)
  3. rl       PPO against that reward model; or, with --method=best_of_n, IPO on pairs of answers
              that it finds (best_of_n.py); or, with --method=dpo and without a reward model, DPO on
              the labels themselves

    python projects/chat/teach.py                                   all of it, into out/chat/taught
    python projects/chat/teach.py --method=dpo --system.work_dir=out/chat/dpo
    python projects/chat/teach.py --rl.kl_coef=0.1 --base=out/chat/taught \\
        --system.work_dir=out/chat/other                            rl alone, from the reward there
    python projects/chat/teach.py --sft=talks.jsonl --method=none --model.name=gpt2
                                                                    a dialog agent out of GPT-2

The base model is never changed. What is learned is an adapter of a few megabytes (mingpt/lora.py):
policy, reference and reward model all stand on the one frozen trunk, and with --rl.advantage=gae a
value function does, too. The policy's adapter is in rl/model; talk.py and compare.py take that
folder as their model. --merge writes a whole model instead, which needs no base any more.

An interrupted run continues where it stopped, and finished stages are skipped.
"""

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import answers
import lessons
import outcome
from answers import BATCH, ChatModel
from best_of_n import find_pairs
from judge import FOLDS, Judge
from mingpt import distributed, evaluation, lora
from mingpt.checkpoint import read_json, run_script, to_json, write_text
from mingpt.config import CfgNode, check_booleans, check_numbers, documented, parse_args
from mingpt.datasets import Comparisons, Completions
from mingpt.heads import ActorCritic, ValueModel
from mingpt.rlhf import ALGORITHMS, DPOLoss, PPOTrainer, choose
from mingpt.stages import Stages
from mingpt.trainer import Trainer
from mingpt.utils import import_extra, log_to_console, set_seed

logger = logging.getLogger("mingpt.chat")

COMPARED_WITH = "compared_with.json"  # beside PPO's checkpoint: rewards of the reference's answers

# Options of the reward stage that are not for the user to choose: all labels are one batch, and the
# prior takes the place of weight decay. (None for the batch size: their number, see make_stages.)
WHOLE_BATCH = {
    "batch_size": None,
    "micro_batch_size": None,
    "weight_decay": 0.0,
    "compile": False,
    "eval_every": None,
}


@documented
def get_reward_config() -> CfgNode:
    """Options of the reward stage: the Trainer's, and the prior."""
    C = Trainer.get_default_config()
    C.max_iters = 300               # on all labels at once: then it is at the optimum
    C.learning_rate = 3e-2
    C.lr_schedule = "linear"
    C.prior = 1.0                   # so far apart two rewards are believed to be at first
    # All labels are one batch, and the prior takes the place of weight decay.
    for name in WHOLE_BATCH:
        delattr(C, name)
    return C


@documented
def get_rl_config() -> CfgNode:
    """Options of PPO: the trainer's, but for what `ask` says of sampling."""
    C = PPOTrainer.get_default_config()
    C.max_iters = 16
    C.batch_size = 32               # answers in a rollout
    C.minibatch_size = 16
    C.micro_batch_size = 8
    C.ppo_epochs = 1
    C.group_size = 4                # answers to each prompt
    C.advantage = None              # None: as the algorithm has it, and for ppo leave_one_out: a
                                    # value function (gae) learns nothing from so few answers
    C.learning_rate = 1e-3
    C.lr_schedule = "linear"
    C.kl_coef = None                # a probability, per nat; None: 0.03 where there is a penalty
    C.missing_eos_penalty = 0.5     # makes it worse than most answers that have ended
    C.checkpoint_every = 4
    C.value_lr_ratio = 3.0          # this one and the next only with advantage=gae
    C.gae_lambda = 1.0
    del C.max_new_tokens, C.temperature, C.stop_token
    return C


@documented
def get_dpo_config() -> CfgNode:
    """Options of --method=dpo: the Trainer's, and DPO's own."""
    C = Trainer.get_default_config()
    C.max_iters = 25                # however many labels there are: more go too far
    C.batch_size = 8                # labels
    C.micro_batch_size = 4
    C.learning_rate = 3e-4
    C.lr_schedule = "linear"
    C.warmup_iters = 5
    C.weight_decay = 0.0
    C.log_every = 1
    C.beta = 0.1                    # strength of the penalty for leaving the reference
    return C


@documented
def get_best_of_n_config() -> CfgNode:
    """Options of --method=best_of_n: those of dpo, and how the pairs are found."""
    C = get_dpo_config()
    C.max_iters = None
    C.epochs = 1
    C.beta = 0.1                    # IPO's: log π(best)/π(worst) is to grow by 1 / (2 beta)
    C.n = 8                         # answers to a prompt, of which the best and the worst are kept
    C.prompts = 300                 # how many prompts are answered
    return C


@documented
def get_config() -> CfgNode:
    """Every option and its default."""
    C = CfgNode()
    C.method = "ppo"                 # or best_of_n, or dpo; or none, to stop after sft
    C.labels = "out/chat/labels.db"  # where label.py has put them
    C.sft = ""                       # a file of conversations to learn first, or `labels`: the
                                     # answers that you have written on the page
    C.base = ""                      # folder of another run, whose finished stages are taken
    C.merge = False                  # also write the whole model, with the adapter merged into it

    C.system = CfgNode()
    C.system.seed = 3407             # of everything: batches, samples, what is held out
    C.system.work_dir = "out/chat/taught"  # everything that is written goes there

    C.model = CfgNode()
    C.model.name = "smollm2"         # or a hub name, a folder, a .gguf file
    C.model.rank = 8                 # of the adapters
    C.model.alpha = 16.0             # their updates are scaled by alpha / rank

    C.ask = answers.get_ask_config()

    C.data = CfgNode()
    C.data.first = None              # learn from the first so many comparisons only; None: from all
    C.data.test = ""                 # another labels.db: the reward model is tested on it, too
    C.data.prompts = ""              # prompts for ppo and best_of_n, one a line; empty: the
                                     # project's own
    C.data.compared_with = 128       # answers of the reference: the reward of an answer is the
                                     # probability that it is chosen over one of them

    C.finetune = Trainer.get_default_config()
    C.finetune.epochs = 2
    C.finetune.batch_size = 8
    C.finetune.learning_rate = 2e-4
    C.finetune.lr_schedule = "linear"
    C.finetune.weight_decay = 0.0

    C.reward = get_reward_config()
    C.rl = get_rl_config()

    # The Trainer's options for --method=dpo, and for --method=best_of_n.
    C.dpo = get_dpo_config()
    C.best_of_n = get_best_of_n_config()

    for section in (C.finetune, C.reward, C.rl, C.dpo, C.best_of_n):
        del section.work_dir  # folders are named after the stages

    C.report = CfgNode()
    C.report.prompts = ""            # fresh prompts, one a line; empty: the project's own 100
    C.report.batch_size = 32         # answers at a time
    return C


def complete(config: CfgNode) -> None:
    """Fill in what the defaults leave open, because it depends on the algorithm."""
    row = ALGORITHMS.get(config.rl.algorithm)  # None for a name that the trainer will refuse
    if config.rl.advantage is None and config.rl.algorithm == "ppo":
        config.rl.advantage = "leave_one_out"
    if config.rl.kl_coef is None and row is not None and row.kl_penalty != "none":
        config.rl.kl_coef = 0.03


def check_config(config: CfgNode) -> None:
    """ValueError for options that cannot be, before anything is loaded."""
    if config.method not in METHODS:
        raise ValueError(f"--method={config.method} must be one of {', '.join(METHODS)}")
    if config.method == "none" and not config.sft:
        raise ValueError("--method=none teaches nothing without --sft=FILE: give one of them")
    if distributed.is_launched():
        raise ValueError("teach.py runs in one process: start it without torchrun")
    answers.check_ask(config.ask)
    check_booleans(config, "merge")
    check_numbers(config.system, "seed", whole=True)
    check_numbers(config.model, "rank", low=1, whole=True)
    check_numbers(config.model, "alpha", low=1e-6)
    check_numbers(config.data, "first", low=lessons.FEWEST, whole=True, optional=True)
    check_numbers(config.data, "compared_with", low=1, whole=True)
    check_numbers(config.dpo, "beta", low=1e-6)
    check_numbers(config.best_of_n, "beta", low=1e-6)
    check_numbers(config.best_of_n, "n", low=2, high=BATCH, whole=True)
    check_numbers(config.best_of_n, "prompts", low=1, whole=True)
    check_numbers(config.reward, "prior", low=1e-6)


# --------------------------------------------------------------------------------------------------
# What a run consists of


class Lessons:
    """What the stages learn from: demonstrations, and labels to learn from and to test on."""

    def __init__(self, config: CfgNode):
        needs_labels = config.method != "none" or config.sft == "labels"
        labels = lessons.read_labels(config.labels) if needs_labels else []
        self.demonstrations = []
        if config.sft:
            self.demonstrations = lessons.demonstrations(labels, config.sft)
        self.rows: list[dict] = []
        self.folds: list[int] = []
        self.test: list[dict] = []
        if config.data.test:
            self.test = lessons.comparisons(lessons.read_labels(config.data.test))
        if config.method == "none":
            return
        self.rows = lessons.comparisons(labels)[: config.data.first]
        warning = lessons.check_number(self.rows, config.labels)
        if warning:
            logger.warning(warning)
        if METHODS[config.method].has_reward:  # which is tested on them
            self.folds = lessons.folds(self.rows, FOLDS, config.system.seed)
        logger.info("%d labels to learn from", len(self.rows))

    def facts(self) -> dict[str, str]:
        """What says whether a run had the same lessons: by the sections of `make_stages`."""
        return {
            "labels.hash": lessons.digest(self.rows),
            "demonstrations.hash": lessons.digest(self.demonstrations),
        }


class ChatStages(Stages):
    """Stages that leave adapters of one base model, or a judge of its answers."""

    def __init__(self, *args: Any, base_model: dict[str, str], **options: Any):
        self.base_model = base_model  # its name and its hash
        super().__init__(*args, **options)

    def save_model(self, model: Any, folder: Path, tokenizer: Any) -> None:
        """Save what was trained."""
        if isinstance(model, Judge):
            model.save_pretrained(folder)
        else:
            answers.save_adapter(model, tokenizer, self.base_model, folder)


def make_stages(config: CfgNode, material: Lessons, model: ChatModel) -> ChatStages:
    """The run's stages: who trains them, what they depend on, what is checked and locked."""
    method = METHODS[config.method]
    other_sections = {other.section for other in METHODS.values()} - {method.section}
    sampling = {
        "max_new_tokens": config.ask.max_new_tokens,
        "temperature": config.ask.temperature,
        "stop_token": list(model.chat.stop_tokens),
    }
    return ChatStages(
        config,
        config.system.work_dir,
        order={
            "sft": Trainer if config.sft else None,
            "reward": Trainer if method.has_reward else None,
            "rl": method.trainer_class,
        },
        base=config.base,
        # Which sections of options, and which facts, a stage depends on beside those before it.
        sections={
            "sft": ["finetune", "demonstrations"],
            "reward": ["reward", "labels"],
            "rl": [method.section, "labels", "data", "ask", "method"],
        },
        extras={"reward": ["prior"], "rl": method.extras},
        overrides={
            "reward": WHOLE_BATCH | {"batch_size": max(1, len(material.rows))},
            "rl": sampling if config.method == "ppo" else {},
        },
        free=[
            *("base", "labels", "merge", "method", "sft", "data.test", "system.work_dir"),
            "report.*",
            *(f"{section}.*" for section in other_sections),
        ],
        facts={"base_hash": model.hash, "method.name": config.method, **material.facts()},
        tokenizer=model.chat,
        base_model={"name": model.name, "sha256": model.hash},
    )


def load_base(config: CfgNode) -> ChatModel:
    """The base model, without any adapter."""
    if (Path(config.model.name) / "adapter_config.json").exists():
        raise ValueError(
            f"--model.name={config.model.name} is an adapter: give its base, or merge it first "
            "(teach.py --merge)"
        )
    return ChatModel.load(config.model.name, config.rl.device)


# --------------------------------------------------------------------------------------------------
# The stages


def sft(config: CfgNode, stages: ChatStages, material: Lessons, model: ChatModel) -> Trainer:
    """Fine-tune on conversations: the loss is on the assistant's turns alone."""
    set_seed(config.system.seed)
    lora.add(model.model, config.model.rank, config.model.alpha)
    data = Completions(material.demonstrations, model.chat, model.model.config.block_size)
    return Trainer(
        stages.trainer_config("sft"),
        model.model,
        data,
        collate_fn=data.collate,
        weight_fn=data.weight,
    )


def reward(config: CfgNode, stages: ChatStages, material: Lessons, model: ChatModel) -> Trainer:
    """Learn which answers are chosen: from all labels at once, as often as it takes."""
    set_seed(config.system.seed + 1)
    judge = Judge(model.model)
    labels = load_comparisons(material.rows, model)
    logger.info("reading the answers of %d labels", len(labels))
    judge.study(judge.read(labels, BATCH // 2), material.folds, config.reward.prior)
    return Trainer(
        stages.trainer_config("reward"),
        judge,
        TensorDataset(torch.arange(len(labels))),
        loss_fn=lambda judge, batch: judge.loss(*batch),
    )


def ppo(config: CfgNode, stages: ChatStages, material: Lessons, model: ChatModel) -> Trainer:
    """Answer so that the reward model likes it, and stay near to the reference."""
    set_seed(config.system.seed + 2)
    prepare_policy(config, stages, model)
    judge, _ = Judge.load(stages.model_folder("reward"), model.model)
    trainer_config = stages.trainer_config("rl")
    # The policy still is the reference. The report will need the same rewards again.
    others = rewards_of_reference(config, judge, model)
    write_text(Path(trainer_config.work_dir) / COMPARED_WITH, to_json(others.tolist()))
    judge.compare_with(others)
    value_model = None
    if choose(trainer_config).advantage == "gae":
        value_model = ValueModel.on(
            model.model, rank=config.model.rank, alpha=config.model.alpha
        )
    return PPOTrainer(
        trainer_config,
        model.model,
        judge,
        [model.encode(config.ask, prompt) for prompt in training_prompts(config)],
        value_model=value_model,
        tokenizer=model.chat,
    )


def best_of_n(config: CfgNode, stages: ChatStages, material: Lessons, model: ChatModel) -> Trainer:
    """Learn to answer as in the best of n answers, and not as in the worst, by IPO.

    DPO keeps widening the gap between the two, until the model is far away. IPO asks for a certain
    gap, and for no more (Azar et al. 2023, arXiv:2310.12036).
    """
    set_seed(config.system.seed + 2)
    prepare_policy(config, stages, model)
    judge, _ = Judge.load(stages.model_folder("reward"), model.model)
    prompts = asked_prompts(config, config.best_of_n.prompts)
    folder = Path(stages.trainer_config("rl").work_dir)
    pairs = find_pairs(config, folder, judge, model, prompts)
    loss_fn = DPOLoss(model.model, config.best_of_n.beta, "ipo")
    return comparing_trainer(stages, pairs, model, loss_fn)


def dpo(config: CfgNode, stages: ChatStages, material: Lessons, model: ChatModel) -> Trainer:
    """Learn from the labels themselves, without a reward model."""
    set_seed(config.system.seed + 2)
    prepare_policy(config, stages, model)
    loss_fn = DPOLoss(model.model, config.dpo.beta)
    return comparing_trainer(stages, material.rows, model, loss_fn)


def comparing_trainer(
    stages: ChatStages, rows: list[dict], model: ChatModel, loss_fn: DPOLoss
) -> Trainer:
    """The Trainer of a policy that learns from comparisons."""
    return Trainer(
        stages.trainer_config("rl"),
        ActorCritic(model.model),
        load_comparisons(rows, model),
        loss_fn=loss_fn,
        collate_fn=Comparisons.collate,
    )


class Method(NamedTuple):
    """A way to teach a policy."""

    make_trainer: Callable[..., Trainer] | None  # one of the functions above; None: nothing follows
    trainer_class: type[Trainer] | None  # what it returns
    section: str  # of that trainer's options
    extras: tuple[str, ...]  # options in the section that are not the trainer's
    has_reward: bool  # whether a reward model learns first


METHODS = {
    "ppo": Method(ppo, PPOTrainer, "rl", (), has_reward=True),
    "best_of_n": Method(
        best_of_n, Trainer, "best_of_n", ("beta", "n", "prompts"), has_reward=True
    ),
    "dpo": Method(dpo, Trainer, "dpo", ("beta",), has_reward=False),
    "none": Method(None, None, "rl", (), has_reward=False),
}


# --------------------------------------------------------------------------------------------------
# Their parts


def prepare_policy(config: CfgNode, stages: ChatStages, model: ChatModel) -> None:
    """Give the policy an adapter: that of sft, where there is one, or one that changes nothing."""
    if config.sft:
        lora.load(model.model, stages.model_folder("sft"))
    else:
        lora.add(model.model, config.model.rank, config.model.alpha)


def rewards_of_reference(config: CfgNode, judge: Judge, reference: ChatModel) -> Tensor:
    """r(x, y) of some answers of the reference, (M,), with which others are compared.

    Bradley-Terry leaves open where the zero of a reward is. This is where it comes from.
    """
    prompts = asked_prompts(config, config.data.compared_with)
    samples = reference.sample(config.ask, prompts, 1, config.system.seed, BATCH)
    return evaluation.score(samples, judge.reward, BATCH)


def training_prompts(config: CfgNode) -> list[str]:
    """What is asked in training: the prompts of a file, or those of the project and its facts.

    The KL penalty is only felt where something is asked. Without questions of fact a model forgets
    what it knows, and the penalty does not notice.
    """
    prompts = answers.read_prompts(config.data.prompts)
    return prompts if config.data.prompts else prompts + answers.read_prompts(str(answers.FACTS))


def asked_prompts(config: CfgNode, n: int) -> list[str]:
    """n of the training prompts in random order; each of them again where n is larger."""
    prompts = training_prompts(config)
    return [answers.prompt_number(prompts, i, config.system.seed) for i in range(n)]


def load_comparisons(rows: list[dict], model: ChatModel) -> Comparisons:
    """The labels as token ids."""
    return Comparisons(rows, model.chat, model.model.config.block_size)


# --------------------------------------------------------------------------------------------------
# All together


def main(args: list[str]) -> None:
    config = get_config()
    parse_args(config, args, __doc__)
    complete(config)
    check_config(config)
    log_to_console()
    import_extra("matplotlib", "projects")  # before the work, not after it
    started = time.time()
    material = Lessons(config)
    model: ChatModel | None = load_base(config)
    stages = make_stages(config, material, model)
    seconds_before = stages.seconds()  # finished stages took this when they ran
    makers = {"sft": sft, "reward": reward, "rl": METHODS[config.method].make_trainer}
    for stage in stages.names:
        if stages.finished(stage):
            continue
        # Each stage begins with a base that carries no adapter of an earlier one.
        model = model or load_base(config)
        make_trainer = functools.partial(makers[stage], config, stages, material, model)
        trainer = stages.run(stage, make_trainer)
        seconds_before += trainer.resumed_seconds
        model = None
    report(config, stages, material, started - seconds_before)
    if config.merge:
        folder = Path(config.system.work_dir) / "merged"
        outcome.write_merged(stages.model_folder(stages.names[-1]), folder)


def report(config: CfgNode, stages: ChatStages, material: Lessons, started: float) -> None:
    """Write what came of it: see outcome.py."""
    last = stages.names[-1]
    # Before: the base, or what sft has made of it, where the last stage began there.
    begins_with_sft = config.sft and last != "sft"
    name = str(stages.model_folder("sft")) if begins_with_sft else config.model.name
    before = ChatModel.load(name, config.rl.device)
    after = ChatModel.load(str(stages.model_folder(last)), config.rl.device)
    judge = None
    margins = {}
    if "reward" in stages.names:
        judge, margins["held_out"] = Judge.load(stages.model_folder("reward"), before.model)
        if material.test:
            test = load_comparisons(material.test, before)
            features = judge.read(test, BATCH // 2)
            margins["test"] = judge.margins(features)[:, 0].detach().cpu()
        if config.method == "ppo":
            others = torch.tensor(read_json(stages.stage_folder("rl") / COMPARED_WITH, list))
        else:  # best_of_n has not needed them
            others = rewards_of_reference(config, judge, before)
        judge.compare_with(others)
    outcome.write(config, stages, before, after, judge, margins, started)


if __name__ == "__main__":
    run_script(main)
