"""
Talk to a chat model in the terminal.

    python projects/chat/talk.py                                    smollm2, on this computer
    python projects/chat/talk.py --model=out/chat/rl/model          what teach.py has taught
    echo "What is the capital of France?" | python projects/chat/talk.py

The answer appears as the model writes it. Ctrl-C stops an answer, Ctrl-D ends. Through a pipe, each
line is a turn, and only the answers are printed. Commands:

    /reset          forget the conversation
    /system TEXT    a system prompt, from now on; without TEXT: none
    /retry          another answer to the last question
    /save FILE      add the conversation to a file of JSON lines, which teach.py --sft=FILE reads
    /help           these lines
"""

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from answers import ChatModel
from mingpt.checkpoint import run_script
from mingpt.config import CfgNode, check_booleans, check_numbers, documented, parse_args
from mingpt.run_folder import append_rows
from mingpt.utils import log_to_console

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of the first half of a character


@documented
def get_config() -> CfgNode:
    """Every option and its default."""
    C = CfgNode()
    C.model = "smollm2"              # or a hub name, a folder, a .gguf file, an adapter of teach.py
    C.system = ""                    # a system prompt; empty: the one of the model's template
    C.request = ""                   # stands behind each question, as in label.py
    C.temperature = 0.7              # 0: always the most likely token
    C.top_p = 0.95                   # leave out unlikely tokens; None: none
    C.max_new_tokens = 256           # longer answers are cut off
    C.seed = 3407                    # of the answers
    C.device = "auto"
    C.save = "out/chat/conversations.jsonl"  # the file of /save without a name
    C.speed = False                  # say after each answer how fast it was written
    return C


def check_config(config: CfgNode) -> None:
    """ValueError for options that cannot be, before a model is loaded."""
    check_numbers(config, "temperature")
    check_numbers(config, "top_p", low=1e-9, high=1, optional=True)
    check_numbers(config, "max_new_tokens", low=1, whole=True)
    check_numbers(config, "seed", whole=True)
    check_booleans(config, "speed")


# --------------------------------------------------------------------------------------------------
# The conversation


class Conversation:
    """What has been said, and the model that answers."""

    def __init__(self, config: CfgNode, model: ChatModel):
        self.config = config
        self.chat = model.chat
        self.model = model.model
        self.device = next(self.model.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.system = config.system
        self.messages: list[dict] = []
        self.forgotten = 0  # so many of the oldest messages do not fit any more

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = []
        self.forgotten = 0

    def ask(self, question: str) -> None:
        """Add a question."""
        if self.config.request:
            question = f"{question} {self.config.request}"
        self.messages.append({"role": "user", "content": question})

    def take_back_answer(self) -> bool:
        """Remove the last answer, so that it can be written again; whether there was one."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return bool(self.messages)

    def visible(self) -> list[dict]:
        """The messages that the model reads."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages[self.forgotten :]

    def make_room(self) -> tuple[list[int], int]:
        """(the ids that the model reads, how many more of the oldest messages had to go).

        ValueError if the last question alone is too long. It is removed.
        """
        before = self.forgotten
        room = self.model.config.block_size - self.config.max_new_tokens
        while True:
            ids = self.chat.encode(self.visible(), add_generation_prompt=True)
            if len(ids) <= room:
                return ids, self.forgotten - before
            if self.forgotten >= len(self.messages) - 1:
                self.messages.pop()
                self.forgotten = before
                raise ValueError(
                    f"this has {len(ids)} tokens, and there is room for {max(room, 0)} beside an "
                    f"answer of {self.config.max_new_tokens}: ask something shorter, or give a "
                    "smaller --max_new_tokens"
                )
            # A question and its answer go together.
            self.forgotten = min(self.forgotten + 2, len(self.messages) - 1)

    def answer(self, ids: list[int]) -> Iterator[str]:
        """Pieces of the answer to these ids, as they are written. Then it is in `messages`.

        If the caller stops in between, what has been written is in `messages`.
        """
        config = self.config
        columns = self.model.stream(
            torch.tensor([ids], device=self.device),
            config.max_new_tokens,
            temperature=config.temperature,
            do_sample=True,
            top_p=config.top_p,
            stop_token=list(self.chat.stop_tokens),
            generator=self.generator,
        )
        written: list[int] = []
        shown = ""
        self.n_tokens = 0
        self.ended = False
        try:
            for column in columns:
                self.n_tokens += 1
                token = int(column)
                if token in self.chat.stop_tokens:
                    self.ended = True
                    break
                written.append(token)
                # The characters that are complete. The next token may bring the other half of one.
                text = self.chat.decode(written).rstrip(UNFINISHED)
                yield text[len(shown) :]
                shown = text
            yield self.chat.decode(written)[len(shown) :]
        finally:
            message = {"role": "assistant", "content": self.chat.decode(written).strip()}
            self.messages.append(message)


# --------------------------------------------------------------------------------------------------
# The terminal


class Terminal:
    """Reads what a person types, carries out commands, and shows the answers."""

    def __init__(self, config: CfgNode, conversation: Conversation):
        self.config = config
        self.conversation = conversation
        self.interactive = sys.stdin.isatty()

    def run(self) -> None:
        """Until Ctrl-D, or the end of the pipe."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() its editing keys and its history)
            self.say(f"{self.config.model}: /help shows the commands, Ctrl-D ends")
        while True:
            try:
                line = self.read_line()
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.say("\n(Ctrl-D ends)")
                continue
            if line is None:
                return
            line = line.strip()
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.conversation.ask(line)
                self.show_answer()

    def read_line(self) -> str | None:
        """What the person says next; None at the end."""
        if not self.interactive:
            return sys.stdin.readline() or None
        try:
            return input("> ")
        except EOFError:
            self.say("")
            return None

    def say(self, message: str) -> None:
        """Something that is not the model's. It goes to stderr, so that a pipe gets the answers."""
        print(message, file=sys.stderr, flush=True)

    def show_answer(self) -> None:
        """Print the answer to the last question as it is written."""
        conversation = self.conversation
        try:
            ids, n_forgotten = conversation.make_room()
        except ValueError as error:
            self.say(f"error: {error}")
            return
        if n_forgotten:
            self.say(
                f"(this is longer than the model's {conversation.model.config.block_size} tokens: "
                f"it has forgotten the oldest {conversation.forgotten} messages)"
            )
        started = time.perf_counter()
        pieces = conversation.answer(ids)
        try:
            for piece in pieces:
                sys.stdout.write(printable(piece))
                sys.stdout.flush()
        except KeyboardInterrupt:
            pieces.close()
            print(" ...", flush=True)
            return
        print(flush=True)
        if not conversation.ended:
            self.say(f"(cut off after --max_new_tokens={self.config.max_new_tokens})")
        if self.config.speed:
            seconds = time.perf_counter() - started
            n = conversation.n_tokens
            self.say(f"({n} tokens in {seconds:.2f} s: {n / seconds:.1f} tokens/s)")

    # -- commands ----------------------------------------------------------------------------------

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        commands = {"/reset": self.reset, "/system": self.system, "/retry": self.retry,
                    "/save": self.save, "/help": self.help}
        if name not in commands:
            self.say(f"error: there is no command {name}: choose from {', '.join(commands)}")
            return
        commands[name](argument)

    def reset(self, argument: str) -> None:
        self.conversation.reset()
        self.say("(forgotten)")

    def system(self, argument: str) -> None:
        self.conversation.system = argument
        self.say(f"(the system prompt is now {argument!r})" if argument else "(no system prompt)")

    def retry(self, argument: str) -> None:
        if self.conversation.take_back_answer():
            self.show_answer()
        else:
            self.say("error: nothing has been asked yet")

    def save(self, argument: str) -> None:
        messages = self.conversation.messages
        if not messages:
            self.say("error: nothing has been said yet")
            return
        if self.conversation.system:
            messages = [{"role": "system", "content": self.conversation.system}, *messages]
        path = Path(argument or self.config.save)
        try:
            append_rows(path, [{"messages": messages}])
        except OSError as error:
            self.say(f"error: {path} cannot be written: {error}")
            return
        self.say(f"(saved in {path})")

    def help(self, argument: str) -> None:
        assert __doc__ is not None
        self.say(__doc__[__doc__.index("    /reset") :].rstrip())


def printable(text: str) -> str:
    """The text without what a terminal obeys: a model might write an escape sequence."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", UNFINISHED, text)


def main(args: list[str]) -> None:
    config = get_config()
    parse_args(config, args, __doc__)
    check_config(config)
    log_to_console()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a pipe may bring what is no text
    Terminal(config, Conversation(config, ChatModel.load(config.model, config.device))).run()


if __name__ == "__main__":
    run_script(main)
