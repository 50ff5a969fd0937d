"""
The model that answers: how it is loaded, how it is asked, and how its answers are sampled.

Labels, PPO and the comparison at the end all ask in the same way, with the options of
`get_ask_config`: the same request for a short answer, and the same temperature. Otherwise a model
would be taught on answers to one kind of question, and be judged on answers to another.
"""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mingpt import evaluation, lora
from mingpt.bpe import BPETokenizer
from mingpt.chat import Chat
from mingpt.checkpoint import read_json, to_json, write_text
from mingpt.config import CfgNode, check_numbers, documented
from mingpt.datasets import read_text
from mingpt.evaluation import Samples
from mingpt.model import GPT
from mingpt.utils import pick_device
from store import Answer, Pair

PROMPTS = Path(__file__).with_name("prompts.txt")
FACTS = Path(__file__).with_name("facts.txt")  # asked beside PROMPTS when a model is taught
FRESH = Path(__file__).with_name("fresh.txt")  # nothing is trained on these
TRIES = 4  # to sample two answers that differ
BATCH = 32  # answers that are sampled, scored or read at once
BASE = "base.json"  # beside an adapter: the name and the hash of its base

# GPT-2 has never seen a conversation. With --sft it learns one from this form.
PLAIN_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize + ': ' + message.content }}"
    "{{ '<|endoftext|>' if message.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@documented
def get_ask_config() -> CfgNode:
    """How the model is asked."""
    C = CfgNode()
    C.system = ""                    # a system prompt; empty: the one of the model's template
    C.request = "Answer in one short sentence."  # stands behind each question
    C.temperature = 0.7              # of the samples
    C.max_new_tokens = 48            # longer answers are cut off
    return C


def check_ask(ask: CfgNode) -> None:
    """ValueError for options that cannot be."""
    # At temperature 0 both answers would be the same.
    check_numbers(ask, "temperature", low=1e-6)
    check_numbers(ask, "max_new_tokens", low=1, whole=True)


def messages_for(ask: CfgNode, prompt: str) -> list[dict]:
    """The conversation whose next turn is the model's answer to this prompt."""
    question = f"{prompt} {ask.request}" if ask.request else prompt
    messages = [{"role": "user", "content": question}]
    if ask.system:
        messages.insert(0, {"role": "system", "content": ask.system})
    return messages


# --------------------------------------------------------------------------------------------------
# The model


class ChatModel:
    """A chat model, with its template and tokenizer.

    name: `smollm2`, a name on the hub, a folder, a .gguf file, or an adapter that teach.py wrote.
    """

    def __init__(self, name: str, model: Any, chat: Any):
        self.name = name
        self.model = model
        self.chat = chat
        self.hash = hash_of(model)

    @classmethod
    def load(cls, name: str, device: str = "auto") -> "ChatModel":
        """The model of this name, on the device, in evaluation mode.

        ValueError for an adapter whose base is another model by now.
        """
        model = GPT.from_pretrained(name).to(pick_device(device)).eval()
        base = base_of(name)
        if base is not None and base["sha256"] != hash_of(model, with_adapter=False):
            raise ValueError(
                f"{name} is an adapter of another {base['name']}: its base had the SHA-256 "
                f"{base['sha256'][:16]}..., which this one has not: get that base again, or teach "
                "this one"
            )
        return cls(name, model, load_chat(name))

    def encode(self, ask: CfgNode, prompt: str) -> list[int]:
        """The ids that the model answers to. ValueError if no room is left for an answer."""
        ids = self.chat.encode(messages_for(ask, prompt), add_generation_prompt=True)
        room = self.model.config.block_size - len(ids)
        if room < ask.max_new_tokens:
            raise ValueError(
                f"the prompt {prompt[:40]!r} has {len(ids)} tokens, which leaves {room} for the "
                f"answer; --ask.max_new_tokens={ask.max_new_tokens}: shorten it"
            )
        return ids

    def check_prompts(self, ask: CfgNode, prompts: Sequence[str]) -> None:
        """ValueError for the first prompt that leaves no room for an answer."""
        for prompt in prompts:
            self.encode(ask, prompt)

    def sample(
        self, ask: CfgNode, prompts: Sequence[str], n: int, seed: int, batch_size: int = BATCH
    ) -> Samples:
        """n answers to each prompt; those to one prompt are adjacent. The same for a seed."""
        return evaluation.sample(
            self.model,
            [self.encode(ask, prompt) for prompt in prompts],
            n,
            tokenizer=self.chat,
            max_new_tokens=ask.max_new_tokens,
            temperature=ask.temperature,
            stop_token=list(self.chat.stop_tokens),
            seed=seed,
            batch_size=batch_size,
        )

    def answers(
        self, ask: CfgNode, prompts: Sequence[str], n: int, seed: int
    ) -> list[list[Answer]]:
        """The same as `Answer`s: for each prompt, n of them."""
        samples = self.sample(ask, prompts, n, seed)
        answers = [as_answer(samples, row, self.hash) for row in range(len(samples.texts))]
        return [answers[first : first + n] for first in range(0, len(answers), n)]


def as_answer(samples: Samples, row: int, model_hash: str) -> Answer:
    """One of the samples."""
    ids = samples.idx[row, samples.completion_mask[row]].tolist()
    text = samples.texts[row].strip()
    return Answer(text=text, ids=ids, ended=bool(samples.ended[row]), model=model_hash)


def base_of(name: str) -> dict[str, str] | None:
    """{"name": ..., "sha256": ...} of the base of an adapter of ours; None for another model."""
    file = Path(name) / BASE
    return read_json(file) if file.exists() else None


def save_adapter(model: Any, chat: Any, base: dict[str, str], folder: Path) -> None:
    """Save the adapter of a model, its template, and what its base is: {"name", "sha256"}."""
    lora.save_pretrained(model, folder, base["name"])
    chat.save_pretrained(folder)
    write_text(folder / BASE, to_json(base, indent=2) + "\n")


def load_chat(name: str) -> Any:
    """The model's own template; for a GPT-2, which has none, a plain one."""
    if name in PLAIN_MODELS:
        return Chat(BPETokenizer(), PLAIN_TEMPLATE)
    return Chat.from_pretrained(name)


def hash_of(model: torch.nn.Module, with_adapter: bool = True) -> str:
    """SHA-256 of a model's weights, by their names: it says which model wrote an answer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not with_adapter and ".adapters." in name:
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Prompts and pairs


def read_prompts(path: str) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; those of this project if path is empty.

    Blank lines, and lines that begin with #, are left out. ValueError if there are none.
    """
    lines = [line.strip() for line in read_text(path or PROMPTS).split("\n")]
    prompts = [line for line in lines if line and not line.startswith("#")]
    prompts = list(dict.fromkeys(prompts))  # each once
    if not prompts:
        raise ValueError(f"--prompts={path} holds no prompts: write one a line")
    return prompts


def prompt_number(prompts: list[str], i: int, seed: int) -> str:
    """The prompt of pair number i: all of them once, in random order, and then all again."""
    turn, place = divmod(i, len(prompts))
    order = list(range(len(prompts)))
    random.Random(f"prompts {seed} {turn}").shuffle(order)
    return prompts[order[place]]


def sample_pair(
    model: ChatModel, ask: CfgNode, prompt: str, seed: int, typed: str | None = None
) -> Pair:
    """Two answers of the model to a prompt. They differ, if a few tries are enough for that."""
    for i in range(TRIES):
        [answers] = model.answers(ask, [prompt], 2, seed + i)
        if i == 0:
            left = answers[0]
        different = [answer for answer in answers if answer.text != left.text]
        if different:
            break
    right = different[0] if different else answers[1]
    return Pair(
        prompt=prompt,
        messages=messages_for(ask, prompt),
        left=left,
        right=right,
        sampling={**ask.to_dict(), "model": model.name, "seed": seed},
        typed=typed,
    )
