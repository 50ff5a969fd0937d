"""
Fine-tune a pretrained language model on a text of your own: GPT-2, or one of the Llama family.

    python projects/finetune/finetune.py --data.path=book.txt                       GPT-2, 124M
    python projects/finetune/finetune.py --data.path=book.txt --model.name=smollm2  SmolLM2, 135M
    python projects/finetune/finetune.py --data.path=book.txt --model.name=NAME     one of the hub,
                                                                         a folder of yours, a file

The model with the lowest validation loss goes to out/finetune/model, where this library and
`transformers` can load it. Samples from before and after the training go to
out/finetune/samples.md. In the text, <|endoftext|> marks where one document ends and the next
one begins, whatever the model's own token for that is called.

Read this file from top to bottom: config, data, model, report, and in `main` all of them together
with the training. Running the script again continues an interrupted run.
"""

import logging
import time
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from mingpt.bpe import END_OF_TEXT, BPETokenizer
from mingpt.checkpoint import load_torch, read_json, run_script, to_json, write_text
from mingpt.config import CfgNode, check_numbers, documented, parse_args
from mingpt.datasets import read_text, windows
from mingpt.model import GPT
from mingpt.run_folder import RunFolder
from mingpt.trainer import FREE_TO_CHANGE, Trainer
from mingpt.utils import log_to_console, set_seed

logger = logging.getLogger("mingpt.finetune")

# One of these is in every folder that has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "encoder.json")

# -- config ----------------------------------------------------------------------------------------


@documented
def get_config() -> CfgNode:
    """Every option and its default."""
    C = CfgNode()
    C.system = CfgNode()
    C.system.seed = 3407             # fixes the batches, the dropout and the samples
    C.system.work_dir = "out/finetune"  # the folder for the model, its samples and losses

    C.data = CfgNode()
    C.data.path = ""                 # a UTF-8 text file
    C.data.block_size = 256          # tokens in a training window

    C.model = CfgNode()
    C.model.name = "gpt2"            # or smollm2, a name on the hub, a folder, a file
    C.model.tokenizer = ""           # a name or a folder, too; empty: the one beside the weights
    C.model.dropout = None           # while training; None: the model's own (GPT-2: 0.1, Llamas: 0)

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

    C.samples = CfgNode()
    C.samples.prompt = "\n"          # what the samples continue
    C.samples.number = 3             # samples before the training, and as many after it
    C.samples.length = 100           # tokens
    return C


# -- data ------------------------------------------------------------------------------------------


def load_text(path: str) -> str:
    """The text to learn from. ValueError if there is none at this path, or it is not UTF-8."""
    if not path:
        raise ValueError("--data.path is empty: which text? Give a UTF-8 text file")
    try:
        return read_text(path)
    except ValueError as error:
        raise ValueError(f"--data.path: {error}") from None


def load_windows(
    config: CfgNode,
    text: str,
    tokenizer: BPETokenizer,
) -> tuple[TensorDataset, TensorDataset]:
    """Two datasets of windows (x, y), each block_size tokens; y is one token ahead of x.

    The first is of the first 90% of the text, to train on, and the second of the rest, to validate
    on. The windows follow each other; what does not fill a window at the end is left out.
    """
    ids = torch.tensor(encode_documents(text, tokenizer))
    block_size, batch_size = config.data.block_size, config.trainer.batch_size
    train_ids, valid_ids = ids.tensor_split([int(0.9 * len(ids))])
    if len(valid_ids) <= block_size or len(train_ids) <= batch_size * block_size:
        raise ValueError(
            f"the text {config.data.path} has {len(ids)} tokens, which is too short: a tenth of it "
            f"must fill a window of --data.block_size={block_size} tokens, and the rest "
            f"--trainer.batch_size={batch_size} windows. Lower these, or give a longer text"
        )
    logger.info("%d characters, %d tokens: %d to train on, %d to validate on",
                len(text), len(ids), len(train_ids), len(valid_ids))
    return windows(train_ids, block_size), windows(valid_ids, block_size)


def encode_documents(text: str, tokenizer: BPETokenizer) -> list[int]:
    """The ids of a text, with the tokenizer's own end token where END_OF_TEXT stands."""
    first, *others = text.split(END_OF_TEXT)
    if others and tokenizer.eot_token is None:
        raise ValueError(
            f"the text marks the end of documents with {END_OF_TEXT}, but the tokenizer has no "
            "token for that: take the marks out of the text"
        )
    ids = tokenizer.encode(first)
    for document in others:
        ids += [tokenizer.eot_token, *tokenizer.encode(document)]
    return ids


# -- model -----------------------------------------------------------------------------------------


def load_model(config: CfgNode) -> GPT:
    """The pre-trained model, with our dropout. ValueError if its context is too short."""
    name, dropout = config.model.name, config.model.dropout
    kinds = () if dropout is None else ("embd_pdrop", "resid_pdrop", "attn_pdrop")
    model = GPT.from_pretrained(name, **dict.fromkeys(kinds, dropout))
    if config.data.block_size > model.config.block_size:
        raise ValueError(
            f"got --data.block_size={config.data.block_size}, which is more than the "
            f"{model.config.block_size} tokens that {name} reads at once: lower it"
        )
    return model


def load_tokenizer(config: CfgNode, vocab_size: int) -> BPETokenizer:
    """The tokenizer of a model with this vocabulary size.

    It is the one that the options name, else the one beside the weights. ValueError if it cannot be
    the model's.
    """
    name = config.model.tokenizer or default_tokenizer(config.model.name)
    tokenizer = BPETokenizer() if name == "gpt2" else BPETokenizer.from_pretrained(name)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the model {config.model.name} has {vocab_size} tokens, but the tokenizer {name} has "
            f"{tokenizer.vocab_size}: give --model.tokenizer=FOLDER, a folder with the "
            "tokenizer.json, or vocab.json and merges.txt, that the model was trained with"
        )
    return tokenizer


def default_tokenizer(model_name: str) -> str:
    """Where a model's own tokenizer is: under its name, beside its file, or GPT-2's, built in."""
    path = Path(model_name)
    if not path.exists() or path.suffix == ".gguf":
        return model_name
    folder = path if path.is_dir() else path.parent
    has_one = any((folder / file).exists() for file in TOKENIZER_FILES)
    return str(folder) if has_one else "gpt2"


# -- report ----------------------------------------------------------------------------------------

HOW_TO_USE_IT = """
To use the model from Python:

from mingpt.bpe import BPETokenizer
from mingpt.model import GPT

model = GPT.from_pretrained("{folder}")
tokenizer = BPETokenizer.from_pretrained("{folder}")
print(tokenizer.decode(model.generate(tokenizer("The"), 50, do_sample=True)[0]))"""


def sample(config: CfgNode, model: GPT, tokenizer: BPETokenizer) -> list[str]:
    """How the model continues the prompt, always with the same random numbers."""
    model.eval()
    options, end = config.samples, tokenizer.eot_token
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(config.system.seed)
    rows = model.generate(
        tokenizer(options.prompt).repeat(options.number, 1).to(device),  # (number, T)
        options.length,
        do_sample=True,
        top_k=50,
        stop_token=end,  # a row that has ended is filled up with this token
        generator=generator,
    )
    return [tokenizer.decode([i for i in row if i != end]) for row in rows.tolist()]


def state_before(config: CfgNode, trainer: Trainer, tokenizer: BPETokenizer) -> dict:
    """The loss and the samples of the model as it was before its first iteration.

    before.json keeps them for a resumed run, in which the model has already learned something.
    """
    path = Path(config.system.work_dir) / "before.json"
    if not trainer.folder.checkpoint.exists():
        before = {
            "loss": trainer.evaluate(),
            "samples": sample(config, trainer.model, tokenizer),
        }
        if trainer.rank == 0:
            write_text(path, to_json(before))
        trainer.save_checkpoint()  # every process waits here until the file is written
    return read_json(path)


def report(
    config: CfgNode,
    trainer: Trainer,
    tokenizer: BPETokenizer,
    before: dict,
    seconds: float,
) -> None:
    """Save the best model; write its samples and losses beside those from before the training."""
    work_dir = Path(config.system.work_dir)
    model = trainer.model
    model.load_state_dict(load_torch(work_dir / "best.pt"))
    model.save_pretrained(work_dir / "model")
    tokenizer.save_pretrained(work_dir / "model")

    after = {"loss": trainer.best_valid_loss, "samples": sample(config, model, tokenizer)}
    sections = [markdown("Before", before), markdown("After", after)]
    write_text(work_dir / "samples.md", "\n\n".join(sections) + "\n")
    summary = {
        "valid_loss_before": before["loss"],
        "valid_loss": after["loss"],
        "seconds": round(seconds, 1),
    }
    write_text(work_dir / "summary.json", to_json(summary, indent=2) + "\n")

    print(f"validation loss {before['loss']:.3f} before, {after['loss']:.3f} after")
    print(f"This took {seconds:.0f} s. Samples of both are in {work_dir / 'samples.md'}.")
    print(f"The model is in {work_dir / 'model'}, for this library and for transformers.")
    print(HOW_TO_USE_IT.format(folder=(work_dir / "model").as_posix()))


def markdown(title: str, state: dict) -> str:
    """A section of samples.md."""
    blocks = [f"# {title}: validation loss {state['loss']:.3f}"]
    for text in state["samples"]:
        blocks.append(f"```\n{text}\n```")
    return "\n\n".join(blocks)


# -- all together ----------------------------------------------------------------------------------


def main(args: list[str]) -> None:
    config = get_config()
    parse_args(config, args, __doc__)
    # The best model is one that was evaluated, so there must be evaluations.
    check_numbers(config.trainer, "eval_every", low=1, whole=True)
    log_to_console()
    start = time.time()
    set_seed(config.system.seed)

    # Data and model. The text comes first: if its path is wrong, no weights are downloaded.
    text = load_text(config.data.path)
    model = load_model(config)
    tokenizer = load_tokenizer(config, model.config.vocab_size)
    train_windows, valid_windows = load_windows(config, text, tokenizer)

    # A folder holds one run. To continue it, all options must be the same, except these.
    free = {"system.work_dir", *(f"trainer.{name}" for name in FREE_TO_CHANGE)}
    RunFolder(config.system.work_dir).claim(dict(config.leaves()), free)

    # Train. After each evaluation that is the best so far, the trainer writes best.pt.
    config.trainer.work_dir = config.system.work_dir
    trainer = Trainer(config.trainer, model, train_windows, valid_windows)
    before = state_before(config, trainer, tokenizer)
    trainer.run()

    # Report: only the first process does, if torchrun has started many.
    if trainer.rank == 0:
        seconds = time.time() - start + trainer.resumed_seconds
        report(config, trainer, tokenizer, before, seconds)


if __name__ == "__main__":
    run_script(main)
