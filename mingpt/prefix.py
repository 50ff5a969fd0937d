"""
Several completions of one prompt: its keys and values are computed once, and all of them read on from there, gradients included.

Prompts are long and completions short: 512 and 53 tokens for TL;DR. PPO samples group_size episodes of each prompt, and a comparison
is of two or more completions of the same one; so the reading of prompts, most of the work, is divided by their number.
"""

import torch
from torch import Tensor

from mingpt.model import Transformer


class Prefix:
    """A cache for the trunk, as KVCache is, that gradients flow through: it keeps a prompt for the group_size rows that go on from it."""

    def __init__(self, group_size: int):
        self.group_size, self.layers, self.length = group_size, [], 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the prompts' k and v, (B, nh, T, hs); put those of `layer` before the completions', (B * group_size, nh, T, hs)."""
        if layer == len(self.layers):
            self.layers.append((k, v))
            return k, v
        k, v = (torch.cat([past.repeat_interleave(self.group_size, 0), new], dim=2) for past, new in zip(self.layers[layer], (k, v)))
        return k, v


def read(trunk: Transformer, idx: Tensor, attention_mask: Tensor | None, start: int = 0, group_size: int = 1) -> Tensor:
    """The trunk's hidden states of the columns from start on: (B, T) -> (B, T - start, C).

    Each group_size adjacent rows must be equal before start, padding included: of them, the first one's is read.
    """
    if group_size == 1 or start == 0:
        return trunk(idx, needed(idx, attention_mask))[:, start:]
    prefix = Prefix(group_size)
    trunk(idx[::group_size, :start], attention_mask[::group_size, :start], prefix)
    return trunk(idx[:, start:], attention_mask, prefix)


def needed(idx: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask, or None where all padding is on the right: causal attention never looks there, and is faster without.

    A GPU would have to be waited for to know: there the mask stays.
    """
    if attention_mask is None or attention_mask.shape != idx.shape or attention_mask.device.type != "cpu":
        return attention_mask
    mask = attention_mask.bool()
    return None if mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all() else attention_mask
