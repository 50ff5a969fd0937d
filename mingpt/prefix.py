"""
A prompt that several completions continue, read once.

Prompts are long and completions are short: 512 and 53 tokens in TL;DR. PPO samples several
episodes of each prompt, and a comparison holds two or more completions of one prompt. The
keys and values of such a prompt are computed once, and all its completions attend to them.
Gradients flow through them, too, so training gives the same result as reading every row by
itself.
"""

import torch
from torch import Tensor, nn


class Prefix:
    """Keys and values of a batch of prompts, for the rows that continue them.

    It stands in for the trunk's KVCache. Two things are different: gradients flow through
    it, and each prompt serves `rows_per_prompt` adjacent rows.
    """

    def __init__(self, rows_per_prompt: int):
        self.rows_per_prompt = rows_per_prompt
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer
        self.length = 0  # columns of the prompts; the trunk sets it

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Called by each attention layer with its new keys and values; returns all it may look at.

        First with the prompts' keys and values (prompts, nh, T, hs), which are kept; then
        with those of the completions (prompts * rows_per_prompt, nh, T', hs), to which the
        prompts' are joined: (prompts * rows_per_prompt, nh, T + T', hs).
        """
        if layer == len(self.layers):
            self.layers.append((k, v))
            return k, v
        prompt_k, prompt_v = self.layers[layer]
        prompt_k = prompt_k.repeat_interleave(self.rows_per_prompt, dim=0)
        prompt_v = prompt_v.repeat_interleave(self.rows_per_prompt, dim=0)
        return torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)


def hidden_states(
    trunk: nn.Module,
    idx: Tensor,
    attention_mask: Tensor | None,
    prefix_length: int = 0,
    rows_per_prompt: int = 1,
) -> Tensor:
    """The trunk's hidden states behind the prefix: (B, T) -> (B, T - prefix_length, C).

    Each rows_per_prompt adjacent rows must be equal in their first prefix_length columns,
    padding included: only the first row of them is read there.
    """
    # Nothing is shared: one pass over everything.
    if rows_per_prompt == 1 or prefix_length == 0:
        return trunk(idx, needed_mask(idx, attention_mask))[:, prefix_length:]
    if attention_mask is None:
        attention_mask = torch.ones_like(idx, dtype=torch.bool)
    # First the prompts, once each, (B / rows_per_prompt, prefix_length). Their keys and values are
    # kept, their hidden states are not needed. Then all rows continue from there.
    prefix = Prefix(rows_per_prompt)
    prompts = idx[::rows_per_prompt, :prefix_length]
    prompt_mask = attention_mask[::rows_per_prompt, :prefix_length]
    trunk(prompts, prompt_mask, prefix)  # fills the prefix
    return trunk(idx[:, prefix_length:], attention_mask, prefix)


def needed_mask(idx: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask, or None if all padding is on the right.

    Causal attention never looks to the right, and it is faster without an explicit mask.
    Checking would force a GPU sync, so on a GPU the mask is kept.
    """
    if attention_mask is None or attention_mask.device.type != "cpu":
        return attention_mask
    if attention_mask.shape != idx.shape:
        return attention_mask  # the trunk will say what is wrong with it
    mask = attention_mask.bool()
    starts_real = mask[:, 0].all()
    never_resumes = (mask[:, 1:] <= mask[:, :-1]).all()
    return None if starts_real and never_resumes else attention_mask
