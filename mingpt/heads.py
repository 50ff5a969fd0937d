"""
Models that give a number instead of a token, and the policy joined with one of them.

    RewardModel    judges a whole text                          (B, T) -> (B,)
    ValueModel     predicts the return from every position      (B, T) -> (B, T)
    ValueHead      the same, read off the policy's own trunk    (B, T, C) -> (B, T)
    ActorCritic    policy and value function as one module, which is what PPO trains

RewardModel and ValueModel are a trunk as GPT has it, which gives a vector of C channels
for each token, and a linear head from that vector to one number. They differ in where the
number is read. Each has a trunk of its own, or stands on the policy's with an adapter of its own
(`on`, see lora.py).

Shapes: B rows, T tokens, C channels (n_embd). Several rows may continue the same prompt; then
it is a prefix that is read once for all of them (see prefix.py).

Sources: Ziegler et al. 2019 (arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325),
Huang et al. 2024 (arXiv:2403.17031).
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt import lora
from mingpt.config import CfgNode as CN, check_booleans
from mingpt.model import GPT, last_real, new_trunk, resolve_config, token_log_probs
from mingpt.prefix import hidden_states, needed_mask
from mingpt.trunk import Trunk, check_idx
from mingpt.utils import adamw, check_equal_shapes, check_tensors
from mingpt.weights import Pretrained


def one_number(head: nn.Linear, hidden: Tensor) -> Tensor:
    """The head's number for each hidden state, (B, T, C) -> (B, T), in fp32.

    Half precision has too few digits for it: bf16 rounds two rewards around 8 that are 0.03
    apart to the same number.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        number = F.linear(hidden.float(), head.weight.float(), head.bias.float())
    return number.squeeze(-1)


class ScalarModel(Pretrained, nn.Module):
    """GPT's trunk and a linear head to one number per position.

    The base of ValueModel and RewardModel.
    """

    presets = GPT.presets  # the names that from_pretrained knows
    task = "TokenClassification"  # transformers' name for a number at every token
    head_scale = 0.0  # the head's weights start as N(0, head_scale² / (C + 1))
    adapter = "value"  # what `on` calls its adapter

    def __init__(self, config: CN, transformer: Trunk | None = None):
        super().__init__(resolve_config(config))
        # The trunk reads the text, (B, T) -> (B, T, C). The head turns each vector into a number.
        self.transformer = new_trunk(self.config) if transformer is None else transformer
        self.head = nn.Linear(self.config.n_embd, 1)
        nn.init.normal_(self.head.weight, std=self.head_scale * (self.config.n_embd + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)

    @staticmethod
    def get_default_config() -> CN:
        """The options of a GPT."""
        return GPT.get_default_config()

    @classmethod
    def from_gpt(cls, model: "GPT | ScalarModel") -> Self:
        """A new model whose trunk starts as a copy of the trunk of `model`.

        What the trunk has learned about language helps to judge texts, too. If `model` is
        itself a reward or value model, the head is copied as well. Otherwise the head is new.
        If it has an adapter on (lora.py), that is merged into the copy.
        """
        if not isinstance(model, (GPT, ScalarModel)):
            raise TypeError(
                f"from_gpt takes a GPT, a RewardModel or a ValueModel as its model, not "
                f"{type(model).__name__} {model!r:.60}"
            )
        new = cls(model.config)
        new.transformer.load_state_dict(lora.merged_weights(model.transformer))
        new.special_tokens = dict(model.special_tokens)
        if isinstance(model, ScalarModel):
            new.head.load_state_dict(model.head.state_dict())
        return new.to(next(model.parameters()).device)

    @classmethod
    def on(
        cls,
        model: "GPT | ScalarModel",
        adapter: str | None = None,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
        layers: Sequence[str] | None = None,
    ) -> Self:
        """A new model that stands on the trunk of `model`: a head, and an adapter (lora.py).

        The trunk is frozen, and belongs to `model` alone. Only the adapter and the head are
        parameters of the new model. If `model` has an adapter on, ours starts as its copy, and if
        it is itself a reward or value model, so does the head. With any of rank, alpha, dropout and
        layers, which `lora.add` explains, the adapter starts afresh.

        adapter: its name, by default `value` or `reward`. An earlier one of that name stays with
        the model that has it.
        """
        name = cls.adapter if adapter is None else adapter
        new = cls(model.config, lora.stand_on(model, name, rank, alpha, dropout, layers))
        new.special_tokens = dict(model.special_tokens)
        if isinstance(model, ScalarModel):
            new.head.load_state_dict(model.head.state_dict())
        return new.to(next(model.parameters()).device).train(model.training)

    def scores(
        self,
        idx: Tensor,
        attention_mask: Tensor | None = None,
        prefix_length: int = 0,
        rows_per_prompt: int = 1,
    ) -> Tensor:
        """The head's number at each position after the prefix: (B, T) -> (B, T - prefix_length).

        prefix_length, rows_per_prompt: see `prefix.hidden_states`. By default there is no
        prefix. Raises ValueError if a row has more tokens than block_size.
        """
        hidden = hidden_states(
            self.transformer, idx, attention_mask, prefix_length, rows_per_prompt
        )
        return one_number(self.head, hidden)


class ValueModel(ScalarModel):
    """V(s), the return that the policy can expect after each token: (B, T) -> (B, T).

    `from_gpt(policy)` starts with a head of zeros, so an untrained value function predicts 0
    and not noise (Ziegler et al.'s code). `from_gpt(reward_model)` starts as the reward model
    (Stiennon et al. 2020).
    """

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """idx, attention_mask (B, T) -> values (B, T)."""
        return self.scores(idx, attention_mask)


class ValueHead(nn.Linear):
    """V(s), read off the policy's own trunk: one trunk for both (Ziegler et al. 2019)."""

    def __init__(self, n_embd: int):
        super().__init__(n_embd, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, C) -> values (B, T)."""
        return one_number(self, hidden)


class RewardModel(ScalarModel):
    """One number for a whole text, read at its last real token: (B, T) -> (B,).

    PPOTrainer takes it as a reward_fn. The head starts as N(0, 1/(C+1)) (Stiennon et al.
    2020).
    """

    task = "SequenceClassification"  # transformers' name for a number for a whole text
    head_scale = 1.0
    adapter = "reward"

    def forward(
        self,
        idx: Tensor,
        attention_mask: Tensor | None = None,
        completion_mask: Tensor | None = None,
        rows_per_prompt: int = 1,
    ) -> Tensor:
        """idx, attention_mask, completion_mask, all (B, T) -> rewards (B,).

        If each rows_per_prompt adjacent rows continue the same prompt, that prompt is read
        once. The completion_mask then says where the prompts end: in the same column for all
        rows. It is needed for nothing else.
        """
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
        last_column = last_real(attention_mask) - prefix_length  # (B,), in scores
        return scores.gather(1, last_column[:, None])[:, 0]

    @torch.no_grad()
    def normalize(self, scores: Tensor, unit_variance: bool = False) -> None:
        """Shift (and optionally rescale) the head so that these scores get mean 0 (and variance 1).

        scores (N,): what this model gives to some reference texts. Ziegler et al. 2019 take
        samples of the policy that is to be trained, Stiennon et al. 2020 texts by people. Do it
        before PPO: a Bradley-Terry loss leaves the mean open, and kl_coef is measured in units
        of the reward.

        Raises ValueError for scores that are none, and for unit_variance if all are equal.
        """
        check_tensors(scores=scores)
        check_booleans(CN(unit_variance=unit_variance), "unit_variance")
        if scores.dim() != 1 or len(scores) == 0 or not torch.isfinite(scores).all():
            raise ValueError(
                f"scores of shape {tuple(scores.shape)} must be finite numbers, (N,) with N >= 1"
            )
        # The score is w·h + b. So (w·h + b - mean) / std has the weights w / std and the bias
        # (b - mean) / std.
        std = scores.std(unbiased=False) if unit_variance else torch.tensor(1.0)
        if not std > 0:  # and so also where it is NaN
            raise ValueError(
                f"{len(scores)} equal scores cannot be scaled to variance 1: pass the scores of "
                "different texts"
            )
        self.head.bias.copy_((self.head.bias - scores.mean()) / std)
        self.head.weight.div_(std)


def first_column(completion_mask: Tensor) -> int:
    """The first column in which any row has a completion token: (B, T) mask -> column."""
    return int(completion_mask.any(dim=0).long().argmax())


class ActorCritic(nn.Module):
    """Policy and value function as one module.

    policy: a GPT, or any module with the same `log_probs` method.
    value_model: a ValueModel, or any module with the same `forward`; a ValueHead, which reads
        the policy's own trunk; or None for no value function.
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
        only: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, values), both (B, T-1): of the actions idx[:, 1:] and the states before them.

        only: `policy` or `value` reads with one of the two; the other's tensor is empty.

        The first prefix_length actions belong to the prompt, and their log-probs are never
        used. A GPT does not compute them: zeros take their place, which saves the prompt's
        product with the large vocabulary matrix. If each rows_per_prompt adjacent rows continue
        the same prompt, it is read once for all of them.
        """
        check_idx(idx)
        check_equal_shapes(idx=idx, attention_mask=attention_mask)
        if only not in (None, "policy", "value"):
            raise ValueError(f"only={only!r} must be policy, value or None")
        nothing = torch.empty(0, device=idx.device)
        if only == "value":
            return nothing, self.values(idx, attention_mask, prefix_length, rows_per_prompt)

        # A policy of another kind reads every row from its beginning. (mypy cannot know that it
        # has log_probs.)
        if not isinstance(self.policy, GPT):
            mask = needed_mask(idx, attention_mask)
            log_probs = self.policy.log_probs(idx, mask, temperature)  # type: ignore[operator]
            return log_probs, nothing if only else self.values(idx, attention_mask)

        # log π of each action after the prefix.
        hidden = self.policy_states(idx, attention_mask, prefix_length, rows_per_prompt)
        logits = self.policy.lm_head(hidden)  # (B, T-1-prefix_length, V): the largest tensor
        log_probs = token_log_probs(logits, idx[:, prefix_length + 1 :], temperature)
        log_probs = F.pad(log_probs, (prefix_length, 0))
        if only == "policy":
            return log_probs, nothing

        # V of each state. A ValueHead reads the policy's hidden states, a ValueModel the text.
        if isinstance(self.value_model, ValueHead):
            values = F.pad(self.value_model(hidden), (prefix_length, 0))
        else:
            values = self.values(idx, attention_mask, prefix_length, rows_per_prompt)
        return log_probs, values

    def values(
        self,
        idx: Tensor,
        attention_mask: Tensor,
        prefix_length: int = 0,
        rows_per_prompt: int = 1,
    ) -> Tensor:
        """V of each state, (B, T-1). Zeros in the prefix, and everywhere without a value function.

        The last token is an action, but never part of a state, so it is not read: a causal
        model gives the same as `value(idx)[:, :-1]`.
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

        # A value function of another kind reads every row from its beginning.
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
        """The policy's hidden vector for each state after the prefix: (B, T-1-prefix_length, C)."""
        assert isinstance(self.policy, GPT)  # PPOTrainer puts a ValueHead on a GPT only
        return hidden_states(
            self.policy.transformer,
            idx[:, :-1],
            attention_mask[:, :-1],
            prefix_length,
            rows_per_prompt,
        )

    def configure_optimizers(self, train_config: CN) -> torch.optim.Optimizer:
        """AdamW over both.

        The value function's learning rate is value_lr_ratio times the policy's: the Trainer
        multiplies by each group's lr_ratio.
        """
        optimizer = adamw(self.policy, train_config)
        if self.value_model is not None:
            for group in adamw(self.value_model, train_config).param_groups:
                group["lr_ratio"] = train_config.value_lr_ratio
                optimizer.add_param_group(group)
        return optimizer
