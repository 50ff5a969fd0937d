"""
Reward functions that people bring along: on decoded text, and with every way they go wrong put into words.

A reward_fn takes (idx (B, T), attention_mask (B, T), completion_mask (B, T)) and returns a reward for each episode, (B,).
"""

import numbers
from collections.abc import Callable

import torch
from torch import Tensor

RewardFn = Callable[[Tensor, Tensor, Tensor], Tensor]


class RewardError(ValueError):
    """A reward function raised, or returned what is no reward; the message names the sample."""


class TextReward:
    """Makes a reward_fn of `f(completions, prompts) -> list of floats`, which sees decoded text without end-of-text.

    tokenizer: anything with `decode(list of ids)`; its `eot_token`, where it has one, is left out of the text.
    """

    def __init__(self, f: Callable[[list[str], list[str]], list[float]], tokenizer):
        self.f, self.tokenizer = f, tokenizer

    def __call__(self, idx: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        """The rewards, float32; ValueError or TypeError where f returned too few, or something that is no number."""
        end = getattr(self.tokenizer, "eot_token", None)

        def texts(mask):
            return [self.tokenizer.decode([i for i in row[keep].tolist() if i != end]) for row, keep in zip(idx, mask.bool())]

        completions = texts(completion_mask)
        rewards = self.f(completions, texts(attention_mask.bool() & ~completion_mask.bool()))
        rewards = rewards.tolist() if hasattr(rewards, "tolist") else list(rewards)
        if len(rewards) != len(completions):
            raise ValueError(f"f must return a reward for each of the {len(completions)} completions, not {len(rewards)}")
        for completion, reward in zip(completions, rewards):
            if not isinstance(reward, numbers.Real):
                raise TypeError(f"f gave {reward!r} for {completion!r}; a reward must be a number")
        return torch.tensor(rewards, dtype=torch.float32, device=idx.device)


def score(reward_fn: RewardFn, idx: Tensor, attention_mask: Tensor, completion_mask: Tensor, tokenizer=None) -> Tensor:
    """The rewards (B,), float32, all finite. RewardError where reward_fn raises or returns anything else."""
    def sample(row: int) -> str:
        ids = idx[row][attention_mask[row].bool()].tolist()
        return f"sample {row}, " + (f"text {tokenizer.decode(ids)!r}" if tokenizer else f"ids {ids}")

    try:
        scores = reward_fn(idx, attention_mask, completion_mask)
    except Exception as error:
        row = first_to_raise(reward_fn, idx, attention_mask, completion_mask)
        whose = "the batch, though for none of its samples alone" if row is None else sample(row)
        raise RewardError(f"reward_fn raised {type(error).__name__}: {error} -- for {whose}") from error
    if not torch.is_tensor(scores) or scores.shape != (len(idx),) or scores.is_complex():
        found = f"{tuple(scores.shape)}, {scores.dtype}" if torch.is_tensor(scores) else type(scores).__name__
        raise RewardError(f"reward_fn must return a tensor of shape ({len(idx)},), one real number an episode, not {found}")
    if not torch.isfinite(scores).all():
        row = int((~torch.isfinite(scores)).nonzero()[0])
        raise RewardError(f"reward_fn gave {scores[row]} to {sample(row)}")
    return scores.detach().float().to(idx.device)


def first_to_raise(reward_fn: RewardFn, *batch: Tensor) -> int | None:
    """The first row that reward_fn raises for when asked about it alone."""
    for row in range(len(batch[0])):
        try:
            reward_fn(*(x[row:row + 1] for x in batch))
        except Exception:
            return row
    return None
