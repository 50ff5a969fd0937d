"""
What every trunk has in common: its interface, attention masks, and the cache of keys and values.

A trunk reads token ids and gives a vector of C channels for each of them, for a head to read. There
are two, GPT-2's (model.py) and the Llama family's (llama.py), and whoever uses one needs to know
no more than `Trunk` below. They differ in what a block computes. They agree in what stands here:
which keys a query may look at, how positions are counted, what a cache keeps, how weights start.

Shapes in the comments: B batch, T time (tokens), C channels (n_embd), nh heads (of keys and
values), hs head size, S keys that a query may look at (T, and what a cache holds).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mingpt.config import CfgNode as CN
from mingpt.utils import check_tensors


class Trunk(nn.Module):
    """The interface of a trunk: token ids (B, T) -> hidden states (B, T, C).

    A language model is a trunk and a head over the vocabulary; a reward model or a value function
    is a trunk and a head to one number (heads.py).
    """

    config: CN
    options: ClassVar[tuple[str, ...]] = ()  # those of the config that only this trunk has
    slides: ClassVar[bool] = False  # whether `generate` may go past block_size

    @property
    def embedding(self) -> nn.Embedding:
        """The embedding of the tokens, (V, C), which a tied head shares."""
        raise NotImplementedError

    @classmethod
    def complete(cls, config: CN) -> None:
        """Fill in the trunk's own options where they are None. ValueError if any is wrong."""
        raise NotImplementedError

    def forward(
        self,
        idx: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """idx (B, T), attention_mask (B, S) -> hidden states (B, T, C).

        A cache holds the S - T tokens before idx: it is read, and then holds idx as well.
        """
        raise NotImplementedError

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache of this trunk's shapes, type and device, for `forward`."""
        raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# which keys a query may look at, and where a token stands


def visible_keys(
    T: int,
    S: int,
    attention_mask: Tensor | None,
    device: torch.device,
    window: int | None = None,
) -> Tensor | None:
    """Which of S keys the last T tokens may look at: bool, True = yes; (T, S) or (B, 1, T, S).

    With a window, a token sees only that many tokens: itself and those right before it.
    None where attention needs no explicit mask. Without padding, that is so for a single query,
    which sees every key, and for T queries over T keys, which are plainly causal.
    """
    if window is not None and window >= S:
        window = None  # it ends before the first token: nothing is out of sight
    if attention_mask is None and window is None and T in (1, S):
        return None
    # Query t is token S - T + t; it sees itself and all tokens before it.
    visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if window is not None:
        # The distance from query to key is counted in positions, and so without padding.
        positions = count_positions(S, attention_mask, device)  # (S,) or (B, S)
        distance = positions[..., S - T:, None] - positions[..., None, :]  # (T, S) or (B, T, S)
        visible = visible & (distance < window)
    if attention_mask is None:
        return visible
    # Nobody sees padding, but padding must see something: a softmax over no keys would be NaN, and
    # NaN spreads to the real rows. So each token also sees itself.
    itself = torch.eye(S, dtype=torch.bool, device=device)[S - T:]  # (T, S)
    real = attention_mask.bool()[:, None, :]  # (B, 1, S)
    return (visible & real | itself)[:, None]  # the same for all heads


def count_positions(
    S: int,
    attention_mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """The positions of S tokens: 0, 1, 2, ... as (S,); with an attention_mask (B, S) as (B, S).

    Only real tokens are counted, so that padding moves no token to another position.
    """
    if attention_mask is None:
        return torch.arange(S, device=device)
    real = attention_mask.bool().long()
    return (real.cumsum(1) - 1).clamp(min=0)


# --------------------------------------------------------------------------------------------------
# what was read before


class KVCache:
    """The keys and values of all tokens that were read, so that none is read twice.

    `keys` and `values` hold (B, nh, max_length, hs) for each layer, allocated once, with the type
    and device of `like`. Their first `length` columns are filled: each layer appends to its own,
    and then the trunk sets `length`.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        n_head: int,
        max_length: int,
        head_size: int,
        like: Tensor,
    ):
        shape = (batch_size, n_head, max_length, head_size)
        self.keys = [like.new_empty(shape) for _ in range(n_layer)]
        self.values = [like.new_empty(shape) for _ in range(n_layer)]
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v of new tokens, (B, nh, T, hs) each, to those that `layer` has.

        Returns all of them, the old ones first: (B, nh, length + T, hs) each.
        """
        keys, values = self.keys[layer], self.values[layer]
        end = self.length + k.size(2)
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]


# --------------------------------------------------------------------------------------------------
# how weights start


def init_weights(module: nn.Module) -> None:
    """GPT-2's initialisation: N(0, 0.02) for weights, zero for biases (Radford et al. 2019)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def init_residual_projections(trunk: nn.Module, names: tuple[str, ...], n_layer: int) -> None:
    """Smaller weights for the layers of these names, whose outputs join the residual stream.

    There are two of them in each of n_layer blocks. The scale keeps the variance of their sum from
    growing with depth (Radford et al. 2019, section 2.3).
    """
    endings = tuple(f"{name}.weight" for name in names)
    for name, p in trunk.named_parameters():
        if name.endswith(endings):
            nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * n_layer))


# --------------------------------------------------------------------------------------------------
# checks of what a trunk is given


def check_context(
    idx: Tensor,
    attention_mask: Tensor | None,
    past: int,
    block_size: int,
) -> None:
    """ValueError unless idx and attention_mask have the right shapes and fit into block_size."""
    check_idx(idx)
    B, total = idx.size(0), past + idx.size(1)
    if attention_mask is not None:
        check_tensors(attention_mask=attention_mask)
        if attention_mask.shape != (B, total):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {(B, total)}"
            )
    check_mask_values(attention_mask)
    if total <= block_size:
        return
    # Padding takes no position, so padded rows may be longer. Counting forces a GPU sync, but only
    # for batches as wide as this.
    if attention_mask is None or attention_mask.bool().sum(1).max() > block_size:
        raise ValueError(
            f"a sequence of {total} tokens is longer than block_size={block_size}: "
            "shorten it to the tokens that matter, such as the last ones"
        )


def check_idx(idx: Any) -> None:
    """TypeError or ValueError for anything but a (B, T) tensor of whole numbers."""
    if not isinstance(idx, Tensor):
        raise TypeError(f"idx is a {type(idx).__name__}; it must be a (B, T) LongTensor")
    if idx.dtype not in (torch.long, torch.int):
        raise ValueError(f"idx is {idx.dtype}; token ids are a LongTensor: idx.long()")
    if idx.dim() != 2:
        raise ValueError(
            f"idx has shape {tuple(idx.shape)}; it must be (B, T): "
            "add the batch dimension with idx[None]"
        )


def check_mask_values(mask: Tensor | None) -> None:
    """ValueError for a mask with other values than 0 and 1, such as 0.5 or 2.

    On a GPU this would force a sync. There, every value but 0 counts as 1.
    """
    if mask is None or mask.dtype == torch.bool or mask.device.type != "cpu":
        return
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"a mask holds values from {mask.min()} to {mask.max()}; it must hold 1 (or True) for "
            "what counts, and 0 (or False) for the rest"
        )


def check_ids(idx: Tensor, vocab_size: int) -> None:
    """ValueError if idx holds an id outside the vocabulary. Forces a GPU sync."""
    if idx.numel() == 0:
        return
    low, high = idx.min(), idx.max()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"idx holds ids from {low} to {high}; the vocabulary has 0 to {vocab_size - 1}"
        )
