"""
Reward functions: how people write them, and how the trainer calls them.

For the trainer, a reward function is reward_fn(idx, attention_mask, completion_mask) -> (B,):
token ids in, one number for each completion out. A `RewardModel` is one. But most people write
rewards on text, and `TextReward` makes a reward function of those. It calls them by keyword, as
trl does:

    def brevity(completions, **kwargs):
        return [-len(completion) for completion in completions]

    def correct(completions, answer):  # `answer` is a column of the prompts' rows
        return [float(a in completion) for completion, a in zip(completions, answer)]

    reward_fn = TextReward([brevity, correct], tokenizer, weights=[0.01, 1.0])

`score` is how the trainer calls any reward function. It checks what comes back. Where something
goes wrong, it says for which sample, because a reward function may fail after hours of training,
on a text that nobody has thought of.

The file reads from the outside in: `score` first, then `TextReward`, then how a function on text
is called and how its rewards are checked.
"""

import inspect
import math
import numbers
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mingpt.datasets import RESERVED_COLUMNS, Tokenizer, check_tokenizer, stop_tokens
from mingpt.utils import check_equal_shapes

RewardFn = Callable[[Tensor, Tensor, Tensor], Tensor]


class RewardError(ValueError):
    """A reward function raised, or returned what is no reward. The message names the sample."""


@dataclass
class Scores:
    """What a batch of B completions got.

    Only the first field is trained on. The others are for people to look at.
    """

    # The rewards, (B,) float32.
    rewards: Tensor
    # {name: (B,)}: what each function of a `TextReward` gave, before its weight; NaN where it
    # abstained.
    by_function: dict[str, Tensor] = field(default_factory=dict)
    # {name: number}, for the log: the mean of each function's rewards as "reward/<name>", where
    # there are several functions, and what they gave to log_metric, averaged by name.
    metrics: dict[str, float] = field(default_factory=dict)
    # {column: list of B values}: what they gave to log_extra.
    extra: dict[str, list] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------
# Calling any reward function, with errors that name the sample


def score(
    reward_fn: RewardFn,
    idx: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    tokenizer: Tokenizer | None = None,
    columns: dict[str, list] | None = None,
    step: int = 0,
    max_steps: int | None = None,
    rows_per_prompt: int = 1,
) -> Scores:
    """Call a reward function on a batch, (B, T) each, and check its rewards: (B,), all finite.

    columns, step and max_steps are for a `TextReward`: see `TextReward.scores`. tokenizer: shows a
    sample as text in error messages. rows_per_prompt: so many adjacent rows continue the same
    prompt. A reward function that takes this, as a `RewardModel` does, can read the prompt once.

    Raises RewardError, which names the sample, where reward_fn raises or returns anything else,
    and what `check_reward_fn` raises for a reward_fn that could not even be called.
    """
    columns = {} if columns is None else columns
    check_reward_fn(reward_fn, columns)
    check_equal_shapes(idx=idx, attention_mask=attention_mask, completion_mask=completion_mask)

    def judge(rows: slice, **shared: int) -> Scores:
        # reward_fn gets copies, so it may write into its arguments.
        batch = (idx[rows].clone(), attention_mask[rows].clone(), completion_mask[rows].clone())
        if not isinstance(reward_fn, TextReward):
            return Scores(reward_fn(*batch, **shared))
        values = {name: column[rows] for name, column in columns.items()}
        return reward_fn.scores(*batch, columns=values, step=step, max_steps=max_steps)

    # Judge the whole batch at once. If that fails, judge sample by sample to find the one at fault.
    shared = {}
    if rows_per_prompt > 1 and "rows_per_prompt" in parameters_of(reward_fn):
        shared["rows_per_prompt"] = rows_per_prompt
    try:
        scores = judge(slice(None), **shared)
    except Exception as error:
        failed = first_to_raise(judge, len(idx))
        sample = describe_sample(failed, idx, attention_mask, tokenizer)
        message = f"reward_fn raised {type(error).__name__}: {error} -- for {sample}"
        raise RewardError(message) from error

    check_rewards(scores.rewards, idx, attention_mask, tokenizer)
    return replace(scores, rewards=scores.rewards.detach().float().to(idx.device))


def check_reward_fn(reward_fn: Any, columns: Iterable[str] = ()) -> None:
    """Check a reward_fn before anything is sampled for it: TypeError for what cannot be one.

    columns: the names of the prompts' columns, which a `TextReward` is checked against.
    """
    # A TextReward knows what its functions need.
    if isinstance(reward_fn, TextReward):
        reward_fn.check_columns(columns)
        return
    if not callable(reward_fn):
        raise TypeError(
            f"reward_fn is a {type(reward_fn).__name__}; expected a function of (idx, "
            "attention_mask, completion_mask), a RewardModel or a TextReward"
        )
    # A function on text that was not wrapped would be called with tensors: say so before that.
    parameters = parameters_of(reward_fn)
    if "completions" in parameters or "completion_ids" in parameters:
        raise TypeError(
            f"reward_fn {name_of(reward_fn)}({', '.join(parameters)}) reads completions, not "
            "(idx, attention_mask, completion_mask): wrap it in TextReward(f, tokenizer)"
        )


def parameters_of(reward_fn: Callable) -> list[str]:
    """The names of a reward function's parameters; none for some in C, which do not tell."""
    function = reward_fn.forward if isinstance(reward_fn, nn.Module) else reward_fn
    try:
        return list(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        return []


def first_to_raise(judge: Callable[[slice], Scores], n_rows: int) -> int | None:
    """The first row of a batch that raises when it is judged alone, or None if none does."""
    for row in range(n_rows):
        try:
            judge(slice(row, row + 1))
        except Exception:
            return row
    return None


def describe_sample(
    row: int | None,
    idx: Tensor,
    attention_mask: Tensor,
    tokenizer: Tokenizer | None,
) -> str:
    """A sample as an error message names it: its row, and its text (or its ids).

    row=None stands for the whole batch, if no row is at fault alone.
    """
    if row is None:
        return "the batch, though for none of its samples alone"
    ids = idx[row][attention_mask[row].bool()].tolist()
    with_ids = f"sample {row}, ids {ids}"
    if tokenizer is None:
        return with_ids
    try:
        return f"sample {row}, text {tokenizer.decode(ids)!r}"
    except Exception:  # a failure to decode must not hide the error that is being reported
        return with_ids


def first_true(mask: Tensor) -> int:
    """The first place where a mask (B,) is True."""
    return int(mask.nonzero()[0])


def check_rewards(
    rewards: Any, idx: Tensor, attention_mask: Tensor, tokenizer: Tokenizer | None
) -> None:
    """RewardError for anything but B finite numbers. It names the first sample without one."""
    check_shape(rewards, len(idx))
    # In the loss, a single NaN or infinity would spoil all weights of the policy.
    unusable = ~torch.isfinite(rewards)
    if unusable.any():
        row = first_true(unusable)
        sample = describe_sample(row, idx, attention_mask, tokenizer)
        raise RewardError(f"reward_fn gave {rewards[row]} to {sample}")


def check_shape(rewards: Any, n_rows: int) -> None:
    """RewardError for anything but a real tensor (n_rows,)."""
    # (B, 1) is refused, too: against (B,) it would be broadcast to (B, B) without a word.
    if not torch.is_tensor(rewards):
        got = type(rewards).__name__
    elif rewards.shape != (n_rows,) or rewards.is_complex():
        got = f"{tuple(rewards.shape)}, {rewards.dtype}"
    else:
        return
    raise RewardError(
        f"reward_fn must return a tensor of shape ({n_rows},), one real number for each "
        f"completion, not {got}"
    )


# --------------------------------------------------------------------------------------------------
# Rewards of text


class TextReward:
    """A reward_fn made of one or several functions that judge decoded text.

    f: a function, or a list of them, each returning one number for each of B completions,
    or None where it abstains. It is called by keyword, with those of these arguments that
    it names (with all of them where it takes **kwargs), so that trl's synchronous reward
    functions run unchanged:

      completions      list of B texts, without end tokens
      prompts          list of B texts, likewise
      completion_ids   list of B lists of token ids, the end token included
      <column>         list of B values, for each further column of the prompts' rows
      trainer_state    its global_step and max_steps say how far the training is
      log_metric       log_metric(name, value) adds a number to the log
      log_extra        log_extra(column, values) keeps B values beside the completions

    tokenizer: its `decode` makes the texts, see `stop_tokens` for what is left out of them.
    weights: one number for each function, 1 unless given. A completion's reward is the
    weighted sum over the functions that did not abstain:

        reward = Σ_f weight_f · f(completion)

    Raises TypeError for an f that cannot be called like this, and ValueError for wrong weights.
    """

    def __init__(
        self,
        f: Callable | list[Callable],
        tokenizer: Tokenizer,
        weights: Iterable[float] | None = None,
    ):
        # All that can be checked is checked here: before training, not in its middle.
        self.functions = list(f) if isinstance(f, (list, tuple)) else [f]
        if not self.functions:
            raise ValueError("TextReward([]) has no function to ask: give one or more")
        for function in self.functions:
            check_text_function(function)
        self.names = unique_names(self.functions)
        self.weights = checked_weights(weights, self.names)
        check_tokenizer(tokenizer, "decode")
        self.tokenizer = tokenizer

    def __call__(self, idx: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        """The rewards (B,) alone; see `scores`."""
        return self.scores(idx, attention_mask, completion_mask).rewards

    def scores(
        self,
        idx: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        columns: dict[str, list] | None = None,
        step: int = 0,
        max_steps: int | None = None,
    ) -> Scores:
        """Decode a batch, (B, T) each, ask every function, and add up what they give.

        columns: {name: list of B values} of the prompts' rows. step, max_steps: the
        trainer's, for `trainer_state`.

        Raises what `check_columns` does; ValueError where a function returns too few
        rewards or all abstain from a sample; and TypeError for a reward that is not a
        number.
        """
        columns = {} if columns is None else columns
        self.check_columns(columns)
        check_lengths(columns, len(idx))

        # Everything that a function may ask for, by the name under which it asks.
        log = CallbackLog(len(idx))
        arguments: dict[str, Any] = {
            **columns,
            **self.read(idx, attention_mask, completion_mask),
            "trainer_state": SimpleNamespace(global_step=step, max_steps=max_steps),
            "log_metric": log.log_metric,
            "log_extra": log.log_extra,
        }

        # Ask each function, with the arguments that it names.
        results = {}
        for name, function in zip(self.names, self.functions, strict=True):
            result = function(**arguments_of(function, arguments))
            results[name] = as_rewards(name, result, arguments["completions"])

        # Add up what they gave, and keep what they logged.
        scores = self.combine(results, arguments["completions"], idx.device)
        return replace(scores, metrics=scores.metrics | log.metrics(), extra=log.extra)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check the functions' signatures against the names of the prompts' columns.

        Raises TypeError for a function that requires anything else, and ValueError for a
        column whose name is that of an argument which TextReward gives itself.
        """
        columns = list(columns)
        for column in columns:
            if column in RESERVED_COLUMNS:
                raise ValueError(f"column {column!r} has a name that TextReward uses: rename it")
        for name, function in zip(self.names, self.functions, strict=True):
            check_available(name, function, [*RESERVED_COLUMNS, *columns])

    def read(
        self,
        idx: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
    ) -> dict[str, Any]:
        """What there is to judge: the arguments `completions`, `prompts` and `completion_ids`."""
        # Whatever is neither completion nor padding is prompt.
        is_completion = completion_mask.bool()
        is_prompt = attention_mask.bool() & ~is_completion
        completion_ids = ids_under(is_completion, idx)
        prompt_ids = ids_under(is_prompt, idx)
        return {
            "completions": self.texts(completion_ids),
            "prompts": self.texts(prompt_ids),
            "completion_ids": completion_ids,
        }

    def texts(self, rows: list[list[int]]) -> list[str]:
        """The text of each row of ids, without end tokens."""
        ends = stop_tokens(self.tokenizer)
        return [self.tokenizer.decode([i for i in ids if i not in ends]) for ids in rows]

    def combine(
        self,
        results: dict[str, list[float | None]],
        completions: list[str],
        device: torch.device,
    ) -> Scores:
        """The Scores of {function: list of B rewards, None where it abstained}."""
        # Two tables, (functions, B): where a function abstained, and the rewards, with NaN there. A
        # NaN that a function returned itself is no abstention but an error: it reaches the sum, in
        # which `score` finds it.
        rows = list(results.values())
        abstained = torch.tensor([[reward is None for reward in row] for row in rows])
        filled = [[math.nan if reward is None else reward for reward in row] for row in rows]
        table = torch.tensor(filled, dtype=torch.float32)

        unjudged = abstained.all(dim=0)
        if unjudged.any():
            sample = first_true(unjudged)
            raise ValueError(
                f"every function of TextReward ({', '.join(self.names)}) returned None for sample "
                f"{sample}, {completions[sample]!r}: at least one must give it a reward"
            )

        # The weighted sum, in which an abstention is 0.
        weights = torch.tensor(self.weights, dtype=torch.float32)
        weighted = (weights[:, None] * table).masked_fill(abstained, 0.0)

        # For the log: the mean of each function, where there are several to tell apart.
        means = {}
        for name, rewards, judged in zip(self.names, table, ~abstained, strict=True):
            if len(self.names) > 1 and judged.any():
                means[f"reward/{name}"] = rewards[judged].mean().item()
        by_function = dict(zip(self.names, table.to(device), strict=True))
        return Scores(weighted.sum(dim=0).to(device), by_function, means)


def ids_under(mask: Tensor, idx: Tensor) -> list[list[int]]:
    """The ids of each row where its mask is True; mask and idx are (B, T)."""
    # Copy all rows from a GPU at once: row by row, each would have to wait for it.
    mask = mask.cpu()
    idx = idx.cpu()
    return [ids[keep].tolist() for ids, keep in zip(idx, mask, strict=True)]


class CallbackLog:
    """What the functions log while they judge B completions, by trl's log_metric and log_extra."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.values: dict[str, list[float]] = {}
        self.extra: dict[str, list] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Add a number to the log. Several of one name are averaged."""
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"log_metric({name!r}, {number}): expected a finite number")
        self.values.setdefault(name, []).append(number)

    def log_extra(self, column: str, values: list) -> None:
        """Keep one value for each completion. A later call for the same column replaces them."""
        values = list(values)
        if len(values) != self.batch_size:
            raise ValueError(
                f"log_extra({column!r}) got {len(values)} values for {self.batch_size} "
                "completions: give one for each"
            )
        self.extra[column] = values

    def metrics(self) -> dict[str, float]:
        """The mean of what was logged under each name."""
        return {name: statistics.fmean(values) for name, values in self.values.items()}


# --------------------------------------------------------------------------------------------------
# What a function on text takes, and what it returns

# The kinds of parameters that can be given by name. (**kwargs is another: `takes_any_keyword`.)
KEYWORD_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_text_function(function: Any) -> None:
    """TypeError for what cannot be called by keyword, and for a coroutine function."""
    if not callable(function):
        raise TypeError(f"TextReward got {function!r}; expected a function or a list of functions")
    # An object is called through the __call__ of its type, which may be a coroutine function, too.
    if any(inspect.iscoroutinefunction(f) for f in (function, type(function).__call__)):
        raise TypeError(
            f"{name_of(function)} is a coroutine function (async def), which TextReward does not "
            "await: give a plain function, which may call asyncio.run inside"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        raise TypeError(
            f"{name_of(function)} does not tell which arguments it takes: wrap it in a def"
        ) from None
    # Positional-only parameters cannot be given by name. They may stay if they have a default.
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise TypeError(
                f"{name_of(function)} takes {parameter.name!r} by position only; TextReward calls "
                "it by keyword: remove the / from its signature"
            )


def takes_any_keyword(function: Callable) -> bool:
    """Whether a function has **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def keyword_parameters(function: Callable) -> list[inspect.Parameter]:
    """The parameters of a function that can be given by name."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter for parameter in parameters if parameter.kind in KEYWORD_KINDS]


def check_lengths(columns: Mapping[str, list], n_rows: int) -> None:
    """ValueError for a column that does not have one value for each row."""
    for name, values in columns.items():
        if len(values) != n_rows:
            raise ValueError(f"column {name!r} has {len(values)} values for {n_rows} rows")


def check_available(name: str, function: Callable, available: list[str]) -> None:
    """TypeError where a function needs an argument that is not available, or takes none that is."""
    # It may not require anything that nobody can give ...
    parameters = keyword_parameters(function)
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in available:
            raise TypeError(
                f"reward function {name} requires {parameter.name!r}, which is not available. "
                f"Available are {', '.join(available)}: add a column {parameter.name!r} to the "
                "rows of the prompts, or give the parameter a default"
            )
    # ... and it must take something, or it would judge every completion alike.
    takes_one = any(parameter.name in available for parameter in parameters)
    if not takes_one and not takes_any_keyword(function):
        raise TypeError(
            f"reward function {name} names none of {', '.join(available)}, so it would not see "
            "what it judges: name one, or take **kwargs"
        )


def arguments_of(function: Callable, available: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function names, or all of them where it has **kwargs.

    Lists are copied, so that a function which changes one does not change it for the next.
    """
    # What trl's functions do not name, they collect in **kwargs.
    takes_all = takes_any_keyword(function)
    names = [parameter.name for parameter in keyword_parameters(function)]
    arguments = {}
    for name, value in available.items():
        if takes_all or name in names:
            arguments[name] = list(value) if isinstance(value, list) else value
    return arguments


def as_rewards(name: str, result: Any, completions: list[str]) -> list[float | None]:
    """What a function returned, as a list with one number or None for each completion.

    It may be any iterable of numbers, a tensor or an array. Raises ValueError for too few
    or too many and TypeError for what is not a number.
    """
    # A tensor or an array becomes a list, a tensor of one number in a list a number.
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, Iterable) or isinstance(result, (str, Mapping)):
        raise TypeError(f"{name} returned {result!r}; expected a list of rewards")
    rewards = [as_number(reward) for reward in result]
    # One for each completion, and each a number or None.
    if len(rewards) != len(completions):
        raise ValueError(
            f"{name} must return a reward for each of the {len(completions)} completions, not "
            f"{len(rewards)}"
        )
    for reward, completion in zip(rewards, completions, strict=True):
        if reward is not None and not isinstance(reward, numbers.Real):
            raise TypeError(
                f"{name} gave {reward!r} for {completion!r}; a reward must be a number or None"
            )
    return rewards


def as_number(value: Any) -> Any:
    """The number in a tensor or array of no dimensions; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def name_of(function: Any) -> str:
    """The name of a function, or of the type of an object that can be called."""
    return getattr(function, "__name__", type(function).__name__)


def unique_names(functions: list[Callable]) -> list[str]:
    """The functions' names, with _2, _3, ... after a name that came before."""
    # They tell the functions apart in the log, and two lambdas have the same name.
    names: list[str] = []
    for function in functions:
        name = name_of(function)
        count = 1
        while name in names:
            count += 1
            name = f"{name_of(function)}_{count}"
        names.append(name)
    return names


def checked_weights(weights: Iterable[float] | None, names: list[str]) -> list[float]:
    """The weights as floats, 1 each where none are given; ValueError where they do not fit."""
    if weights is None:
        return [1.0] * len(names)
    if not isinstance(weights, Iterable):
        raise ValueError(f"weights={weights!r} must be a list with a number for each function")
    checked = []
    for weight in weights:
        number = as_number(weight)
        if not isinstance(number, numbers.Real) or not math.isfinite(number):
            raise ValueError(f"weights has {weight!r}; each must be a finite number")
        checked.append(float(number))
    if len(checked) != len(names):
        raise ValueError(
            f"weights has {len(checked)} numbers for {len(names)} functions ({', '.join(names)}): "
            "give one for each"
        )
    return checked
