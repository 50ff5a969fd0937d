"""
Benchmarks of the GPT and the Trainer, against transformers and a bare loop.
"""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from measure import DEVICE, DTYPE, Case, Run, autocast, clock, matrix_product_rate, memory_bandwidth
from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.config import CfgNode as CN
from mingpt.utils import import_extra

SIZES = {"gpt2": (50257, 1024), "gpt-micro": (128, 64), "gpt-mini": (128, 64)}  # vocab_size and block_size


def our_gpt(preset: str) -> GPT:
    """Random weights, no dropout."""
    vocab_size, block_size = SIZES[preset]
    config = GPT.get_default_config()
    config.merge_from_dict({"model_type": preset, "vocab_size": vocab_size, "block_size": block_size,
                            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0})
    return GPT(config)


def their_config(preset: str, **options):
    """The same model, as transformers describes it."""
    transformers, C = import_extra("transformers", "bench"), our_gpt(preset).config
    return transformers.GPT2Config(n_layer=C.n_layer, n_head=C.n_head, n_embd=C.n_embd, vocab_size=C.vocab_size, n_positions=C.block_size,
                                   embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
                                   **{"pad_token_id": 0, **options})


def their_gpt(preset: str, **options):
    config = their_config(preset, **options)
    return import_extra("transformers", "bench").GPT2LMHeadModel(config)


# ---------------------------------------------------------------------------------------------------------------------


def training_step(model: torch.nn.Module, loss: Callable, clip: float = math.inf, warmup: int = 0) -> Run:
    """Forward, backward, clip and a step of fused AdamW, as a bare loop has them; so many steps are taken before."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run():
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            value = loss()
        value.backward()
        if clip < math.inf:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    for _ in range(warmup):
        run()
    return run


# what torch.compile is told; "reduce-overhead" records CUDA graphs
COMPILED = {"": None, ", compiled": {}, **({", compiled, CUDA graphs": {"mode": "reduce-overhead"}} if DEVICE.type == "cuda" else {})}


def train(C: CN) -> Iterator[Case]:
    """A training step, without dropout, and what torch.compile makes of it on both sides; a card is given sizes that keep it busy."""
    sizes = (("gpt2", 16, 1024), ("gpt-micro", 256, 64)) if DEVICE.type == "cuda" else (("gpt2", 4, 128), ("gpt-micro", 64, 32))
    for how, options in COMPILED.items():
        for preset, B, T in sizes:
            idx = torch.randint(SIZES[preset][0], (B, T + 1), device=DEVICE)
            x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()

            def ours(preset=preset, options=options, x=x, y=y):
                model = our_gpt(preset).to(DEVICE)
                forward = model if options is None else torch.compile(model, **options)
                return training_step(model, lambda: forward(x, y)[1], warmup=3 * bool(options))  # CUDA graphs: recorded, and replayed once

            def theirs(preset=preset, options=options, x=x):
                model = their_gpt(preset).to(DEVICE)
                forward = model if options is None else torch.compile(model, **options)
                return training_step(model, lambda: forward(x, labels=x, use_cache=False).loss, warmup=3 * bool(options))

            def most(preset=preset):  # Kaplan et al. 2020, section 2.1: 6 FLOP per weight and token, positions aside
                model = our_gpt(preset)
                return matrix_product_rate() / (6 * sum(p.numel() for p in model.parameters()) - 6 * model.transformer.wpe.weight.numel())

            yield Case(f"training step, {preset}, {B} x {T} tokens{how}", "tokens", B * T, ours, "transformers", theirs,
                       ("matrix-product rate", most), slow=bool(how) or preset == "gpt2")


def loop(C: CN) -> Iterator[Case]:
    """Iterations of the Trainer, everything around the step included, against the bare loop on batches made before."""
    data = TensorDataset(*torch.randint(128, (2, 1280, 32)))

    def ours():
        config = Trainer.get_default_config()
        config.merge_from_dict({"device": str(DEVICE), "learning_rate": 1e-4, "max_iters": 1})
        trainer = Trainer(config, our_gpt("gpt-micro"), data)

        def run():
            config.max_iters = trainer.iter_num + 20
            trainer.run()
        return run

    def bare():
        model = our_gpt("gpt-micro").to(DEVICE)
        batches = itertools.cycle([[x.to(DEVICE) for x in data[i:i + 64]] for i in range(0, 1280, 64)])
        step = training_step(model, lambda: model(*next(batches))[1], clip=1.0)
        return lambda: [step() for _ in range(20)]

    yield Case("the Trainer's loop, gpt-micro, 64 x 32 tokens", "iterations", 20, ours, "bare loop", bare)


# ---------------------------------------------------------------------------------------------------------------------


def saved(C: CN, preset: str) -> Path:
    """A folder with random weights for both sides to load, written once."""
    folder = Path(C.work_dir) / f"{preset}-random"
    if not (folder / "config.json").exists():
        our_gpt(preset).save_pretrained(folder)
    return folder


def loaders(C: CN, preset: str) -> tuple[Callable, Callable]:
    """What prepares load() -> model on both sides, from the same file."""
    folder = saved(C, preset)

    def theirs():
        model = import_extra("transformers", "bench").GPT2LMHeadModel
        return lambda: model.from_pretrained(folder)
    return lambda: lambda: GPT.from_pretrained(folder), theirs


def greedy(C: CN, preset: str) -> tuple[Callable, Callable]:
    """What prepares generate(idx, n) of both sides, from weights that were loaded, as those of GPT-2 are."""
    our_loader, their_loader = loaders(C, preset)

    def ours():
        return our_loader()().to(DEVICE, DTYPE).generate

    def theirs():
        model = their_loader()().to(DEVICE, DTYPE).eval()
        model.generation_config.update(bos_token_id=None, eos_token_id=None, pad_token_id=0)  # nothing ends it early
        return lambda idx, n: model.generate(idx, max_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(idx))
    return ours, theirs


def decode(C: CN) -> Iterator[Case]:
    """Greedy generation with a KV cache, the prompt's forward pass included; then what a token costs in longer contexts."""
    for preset, B, prompt, new in (("gpt2", 1, 64, 64), ("gpt2", 8, 64, 64), ("gpt2", 32, 64, 64), ("gpt-micro", 128, 1, 32)):
        idx = torch.randint(SIZES[preset][0], (B, prompt), device=DEVICE)
        ours, theirs = ((lambda side=side, idx=idx, new=new: (lambda generate: lambda: generate(idx, new))(side())) for side in greedy(C, preset))
        most = lambda B=B: B * memory_bandwidth() / (DTYPE.itemsize * sum(p.numel() for p in our_gpt("gpt2").parameters()))
        yield Case(f"decoding, {preset}, batch {B}, {prompt} + {new} tokens", "tokens", B * new, ours, "transformers", theirs,
                   ("memory bandwidth", most) if preset == "gpt2" else None, slow=B in (8, 32))
    for context in (64, 256, 1000):
        ours, theirs = (lambda side=side, context=context: next_tokens(side(), context) for side in greedy(C, "gpt2"))
        yield Case(f"decoding, gpt2, batch 1, the 20 tokens behind {context}", "tokens", 20, ours, "transformers", theirs, slow=True)


def next_tokens(generate: Callable, context: int) -> Run:
    """Twenty tokens behind a context, whose own forward pass is subtracted."""
    idx = torch.randint(50257, (1, context), device=DEVICE)
    return lambda: {"": clock(lambda: generate(idx, 21))[""] - clock(lambda: generate(idx, 1))[""]}


# ---------------------------------------------------------------------------------------------------------------------


def load(C: CN) -> Iterator[Case]:
    """From a safetensors file to a first token on the CPU (both sides map the file: its pages come when they are used), and imports."""
    def first_token(prepare: Callable) -> Run:
        load, idx = prepare(), torch.ones(1, 1, dtype=torch.long)
        return lambda: load()(idx)

    ours, theirs = (partial(first_token, side) for side in loaders(C, "gpt2"))
    yield Case("gpt2 from its file to a first token", "loads", 1, ours, "transformers", theirs)
    start = lambda modules: lambda: lambda: subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
    yield Case("importing mingpt: model, trainer, bpe, rlhf", "imports", 1, start("mingpt.model, mingpt.trainer, mingpt.bpe, mingpt.rlhf"),
               "torch alone", start("torch"))
