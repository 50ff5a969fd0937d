"""
Does TL;DR fit on this device? One step of each stage at its sizes, on random weights and texts: seconds, and memory at the peak.

    python projects/summarize_rlhf/fits.py                                     the options of summarize_rlhf.py --data=tldr
    python projects/summarize_rlhf/fits.py --ppo.batch_size=64 --ppo.micro_batch_size=8
"""

import resource

import torch
from torch.utils.data import TensorDataset

import pipeline
from mingpt.checkpoint import run_script
from mingpt.model import GPT
from mingpt.rlhf import PPOTrainer, RewardModel, ValueModel, comparison_loss
from mingpt.trainer import Trainer
from mingpt.config import CfgNode as CN, parse_args
from mingpt.utils import pick_device, set_seed

STEPS = 2  # of which the last is timed: the first warms up


def main(args):
    config = pipeline.get_config("tldr")
    config.model.vocab_size = 50257
    config.model.merge_from_dict({"n_layer": 12, "n_head": 12, "n_embd": 768})  # GPT-2 124M
    parse_args(config, args, __doc__)
    device = pick_device(config.ppo.device)
    for name, make_trainer in (("sft", sft), ("reward", reward), ("ppo", ppo)):
        set_seed(config.system.seed)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainer = make_trainer(config)
        trainer.run()
        of_process = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else of_process
        print(f"{name:8}{trainer.iter_dt:10.2f} s{memory / 2**30:10.1f} GiB   a step of {trainer.config.batch_size} on {device}", flush=True)
        del trainer


def options(config, stage, **extras):
    """A stage's, for a trainer that takes a few steps and writes nothing."""
    return CN(**getattr(config, stage).to_dict() | {"max_iters": STEPS, "epochs": None, "work_dir": None} | extras)


def texts(config, *shape):
    """Random texts at full length."""
    return torch.randint(config.model.vocab_size, (*shape, config.data.body_tokens + config.data.summary_tokens))


def gpt(config):
    return GPT(CN(**{name: value for name, value in config.model.to_dict().items() if name != "name"}, model_type=None))


def sft(config):
    """The loss of the last summary_tokens."""
    idx = texts(config, config.sft.batch_size)
    targets = torch.where(torch.arange(idx.size(1)) < config.data.body_tokens, -1, idx)
    return Trainer(options(config, "sft"), gpt(config), TensorDataset(idx[:, :-1], targets[:, 1:]))


def reward(config):
    """Comparisons of two summaries of one text each."""
    idx = texts(config, config.reward.batch_size, 2)
    written = (torch.arange(idx.size(2)) >= config.data.body_tokens).expand_as(idx)
    data = TensorDataset(torch.where(written, idx, idx[:, :1]), torch.ones_like(written), written)
    return Trainer(options(config, "reward"), RewardModel.from_gpt(gpt(config)), data, loss_fn=comparison_loss)


def ppo(config):
    """Policy, reference, reward model and value function, all of the same size."""
    policy = gpt(config)
    reward_model = RewardModel.from_gpt(policy)
    C = options(config, "ppo", max_new_tokens=config.data.summary_tokens, missing_eos_penalty=0.0)  # these texts do not end
    return PPOTrainer(C, policy, reward_model, texts(config, config.ppo.batch_size)[:, :config.data.body_tokens],
                      value_model=None if C.shared_trunk else ValueModel.from_gpt(reward_model))


if __name__ == "__main__":
    run_script(main)
