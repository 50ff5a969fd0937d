"""
What the stages share: the options, the folder each leaves behind, and sampling.
"""

import json
import logging
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

import corpus
from mingpt import distributed
from mingpt.checkpoint import write_text
from mingpt.datasets import left_pad
from mingpt.model import GPT
from mingpt.rlhf import PPOTrainer, RewardModel, written_mask
from mingpt.run_folder import RunFolder, finished
from mingpt.trainer import FREE_TO_CHANGE, Trainer
from mingpt.config import CfgNode as CN, parse_args
from mingpt.utils import import_extra, log_to_console, pick_device

logger = logging.getLogger("mingpt.summarize_rlhf")
STAGES = ("pretrain", "sft", "reward", "judge", "ppo")


def get_config(data="docstrings"):
    """Every option and its default; with tldr some defaults are others."""
    C = CN()
    C.system = CN()
    C.system.seed = 3407
    C.system.work_dir = "out/summarize_rlhf"

    C.data = CN()
    C.data.name = data               # docstrings, or tldr; --data=tldr is short for it
    C.data.path = ""                 # texts of your own: JSONL with prompt and completion, or prompt, chosen and rejected
    C.data.packages = ""             # docstrings: of these packages alone (torch,numpy); empty: of all that are installed
    C.data.body_tokens = 96          # of a text; what is behind them is cut off
    C.data.summary_tokens = 24       # end-of-text included; texts with longer summaries are left out
    C.data.vocab_size = 4096         # of a vocabulary of its own

    C.model = GPT.get_default_config()
    C.model.merge_from_dict({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128})
    C.model.embd_pdrop = C.model.resid_pdrop = C.model.attn_pdrop = 0.0
    C.model.name = ""                # start from these weights (gpt2, a folder) and GPT-2's vocabulary, instead of pre-training
    del C.model.vocab_size, C.model.model_type

    C.pretrain = Trainer.get_default_config()
    C.pretrain.max_iters = 1500
    C.pretrain.batch_size = 16
    C.pretrain.learning_rate = 3e-3
    C.pretrain.lr_schedule = "cosine"
    C.pretrain.warmup_iters = 100
    C.pretrain.eval_every = 500

    C.sft = Trainer.get_default_config()
    C.sft.epochs = 2
    C.sft.batch_size = 32
    C.sft.learning_rate = 1e-3
    C.sft.lr_schedule = "cosine"
    C.sft.warmup_iters = 50
    C.sft.eval_every = 200

    C.comparisons = CN()
    C.comparisons.centering = 0.01   # how strongly the rewards of each text are drawn to a mean of 0

    C.reward = Trainer.get_default_config()  # the judge's, too
    C.reward.epochs = 2
    C.reward.batch_size = 8                  # texts, each with all that its author's line is compared to
    C.reward.learning_rate = 5e-4
    C.reward.lr_schedule = "cosine"
    C.reward.warmup_iters = 50
    C.reward.eval_every = 200

    C.ppo = PPOTrainer.get_default_config()
    C.ppo.max_iters = 120
    C.ppo.batch_size = 256
    C.ppo.group_size = 8
    C.ppo.minibatch_size = 128
    C.ppo.ppo_epochs = 1
    C.ppo.learning_rate = 3e-4
    C.ppo.lr_schedule = "linear"
    C.ppo.warmup_iters = 5
    C.ppo.kl_coef = 0.05
    C.ppo.missing_eos_penalty = 1.0  # in standard deviations of the reward
    del C.ppo.max_new_tokens         # it is data.summary_tokens

    C.report = CN()
    C.report.samples = 500           # held-out texts that the sft model and PPO's summarize
    C.report.every = 10              # iterations of ppo between looks at some of them,
    C.report.looked_at = 128         # so many
    for stage in STAGES:
        if stage in C.to_dict():
            del getattr(C, stage).work_dir
    return tldr_defaults(C) if data == "tldr" else C


def tldr_defaults(C):
    """The sizes of Stiennon et al. 2020 and Huang et al. 2024 (table 1), on GPT-2 124M: for a GPU of 80 GB."""
    C.data.body_tokens, C.data.summary_tokens = 512, 53
    C.model.name, C.model.block_size = "gpt2", 1024
    C.sft.merge_from_dict({"epochs": 1, "batch_size": 128, "micro_batch_size": 16, "learning_rate": 3e-5})
    C.comparisons.centering = 0.0
    C.reward.merge_from_dict({"epochs": 1, "batch_size": 64, "micro_batch_size": 16, "learning_rate": 1e-5})
    C.ppo.merge_from_dict({"batch_size": 512, "group_size": None, "micro_batch_size": 32, "minibatch_size": 128, "max_iters": 500, "learning_rate": 3e-6,
                           "lr_schedule": "linear", "warmup_iters": 0, "ppo_epochs": 4, "temperature": 0.7, "kl_coef": 0.05, "missing_eos_penalty": 1.0})
    return C


def prepare(args, doc):
    """(config, corpus) of a command line: the options are checked and kept in the work_dir, and so is the corpus."""
    args = [re.sub(r"^--data(?==|$)", "--data.name", arg) for arg in args]
    name = re.search(r"--data\.name[= ](\S+)", " ".join(args))  # first, since other defaults depend on it
    config = get_config(name[1] if name else "docstrings")
    parse_args(config, args, doc)
    if config.data.name not in ("docstrings", "tldr"):
        raise ValueError(f"--data={config.data.name} must be docstrings or tldr; texts of your own go with --data.path=FILE")
    log_to_console()
    for extra in ("matplotlib", "rouge_score"):
        import_extra(extra, "projects")  # before the work, not after it
    work_dir = Path(config.system.work_dir)
    texts = corpus.load(config, work_dir / "data")
    free = {"system.work_dir", *(f"{stage}.{option}" for stage in STAGES for option in FREE_TO_CHANGE)}
    free |= {name for name, _ in config.leaves() if name.startswith("report.")}
    RunFolder(work_dir).claim(dict(config.leaves()) | {"vocabulary": texts.tokenizer_checksum}, free)
    return config, texts


# ---------------------------------------------------------------------------------------------------------------------
# what a stage leaves behind


def run_stage(config, stage, make_trainer):
    """Run a stage's trainer to its end, unless it is there."""
    if not finished(Path(config.system.work_dir) / stage):
        logger.info("%s", stage)
        make_trainer().run()


def trainer_config(config, stage, **extras):
    """The options of a stage's trainer. The judge is trained as the reward model is."""
    section = config.reward if stage == "judge" else getattr(config, stage)
    return CN(**section.to_dict(), **extras, work_dir=str(Path(config.system.work_dir) / stage))


def load_model(config, tokenizer, stage):
    """The model that a stage ended with; ValueError where it is not finished, or has another vocabulary than the tokenizer."""
    folder = Path(config.system.work_dir) / stage
    if (state := finished(folder)) is None:
        script = {"pretrain": "sft", "judge": "reward"}.get(stage, stage)
        raise ValueError(f"the stage {stage} is not finished in {folder.parent}: run {script}.py first, with the same options")
    weights = {name.removeprefix("policy."): weight for name, weight in state["model"].items() if not name.startswith("value_model.")}
    rows = len(weights["transformer.wte.weight"])
    if rows != tokenizer.vocab_size:
        raise ValueError(f"the model in {folder} has a vocabulary of {rows} tokens, the tokenizer in {folder.parent / 'data'} "
                         f"one of {tokenizer.vocab_size}: they are of two runs; choose another work_dir")
    sizes = folder.parent / "model.json"  # the sft stage's, which may have begun with weights of others
    model_options = CN(**json.loads(sizes.read_text(encoding="utf-8"))) if sizes.exists() else model_config(config, tokenizer)
    model = (RewardModel if "head.weight" in weights else GPT)(model_options)
    model.load_state_dict(weights)
    return model.to(distributed.join(pick_device(config.ppo.device))).eval()


def model_config(config, tokenizer):
    options = {name: value for name, value in config.model.to_dict().items() if name != "name"}
    return CN(**options, model_type=None, vocab_size=tokenizer.vocab_size)


def some(config, rows, n):
    """n rows, or all if there are fewer, drawn at random: neighbours are of one package."""
    return random.Random(config.system.seed).sample(rows, min(n, len(rows)))


def base_model(config, tokenizer):
    """What the sft stage starts from: weights of others, or the pre-trained model."""
    return GPT.from_pretrained(config.model.name) if config.model.name else load_model(config, tokenizer, "pretrain")


def write_json(path, thing):
    write_text(path, json.dumps(thing, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# sampling


@dataclass
class Summaries:
    """What a model wrote: texts, ids (N, T) behind left-padded prompts, masks (N, T), log-probs (N, T-1), and which ended by themselves."""
    texts: list
    idx: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    log_probs: torch.Tensor
    ended: torch.Tensor

    def lengths(self):
        """In tokens, end-of-text included."""
        return self.completion_mask.sum(1).float()


@torch.no_grad()
def summarize(config, model, tokenizer, prompts, seed, batch_size=256):
    """A summary of each prompt by a GPT, sampled as in ppo; the same for the same seed."""
    eot, n, parts = tokenizer.eot_token, config.data.summary_tokens, []
    encoded = [torch.tensor(tokenizer.encode(prompt)) for prompt in prompts]
    device = model.transformer.wte.weight.device
    generator, start = torch.Generator(device).manual_seed(seed), max(map(len, encoded))
    training = model.training
    model.eval()
    for i in tqdm(range(0, len(encoded), batch_size), "summaries", disable=None, leave=False):
        idx, mask = (x.to(device) for x in left_pad(encoded[i:i + batch_size]))
        out, log_probs = model.generate(idx, n, config.ppo.temperature, do_sample=True, attention_mask=mask, stop_token=eot,
                                        generator=generator, return_log_probs=True)
        left, right = start - idx.size(1), n - log_probs.size(1)
        written = written_mask(out, idx.size(1), eot)
        mask = torch.cat([mask, written[:, idx.size(1):]], dim=1)
        parts.append((F.pad(out, (left, right), value=eot), F.pad(mask, (left, right)), F.pad(written, (left, right)),
                      F.pad(log_probs, (start - 1, right))))
    model.train(training)
    idx, attention_mask, written, log_probs = map(torch.cat, zip(*parts))
    texts = [tokenizer.decode([token for token in row[mask].tolist() if token != eot]).strip() for row, mask in zip(idx, written)]
    return Summaries(texts, idx, attention_mask, written, log_probs, (written & (idx == eot)).any(1))


@torch.no_grad()
def judged(reward_model, texts, batch_size=256):
    """What a reward model says of each text, (N,): of `Summaries`, or of anything with idx and attention_mask."""
    parts = zip(texts.idx.split(batch_size), texts.attention_mask.split(batch_size))
    return torch.cat([reward_model(idx, mask) for idx, mask in parts]).cpu()


@torch.no_grad()
def kl_to(reference, summaries, temperature, batch_size=256):
    """KL(policy || reference) in nats per summary, estimated from what the policy wrote."""
    parts = zip(summaries.idx.split(batch_size), summaries.attention_mask.split(batch_size))
    log_probs = torch.cat([reference.log_probs(idx, mask, temperature) for idx, mask in parts])
    return ((summaries.log_probs - log_probs) * summaries.completion_mask[:, 1:]).sum(1).mean().item()


