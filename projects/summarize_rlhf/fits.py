"""
Does TL;DR fit on this device? Seconds and peak memory of a step of each stage.

    python projects/summarize_rlhf/fits.py                        summarize_rlhf.py --data=tldr
    python projects/summarize_rlhf/fits.py --ppo.micro_batch_size=8         any option of that

The sizes are those of the options, and all texts have full length. Weights and texts are random, so
nothing is downloaded.
"""

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import pipeline
from mingpt.checkpoint import run_script
from mingpt.config import CfgNode as CN, parse_args
from mingpt.model import GPT
from mingpt.rlhf import PPOTrainer, RewardModel, ValueModel, comparison_loss
from mingpt.trainer import Trainer
from mingpt.utils import peak_memory_mb, pick_device, set_seed

STEPS = 2  # the first warms up, the last is timed


def main(args: list[str]) -> None:
    config = pipeline.get_config("tldr")
    config.model.vocab_size = 50257
    config.model.merge_from_dict({"n_layer": 12, "n_head": 12, "n_embd": 768})  # GPT-2 124M
    parse_args(config, args, __doc__)
    device = pick_device(config.ppo.device)
    for stage, make_trainer in (("sft", sft), ("reward", reward), ("ppo", ppo)):
        set_seed(config.system.seed)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainer = make_trainer(config)
        trainer.run()
        print(
            f"{stage:8}{trainer.iter_dt:10.2f} s{peak_memory(device):>16}"
            f"   a step of {trainer.config.batch_size} on {device}",
            flush=True,
        )
        del trainer  # its memory is free for the next stage


def peak_memory(device: torch.device) -> str:
    """The most memory held: on the card by this stage, or else by the process so far."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    peak = peak_memory_mb()
    if peak is None:
        return "memory unknown"
    return f"{peak / 2**10:.1f} GiB"


# --------------------------------------------------------------------------------------------------
# a trainer for each stage


def sft(config: CN) -> Trainer:
    """Fine-tuning, with the loss on the last summary_tokens tokens."""
    idx = random_texts(config, config.sft.batch_size)
    is_prompt = torch.arange(idx.size(1)) < config.data.body_tokens
    targets = idx.masked_fill(is_prompt, -1)
    data = TensorDataset(idx[:, :-1], targets[:, 1:])
    return Trainer(short_run(config, "sft"), random_gpt(config), data)


def reward(config: CN) -> Trainer:
    """A reward model, with two summaries of each text to compare."""
    idx = random_texts(config, config.reward.batch_size, 2)  # (B, 2, T)
    is_summary = torch.arange(idx.size(2)) >= config.data.body_tokens
    completion_mask = is_summary.expand_as(idx)
    idx = torch.where(completion_mask, idx, idx[:, :1])  # both summaries are of the first's prompt
    data = TensorDataset(idx, torch.ones_like(completion_mask), completion_mask)
    model = RewardModel.from_gpt(random_gpt(config))
    return Trainer(short_run(config, "reward"), model, data, loss_fn=comparison_loss)


def ppo(config: CN) -> PPOTrainer:
    """PPO, with a policy, a reference, a reward model and a value function of the same size."""
    policy = random_gpt(config)
    reward_model = RewardModel.from_gpt(policy)
    # random texts do not end, and there is no tokenizer to know the end-of-text token from
    options = short_run(
        config,
        "ppo",
        max_new_tokens=config.data.summary_tokens,
        missing_eos_penalty=0.0,
    )
    prompts = random_texts(config, config.ppo.batch_size)[:, : config.data.body_tokens]
    value_model = None if options.shared_trunk else ValueModel.from_gpt(reward_model)
    return PPOTrainer(options, policy, reward_model, prompts, value_model=value_model)


def short_run(config: CN, stage: str, **others) -> CN:
    """A stage's options, for a trainer that takes STEPS steps and writes nothing."""
    section = getattr(config, stage).to_dict()
    ends = {"max_iters": STEPS, "epochs": None, "work_dir": None}
    return CN(**{**section, **ends, **others})


def random_texts(config: CN, *shape: int) -> Tensor:
    """Token ids, (*shape, body_tokens + summary_tokens)."""
    length = config.data.body_tokens + config.data.summary_tokens
    return torch.randint(config.model.vocab_size, (*shape, length))


def random_gpt(config: CN) -> GPT:
    return GPT(pipeline.model_config(config, config.model.vocab_size))


if __name__ == "__main__":
    run_script(main)
