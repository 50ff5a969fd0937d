"""
Models that give a number instead of a token: the reward model, which judges a text, and the value function, which foresees a return.

Both are a GPT's trunk with a linear head; `ActorCritic` joins value function and policy. Sources: Ziegler et al. 2019
(arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325), Huang et al. 2024 (arXiv:2403.17031).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt.model import GPT, Transformer, last_real, resolve_config, token_log_probs
from mingpt.prefix import needed, read
from mingpt.config import CfgNode as CN
from mingpt.utils import adamw
from mingpt.weights import Pretrained


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

    def scores(self, idx: Tensor, attention_mask: Tensor | None = None, start: int = 0, group_size: int = 1) -> Tensor:
        """The head's output at the columns from start on, of rows that share their beginnings as in `read`: (B, T) -> (B, T - start).

        ValueError where a row has more tokens than block_size.
        """
        return self.head(read(self.transformer, idx, attention_mask, start, group_size)).squeeze(-1)


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


class ActorCritic(nn.Module):
    """Policy and value function (a ValueModel, any module with its forward, a ValueHead on the policy's trunk, or None) as one module."""

    def __init__(self, policy: nn.Module, value_model: nn.Module | None = None):
        super().__init__()
        self.policy = policy
        self.value_model = value_model

    def forward(self, idx: Tensor, attention_mask: Tensor, temperature: float = 1.0, start: int = 0,
                group_size: int = 1) -> tuple[Tensor, Tensor]:
        """(log_probs, values), both (B, T-1): of the actions idx[:, 1:], and of the states before them.

        Of a GPT only those from column start on, zeros before: prompts need not go through the vocabulary's large matrix. Nor need
        they be read for each of the group_size adjacent rows which continue the same one: before start, rows of a group are equal.
        """
        if not isinstance(self.policy, GPT):
            return self.policy.log_probs(idx, needed(idx, attention_mask), temperature), self.values(idx, attention_mask)
        hidden = read(self.policy.transformer, idx[:, :-1], attention_mask[:, :-1], start, group_size)
        log_probs = token_log_probs(self.policy.lm_head(hidden), idx[:, start + 1:], temperature)
        shared = isinstance(self.value_model, ValueHead)
        values = F.pad(self.value_model(hidden), (start, 0)) if shared else self.values(idx, attention_mask, start, group_size)
        return F.pad(log_probs, (start, 0)), values

    def values(self, idx: Tensor, attention_mask: Tensor, start: int = 0, group_size: int = 1) -> Tensor:
        """V of each state, (B, T-1): value(idx)[:, :-1], and by causality the last token need not even be read. Without a critic, 0."""
        states = idx[:, :-1], attention_mask[:, :-1]
        if self.value_model is None:
            return torch.zeros(states[0].shape, device=idx.device)
        if isinstance(self.value_model, ValueHead):
            return F.pad(self.value_model(read(self.policy.transformer, *states, start, group_size)), (start, 0))
        if isinstance(self.value_model, ValueModel):
            return F.pad(self.value_model.scores(*states, start, group_size), (start, 0))
        return self.value_model(*states)

    def configure_optimizers(self, train_config):
        """AdamW over both; the value function has its own learning rate, value_lr_ratio times the policy's."""
        optimizer = adamw(self.policy, train_config)
        if self.value_model is not None:
            for group in adamw(self.value_model, train_config).param_groups:
                optimizer.add_param_group({**group, "lr_ratio": train_config.value_lr_ratio})
        return optimizer


class RewardModel(ScalarModel):
    """One number for a whole text, read at its last real token. forward(idx (B, T), attention_mask) -> (B,).

    It is a reward_fn as it stands. With group_size, each so many adjacent rows are completions, by the completion_mask, of one
    prompt, which is then read once. The head starts as N(0, 1/(C+1)) (Stiennon et al. 2020).
    """

    head_scale = 1.0

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None, completion_mask: Tensor | None = None,
                group_size: int = 1) -> Tensor:
        start = 0 if group_size == 1 else int(completion_mask.any(0).long().argmax())
        scores = self.scores(idx, attention_mask, start, group_size)
        if attention_mask is None:
            return scores[:, -1]
        return scores.gather(1, last_real(attention_mask)[:, None] - start)[:, 0]

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
