"""
A character-level language model of any text.

    python projects/chargpt/chargpt.py                           tinyshakespeare, downloaded
    python projects/chargpt/chargpt.py --data.path=book.txt      a text of your own
    python projects/chargpt/chargpt.py --data.path=text8         or enwik8: 100 MB of Wikipedia
    python projects/chargpt/chargpt.py --sample="O God, O God!"  continue this text

Each character is a token, and a GPT learns to predict the next one. The model with the lowest
validation loss, its samples, the losses and a plot of them go to out/chargpt. `--sample` uses that
model, also while the training still runs.

Read this file from top to bottom: config, data, model and training, report, and in `main` all of
them together. Running the script again continues an interrupted run.
"""

import logging
import math
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mingpt.chars import UNKNOWN, CharTokenizer
from mingpt.checkpoint import run_script, to_json, write_text
from mingpt.config import CfgNode, check_numbers, documented, parse_args
from mingpt.datasets import read_text
from mingpt.download import download, home
from mingpt.model import GPT
from mingpt.plots import plot_metrics
from mingpt.run_folder import RunFolder, read_metrics
from mingpt.trainer import FREE_TO_CHANGE, Trainer
from mingpt.utils import import_extra, log_to_console, pick_device, set_seed

logger = logging.getLogger("mingpt.chargpt")

# -- config ----------------------------------------------------------------------------------------


@documented
def get_config() -> CfgNode:
    """Every option and its default."""
    C = CfgNode()
    C.sample = ""                    # do not train, but print how the best model continues this

    C.system = CfgNode()
    C.system.seed = 3407             # fixes the initial weights, the batches and the windows
    C.system.work_dir = "out/chargpt"  # the folder for the model, its samples, losses and plot

    C.data = CfgNode()
    C.data.path = "tinyshakespeare"  # or text8, enwik8, or a UTF-8 text file
    C.data.quick_windows = 2000      # validation windows to evaluate on while training

    C.model = GPT.get_default_config()
    C.model.model_type = "gpt-micro"
    C.model.block_size = 64          # characters that the model sees at once
    C.model.embd_pdrop = 0.0
    C.model.resid_pdrop = 0.0
    C.model.attn_pdrop = 0.0
    del C.model.vocab_size           # it follows from the text

    C.trainer = Trainer.get_default_config()
    C.trainer.max_iters = 4000       # of 6 windows of 64: 1.5 million characters
    C.trainer.batch_size = 6
    C.trainer.learning_rate = 5e-3
    C.trainer.betas = (0.9, 0.99)    # the second is high: batches of six are noisy
    C.trainer.weight_decay = 0.3
    C.trainer.lr_schedule = "cosine"
    C.trainer.warmup_iters = 100
    C.trainer.eval_every = 500
    del C.trainer.work_dir           # it is system.work_dir
    return C


# -- data ------------------------------------------------------------------------------------------

# name: (address, SHA-256). text8.zip and enwik8.zip each hold one file, of that name (Mahoney).
CORPORA = {
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "text8": (
        "http://mattmahoney.net/dc/text8.zip",
        "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    ),
    "enwik8": (
        "http://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    ),
}


def load_text(path: str) -> str:
    """The text of a corpus, by its name, or of a UTF-8 file. ValueError if it is neither."""
    if path in CORPORA:
        return fetch_corpus(path)
    try:
        return read_text(path)
    except ValueError as error:
        expected = f"a UTF-8 text file or one of {', '.join(CORPORA)}"
        raise ValueError(f"--data.path: {error}. Expected {expected}") from None


def fetch_corpus(name: str) -> str:
    """The text of a corpus, downloaded unless it is there already.

    Each byte becomes one character. For enwik8 that is the custom: its results are given in bits
    per byte. The other two are plain ASCII, where it makes no difference.
    """
    url, sha256 = CORPORA[name]
    file_name = url.rpartition("/")[2]
    otherwise = "Or train on a text of your own, with --data.path=FILE"
    file = download(url, home() / "chargpt" / file_name, sha256, otherwise=otherwise)
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            return archive.read(name).decode("latin-1")
    return file.read_bytes().decode("latin-1")


def split(path: str, text: str) -> dict[str, str]:
    """The text in consecutive parts: train and valid, and for text8 and enwik8 also test.

    text8 and enwik8 are cut as in the literature, after 90 and 95 million characters. Of any other
    text the first 90% are for training.
    """
    n = len(text)
    train_end = int(0.9 * n)
    if path not in ("text8", "enwik8"):
        return {"train": text[:train_end], "valid": text[train_end:]}
    valid_end = int(0.95 * n)
    return {
        "train": text[:train_end],
        "valid": text[train_end:valid_end],
        "test": text[valid_end:],
    }


def encode(text: str, tokenizer: CharTokenizer) -> np.ndarray:
    """The ids that tokenizer.encode gives, as an array of 32-bit integers.

    100 million characters would be too many for a list. Instead, a table with an entry for every
    Unicode character translates them all at once.
    """
    table = np.full(0x110000, tokenizer.ids[UNKNOWN], dtype=np.int32)
    for char, i in tokenizer.ids.items():
        table[ord(char)] = i
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return table[code_points]


class Windows(Dataset):
    """Examples (x, y) of block_size ids each; y is one character ahead of x.

    The text is divided into stretches of block_size characters. For evaluation (consecutive=True)
    item i is the i-th stretch. For training it is a window that starts at a random place in that
    stretch: each pass over the data sees nearly every character once, but in new windows.
    limit: at most so many items; None or 0 for all of them.
    """

    def __init__(
        self,
        ids: np.ndarray,
        block_size: int,
        consecutive: bool = False,
        limit: int | None = None,
    ):
        self.ids = ids
        self.block_size = block_size
        self.consecutive = consecutive
        self.count = (len(ids) - 1) // block_size  # the last y needs one more character
        if limit:
            self.count = min(self.count, limit)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        if i >= self.count:
            raise IndexError(i)  # Python's way to end a loop over a dataset
        start = i * self.block_size
        if not self.consecutive:
            last_start = len(self.ids) - self.block_size - 1
            start = min(start + int(torch.randint(self.block_size, ())), last_start)
        window = self.ids[start:start + self.block_size + 1]
        window = torch.from_numpy(window.astype(np.int64))
        return window[:-1], window[1:]


# -- model and training ----------------------------------------------------------------------------


def train(config: CfgNode, ids: dict[str, np.ndarray], tokenizer: CharTokenizer) -> Trainer:
    """Train a GPT on ids["train"]. The best one so far, by ids["valid"], is in work_dir/model."""
    set_seed(config.system.seed)
    config.model.vocab_size = tokenizer.vocab_size
    model = GPT(config.model)

    block_size = config.model.block_size
    train_windows = Windows(ids["train"], block_size)
    valid_windows = Windows(
        ids["valid"],
        block_size,
        consecutive=True,
        limit=config.data.quick_windows,
    )

    config.trainer.work_dir = config.system.work_dir
    trainer = Trainer(config.trainer, model, train_windows, valid_windows)
    model_folder = Path(config.system.work_dir) / "model"

    def keep_best(trainer: Trainer) -> None:
        is_best = trainer.valid_loss == trainer.best_valid_loss
        if is_best and trainer.rank == 0:
            model.save_pretrained(model_folder)
            tokenizer.save_pretrained(model_folder)

    trainer.add_callback("on_evaluate", keep_best)
    trainer.run()
    return trainer


# -- report ----------------------------------------------------------------------------------------

HOW_TO_USE_IT = """
To use the model from Python:

from mingpt.chars import CharTokenizer
from mingpt.model import GPT

model = GPT.from_pretrained("{folder}")
tokenizer = CharTokenizer.from_pretrained("{folder}")
written = model.generate(tokenizer("the "), 200, do_sample=True)[0]
print(tokenizer.decode(written))"""


def report(
    config: CfgNode,
    trainer: Trainer,
    ids: dict[str, np.ndarray],
    tokenizer: CharTokenizer,
    seconds: float,
) -> None:
    """Evaluate the best model on all windows; write summary.json, samples.txt and losses.png."""
    work_dir, block_size = Path(config.system.work_dir), config.model.block_size
    model = GPT.from_pretrained(work_dir / "model").to(trainer.device).eval()

    losses, bits = {}, {}
    for name in ids:
        if name != "train":
            losses[name] = mean_loss(model, Windows(ids[name], block_size, consecutive=True))
            bits[name] = losses[name] / math.log(2)  # nats to bits
    characters_seen = trainer.iter_num * config.trainer.batch_size * block_size
    summary = {
        **{f"{name}_loss": loss for name, loss in losses.items()},
        **{f"{name}_bits_per_character": value for name, value in bits.items()},
        "characters_seen": characters_seen,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
    }
    write_text(work_dir / "summary.json", to_json(summary, indent=2) + "\n")
    texts = sample(model, tokenizer, prompt="\n", n=5)
    write_text(work_dir / "samples.txt", "\n---\n".join(texts) + "\n")
    plot_losses(work_dir)

    for name, loss in losses.items():
        print(f"{name} loss {loss:.4f}, {bits[name]:.4f} bits per character")
    print(f"The model has seen {characters_seen} characters. This took {seconds:.0f} s.")
    print(f"It is in {work_dir / 'model'}; five samples are in {work_dir / 'samples.txt'}.")
    print(HOW_TO_USE_IT.format(folder=(work_dir / "model").as_posix()))


@torch.no_grad()
def mean_loss(model: GPT, windows: Windows) -> float:
    """Nats per character, the mean over all windows."""
    device = next(model.parameters()).device
    batch_losses = []
    for x, y in DataLoader(windows, batch_size=128):
        _, loss = model(x.to(device), y.to(device))
        batch_losses.append(loss.item() * len(x))  # the last batch may be smaller
    return sum(batch_losses) / len(windows)


def sample(model: GPT, tokenizer: CharTokenizer, prompt: str, n: int) -> list[str]:
    """n continuations of a prompt by 500 characters, at temperature 0.8. Always the same ones."""
    set_seed(1)
    device = next(model.parameters()).device
    idx = tokenizer(prompt).repeat(n, 1).to(device)  # (n, T)
    idx = model.generate(idx, 500, temperature=0.8, do_sample=True)  # (n, T + 500)
    return [tokenizer.decode(row) for row in idx]


def plot_losses(work_dir: Path) -> None:
    """Draw the losses of metrics.jsonl as losses.png."""
    rows = read_metrics(work_dir / "metrics.jsonl")
    iterations = [row["iter"] for row in rows]
    curves = {
        "training": (iterations, [row.get("loss") for row in rows]),
        "validation": (iterations, [row.get("valid_loss") for row in rows]),
    }
    plot_metrics(work_dir / "losses.png", {"loss (nats per character)": curves})


def print_samples(prompt: str, work_dir: Path, device: str) -> None:
    """Three continuations of a prompt by the best model so far, for --sample."""
    folder = work_dir / "model"
    if not folder.exists():
        raise ValueError(f"{work_dir} has no model yet: run this script without --sample first")
    tokenizer = CharTokenizer.from_pretrained(folder)
    unknown = sorted(set(prompt) - tokenizer.ids.keys())
    if unknown:
        raise ValueError(f"--sample has characters that the model has never seen: "
                         f"{' '.join(unknown)}. Leave them out")
    model = GPT.from_pretrained(folder).to(pick_device(device)).eval()
    print("\n---\n".join(sample(model, tokenizer, prompt, n=3)))


# -- all together ----------------------------------------------------------------------------------


def main(args: list[str]) -> None:
    config = get_config()
    parse_args(config, args, __doc__)
    work_dir = Path(config.system.work_dir)
    if config.sample:
        print_samples(config.sample, work_dir, config.trainer.device)
        return

    # The best model is one that was evaluated, so there must be evaluations.
    check_numbers(config.trainer, "eval_every", low=1, whole=True)
    import_extra("matplotlib", "projects")  # if it is missing, say so before the work, not after
    log_to_console()
    start = time.time()

    # Data: the vocabulary is that of the training text; other characters become U+FFFD.
    text = load_text(config.data.path)
    splits = split(config.data.path, text)
    tokenizer = CharTokenizer.train([splits["train"]])
    ids = {name: encode(part, tokenizer) for name, part in splits.items()}
    lengths = ", ".join(f"{len(part)} {name}" for name, part in ids.items())
    logger.info("%d characters, %d different ones: %s", len(text), len(set(text)), lengths)

    # A folder holds one run. To continue it, all options must be the same, except these.
    free = {"sample", "system.work_dir", *(f"trainer.{name}" for name in FREE_TO_CHANGE)}
    RunFolder(work_dir).claim(dict(config.leaves()), free)

    # Model and training.
    trainer = train(config, ids, tokenizer)

    # Report: only the first process does, if torchrun has started many.
    if trainer.rank == 0:
        seconds = time.time() - start + trainer.resumed_seconds
        report(config, trainer, ids, tokenizer, seconds)


if __name__ == "__main__":
    run_script(main)
