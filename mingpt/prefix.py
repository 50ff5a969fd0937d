"""
Read a prompt once, however many completions it has.

Prompts are long and completions are short: up to 512 and 53 tokens in TL;DR. PPO may sample
several episodes of each prompt, and a comparison holds two or more completions of one prompt.
So read each prompt once, keep its keys and values, and let all its completions attend to
them. Gradients flow through the keys and values, too. So training gives the same result as
reading every row in full.
"""

import torch
from torch import Tensor, nn

from mingpt.trunk import check_mask_values
from mingpt.utils import check_tensors


class Prefix:
    """The keys and values of a batch of prompts, for the completions to attend to.

    A trunk takes it in place of its KVCache. Two things are different: gradients flow through
    it, and each prompt serves `rows_per_prompt` adjacent rows.
    """

    def __init__(self, rows_per_prompt: int):
        self.rows_per_prompt = rows_per_prompt
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer
        self.length = 0  # columns of the prompts; the trunk sets it

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take an attention layer's new keys and values, and return all that it may attend to.

        Each layer calls it twice. The prompts come first, with k and v (N, nh, P, hs) each:
        they are kept and returned. Then come the completions, with k and v
        (N * rows_per_prompt, nh, T, hs) each: they are returned with the prompts' before them,
        (N * rows_per_prompt, nh, P + T, hs).
        """
        # The prompts.
        if layer == len(self.layers):
            self.layers.append((k, v))
            return k, v

        # The completions. Repeat each prompt's keys and values for every row that continues it.
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
    """The trunk's hidden states after the prefix: (B, T) -> (B, T - prefix_length, C).

    The prefix is the first prefix_length columns. Each rows_per_prompt adjacent rows must be
    equal there, padding included, because only the first of them is read there.
    """
    # Nothing to save: read every row in full.
    if rows_per_prompt == 1 or prefix_length == 0:
        return trunk(idx, needed_mask(idx, attention_mask))[:, prefix_length:]

    # Read each prompt once, (B / rows_per_prompt, prefix_length). Its keys and values are kept
    # in the prefix. Its hidden states are not needed.
    if attention_mask is None:
        attention_mask = torch.ones_like(idx, dtype=torch.bool)
    prefix = Prefix(rows_per_prompt)
    prompts = idx[::rows_per_prompt, :prefix_length]
    prompt_mask = attention_mask[::rows_per_prompt, :prefix_length]
    trunk(prompts, prompt_mask, prefix)

    # Then read what follows the prompt in each row, (B, T - prefix_length).
    return trunk(idx[:, prefix_length:], attention_mask, prefix)


def needed_mask(idx: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask if the trunk needs it; None if all padding is on the right.

    Causal attention never looks to the right, and it is faster without an explicit mask.
    Checking would force a GPU sync, so on a GPU the mask is kept.
    """
    if attention_mask is None:
        return None
    check_tensors(idx=idx, attention_mask=attention_mask)
    check_mask_values(attention_mask)  # the trunk would, but does not get a mask that it needs not
    if attention_mask.device.type != "cpu" or attention_mask.shape != idx.shape:
        return attention_mask  # the trunk will say what is wrong with it
    mask = attention_mask.bool()
    no_padding_first = mask[:, 0].all()
    no_token_after_padding = (mask[:, 1:] <= mask[:, :-1]).all()
    if no_padding_first and no_token_after_padding:
        return None
    return attention_mask
