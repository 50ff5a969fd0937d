"""
Benchmarks of a real model's size, with low-rank adapters: against transformers, peft and trl.

The model has the shape of SmolLM2-135M, with random weights. Adapters have rank 16, on all linear
layers of the blocks. Everything is fp32, on a card too.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from measure import DEVICE, Case, Run
from mingpt import lora
from mingpt.config import CfgNode
from mingpt.rlhf import PPOTrainer, RewardModel, ValueModel
from mingpt.utils import import_extra
from models import SMOLLM2, our_smollm2, their_smollm2
from training import training_step

RANK = 16
GROUP_SIZE = 4
PROMPT_LENGTH = 8


# ----------------------------------------------------------------------------------------------
# one training step


def train(config: CfgNode) -> Iterator[Case]:
    """A training step of the whole model, and of an adapter on it."""
    B, T = 32, 24
    idx = torch.randint(SMOLLM2["vocab_size"], (B, T + 1), device=DEVICE)
    for rank in (None, RANK):
        kind = "full" if rank is None else f"LoRA rank {rank}"
        yield Case(
            work=f"training step, smollm2, {kind}, {B} x {T} tokens",
            unit="tokens",
            amount=B * T,
            ours=partial(our_training_step, rank, idx),
            peer="transformers" if rank is None else "transformers + peft",
            theirs=partial(their_training_step, rank, idx),
            slow=True,
        )


def our_training_step(rank: int | None, idx: Tensor) -> Run:
    model = our_adapted(rank)
    x = idx[:, :-1].contiguous()
    y = idx[:, 1:].contiguous()
    return training_step(model, lambda: model(x, y)[1])


def their_training_step(rank: int | None, idx: Tensor) -> Run:
    model = their_adapted(rank)
    x = idx[:, :-1].contiguous()
    return training_step(model, lambda: model(x, labels=x, use_cache=False).loss)


def our_adapted(rank: int | None = RANK):
    model = our_smollm2().to(DEVICE)
    if rank is not None:
        lora.add(model, rank, alpha=2 * rank)
    return model


def their_adapted(rank: int | None = RANK):
    model = their_smollm2().to(DEVICE)
    if rank is None:
        return model
    return import_extra("peft", "bench").get_peft_model(model, their_lora(rank))


def their_lora(rank: int):
    """The config of the same adapter in peft."""
    return import_extra("peft", "bench").LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


# ----------------------------------------------------------------------------------------------
# GRPO


def grpo(config: CfgNode) -> Iterator[Case]:
    """An iteration of GRPO: one optimizer step on a rollout, with the KL to the reference."""
    episodes, length = 64, 24
    yield Case(
        work=(
            f"GRPO iteration, smollm2, LoRA rank {RANK}, {episodes} episodes of {PROMPT_LENGTH} + "
            f"{length} tokens in groups of {GROUP_SIZE}"
        ),
        unit="episodes",
        amount=episodes,
        ours=partial(our_grpo, episodes, length),
        peer="trl + peft",
        theirs=partial(their_grpo, episodes, length),
        slow=True,
    )


def random_prompts(count: int) -> list[list[int]]:
    """Lists of token ids, the same ones for both sides."""
    generator = torch.Generator().manual_seed(0)
    size = (count, PROMPT_LENGTH)
    return torch.randint(SMOLLM2["vocab_size"] - 2, size, generator=generator).tolist()


def our_grpo(episodes: int, length: int) -> Run:
    def even_tokens(idx: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        """The score: the share of even ids among those that were written."""
        return ((idx % 2 == 0) & completion_mask).sum(1) / length

    config = ppo_config("grpo", episodes, length, group_size=GROUP_SIZE, ppo_epochs=1)
    prompts = random_prompts(episodes // GROUP_SIZE)
    trainer = PPOTrainer(config, our_adapted(), even_tokens, prompts)
    return one_iteration(trainer)


def ppo_config(algorithm: str, episodes: int, length: int, **options) -> CfgNode:
    config = PPOTrainer.get_default_config()
    config.merge_from_dict(
        {
            "device": str(DEVICE),
            "precision": "fp32",
            "algorithm": algorithm,
            "batch_size": episodes,
            "max_new_tokens": length,
            "max_iters": 1,
            **options,
        }
    )
    return config


def one_iteration(trainer: PPOTrainer) -> Run:
    def run() -> None:
        trainer.config.max_iters = trainer.iter_num + 1
        trainer.run()

    return run


def their_grpo(episodes: int, length: int) -> Run:
    trl = import_extra("trl", "bench")
    datasets = import_extra("datasets", "bench")
    args = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=episodes,
        num_generations=GROUP_SIZE,
        max_completion_length=length,
        max_steps=1,
        num_iterations=1,
        beta=0.04,
        learning_rate=1e-4,
        temperature=1.0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=DEVICE.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,  # neither side computes anything twice to save memory
    )
    prompts = [" ".join(map(str, ids)) for ids in random_prompts(episodes // GROUP_SIZE)]

    def even_tokens(completions: list[str], **columns) -> list[float]:
        """The same score: completions are numbers with spaces between them."""
        return [sum(int(x) % 2 == 0 for x in text.split()) / length for text in completions]

    trainer = trl.GRPOTrainer(
        their_smollm2(),
        reward_funcs=even_tokens,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=their_tokenizer(),
        peft_config=their_lora(RANK),
    )

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()

    return run


def their_tokenizer():
    """A tokenizer whose words are numbers."""
    tokenizers = import_extra("tokenizers", "bench")
    transformers = import_extra("transformers", "bench")
    last = SMOLLM2["vocab_size"] - 1
    vocabulary = {str(i): i for i in range(last + 1)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=str(last),
        eos_token=str(last - 1),
    )


# ----------------------------------------------------------------------------------------------
# PPO


def ppo(config: CfgNode) -> Iterator[Case]:
    """The memory of PPO with policy, value function and reward model on one trunk.

    It is compared with that of a training step of the policy alone, on as many tokens.
    """
    B, T = 32, 24
    idx = torch.randint(SMOLLM2["vocab_size"], (B, T + 1), device=DEVICE)
    yield Case(
        work=(
            f"PPO iteration, smollm2, adapters for policy, value and reward, {B} episodes of "
            f"{PROMPT_LENGTH} + {T - PROMPT_LENGTH} tokens"
        ),
        unit="iterations",
        amount=1,
        ours=partial(our_ppo, B, T - PROMPT_LENGTH),
        peer="its own training step with LoRA",
        theirs=partial(our_training_step, RANK, idx),
        memory_only=True,
        slow=True,
    )


def our_ppo(episodes: int, length: int) -> Run:
    policy = our_adapted()
    reward_model = RewardModel.on(policy)
    config = ppo_config("ppo", episodes, length)
    value_model = ValueModel.on(reward_model)
    prompts = random_prompts(episodes)
    return one_iteration(PPOTrainer(config, policy, reward_model, prompts, value_model))
