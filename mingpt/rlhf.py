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
import functools
import math
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt import distributed
from mingpt.checkpoint import get_rng_state, set_rng_state
from mingpt.datasets import encode_prompts, left_pad
from mingpt.model import GPT, last_real
from mingpt.rewards import RewardError, RewardFn, TextReward, score  # noqa: F401
from mingpt.heads import ActorCritic, RewardModel, ValueHead, ValueModel
from mingpt.trainer import Trainer
from mingpt.config import CfgNode as CN, check_numbers

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
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-8)
    same = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)  # where rounding errors are all that differs
    return advantages.masked_fill(same, 0.0).flatten()


def grouped(scores: Tensor, group_size: int) -> Tensor:
    """(B,) -> (B / group_size, group_size): the samples of one prompt are adjacent."""
    if group_size < 2 or len(scores) % group_size:
        raise ValueError(f"group_size={group_size!r} must be 2 or more and divide the {len(scores)} scores")
    return scores.view(-1, group_size)


# ---------------------------------------------------------------------------------------------------------------------
# learning from comparisons


def comparison_scores(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A RewardModel's scores of a batch of `Comparisons`: of the chosen (B, 1) and of the rejected completions (B, K-1)."""
    B, K, _ = batch[0].shape
    return model(*(x.flatten(0, 1) for x in batch), group_size=K).view(B, K).split([1, K - 1], dim=1)


def comparison_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], centering: float = 0.0) -> tuple[Tensor, dict]:
    """The Trainer's loss_fn for a RewardModel on batches of `Comparisons`: (the loss, its accuracy).

        L = reward_loss + centering · mean (r_chosen + r_rejected)²

    Bradley-Terry leaves the mean of each prompt's rewards free. The second term draws it to 0, so that what is left to vary is how
    good the completions are (Eisenstein et al. 2023, arXiv:2312.09244); 0.01 is enough.
    """
    check_numbers(CN(centering=centering), "centering")
    chosen, rejected = comparison_scores(model, batch)
    loss = reward_loss(chosen, rejected) + centering * (chosen + rejected).square().mean()
    return loss, {"accuracy": (chosen > rejected).float().mean()}


class DPOLoss:
    """The Trainer's loss_fn for DPO on batches of `Comparisons`; the model to train is ActorCritic(policy).

    ref_policy: where the policy starts from, or the policy itself before it is trained; a frozen copy is kept.
    """

    def __init__(self, ref_policy: nn.Module, beta: float = 0.1):
        self.reference, self.beta = ActorCritic(copy.deepcopy(ref_policy)).eval().requires_grad_(False), beta

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict]:
        K = batch[0].size(1)
        idx, attention_mask, mask = (x.flatten(0, 1) for x in batch)
        start = int(mask.any(0).long().argmax()) - 1  # the column of the first action
        sums = [masked(m(idx, attention_mask, 1.0, start, K)[0], mask[:, 1:]).sum(1).view(-1, K) for m in (model, self.reference.to(idx.device))]
        (chosen, rejected), (ref_chosen, ref_rejected) = (x.split([1, K - 1], dim=1) for x in sums)
        accuracy = (chosen - ref_chosen > rejected - ref_rejected).float().mean()
        return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, self.beta), {"accuracy": accuracy}


# ---------------------------------------------------------------------------------------------------------------------
# the trainer


class PPOTrainer(Trainer):
    """Teaches a policy to get reward without straying far from where it started.

    policy: a GPT, or any module with its `log_probs` and `generate` (which for ppo needs a value_model of its own).
    reward_fn(idx (B, T), attention_mask (B, T), completion_mask (B, T)) -> (B,), a RewardModel, or a TextReward.
    prompts: (N, T) LongTensor, a list of lists of ids, or with a tokenizer a list of strings; unlike lengths are left-padded.
    value_model: by default `ValueModel.from_gpt(policy)`. ref_policy: by default a frozen copy of policy.

    One iteration of the Trainer's loop is one round of rollout, score, advantages and update, without dropout. Where the reward
    function fails, a RewardError names the sample, and (with one process) the checkpoint is that of the iteration's beginning.
    """

    @staticmethod
    def get_default_config() -> CN:
        """The Trainer's options, some with other defaults, and PPO's own."""
        C = Trainer.get_default_config()
        C.algorithm = "ppo"           # or without a value function: rloo, grpo, and reinforce with one plain step a rollout
        C.baseline = True             # reinforce: returns less the rollout's mean, in standard deviations; False: as they are
        C.batch_size = 64             # episodes in a rollout
        C.group_size = None           # episodes of the same prompt, which is read once for them; None: 4 for rloo and grpo, else 1
        C.minibatch_size = None       # episodes per optimizer step; None: all of them
        C.ppo_epochs = 4              # passes over a rollout
        C.approxkl_max = None         # nats per token: no further pass where the policy is that far from the rollout's
        C.max_new_tokens = 64
        C.stop_token = None           # ends an episode; None: the tokenizer's end-of-text, if there is a tokenizer
        C.missing_eos_penalty = 0.0   # taken off the score of an episode that did not end by itself
        C.whiten_rewards = False      # ppo, reinforce: rewards to unit variance over the rollout's tokens, their mean kept
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
        C.value_lr_ratio = 1.0        # the value function's learning rate, as a multiple of the policy's
        C.shared_trunk = False        # the value function is a head on the policy's trunk, not a model of its own
        return C

    def __init__(self, config: CN, policy: nn.Module, reward_fn: RewardFn, prompts, value_model: nn.Module | None = None,
                 ref_policy: nn.Module | None = None, tokenizer=None):
        if config.algorithm not in ("ppo", "reinforce", "rloo", "grpo"):
            raise ValueError(f"algorithm={config.algorithm!r} must be ppo, reinforce, rloo or grpo")
        if config.algorithm != "ppo" and (value_model is not None or config.shared_trunk):
            raise ValueError(f"algorithm={config.algorithm!r} has no use for a value_model or shared_trunk=True: leave them out")
        if config.shared_trunk and value_model is not None:
            raise ValueError("shared_trunk=True does not go with a value_model, which has a trunk of its own: leave one of them out")
        if ref_policy is policy:
            raise ValueError("ref_policy is the policy itself, which will be trained: pass a copy of it, or nothing")
        if config.algorithm == "ppo" and value_model is None:
            if not isinstance(policy, GPT):
                raise ValueError(f"a {type(policy).__name__} is no GPT to make a value function from: pass one as value_model, "
                                 "with forward(idx, attention_mask) -> (B, T), or choose another algorithm")
            value_model = ValueHead(policy.config.n_embd) if config.shared_trunk else ValueModel.from_gpt(policy)
        self.stop_token = config.stop_token if config.stop_token is not None else getattr(tokenizer, "eot_token", None)
        self.block_size = getattr(getattr(policy, "config", None), "block_size", math.inf)
        self.group_size = config.group_size or (4 if config.algorithm in ("rloo", "grpo") else 1)
        self.reward_fn, self.tokenizer, self.kl_coef = reward_fn, tokenizer, config.kl_coef
        super().__init__(config, ActorCritic(policy, value_model),
                         encode_prompts(prompts, tokenizer), loss_fn=self.policy_and_value_loss, collate_fn=left_pad)
        self.policy = policy
        self.log_prob_error = 0.0  # largest difference in a minibatch between the log-probs of the rollout and of the update
        if isinstance(reward_fn, nn.Module):
            reward_fn.to(self.device).eval()  # a reward model: it, too, without dropout
        self.ref_policy = (ref_policy or copy.deepcopy(policy)).to(self.device).eval().requires_grad_(False)
        self.ref_checksum = checksum(self.ref_policy)

    def check_config(self) -> None:
        super().check_config()
        C = self.config
        check_numbers(C, "ppo_epochs", "max_new_tokens", low=1, whole=True)
        check_numbers(C, "group_size", low=2 if C.algorithm in ("rloo", "grpo") else 1, whole=True, optional=True)
        check_numbers(C, "minibatch_size", low=self.world_size, high=C.batch_size, whole=True, optional=True)
        check_numbers(C, "kl_coef", "clip_range", "value_clip_range", "value_coef", "value_lr_ratio", "missing_eos_penalty")
        check_numbers(C, "gamma", "gae_lambda", high=1)
        check_numbers(C, "kl_target", "approxkl_max", low=1e-6, optional=True)
        check_numbers(C, "kl_horizon", low=C.batch_size)
        if C.kl_target is not None and C.kl_coef == 0:
            raise ValueError(f"kl_coef=0 can't adapt towards kl_target={C.kl_target}, for it is multiplied: begin above 0")
        if C.missing_eos_penalty and self.stop_token is None:
            raise ValueError(f"missing_eos_penalty={C.missing_eos_penalty} where nothing ends an episode: set stop_token, or pass a tokenizer")
        for name, processes in (("batch_size", self.world_size), ("minibatch_size", self.world_size), ("micro_batch_size", 1)):
            if (size := getattr(C, name)) and size % (self.group_size * processes):
                raise ValueError(f"{name}={size} must be a multiple of group_size={self.group_size}" + f" times {processes} processes" * (processes > 1))

    def check_data(self) -> None:
        """ValueError for no prompts, or such that do not fit; there may be few: many episodes begin with the same one."""
        C, longest = self.config, max(map(len, self.train_dataset), default=0)
        if longest == 0:
            raise ValueError("prompts is empty: give one or more")
        if longest + C.max_new_tokens > self.block_size + 1:  # the last token is only predicted, never read
            raise ValueError(f"prompts of up to {longest} tokens and max_new_tokens={C.max_new_tokens} do not fit into the "
                             f"policy's block_size={self.block_size}: their sum may be {self.block_size + 1}")
        if isinstance(self.reward_fn, RewardModel) and longest + C.max_new_tokens > self.reward_fn.config.block_size:
            raise ValueError(f"prompts of up to {longest} tokens and max_new_tokens={C.max_new_tokens} do not fit into the reward "
                             f"model's block_size={self.reward_fn.config.block_size}")

    def state_dict(self) -> dict:
        return super().state_dict() | {"kl_coef": self.kl_coef, "ref_checksum": self.ref_checksum}

    def load_state_dict(self, state: dict) -> None:
        if state["ref_checksum"] != self.ref_checksum:
            raise ValueError(f"{self.folder.path} holds a run with another reference policy: start from the same one, or choose another work_dir")
        super().load_state_dict(state)
        self.kl_coef = state["kl_coef"]

    def batch_indices(self) -> Iterator[list[int]]:
        """The Trainer's; for groups, the first prompts of each batch, each of them group_size times: an epoch counts episodes, not prompts."""
        k = self.group_size
        return ([i for i in indices[:len(indices) // k] for _ in range(k)] for indices in super(PPOTrainer, self).batch_indices())

    # -- one iteration -------------------------------------------------------------------------------------------------

    def train_step(self, batch: tuple) -> dict:
        """Rollout, score, advantages, update."""
        self.model.eval()  # no dropout
        rng = get_rng_state()
        try:
            rollout = self.rollout(*batch)
        except RewardError:
            set_rng_state(rng)  # so that the run, when it goes on, samples the same texts once more
            if self.world_size == 1 and self.iter_num > 0:
                self.save_checkpoint()
            raise
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
        self.start = prompts.size(1) - 1  # the column of the first action
        self.shared = self.group_size if self.start else 1  # rows with a beginning that need be read only once: they stay together
        log_probs = lambda policy: self.in_parts(lambda i, m: ActorCritic(policy)(i, m, C.temperature, self.start, self.shared)[0], idx, attention_mask)
        values_of = lambda i, m: self.model.values(i, m, self.start, self.shared)
        with self.autocast():
            idx, sampled = self.policy.generate(prompts, C.max_new_tokens, temperature=C.temperature, do_sample=True, return_log_probs=True,
                                                attention_mask=prompt_mask, stop_token=self.stop_token)
            completion_mask = written_mask(idx, prompts.size(1), self.stop_token)
            attention_mask = torch.cat([prompt_mask, completion_mask[:, prompts.size(1):]], dim=1)
            # in half precision, sampling token by token rounds otherwise than reading the whole: there the update's way of it counts
            old_log_probs = F.pad(sampled, (self.start, 0)) if self.precision == "fp32" else log_probs(self.policy)
            ref_log_probs, values = log_probs(self.ref_policy), self.in_parts(values_of, idx, attention_mask)
        mask = completion_mask[:, 1:]
        ended = (completion_mask & (idx == (-1 if self.stop_token is None else self.stop_token))).any(1)
        reward_fn = functools.partial(self.reward_fn, group_size=self.shared) if isinstance(self.reward_fn, RewardModel) else self.reward_fn
        scores = score(reward_fn, idx, attention_mask, completion_mask, self.tokenizer).rewards - C.missing_eos_penalty * ~ended
        kl, values = masked(kl_estimate(old_log_probs, ref_log_probs), mask), masked(values, mask)
        advantages, returns = self.advantages(scores, kl, values, mask)
        return {"idx": idx, "attention_mask": attention_mask, "mask": mask, "old_log_probs": old_log_probs, "ref_log_probs": ref_log_probs,
                "kl": kl, "scores": scores, "ended": ended, "old_values": values, "returns": returns, "advantages": advantages}

    def in_parts(self, f: Callable, idx: Tensor, attention_mask: Tensor) -> Tensor:
        """f(idx, attention_mask), a micro-batch at a time, as in the update."""
        size = self.config.micro_batch_size or len(idx)
        return torch.cat([f(i, m) for i, m in zip(idx.split(size), attention_mask.split(size))])

    def advantages(self, scores: Tensor, kl: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The algorithm's (advantages, returns), both (B, T-1), from scores (B,) and the KL and values of each token (B, T-1)."""
        C = self.config
        if C.algorithm == "grpo":  # the penalty stands in the loss instead
            return grpo_advantages(scores, self.group_size)[:, None].expand_as(kl), values
        rewards = -self.kl_coef * kl
        rewards[torch.arange(len(scores)), last_real(mask)] += scores
        if C.algorithm == "rloo":  # a whole completion is one action, the penalty a part of its score
            return rloo_advantages(rewards.sum(1), self.group_size)[:, None].expand_as(kl), values
        if C.whiten_rewards:
            rewards = self.whiten(rewards, mask, shift_mean=False)
        # reinforce has no values: they are 0, and λ = 1 makes the advantage the return (Williams 1992)
        advantages, returns = gae(rewards, values, mask, C.gamma, C.gae_lambda if C.algorithm == "ppo" else 1.0)
        plain = C.algorithm == "reinforce" and not C.baseline
        return advantages if plain else self.whiten(advantages, mask), returns

    def whiten(self, x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        """`masked_whiten` over the episodes of all processes."""
        parts = distributed.gather(x[mask].cpu())
        whole = torch.cat(parts)
        white = masked_whiten(whole, torch.ones_like(whole), shift_mean).split([len(part) for part in parts])[self.rank]
        return torch.zeros_like(x).masked_scatter(mask, white.to(x.device))

    def update(self, rollout: dict) -> dict:
        """Epochs of minibatches over the rollout; returns the mean of their metrics.

        REINFORCE takes one step on all of it: there the ratio is 1, and PPO's gradient that of the plain policy gradient.
        """
        C, rows, size = self.config, [], len(rollout["idx"])
        share = (C.minibatch_size or C.batch_size) // self.world_size
        epochs, minibatch_size = (1, size) if C.algorithm == "reinforce" else (C.ppo_epochs, share)
        for _ in range(epochs):
            order = torch.arange(size).view(-1, self.shared)[torch.randperm(size // self.shared)].flatten()
            for index in order.split(minibatch_size):
                minibatch = {name: x[index.to(self.device)] for name, x in rollout.items()}
                self.log_prob_error = 0.0
                rows.append(self.optimizer_step(self.micro_batches(minibatch)) | {"log_prob_error": self.log_prob_error})
            if rows[-1]["policy/approxkl"] > (C.approxkl_max or math.inf):
                break
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
        log_probs, values = model(batch["idx"], batch["attention_mask"], C.temperature, self.start, self.shared)
        log_ratio = masked(log_probs - old_log_probs, mask).detach()
        loss, clip_fraction = ppo_policy_loss(log_probs, old_log_probs, batch["advantages"], mask, C.clip_range)
        self.log_prob_error = max(self.log_prob_error, log_ratio.abs().max().item())
        metrics = {"loss/policy": loss.detach(), "policy/clipfrac": clip_fraction, "policy/approxkl": masked_mean(log_ratio ** 2 / 2, mask),
                   "val/ratio": masked_mean(log_ratio.exp(), mask)}
        if C.algorithm == "ppo":
            v_loss = value_loss(values, batch["old_values"], batch["returns"], mask, C.value_clip_range)
            loss, metrics["loss/value"] = loss + C.value_coef * v_loss, v_loss.detach()
        if C.algorithm == "grpo":  # k3, averaged over all tokens, where the paper averages over each completion's first
            k3 = kl_estimate(masked(log_probs, mask), masked(batch["ref_log_probs"], mask), "k3")
            loss = loss + self.kl_coef * masked_mean(k3, mask)
        return loss, metrics

    def describe(self, rollout: dict) -> dict:
        """What the rollout looked like, under the field's usual names."""
        mask, returns = rollout["mask"], rollout["returns"]
        kl, scores = rollout["kl"].sum(1).mean(), rollout["scores"].mean()
        metrics = {"objective/kl": kl, "objective/scores": scores, "objective/rlhf_reward": scores - self.kl_coef * kl,
                   "objective/entropy": -masked_mean(rollout["old_log_probs"], mask), "episode_length": mask.sum(1).float().mean(),
                   "ended": rollout["ended"].float().mean(), "kl_coef": torch.tensor(self.kl_coef)}
        if self.config.algorithm == "ppo":
            residual = masked_mean((returns - rollout["old_values"]) ** 2, mask)
            variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
            metrics["val/explained_variance"] = 1 - residual / variance.clamp(min=1e-8)
        return {name: value.item() for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# masks, and which policy is which


def written_mask(idx: Tensor, prompt_length: int, stop_token: int | None = None) -> Tensor:
    """True on what was generated behind the prompt, up to and including the first stop token: (B, T) -> (B, T)."""
    mask = torch.ones_like(idx, dtype=torch.bool)
    mask[:, :prompt_length] = False
    if stop_token is not None:
        stops = (idx == stop_token) & mask
        mask &= stops.cumsum(1) - stops.long() == 0  # no stop token before this one
    return mask


def checksum(module: nn.Module) -> int:
    """CRC-32 of all of a module's weights and buffers, to tell one reference policy from another."""
    crc = 0
    for x in module.state_dict().values():
        crc = zlib.crc32(x.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy(), crc)
    return crc
