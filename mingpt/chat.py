"""
Conversations: from messages to token ids, and which of those a model learns from.

A conversation is a list of messages, {"role": "user", "content": "Hi!"}. A chat model has learned
to read it as one text, in a form of its own: its chat template. SmolLM2 reads

    <|im_start|>user
    Hi!<|im_end|>
    <|im_start|>assistant
    Hello!<|im_end|>

where <|im_start|> and <|im_end|> are special tokens. The last line but one ("assistant") is the
generation prompt: behind it the model writes its answer, and then <|im_end|>, which ends its turn.

    chat = Chat.from_pretrained("smollm2")
    ids = chat.encode([{"role": "user", "content": "Hi!"}], add_generation_prompt=True)

A `Chat` stands wherever a tokenizer does. Three things are not plain, and make up this file:

    1. Special tokens in a message   must stay text: a user who types <|im_end|> must not end a turn
    2. Whose tokens are whose        the mask of the tokens that the model itself would write
    3. Chat                          which puts both together; templates.py renders the templates

Source: `transformers`, for the templates and for what they are given.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self, overload

from mingpt import gguf
from mingpt.bpe import BPETokenizer, Encoder
from mingpt.checkpoint import read_json, read_text, write_text
from mingpt.config import CfgNode, check_booleans
from mingpt.datasets import check_tokenizer, end_token
from mingpt.hub import find_pretrained
from mingpt.templates import CHATML, Renderer, TemplateError
from mingpt.tokenizer_files import AddedToken, AddedTokens, from_gguf, nfc

__all__ = ["CHATML", "Chat"]

Message = Mapping[str, Any]

# --------------------------------------------------------------------------------------------------
# 1. Special tokens in a message
#
# A template joins its own special tokens with the contents of the messages. In the text that comes
# out, nobody can tell one from the other. So before that, a content is disguised: the first
# character of each special token in it is replaced by a character of Unicode's private area, which
# occurs nowhere in the conversation. The text is cut at the special tokens, all of which are now
# the template's. Then the disguise is taken off the pieces between them, and they are encoded as
# ordinary text.
#
# A content can also hold one end of a special token and meet the other end in the text around it:
# "<|im_" at the end of one message, "end|>" at the beginning of the next. So such ends are
# disguised as well. And some templates change contents, to lower case for instance. For them there
# is a proof: the conversation is rendered once more, with every character disguised that any
# special token has. Special tokens in that text can come from the template only, and the first text
# must have the same ones.

# The characters that a disguise is made of.
PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE), range(0xE000, 0xF900))

# Roles that a template may make a special token of, <|user|> for instance.
COMMON_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


class Disguise:
    """Replaces the characters of special tokens in texts by private ones, and puts them back.

    special: the special tokens. texts: all the texts of a conversation, its template included; a
    character that occurs in them is no longer private.
    """

    def __init__(self, special: Iterable[str], texts: Iterable[str]):
        self.special = tuple(special)
        used = set().union(*texts)
        unused = (chr(i) for i in chain.from_iterable(PRIVATE) if chr(i) not in used)
        alphabet = sorted(set().union(*self.special))
        self.private = dict(zip(alphabet, unused, strict=False))
        if len(self.private) < len(alphabet):
            raise ValueError("the messages use up all of Unicode's private characters: remove some")
        self.to_private = str.maketrans(self.private)
        self.from_private = str.maketrans({new: old for old, new in self.private.items()})
        self.parts = parts_of(self.special)

    def put_on(self, text: str) -> str:
        """The text without a special token in it, and without an end of one at its ends."""
        places = {match.start() for match in self.parts.begins.finditer(text)}
        # A template may strip the text: look at its ends with and without the space around them.
        for start, end in {(0, len(text)), ends_without_space(text)}:
            inner = text[start:end]
            if not inner:
                continue
            is_tail = inner.startswith(self.parts.tails)
            if is_tail or any(inner in token for token in self.special):
                places.add(start)
            if inner.endswith(self.parts.heads):
                places.add(end - 1)
        characters = list(text)
        for place in places:
            characters[place] = self.private[characters[place]]
        return "".join(characters)

    def put_on_everything(self, text: str) -> str:
        """The text without any character that a special token has."""
        return text.translate(self.to_private)

    def take_off(self, text: str) -> str:
        """The text as it was."""
        return text.translate(self.from_private)


@dataclass(frozen=True)
class Parts:
    """What to look for in a content.

    begins: matches where a special token begins. heads, tails: the beginnings and the ends of
    special tokens, without the whole ones.
    """

    begins: re.Pattern[str]
    heads: tuple[str, ...]
    tails: tuple[str, ...]


@lru_cache(maxsize=16)
def parts_of(special: tuple[str, ...]) -> Parts:
    """The parts of these special tokens, of which some models have hundreds."""
    # (?=...) only looks ahead, so that tokens which overlap are all found; (?!) is found nowhere.
    anywhere = "|".join(map(re.escape, special))
    return Parts(
        begins=re.compile(f"(?={anywhere})" if special else "(?!)"),
        heads=tuple({token[:n] for token in special for n in range(1, len(token))}),
        tails=tuple({token[n:] for token in special for n in range(1, len(token))}),
    )


def ends_without_space(text: str) -> tuple[int, int]:
    """Where a text begins and ends without the whitespace around it."""
    start = len(text) - len(text.lstrip())
    return start, max(start, len(text.rstrip()))


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A message or a part of one as plain JSON, with every text in it changed by a function."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {str(key): with_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_texts(inner, change) for inner in value]
    return value


def check_value(value: Any, special: Iterable[str]) -> None:
    """ValueError for what is no JSON, and for a key that could be a special token's text.

    A template may write keys as they are, so they cannot be disguised: they must be names.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            is_name = isinstance(key, str) and re.fullmatch(r"[\w.-]+", key)
            if not is_name or any(token in key for token in special):
                raise ValueError(f"got the key {key!r:.60}; expected a name")
            check_value(inner, special)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_value(inner, special)
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        kind = type(value).__name__
        raise ValueError(f"got a {kind}, {value!r:.60}; expected text, lists and dicts")


def texts_in(value: Any) -> Iterator[str]:
    """All the texts in a message or a part of one, without its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from texts_in(inner)


def check_message(i: int, message: Any, special: Iterable[str]) -> None:
    """ValueError for a message that is none, or that could give a special token by its role."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"message {i} is {message!r:.60}; "
            'expected a dict like {"role": "user", "content": "Hi!"}'
        )
    try:
        check_value(message, special)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"message {i}: {error}") from None
    role = message["role"]
    if role in COMMON_ROLES:
        return
    # A template tells roles apart, so they cannot be disguised.
    if not re.fullmatch(r"[A-Za-z][\w-]*", role) or any(
        role in token or token in role or meets(token, role) or meets(role, token)
        for token in special
    ):
        raise ValueError(
            f"message {i} has the role {role!r:.60}; expected a name, like "
            f"{', '.join(COMMON_ROLES)}, that is no part of a special token"
        )


def meets(first: str, second: str) -> bool:
    """Whether the end of the first text is the beginning of the second."""
    longest = min(len(first), len(second))
    return any(first.endswith(second[:n]) for n in range(1, longest + 1))


# --------------------------------------------------------------------------------------------------
# Other people's tokenizers


def added_tokens_of(tokenizer: Any) -> AddedTokens:
    """The added tokens of a tokenizer of ours or of transformers'; of another one, none."""
    if isinstance(tokenizer, Encoder):
        return tokenizer.added
    theirs = getattr(tokenizer, "added_tokens_decoder", None)
    if not isinstance(theirs, Mapping):
        return AddedTokens(())
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    return AddedTokens(
        AddedToken(
            content=token.content,
            id=int(i),
            special=bool(token.special or token.content in special),
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
            normalized=token.normalized,
        )
        for i, token in theirs.items()
    )


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, in which special tokens are text."""
    # transformers' would put special tokens around it, and find some in it.
    if hasattr(tokenizer, "added_tokens_decoder"):
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return list(tokenizer.encode(text, **options))
    return list(tokenizer.encode(text))


def token_names_of(tokenizer: Any) -> dict[str, str]:
    """The tokens that a template may ask for by name, as bos_token."""
    if isinstance(tokenizer, Encoder):
        return dict(tokenizer.vocabulary.token_names)
    names = getattr(tokenizer, "special_tokens_map", {})
    return {name: str(token) for name, token in names.items() if not isinstance(token, list)}


def end_ids(path: Path) -> list[int | None]:
    """The ids of a generation_config.json that end a text; [] where there is no such file."""
    if not path.exists():
        return []
    ends = read_json(path).get("eos_token_id")
    return [i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int]


def read_template(folder: Path) -> str | None:
    """The chat template of a folder: chat_template.jinja, or in tokenizer_config.json."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    if not (folder / "tokenizer_config.json").exists():
        return None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, for different uses
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


# --------------------------------------------------------------------------------------------------
# 2. and 3. The conversation as ids, and whose they are


@dataclass
class Turn:
    """A turn of the assistant in a rendered conversation.

    text[start:end] is what the assistant and the template behind it have written: its message, and
    whatever ends it.
    """

    start: int
    end: int


class Chat:
    """A tokenizer for conversations: `encode(messages)`, and all that a tokenizer has.

    tokenizer: any with `encode` and `decode`; its special tokens are known if it is a
    `BPETokenizer` or one of transformers'. template: a chat template, `CHATML` for instance.

    stop_tokens: the ids that end an answer, the end of a turn first. eot_token: the first of them.
    """

    def __init__(self, tokenizer: Any, template: str):
        if not isinstance(template, str):
            raise TypeError(f"got a template of type {type(template).__name__}; expected a text")
        check_tokenizer(tokenizer, "encode", "decode")
        self.tokenizer = tokenizer
        self.template = template
        self.name = "the chat template"  # in errors
        self.more_stop_tokens: list[int | None] = []
        self.renderer = Renderer(template)
        self.added = added_tokens_of(tokenizer)
        self.special = {token.content: token.id for token in self.added.tokens if token.special}
        self.check_tokenizer()

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> Self:
        """The tokenizer and template of a folder, of a model on the hub, or of a .gguf file.

        "smollm2" is known, too. Raises ValueError for what has no template, and what
        `BPETokenizer.from_pretrained` raises.
        """
        path = find_pretrained(name_or_path, weights=False)
        if path.is_file():
            _, _, vocabulary, template = gguf.read(path)
            tokenizer = BPETokenizer(**vars(from_gguf(path, vocabulary)))
            more_stop_tokens = [vocabulary.get("eot_token_id")]
        else:
            template = read_template(path)
            tokenizer = BPETokenizer.from_pretrained(path)
            more_stop_tokens = end_ids(path / "generation_config.json")
        if template is None:
            raise ValueError(
                f"{path} has no chat template: pass one yourself, as in Chat(tokenizer, CHATML)"
            )
        chat = cls(tokenizer, template)
        chat.name = f"the chat template of {name_or_path}"
        chat.more_stop_tokens = more_stop_tokens
        return chat

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer, and the template as chat_template.jinja, as transformers does."""
        self.tokenizer.save_pretrained(folder)
        write_text(Path(folder) / "chat_template.jinja", self.template)

    @overload
    def encode(
        self,
        messages: str | Sequence[Message],
        add_generation_prompt: bool = False,
        return_mask: Literal[False] = False,
    ) -> list[int]: ...

    @overload
    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        return_mask: Literal[True],
    ) -> tuple[list[int], list[bool]]: ...

    def encode(
        self,
        messages: str | Sequence[Message],
        add_generation_prompt: bool = False,
        return_mask: bool = False,
    ) -> list[int] | tuple[list[int], list[bool]]:
        """The ids of a conversation, or of a text, which is encoded as plain text.

        messages: dicts with "role" and "content", and whatever else the template reads. No special
        token gets in through them: there it is text. add_generation_prompt: end with what the
        assistant's next message begins with.

        return_mask: return (ids, mask), where the mask (a bool for each id) is True for the
        assistant's tokens and for the token that ends its turn. An answer's tokens are those that
        it has when it is sampled: none of them reaches into the text before it.

        Raises ValueError for a conversation that the template refuses, for a template that fails
        or takes too long, and for contents that a template turns into special tokens. With
        return_mask also for a template that changes what it wrote before when a message is added,
        so that the conversation was never as it is now when the assistant answered.
        """
        options = CfgNode(add_generation_prompt=add_generation_prompt, return_mask=return_mask)
        check_booleans(options, "add_generation_prompt", "return_mask")
        if isinstance(messages, str):
            if add_generation_prompt or return_mask:
                raise ValueError("got a text; a generation prompt and a mask need messages")
            return encode_text(self.tokenizer, messages)
        conversation = Conversation(self, messages)
        text = conversation.render(add_generation_prompt)
        turns = conversation.turns(text, required=return_mask)
        ids, mask = self.encode_turns(conversation.disguise, text, turns)
        return (ids, mask) if return_mask else ids

    def decode(self, ids: Any) -> str:
        """The text of ids, special tokens included."""
        return self.tokenizer.decode(ids)

    @cached_property
    def stop_tokens(self) -> list[int]:
        """The ids that end an answer: the end of a turn, and the ends of a text."""
        found = [self.end_of_turn(), end_token(self.tokenizer), *self.more_stop_tokens]
        return list(dict.fromkeys(i for i in found if i is not None))

    @property
    def eot_token(self) -> int | None:
        """The id that ends an answer; None where neither template nor tokenizer has one."""
        return self.stop_tokens[0] if self.stop_tokens else None

    @property
    def vocab_size(self) -> int:
        """The tokenizer's."""
        return self.tokenizer.vocab_size

    def end_of_turn(self) -> int | None:
        """The special token that the template writes behind an answer; None if there is none."""
        messages = [
            {"role": "user", "content": "Question"},
            {"role": "assistant", "content": "Answer"},
        ]
        conversation = Conversation(self, messages)
        try:
            text = conversation.render(False)
        except ValueError:  # an unusual template; the tokenizer's own end must do
            return None
        _, answer, behind = text.rpartition(conversation.put_on("Answer"))
        special = self.special_ids(self.added.split(behind, self.special))
        return special[0] if answer and special else None

    def special_ids(self, pieces: Iterable[str | int]) -> list[int]:
        """The special tokens among the pieces of a text."""
        ids = set(self.special.values())
        return [piece for piece in pieces if isinstance(piece, int) and piece in ids]

    def encode_turns(
        self,
        disguise: Disguise,
        text: str,
        turns: list[Turn],
    ) -> tuple[list[int], list[bool]]:
        """The ids of a rendered conversation, and which of them the assistant wrote."""
        borders = [turn.start for turn in turns] + [len(text)]
        # What comes before the first answer ...
        ids = self.encode_rendered(disguise, text[:borders[0]])
        mask = [False] * len(ids)
        # ... and then each answer, with what follows it.
        for turn, end in zip(turns, borders[1:], strict=True):
            piece = self.encode_rendered(disguise, text[turn.start:end])
            answer = self.encode_rendered(disguise, text[turn.start:turn.end])
            written = self.length_of_answer(answer)
            if piece[:written] != answer[:written]:
                # No special token ends the turn: cut the text there, as sampling would.
                piece = answer + self.encode_rendered(disguise, text[turn.end:end])
            ids += piece
            mask += [True] * written + [False] * (len(piece) - written)
        return ids, mask

    def length_of_answer(self, ids: list[int]) -> int:
        """How many of the ids of a turn are the answer and its end: up to the last stop token."""
        places = [place for place, i in enumerate(ids) if i in self.stop_tokens]
        return places[-1] + 1 if places else len(ids)

    def encode_rendered(self, disguise: Disguise, text: str) -> list[int]:
        """The ids of a part of a rendered text: its special tokens are the template's."""
        ids: list[int] = []
        for piece in self.added.split(text, self.special):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            ordinary = encode_text(self.tokenizer, disguise.take_off(piece))
            found = sorted(set(ordinary) & set(self.special.values()))
            if found:
                raise ValueError(
                    f"the tokenizer makes the special tokens {found} out of plain text "
                    f"({disguise.take_off(piece)!r:.60}): a conversation cannot be encoded safely"
                )
            ids += ordinary
        return ids

    def check_tokenizer(self) -> None:
        """ValueError for a tokenizer whose tokens depend on what stands before a text."""
        if isinstance(self.tokenizer, Encoder) or not self.special:
            return
        for token, i in self.special.items():
            theirs = self.tokenizer.encode(f"{token}two words", add_special_tokens=False)
            if list(theirs) != [i, *encode_text(self.tokenizer, "two words")]:
                raise ValueError(
                    f"the {type(self.tokenizer).__name__} encodes a text differently behind the "
                    f"special token {token!r}: a Chat needs one that does not, as byte-level BPE"
                )
            return  # one token tells


class Conversation:
    """The messages of one call, checked and disguised, and their renderings."""

    def __init__(self, chat: Chat, messages: Sequence[Message]):
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"got {messages!r:.60}; expected a list of one message or more")
        self.chat = chat
        self.messages = messages
        self.now = time.time()  # a template may write the date; all renderings write the same
        for i, message in enumerate(messages):
            check_message(i, message, chat.special)
        self.disguise = Disguise(chat.special, [chat.template, *texts_in(messages)])
        self.disguised = [self.changed(message, self.put_on) for message in messages]
        hide = self.disguise.put_on_everything
        self.hidden = [self.changed(message, hide) for message in messages]

    def put_on(self, text: str) -> str:
        """A content in disguise."""
        # Normalising may itself make a special token, and is done to the text in any case.
        return self.disguise.put_on(nfc(text) if self.chat.added.normalize else text)

    def changed(self, message: Message, change: Callable[[str], str]) -> dict[str, Any]:
        """A message with all its texts changed, but for its role. None counts as missing."""
        fields = {name: value for name, value in message.items() if value is not None}
        return with_texts(fields, change) | {"role": message["role"]}

    def render(self, add_generation_prompt: bool) -> str:
        """The text of the conversation, its contents disguised: its special tokens are real.

        Raises ValueError where a content got around the disguise.
        """
        texts = self.rendered(
            [
                (self.disguised, add_generation_prompt),
                (self.hidden, add_generation_prompt),
            ]
        )
        split = self.chat.added.split
        special, of_template = (
            self.chat.special_ids(split(text, self.chat.special)) for text in texts
        )
        if special != of_template:
            raise ValueError(
                f"{self.chat.name} writes special tokens that depend on the text of the messages: "
                f"{self.chat.decode(special)!r:.200}, and {self.chat.decode(of_template)!r:.200} "
                "with other text. One of the messages could be steering the model"
            )
        return texts[0]

    def turns(self, text: str, required: bool) -> list[Turn]:
        """The assistant's turns in the rendered text.

        Message by message: a turn begins where the text of the messages before it ends, with the
        generation prompt. If a template does not write its text like that, there are no turns:
        ValueError if they are required.
        """
        messages = self.disguised
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted: list[tuple[list[dict], bool]] = []
        for i in answers:
            wanted += [(messages[:i], False), (messages[:i], True), (messages[:i + 1], False)]
        try:
            texts = self.rendered(wanted)
            turns = []
            for number, i in enumerate(answers):
                before, prompt, after = texts[3 * number:3 * number + 3]
                # Some templates end a conversation with a line end that they write nowhere else.
                if not text.startswith(after):
                    after = after.rstrip()
                self.check_prefixes(i, before, prompt, after, text)
                turns.append(Turn(len(prompt), len(after)))
        except ValueError:
            if required:
                raise
            return []
        return turns

    def check_prefixes(self, i: int, before: str, prompt: str, after: str, text: str) -> None:
        """ValueError unless the text begins with what was written up to message i, and without it.

        before: the text of the messages before message i. prompt: the same, with the generation
        prompt. after: the text with message i.
        """
        if prompt == before:
            raise ValueError(
                f"{self.chat.name} writes no generation prompt, so it does not tell where the "
                f"answer in message {i} begins"
            )
        if not after.startswith(prompt) or not text.startswith(after):
            raise ValueError(
                f"{self.chat.name} changes what it wrote before when a message is added: the "
                f"conversation was another one when the assistant wrote message {i}. Learn "
                "from conversations that end with that message, each of them a row"
            )

    def rendered(self, wanted: list[tuple[list[dict], bool]]) -> list[str]:
        """The texts of (messages, add_generation_prompt), with errors that name the message."""
        names = token_names_of(self.chat.tokenizer)
        fixed = {"tools": None, "documents": None, **names}
        requests = [
            {"messages": messages, "add_generation_prompt": prompt, **fixed}
            for messages, prompt in wanted
        ]
        try:
            return self.chat.renderer(requests, self.now)
        except TemplateError as error:
            reason = self.disguise.take_off(str(error))
            if error.index is None:
                raise ValueError(f"{self.chat.name} does not work: {reason}") from None
            i = self.message_at_fault(requests[error.index])
            shown = f"{self.messages[i]!r:.100}"
            raise ValueError(f"{self.chat.name} fails at message {i}, {shown}: {reason}") from None

    def message_at_fault(self, request: dict[str, Any]) -> int:
        """The number of the message up to which the conversation cannot be rendered."""
        messages = request["messages"]
        for n in range(1, len(messages)):
            shorter = {**request, "messages": messages[:n], "add_generation_prompt": False}
            try:
                self.chat.renderer([shorter], self.now)
            except TemplateError:
                return n - 1
        return max(0, len(messages) - 1)
