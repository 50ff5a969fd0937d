"""
How good is a policy? Samples of it, their rewards, their KL to a reference, and yardsticks.

    samples = sample(policy, prompts, n=4, tokenizer=tokenizer, max_new_tokens=64, reward_fn=f)
    samples.texts                                 the completions, as strings
    samples.rewards.mean()                        what the policy earns
    kl(samples, reference)                        ... and what it pays for that, in nats
    win_rate(ours.rewards, theirs.rewards)        how often one policy beats the other

A reward says little without the KL that it cost, because a policy can always buy reward by
moving away from the reference. Two yardsticks need only the rewards of the reference's own
samples, and no training:

- `tilted`: of all policies that earn a mean reward R, the one nearest to the reference π_ref in KL
  is π*(x) ∝ π_ref(x) exp(r(x)/β). It is also the optimum of the KL-penalised objective with
  kl_coef = β (Ziegler et al. 2019, section 2; Rafailov et al. 2023, equation 4).
- `best_of_n`: draw n samples and keep the one of most reward (Stiennon et al. 2020, appendix G.3).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mingpt import rewards
from mingpt.config import CfgNode, check_numbers
from mingpt.datasets import (
    check_tokenizer,
    default_stop_token,
    encode_prompts,
    left_pad,
    stop_tokens,
)
from mingpt.model import stop_ids
from mingpt.prefix import needed_mask
from mingpt.rewards import RewardFn
from mingpt.rlhf import is_stop, written_mask
from mingpt.utils import evaluation_mode

# --------------------------------------------------------------------------------------------------
# Samples of a policy


@dataclass
class Samples:
    """N completions that a policy sampled, in T columns: left-padded prompts, then completions.

    All completions begin in the same column. `log_probs` is indexed as in `mingpt.rlhf`:
    entry t speaks of the action idx[:, t+1].
    """

    # For people.
    prompts: list[str]  # as the policy read them, without end-of-text tokens
    texts: list[str]  # the completions, decoded, without their end token and padding
    # For models.
    idx: Tensor  # (N, T) token ids
    attention_mask: Tensor  # (N, T) True on real tokens: prompt and completion
    completion_mask: Tensor  # (N, T) True on what the policy wrote, its end token included
    log_probs: Tensor  # (N, T-1) of the actions, as they were sampled; 0 off the completion
    # What became of them.
    ended: Tensor  # (N,) True where it ended by itself, False where it was cut off
    rewards: Tensor | None = None  # (N,) float32 on the CPU; None without a reward function

    @property
    def lengths(self) -> Tensor:
        """(N,) numbers of tokens in the completions, their end included."""
        return self.completion_mask.sum(1)

    def select(self, index: Tensor | Sequence[int]) -> "Samples":
        """The rows with these numbers, in this order."""
        # The rewards are on the CPU, while the other tensors may be on a GPU.
        rows = torch.as_tensor(index, dtype=torch.long)
        on_device = rows.to(self.idx.device)
        rewards = self.rewards
        if rewards is not None:
            rewards = rewards[rows.to(rewards.device)]
        return Samples(
            prompts=[self.prompts[row] for row in rows.tolist()],
            texts=[self.texts[row] for row in rows.tolist()],
            idx=self.idx[on_device],
            attention_mask=self.attention_mask[on_device],
            completion_mask=self.completion_mask[on_device],
            log_probs=self.log_probs[on_device],
            ended=self.ended[on_device],
            rewards=rewards,
        )


def sample(
    policy: Any,
    prompts: Iterable,
    n: int = 1,
    *,
    tokenizer: Any,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_token: int | list[int] | tuple[int, ...] | None = None,
    stop_strings: Sequence[str] = (),
    reward_fn: RewardFn | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Samples:
    """Sample n completions of each prompt, without dropout; those of one prompt are adjacent.

    policy: a GPT, or any module with its `generate`. prompts: strings, or lists of ids.
    Completions end at stop_token (None: the tokenizer's end token) or after max_new_tokens;
    for stop_strings see `cut_at_stop_strings`. The same seed and batch_size give the same
    samples. ValueError for prompts and options that cannot be used.
    """
    check_numbers(CfgNode(n=n, batch_size=batch_size), "n", "batch_size", low=1, whole=True)
    check_numbers(CfgNode(seed=seed), "seed", low=-(2**63), high=2**64 - 1, whole=True)
    check_stop_strings(stop_strings)
    check_sampled(policy, prompts, tokenizer)
    if stop_token is None:
        stop_token = default_stop_token(tokenizer)

    # n completions of a prompt are one completion of each of n equal prompts.
    prompts = [prompt for prompt in prompts for _ in range(n)]
    sampled = generate_in_batches(
        policy,
        encode_prompts(prompts, tokenizer),
        seed,
        batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_token=stop_token,
    )

    # Decode them, cut them, judge them.
    left_out = {*stop_tokens(tokenizer), *stop_ids(stop_token)}
    samples = decoded(*sampled, tokenizer, stop_token, left_out)
    samples = cut_at_stop_strings(samples, stop_strings, tokenizer, left_out)
    if reward_fn is not None:
        samples.rewards = score(samples, reward_fn, batch_size)
    return samples


def check_sampled(policy: Any, prompts: Any, tokenizer: Any) -> None:
    """TypeError for what cannot be sampled from, or with."""
    check_tokenizer(tokenizer, "decode")
    if not hasattr(policy, "generate"):
        raise TypeError(f"policy is a {type(policy).__name__}; expected a GPT, or its generate")
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts is {type(prompts).__name__} {prompts!r:.60}; expected a list")


def decoded(
    idx: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    log_probs: Tensor,
    tokenizer: Any,
    stop_token: int | list[int] | tuple[int, ...] | None,
    left_out: set[int],
) -> Samples:
    """The `Samples` of what was generated. left_out: ids that do not appear in the texts."""
    return Samples(
        prompts=decode_rows(idx, attention_mask & ~completion_mask, tokenizer, left_out),
        texts=decode_rows(idx, completion_mask, tokenizer, left_out),
        idx=idx,
        attention_mask=attention_mask,
        completion_mask=completion_mask,
        log_probs=log_probs,
        ended=(completion_mask & is_stop(idx, stop_token)).any(1),
    )


@torch.no_grad()
def generate_in_batches(
    policy: Any, prompts: list[Tensor], seed: int, batch_size: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(idx, attention_mask, completion_mask, log_probs), as in `Samples`; options: generate's."""
    if not prompts:
        raise ValueError("prompts is empty: give one or more")
    # A generator of its own: sampling takes no random numbers from a training that goes on.
    generator = torch.Generator(next(policy.parameters()).device).manual_seed(seed)
    longest = max(map(len, prompts))
    batches = []
    with evaluation_mode(policy):
        starts = range(0, len(prompts), batch_size)
        # None: a bar on a terminal only. For a single batch it would show nothing.
        hides_bar = True if len(starts) == 1 else None
        for first in tqdm(starts, "samples", disable=hides_bar, leave=False):
            batch = prompts[first : first + batch_size]
            batches.append(generate_batch(policy, batch, longest, generator, **options))
    # From a tuple of tensors for each batch to one tensor of each kind.
    kinds = zip(*batches, strict=True)
    idx, attention_mask, completion_mask, log_probs = map(torch.cat, kinds)
    return idx, attention_mask, completion_mask, log_probs


def generate_batch(
    policy: Any,
    prompts: list[Tensor],
    longest: int,
    generator: torch.Generator,
    *,
    max_new_tokens: int,
    temperature: float,
    stop_token: int | list[int] | tuple[int, ...] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for one batch, in longest + max_new_tokens columns, as all batches have."""
    # While it is sampled, the batch is only as wide as its own longest prompt requires.
    prompt_idx, prompt_mask = (x.to(generator.device) for x in left_pad(prompts))
    idx, log_probs = policy.generate(
        prompt_idx,
        max_new_tokens,
        temperature=temperature,
        do_sample=True,
        attention_mask=prompt_mask,
        stop_token=stop_token,
        generator=generator,
        return_log_probs=True,
    )
    prompt_length = prompt_idx.size(1)
    completion_mask = written_mask(idx, prompt_length, stop_token)
    attention_mask = torch.cat([prompt_mask, completion_mask[:, prompt_length:]], dim=1)

    # Then it is padded: on the left where its prompts are shorter than those of other batches, on
    # the right where generate has stopped early because all rows had ended.
    left = longest - prompt_length
    right = max_new_tokens - log_probs.size(1)
    stops = stop_ids(stop_token)
    return (
        F.pad(idx, (left, right), value=stops[0] if stops else 0),
        F.pad(attention_mask, (left, right)),
        F.pad(completion_mask, (left, right)),
        F.pad(log_probs, (longest - 1, right)),  # (B, n) -> (B, T-1), as action t is idx[:, t+1]
    )


def cut_at_stop_strings(
    samples: Samples, stop_strings: Sequence[str], tokenizer: Any, left_out: set[int]
) -> Samples:
    """The samples, cut where their first stop string is complete.

    A text that contains one is cut before it and counts as ended. Its completion_mask ends
    with the token that completes the string, because the policy did write that.
    """
    texts = list(samples.texts)
    ended = samples.ended.clone()
    width = samples.idx.size(1)
    ends = torch.full((len(texts),), width)  # the column after each cut; without one, the width
    for row, text in enumerate(samples.texts):
        if any(string in text for string in stop_strings):
            # Which of the completion's tokens completes the string, and in which column is it?
            columns = samples.completion_mask[row].nonzero()[:, 0].tolist()
            ids = samples.idx[row, columns].tolist()
            texts[row], length = before_stop_string(ids, stop_strings, tokenizer, left_out)
            ends[row] = columns[length - 1] + 1
            ended[row] = True
    # What follows the cut is padding from now on: (N, T).
    kept = (torch.arange(width) < ends[:, None]).to(samples.idx.device)
    return replace(
        samples,
        texts=texts,
        attention_mask=samples.attention_mask & kept,
        completion_mask=samples.completion_mask & kept,
        log_probs=samples.log_probs.masked_fill(~kept[:, 1:], 0.0),
        ended=ended,
    )


def before_stop_string(
    ids: list[int], stop_strings: Sequence[str], tokenizer: Any, left_out: set[int]
) -> tuple[str, int]:
    """(the text before its first stop string, how many of the ids complete that string)."""
    # Add token by token until a string is there. It may begin and end within a token, so that it
    # cannot be looked for among the ids.
    length = 0
    starts: list[int] = []
    while not starts:
        length += 1
        text = decode(ids[:length], tokenizer, left_out)
        starts = [text.find(string) for string in stop_strings if string in text]
    return text[: min(starts)], length


def decode_rows(
    idx: Tensor, mask: Tensor, tokenizer: Any, left_out: set[int]
) -> list[str]:
    """The text on the mask of each row, (N, T) both."""
    rows = zip(idx.cpu(), mask.cpu(), strict=True)
    return [decode(ids[mask].tolist(), tokenizer, left_out) for ids, mask in rows]


def decode(ids: list[int], tokenizer: Any, left_out: set[int]) -> str:
    """The text of ids, without some special tokens."""
    return tokenizer.decode([token for token in ids if token not in left_out])


def check_stop_strings(stop_strings: Sequence[str]) -> None:
    """ValueError for anything but a sequence of non-empty strings."""
    if isinstance(stop_strings, str) or not isinstance(stop_strings, Iterable):
        raise ValueError(f"stop_strings={stop_strings!r} must be a list of strings")
    for string in stop_strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop_strings holds {string!r}: give strings that are not empty")


# --------------------------------------------------------------------------------------------------
# What the samples are worth, and what they cost


@torch.no_grad()
def score(samples: Samples, reward_fn: RewardFn, batch_size: int = 256) -> Tensor:
    """The reward of each sample, (N,) float32 on the CPU.

    reward_fn: a RewardModel, a TextReward, or any reward_fn(idx, attention_mask,
    completion_mask). Raises RewardError where it fails or returns something that is no
    reward.
    """
    check_samples(samples, batch_size)
    batches = zip(
        samples.idx.split(batch_size),
        samples.attention_mask.split(batch_size),
        samples.completion_mask.split(batch_size),
        strict=True,
    )
    with evaluation_mode(reward_fn):
        scores = [rewards.score(reward_fn, *batch).rewards for batch in batches]
    return torch.cat(scores).cpu()


def kl(
    samples: Samples, reference: Any, temperature: float = 1.0, batch_size: int = 256
) -> float:
    """KL(policy || reference), in nats per completion, estimated from what the policy sampled.

    The mean over samples of the sum over their tokens of log π - log π_ref: k1, which is
    unbiased (Schulman 2020, joschu.net/blog/kl-approx). temperature: that of the samples.
    """
    return log_ratios(samples, reference, temperature, batch_size).sum(1).mean().item()


@torch.no_grad()
def log_ratios(
    samples: Samples, reference: Any, temperature: float = 1.0, batch_size: int = 256
) -> Tensor:
    """log π - log π_ref of each action, (N, T-1), 0 off the completions: what `kl` is the mean of.

    temperature: that of the samples.
    """
    check_samples(samples, batch_size)
    if not hasattr(reference, "log_probs"):
        raise TypeError(f"reference is a {type(reference).__name__}; expected a GPT's log_probs")
    batches = zip(
        samples.idx.split(batch_size), samples.attention_mask.split(batch_size), strict=True
    )
    with evaluation_mode(reference):
        reference_log_probs = torch.cat([
            reference.log_probs(idx, needed_mask(idx, attention_mask), temperature)
            for idx, attention_mask in batches
        ])
    # The prompts have log-probs under the reference, too: the mask takes them out.
    return (samples.log_probs - reference_log_probs) * samples.completion_mask[:, 1:]


def check_samples(samples: Any, batch_size: int = 1) -> None:
    """TypeError for what is no `Samples`, ValueError for a batch_size below 1."""
    if not isinstance(samples, Samples):
        raise TypeError(f"samples is {type(samples).__name__} {samples!r:.60}; expected Samples")
    check_numbers(CfgNode(batch_size=batch_size), "batch_size", low=1, whole=True)


def best_of_each(samples: Samples, n: int) -> Samples:
    """Of each n adjacent samples the one of most reward: `sample(..., n=n)` played as best-of-n."""
    check_samples(samples)
    if samples.rewards is None:
        raise ValueError("the samples have no rewards: pass a reward_fn to sample()")
    check_numbers(CfgNode(n=n), "n", low=1, whole=True)
    if len(samples.texts) % n:
        raise ValueError(f"{len(samples.texts)} samples are no groups of n={n}: n must divide them")
    # The winner's place within its group, plus the row in which the group begins.
    groups = samples.rewards.view(-1, n)
    return samples.select(groups.argmax(1) + torch.arange(0, len(samples.texts), n))


# --------------------------------------------------------------------------------------------------
# How good a policy could be, from the rewards of the reference's samples: nothing is trained


@dataclass
class Tilted:
    """The reference tilted by exp(r/β), for each β in turn: arrays of one float64 a β."""

    rewards: NDArray[np.float64]  # mean reward
    kls: NDArray[np.float64]  # KL to the reference, nats
    effective_sample_sizes: NDArray[np.float64]  # as good as so many samples of equal weight


def tilted(scores: ArrayLike, betas: ArrayLike) -> Tilted:
    """The best policies there are, π_ref(x) exp(r(x)/β), from scores of the reference's samples.

    Self-normalised importance weights, of N samples with rewards r_i:

        w_i ∝ exp(r_i / β),    Σ w_i = 1
        reward = Σ w_i r_i
        KL = Σ w_i log(N w_i)
        effective sample size = 1 / Σ w_i²          (Kong 1992)

    The last tells how far to trust the others: as β falls, fewer and fewer samples carry the
    weight, and the KL cannot be more than log N. scores: (N,); betas: one or more numbers above 0.
    """
    scores = as_scores(scores)
    numbers = np.atleast_1d(as_array(betas, "betas"))
    if numbers.ndim != 1 or numbers.size == 0 or not (np.isfinite(numbers) & (numbers > 0)).all():
        raise ValueError(f"betas={betas!r:.60} must be one or more finite numbers above 0")
    rows = []
    for beta in numbers:
        # In logarithms, because exp(r/β) may be too large for a float.
        log_weights = scores / beta
        log_weights -= np.logaddexp.reduce(log_weights)  # so that the weights add up to 1
        weights = np.exp(log_weights)
        reward = weights @ scores
        kl_to_reference = weights @ log_weights + math.log(len(scores))
        rows.append((reward, kl_to_reference, 1 / (weights @ weights)))
    return Tilted(*np.array(rows).T)


def kl_optimal(scores: ArrayLike, reward: float) -> float | None:
    """The smallest KL, in nats, that this mean reward can be had for.

    scores: (N,) of the reference's samples. 0 if the reference earns as much itself; None if none
    of its samples does.
    """
    scores = as_scores(scores)
    check_numbers(CfgNode(reward=reward), "reward", low=-math.inf)
    if reward <= np.mean(scores):
        return 0.0
    if reward >= np.max(scores):
        return None
    # Bisection over log β: the reward of the tilted reference falls as β grows.
    low = math.log(1e-3)
    high = math.log(1e3)
    for _ in range(60):
        middle = (low + high) / 2
        if tilted(scores, math.exp(middle)).rewards[0] > reward:
            low = middle
        else:
            high = middle
    return float(tilted(scores, math.exp(low)).kls[0])


def best_of_n(scores: ArrayLike, n: int) -> tuple[float, float]:
    """(mean reward, bound on the KL) of the best of n samples of the reference.

    The reward is the expected maximum of n draws with replacement from scores; the KL is at
    most log n - (n-1)/n (Stiennon et al. 2020, appendix G.3; Beirami et al. 2024,
    arXiv:2401.01879).
    """
    scores = as_scores(scores)
    check_numbers(CfgNode(n=n), "n", low=1, whole=True)
    # P(the maximum is among the k lowest scores) = (k/N)^n. So the k-th lowest is the maximum with
    # the probability (k/N)^n - ((k-1)/N)^n.
    ranks = np.arange(len(scores) + 1) / len(scores)
    reward = np.diff(ranks**n) @ np.sort(scores)
    return float(reward), math.log(n) - (n - 1) / n


def as_scores(scores: ArrayLike) -> NDArray[np.float64]:
    """Scores as a float64 array (N,). ValueError for none, and for NaN or infinity."""
    array = as_array(scores, "scores")
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"scores of shape {array.shape} must be finite numbers, (N,) with N >= 1")
    return array


def as_array(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Numbers as a float64 array. ValueError, with their name, for what has other things in it."""
    try:
        array = np.asarray(values)
        if array.dtype.kind in "US":  # NumPy would read numbers from text
            raise TypeError("it is text")
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={values!r:.60} must be numbers ({error!s:.80})") from None


# --------------------------------------------------------------------------------------------------
# One policy against another


@dataclass
class WinRate:
    """How often one side wins, in [0, 1], with the interval [low, high], from n comparisons."""

    rate: float
    low: float
    high: float
    n: int


def win_rate(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> WinRate:
    """The share of rows in which a scores higher than b, ties counted half, with its interval.

    a, b: (N,) scores of two policies on the same prompts. The interval is Wilson's (1927, "Probable
    inference"), which holds its confidence for few rows and for rates near 0 and 1, too. Ties vary
    less than wins and losses do, so with ties it is wider than it need be.
    """
    a = as_scores(a)
    b = as_scores(b)
    if a.shape != b.shape:
        raise ValueError(f"a has {len(a)} scores and b {len(b)}: give both for the same prompts")
    check_numbers(CfgNode(confidence=confidence), "confidence", low=1e-9, high=1 - 1e-9)
    n = len(a)
    # A win is 1, a tie 1/2, a loss 0.
    rate = float(((a > b) + 0.5 * (a == b)).mean())
    # Wilson's interval: all rates from which the observed one is at most z standard errors away.
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    radius = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # It always holds the observed rate; at 0 and 1, rounding must not take it out.
    low = min(rate, center - radius)
    high = max(rate, center + radius)
    return WinRate(rate, max(0.0, low), min(1.0, high), n)
