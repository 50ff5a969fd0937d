"""
Reinforcement learning from human feedback: estimators and losses, reward and value models, and the PPO trainer.

The pure functions come first, each the few lines that its paper's equation needs. `PPOTrainer` puts them together:

    rollout:     sample completions, remember log π_old of each token
    score:       r_t = -kl_coef · (log π_old - log π_ref), and the reward of the whole text on the last token
    advantages:  generalised advantage estimation with the value function
    update:      some epochs of minibatches on the clipped objective

Sources: Schulman et al. 2015 (GAE, arXiv:1506.02438), Schulman et al. 2017 (PPO, arXiv:1707.06347), Ziegler et al. 2019
(RL on language models, arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325), Huang et al. 2024 (arXiv:2403.17031).

Which token a number speaks of is where RLHF code goes wrong most often. All (B, T-1) tensors here are indexed by t and speak
of the *action* idx[:, t+1], taken in the *state* idx[:, :t+1]. For one row, left-padded, of a 2-token prompt:

    position           0     1     2     3     4     5     6
    idx                pad   p     p     a     b     <eot> <eot>      the second <eot> fills the row up
    attention_mask     0     1     1     1     1     1     0          what the models may read
    completion_mask    0     0     0     1     1     1     0          what the policy wrote, its <eot> included

    t                  0     1     2     3     4     5
    action idx[t+1]    p     p     a     b     <eot> -
    mask               0     0     1     1     1     0                completion_mask[:, 1:]
    log_probs[t]       -     -     x     x     x     -                log π(idx[t+1] | idx[:t+1])
    values[t]          -     -     x     x     x     -                V(idx[:t+1]): what the state before the action promises
    rewards[t]         0     0     kl    kl    kl+score  0
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt import distributed
from mingpt.model import GPT, Transformer, last_real, resolve_config
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode as CN
from mingpt.utils import adamw, check_numbers
from mingpt.weights import Pretrained

# ---------------------------------------------------------------------------------------------------------------------
# estimators and losses: (B, T) tensors, mask 1 on the completion's tokens; what lies off the mask never matters


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x with exact zeros off the mask, so that junk there, NaN and infinities too, reaches neither value nor gradient."""
    return torch.where(mask.bool(), x, torch.zeros_like(x))


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x over the masked entries, in all or along dim; 0 where there are none."""
    total, count = masked(x, mask), mask.to(x.dtype)
    if dim is None:
        return total.sum() / count.sum().clamp(min=1)
    return total.sum(dim) / count.sum(dim).clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x scaled to unit variance over the mask, and to zero mean unless shift_mean is False; 0 off the mask."""
    x = masked(x, mask)
    mean = masked_mean(x, mask)
    # the 1e-8 keeps the rounding errors of a constant from being blown up to unit variance
    whitened = (x - mean) * (masked_mean((x - mean) ** 2, mask) + 1e-8).rsqrt()
    return masked(whitened if shift_mean else whitened + mean, mask)


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimates of KL(π || π_ref) from tokens sampled by π, in nats (Schulman 2020, joschu.net/blog/kl-approx).

    k1 = -log r is unbiased; k2 = (log r)²/2 has less variance and some bias; k3 = r - 1 - log r is unbiased and never
    negative, where r = π_ref / π.
    """
    log_ratio = ref_log_probs - log_probs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio ** 2 / 2
    if kind == "k3":
        return log_ratio.expm1() - log_ratio
    raise ValueError(f"kind={kind!r} must be k1, k2 or k3")


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, equation 16): (advantages, returns), zero off the mask.

        δ_t = r_t + γ V_{t+1} - V_t,    A_t = δ_t + γλ A_{t+1},    returns_t = A_t + V_t

    The episode ends with the last masked token: behind it, V and A are 0.
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    backwards = []
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = masked(delta + gamma * lam * next_advantage, mask[:, t])
        next_value = values[:, t]
        backwards.append(next_advantage)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


def ppo_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor,
                    clip_range: float = 0.2) -> tuple[Tensor, Tensor]:
    """The clipped surrogate objective, negated (Schulman et al. 2017, equation 7): (loss, clip_fraction).

        L = -mean min(ρ A, clip(ρ, 1-ε, 1+ε) A),    ρ = π / π_old

    clip_fraction is the share of tokens where the clipped term is the smaller one, that is where no gradient flows.
    """
    ratio = masked(log_probs - old_log_probs, mask).exp()
    advantages = masked(advantages, mask)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -masked_mean(torch.minimum(unclipped, clipped), mask)
    return loss, masked_mean((clipped < unclipped).to(loss.dtype), mask).detach()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float = 0.2) -> Tensor:
    """Squared error of the value function, with its 1/2, clipped like the ratio (the PPO paper's code, `baselines`).

        L = 1/2 mean max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)
    """
    values, old_values, returns = masked(values, mask), masked(old_values, mask), masked(returns, mask)
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def reward_loss(chosen: Tensor, rejected: Tensor, margin: float = 0.0) -> Tensor:
    """Negative log-likelihood of the comparisons under Bradley-Terry: -mean log σ(r_chosen - r_rejected - margin)."""
    return -F.logsigmoid(chosen - rejected - margin).mean()


def dpo_loss(chosen_log_probs: Tensor, rejected_log_probs: Tensor, ref_chosen_log_probs: Tensor, ref_rejected_log_probs: Tensor,
             beta: float = 0.1) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7), on sums of the completions' log-probs, (B,) each.

        L = -mean log σ(β (log π(chosen)/π_ref(chosen) - log π(rejected)/π_ref(rejected)))
    """
    return reward_loss(beta * (chosen_log_probs - ref_chosen_log_probs), beta * (rejected_log_probs - ref_rejected_log_probs))


def rloo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """REINFORCE leave-one-out (Ahmadian et al. 2024): each score less the mean of the others in its group, (B,) -> (B,)."""
    groups = grouped(scores, group_size)
    return ((groups - groups.mean(1, keepdim=True)) * group_size / (group_size - 1)).flatten()


def grpo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Group-relative advantages (Shao et al. 2024): scores in standard deviations (n-1) from their group's mean, (B,) -> (B,)."""
    groups = grouped(scores, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-8)).flatten()


def grouped(scores: Tensor, group_size: int) -> Tensor:
    """(B,) -> (B / group_size, group_size): the samples of one prompt are adjacent."""
    if group_size < 2 or len(scores) % group_size:
        raise ValueError(f"group_size={group_size!r} must be 2 or more and divide the {len(scores)} scores")
    return scores.view(-1, group_size)


# ---------------------------------------------------------------------------------------------------------------------
# models with a scalar head


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
    def from_gpt(cls, gpt: GPT):
        """A new model whose trunk starts as a copy of gpt's; the head is fresh."""
        model = cls(gpt.config)
        model.transformer.load_state_dict(gpt.transformer.state_dict())
        return model.to(next(gpt.parameters()).device)

    def scores(self, idx: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The head's output at every position: (B, T) -> (B, T). ValueError where T is longer than block_size."""
        return self.head(self.transformer(idx, attention_mask)).squeeze(-1)


class ValueModel(ScalarModel):
    """V(s): the return that the policy can expect from each prefix. forward(idx (B, T), attention_mask) -> (B, T).

    The head starts at zero, so that an untrained value function is silent, not wrong (Huang et al. 2024).
    """

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.scores(idx, attention_mask)


class RewardModel(ScalarModel):
    """One number for a whole text, read at its last real token. forward(idx (B, T), attention_mask) -> (B,).

    It is a reward_fn as it stands; the completion_mask that PPOTrainer hands to reward functions is not needed. The head
    starts as N(0, 1/(C+1)) (Stiennon et al. 2020, appendix C).
    """

    head_scale = 1.0

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None, completion_mask: Tensor | None = None) -> Tensor:
        scores = self.scores(idx, attention_mask)
        if attention_mask is None:
            return scores[:, -1]
        return scores.gather(1, last_real(attention_mask)[:, None])[:, 0]


class ActorCritic(nn.Module):
    """Policy and value model as one module, so that one optimizer steps both and one forward pass serves the loss."""

    def __init__(self, policy: nn.Module, value_model: nn.Module | None = None):
        super().__init__()
        self.policy = policy
        self.value_model = value_model

    def forward(self, idx: Tensor, attention_mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(log_probs, values), both (B, T-1): of the actions idx[:, 1:], and of the states before them."""
        log_probs = self.policy.log_probs(idx, attention_mask, temperature)
        return log_probs, self.values(idx, attention_mask)

    def configure_optimizers(self, train_config):
        """AdamW over both; the value model has its own learning rate, value_lr_ratio times the policy's."""
        optimizer = adamw(self.policy, train_config)
        if self.value_model is not None:
            for group in adamw(self.value_model, train_config).param_groups:
                optimizer.add_param_group({**group, "lr_ratio": train_config.value_lr_ratio})
        return optimizer

    def values(self, idx: Tensor, attention_mask: Tensor) -> Tensor:
        """V of each state (B, T-1): value(idx)[:, :-1], and by causality the last token need not even be read."""
        if self.value_model is None:
            return torch.zeros(idx[:, 1:].shape, device=idx.device)
        return self.value_model(idx[:, :-1], attention_mask[:, :-1])


class TextReward:
    """Makes a reward_fn of `f(completions, prompts) -> list of floats`, which sees decoded text without end-of-text."""

    def __init__(self, f: Callable[[list[str], list[str]], list[float]], tokenizer):
        self.f, self.tokenizer = f, tokenizer

    def __call__(self, idx: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        def texts(mask):
            return [self.tokenizer.decode([i for i in row[keep].tolist() if i != self.tokenizer.eot_token])
                    for row, keep in zip(idx, mask.bool())]
        rewards = self.f(texts(completion_mask), texts(attention_mask.bool() & ~completion_mask.bool()))
        return torch.as_tensor(rewards, dtype=torch.float32, device=idx.device)


# ---------------------------------------------------------------------------------------------------------------------
# the trainer


class PPOTrainer(Trainer):
    """Teaches a policy to get reward without straying far from where it started.

    policy: a GPT, or any module with its `log_probs` and `generate` (which for ppo needs a value_model of its own).
    reward_fn(idx (B, T), attention_mask (B, T), completion_mask (B, T)) -> (B,), or a RewardModel.
    prompts: (N, T) LongTensor, a list of lists of ids, or with a tokenizer a list of strings; unlike lengths are left-padded.
    value_model: by default `ValueModel.from_gpt(policy)`. ref_policy: by default a frozen copy of policy.

    One iteration of the Trainer's loop is one round of rollout, score, advantages and update, without dropout.
    """

    @staticmethod
    def get_default_config() -> CN:
        """The Trainer's options, some with other defaults, and PPO's own."""
        C = Trainer.get_default_config()
        C.precision = "fp32"          # of the update, as of the rollout: in bf16 the ratio would not start at 1
        C.algorithm = "ppo"           # or without a value function: rloo, grpo, and reinforce with one plain step a rollout
        C.batch_size = 64             # episodes in a rollout
        C.group_size = 4              # rloo, grpo: episodes of the same prompt
        C.minibatch_size = None       # episodes per optimizer step; None: all of them
        C.ppo_epochs = 4              # passes over a rollout
        C.max_new_tokens = 64
        C.stop_token = None           # ends an episode; None: the tokenizer's end-of-text, if there is a tokenizer
        C.temperature = 1.0
        C.learning_rate = 1e-4
        C.eps = 1e-5                  # Adam's, as in the PPO papers' code (Huang et al. 2024)
        C.weight_decay = 0.0
        C.log_every = 1
        C.checkpoint_every = 20
        C.kl_coef = 0.05              # β, reward per nat
        C.kl_target = None            # nats per episode: adapt kl_coef towards it (Ziegler et al. 2019, section 2.2)
        C.kl_horizon = 10_000         # ... over so many episodes
        C.gamma = 1.0
        C.gae_lambda = 0.95
        C.clip_range = 0.2
        C.value_clip_range = 0.2
        C.value_coef = 0.1
        C.value_lr_ratio = 1.0        # the value model's learning rate, as a multiple of the policy's
        return C

    def __init__(self, config: CN, policy: nn.Module, reward_fn: Callable[[Tensor, Tensor, Tensor], Tensor], prompts,
                 value_model: nn.Module | None = None, ref_policy: nn.Module | None = None, tokenizer=None):
        if config.algorithm not in ("ppo", "reinforce", "rloo", "grpo"):
            raise ValueError(f"algorithm={config.algorithm!r} must be ppo, reinforce, rloo or grpo")
        if config.algorithm == "ppo" and value_model is None:
            if not hasattr(policy, "transformer"):
                raise ValueError(f"a {type(policy).__name__} is no GPT to copy a value model from: pass one as value_model, "
                                 "with forward(idx, attention_mask) -> (B, T), or choose another algorithm")
            value_model = ValueModel.from_gpt(policy)
        self.stop_token = config.stop_token if config.stop_token is not None else getattr(tokenizer, "eot_token", None)
        self.block_size = getattr(getattr(policy, "config", None), "block_size", math.inf)
        self.reward_fn, self.kl_coef = reward_fn, config.kl_coef
        super().__init__(config, ActorCritic(policy, value_model), encode_prompts(prompts, tokenizer),
                         loss_fn=self.policy_and_value_loss, collate_fn=left_pad)
        self.policy = policy
        self.log_prob_error = 0.0  # largest difference in a minibatch between the log-probs of the sampler and of the update
        if isinstance(reward_fn, nn.Module):
            reward_fn.to(self.device).eval()  # a reward model: it, too, without dropout
        self.ref_policy = (ref_policy or copy.deepcopy(policy)).to(self.device).eval().requires_grad_(False)

    def check_config(self) -> None:
        super().check_config()
        C = self.config
        check_numbers(C, "ppo_epochs max_new_tokens", low=1, whole=True)
        check_numbers(C, "minibatch_size", low=self.world_size, whole=True, optional=True)
        check_numbers(C, "kl_coef clip_range value_clip_range value_coef value_lr_ratio")
        check_numbers(C, "gamma gae_lambda", high=1)
        check_numbers(C, "kl_target", low=1e-6, optional=True)
        check_numbers(C, "kl_horizon", low=1)
        if C.algorithm in ("rloo", "grpo"):
            grouped(torch.zeros(C.batch_size // self.world_size), C.group_size)

    def check_data(self) -> None:
        """ValueError for no prompts, or such that do not fit; there may be few: many episodes begin with the same one."""
        C, longest = self.config, max(map(len, self.train_dataset), default=0)
        if longest == 0:
            raise ValueError("prompts is empty: give one or more")
        if longest + C.max_new_tokens > self.block_size + 1:  # the last token is only predicted, never read
            raise ValueError(f"prompts of up to {longest} tokens and max_new_tokens={C.max_new_tokens} do not fit into the "
                             f"policy's block_size={self.block_size}: their sum may be {self.block_size + 1}")

    def state_dict(self) -> dict:
        return super().state_dict() | {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.kl_coef = state["kl_coef"]

    def batch_indices(self) -> Iterator[list[int]]:
        """The Trainer's; for groups, the first prompts of each batch, each of them group_size times."""
        k = self.config.group_size if self.config.algorithm in ("rloo", "grpo") else 1
        return ([i for i in indices[:len(indices) // k] for _ in range(k)] for indices in super(PPOTrainer, self).batch_indices())

    # -- one iteration -------------------------------------------------------------------------------------------------

    def train_step(self, batch: tuple) -> dict:
        """Rollout, score, advantages, update."""
        self.model.eval()  # no dropout
        rollout = self.rollout(*batch)
        self.tokens += rollout["mask"].sum().item() * self.world_size
        metrics = distributed.mean(self.update(rollout) | self.describe(rollout))
        if self.config.kl_target is not None:
            error = metrics["objective/kl"] / self.config.kl_target - 1
            self.kl_coef *= 1 + min(max(error, -0.2), 0.2) * self.config.batch_size / self.config.kl_horizon
        return metrics

    @torch.no_grad()
    def rollout(self, prompts: Tensor, prompt_mask: Tensor) -> dict:
        """Sample an episode for each prompt, and all that the update needs to know of it: a dict of tensors, B first."""
        C = self.config
        idx, sampled = self.policy.generate(prompts, C.max_new_tokens, temperature=C.temperature, do_sample=True,
                                            attention_mask=prompt_mask, stop_token=self.stop_token, return_log_probs=True)
        completion_mask = written_mask(idx, prompts.size(1), self.stop_token)
        attention_mask = torch.cat([prompt_mask, completion_mask[:, prompts.size(1):]], dim=1)
        mask = completion_mask[:, 1:]
        old_log_probs = F.pad(sampled, (prompts.size(1) - 1, 0))
        ref_log_probs = self.ref_policy.log_probs(idx, attention_mask, C.temperature)
        scores = self.score(idx, attention_mask, completion_mask)
        kl = masked(kl_estimate(old_log_probs, ref_log_probs), mask)
        values = masked(self.model.values(idx, attention_mask), mask)
        rewards = -self.kl_coef * kl
        rewards[torch.arange(len(idx)), last_real(mask)] += scores
        # without a value function, all values 0, λ = 1 makes the advantage the return: REINFORCE (Williams 1992)
        advantages, returns = gae(rewards, values, mask, C.gamma, C.gae_lambda if C.algorithm == "ppo" else 1.0)
        advantages = masked_whiten(advantages, mask)
        if C.algorithm == "rloo":  # a whole completion is one action, the penalty a part of its score
            advantages = rloo_advantages(rewards.sum(1), C.group_size)[:, None].expand_as(mask)
        if C.algorithm == "grpo":  # the penalty stands in the loss instead
            advantages = grpo_advantages(scores, C.group_size)[:, None].expand_as(mask)
        return {"idx": idx, "attention_mask": attention_mask, "mask": mask, "old_log_probs": old_log_probs, "kl": kl, "scores": scores,
                "ref_log_probs": ref_log_probs, "old_values": values, "returns": returns, "advantages": advantages}

    def score(self, idx: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        """The rewards (B,), float32; ValueError where the reward function gave another shape, NaN or infinity."""
        scores = self.reward_fn(idx, attention_mask, completion_mask)
        if not torch.is_tensor(scores) or scores.shape != (len(idx),):
            raise ValueError(f"reward_fn must return a tensor of shape ({len(idx)},), one reward an episode, not "
                             f"{tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__}")
        if not torch.isfinite(scores).all():
            row = int((~torch.isfinite(scores)).nonzero()[0])
            raise ValueError(f"reward_fn gave {scores[row]} to sample {row}, ids {idx[row][attention_mask[row]].tolist()}")
        return scores.float().to(idx.device)

    def update(self, rollout: dict) -> dict:
        """Epochs of minibatches over the rollout; returns the mean of their metrics.

        REINFORCE takes one step on all of it: there the ratio is 1, and PPO's gradient that of the plain policy gradient.
        """
        C, rows, size = self.config, [], len(rollout["idx"])
        share = (C.minibatch_size or C.batch_size) // self.world_size
        epochs, minibatch_size = (1, size) if C.algorithm == "reinforce" else (C.ppo_epochs, share)
        for _ in range(epochs):
            for index in torch.randperm(size).split(minibatch_size):
                minibatch = {name: x[index.to(self.device)] for name, x in rollout.items()}
                self.log_prob_error = 0.0
                rows.append(self.optimizer_step(self.micro_batches(minibatch)) | {"log_prob_error": self.log_prob_error})
        metrics = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return metrics | {"log_prob_error": rows[0]["log_prob_error"]}  # before the first step the two must agree

    def micro_batches(self, minibatch: dict) -> Iterator[tuple[Tensor, dict]]:
        """(weight, micro-batch) pairs, weighted by the tokens of their completions."""
        size = self.config.micro_batch_size or len(minibatch["idx"])
        for start in range(0, len(minibatch["idx"]), size):
            part = {name: x[start:start + size] for name, x in minibatch.items()}
            yield part["mask"].sum().item(), part

    def policy_and_value_loss(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict]:
        """The loss of a micro-batch, and its metrics."""
        C = self.config
        mask, old_log_probs = batch["mask"], batch["old_log_probs"]
        log_probs, values = model(batch["idx"], batch["attention_mask"], C.temperature)
        log_ratio = masked(log_probs - old_log_probs, mask)
        policy_loss, clip_fraction = ppo_policy_loss(log_probs, old_log_probs, batch["advantages"], mask, C.clip_range)
        v_loss = value_loss(values, batch["old_values"], batch["returns"], mask, C.value_clip_range)
        self.log_prob_error = max(self.log_prob_error, log_ratio.detach().abs().max().item())
        with torch.no_grad():
            metrics = {"loss/policy": policy_loss.detach(), "loss/value": v_loss.detach(), "policy/clipfrac": clip_fraction,
                       "policy/approxkl": masked_mean(log_ratio ** 2 / 2, mask),
                       "val/ratio": masked_mean(log_ratio.exp(), mask)}
        loss = policy_loss + C.value_coef * v_loss
        if C.algorithm == "grpo":  # k3, averaged over all tokens, where the paper averages over each completion's first
            loss = loss + self.kl_coef * masked_mean(kl_estimate(log_probs, batch["ref_log_probs"], "k3"), mask)
        return loss, metrics

    def describe(self, rollout: dict) -> dict:
        """What the rollout looked like, under the field's usual names."""
        mask, returns = rollout["mask"], rollout["returns"]
        kl = rollout["kl"].sum(1).mean()
        residual = masked_mean((returns - rollout["old_values"]) ** 2, mask)
        variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
        metrics = {"objective/kl": kl, "objective/scores": rollout["scores"].mean(),
                   "objective/rlhf_reward": rollout["scores"].mean() - self.kl_coef * kl,
                   "objective/entropy": -masked_mean(rollout["old_log_probs"], mask),
                   "val/explained_variance": 1 - residual / variance.clamp(min=1e-8),
                   "episode_length": mask.sum(1).float().mean(), "kl_coef": torch.tensor(self.kl_coef)}
        return {name: value.item() for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# prompts and masks


def written_mask(idx: Tensor, prompt_length: int, stop_token: int | None = None) -> Tensor:
    """True on what was generated behind the prompt, up to and including the first stop token: (B, T) -> (B, T)."""
    mask = torch.ones_like(idx, dtype=torch.bool)
    mask[:, :prompt_length] = False
    if stop_token is not None:
        stops = (idx == stop_token) & mask
        mask &= stops.cumsum(1) - stops.long() == 0  # no stop token before this one
    return mask


def encode_prompts(prompts, tokenizer=None) -> list[Tensor]:
    """Prompts as a list of 1-D LongTensors: from strings, lists of ids or a (N, T) tensor. ValueError for an empty one."""
    def encode(prompt):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(f"prompt {prompt!r} is text: pass the tokenizer that encodes it")
            prompt = tokenizer.encode(prompt)
        return torch.as_tensor(prompt, dtype=torch.long)

    encoded = [encode(prompt) for prompt in prompts]
    for prompt in encoded:
        if prompt.dim() != 1 or len(prompt) == 0:
            raise ValueError(f"prompt of shape {tuple(prompt.shape)}: each must be a row of one token or more "
                             "(the end-of-text token, say, to start from nothing)")
    return encoded


def left_pad(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Collate rows of unlike lengths: (idx (B, T), attention_mask (B, T)), padded on the left with id 0."""
    T = max(len(prompt) for prompt in prompts)
    idx = torch.stack([F.pad(prompt, (T - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt, dtype=torch.bool), (T - len(prompt), 0)) for prompt in prompts])
    return idx, mask
