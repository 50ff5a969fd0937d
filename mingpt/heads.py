"""
Models that give a number instead of a token, and the policy joined with one of them.

    RewardModel    judges a whole text                          (B, T) -> (B,)
    ValueModel     foresees the return from every prefix        (B, T) -> (B, T)
    ValueHead      the same, read off the policy's own trunk    (B, T, C) -> (B, T)
    ActorCritic    policy and value function as one module, which is what PPO trains

Each is GPT's trunk with a linear head to one number. Sources: Ziegler et al. 2019
(arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325), Huang et al. 2024
(arXiv:2403.17031).
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt.config import CfgNode as CN
from mingpt.model import GPT, Transformer, last_real, resolve_config, token_log_probs
from mingpt.prefix import hidden_states, needed_mask
from mingpt.utils import adamw
from mingpt.weights import Pretrained


def one_number(head: nn.Linear, hidden: Tensor) -> Tensor:
    """The head's number for each hidden state, (B, T, C) -> (B, T), in fp32.

    Half precision has too few digits for it: of two rewards around 8 that are 0.03 apart,
    bf16 makes the same number.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        number = F.linear(hidden.float(), head.weight.float(), head.bias.float())
    return number.squeeze(-1)


class ScalarModel(Pretrained, nn.Module):
    """GPT's trunk and a linear head to one number per position. The base of the two below."""

    presets = GPT.presets  # for from_pretrained
    head_scale = 0.0  # standard deviation of the head's first weights, times sqrt(C + 1)

    def __init__(self, config: CN):
        super().__init__()
        self.config = resolve_config(config)
        # The trunk reads the text, (B, T) -> (B, T, C); the head makes one number of each state.
        self.transformer = Transformer(self.config)
        self.head = nn.Linear(self.config.n_embd, 1)
        nn.init.normal_(self.head.weight, std=self.head_scale * (self.config.n_embd + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)

    @staticmethod
    def get_default_config() -> CN:
        """The options of a GPT."""
        return GPT.get_default_config()

    @classmethod
    def from_gpt(cls, model: "GPT | ScalarModel") -> Self:
        """A new model whose trunk starts as a copy of model's.

        The head starts as model's if model is a reward or value model itself; else it is fresh.
        """
        # What the trunk has learned about language is useful to judge texts, too.
        new = cls(model.config)
        new.transformer.load_state_dict(model.transformer.state_dict())
        if isinstance(model, ScalarModel):
            new.head.load_state_dict(model.head.state_dict())
        return new.to(next(model.parameters()).device)

    def scores(
        self,
        idx: Tensor,
        attention_mask: Tensor | None = None,
        prefix_length: int = 0,
        rows_per_prompt: int = 1,
    ) -> Tensor:
        """The head's number at every position behind the prefix: (B, T) -> (B, T - prefix_length).

        Rows may share a prefix, as in `prefix.hidden_states`. ValueError if a row has more
        tokens than block_size.
        """
        hidden = hidden_states(
            self.transformer, idx, attention_mask, prefix_length, rows_per_prompt
        )
        return one_number(self.head, hidden)


class ValueModel(ScalarModel):
    """V(s), the return that the policy can expect from each prefix: (B, T) -> (B, T).

    Made from a policy, its head starts at zero: an untrained value function says nothing
    rather than something wrong (Ziegler et al.'s code). Made from a reward model, it starts
    as that one (Stiennon et al. 2020).
    """

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """idx, attention_mask (B, T) -> values (B, T)."""
        return self.scores(idx, attention_mask)


class ValueHead(nn.Linear):
    """V(s) read off the policy's own trunk, which then serves both (Ziegler et al. 2019)."""

    def __init__(self, n_embd: int):
        super().__init__(n_embd, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, C) -> values (B, T)."""
        return one_number(self, hidden)


class RewardModel(ScalarModel):
    """One number for a whole text, read at its last real token: (B, T) -> (B,).

    It is a reward_fn as it stands. The head starts as N(0, 1/(C+1)) (Stiennon et al. 2020).
    """

    head_scale = 1.0

    def forward(
        self,
        idx: Tensor,
        attention_mask: Tensor | None = None,
        completion_mask: Tensor | None = None,
        rows_per_prompt: int = 1,
    ) -> Tensor:
        """idx, attention_mask, completion_mask, all (B, T) -> rewards (B,).

        With rows_per_prompt, so many adjacent rows continue the same prompt, which is read
        once. The completion_mask then says where the completions begin, in the same column
        for all.
        """
        # Where the rows share a prompt, only what follows it is read row by row.
        prefix_length = 0
        if rows_per_prompt > 1:
            if completion_mask is None:
                raise ValueError(
                    f"rows_per_prompt={rows_per_prompt} needs the completion_mask, which says "
                    "where the prompts end: pass it"
                )
            prefix_length = first_column(completion_mask)
        scores = self.scores(idx, attention_mask, prefix_length, rows_per_prompt)
        # By causality only the last real token has seen the whole text: its number counts.
        if attention_mask is None:
            return scores[:, -1]
        last_column = last_real(attention_mask) - prefix_length
        return scores.gather(1, last_column[:, None])[:, 0]

    @torch.no_grad()
    def normalize(self, scores: Tensor, unit_variance: bool = False) -> None:
        """Shift (and optionally rescale) the head so that these scores get mean 0 (and variance 1).

        scores (N,): this model's own, of reference texts: samples of the policy to be
        trained (Ziegler et al. 2019) or texts by people (Stiennon et al. 2020).
        Bradley-Terry leaves the mean free, and kl_coef is in units of the reward, so both
        should be fixed before PPO.
        """
        # The score is w·h + b. So (w·h + b - mean) / std has the weights w / std and the bias
        # (b - mean) / std.
        std = scores.std(unbiased=False) if unit_variance else torch.tensor(1.0)
        if not std > 0:
            raise ValueError(
                f"{len(scores)} equal scores cannot be scaled to variance 1: pass the scores of "
                "different texts"
            )
        self.head.bias.copy_((self.head.bias - scores.mean()) / std)
        self.head.weight.div_(std)


def first_column(completion_mask: Tensor) -> int:
    """The column in which the completions begin: (B, T) mask -> column."""
    return int(completion_mask.any(dim=0).long().argmax())


class ActorCritic(nn.Module):
    """Policy and value function as one module.

    policy: a GPT, or any module with its `log_probs`.
    value_model: a ValueModel, any module with its forward, a ValueHead that reads the policy's own
        trunk, or None for no value function.
    """

    def __init__(self, policy: nn.Module, value_model: nn.Module | None = None):
        super().__init__()
        self.policy = policy
        self.value_model = value_model

    def forward(
        self,
        idx: Tensor,
        attention_mask: Tensor,
        temperature: float = 1.0,
        prefix_length: int = 0,
        rows_per_prompt: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, values), both (B, T-1): of the actions idx[:, 1:] and the states before them.

        The first prefix_length actions belong to the prompt, and nobody asks for their
        log-probs. For a GPT they are left out, and zeros stand in their place, since a
        prompt need not go through the large matrix of the vocabulary. Where rows_per_prompt
        adjacent rows continue the same prompt, it is read once for all of them.
        """
        # A policy that is no GPT does everything itself, the prompts' log-probs included.
        if not isinstance(self.policy, GPT):
            mask = needed_mask(idx, attention_mask)
            log_probs = self.policy.log_probs(idx, mask, temperature)  # type: ignore[operator]
            return log_probs, self.values(idx, attention_mask)

        # The last token is an action only, never a part of a state: it is not read.
        hidden = self.policy_states(idx, attention_mask, prefix_length, rows_per_prompt)
        logits = self.policy.lm_head(hidden)  # (B, T-1-prefix_length, V), the largest tensor of all
        log_probs = token_log_probs(logits, idx[:, prefix_length + 1 :], temperature)
        # A value head reads the same hidden states; a value model reads the text by itself.
        if isinstance(self.value_model, ValueHead):
            values = F.pad(self.value_model(hidden), (prefix_length, 0))
        else:
            values = self.values(idx, attention_mask, prefix_length, rows_per_prompt)
        return F.pad(log_probs, (prefix_length, 0)), values

    def values(
        self,
        idx: Tensor,
        attention_mask: Tensor,
        prefix_length: int = 0,
        rows_per_prompt: int = 1,
    ) -> Tensor:
        """V of each state, (B, T-1). Zeros in the prefix, and everywhere without a value function.

        These are `value(idx)[:, :-1]`. By causality the last token need not even be read.
        """
        if self.value_model is None:
            return torch.zeros(idx[:, :-1].shape, device=idx.device)
        if isinstance(self.value_model, ValueHead):
            hidden = self.policy_states(idx, attention_mask, prefix_length, rows_per_prompt)
            return F.pad(self.value_model(hidden), (prefix_length, 0))
        if isinstance(self.value_model, ValueModel):
            values = self.value_model.scores(
                idx[:, :-1], attention_mask[:, :-1], prefix_length, rows_per_prompt
            )
            return F.pad(values, (prefix_length, 0))
        values = self.value_model(idx[:, :-1], attention_mask[:, :-1])
        if values.shape != idx[:, :-1].shape:
            raise ValueError(
                f"the value model returned shape {tuple(values.shape)} for idx of shape "
                f"{tuple(idx[:, :-1].shape)}: it must give one value for each token, (B, T)"
            )
        return values

    def policy_states(
        self, idx: Tensor, attention_mask: Tensor, prefix_length: int, rows_per_prompt: int
    ) -> Tensor:
        """The policy's hidden states of all states behind the prefix: (B, T-1-prefix_length, C)."""
        assert isinstance(self.policy, GPT)  # a ValueHead is only ever put on a GPT
        states = idx[:, :-1], attention_mask[:, :-1]
        return hidden_states(self.policy.transformer, *states, prefix_length, rows_per_prompt)

    def configure_optimizers(self, train_config: CN) -> torch.optim.Optimizer:
        """AdamW over both; the value function learns at value_lr_ratio times the policy's rate."""
        # The Trainer sets each group's rate to the schedule's times its lr_ratio.
        optimizer = adamw(self.policy, train_config)
        if self.value_model is not None:
            for group in adamw(self.value_model, train_config).param_groups:
                group["lr_ratio"] = train_config.value_lr_ratio
                optimizer.add_param_group(group)
        return optimizer
