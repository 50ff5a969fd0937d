"""
Benchmarks of decoding and of loading a GPT, against transformers; and of importing this library.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from measure import DEVICE, DTYPE, Case, Limit, Run, clock, memory_bandwidth
from mingpt import gguf
from mingpt.config import CfgNode
from mingpt.model import GPT
from mingpt.utils import import_extra
from models import SIZES, SMOLLM2, our_gpt, our_smollm2

# generate(idx, max_new_tokens) -> the prompt and its greedy continuation
Generate = Callable[[Tensor, int], Tensor]

VOCABULARIES = {name: vocab_size for name, (vocab_size, _) in SIZES.items()}
VOCABULARIES["smollm2"] = SMOLLM2["vocab_size"]


def saved_model(config: CfgNode, preset: str) -> Path:
    """A folder with random weights that both sides load. It is written once."""
    folder = Path(config.work_dir) / f"{preset}-random"
    if not (folder / "config.json").exists():
        our_model(preset).save_pretrained(folder)
    return folder


def our_model(preset: str) -> GPT:
    return our_smollm2() if preset == "smollm2" else our_gpt(preset)


# ----------------------------------------------------------------------------------------------
# decoding


def decode(config: CfgNode) -> Iterator[Case]:
    """Greedy generation with a KV cache; then the cost of a token in longer contexts.

    Both sides load the same file, because the layout of loaded weights in memory affects the speed.
    """
    sizes = [
        # preset, B, prompt_length, new_tokens
        ("gpt2", 1, 64, 64),
        ("gpt2", 8, 64, 64),
        ("gpt2", 32, 64, 64),
        ("smollm2", 1, 64, 64),
        ("smollm2", 16, 64, 64),
        ("gpt-micro", 128, 1, 32),
    ]
    for preset, B, prompt_length, new_tokens in sizes:
        folder = saved_model(config, preset)
        idx = torch.randint(VOCABULARIES[preset], (B, prompt_length), device=DEVICE)
        limit = None
        if preset != "gpt-micro":  # whose weights stay in the processor's cache
            limit = Limit("memory bandwidth", partial(most_decoded_tokens, preset, B))
        yield Case(
            work=f"decoding, {preset}, batch {B}, {prompt_length} + {new_tokens} tokens",
            unit="tokens",
            amount=B * new_tokens,
            ours=partial(continue_prompt, our_generate, folder, idx, new_tokens),
            peer="transformers",
            theirs=partial(continue_prompt, their_generate, folder, idx, new_tokens),
            limit=limit,
            slow=B in (8, 16, 32),
        )

    folder = saved_model(config, "gpt2")
    for context_length in (64, 256, 1000):
        yield Case(
            work=f"decoding, gpt2, batch 1, the 20 tokens behind {context_length}",
            unit="tokens",
            amount=20,
            ours=partial(next_20_tokens, our_generate, folder, context_length),
            peer="transformers",
            theirs=partial(next_20_tokens, their_generate, folder, context_length),
            slow=True,
        )


def our_generate(folder: Path) -> Generate:
    return GPT.from_pretrained(folder).to(DEVICE, DTYPE).generate


def their_generate(folder: Path) -> Generate:
    transformers = import_extra("transformers", "bench")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).to(DEVICE, DTYPE).eval()
    # Without an end-of-text token no row ends early.
    model.generation_config.update(bos_token_id=None, eos_token_id=None, pad_token_id=0)

    def generate(idx: Tensor, max_new_tokens: int) -> Tensor:
        return model.generate(
            idx,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            attention_mask=torch.ones_like(idx),
        )

    return generate


def continue_prompt(
    load_generate: Callable[[Path], Generate],
    folder: Path,
    idx: Tensor,
    new_tokens: int,
) -> Run:
    """Generate from a prompt; the forward pass of the prompt is timed, too."""
    generate = load_generate(folder)
    return lambda: generate(idx, new_tokens)


def next_20_tokens(
    load_generate: Callable[[Path], Generate],
    folder: Path,
    context_length: int,
) -> Run:
    """Generate 20 tokens behind a context, without the time of the context's own forward pass."""
    generate = load_generate(folder)
    idx = torch.randint(VOCABULARIES["gpt2"], (1, context_length), device=DEVICE)

    def run() -> dict[str, float]:
        # The first token comes out of the context's forward pass: 21 tokens less 1 are 20.
        with_context = clock(lambda: generate(idx, 21))[""]
        context_alone = clock(lambda: generate(idx, 1))[""]
        return {"": with_context - context_alone}

    return run


def most_decoded_tokens(preset: str, B: int) -> float:
    """Tokens per second if a step, which gives B tokens, only had to read all weights once."""
    weights = sum(p.numel() for p in our_model(preset).parameters())
    return B * memory_bandwidth() / (DTYPE.itemsize * weights)


# ----------------------------------------------------------------------------------------------
# loading


def load(config: CfgNode) -> Iterator[Case]:
    """From a file to a first token on the CPU; and imports.

    Both sides map safetensors, so their bytes are read when they are used: hence the first token.
    """
    folder = saved_model(config, "gpt2")
    yield Case(
        work="gpt2 from its file to a first token",
        unit="loads",
        amount=1,
        ours=partial(our_first_token, folder),
        peer="transformers",
        theirs=partial(their_first_token, folder),
    )
    yield Case(
        work="smollm2 from its file to a first token, imports included",
        unit="loads",
        amount=1,
        ours=our_smollm2_anew,
        peer="transformers",
        theirs=their_smollm2_anew,
    )
    yield Case(
        work="importing mingpt: model, trainer, bpe, rlhf",
        unit="imports",
        amount=1,
        ours=partial(import_anew, "mingpt.model, mingpt.trainer, mingpt.bpe, mingpt.rlhf"),
        peer="torch alone",
        theirs=partial(import_anew, "torch"),
    )


def our_first_token(folder: Path) -> Run:
    idx = torch.ones(1, 1, dtype=torch.long)
    return lambda: GPT.from_pretrained(folder)(idx)


def their_first_token(folder: Path) -> Run:
    model_class = import_extra("transformers", "bench").GPT2LMHeadModel
    idx = torch.ones(1, 1, dtype=torch.long)
    return lambda: model_class.from_pretrained(folder)(idx)


OUR_SMOLLM2 = """
import torch
from mingpt.model import GPT

GPT.from_pretrained("smollm2")(torch.ones(1, 1, dtype=torch.long))
"""

THEIR_SMOLLM2 = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={file!r})
model(torch.ones(1, 1, dtype=torch.long))
"""


def our_smollm2_anew() -> Run:
    gguf.smollm2()  # fetch it, if need be
    return partial(run_anew, OUR_SMOLLM2)


def their_smollm2_anew() -> Run:
    import_extra("transformers", "bench")
    path = gguf.smollm2()
    return partial(run_anew, THEIR_SMOLLM2.format(folder=str(path.parent), file=path.name))


def import_anew(modules: str) -> Run:
    return partial(run_anew, f"import {modules}")


def run_anew(code: str) -> None:
    """Run code in a Python process of its own."""
    subprocess.run([sys.executable, "-c", code], check=True)
