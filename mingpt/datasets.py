"""
What people bring along to train on: texts, demonstrations, comparisons and prompts.

They come as rows, that is dicts, most often the lines of a JSON Lines file:

    {"text": ...}                                      to pre-train on
    {"prompt": ..., "completion": ...}                 demonstrations, for supervised fine-tuning
    {"prompt": ..., "chosen": ..., "rejected": ...}    comparisons, for a reward model or DPO
    {"prompt": ..., "answer": ...}                     prompts for RL, with further columns for the
                                                       reward function, here `answer`
    {"messages": [...]}                                conversations: demonstrations, or prompts

A text in them can also be a list of messages, {"role": "user", "content": "Hi!"}, as the prompt of
a conversation. Then the tokenizer is a `Chat`, which knows how the model reads them.

For example, a reward model learns from comparisons like this:

    rows = read_jsonl("comparisons.jsonl", "prompt", "chosen", "rejected")
    data = Comparisons(rows, tokenizer, block_size)
    trainer = Trainer(
        config, reward_model, data, loss_fn=comparison_loss, collate_fn=data.collate
    )

One long text, a book, comes as its ids, which `windows` cuts into examples to pre-train on.

The file follows a row on its way to the model: read it from disk, check its fields, encode
it as token ids (the three datasets), and pad it to the length of its batch (their
`collate`).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from mingpt.config import CfgNode, check_numbers

IGNORED = -1  # a target that the loss leaves out, as in minGPT

# `TextReward` passes these to a reward function itself, so no column of the prompts may have such
# a name.
RESERVED_COLUMNS = (
    "completions",
    "prompts",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)

# --------------------------------------------------------------------------------------------------
# Files, and how they are split into training, validation and test data


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 text file, without a byte-order mark and with all line ends as "\\n".

    Raises ValueError, with the path, for a missing file, a folder, or text that is not
    UTF-8.
    """
    # In text mode, Python itself turns all line ends into "\n".
    path = Path(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: give a text file")
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise ValueError(f"{path}: there is no such file")
    try:
        return path.read_text(encoding="utf-8").removeprefix("\N{BYTE ORDER MARK}")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x} "
            f"({error.reason}), in line {line}. Save it as UTF-8"
        ) from None


def read_jsonl(path: str | Path, *fields: str) -> list[dict]:
    """The objects in a file of JSON lines; blank lines are skipped.

    Raises ValueError, with its number, for a line that is not an object with all `fields`
    as text or messages, and for what `read_text` refuses.
    """
    rows = []
    # Not str.splitlines(), which also splits at U+2028, and that may stand inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_line(line)
        if row is None or not all(is_text(row.get(field)) for field in fields):
            example = json.dumps(dict.fromkeys(fields, "..."))
            raise ValueError(
                f"{path}, line {number}: must be JSON like {example}, not {line[:60]!r}"
            )
        rows.append(row)
    return rows


def is_text(value: Any) -> bool:
    """Whether a field holds a text, or messages, which a `Chat` makes a text of."""
    return isinstance(value, str) or is_messages(value)


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, that is of dicts."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(message, Mapping) for message in value)


def parse_line(line: str) -> dict | None:
    """The JSON object on a line, or None if it is anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # the latter where it is nested too deeply
        return None
    return row if isinstance(row, dict) else None


def split_of(text: str) -> str:
    """Which split a text belongs to: "train" (90%), "valid" (5%) or "test" (5%).

    It depends on the text alone, by way of its SHA-256. So a text never changes sides when
    others are added or reordered, and copies of it all land in the same split. TypeError for
    anything but text.
    """
    if not isinstance(text, str):
        raise TypeError(f"got {type(text).__name__} {text!r:.60}; expected a text")
    # The hash deals the texts into 20 buckets of about the same size.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    bucket = int.from_bytes(digest[:8], "big") % 20
    if bucket == 0:
        return "test"
    if bucket == 1:
        return "valid"
    return "train"


def split_rows(rows: Iterable[dict], key: str) -> dict[str, list[dict]]:
    """{"train": rows, "valid": rows, "test": rows}, by `split_of` the text in the field `key`.

    Messages in that field are split by their JSON.
    """
    splits: dict[str, list[dict]] = {"train": [], "valid": [], "test": []}
    for i, row in enumerate(rows):
        check_row(i, row)
        if is_messages(row.get(key)):
            text = json.dumps(row[key], sort_keys=True)
        else:
            text = text_field(i, row, key)
        splits[split_of(text)].append(row)
    return splits


# --------------------------------------------------------------------------------------------------
# The fields of a row, and their tokens. Row number i is named in each error, so that people find
# it among thousands.


class Tokenizer(Protocol):
    """What this library asks of a tokenizer, beside an end token (see `end_token`)."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def decode(self, ids: list[int]) -> str:
        """The text of a list of ids."""


def end_token(tokenizer: Any) -> int | None:
    """The id that ends a text, or None where the tokenizer has none (or there is no tokenizer).

    It is `tokenizer.eot_token`, our tokenizers' and tiktoken's name for it, or else
    `tokenizer.eos_token_id`, which is the name in `transformers`. ValueError for one that is no id.
    """
    for name in ("eot_token", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            check_numbers(CfgNode(**{name: token}), name, whole=True)
            return int(token)
    return None


def stop_tokens(tokenizer: Any) -> list[int]:
    """The ids that end a completion: a `Chat`'s stop_tokens, or else the `end_token`, if any."""
    stops = getattr(tokenizer, "stop_tokens", None)
    if stops is None:
        end = end_token(tokenizer)
        stops = [] if end is None else [end]
    return [int(token) for token in stops]


def default_stop_token(tokenizer: Any) -> int | list[int] | None:
    """What `generate` should stop at: all of a `Chat`'s stop_tokens, or else the `end_token`."""
    stops = stop_tokens(tokenizer)
    return stops if len(stops) > 1 else end_token(tokenizer)


def required_end_token(tokenizer: Tokenizer) -> int:
    """`end_token`, and ValueError where there is none. TypeError for what is no tokenizer."""
    check_tokenizer(tokenizer, "encode")
    end = end_token(tokenizer)
    if end is None:
        raise ValueError(
            f"the {type(tokenizer).__name__} has no end token, which every completion must end "
            "with: set its eot_token or eos_token_id"
        )
    return end


def check_tokenizer(tokenizer: Any, *methods: str) -> None:
    """TypeError for what lacks these methods of a tokenizer. (A text's own `encode` is another.)"""
    missing = [name for name in methods if not hasattr(tokenizer, name)]
    if missing or isinstance(tokenizer, (str, bytes, type)):
        raise TypeError(
            f"tokenizer is {type(tokenizer).__name__} {tokenizer!r:.60}; expected an object with "
            "encode(text) and decode(ids)"
        )


def check_row(i: int, row: Any) -> None:
    """ValueError for a row that is not a dict."""
    if not isinstance(row, Mapping):
        raise ValueError(f"row {i} is {short(row)}; expected a dict of fields")


def text_field(i: int, row: dict, *names: str) -> str:
    """The text in the first of these fields that row number i has.

    Raises ValueError, with the row's number and the field, where the row has none of them
    or what it has is not text.
    """
    check_row(i, row)
    # Which of the names does the row have? The first one counts.
    present = [name for name in names if name in row]
    if not present:
        wanted = " or ".join(repr(name) for name in names)
        raise ValueError(f"row {i} has no field {wanted}, only {list(row)}: add it")
    name = present[0]
    if not isinstance(row[name], str):
        raise ValueError(f"row {i} has {name}={short(row[name])}; expected text")
    return row[name]


def encode_messages(
    i: int,
    messages: Sequence[Mapping],
    tokenizer: Any,
    **options: Any,
) -> Any:
    """What `tokenizer.encode(messages, **options)` makes of the messages of row number i.

    Raises ValueError, with the row's number, where the tokenizer is no `Chat`, or refuses them.
    """
    if not hasattr(tokenizer, "stop_tokens"):
        raise ValueError(
            f"row {i} has messages, {short(messages)}: pass a Chat as the tokenizer, "
            "for instance Chat.from_pretrained(...)"
        )
    try:
        return tokenizer.encode(messages, **options)
    except ValueError as error:
        raise ValueError(f"row {i}: {error}") from None


def length_of_lesson(is_learned: Sequence[bool]) -> int:
    """The number of tokens up to the last one that is learned; at least one is."""
    return max(place for place, learned in enumerate(is_learned) if learned) + 1


def encode_prompt_field(i: int, row: dict, tokenizer: Tokenizer, end: int) -> list[int]:
    """The ids of a row's prompt. Without a prompt, they are the end token alone.

    Messages are followed by the generation prompt, with which the assistant's answer begins.
    """
    check_row(i, row)
    if is_messages(row.get("prompt")):
        return encode_messages(i, row["prompt"], tokenizer, add_generation_prompt=True)
    # A model must read something before it can predict the first token. It has learned that a new
    # text begins after the end of another.
    if row.get("prompt") in (None, ""):
        return [end]
    return list(tokenizer.encode(text_field(i, row, "prompt")))


def check_length(i: int, ids: list[int], most: int) -> None:
    """ValueError for a row that the model cannot take; nothing is silently cut off."""
    if len(ids) > most:
        raise ValueError(
            f"row {i} has {len(ids)} tokens, prompt and ends included; the model takes {most}: "
            "shorten it or leave it out"
        )


def short(value: Any) -> str:
    """The repr of a value, cut off where it would fill an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --------------------------------------------------------------------------------------------------
# Demonstrations and comparisons: both are encoded when the dataset is made, so that a wrong row is
# found before training begins.


def windows(ids: Sequence[int] | Tensor, block_size: int) -> TensorDataset:
    """Cut the ids of one long text into examples (x, y) of block_size tokens to pre-train on.

    y (T,) is one token ahead of x (T,). The windows follow each other and share one id: the last
    one of y is the first one of the next x. What does not fill a window at the end is left out.
    Raises ValueError for ids that do not fill one window.
    """
    check_numbers(CfgNode(block_size=block_size), "block_size", low=1, whole=True)
    ids = torch.as_tensor(ids, dtype=torch.long)
    if ids.dim() != 1 or len(ids) <= block_size:
        raise ValueError(
            f"ids have shape {tuple(ids.shape)}; one window of block_size={block_size} needs "
            f"{block_size + 1} ids in a row, as tokenizer.encode(text) gives them"
        )
    rows = ids.unfold(0, block_size + 1, block_size)  # (number of windows, block_size + 1)
    return TensorDataset(rows[:, :-1], rows[:, 1:])


class Completions(Dataset):
    """Demonstrations, for supervised fine-tuning: the loss is on the tokens of the completions.

        Trainer(config, model, data, collate_fn=data.collate, weight_fn=data.weight)

    rows: dicts with `prompt` and `completion`, or with `text`, which is a completion of the
    end token. Each completion ends with the end token. Or with `messages`: what the assistant
    says is completion, the ends of its turns included, and all else is prompt. An item is
    (x, y), (T,) each: y[t] is the token to predict after x[t], or -1 where that belongs to the
    prompt. With p for the prompt's tokens:

        ids    p    p    a    b    <eot>
        x      p    p    a    b              ids[:-1]
        y      -1   a    b    <eot>          ids[1:], without the prompt's

    Raises ValueError, with the row's number, for a missing or wrong field and for a row
    that is too long.
    """

    def __init__(self, rows: Iterable[dict], tokenizer: Tokenizer, block_size: int):
        end = required_end_token(tokenizer)
        check_numbers(CfgNode(block_size=block_size), "block_size", low=1, whole=True)
        self.items: list[tuple[Tensor, Tensor]] = []
        for i, row in enumerate(rows):
            ids, is_completion = encode_demonstration(i, row, tokenizer, end)
            # The last token is only predicted, never read, so one more than block_size fits.
            check_length(i, ids, block_size + 1)
            # The prompt's last token already predicts the first one of the completion.
            pairs = zip(ids[1:], is_completion[1:], strict=True)
            targets = [token if learned else IGNORED for token, learned in pairs]
            self.items.append((torch.tensor(ids[:-1]), torch.tensor(targets)))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.items[i]

    @staticmethod
    def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(idx, targets), (B, T) each.

        The padding is on the right, where causal attention never looks, so no mask is
        needed.
        """
        return pad([x for x, _ in items]), pad([y for _, y in items], value=IGNORED)

    @staticmethod
    def weight(batch: tuple[Tensor, Tensor]) -> int:
        """How many tokens the loss of a batch is a mean over: the Trainer's weight_fn."""
        _, targets = batch
        return int((targets != IGNORED).sum())


def encode_demonstration(
    i: int,
    row: dict,
    tokenizer: Tokenizer,
    end: int,
) -> tuple[list[int], list[bool]]:
    """The ids of row number i, and which of them are completion."""
    check_row(i, row)
    if "messages" not in row:
        prompt = encode_prompt_field(i, row, tokenizer, end)
        completion = [*tokenizer.encode(text_field(i, row, "completion", "text")), end]
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)
    if not is_messages(row["messages"]):
        raise ValueError(f"row {i} has messages={short(row['messages'])}; expected a list of dicts")
    ids, is_completion = encode_messages(i, row["messages"], tokenizer, return_mask=True)
    if not any(is_completion):
        raise ValueError(f"row {i} has no message of the assistant to learn from: leave it out")
    # Nothing is learned from what the template writes behind the last answer.
    length = length_of_lesson(is_completion)
    return ids[:length], is_completion[:length]


class Comparisons(Dataset):
    """Completions of one prompt, of which people chose one, for `comparison_loss` and `DPOLoss`.

    rows: dicts with these fields:
      prompt     text; may be empty or missing; or messages
      chosen     the completion that people preferred: text, or a list of one message of the
                 assistant's; then the prompt must be messages, too
      rejected   the other one, or a list of others, of the same length in every row
      ended      optional: a list of bools, the chosen one's first. True (the default): the
                 completion ends with the end token. False: the sampler was cut off before
                 that. PPO samples such texts, and a reward model judges them well only if
                 it has learned from some.

    A row is one item, (prompt (T,), list of K completions), the chosen one first. It stays
    together because a model that meets the chosen one in several items, once against each
    rejected one, learns it by heart (Ouyang et al. 2022, section 3.5).

    Raises ValueError, with the row's number, for a missing or wrong field and for a row
    that is too long.
    """

    def __init__(self, rows: Iterable[dict], tokenizer: Tokenizer, block_size: int):
        end = required_end_token(tokenizer)
        check_numbers(CfgNode(block_size=block_size), "block_size", low=1, whole=True)
        self.items: list[tuple[Tensor, list[Tensor]]] = []
        for i, row in enumerate(rows):
            prompt = encode_prompt_field(i, row, tokenizer, end)
            texts = compared_texts(i, row)
            ended = ended_field(i, row, len(texts))
            # The end token marks a completion that ended by itself.
            completions = []
            for text, has_ended in zip(texts, ended, strict=True):
                ids = encode_answer(i, row, text, tokenizer, prompt)
                completions.append([*ids, end] if has_ended else ids)
            if not all(completions):
                raise ValueError(
                    f"row {i} has a completion that is empty and has not ended: leave it out"
                )
            # A reward model reads every token, the last one included.
            check_length(i, [*prompt, *max(completions, key=len)], block_size)
            self.items.append((torch.tensor(prompt), [torch.tensor(ids) for ids in completions]))
            # A batch is (B, K, T), so K must be the same in all rows.
            if len(completions) < 2 or len(completions) != len(self.items[0][1]):
                raise ValueError(
                    f"row {i} has {len(completions) - 1} rejected completions; every row must have "
                    "as many as the first, and at least one"
                )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, list[Tensor]]:
        return self.items[i]

    @staticmethod
    def collate(items: list[tuple[Tensor, list[Tensor]]]) -> tuple[Tensor, Tensor, Tensor]:
        """(idx, attention_mask, completion_mask), (B, K, T) each, the chosen completion first.

        Prompts are padded on the left and completions on the right, so all completions
        begin in the same column:

            pad p   p   | a   b   <eot>
            pad p   p   | c   <eot> pad
        """
        K = len(items[0][1])
        # Prompts (B, T), and completions (B·K, T'). K adjacent ones belong to the same prompt.
        prompts, prompt_mask = left_pad([prompt for prompt, _ in items])
        completions, written = pad_and_mask([ids for _, group in items for ids in group])
        # Repeat each prompt for each of its completions: (B, T) -> (B·K, T).
        prompts = prompts.repeat_interleave(K, dim=0)
        prompt_mask = prompt_mask.repeat_interleave(K, dim=0)

        # Join them, and give each prompt a dimension of its own: (B·K, T + T') -> (B, K, T + T').
        idx = torch.cat([prompts, completions], dim=1)
        attention_mask = torch.cat([prompt_mask, written], dim=1)
        completion_mask = torch.cat([torch.zeros_like(prompt_mask), written], dim=1)
        shape = (len(items), K, idx.size(1))
        return idx.view(shape), attention_mask.view(shape), completion_mask.view(shape)


def compared_texts(i: int, row: dict) -> list[Any]:
    """The chosen completion of row number i, then the rejected ones: texts, or messages."""
    chosen = answer_field(i, row, "chosen")
    rejected = row.get("rejected")
    if not isinstance(rejected, (list, tuple)) or is_messages(rejected):
        return [chosen, answer_field(i, row, "rejected")]
    for text in rejected:
        if not is_text(text):
            raise ValueError(f"row {i} has {short(text)} in its list rejected; expected text")
    return [chosen, *rejected]


def answer_field(i: int, row: dict, name: str) -> Any:
    """The text in a field of row number i, or its messages."""
    return row[name] if is_messages(row.get(name)) else text_field(i, row, name)


def encode_answer(
    i: int,
    row: dict,
    answer: Any,
    tokenizer: Tokenizer,
    prompt: list[int],
) -> list[int]:
    """The ids of a completion, text or a message, without its end. prompt: the ids of the prompt.

    Raises ValueError, with the row's number, for messages that are no single answer.
    """
    if isinstance(answer, str):
        return list(tokenizer.encode(answer))
    if len(answer) != 1 or answer[0].get("role") != "assistant" or not is_messages(row["prompt"]):
        raise ValueError(
            f"row {i} has {short(answer)} to compare; expected one message of the assistant's, "
            "and a prompt that is messages, too"
        )
    messages = [*row["prompt"], *answer]
    ids, is_answer = encode_messages(i, messages, tokenizer, return_mask=True)
    length = length_of_lesson(is_answer)
    if ids[:len(prompt)] != prompt:
        raise ValueError(f"row {i}: with its answer, the prompt is encoded in another way")
    answer_ids = ids[len(prompt):length]
    return answer_ids[:-1] if answer_ids[-1] in stop_tokens(tokenizer) else answer_ids


def ended_field(i: int, row: dict, n_completions: int) -> list[bool]:
    """Whether each completion of row number i ended. If the row does not say, all did."""
    ended = row.get("ended", [True] * n_completions)
    # Not `bool(end)` of each: the text "False" would be true.
    if not isinstance(ended, list) or [type(end) for end in ended] != [bool] * n_completions:
        raise ValueError(
            f"row {i} has ended={ended} for {n_completions} completions: give a list of one bool "
            "for each, the chosen one first"
        )
    return ended


# --------------------------------------------------------------------------------------------------
# Prompts, for RL


class Prompts(Dataset):
    """Prompts to sample completions of, with what a reward function may want to know about each.

    prompts: texts, or lists of token ids, or an (N, T) LongTensor, or lists of messages, or
    dicts with the field `prompt` (any of these; messages may also stand in `messages`) and any
    further ones, such as a gold answer. tokenizer: what encodes text, and for messages a `Chat`.

    ids: the N prompts as 1-D LongTensors. columns: the further fields, {name: list of N
    values}. An item is (ids, i). The number i goes with the prompt through the trainer, and
    finds its values in the columns when a reward function asks for them.

    Raises ValueError, with the prompt's number, for an empty prompt, one of another type,
    and rows whose columns are not the same as the first one's.
    """

    def __init__(self, prompts: Iterable, tokenizer: Tokenizer | None = None):
        if isinstance(prompts, (str, Mapping)):
            raise TypeError(
                f"prompts is one {type(prompts).__name__}, {short(prompts)}; expected a list"
            )
        if torch.is_tensor(prompts) and prompts.dim() == 0:
            raise ValueError(f"prompts is {prompts!r}; expected (N, T) token ids")
        # A bare prompt is a row without further columns.
        rows = [row if isinstance(row, Mapping) else {"prompt": row} for row in prompts]
        if rows and all("role" in row for row in rows):
            raise TypeError(f"prompts is one list of messages, {short(rows)}; expected several")
        rows = [with_prompt(row) for row in rows]
        for i, row in enumerate(rows):
            if "prompt" not in row:
                raise ValueError(f"row {i} has no field 'prompt', only {list(row)}: add it")
        self.columns = further_columns(rows)
        self.ids = encode_prompts([row["prompt"] for row in rows], tokenizer)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.ids[i], i

    @staticmethod
    def collate(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """(idx (B, T), attention_mask (B, T), index (B,)): left-padded prompts, their numbers."""
        idx, attention_mask = left_pad([ids for ids, _ in items])
        return idx, attention_mask, torch.tensor([i for _, i in items])

    def columns_of(self, index: Tensor) -> dict[str, list]:
        """The columns of a batch, {name: list of B values}. index (B,): as `collate` gives it."""
        numbers = index.tolist()
        return {name: [values[i] for i in numbers] for name, values in self.columns.items()}


def with_prompt(row: Mapping) -> Mapping:
    """The row, with its messages as the prompt where it has no other."""
    if "prompt" in row or "messages" not in row:
        return row
    return {"prompt" if name == "messages" else name: value for name, value in row.items()}


def further_columns(rows: Sequence[Mapping]) -> dict[str, list]:
    """The fields beside `prompt`, column by column: {name: list of len(rows)}."""
    # The first row says which columns there are ...
    names = [name for name in rows[0] if name != "prompt"] if rows else []
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"row 0 has a column {name!r}; expected a name, as text")
        if name in RESERVED_COLUMNS:
            raise ValueError(f"column {name!r} of row 0 is a name that TextReward uses: rename it")
    # ... and every other row has the same ones.
    for i, row in enumerate(rows):
        for name in names:
            if name not in row:
                raise ValueError(f"row {i} has no column {name!r}, which row 0 has: add it")
        for name in row:
            if name not in names and name != "prompt":
                raise ValueError(f"row {i} has a column {name!r}, which row 0 lacks: remove it")
    return {name: [row[name] for row in rows] for name in names}


def encode_prompts(prompts: Iterable, tokenizer: Tokenizer | None = None) -> list[Tensor]:
    """Prompts as a list of 1-D LongTensors. They may be text, messages, ids, or an (N, T) tensor.

    Raises ValueError, with the prompt's number, for an empty one, for text without a
    tokenizer, for messages without a `Chat`, and for anything else.
    """
    encoded = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(
                    f"prompt {i}, {short(prompt)}, is text: pass the tokenizer that encodes it"
                )
            check_tokenizer(tokenizer, "encode")
            prompt = tokenizer.encode(prompt)
        elif is_messages(prompt):
            prompt = encode_messages(i, prompt, tokenizer, add_generation_prompt=True)
        encoded.append(ids_of(i, prompt))
    return encoded


def ids_of(i: int, prompt: Any) -> Tensor:
    """Prompt number i as a 1-D LongTensor."""
    # PyTorch takes lists, tensors and numpy arrays. Then they must be a row of whole numbers.
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"prompt {i} is {short(prompt)}; expected text or token ids") from None
    if ids.dim() != 1 or len(ids) == 0:
        raise ValueError(
            f"prompt {i} has shape {tuple(ids.shape)}: each must be a row of one token or more (to "
            "start from nothing, give the end-of-text token)"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"prompt {i} is {short(prompt)}; token ids must be whole numbers")
    return ids.long()


# --------------------------------------------------------------------------------------------------
# Padding: rows of different lengths become one tensor


def pad(rows: list[Tensor], value: int = 0, left: bool = False) -> Tensor:
    """Stack rows of different lengths: (B, T), filled up with value on the right (or left).

    ValueError for no rows, and for what is no list of 1-D tensors.
    """
    check_tensor_rows(rows)
    T = max(len(row) for row in rows)
    padded = []
    for row in rows:
        missing = T - len(row)
        padded.append(F.pad(row, (missing, 0) if left else (0, missing), value=value))
    return torch.stack(padded)


def check_tensor_rows(rows: Any) -> None:
    """ValueError unless rows is a list of 1-D tensors, with one or more in it."""
    if not isinstance(rows, (list, tuple)) or len(rows) == 0:
        raise ValueError(f"rows is {rows!r:.60}; expected a list of one tensor or more")
    for i, row in enumerate(rows):
        if not torch.is_tensor(row) or row.dim() != 1:
            raise ValueError(f"row {i} is {row!r:.60}; expected a 1-D tensor")


def pad_and_mask(rows: list[Tensor], left: bool = False) -> tuple[Tensor, Tensor]:
    """(idx (B, T), attention_mask (B, T)) of rows of different lengths. The mask is bool."""
    check_tensor_rows(rows)
    # Padded in the same way, rows of True become the mask: the padding is 0, that is False.
    real = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return pad(rows, left=left), pad(real, left=left)


def left_pad(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`pad_and_mask` on the left: all prompts end in the last column, where sampling goes on."""
    return pad_and_mask(prompts, left=True)
