"""
Models that give a number instead of a token: the reward model, which judges a text, and the value function, which foresees a return.

Both are a GPT's trunk with a linear head. Sources: Ziegler et al. 2019 (arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325),
Huang et al. 2024 (arXiv:2403.17031).
"""

import torch
from torch import Tensor, nn

from mingpt.model import GPT, Transformer, last_real, resolve_config
from mingpt.utils import CfgNode as CN
from mingpt.weights import Pretrained


def needed(idx: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask, or None where all padding is on the right: causal attention never looks there, and is faster without.

    A GPU would have to be waited for to know: there the mask stays.
    """
    if attention_mask is None or attention_mask.shape != idx.shape or attention_mask.device.type != "cpu":
        return attention_mask
    mask = attention_mask.bool()
    return None if mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all() else attention_mask


class ScalarModel(Pretrained, nn.Module):
    """A GPT's trunk and a linear head to one number per position."""

    presets, get_default_config = GPT.presets, staticmethod(GPT.get_default_config)
    head_scale = 0.0

    def __init__(self, config: CN):
        super().__init__()
        self.config = resolve_config(config)
        self.transformer = Transformer(self.config)
        self.head = nn.Linear(self.config.n_embd, 1)
        nn.init.normal_(self.head.weight, std=self.head_scale * (self.config.n_embd + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_gpt(cls, model: "GPT | ScalarModel"):
        """A new model whose trunk starts as a copy of model's; so does the head where model has one of this kind, else it is fresh."""
        new = cls(model.config)
        new.transformer.load_state_dict(model.transformer.state_dict())
        if isinstance(model, ScalarModel):
            new.head.load_state_dict(model.head.state_dict())
        return new.to(next(model.parameters()).device)

    def scores(self, idx: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The head's output at every position: (B, T) -> (B, T). ValueError where T is longer than block_size."""
        return self.head(self.transformer(idx, needed(idx, attention_mask))).squeeze(-1)


class ValueModel(ScalarModel):
    """V(s): the return that the policy can expect from each prefix. forward(idx (B, T), attention_mask) -> (B, T).

    From a policy, the head starts at zero, so that an untrained value function is silent, not wrong (Ziegler et al.'s code); from a
    reward model, it starts as that model's (Stiennon et al. 2020).
    """

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.scores(idx, attention_mask)


class ValueHead(nn.Linear):
    """V(s) read off the policy's own trunk, which then serves both (Ziegler et al. 2019): hidden states (B, T, C) -> (B, T)."""

    def __init__(self, n_embd: int):
        super().__init__(n_embd, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).squeeze(-1)


class RewardModel(ScalarModel):
    """One number for a whole text, read at its last real token. forward(idx (B, T), attention_mask) -> (B,).

    It is a reward_fn as it stands; the completion_mask that PPOTrainer hands to reward functions is not needed. The head
    starts as N(0, 1/(C+1)) (Stiennon et al. 2020).
    """

    head_scale = 1.0

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None, completion_mask: Tensor | None = None) -> Tensor:
        scores = self.scores(idx, attention_mask)
        if attention_mask is None:
            return scores[:, -1]
        return scores.gather(1, last_real(attention_mask)[:, None])[:, 0]

    @torch.no_grad()
    def normalize(self, scores: Tensor, unit_variance: bool = False) -> None:
        """Shift the head, and with unit_variance scale it, as takes these scores of its own to mean 0 (and variance 1).

        They are those of reference texts: samples of the policy to be trained (Ziegler et al. 2019) or human ones (Stiennon et al.
        2020). Bradley-Terry leaves the mean free, and kl_coef is in units of the reward: both want it fixed.
        """
        std = scores.std(unbiased=False) if unit_variance else torch.tensor(1.0)
        if not std > 0:
            raise ValueError(f"{len(scores)} equal scores cannot be scaled to variance 1: pass those of different texts")
        self.head.bias.copy_((self.head.bias - scores.mean()) / std)
        self.head.weight.div_(std)
