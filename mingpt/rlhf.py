"""
Reinforcement learning from human feedback: estimators, losses, the table of algorithms, PPOTrainer.

A language model, the policy, writes completions, and a reward function scores them. The policy
learns to earn more without moving far from where it started, the reference policy. One iteration:

    rollout       sample completions, and keep log π_old of each token
    score         score each whole text, and put a price on leaving the reference policy:
                  r_t = -kl_coef · (log π_old - log π_ref), plus the score on the last token
    advantages    how much better than expected each token was
    update        some epochs of minibatches on the clipped objective

In the words of reinforcement learning, the *state* is the text so far, an *action* is the next
token, and an *episode* is one completion of a prompt. A *score* is the reward function's number
for the whole episode; a *reward* is what a single action gets.

Most mistakes in RLHF code are about which token a number belongs to. Here all (B, T-1) tensors are
indexed by t and speak of the action idx[:, t+1], taken in the state idx[:, :t+1]. Take one row
whose prompt has 2 tokens and is padded on the left. The second <eot> only fills the row up:

    position           0     1     2     3     4     5     6
    idx                pad   p     p     a     b     <eot> <eot>
    attention_mask     0     1     1     1     1     1     0       what the models may read
    completion_mask    0     0     0     1     1     1     0       what the policy wrote, with <eot>

    t                  0     1     2     3     4     5
    action idx[t+1]    p     p     a     b     <eot> -
    mask               0     0     1     1     1     0             completion_mask[:, 1:]
    log_probs[t]       -     -     x     x     x     -             log π(idx[t+1] | idx[:t+1])
    values[t]          -     -     x     x     x     -             V(idx[:t+1]), before the action
    rewards[t]         0     0     -kl   -kl   s-kl  0             s the score, kl the penalty

Here x is a number, and - one that nobody reads.

How to read this file. It leads from single equations to the whole:

    masks and means          which tokens the policy wrote, and means over them
    estimators               the KL, and where advantages come from
    PPO's losses             the clipped objective, the value function's loss
    losses on comparisons    reward models and DPO; PPO needs none of it
    the family               ALGORITHMS: which choices make PPO, GRPO, ...
    Rollout, PPOTrainer      the functions above, put together: begin with `train_step`

Sources: Schulman et al. 2015 (GAE, arXiv:1506.02438), Schulman et al. 2017 (PPO, arXiv:1707.06347),
Ziegler et al. 2019 (RL on language models, arXiv:1909.08593), Stiennon et al. 2020
(arXiv:2009.01325), Huang et al. 2024 (arXiv:2403.17031). Each function names its own.
"""

import contextlib
import dataclasses
import math
import numbers
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt import distributed, lora
from mingpt.checkpoint import get_rng_state, set_rng_state
from mingpt.config import CfgNode as CN, check_booleans, check_numbers, check_present, documented
from mingpt.datasets import Prompts, check_tokenizer, default_stop_token
from mingpt.heads import ActorCritic, RewardModel, ValueHead, ValueModel, first_column
from mingpt.model import GPT, check_mask_values, last_real, stop_ids
from mingpt.rewards import RewardError, RewardFn, Scores, TextReward, check_reward_fn, score
from mingpt.run_folder import checksum
from mingpt.trainer import Trainer, check_trained
from mingpt.utils import check_equal_shapes, check_tensors, evaluation_mode

__all__ = [
    "ALGORITHMS",
    "ActorCritic",
    "Algorithm",
    "DPOLoss",
    "PPOTrainer",
    "RewardError",
    "RewardModel",
    "Rollout",
    "TextReward",
    "ValueHead",
    "ValueModel",
    "comparison_loss",
    "comparison_scores",
    "dpo_loss",
    "gae",
    "group_mean_advantages",
    "grpo_advantages",
    "ipo_loss",
    "kl_estimate",
    "masked",
    "masked_mean",
    "masked_whiten",
    "ppo_policy_loss",
    "reward_loss",
    "rloo_advantages",
    "shaped",
    "simpo_loss",
    "value_loss",
    "written_mask",
]

# --------------------------------------------------------------------------------------------------
# Masks, and means over them. Tensors are (B, T), and the mask is 1 on the tokens of the completion.
# Whatever is off the mask, prompt and padding, never matters.


def written_mask(
    idx: Tensor,
    prompt_length: int,
    stop_token: int | list[int] | tuple[int, ...] | None = None,
) -> Tensor:
    """True on what was generated after the prompt, up to its first stop token: (B, T) -> (B, T).

    The first stop token belongs to the completion, because the policy chose to write it. One in
    the prompt means nothing. Raises ValueError or TypeError for anything else.
    """
    check_tensors(idx=idx)
    if idx.dim() != 2 or idx.is_floating_point():
        raise ValueError(f"idx is {idx.dtype} {tuple(idx.shape)}; it must be a (B, T) LongTensor")
    check_numbers(CN(prompt_length=prompt_length), "prompt_length", high=idx.size(1), whole=True)
    mask = torch.ones_like(idx, dtype=torch.bool)
    mask[:, :prompt_length] = False
    # A token is a part of the completion if no stop token comes before it. The cumulative sum
    # counts a stop token itself, too, so it is taken off again.
    stops = is_stop(idx, stop_token) & mask
    stops_before = stops.cumsum(1) - stops.long()
    return mask & (stops_before == 0)


def is_stop(idx: Tensor, stop_token: int | list[int] | tuple[int, ...] | None) -> Tensor:
    """Where idx holds a stop token: a mask of idx's shape."""
    stops = torch.tensor(stop_ids(stop_token), dtype=idx.dtype, device=idx.device)
    return torch.isin(idx, stops)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x with zeros off the mask.

    The zeros are exact: NaN or infinity off the mask reaches neither a value nor a gradient.
    The mask must have x's shape and hold only 1 (True) and 0 (False): ValueError otherwise.
    On a GPU its values are not checked, and all but 0 count as 1.
    """
    check_tensors(x=x, mask=mask)
    if mask.shape != x.shape:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)} and what it masks {tuple(x.shape)}: they must "
            "be equal"
        )
    check_mask_values(mask)
    # Not x * mask, because NaN * 0 is NaN.
    return torch.where(mask.bool(), x, torch.zeros_like(x))


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x over the entries on the mask: of all, or along dim. 0 where there are none.

    ValueError for a mask that `masked` refuses, and for a dim that x does not have.
    """
    total = masked(x, mask)
    if dim is not None and dim not in range(-x.dim(), x.dim()):
        raise ValueError(f"dim={dim!r}: x has the dimensions 0 to {x.dim() - 1}")
    count = mask.bool().to(x.dtype)
    # Where there are none, 0 is divided by 1.
    if dim is None:
        return total.sum() / count.sum().clamp(min=1)
    return total.sum(dim) / count.sum(dim).clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x shifted to mean 0 and scaled to variance 1 over the mask; 0 off the mask.

    With shift_mean=False the mean stays what it was (Ziegler et al. whiten rewards in this way).
    """
    x = masked(x, mask)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    # Without the 1e-8, the rounding errors of a constant would be blown up to variance 1.
    whitened = (x - mean) * (variance + 1e-8).rsqrt()
    if not shift_mean:
        whitened = whitened + mean
    return masked(whitened, mask)  # once more: the shift has moved the zeros, too


# --------------------------------------------------------------------------------------------------
# Estimators: how far the policy has moved, and how much better than expected each action was


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str = "k1") -> Tensor:
    """Estimates of KL(π || π_ref), in nats, one for each token that π sampled: any shape.

    With r = π_ref / π (Schulman 2020, joschu.net/blog/kl-approx.html):

        k1 = -log r             unbiased
        k2 = (log r)² / 2       less variance, some bias
        k3 = r - 1 - log r      unbiased, and never negative

    The exact KL is a sum over the whole vocabulary. These need the sampled token's log-probs only.
    """
    check_equal_shapes(log_probs=log_probs, ref_log_probs=ref_log_probs)
    log_ratio = ref_log_probs - log_probs  # log r
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    if kind == "k3":
        return log_ratio.expm1() - log_ratio  # expm1(x) = exp(x) - 1, exact for small x, too
    raise ValueError(f"kind={kind!r} must be k1, k2 or k3")


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (advantages, returns), both (B, T), zero off the mask.

        δ_t = r_t + γ V_{t+1} - V_t
        A_t = Σ_l (γλ)^l δ_{t+l}            (Schulman et al. 2015, equation 16)
            = δ_t + γλ A_{t+1}
        returns_t = A_t + V_t               what the value function should have said

    δ_t is one step's surprise: what came, against what the value function foresaw. λ says how many
    of them to add up. With λ = 0, A_t is δ_t, which relies on the value function. With λ = 1, it is
    the sum of all rewards to come, less V_t, which is unbiased but noisy.

    The episode ends with the last token on the mask. After it, V and A are 0.
    ValueError for tensors of different shapes, and for γ or λ outside of [0, 1].
    """
    check_equal_shapes(rewards=rewards, values=values, mask=mask)
    check_numbers(CN(gamma=gamma, lam=lam), "gamma", "lam", high=1)
    rewards = masked(rewards, mask)
    values = masked(values, mask)
    # Backwards in time, since each advantage needs the next one. The padding after the last token
    # passes zeros on.
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    backwards = []
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        next_advantage = masked(delta + gamma * lam * next_advantage, mask[:, t])
        next_value = values[:, t]
        backwards.append(next_advantage)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


def shaped(rewards: Tensor, potentials: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Rewards with potential-based shaping (Ng et al. 1999, "Policy invariance"): (B, T).

        r_t + γ Φ_{t+1} - Φ_t

    The potential Φ_t says how good the text is so far, in the state in which action t is taken.
    So each action is rewarded at once for what it adds, instead of at the end of the episode. In
    the sum over an episode the potentials cancel, but for the first one. So which policy is the
    best stays the same. After the last token on the mask, Φ is 0.
    ValueError for tensors of different shapes, and for γ outside of [0, 1].
    """
    check_equal_shapes(rewards=rewards, potentials=potentials, mask=mask)
    check_numbers(CN(gamma=gamma), "gamma", high=1)
    potentials = masked(potentials, mask)
    next_potentials = F.pad(potentials[:, 1:], (0, 1))
    return masked(rewards + gamma * next_potentials - potentials, mask)


# Without a value function, "better than expected" can mean: better than other completions of the
# same prompt. Each prompt has group_size completions, which are adjacent. So scores (B,) hold
# B / group_size groups, and each completion gets one advantage for all its tokens.


def rloo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """REINFORCE leave-one-out (Ahmadian et al. 2024): (B,) -> (B,).

    Each score less the mean of the others in its group. A baseline that does not depend on the
    completion itself leaves the gradient unbiased.
    """
    groups = grouped(scores, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    # With k scores in a group: s - mean(others) = (s - mean(all)) · k / (k - 1)
    advantages = centred * group_size / (group_size - 1)
    return advantages.masked_fill(equal_groups(groups), 0.0).flatten()


def group_mean_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Each score less the mean of its group (Liu et al. 2025, Dr. GRPO): (B,) -> (B,)."""
    groups = grouped(scores, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return centred.masked_fill(equal_groups(groups), 0.0).flatten()


def grpo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Group-relative advantages (Shao et al. 2024): (B,) -> (B,).

    Each score less the mean of its group, divided by the standard deviation of its group (that of
    a sample, with n - 1).
    """
    groups = grouped(scores, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + 1e-8)
    return advantages.masked_fill(equal_groups(groups), 0.0).flatten()


def grouped(scores: Tensor, group_size: int) -> Tensor:
    """(B,) -> (B / group_size, group_size). ValueError if groups of that size do not fit."""
    check_tensors(scores=scores)
    if scores.dim() != 1:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; they must be (B,)")
    check_numbers(CN(group_size=group_size), "group_size", whole=True)
    if group_size < 2 or len(scores) % group_size:
        raise ValueError(
            f"group_size={group_size!r} must be 2 or more and divide the {len(scores)} scores"
        )
    return scores.view(-1, group_size)


def equal_groups(groups: Tensor) -> Tensor:
    """True for a group whose scores are all equal: (N, group_size) -> (N, 1).

    Their advantages are 0 by right. But in floating point, the mean of equal numbers is not always
    that number. Dividing this rounding error by a standard deviation of nearly 0 would make an
    advantage of it.
    """
    return groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)


# --------------------------------------------------------------------------------------------------
# The losses of PPO and its family. A loss is what the optimizer minimises, so where a paper
# maximises an objective, it appears here with a minus.


def average(
    x: Tensor,
    mask: Tensor,
    loss_mean: str = "token",
    max_new_tokens: int | None = None,
    denominator: float | None = None,
) -> Tensor:
    """Average the terms x (B, T) of a loss over the completions, in one of three ways.

        token       all tokens alike: the sum over all tokens / the number of tokens
        sequence    each completion's mean, then the mean over the completions
        constant    each completion's sum / max_new_tokens, then the mean over the completions

    denominator: what the sum is divided by. Pass it where x is a micro-batch: that of the whole
        minibatch, from `average_denominator`. Then the micro-batches' results add up to the
        minibatch's. By default, x's own.

    ValueError for another loss_mean, and for a mask that `masked` refuses.
    """
    # One term for each completion, (B,), or one for each token, (B, T).
    terms = masked_mean(x, mask, dim=1) if loss_mean == "sequence" else masked(x, mask)
    if denominator is None:
        # At least 1, so that the mean over an empty mask is 0.
        denominator = max(average_denominator(mask, loss_mean, max_new_tokens), 1.0)
    return terms.sum() / denominator


def average_denominator(
    mask: Tensor, loss_mean: str, max_new_tokens: int | None = None
) -> float:
    """What `average` divides its sum by: tokens, completions, or completions · max_new_tokens."""
    if loss_mean == "token":
        return float(mask.bool().sum())
    completions = float(mask.any(1).sum())  # rows that count in the loss: with a token or more
    if loss_mean == "sequence":
        return completions
    if loss_mean != "constant":
        raise ValueError(f"loss_mean={loss_mean!r} must be token, sequence, or constant")
    check_numbers(CN(max_new_tokens=max_new_tokens), "max_new_tokens", low=1, whole=True)
    assert max_new_tokens is not None  # it is a number
    return completions * max_new_tokens


def ppo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float | Sequence[float] = 0.2,
    ratio: str = "token",
    loss_mean: str = "token",
    max_new_tokens: int | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate objective, negated (Schulman et al. 2017, equation 7).

        L = -mean min(ρ A, clip(ρ, 1-ε, 1+ε) A),    ρ = π / π_old

    The paper writes r_t(θ) for ρ, but r is a reward here.

    clip_range: ε, or a pair (below, above) for clip(ρ, 1-below, 1+above) (Yu et al. 2025, DAPO).
    ratio: `token`, each token has its own ρ; or `sequence`, all tokens of a completion have the
        geometric mean of theirs (Zheng et al. 2025, GSPO, equation 7).
    loss_mean, max_new_tokens, denominator: what the mean runs over, as in `average`.

    Returns (loss, clip_fraction). clip_fraction is the share of tokens where the clipped term is
    the smaller one, so that no gradient flows. ValueError for tensors of different shapes and for
    other choices.
    """
    below, above = clip_bounds(clip_range)
    check_equal_shapes(
        log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask
    )

    # The probability ratio ρ of each token, (B, T), by way of its logarithm.
    log_ratio = masked(log_probs - old_log_probs, mask)
    if ratio == "sequence":
        # The mean of the logarithms is the logarithm of the geometric mean.
        log_ratio = masked_mean(log_ratio, mask, dim=1)[:, None].expand_as(log_ratio)
    elif ratio != "token":
        raise ValueError(f"ratio={ratio!r} must be token or sequence")
    rho = log_ratio.exp()

    # The clipped surrogate. Taking the smaller term makes it a pessimistic bound: nothing is gained
    # by pushing a ratio further than clip_range in the direction of its advantage.
    advantages = masked(advantages, mask)
    unclipped = rho * advantages
    clipped = rho.clamp(1 - below, 1 + above) * advantages
    objective = torch.minimum(unclipped, clipped)
    loss = -average(objective, mask, loss_mean, max_new_tokens, denominator)
    clip_fraction = masked_mean((clipped < unclipped).to(loss.dtype), mask)
    return loss, clip_fraction.detach()


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float = 0.2,
    denominator: float | None = None,
) -> Tensor:
    """Squared error of the value function against the returns R, clipped as the ratio is.

        L = 1/2 mean max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)

    The paper does not mention the clip; its authors' code has it (openai/baselines, ppo2; detail 9
    of Huang et al. 2022, "The 37 implementation details of PPO"). The mean runs over all tokens
    alike. denominator: as in `average`. ValueError for tensors of different shapes.
    """
    check_equal_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    check_numbers(CN(clip_range=clip_range), "clip_range")
    values = masked(values, mask)
    old_values = masked(old_values, mask)
    returns = masked(returns, mask)
    # The larger error counts, so a value gains nothing by moving further than clip_range at once.
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    squared_error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * average(squared_error, mask, denominator=denominator)


def clip_bounds(clip_range: float | Sequence[float]) -> tuple[float, float]:
    """(below, above) of a clip_range, which may be one number for both.

    ValueError for anything else than one or two numbers from 0 on.
    """
    pair = clip_range if isinstance(clip_range, Sequence) else (clip_range, clip_range)
    bounds = tuple(pair)
    if len(bounds) != 2 or not all(is_bound(bound) for bound in bounds):
        raise ValueError(
            f"clip_range={clip_range!r} must be a number from 0 on, or two: (below, above)"
        )
    return bounds


def is_bound(value: Any) -> bool:
    """Whether value is a number from 0 on, which infinity, NaN, True and False are not."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and 0 <= value < math.inf


# --------------------------------------------------------------------------------------------------
# Losses on comparisons: (B,) tensors, one number for each chosen and each rejected completion.
# Under the Bradley-Terry model, a person prefers the chosen completion with the probability
# σ(r_chosen - r_rejected). The losses differ in what stands for the reward r. (Only IPO does
# without this model.)


def reward_loss(chosen: Tensor, rejected: Tensor, margin: float = 0.0) -> Tensor:
    """Negative log-likelihood of comparisons, on rewards (Ouyang et al. 2022, equation 1).

        L = -mean log σ(r_chosen - r_rejected - margin)

    chosen and rejected are (B,) each; or (B, 1) and (B, K), each chosen one against K rejected.
    """
    check_pairs(chosen, rejected)
    check_numbers(CN(margin=margin), "margin", low=-math.inf)
    return -F.logsigmoid(chosen - rejected - margin).mean()


def check_pairs(chosen: Tensor, rejected: Tensor) -> None:
    """ValueError unless chosen and rejected are (B,) both, or (B, 1) and (B, K).

    Other shapes would silently be broadcast: (B,) and (B, 1) would compare all with all.
    """
    check_tensors(chosen=chosen, rejected=rejected)
    if chosen.shape == rejected.shape:
        return
    one_against_many = chosen.dim() == rejected.dim() == 2 and chosen.size(1) == 1
    if one_against_many and chosen.size(0) == rejected.size(0):
        return
    raise ValueError(
        f"chosen has shape {tuple(chosen.shape)} and rejected {tuple(rejected.shape)}: they must "
        "be (B,) both, or (B, 1) and (B, K)"
    )


def check_references(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    ref_chosen_log_probs: Tensor,
    ref_rejected_log_probs: Tensor,
) -> None:
    """ValueError unless the policy's log-probs have the shapes of the reference's."""
    check_equal_shapes(chosen_log_probs=chosen_log_probs, ref_chosen_log_probs=ref_chosen_log_probs)
    check_equal_shapes(
        rejected_log_probs=rejected_log_probs, ref_rejected_log_probs=ref_rejected_log_probs
    )


def dpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    ref_chosen_log_probs: Tensor,
    ref_rejected_log_probs: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7).

        L = -mean log σ(β (log π(chosen) / π_ref(chosen) - log π(rejected) / π_ref(rejected)))

    The log-probs are sums over the completions' tokens.
    """
    check_numbers(CN(beta=beta), "beta", low=1e-6)
    check_references(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs
    )
    # The policy is its own reward model: its implicit reward is β log π / π_ref.
    chosen_reward = beta * (chosen_log_probs - ref_chosen_log_probs)
    rejected_reward = beta * (rejected_log_probs - ref_rejected_log_probs)
    return reward_loss(chosen_reward, rejected_reward)


def ipo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    ref_chosen_log_probs: Tensor,
    ref_rejected_log_probs: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, equation 17; their τ is our β).

        L = mean (h - 1/(2β))²,   h = log π(chosen) / π_ref(chosen)
                                      - log π(rejected) / π_ref(rejected)

    The log-probs are sums over the completions' tokens. DPO's loss falls for ever as h grows. This
    one has its minimum at a finite h, so that it does not drive the policy ever further away where
    people always prefer the same completion.
    """
    check_numbers(CN(beta=beta), "beta", low=1e-6)
    check_pairs(chosen_log_probs, rejected_log_probs)
    check_references(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs
    )
    chosen_log_ratio = chosen_log_probs - ref_chosen_log_probs
    rejected_log_ratio = rejected_log_probs - ref_rejected_log_probs
    h = chosen_log_ratio - rejected_log_ratio
    return ((h - 1 / (2 * beta)) ** 2).mean()


def simpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """Simple preference optimisation (Meng et al. 2024, equation 6), without a reference policy.

        L = -mean log σ(β/|chosen| · log π(chosen) - β/|rejected| · log π(rejected) - γ)

    The log-probs are sums over the completions' tokens, the lengths their numbers of tokens.
    """
    check_numbers(CN(beta=beta), "beta", low=1e-6)
    check_numbers(CN(gamma=gamma), "gamma", low=-math.inf)
    check_lengths(chosen_log_probs, chosen_lengths)
    check_lengths(rejected_log_probs, rejected_lengths)
    # The reward is the mean log-prob of a token. It must be larger by the margin γ at least.
    chosen_reward = beta * chosen_log_probs / chosen_lengths
    rejected_reward = beta * rejected_log_probs / rejected_lengths
    return reward_loss(chosen_reward, rejected_reward, margin=gamma)


def check_lengths(log_probs: Tensor, lengths: Tensor) -> None:
    """ValueError unless there is a length of 1 or more for each of the log-probs."""
    check_tensors(log_probs=log_probs, lengths=lengths)
    # Lengths may be repeated for many rows, but must not give the log-probs another shape.
    try:
        shape = torch.broadcast_shapes(log_probs.shape, lengths.shape)
    except RuntimeError:
        shape = None
    if shape != log_probs.shape:
        raise ValueError(
            f"got log-probs of shape {tuple(log_probs.shape)} and lengths of shape "
            f"{tuple(lengths.shape)}: they must be equal"
        )
    # On a GPU this would force a sync.
    if lengths.device.type == "cpu" and not (lengths > 0).all():
        raise ValueError(f"lengths go down to {lengths.min()}; each must be 1 or more")


# --------------------------------------------------------------------------------------------------
# Learning from comparisons: what a plain Trainer takes as its loss_fn. A batch of `Comparisons` is
# (idx, attention_mask, completion_mask), all (B, K, T): each prompt has K completions, and the
# chosen one comes first.


def comparison_scores(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A RewardModel's scores of the chosen (B, 1) and of the rejected completions (B, K-1)."""
    check_comparisons(model, batch, RewardModel)
    B, K, _ = batch[0].shape
    # The model reads rows, (B·K, T). Each K adjacent rows share a prompt, which it reads only once.
    rows = [x.flatten(0, 1) for x in batch]
    scores = model(*rows, rows_per_prompt=K).view(B, K)
    return scores[:, :1], scores[:, 1:]


def comparison_loss(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    centering: float = 0.0,
    dropout: bool = False,
) -> tuple[Tensor, dict]:
    """The Trainer's loss_fn for a RewardModel on batches of `Comparisons`: (loss, accuracy).

        L = reward_loss + centering · mean (r_chosen + r_rejected)²

    Bradley-Terry knows differences only, so the mean of each prompt's rewards is left free. The
    second term draws it to 0. Then rewards differ by how good the completions are, and not by
    prompt (Eisenstein et al. 2023, arXiv:2312.09244). A centering of 0.01 is enough.

    dropout: whether to use the model's dropout. By default it is off. With it, even two equal texts
    would get different rewards, and a gradient that draws them apart.
    """
    check_numbers(CN(centering=centering), "centering")  # it checks the options of a config
    check_booleans(CN(dropout=dropout), "dropout")
    with contextlib.nullcontext() if dropout else evaluation_mode(model):
        chosen, rejected = comparison_scores(model, batch)
    loss = reward_loss(chosen, rejected) + centering * (chosen + rejected).square().mean()
    accuracy = (chosen > rejected).float().mean()
    return loss, {"accuracy": accuracy}


def check_comparisons(model: Any, batch: Any, kind: type[nn.Module]) -> None:
    """ValueError or TypeError unless batch is one of `Comparisons`, and the model of that kind."""
    # A model of another library may do as well. One of ours is of the right kind or not.
    is_other_kind = isinstance(model, (GPT, RewardModel, ValueModel, ActorCritic))
    if not isinstance(model, kind) and (is_other_kind or not callable(model)):
        raise TypeError(
            f"the model is a {type(model).__name__}; this loss is for a {kind.__name__}"
        )
    if not isinstance(batch, (tuple, list)) or len(batch) != 3:
        raise ValueError(
            f"the batch is {type(batch).__name__} {batch!r:.60}; expected (idx, attention_mask, "
            "completion_mask), as Comparisons.collate makes it"
        )
    idx, attention_mask, completion_mask = batch
    check_equal_shapes(idx=idx, attention_mask=attention_mask, completion_mask=completion_mask)
    if idx.dim() != 3 or idx.size(1) < 2:
        raise ValueError(
            f"the batch has idx of shape {tuple(idx.shape)}; expected (B, K, T), with K >= 2 "
            "completions of each prompt"
        )


class DPOLoss:
    """The Trainer's loss_fn for DPO, IPO or SimPO; the model to train is ActorCritic(policy).

    ref_policy: where the policy starts from (or the policy itself, before it is trained); a frozen
        copy is kept. Of a policy with adapters it is its trunk with the adapter off, or a copy of
        the adapter alone, as `lora.snapshot` says. SimPO has no reference: pass None.
    beta: β of the loss, by default 0.1 for dpo and ipo, 2.0 for simpo.
    loss: dpo, ipo or simpo.
    gamma: the target margin of simpo, by default 1.0; the others have none.
    dropout: whether to use the policy's dropout. By default it is off. The reference has none, so
        with it DPO's loss would not begin at log 2.
    """

    def __init__(
        self,
        ref_policy: nn.Module | None,
        beta: float | None = None,
        loss: str = "dpo",
        gamma: float | None = None,
        dropout: bool = False,
    ):
        if loss not in ("dpo", "ipo", "simpo"):
            raise ValueError(f"loss={loss!r} must be dpo, ipo or simpo")
        if loss == "simpo" and ref_policy is not None:
            raise ValueError("loss='simpo' has no use for a reference policy: pass None")
        if loss != "simpo" and ref_policy is None:
            raise ValueError(f"loss={loss!r} needs a reference policy, not None")
        if ref_policy is not None and not hasattr(ref_policy, "log_probs"):
            raise TypeError(
                f"ref_policy is a {type(ref_policy).__name__}; a policy needs GPT's log_probs"
            )
        if loss != "simpo" and gamma is not None:
            raise ValueError(f"loss={loss!r} has no margin gamma={gamma!r}: leave it out")
        if beta is None:
            beta = 2.0 if loss == "simpo" else 0.1
        if gamma is None:
            gamma = 1.0
        check_numbers(CN(beta=beta), "beta", low=1e-6)
        check_numbers(CN(gamma=gamma), "gamma")
        check_booleans(CN(dropout=dropout), "dropout")
        self.loss = loss
        self.beta = beta
        self.gamma = gamma
        self.dropout = dropout
        self.reference: ActorCritic | None = None
        if ref_policy is not None:
            # An ActorCritic without a value function. It reads each prompt only once.
            self.reference = ActorCritic(lora.snapshot(ref_policy)).eval().requires_grad_(False)

    def __call__(self, model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict]:
        """(loss, accuracy): how often the chosen completion has the larger implicit reward."""
        with contextlib.nullcontext() if self.dropout else evaluation_mode(model):
            log_probs = completion_log_probs(model, batch)  # (B, K)
        # One against many: (B, 1) and (B, K-1).
        chosen, rejected = log_probs[:, :1], log_probs[:, 1:]

        if self.reference is None:
            # SimPO: log-probs per token.
            _, _, completion_mask = batch
            lengths = completion_mask.sum(2)  # (B, K)
            chosen_length, rejected_length = lengths[:, :1], lengths[:, 1:]
            loss = simpo_loss(
                chosen, rejected, chosen_length, rejected_length, self.beta, self.gamma
            )
            prefers_chosen = chosen / chosen_length > rejected / rejected_length
        else:
            # DPO and IPO: log-probs against those of the reference.
            idx = batch[0]
            ref_log_probs = completion_log_probs(self.reference.to(idx.device), batch)
            ref_chosen, ref_rejected = ref_log_probs[:, :1], ref_log_probs[:, 1:]
            loss_fn = dpo_loss if self.loss == "dpo" else ipo_loss
            loss = loss_fn(chosen, rejected, ref_chosen, ref_rejected, self.beta)
            prefers_chosen = chosen - ref_chosen > rejected - ref_rejected
        return loss, {"accuracy": prefers_chosen.float().mean()}


def completion_log_probs(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The log-probability of each completion, summed over its tokens: (B, K).

    model: an ActorCritic, which reads a prompt once for all K completions.
    """
    check_comparisons(model, batch, ActorCritic)
    B, K, _ = batch[0].shape
    idx, attention_mask, completion_mask = (x.flatten(0, 1) for x in batch)  # (B·K, T)
    # The prompt's last token is read with each completion, not with the prefix that they share: the
    # first token of the completion is predicted there.
    log_probs, _ = model(
        idx,
        attention_mask,
        temperature=1.0,
        prefix_length=first_column(completion_mask) - 1,
        rows_per_prompt=K,
    )
    # log π(completion | prompt) = Σ_t log π(token t | everything before it)
    return masked(log_probs, completion_mask[:, 1:]).sum(1).view(B, K)


# --------------------------------------------------------------------------------------------------
# The family. PPO, RLOO, GRPO and the others differ in a few independent choices, and an algorithm
# is a row of them. PPOTrainer asks for a choice, never for an algorithm's name. Each choice is also
# an option of the same name, so it can be set by itself. RLHF.md shows the rows side by side.

GROUP_ADVANTAGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "leave_one_out": rloo_advantages,
    "group_mean": group_mean_advantages,
    "group_standardized": grpo_advantages,
}


@dataclass(frozen=True)
class Algorithm:
    """What an algorithm of PPO's family decides. The defaults are what most of them share."""

    # Where the advantage of a token comes from. With a value function: gae. Without: return (the
    # rewards from here to the end), or the completion's score against others of its prompt:
    # leave_one_out, group_mean or group_standardized.
    advantage: str
    # Whether advantages are then shifted and scaled to mean 0 and variance 1 over the rollout.
    whiten_advantages: bool = False
    # Where the penalty for leaving the reference policy goes: into the reward of each token, into
    # the loss as a term of its own, or nowhere (none).
    kl_penalty: str = "reward"
    # How that penalty is estimated on the sampled tokens: k1, k2 or k3 (see `kl_estimate`).
    kl_estimator: str = "k1"
    # The penalty's weight β, in reward per nat.
    kl_coef: float = 0.05
    # What the loss is averaged over: token, sequence or constant (see `average`).
    loss_mean: str = "token"
    # Whose ratio π / π_old is clipped: of each token, or one for the whole sequence.
    ratio: str = "token"
    # How far the ratio may go from 1: ε, or two of them, (below, above).
    clip_range: float | tuple[float, float] = 0.2
    # Whether groups whose completions all earned the same are left out of the loss.
    skip_equal_groups: bool = False
    # How often the update passes over a rollout.
    ppo_epochs: int = 4
    # Completions of each prompt in a rollout.
    group_size: int = 1


# Each row names only what differs from the defaults above.
ALGORITHMS = {
    # Schulman et al. 2017; on language models Ziegler et al. 2019. A value function foresees the
    # return from each token on.
    "ppo": Algorithm(
        advantage="gae",
        whiten_advantages=True,
    ),
    # Williams 1992. No value function; whitening makes the mean return the baseline. One pass over
    # the rollout: in a single step the ratio is 1, and nothing is clipped.
    "reinforce": Algorithm(
        advantage="return",
        whiten_advantages=True,
        ppo_epochs=1,
    ),
    # Hu 2025, REINFORCE++: the same, with PPO's clip and its epochs.
    "reinforce_pp": Algorithm(
        advantage="return",
        whiten_advantages=True,
    ),
    # Ahmadian et al. 2024. The baseline is the mean score of the prompt's other completions. The
    # paper's action is the whole completion; we keep token ratios.
    "rloo": Algorithm(
        advantage="leave_one_out",
        group_size=4,
    ),
    # Shao et al. 2024. Scores are standardised within each group, and the penalty moves from the
    # reward into the loss.
    "grpo": Algorithm(
        advantage="group_standardized",
        kl_penalty="loss",
        kl_estimator="k3",
        kl_coef=0.04,
        loss_mean="sequence",
        group_size=4,
    ),
    # Liu et al. 2025. GRPO without its two biases: the division by each completion's length, and
    # the one by the group's standard deviation, which favours very easy and very hard prompts.
    "dr_grpo": Algorithm(
        advantage="group_mean",
        kl_penalty="none",
        kl_coef=0.0,
        loss_mean="constant",
        group_size=4,
    ),
    # Yu et al. 2025. More room above 1 than below, so that rare tokens can become likely; and no
    # groups that teach nothing. The paper also samples until the batch is full, and shapes the
    # rewards of overlong completions: not here.
    "dapo": Algorithm(
        advantage="group_standardized",
        kl_penalty="none",
        kl_coef=0.0,
        clip_range=(0.2, 0.28),
        skip_equal_groups=True,
        group_size=4,
    ),
    # Zheng et al. 2025. The score is of the whole sequence, so the ratio is, too. Being a mean over
    # tokens, it moves far less than the ratio of one token, so it is clipped far sooner.
    "gspo": Algorithm(
        advantage="group_standardized",
        kl_penalty="none",
        kl_coef=0.0,
        loss_mean="sequence",
        ratio="sequence",
        clip_range=(3e-4, 4e-4),
        group_size=4,
    ),
}

CHOICES = [field.name for field in dataclasses.fields(Algorithm)]


def choose(config: CN) -> Algorithm:
    """The row of config.algorithm, with the choices that config sets itself in place of the row's.

    ValueError for an unknown algorithm, an unknown choice, or choices that do not go together.
    """
    check_present(config, ["algorithm", *CHOICES])
    if config.algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={config.algorithm!r} must be one of {', '.join(ALGORITHMS)}")
    # Begin with the row, and replace what the config sets itself. None means the row's value.
    options = {name: getattr(config, name) for name in CHOICES}
    own = {name: value for name, value in options.items() if value is not None}
    choices = dataclasses.replace(ALGORITHMS[config.algorithm], **own)
    # With kl_penalty=none set by itself, the row's kl_coef has no use: it becomes 0. (If the config
    # sets one, too, check_combination refuses it.)
    if choices.kl_penalty == "none" and config.kl_coef is None:
        choices = dataclasses.replace(choices, kl_coef=0.0)
    check_choices(choices)
    return choices


def check_choices(choices: Algorithm) -> None:
    """ValueError for a choice that does not exist, or choices that do not go together."""
    allowed = {
        "advantage": ("gae", "return", *GROUP_ADVANTAGES),
        "kl_penalty": ("reward", "loss", "none"),
        "kl_estimator": ("k1", "k2", "k3"),
        "loss_mean": ("token", "sequence", "constant"),
        "ratio": ("token", "sequence"),
        "whiten_advantages": (True, False),
        "skip_equal_groups": (True, False),
    }
    for name, values in allowed.items():
        value = getattr(choices, name)
        if value not in values:
            options = ", ".join(str(value) for value in values)
            raise ValueError(f"{name}={value!r} must be one of {options}")
    check_numbers(choices, "ppo_epochs", "group_size", low=1, whole=True)
    check_numbers(choices, "kl_coef")
    clip_bounds(choices.clip_range)
    check_combination(choices)


def check_combination(choices: Algorithm) -> None:
    """ValueError for choices that do not go together."""
    compares_completions = choices.advantage in GROUP_ADVANTAGES
    if compares_completions and choices.group_size == 1:
        raise ValueError(
            f"advantage={choices.advantage} compares completions of one prompt, and group_size=1 "
            "samples only one: set group_size to 2 or more"
        )
    if choices.skip_equal_groups and choices.group_size == 1:
        raise ValueError(
            "skip_equal_groups=True with group_size=1 would skip every episode: set group_size to "
            "2 or more"
        )
    if choices.ratio == "sequence" and not compares_completions:
        raise ValueError(
            f"ratio=sequence needs one advantage for the whole completion, and "
            f"advantage={choices.advantage} gives one for each token: use "
            f"{', '.join(GROUP_ADVANTAGES)}, or ratio=token"
        )
    if choices.kl_penalty == "none" and choices.kl_coef > 0:
        raise ValueError(
            f"kl_coef={choices.kl_coef} has no effect with kl_penalty=none: leave it out, or set "
            "kl_penalty to reward or loss"
        )
    if choices.kl_penalty == "loss" and choices.kl_estimator == "k1":
        raise ValueError(
            "kl_estimator=k1 in the loss has a gradient of zero on average: use k2 or k3 there, "
            "or kl_penalty=reward"
        )


# --------------------------------------------------------------------------------------------------
# What flows from one step of an iteration to the next


@dataclass
class Rollout:
    """A batch of episodes, and everything that the update needs to know of them.

    B episodes in T columns: left-padded prompts, then completions. (B, T-1) tensors speak of the
    actions idx[:, 1:]; see the drawing at the top of this file.
    """

    # What was written.
    idx: Tensor  # (B, T) token ids
    attention_mask: Tensor  # (B, T) True on real tokens, prompt and completion
    mask: Tensor  # (B, T-1) True on the actions of the policy
    # What the models say of it.
    old_log_probs: Tensor  # (B, T-1) log π_old, of the policy that sampled them
    ref_log_probs: Tensor  # (B, T-1) log π_ref
    old_values: Tensor  # (B, T-1) V before the update; zeros without a value function
    kl: Tensor  # (B, T-1) log π_old - log π_ref on the mask (k1), in nats
    # What it is worth.
    scores: Tensor  # (B,) of the whole texts, less the penalty for a missing end
    ended: Tensor  # (B,) True where a stop token ended it, False where max_new_tokens did
    prompt_index: Tensor  # (B,) which of the prompts each row continues
    # What the update learns from.
    advantages: Tensor  # (B, T-1) how much better than expected each action was
    returns: Tensor  # (B, T-1) what the value function should have said
    counted: Tensor  # (B,) True where the episode counts in the loss (see skip_equal_groups)
    # How it can be read faster. Adjacent rows continue the same prompt, so their first columns are
    # equal, and the models read this prefix once for all of them. The prompt's last token is not in
    # the prefix: the first action is taken there, in each row. Two prompts with two rows each:
    #
    #     p p | p a b <eot>
    #     p p | p c <eot>          prefix_length = 2
    #     q q | q d e f            rows_per_prompt = 2
    #     q q | q <eot>
    prefix_length: int  # columns that adjacent rows share
    rows_per_prompt: int  # how many adjacent rows share them
    # For the log.
    metrics: dict[str, float]  # what the reward function reports of itself

    def __len__(self) -> int:
        return len(self.idx)

    @property
    def loss_mask(self) -> Tensor:
        """(B, T-1): True on the actions that count in the loss."""
        return self.mask & self.counted[:, None]

    def select(self, rows: Tensor | slice) -> "Rollout":
        """The episodes in these rows. Rows that share a prefix must stay together."""
        # All tensors have one row for each episode.
        tensors = {
            field.name: getattr(self, field.name)[rows]
            for field in dataclasses.fields(self)
            if torch.is_tensor(getattr(self, field.name))
        }
        return dataclasses.replace(self, **tensors)


@dataclass
class MicroBatch:
    """As many episodes of a minibatch as fit into memory at once, and what its losses need.

    The loss of a minibatch is a sum of terms over a denominator. A micro-batch has some of the
    terms, and the denominator of all. So the losses of all micro-batches add up.
    """

    episodes: Rollout
    # Tokens that count in the loss, in the whole minibatch and in all processes.
    tokens: float
    # What the policy's loss is divided by: these tokens, or completions, or completions times
    # max_new_tokens, as loss_mean says (see `average_denominator`).
    denominator: float
    # `policy_loss` notes its largest |log π - log π_old| here. All micro-batches of a minibatch
    # hold the same list. (Metrics are added up over micro-batches, and a maximum cannot be.)
    log_prob_errors: list[Tensor]


# --------------------------------------------------------------------------------------------------
# The trainer


class PPOTrainer(Trainer):
    """Teaches a policy to earn reward without moving far from where it started.

    policy: a GPT, or any module with its `log_probs` and `generate`. (Such a module needs a
        value_model, too, for algorithms with a value function.)
    reward_fn: a RewardModel, a TextReward, or any function of idx, attention_mask and
        completion_mask, all (B, T), that returns rewards (B,).
    prompts: a list of texts (needs the tokenizer), a list of lists of token ids, an (N, T)
        LongTensor, or dicts with "prompt" and further columns for a TextReward's functions.
    value_model: by default `ValueModel.from_gpt(policy)`, for algorithms that need one, or
        `ValueModel.on(policy)` where the policy has adapters.
    ref_policy: by default the policy as it is now: a frozen copy of it, or with adapters its trunk
        with the adapter off, or with a frozen copy of the adapter (`lora.snapshot`).

    One iteration of the Trainer's loop is a rollout, its scores, advantages and the update, all
    without dropout. If the reward function fails, a RewardError names the sample. With one
    process, a checkpoint of the iteration's beginning is saved first (not in the first
    iteration, when nothing is learned yet).
    """

    model: ActorCritic

    @staticmethod
    @documented
    def get_default_config() -> CN:
        """The Trainer's options, some with other defaults, and PPO's own."""
        C = Trainer.get_default_config()  # PPO's defaults are others for these:
        C.batch_size = 64             # episodes in a rollout, of all processes together
        C.learning_rate = 1e-4
        C.eps = 1e-5                  # as in the PPO papers' code (Huang et al. 2024)
        C.weight_decay = 0.0
        C.log_every = 1
        C.checkpoint_every = 20
        # The algorithm, and its choices (see `Algorithm`). None: as the algorithm's row has it.
        C.algorithm = "ppo"           # a row of ALGORITHMS
        C.advantage = None            # gae, return, leave_one_out, group_mean, group_standardized
        C.whiten_advantages = None    # to mean 0 and variance 1 over the rollout's tokens
        C.kl_penalty = None           # in the reward, in the loss, or none
        C.kl_estimator = None         # k1, k2 or k3
        C.kl_coef = None              # beta, reward per nat
        C.loss_mean = None            # over tokens (token), completions (sequence), or constant
        C.ratio = None                # of each token (token), or of completions (sequence)
        C.clip_range = None           # epsilon, or a pair (below, above)
        C.skip_equal_groups = None    # leave out groups whose completions all earned the same
        C.ppo_epochs = None           # passes over a rollout
        C.group_size = None           # episodes that begin with the same prompt
        # The rollout.
        C.max_new_tokens = 64         # tokens in a completion, at most
        C.temperature = 1.0           # divides the logits, in sampling and in all log-probs
        C.stop_token = None           # id(s) that end an episode; None: the tokenizer's end
        C.missing_eos_penalty = 0.0   # taken off the score of an episode that did not end
        C.log_samples = 4             # episodes of each logged rollout for samples.jsonl
        # Rewards and advantages.
        C.whiten_rewards = False      # rewards to variance 1 over the rollout's tokens
        C.shaping = False             # reward each token for what it adds to the score so far
        C.kl_target = None            # nats per episode: adapt kl_coef towards it
        C.kl_horizon = 10_000         # ... over so many episodes
        C.gamma = 1.0                 # discount of a reward one token later
        C.gae_lambda = 0.95           # gae: 0 trusts the value function, 1 the sampled rewards
        # The update.
        C.minibatch_size = None       # episodes per optimizer step; None: all of the rollout
        C.approxkl_max = None         # end the passes above this KL to pi_old, nats/token
        C.value_clip_range = 0.2      # how far a value may move in one update
        C.value_coef = 0.1            # the value function's weight in the loss
        C.value_lr_ratio = 1.0        # the value function's learning rate / the policy's
        C.shared_trunk = False        # the value function is a head on the policy's trunk
        return C

    def __init__(
        self,
        config: CN,
        policy: nn.Module,
        reward_fn: RewardFn,
        prompts: Any,
        value_model: nn.Module | None = None,
        ref_policy: nn.Module | None = None,
        tokenizer: Any = None,
    ):
        check_policy(policy, ref_policy)
        if tokenizer is not None:
            check_tokenizer(tokenizer, "encode", "decode")
        # The algorithm's choices, once and for all: no method below asks for its name.
        self.check_config(config)
        self.choices = choose(config)
        self.kl_coef: float = self.choices.kl_coef  # the current β: a kl_target moves it
        # Where rewards come from, and what ends an episode.
        self.reward_fn = reward_fn
        self.tokenizer = tokenizer
        self.stop_token = config.stop_token
        if self.stop_token is None:
            self.stop_token = default_stop_token(tokenizer)
        # A policy that is no GPT may have no limit to its context.
        policy_config = getattr(policy, "config", None)
        self.block_size: float = getattr(policy_config, "block_size", math.inf)
        # To the Trainer, policy and value function are one model, the prompts are the dataset, and
        # a batch for its loss_fn is a MicroBatch.
        value_model = self.make_value_model(config, policy, value_model)
        super().__init__(
            config,
            ActorCritic(policy, value_model),
            Prompts(prompts, tokenizer),
            loss_fn=self.policy_and_value_loss,
            collate_fn=Prompts.collate,
        )

        self.policy = policy
        self.take_turns = lora.stands_on_another(value_model)  # policy and value: see `value_turn`
        # Only then can the sampler's own log-probs be used (see `sample`).
        self.weights_are_fp32 = all(p.dtype == torch.float32 for p in policy.parameters())
        # A reward model and the reference are used as they are, without dropout.
        if isinstance(reward_fn, nn.Module):
            reward_fn.to(self.device).eval()
        self.ref_policy = self.make_reference(ref_policy)
        check_vocabularies(policy, self.ref_policy, value_model, reward_fn)
        # A resumed run must have the same one.
        self.ref_checksum = checksum(self.ref_policy.state_dict().values())
        self.last_rollout: Rollout | None = None

    def make_reference(self, ref_policy: nn.Module | None) -> nn.Module:
        """The frozen policy π_ref that the KL is measured against: by default, ours as it is."""
        reference = lora.snapshot(self.policy) if ref_policy is None else ref_policy
        reference.to(self.device).eval().requires_grad_(False)
        return reference

    def make_value_model(
        self, config: CN, policy: nn.Module, value_model: nn.Module | None
    ) -> nn.Module | None:
        """The value function that the algorithm needs, if any. ValueError if it cannot be had."""
        # Only gae asks a value function.
        if self.choices.advantage != "gae":
            if value_model is not None or config.shared_trunk:
                raise ValueError(
                    f"advantage={self.choices.advantage} needs no value function: leave out "
                    "value_model and shared_trunk"
                )
            return None
        if config.shared_trunk and value_model is not None:
            raise ValueError(
                "shared_trunk=True makes a value function on the policy's trunk, and a value_model "
                "was passed: leave one of them out"
            )
        # The caller's, or one that starts from the policy: as a head on it, as a copy, or with an
        # adapter of its own on the policy's trunk.
        if value_model is not None:
            if not isinstance(value_model, nn.Module) or isinstance(value_model, GPT):
                raise TypeError(
                    f"value_model is a {type(value_model).__name__}; expected a ValueModel, or a "
                    "module with forward(idx, attention_mask) -> (B, T)"
                )
            return value_model
        if not isinstance(policy, GPT):
            raise ValueError(
                f"a value function can be made from a GPT, not from a {type(policy).__name__}: "
                "pass a value_model with forward(idx, attention_mask) -> (B, T), or choose an "
                "algorithm without one"
            )
        if config.shared_trunk:
            return ValueHead(policy.config.n_embd)
        if lora.is_adapted(policy):
            return ValueModel.on(policy)
        return ValueModel.from_gpt(policy)

    # -- one iteration -----------------------------------------------------------------------------

    def train_step(self, batch: tuple) -> dict:
        """One iteration: a rollout with its scores and advantages, then the update."""
        # No dropout, in the rollout nor in the update: else π and π_old would differ at once.
        self.model.eval()

        # Sample episodes and judge them. If that fails, go back to the iteration's beginning, so
        # that a continued run samples the same texts.
        rng = get_rng_state()
        try:
            rollout = self.rollout(*batch)
        except RewardError:
            set_rng_state(rng)
            if self.world_size == 1 and self.iter_num > 0:
                self.save_checkpoint()
            raise
        self.last_rollout = rollout  # for `samples`
        self.tokens += int(rollout.mask.sum()) * self.world_size  # as if all had written as much

        # Learn from them, and describe both, over all processes.
        metrics = distributed.mean(self.update(rollout) | self.describe(rollout))
        metrics |= mean_by_name(distributed.gather(rollout.metrics))
        self.adapt_kl_coef(metrics["objective/kl"])
        return metrics

    @torch.no_grad()
    def rollout(self, prompts: Tensor, prompt_mask: Tensor, prompt_index: Tensor) -> Rollout:
        """Sample an episode for each row of prompts, score it, and estimate its advantages.

        prompts, prompt_mask: (B, P), left-padded. prompt_index: (B,), their rows in the dataset.
        """
        # What needs to be read only once for all completions of a prompt.
        prefix_length, rows_per_prompt = self.shared_prefix(prompts)
        prefix = (prefix_length, rows_per_prompt)

        # Sample the completions, and read them with the reference and the value function.
        with self.autocast():
            idx, attention_mask, completion_mask, old_log_probs = self.sample(
                prompts, prompt_mask, *prefix
            )
            ref_log_probs = self.log_probs(self.ref_policy, idx, attention_mask, *prefix)
            values = self.values(idx, attention_mask, *prefix)
        mask = completion_mask[:, 1:]  # (B, T-1): from columns of idx to actions
        values = masked(values, mask)

        # Score the whole texts, (B,). Those that were cut off may pay for it.
        scored = self.score(idx, attention_mask, completion_mask, prompt_index, rows_per_prompt)
        ended = (completion_mask & is_stop(idx, self.stop_token)).any(1)
        scores = scored.rewards - self.config.missing_eos_penalty * ~ended

        # From scores to the reward of each token, and from there to advantages: (B, T-1).
        texts = (idx, attention_mask, completion_mask, prompt_index)
        potentials = self.potentials(*texts, *prefix) if self.config.shaping else None
        rewards = self.token_rewards(scores, old_log_probs, ref_log_probs, mask, potentials)
        advantages, returns = self.advantages(rewards, values, mask)
        return Rollout(
            idx=idx,
            attention_mask=attention_mask,
            mask=mask,
            old_log_probs=old_log_probs,
            ref_log_probs=ref_log_probs,
            old_values=values,
            kl=masked(kl_estimate(old_log_probs, ref_log_probs), mask),
            scores=scores,
            ended=ended,
            prompt_index=prompt_index,
            advantages=advantages,
            returns=returns,
            counted=self.counted(rewards.sum(1)),
            prefix_length=prefix_length,
            rows_per_prompt=rows_per_prompt,
            metrics=scored.metrics,
        )

    # -- the parts of a rollout --------------------------------------------------------------------

    def shared_prefix(self, prompts: Tensor) -> tuple[int, int]:
        """(prefix_length, rows_per_prompt) of a rollout on prompts (B, P): see `Rollout`."""
        # The first action is taken after the prompt's last token. So all columns but the last are
        # prefix, and the group_size completions of a prompt share it.
        prefix_length = prompts.size(1) - 1
        if prefix_length == 0:
            return 0, 1  # prompts of one token: there is nothing to share
        return prefix_length, self.choices.group_size

    def sample(
        self, prompts: Tensor, prompt_mask: Tensor, prefix_length: int, rows_per_prompt: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Continue the prompts (B, P): idx, attention_mask, completion_mask (B, T), and log π_old.

        Samples from the whole softmax: with top-k or top-p the ratio would not start at 1.
        """
        # The prompts, each with n new tokens: (B, P + n), and the log-probs of the n: (B, n).
        idx, log_probs = self.policy.generate(  # type: ignore[operator]  # need not be a GPT
            prompts,
            self.config.max_new_tokens,
            temperature=self.config.temperature,
            do_sample=True,
            attention_mask=prompt_mask,
            stop_token=self.stop_token,
            return_log_probs=True,
        )
        prompt_length = prompts.size(1)
        completion_mask = written_mask(idx, prompt_length, self.stop_token)
        attention_mask = torch.cat([prompt_mask, completion_mask[:, prompt_length:]], dim=1)

        # The sampler knows log π of what it drew. But in half precision, sampling token by token
        # rounds differently from one pass over the whole row, which is what the update does. There
        # the log-probs are computed again, so that the ratio starts at 1.
        if self.precision == "fp32" and self.weights_are_fp32:
            old_log_probs = F.pad(log_probs, (prefix_length, 0))  # (B, n) -> (B, T-1)
        else:
            old_log_probs = self.log_probs(
                self.policy, idx, attention_mask, prefix_length, rows_per_prompt
            )
        return idx, attention_mask, completion_mask, old_log_probs

    def log_probs(
        self,
        policy: nn.Module,
        idx: Tensor,
        attention_mask: Tensor,
        prefix_length: int,
        rows_per_prompt: int,
    ) -> Tensor:
        """log π of all actions after the prefix, (B, T-1), a micro-batch at a time."""
        model = ActorCritic(policy)  # which reads a shared prefix once
        parts = []
        for part, part_mask in self.in_micro_batches(idx, attention_mask):
            log_probs, _ = model(
                part, part_mask, self.config.temperature, prefix_length, rows_per_prompt
            )
            parts.append(log_probs)
        return torch.cat(parts)

    def values(
        self, idx: Tensor, attention_mask: Tensor, prefix_length: int, rows_per_prompt: int
    ) -> Tensor:
        """V of all states after the prefix, (B, T-1), a micro-batch at a time."""
        parts = []
        for part, part_mask in self.in_micro_batches(idx, attention_mask):
            parts.append(self.model.values(part, part_mask, prefix_length, rows_per_prompt))
        return torch.cat(parts)

    def in_micro_batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tensors' rows, micro_batch_size at a time: as in the update, to fit into memory.

        `check_group_sizes` has made sure that this cuts no group in two.
        """
        size = self.config.micro_batch_size or len(tensors[0])
        return zip(*(x.split(size) for x in tensors), strict=True)

    def score(
        self,
        idx: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        prompt_index: Tensor,
        rows_per_prompt: int,
    ) -> Scores:
        """The scores of the whole texts, and what the reward function logs: see `rewards.score`."""
        return score(  # the function of rewards.py
            self.reward_fn,
            idx,
            attention_mask,
            completion_mask,
            tokenizer=self.tokenizer,
            columns=self.train_dataset.columns_of(prompt_index),
            step=self.iter_num,
            max_steps=self.max_iters,
            rows_per_prompt=rows_per_prompt,
        )

    def potentials(
        self,
        idx: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        prompt_index: Tensor,
        prefix_length: int,
        rows_per_prompt: int,
    ) -> Tensor:
        """The score of the text so far in each state, (B, T-1). 0 while nothing is written yet.

        A reward model reads them off in one pass. Any other reward function is called once for each
        column, on the rows that have come so far.
        """
        # Something has been written (completion_mask), and there is one more action (the mask).
        states = completion_mask[:, :-1] & completion_mask[:, 1:]
        if isinstance(self.reward_fn, RewardModel):
            scores = self.reward_fn.scores(
                idx[:, :-1], attention_mask[:, :-1], prefix_length, rows_per_prompt
            )
            return masked(F.pad(scores, (prefix_length, 0)), states)
        potentials = torch.zeros(states.shape, device=idx.device)
        for t in range(states.size(1)):
            rows = states[:, t].nonzero()[:, 0]
            if len(rows) > 0:
                idx_t, attention_t, completion_t = (
                    x[rows, : t + 1] for x in (idx, attention_mask, completion_mask)
                )
                scored = self.score(idx_t, attention_t, completion_t, prompt_index[rows], 1)
                potentials[rows, t] = scored.rewards
        return potentials

    def token_rewards(
        self,
        scores: Tensor,
        log_probs: Tensor,
        ref_log_probs: Tensor,
        mask: Tensor,
        potentials: Tensor | None,
    ) -> Tensor:
        """The reward of each action, (B, T-1): the KL penalty on each, the score on the last.

        potentials: those of `shaped`, (B, T-1), or None without shaping.
        """
        # r_t = -kl_coef · KL_t: each step away from the reference costs something at once ...
        rewards = torch.zeros_like(log_probs)
        if self.choices.kl_penalty == "reward":
            penalty = kl_estimate(log_probs, ref_log_probs, self.choices.kl_estimator)
            rewards = masked(-self.kl_coef * penalty, mask)
        # ... and the text is judged when it is complete, which is at its last action.
        rewards[torch.arange(len(scores)), last_real(mask)] += scores
        if potentials is not None:
            rewards = shaped(rewards, potentials, mask, self.config.gamma)
        if self.config.whiten_rewards:
            rewards = self.whiten(rewards, mask, shift_mean=False)
        return rewards

    def advantages(
        self, rewards: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(advantages, returns), both (B, T-1), from the rewards and values of each action."""
        choices = self.choices
        if choices.advantage in GROUP_ADVANTAGES:
            # The whole completion is one action, and its reward the sum over its tokens: the score
            # less all KL penalties in the reward. All its tokens get the same advantage.
            estimate = GROUP_ADVANTAGES[choices.advantage]
            of_episodes = estimate(rewards.sum(1), choices.group_size)  # (B,)
            advantages = of_episodes[:, None].expand_as(rewards)
            returns = values  # there is no value function to teach
        else:
            # Without a value function V is 0, and λ = 1 makes the advantage the return itself.
            lam = self.config.gae_lambda if choices.advantage == "gae" else 1.0
            advantages, returns = gae(rewards, values, mask, self.config.gamma, lam)
        if choices.whiten_advantages:
            advantages = self.whiten(advantages, mask)
        return advantages, returns

    def counted(self, episode_rewards: Tensor) -> Tensor:
        """True for episodes that count in the loss, (B,): those of equal groups may be skipped.

        In a group whose completions all earned the same, every advantage is 0: it teaches nothing,
        but would still count in the mean (Yu et al. 2025, DAPO's dynamic sampling).
        """
        if not self.choices.skip_equal_groups:
            return torch.ones_like(episode_rewards, dtype=torch.bool)
        groups = grouped(episode_rewards, self.choices.group_size)
        return (~equal_groups(groups)).expand_as(groups).flatten()

    def whiten(self, x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        """`masked_whiten` over the episodes of all processes."""
        # Gather what is on the masks of all processes, whiten it together, take back our own.
        of_each_process = distributed.gather(x[mask].cpu())
        joined = torch.cat(of_each_process)
        whitened = masked_whiten(joined, torch.ones_like(joined), shift_mean)
        own = whitened.split([len(part) for part in of_each_process])[self.rank]
        return torch.zeros_like(x).masked_scatter(mask, own.to(x.device))

    # -- the update --------------------------------------------------------------------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Pass over the rollout ppo_epochs times, a minibatch at a time. Returns mean metrics."""
        # Sampling is slow, so the same episodes are used for several steps. The ratio π / π_old
        # makes up for how the policy has moved since it sampled them, if it has not moved far.
        minibatch_size = self.config.minibatch_size or self.config.batch_size
        steps: list[dict[str, float]] = []  # the metrics of each optimizer step
        skipped = 0
        for _ in range(self.choices.ppo_epochs):
            for rows in self.shuffled(rollout).split(minibatch_size // self.world_size):
                metrics = self.minibatch_step(rollout.select(rows.to(self.device)))
                if metrics is None:
                    skipped += 1
                else:
                    steps.append(metrics)
            if self.went_too_far(steps):
                break
        # No episode counts (see skip_equal_groups), so nothing was learned this time.
        if not steps:
            self.loss = torch.tensor(0.0)
            steps = [{"loss": 0.0, "lr": self.learning_rate(), "grad_norm": 0.0}]

        metrics = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        # Not a mean but the first step's: there, policy and sampler must agree. Later, the policy
        # has moved.
        metrics["log_prob_error"] = steps[0].get("log_prob_error", 0.0)
        if self.choices.skip_equal_groups:
            metrics["skipped_steps"] = float(skipped)
        return metrics

    def shuffled(self, rollout: Rollout) -> Tensor:
        """The rows of the rollout in a random order, (B,). Those of one prefix stay adjacent."""
        groups = torch.arange(len(rollout)).view(-1, rollout.rows_per_prompt)
        return groups[torch.randperm(len(groups))].flatten()

    def went_too_far(self, steps: list[dict[str, float]]) -> bool:
        """Whether the last step found the policy further from π_old than approxkl_max allows."""
        if self.config.approxkl_max is None or not steps:
            return False
        return steps[-1]["policy/approxkl"] > self.config.approxkl_max

    def minibatch_step(self, minibatch: Rollout) -> dict[str, float] | None:
        """One optimizer step. Returns its metrics, or None if no episode counts in the loss."""
        micro_batches = self.micro_batches(minibatch)
        _, first = micro_batches[0]
        if first.tokens == 0:
            return None
        metrics = self.optimizer_step(micro_batches)
        # Each micro-batch has noted its largest error in the list that they have in common.
        errors = torch.stack(first.log_prob_errors)
        return metrics | {"log_prob_error": errors.max().item()}

    def micro_batches(self, batch: Rollout) -> list[tuple[float, Any]]:
        """Split a minibatch into (share, micro-batch) pairs, as the Trainer's optimizer_step wants.

        Each micro-batch divides by the whole minibatch's denominator, so that their losses add up
        to its loss as they are, and all shares are 1.
        """
        mask = batch.loss_mask
        # What the sums are divided by, counted over the minibatches of all processes.
        tokens, denominator = distributed.total(
            [
                average_denominator(mask, "token"),
                average_denominator(mask, self.choices.loss_mean, self.config.max_new_tokens),
            ]
        )
        errors: list[Tensor] = []
        size = self.config.micro_batch_size or len(batch)
        starts = range(0, len(batch), size)
        parts = [batch.select(slice(start, start + size)) for start in starts]
        return [(1.0, MicroBatch(part, tokens, denominator, errors)) for part in parts]

    def policy_and_value_loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, dict]:
        """A micro-batch's part of the minibatch's loss, and its parts of the metrics.

            L = L_policy + value_coef · L_value + kl_coef · KL

        The second term is there with a value function, the third with kl_penalty="loss".
        """
        # Read the episodes with the policy and the value function as they are now: (B, T-1) each.
        # Where they take turns, the value function has had its own already.
        v_loss = self.value_turn(batch) if self.take_turns else None
        log_probs, values = self.read(model, batch, only="policy" if self.take_turns else None)

        # Raise the probability of tokens that were better than expected, but not too far.
        loss, metrics = self.policy_loss(log_probs, batch)

        # Teach the value function what the returns were. Its mean is over tokens in any case.
        if self.choices.advantage == "gae":
            if v_loss is None:
                v_loss = self.value_loss(values, batch)
            loss = loss + self.config.value_coef * v_loss
            metrics["loss/value"] = v_loss.detach()

        # Hold the policy near the reference, where the rewards do not do that already.
        if self.choices.kl_penalty == "loss":
            loss = loss + self.kl_coef * self.kl_loss(log_probs, batch)
        return loss, metrics

    def read(
        self, model: nn.Module, batch: MicroBatch, only: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, values), (B, T-1) each, of a micro-batch: see `ActorCritic`."""
        episodes = batch.episodes
        return model(
            episodes.idx,
            episodes.attention_mask,
            self.config.temperature,
            episodes.prefix_length,
            episodes.rows_per_prompt,
            only,
        )

    def value_loss(self, values: Tensor, batch: MicroBatch) -> Tensor:
        """The error of the value function. Its mean is over the minibatch's tokens in any case."""
        episodes = batch.episodes
        return value_loss(  # the function above
            values,
            episodes.old_values,
            episodes.returns,
            episodes.loss_mask,
            self.config.value_clip_range,
            denominator=batch.tokens,
        )

    def value_turn(self, batch: MicroBatch) -> Tensor:
        """The value function's loss, with its gradient already computed.

        With policy and value function on one frozen trunk, the memory of training is mostly what
        is kept of the forward passes for the backward pass. So we go forwards and backwards with
        the value function, and only then begin with the policy: less is kept at a time.
        """
        _, values = self.read(self.model, batch, only="value")
        loss = self.value_loss(values, batch)
        # Without autocast, which is for the forward pass, and with fp16's scale, if any.
        value_model: Any = self.model.value_model
        parameters = [p for p in value_model.parameters() if p.requires_grad]
        with torch.autocast(self.device.type, enabled=False):
            gradients = torch.autograd.grad(self.scaler.scale(loss), parameters)
        scale = self.scaler.get_scale()
        return KnownGradient.apply(loss.detach(), scale, *gradients, *parameters)

    def policy_loss(self, log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, dict]:
        """The clipped surrogate, and how far the policy is from the one that sampled."""
        episodes = batch.episodes
        mask = episodes.loss_mask
        loss, clip_fraction = ppo_policy_loss(
            log_probs,
            episodes.old_log_probs,
            episodes.advantages,
            mask,
            clip_range=self.choices.clip_range,
            ratio=self.choices.ratio,
            loss_mean=self.choices.loss_mean,
            max_new_tokens=self.config.max_new_tokens,
            denominator=batch.denominator,
        )

        # How far the policy has moved from the one that sampled. In the first minibatch it has not
        # moved at all. If anything but 0 shows there, it is the error of our log-probs.
        log_ratio = masked(log_probs - episodes.old_log_probs, mask).detach()
        batch.log_prob_errors.append(log_ratio.abs().max())
        # The loss is divided by the minibatch's denominator already. The others are means over the
        # tokens of this micro-batch, so each is weighed by its share of the minibatch's tokens.
        share = mask.sum() / batch.tokens
        metrics = {
            "loss/policy": loss.detach(),
            "policy/clipfrac": share * clip_fraction,
            "policy/approxkl": share * masked_mean(log_ratio**2 / 2, mask),  # k2
            "val/ratio": share * masked_mean(log_ratio.exp(), mask),
        }
        return loss, metrics

    def kl_loss(self, log_probs: Tensor, batch: MicroBatch) -> Tensor:
        """The estimated KL to the reference policy, averaged as the surrogate is.

        Which estimator has which gradient is explained in RLHF.md.
        """
        mask = batch.episodes.loss_mask
        # Masked before, not after: off the mask k3's exponential may overflow, and infinity
        # would become NaN in the gradient.
        kl = kl_estimate(
            masked(log_probs, mask),
            masked(batch.episodes.ref_log_probs, mask),
            self.choices.kl_estimator,
        )
        return average(
            kl,
            mask,
            loss_mean=self.choices.loss_mean,
            max_new_tokens=self.config.max_new_tokens,
            denominator=batch.denominator,
        )

    def adapt_kl_coef(self, kl: float) -> None:
        """Move kl_coef (β) so that the KL comes to kl_target (Ziegler et al. 2019, section 2.2).

            e = clip(kl / kl_target - 1, -0.2, 0.2)
            β ← β (1 + K_β e),    K_β = batch_size / kl_horizon

        kl: of this iteration's rollout, in nats per episode. Where the error stays the same for
        kl_horizon episodes, β changes by about that fraction.
        """
        if self.config.kl_target is None:
            return
        error = kl / self.config.kl_target - 1
        error = min(max(error, -0.2), 0.2)
        self.kl_coef *= 1 + error * self.config.batch_size / self.config.kl_horizon

    # -- what a person watches ---------------------------------------------------------------------

    def describe(self, rollout: Rollout) -> dict[str, float]:
        """What the rollout looked like, under the field's usual names. See RLHF.md's glossary."""
        mask = rollout.mask
        kl = rollout.kl.sum(1).mean()  # per episode: the sum over its tokens
        score = rollout.scores.mean()
        # The entropy is estimated from the sampled tokens: the mean of -log π_old.
        metrics = {
            "objective/kl": kl,
            "objective/scores": score,
            "objective/rlhf_reward": score - self.kl_coef * kl,
            "objective/entropy": -masked_mean(rollout.old_log_probs, mask),
            "episode_length": mask.sum(1).float().mean(),
            "ended": rollout.ended.float().mean(),
            "kl_coef": torch.tensor(self.kl_coef),
        }
        if self.choices.advantage == "gae":
            # 1 if the values are the returns, 0 if they are no better than the returns' mean.
            returns = rollout.returns
            residual = masked_mean((returns - rollout.old_values) ** 2, mask)
            variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
            metrics["val/explained_variance"] = 1 - residual / variance.clamp(min=1e-8)
        if self.choices.group_size > 1:
            # Where advantages compare within a group, equal scores teach nothing. (These are the
            # scores; skip_equal_groups compares rewards, which may hold a KL penalty, too.)
            groups = grouped(rollout.scores, self.choices.group_size)
            metrics["equal_groups"] = equal_groups(groups).float().mean()
        return {name: value.item() for name, value in metrics.items()}

    def watched(self) -> dict[str, float]:
        """The few metrics that are shown to a person while the run goes on."""
        return {
            "reward": self.metrics["objective/scores"],
            "kl": self.metrics["objective/kl"],
            "length": self.metrics["episode_length"],
        }

    def samples(self, n: int | None = None) -> list[dict[str, Any]]:
        """The first n episodes of the last rollout (None: all), for people to read.

        Dicts of prompt and completion (texts, or lists of ids without a tokenizer), reward, kl
        (nats) and length (tokens). With many processes, those of this process.
        """
        rollout = self.last_rollout
        if rollout is None:
            return []
        kls = rollout.kl.sum(1).tolist()
        rows = []
        for i in range(len(rollout) if n is None else min(n, len(rollout))):
            # The mask speaks of the actions idx[:, 1:]. Shift it, so that it speaks of idx.
            written = F.pad(rollout.mask[i], (1, 0))
            prompt = rollout.idx[i][rollout.attention_mask[i] & ~written]
            completion = rollout.idx[i][written]
            rows.append(
                {
                    "prompt": self.readable(prompt),
                    "completion": self.readable(completion),
                    "reward": rollout.scores[i].item(),
                    "kl": kls[i],
                    "length": len(completion),
                }
            )
        return rows

    def readable(self, ids: Tensor) -> str | list[int]:
        """The text of some ids without end tokens; the ids themselves without a tokenizer."""
        if self.tokenizer is None:
            return ids.tolist()
        return self.tokenizer.decode(ids[~is_stop(ids, self.stop_token)].tolist())

    def after_step(self) -> None:
        """What the Trainer does, after logging some of what was written to samples.jsonl."""
        if self.is_due(self.config.log_every) and self.config.log_samples:
            samples = self.samples(self.config.log_samples)
            self.folder.log_samples([{"iter": self.iter_num, **sample} for sample in samples])
        super().after_step()

    # -- batches, checkpoints and checks -----------------------------------------------------------

    def batch_indices(self) -> Iterator[list[int]]:
        """The Trainer's batches of prompts, with each prompt group_size times in a row."""
        for prompts in super().batch_indices():
            yield [i for i in prompts for _ in range(self.choices.group_size)]

    @property
    def examples_per_batch(self) -> int:
        """Prompts per rollout. An epoch is a pass over all prompts."""
        return self.config.batch_size // self.choices.group_size

    def state_dict(self) -> dict[str, Any]:
        """The Trainer's state, with the current kl_coef and which reference it is."""
        own = {"kl_coef": self.kl_coef, "ref_checksum": self.ref_checksum}
        return super().state_dict() | own

    def check_state(self, state: dict[str, Any]) -> None:
        """What the Trainer checks, and ValueError for another reference policy."""
        super().check_state(state)
        if state.get("ref_checksum") != self.ref_checksum or "kl_coef" not in state:
            raise ValueError(
                f"{self.folder.path} holds a run with another reference policy: start from the "
                "same one, or choose another work_dir"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. ValueError for another reference policy."""
        super().load_state_dict(state)
        self.kl_coef = state["kl_coef"]

    @classmethod
    def effective_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options, with defaults for missing ones and the row's choices in place of None.

        A resumed run compares the checkpoint's with its own. So it is no change to spell out what
        the row says anyway.
        """
        if "baseline" in options:  # only old checkpoints have it
            options = options_before_the_table(options)
        options = super().effective_options(options)
        row = ALGORITHMS[options["algorithm"]]
        return options | {name: getattr(row, name) for name in CHOICES if options[name] is None}

    @classmethod
    def check_config(cls, config: CN, world_size: int = 1) -> None:
        """ValueError for options that are unknown, missing, out of range or contradictory."""
        super().check_config(config, world_size)
        choices = choose(config)
        # Each option by itself ...
        check_numbers(config, "max_new_tokens", low=1, whole=True)
        check_numbers(config, "log_samples", whole=True)
        check_numbers(config, "value_clip_range", "value_coef", "value_lr_ratio")
        check_numbers(config, "missing_eos_penalty")
        check_numbers(config, "temperature", low=1e-6)
        check_booleans(config, "whiten_rewards", "shaping", "shared_trunk")
        check_numbers(config, "gamma", "gae_lambda", high=1)
        check_numbers(config, "kl_target", "approxkl_max", low=1e-6, optional=True)
        # From batch_size on, one iteration changes kl_coef by 20 % at most.
        check_numbers(config, "kl_horizon", low=config.batch_size)
        check_numbers(
            config,
            "minibatch_size",
            low=world_size,
            high=config.batch_size,
            whole=True,
            optional=True,
        )
        # ... and together with others.
        check_kl_target(config, choices)
        for name in ("whiten_rewards", "shaping"):
            if getattr(config, name) and choices.advantage in GROUP_ADVANTAGES:
                raise ValueError(
                    f"{name}=True needs a reward for each token, and advantage="
                    f"{choices.advantage} takes the whole completion as one action: leave it out"
                )
        check_group_sizes(config, choices, world_size)

    def check_data(self) -> None:
        """ValueError for no prompts, or prompts that are too long; TypeError for no reward_fn.

        There may be few prompts: many episodes begin with the same one.
        """
        check_reward_fn(self.reward_fn, self.train_dataset.columns)
        # Is there a prompt, and can an episode end?
        longest = max((len(ids) for ids in self.train_dataset.ids), default=0)
        if longest == 0:
            raise ValueError("prompts is empty: give one or more")
        if self.config.missing_eos_penalty and self.stop_token is None:
            raise ValueError(
                f"missing_eos_penalty={self.config.missing_eos_penalty}, but nothing ends an "
                "episode: set stop_token, or pass a tokenizer"
            )
        # Does the longest episode fit into the models?
        tokens = longest + self.config.max_new_tokens
        described = (
            f"prompts of up to {longest} tokens and max_new_tokens={self.config.max_new_tokens} "
        )
        if tokens > self.block_size + 1:  # the last token is only predicted, never read
            raise ValueError(
                f"{described}do not fit into the policy's block_size={self.block_size}: their sum "
                f"may be {self.block_size + 1}"
            )
        if isinstance(self.reward_fn, RewardModel):
            reward_block_size = self.reward_fn.config.block_size
            if tokens > reward_block_size:
                raise ValueError(
                    f"{described}do not fit into the reward model's block_size={reward_block_size}"
                )


class KnownGradient(torch.autograd.Function):
    """A loss whose gradient by some parameters is known before the backward pass reaches it.

    apply(loss, scale, *gradients, *parameters): the gradients are those of scale · loss.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: float, *tensors: Tensor) -> Tensor:
        """The loss itself."""
        ctx.scale = scale
        ctx.save_for_backward(*tensors[: len(tensors) // 2])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The known gradients, by the chain rule."""
        gradients = [x * (grad / ctx.scale) for x in ctx.saved_tensors]
        return None, None, *[None for _ in gradients], *gradients


# --------------------------------------------------------------------------------------------------
# What PPOTrainer checks before it begins, and the options of old checkpoints


def check_policy(policy: nn.Module, ref_policy: nn.Module | None) -> None:
    """TypeError for a policy that cannot write; ValueError for one that is its own reference."""
    if not isinstance(policy, nn.Module):
        raise TypeError(f"the policy is {policy!r:.60}; expected a GPT, or a module like it")
    missing = [name for name in ("log_probs", "generate") if not hasattr(policy, name)]
    if missing:
        raise TypeError(
            f"a policy needs GPT's log_probs and generate; {type(policy).__name__} has no "
            f"{' and no '.join(missing)}"
        )
    has_log_probs = isinstance(ref_policy, nn.Module) and hasattr(ref_policy, "log_probs")
    if ref_policy is not None and not has_log_probs:
        raise TypeError(
            f"ref_policy is a {type(ref_policy).__name__}; a policy needs GPT's log_probs"
        )
    check_trained(policy)
    if ref_policy is policy:
        raise ValueError(
            "ref_policy is the policy itself, which will be trained: pass a copy of it, or None"
        )


def check_vocabularies(
    policy: nn.Module, ref_policy: nn.Module, value_model: nn.Module | None, reward_fn: Any
) -> None:
    """ValueError if two models that read the same ids have vocabularies of different sizes."""
    models = {"ref_policy": ref_policy, "value_model": value_model, "reward_fn": reward_fn}
    size = vocabulary_size(policy)
    for name, model in models.items():
        other = vocabulary_size(model)
        if None not in (size, other) and size != other:
            raise ValueError(
                f"the policy has a vocabulary of {size} tokens and {name} one of {other}: they "
                "read the same ids, so it must be the same vocabulary"
            )


def vocabulary_size(model: Any) -> int | None:
    """The number of tokens that a model knows, None where it does not say."""
    return getattr(getattr(model, "config", None), "vocab_size", None)


def check_kl_target(config: CN, choices: Algorithm) -> None:
    """ValueError for a kl_target that kl_coef cannot be adapted towards."""
    if config.kl_target is None:
        return
    if choices.kl_penalty == "none":
        raise ValueError(
            f"kl_target={config.kl_target} adapts the weight of the KL penalty, and "
            "kl_penalty=none has none: leave one of them out"
        )
    if choices.kl_coef == 0:
        raise ValueError(
            f"kl_coef=0 cannot adapt towards kl_target={config.kl_target}, because it is adapted "
            "by factors: begin above 0"
        )


def check_group_sizes(config: CN, choices: Algorithm, world_size: int) -> None:
    """ValueError unless whole groups fit into every batch, minibatch and micro-batch."""
    # The processes share batches and minibatches. Micro-batches are each process's own.
    processes = {"batch_size": world_size, "minibatch_size": world_size, "micro_batch_size": 1}
    for name, count in processes.items():
        size = getattr(config, name)
        if size and size % (choices.group_size * count):
            times = f" times {count} processes" if count > 1 else ""
            raise ValueError(
                f"{name}={size} must be a multiple of group_size={choices.group_size}{times}"
            )


def options_before_the_table(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint from before there was a table of algorithms, in today's terms.

    All losses were means over tokens then. REINFORCE had `baseline` in place of whiten_advantages,
    and took one step on each rollout, whatever ppo_epochs and minibatch_size were.
    """
    translated = dict(options)
    baseline = translated.pop("baseline")
    translated["loss_mean"] = "token"
    if translated["algorithm"] == "reinforce":
        translated |= {"whiten_advantages": baseline, "ppo_epochs": None, "minibatch_size": None}
    return translated


# --------------------------------------------------------------------------------------------------
# Metrics of many processes, and which policy is which


def mean_by_name(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            by_name[name].append(value)
    return {name: sum(values) / len(values) for name, values in by_name.items()}
