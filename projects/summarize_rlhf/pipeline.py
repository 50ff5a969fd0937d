"""
What the stages share: the options, the run they belong to, and sampling.

Each stage script calls `prepare` with its command line, and hands the `Run` to its stages.
"""

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import corpus
from corpus import Corpus
from mingpt import evaluation
from mingpt.bpe import BPETokenizer
from mingpt.checkpoint import to_json, write_text
from mingpt.config import CfgNode as CN, documented, parse_args
from mingpt.evaluation import Samples
from mingpt.model import GPT
from mingpt.rlhf import PPOTrainer, RewardModel
from mingpt.stages import Stages
from mingpt.trainer import Trainer
from mingpt.utils import import_extra, log_to_console

SOURCES = ("docstrings", "tldr")


# --------------------------------------------------------------------------------------------------
# the options


@documented
def get_pretrain_config() -> CN:
    """Options of pretrain: the Trainer's."""
    C = Trainer.get_default_config()
    C.max_iters = 1500
    C.batch_size = 16
    C.learning_rate = 3e-3
    C.lr_schedule = "cosine"
    C.warmup_iters = 100
    C.eval_every = 500
    return C


@documented
def get_sft_config() -> CN:
    """Options of sft: the Trainer's."""
    C = Trainer.get_default_config()
    C.epochs = 2
    C.batch_size = 32
    C.learning_rate = 1e-3
    C.lr_schedule = "cosine"
    C.warmup_iters = 50
    C.eval_every = 200
    return C


@documented
def get_reward_config() -> CN:
    """Options of reward and judge: the Trainer's."""
    C = Trainer.get_default_config()
    C.epochs = 2
    C.batch_size = 8                 # texts, each with the author's line and all others
    C.learning_rate = 5e-4
    C.lr_schedule = "cosine"
    C.warmup_iters = 50
    C.eval_every = 200
    return C


@documented
def get_ppo_config() -> CN:
    """Options of ppo: the PPOTrainer's."""
    C = PPOTrainer.get_default_config()
    C.max_iters = 120
    C.batch_size = 256
    C.group_size = 8
    C.minibatch_size = 128
    C.ppo_epochs = 1
    C.learning_rate = 3e-4
    C.lr_schedule = "linear"
    C.warmup_iters = 5
    C.kl_coef = 0.05
    C.missing_eos_penalty = 1.0      # in standard deviations of the reward
    return C


@documented
def get_config(data: str = "docstrings") -> CN:
    """Every option and its default; tldr has other defaults than docstrings."""
    C = CN()
    C.base = ""                      # another run's folder, to start from its finished stages

    C.system = CN()
    C.system.seed = 3407
    C.system.work_dir = "out/summarize_rlhf"

    C.data = CN()
    C.data.name = data               # docstrings, or tldr; --data=tldr is short for it
    C.data.path = ""                 # JSONL of your own instead: prompt and completion, or
                                     # prompt, chosen and rejected
    C.data.packages = ""             # docstrings of these (torch,numpy); empty: of all installed
    C.data.body_tokens = 96          # a longer text is cut
    C.data.summary_tokens = 24       # end-of-text included; longer summaries are left out
    C.data.vocab_size = 4096         # of the vocabulary that is trained on the texts

    C.model = GPT.get_default_config()
    C.model.n_layer = 4
    C.model.n_head = 4
    C.model.n_embd = 128
    C.model.block_size = 128
    C.model.embd_pdrop = 0.0
    C.model.resid_pdrop = 0.0
    C.model.attn_pdrop = 0.0
    C.model.name = ""                # start from these weights (gpt2, or a folder) and GPT-2's
                                     # vocabulary, instead of pre-training

    C.pretrain = get_pretrain_config()
    C.sft = get_sft_config()

    C.comparisons = CN()
    C.comparisons.centering = 0.01   # how strongly each text's rewards are drawn to a mean of 0

    C.reward = get_reward_config()   # the judge is trained with the same options
    C.ppo = get_ppo_config()

    C.report = CN()
    C.report.samples = 500           # held-out texts to summarize in the end
    C.report.every = 10              # iterations of ppo between looks at summaries,
    C.report.looked_at = 128         # of so many held-out texts

    # These follow from other options: the vocabulary, the n_ options, work_dir and summary_tokens.
    del C.model.vocab_size, C.model.model_type
    del C.pretrain.work_dir, C.sft.work_dir, C.reward.work_dir, C.ppo.work_dir
    del C.ppo.max_new_tokens
    if data == "tldr":
        set_tldr_defaults(C)
    return C


def set_tldr_defaults(C: CN) -> None:
    """The sizes of Stiennon et al. 2020 and of Huang et al. 2024 (table 1), but on GPT-2 124M.

    They are for a GPU of 80 GB; fits.py tells whether and how fast they run on yours.
    """
    C.data.body_tokens = 512
    C.data.summary_tokens = 53
    C.model.name = "gpt2"
    C.model.block_size = 1024

    C.sft.epochs = 1
    C.sft.batch_size = 128
    C.sft.micro_batch_size = 16
    C.sft.learning_rate = 3e-5

    C.comparisons.centering = 0.0

    C.reward.epochs = 1
    C.reward.batch_size = 64
    C.reward.micro_batch_size = 16
    C.reward.learning_rate = 1e-5

    C.ppo.max_iters = 500
    C.ppo.batch_size = 512
    C.ppo.group_size = None
    C.ppo.micro_batch_size = 32
    C.ppo.minibatch_size = 128
    C.ppo.ppo_epochs = 4
    C.ppo.temperature = 0.7
    C.ppo.learning_rate = 3e-6
    C.ppo.lr_schedule = "linear"
    C.ppo.warmup_iters = 0
    C.ppo.kl_coef = 0.05
    C.ppo.missing_eos_penalty = 1.0


def parse_options(args: list[str], doc: str) -> CN:
    """The options of a command line."""
    # --data=tldr is short for --data.name=tldr
    args = [re.sub(r"^--data(?==|$)", "--data.name", arg) for arg in args]
    # The data's name comes first, because other defaults depend on it.
    data_name = re.search(r"--data\.name[= ](\S+)", " ".join(args))
    config = get_config(data_name[1]) if data_name else get_config()
    parse_args(config, args, doc)
    if config.data.name not in SOURCES:
        raise ValueError(
            f"--data={config.data.name} must be docstrings or tldr; for texts of your own pass "
            "--data.path=FILE"
        )
    return config


# --------------------------------------------------------------------------------------------------
# the run


@dataclass
class Run:
    """What a stage works with."""

    config: CN
    work_dir: Path  # the run's folder
    corpus: Corpus
    stages: Stages  # which of them are finished, and the models that they left


def prepare(args: list[str], doc: str) -> Run:
    """The run of a command line: its texts are read or made, and the options of all stages checked.

    Raises ValueError for options that a stage refuses, or that differ from those it began with.
    """
    config = parse_options(args, doc)
    log_to_console()
    for module in ("matplotlib", "rouge_score"):
        import_extra(module, "projects")  # before the work, not after it
    work_dir = Path(config.system.work_dir)
    texts = corpus.load(config, data_folder(config))
    return Run(config, work_dir, texts, make_stages(config, work_dir, texts))


def data_folder(config: CN) -> Path:
    """Where the texts are: in the run's own folder or else, if they are there, in base's.

    Stages of base have learned from base's texts, and those of the installed packages may have
    changed since.
    """
    own = Path(config.system.work_dir) / "data"
    if config.base and not corpus.is_made(own):
        of_base = Path(config.base) / "data"
        if corpus.is_made(of_base):
            return of_base
    return own


def make_stages(config: CN, work_dir: Path, texts: Corpus) -> Stages:
    """The stages of a run, in order. All of their options are checked here."""
    starts_from_weights = bool(config.model.name)  # of other people, who have pre-trained them
    order = {
        "pretrain": None if starts_from_weights else Trainer,
        "sft": Trainer,
        "reward": Trainer,
        "judge": Trainer,
        "ppo": PPOTrainer,
    }
    of_comparisons = ["reward", "comparisons"]  # the judge is trained as the reward model is
    return Stages(
        config,
        work_dir,
        order,
        base=config.base,
        sections={"reward": of_comparisons, "judge": of_comparisons},
        overrides={"ppo": {"max_new_tokens": config.data.summary_tokens}},
        free=["base", "system.work_dir", "report.*"],
        facts={"vocabulary": texts.tokenizer_checksum},
        tokenizer=texts.tokenizer,
    )


def load_model(run: Run, stage: str) -> GPT | RewardModel:
    """The model that a stage left, in evaluation mode.

    ValueError if the stage is not finished, or if its vocabulary is not that of the texts.
    """
    if not run.stages.finished(stage):
        script = {"pretrain": "sft", "judge": "reward"}.get(stage, stage)
        raise ValueError(
            f"the stage {stage} is not finished in {run.work_dir}: run {script}.py first, with the "
            "same options"
        )
    model_class = RewardModel if stage in ("reward", "judge") else GPT
    model = run.stages.load(stage, model_class, run.config.ppo.device)
    if model.config.vocab_size != run.corpus.tokenizer.vocab_size:
        raise ValueError(
            f"the model in {run.stages.model_folder(stage)} has a vocabulary of "
            f"{model.config.vocab_size} tokens, the tokenizer in {data_folder(run.config)} one of "
            f"{run.corpus.tokenizer.vocab_size}: they are of two runs; choose another work_dir"
        )
    return model


def model_config(config: CN, vocab_size: int) -> CN:
    """The options of a new GPT."""
    options = config.model.to_dict()
    del options["name"]
    return CN(**{**options, "model_type": None, "vocab_size": vocab_size})


def draw_rows(config: CN, rows: list[dict], n: int) -> list[dict]:
    """n rows drawn at random, or all if there are fewer; neighbours come from the same package."""
    return random.Random(config.system.seed).sample(rows, min(n, len(rows)))


def write_json(path: Path, value: dict) -> None:
    write_text(path, to_json(value, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------
# sampling


def summarize(
    config: CN,
    model: GPT,
    tokenizer: BPETokenizer,
    prompts: list[str],
    seed: int,
    batch_size: int = 256,
) -> Samples:
    """A summary of each prompt, sampled as during PPO; the same for the same seed."""
    samples = evaluation.sample(
        model,
        prompts,
        tokenizer=tokenizer,
        max_new_tokens=config.data.summary_tokens,
        temperature=config.ppo.temperature,
        seed=seed,
        batch_size=batch_size,
    )
    return replace(samples, texts=[text.strip() for text in samples.texts])
