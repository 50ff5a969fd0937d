"""A tiny random Llama and a chat template without files, for the tests of projects/chat.

    python tests/chat_stub.py label.py --labeller=short ...

runs a script of the project on them, in the place of the model that it would load.
"""

import importlib.util
import runpy
import sys
import types
from unittest import mock

from tests.common import ROOT, tiny_gpt

PROJECT = ROOT / "projects" / "chat"
END, USER, ASSISTANT, SYSTEM = range(4)
FIRST_BYTE = 4


class StubChat:
    """Byte by byte, with one special token before each message."""

    stop_tokens = (END,)
    eot_token = END
    vocab_size = FIRST_BYTE + 256
    roles: dict[str, int] = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}  # noqa: RUF012

    def encode(self, messages, add_generation_prompt=False, return_mask=False):
        if isinstance(messages, str):
            return [FIRST_BYTE + byte for byte in messages.encode()]
        ids = []
        mask = []
        for message in messages:
            content = [*self.encode(message["content"]), END]
            ids += [self.roles[message["role"]], *content]
            mask += [0] + [int(message["role"] == "assistant")] * len(content)
        if add_generation_prompt:
            ids.append(ASSISTANT)
            mask.append(0)
        return (ids, mask) if return_mask else ids

    def decode(self, ids):
        data = bytes(i - FIRST_BYTE for i in ids if i >= FIRST_BYTE)
        return data.decode(errors="replace")


def tiny_llama(**options):
    """A Llama of a few thousand parameters, which writes whatever bytes it likes."""
    options = {
        "architecture": "llama",
        "vocab_size": StubChat.vocab_size,
        "block_size": 160,
        "n_kv_head": 1,
        **options,
    }
    return tiny_gpt(**options)


def load(name="tiny", device="auto"):
    """What `ChatModel.load` gives in the tests."""
    from answers import ChatModel

    return ChatModel(name, tiny_llama(), StubChat())


def main(script, *args):
    """Run a script of the project as a person would, on the tiny model."""
    sys.path.insert(0, str(PROJECT))
    import answers

    sys.argv = [script, *args]
    with mock.patch.object(answers.ChatModel, "load", load):
        runpy.run_path(str(PROJECT / script), run_name="__main__")


if importlib.util.find_spec("mingpt.chat") is None:
    sys.modules["mingpt.chat"] = types.SimpleNamespace(Chat=StubChat)

if __name__ == "__main__":
    main(*sys.argv[1:])
