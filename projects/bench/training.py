"""
Benchmarks of training: one step of a GPT against transformers, and our Trainer against a bare loop.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from measure import DEVICE, Case, Limit, Run, autocast, matrix_product_rate
from mingpt.config import CfgNode
from mingpt.trainer import Trainer
from models import SIZES, our_gpt, their_gpt

# {end of the case's name: options of torch.compile}. None: the model is not compiled.
COMPILE_OPTIONS: dict[str, dict | None] = {"": None, ", compiled": {}}
if DEVICE.type == "cuda":
    COMPILE_OPTIONS[", compiled, CUDA graphs"] = {"mode": "reduce-overhead"}


# ----------------------------------------------------------------------------------------------
# one training step


def train(config: CfgNode) -> Iterator[Case]:
    """A training step without dropout, as it is and compiled."""
    sizes = [("gpt2", 4, 128), ("gpt-micro", 64, 32)]
    if DEVICE.type == "cuda":
        sizes = [("gpt2", 16, 1024), ("gpt-micro", 256, 64)]  # enough to keep a card busy
    for suffix, options in COMPILE_OPTIONS.items():
        for preset, B, T in sizes:
            vocab_size, _ = SIZES[preset]
            idx = torch.randint(vocab_size, (B, T + 1), device=DEVICE)
            x = idx[:, :-1].contiguous()
            y = idx[:, 1:].contiguous()
            yield Case(
                work=f"training step, {preset}, {B} x {T} tokens{suffix}",
                unit="tokens",
                amount=B * T,
                ours=partial(our_training_step, preset, options, x, y),
                peer="transformers",
                theirs=partial(their_training_step, preset, options, x),
                limit=Limit("matrix-product rate", partial(most_training_tokens, preset)),
                slow=options is not None or preset == "gpt2",
            )


def our_training_step(preset: str, options: dict | None, x: Tensor, y: Tensor) -> Run:
    model = our_gpt(preset).to(DEVICE)
    forward = maybe_compile(model, options)
    return training_step(model, lambda: forward(x, y)[1], warmup_steps(options))


def their_training_step(preset: str, options: dict | None, x: Tensor) -> Run:
    model = their_gpt(preset).to(DEVICE)
    forward = maybe_compile(model, options)
    # transformers shifts the labels itself.
    return training_step(
        model,
        lambda: forward(x, labels=x, use_cache=False).loss,
        warmup_steps(options),
    )


def maybe_compile(model: torch.nn.Module, options: dict | None) -> Callable:
    return model if options is None else torch.compile(model, **options)


def warmup_steps(options: dict | None) -> int:
    """CUDA graphs need three steps before they are timed: compile, record, replay once."""
    return 3 if options else 0


def training_step(
    model: torch.nn.Module,
    compute_loss: Callable[[], Tensor],
    warmup: int = 0,
    clip: float = math.inf,
) -> Run:
    """Forward, backward, clipping and AdamW, as in a bare loop. `warmup` steps run right away."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = compute_loss()
        loss.backward()
        if clip < math.inf:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    for _ in range(warmup):
        step()
    return step


def most_training_tokens(preset: str) -> float:
    """Tokens per second if a step were matrix products only.

    Each weight costs 6 FLOP per token: 2 forward and 4 backward (Kaplan et al. 2020, section 2.1).
    Position embeddings are not counted: they are in no product.
    """
    model = our_gpt(preset)
    weights = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        # The tokens' embedding is tied to the head, and so it is in a product.
        if isinstance(layer, torch.nn.Embedding) and layer is not model.transformer.embedding:
            weights -= layer.weight.numel()
    return matrix_product_rate() / (6 * weights)


# ----------------------------------------------------------------------------------------------
# the Trainer's loop

ITERATIONS = 20  # in one timed run
BATCH_SIZE = 64


def loop(config: CfgNode) -> Iterator[Case]:
    """Iterations of the Trainer, against a bare loop over batches that were made before."""
    x, y = torch.randint(128, (2, 20 * BATCH_SIZE, 32))
    yield Case(
        work=f"the Trainer's loop, gpt-micro, {BATCH_SIZE} x 32 tokens",
        unit="iterations",
        amount=ITERATIONS,
        ours=partial(trainer_loop, x, y),
        peer="bare loop",
        theirs=partial(bare_loop, x, y),
    )


def trainer_loop(x: Tensor, y: Tensor) -> Run:
    config = Trainer.get_default_config()
    config.merge_from_dict(
        {
            "device": str(DEVICE),
            "batch_size": BATCH_SIZE,
            "learning_rate": 1e-4,
            "max_iters": 1,
        }
    )
    trainer = Trainer(config, our_gpt("gpt-micro"), TensorDataset(x, y))

    def run() -> None:
        config.max_iters = trainer.iter_num + ITERATIONS
        trainer.run()

    return run


def bare_loop(x: Tensor, y: Tensor) -> Run:
    model = our_gpt("gpt-micro").to(DEVICE)
    batches = zip(x.to(DEVICE).split(BATCH_SIZE), y.to(DEVICE).split(BATCH_SIZE), strict=True)
    endless_batches = itertools.cycle(batches)
    step = training_step(model, lambda: model(*next(endless_batches))[1], clip=1.0)

    def run() -> None:
        for _ in range(ITERATIONS):
            step()

    return run
