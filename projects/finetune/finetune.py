"""
Fine-tune GPT-2, of any size, on a text of your own.

    python projects/finetune/finetune.py --data.path=book.txt                       gpt2, 124M parameters
    python projects/finetune/finetune.py --data.path=book.txt --model.name=FOLDER   weights of your own, or gpt2-medium, ...

The weights with the best validation loss go to out/finetune/model, as `transformers` reads them, and samples from before and after
to out/finetune/samples.md; running again resumes. In the text, <|endoftext|> marks where one document ends and the next begins.
"""

import json
import logging
import time
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from mingpt.bpe import END_OF_TEXT, BPETokenizer
from mingpt.checkpoint import run_script, write_text
from mingpt.model import GPT
from mingpt.run_folder import RunFolder
from mingpt.trainer import FREE_TO_CHANGE, Trainer
from mingpt.config import CfgNode as CN, check_numbers, parse_args
from mingpt.utils import log_to_console, set_seed

logger = logging.getLogger("mingpt.finetune")


def get_config() -> CN:
    """Every option and its default."""
    C = CN()
    C.system = CN()
    C.system.seed = 3407
    C.system.work_dir = "out/finetune"

    C.data = CN()
    C.data.path = ""                 # a UTF-8 text file
    C.data.block_size = 256          # tokens in a training window

    C.model = CN()
    C.model.name = "gpt2"            # or gpt2-medium, gpt2-large, gpt2-xl, a hub name, a folder, a file
    C.model.tokenizer = ""           # a folder with vocab.json and merges.txt, or gpt2; empty: from beside the weights, else gpt2
    C.model.dropout = 0.1

    C.trainer = Trainer.get_default_config()
    C.trainer.max_iters = 100
    C.trainer.batch_size = 8
    C.trainer.micro_batch_size = 2   # windows at a time: with gpt2, 4 GB of memory are enough
    C.trainer.learning_rate = 5e-5
    C.trainer.lr_schedule = "linear"
    C.trainer.warmup_iters = 10
    C.trainer.eval_every = 25
    C.trainer.checkpoint_every = 25
    del C.trainer.work_dir           # it is system.work_dir

    C.samples = CN()
    C.samples.prompt = "\n"
    C.samples.number = 3
    C.samples.length = 100           # tokens
    return C


def load_tokenizer(C: CN, vocab_size: int) -> BPETokenizer:
    """The tokenizer that is named, or is beside the weights, or GPT-2's; ValueError where it can't be the model's."""
    name, weights = C.model.tokenizer, Path(C.model.name)
    if not name and weights.exists():
        folder = weights if weights.is_dir() else weights.parent
        name = folder if any((folder / file).exists() for file in ("vocab.json", "encoder.json")) else "gpt2"
    if not name and "/" in C.model.name:
        raise ValueError(f"which vocabulary has {C.model.name}? --model.tokenizer=gpt2, or a folder with its vocab.json and merges.txt")
    tokenizer = BPETokenizer() if name in ("", "gpt2") else BPETokenizer.from_pretrained(name)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the model {C.model.name} has {vocab_size} tokens, the tokenizer {tokenizer.vocab_size}: with "
                         "--model.tokenizer=FOLDER name the vocab.json and merges.txt that it was trained with")
    return tokenizer


def load_windows(C: CN, tokenizer: BPETokenizer) -> tuple[TensorDataset, TensorDataset]:
    """(x, y) of block_size tokens each, one behind the other: the first 90% of the text to train on, the rest to validate on."""
    try:
        text = Path(C.data.path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--data.path={C.data.path} is not UTF-8 text: {error}") from None
    ids, size = torch.tensor(tokenizer.encode(text, allowed_special=[END_OF_TEXT])), C.data.block_size
    n = int(0.9 * len(ids))
    if len(ids) - n <= size or n <= C.trainer.batch_size * size:
        raise ValueError(f"{C.data.path} has {len(ids)} tokens; a tenth of them must fill a window of --data.block_size={size}, and the "
                         f"others a batch of {C.trainer.batch_size}")
    logger.info("%d characters, %d tokens: %d to train on, %d to validate on", len(text), len(ids), n, len(ids) - n)
    windows = [part.unfold(0, size + 1, size) for part in (ids[:n], ids[n:])]
    return tuple(TensorDataset(part[:, :-1], part[:, 1:]) for part in windows)


def samples(C: CN, model: GPT, tokenizer: BPETokenizer) -> list[str]:
    """What the model writes behind the prompt, always from the same random numbers."""
    model.eval()
    idx = tokenizer(C.samples.prompt).repeat(C.samples.number, 1).to(next(model.parameters()).device)
    generator = torch.Generator(idx.device).manual_seed(C.system.seed)
    out = model.generate(idx, C.samples.length, do_sample=True, top_k=50, stop_token=tokenizer.eot_token, generator=generator)
    return [tokenizer.decode([i for i in row.tolist() if i != tokenizer.eot_token]) for row in out]


def main(args: list[str]) -> None:
    C = get_config()
    parse_args(C, args, __doc__)
    check_numbers(C.trainer, "eval_every", low=1, whole=True)  # the best weights are those of an evaluation
    if not Path(C.data.path).is_file():  # before the weights are fetched
        raise ValueError(f"--data.path={C.data.path}: which text? there is no such file")
    log_to_console()
    start, work_dir = time.time(), Path(C.system.work_dir)
    set_seed(C.system.seed)
    model = GPT.from_pretrained(C.model.name, **{name: C.model.dropout for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop")})
    if C.data.block_size > model.config.block_size:
        raise ValueError(f"--data.block_size={C.data.block_size} is more than the {model.config.block_size} tokens that {C.model.name} reads")
    tokenizer = load_tokenizer(C, model.config.vocab_size)
    train, valid = load_windows(C, tokenizer)
    RunFolder(work_dir).claim(dict(C.leaves()), free={"system.work_dir", *(f"trainer.{name}" for name in FREE_TO_CHANGE)})

    C.trainer.work_dir = str(work_dir)
    trainer = Trainer(C.trainer, model, train, valid)
    path = work_dir / "before.json"
    if not trainer.folder.checkpoint.exists():  # when a run resumes, the weights are others
        before = {"loss": trainer.evaluate(), "samples": samples(C, model, tokenizer)}
        if trainer.rank == 0:
            write_text(path, json.dumps(before))
        trainer.save_checkpoint()
    before = json.loads(path.read_text(encoding="utf-8"))
    trainer.run()
    if trainer.rank > 0:
        return
    model.load_state_dict(torch.load(work_dir / "best.pt", map_location=trainer.device, weights_only=True))
    model.save_pretrained(work_dir / "model")
    tokenizer.save_pretrained(work_dir / "model")
    after = {"samples": samples(C, model, tokenizer), "loss": trainer.best_valid_loss}
    write_text(work_dir / "samples.md", "\n\n".join(
        f"# {when}: validation loss {what['loss']:.3f}\n\n" + "\n\n".join(f"```\n{text}\n```" for text in what["samples"])
        for when, what in (("Before", before), ("After", after))) + "\n")
    summary = {"valid_loss_before": before["loss"], "valid_loss": after["loss"],
               "seconds": round(time.time() - start + trainer.resumed_seconds, 1)}
    write_text(work_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    logger.info("validation loss %.3f before, %.3f after; %s/model is for GPT.from_pretrained and transformers", before["loss"],
                after["loss"], work_dir)


if __name__ == "__main__":
    run_script(main)
