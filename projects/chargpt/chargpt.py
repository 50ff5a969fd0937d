"""
A character-level language model of any text.

    python projects/chargpt/chargpt.py                              tinyshakespeare, fetched
    python projects/chargpt/chargpt.py --data.path=book.txt         a text of your own
    python projects/chargpt/chargpt.py --data.path=text8            or enwik8: 100 MB of Wikipedia (Mahoney), fetched
    python projects/chargpt/chargpt.py --sample="O God, O God!"     let the best model so far go on from there

The weights with the best validation loss, some samples, the losses and a plot go to out/chargpt; running again resumes.
"""

import json
import logging
import math
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mingpt.chars import CharTokenizer
from mingpt.checkpoint import run_script, write_text
from mingpt.model import GPT
from mingpt.run_folder import RunFolder, read_metrics
from mingpt.trainer import FREE_TO_CHANGE, Trainer
from mingpt.config import CfgNode as CN, check_numbers, parse_args
from mingpt.download import download, home
from mingpt.plots import plot_metrics
from mingpt.utils import import_extra, log_to_console, pick_device, set_seed

logger = logging.getLogger("mingpt.chargpt")

CORPORA = {  # name: (address, SHA-256); text8 and enwik8 are zip files of a file of that name
    "tinyshakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "text8": ("http://mattmahoney.net/dc/text8.zip", "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"),
    "enwik8": ("http://mattmahoney.net/dc/enwik8.zip", "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
}


def get_config() -> CN:
    """Every option and its default."""
    C = CN()
    C.sample = ""                    # text to continue with the best model, instead of training

    C.system = CN()
    C.system.seed = 3407
    C.system.work_dir = "out/chargpt"

    C.data = CN()
    C.data.path = "tinyshakespeare"  # or text8, enwik8, or a UTF-8 text file
    C.data.quick_windows = 2000      # of the validation text, to evaluate on while training; at the end it is all of them

    C.model = GPT.get_default_config()
    C.model.model_type = "gpt-micro"
    C.model.block_size = 64
    C.model.embd_pdrop = C.model.resid_pdrop = C.model.attn_pdrop = 0.0
    del C.model.vocab_size           # follows from the text

    C.trainer = Trainer.get_default_config()
    C.trainer.max_iters = 4000      # 4000 x 6 x 64: 1.5 million characters
    C.trainer.batch_size = 6
    C.trainer.learning_rate = 5e-3
    C.trainer.betas = (0.9, 0.99)    # a batch of six is noisy
    C.trainer.weight_decay = 0.3
    C.trainer.lr_schedule = "cosine"
    C.trainer.warmup_iters = 100
    C.trainer.eval_every = 500
    del C.trainer.work_dir           # it is system.work_dir
    return C


# ---------------------------------------------------------------------------------------------------------------------
# data


def load_text(path: str) -> str:
    """The text of a corpus, by name, or of a UTF-8 file. In enwik8 a character is a byte, as everyone counts there."""
    if path in CORPORA:
        url, sha256 = CORPORA[path]
        file = download(url, home() / "chargpt" / url.rpartition("/")[2], sha256)
        return (zipfile.ZipFile(file).read(path) if file.suffix == ".zip" else file.read_bytes()).decode("latin-1")
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"--data.path={path}: there is no such file, and it is none of {', '.join(CORPORA)}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--data.path={path} is not UTF-8 text: {error}") from None


def split(path: str, text: str) -> dict[str, str]:
    """text8 and enwik8: the usual 90, 5 and 5 million characters. Other texts: the first 90% and the rest."""
    ends = (0.9, 0.95, 1.0) if path in ("text8", "enwik8") else (0.9, 1.0)
    ends = [0, *(int(end * len(text)) for end in ends)]
    return {name: text[start:end] for name, start, end in zip(("train", "valid", "test"), ends, ends[1:])}


def encode(text: str, tokenizer: CharTokenizer) -> np.ndarray:
    """The ids that tokenizer.encode gives, as an array of four bytes each: 100 million characters are too many for a list."""
    ids = np.full(0x110000, tokenizer.ids["\N{REPLACEMENT CHARACTER}"], dtype=np.int32)
    for char, i in tokenizer.ids.items():
        ids[ord(char)] = i
    return ids[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]


class Windows(Dataset):
    """(x, y) of block_size ids each, y one character ahead.

    For training, item i is a window from a random place in the i-th stretch of block_size characters: in a pass over the data
    nearly every character is seen once, and never in the same windows again. `consecutive`, for evaluation: the stretches.
    """

    def __init__(self, ids: np.ndarray, block_size: int, consecutive: bool = False, limit: int | None = None):
        self.ids, self.size, self.consecutive = ids, block_size, consecutive
        self.count = min((len(ids) - 1) // block_size, limit or len(ids))

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i >= self.count:
            raise IndexError(i)  # which is what ends a loop over a dataset
        start = i * self.size
        if not self.consecutive:
            start = min(start + int(torch.randint(self.size, ())), len(self.ids) - self.size - 1)
        window = torch.from_numpy(self.ids[start:start + self.size + 1].astype(np.int64))
        return window[:-1], window[1:]


# ---------------------------------------------------------------------------------------------------------------------
# training, and what comes of it


def main(args: list[str]) -> None:
    C = get_config()
    parse_args(C, args, __doc__)
    work_dir = Path(C.system.work_dir)
    if C.sample:
        return print_samples(C.sample, work_dir, C.trainer.device)
    check_numbers(C.trainer, "eval_every", low=1, whole=True)  # the best weights are those of an evaluation
    log_to_console()
    import_extra("matplotlib", "projects")  # before the work, not after it
    start = time.time()
    text = load_text(C.data.path)
    splits = split(C.data.path, text)
    tokenizer = CharTokenizer.train([splits["train"]])
    RunFolder(work_dir).claim(dict(C.leaves()), free={"sample", "system.work_dir", *(f"trainer.{name}" for name in FREE_TO_CHANGE)})
    ids = {name: encode(part, tokenizer) for name, part in splits.items()}
    logger.info("%d characters, %d different ones: %s", len(text), tokenizer.vocab_size,
                ", ".join(f"{len(part)} {name}" for name, part in ids.items()))

    set_seed(C.system.seed)
    C.model.vocab_size, C.trainer.work_dir = tokenizer.vocab_size, str(work_dir)
    model, size = GPT(C.model), C.model.block_size
    trainer = Trainer(C.trainer, model, Windows(ids["train"], size), Windows(ids["valid"], size, consecutive=True, limit=C.data.quick_windows))

    def keep_best(trainer):
        if trainer.valid_loss == trainer.best_valid_loss and trainer.rank == 0:
            model.save_pretrained(work_dir / "model")
            tokenizer.save_pretrained(work_dir / "model")

    trainer.add_callback("on_evaluate", keep_best)
    trainer.run()
    if trainer.rank == 0:
        report(C, trainer, ids, tokenizer, round(time.time() - start + trainer.resumed_seconds, 1))


def report(C: CN, trainer: Trainer, ids: dict, tokenizer: CharTokenizer, seconds: float) -> None:
    """summary.json, samples.txt and losses.png, of the best weights."""
    work_dir, size = Path(C.system.work_dir), C.model.block_size
    model = GPT.from_pretrained(work_dir / "model").to(trainer.device).eval()
    losses = {name: mean_loss(model, Windows(ids[name], size, consecutive=True)) for name in ids if name != "train"}
    bits = {f"{name}_bits_per_character": loss / math.log(2) for name, loss in losses.items()}
    seen = trainer.iter_num * C.trainer.batch_size * size
    summary = {**{f"{name}_loss": loss for name, loss in losses.items()}, **bits, "characters_seen": seen,
               "parameters": sum(p.numel() for p in model.parameters()), "seconds": seconds}
    write_text(work_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_text(work_dir / "samples.txt", "\n---\n".join(samples(model, tokenizer, "\n", 5)) + "\n")
    rows = read_metrics(work_dir / "metrics.jsonl")
    curves = {label: ([row["iter"] for row in rows], [row.get(name) for row in rows])
              for label, name in (("training", "loss"), ("validation", "valid_loss"))}
    plot_metrics(work_dir / "losses.png", {"loss (nats per character)": curves})
    logger.info("\n".join(f"{name} loss {loss:.4f}, {loss / math.log(2):.4f} bits per character" for name, loss in losses.items()))
    logger.info("%d characters seen in %.0f s; the model and samples are in %s", seen, seconds, work_dir)


@torch.no_grad()
def mean_loss(model: GPT, windows: Windows) -> float:
    """Nats per character over all windows, 128 at a time."""
    device = next(model.parameters()).device
    return sum(model(x.to(device), y.to(device))[1].item() * len(x) for x, y in DataLoader(windows, 128)) / len(windows)


def samples(model: GPT, tokenizer: CharTokenizer, prompt: str, n: int, length: int = 500) -> list[str]:
    """n ways to go on from prompt, by sampling at temperature 0.8."""
    set_seed(1)
    idx = tokenizer(prompt).repeat(n, 1).to(next(model.parameters()).device)
    return [tokenizer.decode(row) for row in model.generate(idx, length, temperature=0.8, do_sample=True)]


def print_samples(prompt: str, work_dir: Path, device: str) -> None:
    """Three samples of the best model."""
    if not (work_dir / "model").exists():
        raise ValueError(f"there is no model in {work_dir} yet: run this script without --sample first")
    tokenizer = CharTokenizer.from_pretrained(work_dir / "model")
    if strange := sorted(set(prompt) - tokenizer.ids.keys()):
        raise ValueError(f"--sample has characters that the model has never seen: {' '.join(strange)}")
    model = GPT.from_pretrained(work_dir / "model").to(pick_device(device)).eval()
    print("\n---\n".join(samples(model, tokenizer, prompt, 3)))


if __name__ == "__main__":
    run_script(main)
