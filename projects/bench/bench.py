"""
What this library's parts cost, side by side with what one would use instead, and how near they are to what the machine can do.

    python projects/bench/bench.py                        everything, some seven minutes on two CPU cores
    python projects/bench/bench.py --only=decode,bpe      some of it
    python projects/bench/bench.py --quick                fewer repetitions

Machines drift, so the two sides of a row take turns (A B A B ...) in one process, and what counts is the ratio of the medians. The limits
are measured in the same run: the rate of a matrix product and of reading memory. Writes results.json, table.md and bench.png.
"""

import ast
import itertools
import json
import logging
import math
import platform
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from mingpt import bpe
from mingpt.checkpoint import write_text
from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode as CN
from mingpt.utils import import_extra, log_to_console, parse_args, set_seed

logger = logging.getLogger("mingpt.bench")


@dataclass
class Row:
    """One line of the table: `work` done so many times `unit` per second by us and by the peer, and our share of the limit."""

    work: str
    unit: str
    peer: str
    ours: float
    theirs: float | None
    ratio: float | None
    spread: float  # of our times: (slowest - fastest) / median
    limit: str = ""


def get_config() -> CN:
    """Every option and its default."""
    C = CN()
    C.work_dir = "out/bench"
    C.only = ""           # a list of benchmarks, separated by commas; empty for all
    C.quick = False
    C.repeat = 7          # counted runs of each side, behind one that warms up
    C.bpe_megabytes = 10
    return C


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def clock(run: Callable) -> float:
    """How long run() takes, in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(C: CN, ours: Callable, theirs: Callable | None) -> tuple[list[float], list[float]]:
    """Seconds of each run of both sides, which take turns; the first run of each does not count."""
    times = ([], [])
    for _ in range(1 + (2 if C.quick else C.repeat)):
        for side, run in zip(times, (ours, theirs)):
            if run is not None:
                side.append(clock(run))
    return times[0][1:], times[1][1:]


def compare(C: CN, work: str, unit: str, amount: float, ours: Callable, peer: str, theirs: Callable | None,
            limit: tuple[str, float] | None = None) -> Row:
    """Time both sides doing `amount` units of work. limit = (its name, the most units per second that it allows)."""
    a, b = alternate(C, ours, theirs)
    rate, other = amount / statistics.median(a), amount / statistics.median(b) if b else None
    row = Row(work, unit, peer if b else f"{peer}: not installed", rate, other, rate / other if other else None,
              (max(a) - min(a)) / statistics.median(a), f"{rate / limit[1]:.0%} of the {limit[0]}" if limit else "")
    logger.info("%s: %.4g %s/s, %s %s, ratio %s  %s", work, rate, unit, row.peer, f"{other:.4g}" if other else "-",
                f"{row.ratio:.2f}" if other else "-", row.limit)
    return row


def seconds(run: Callable, repeat: int) -> float:
    """The median duration of run() after a warm-up."""
    return statistics.median([clock(run) for _ in range(repeat + 1)][1:])


def matrix_product_rate() -> float:
    """FLOP per second of the product that GPT-2's MLP consists of, 512 rows at a time."""
    x, w = torch.randn(512, 768), torch.randn(3072, 768)
    return 2 * 512 * 768 * 3072 / seconds(lambda: x @ w.t(), 50)


def memory_bandwidth() -> float:
    """Bytes per second of reading half a gigabyte, GPT-2's size, once through."""
    x = torch.ones(2**27)
    return x.numel() * 4 / seconds(x.sum, 10)


def peer(module: str):
    """The module, or None where it is not installed."""
    try:
        return import_extra(module, "bench")
    except ImportError as error:
        logger.warning("%s", error)
        return None


# ---------------------------------------------------------------------------------------------------------------------
# the benchmarks


def both_models(preset: str, vocab_size: int, block_size: int) -> tuple[GPT, torch.nn.Module | None]:
    """Our GPT and transformers' with random weights and without dropout."""
    config = GPT.get_default_config()
    config.merge_from_dict({"model_type": preset, "vocab_size": vocab_size, "block_size": block_size,
                            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0})
    ours, transformers = GPT(config), peer("transformers")
    if transformers is None:
        return ours, None
    C = ours.config
    return ours, transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=C.n_layer, n_head=C.n_head, n_embd=C.n_embd, vocab_size=vocab_size, n_positions=block_size, embd_pdrop=0.0,
        resid_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, pad_token_id=0))


def training_step(model: torch.nn.Module, loss: Callable, clip: float = math.inf) -> Callable:
    """Forward, backward, clip and a step of fused AdamW, as a bare loop has them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        if clip < math.inf:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return run


def train(C: CN) -> list[Row]:
    """A training step here and there, and what torch.compile makes of ours."""
    rows = []
    for preset, vocab_size, B, T in (("gpt2", 50257, 4, 128), ("gpt-micro", 128, 64, 32)):
        ours, theirs = both_models(preset, vocab_size, 1024 if preset == "gpt2" else 64)
        idx = torch.randint(vocab_size, (B, T + 1))
        x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
        plain = training_step(ours, lambda: ours(x, y)[1])
        weights = sum(p.numel() for p in ours.parameters()) - ours.transformer.wpe.weight.numel()
        rows.append(compare(C, f"training step, {preset}, {B} x {T} tokens", "tokens", B * T, plain, "transformers",
                            theirs and training_step(theirs, lambda: theirs(x, labels=x, use_cache=False).loss),
                            ("matrix-product rate", matrix_product_rate() / (6 * weights))))  # Kaplan et al. 2020, section 2.1
        compiled = torch.compile(ours)
        rows.append(compare(C, f"training step, {preset}, {B} x {T} tokens, compiled", "tokens", B * T,
                            training_step(ours, lambda: compiled(x, y)[1]), "not compiled", plain))
    return rows


def loop(C: CN) -> list[Row]:
    """Twenty iterations of the Trainer, everything around the step included, against the bare loop on batches made before."""
    (model, _), (again, _) = (both_models("gpt-micro", 128, 64) for _ in range(2))
    data = TensorDataset(*torch.randint(128, (2, 1280, 32)))
    config = Trainer.get_default_config()
    config.merge_from_dict({"device": "cpu", "learning_rate": 1e-4, "max_iters": 0})
    trainer, batches = Trainer(config, model, data), itertools.cycle([data[i:i + 64] for i in range(0, 1280, 64)])
    step = training_step(again, lambda: again(*next(batches))[1], clip=config.grad_norm_clip)

    def ours():
        config.max_iters = trainer.iter_num + 20
        trainer.run()

    return [compare(C, "the Trainer, gpt-micro, 64 x 32 tokens", "iterations", 20, ours, "a bare loop", lambda: [step() for _ in range(20)])]


def decode(C: CN) -> list[Row]:
    """Greedy generation with a KV cache, the prompt's forward pass included."""
    rows = []
    for preset, vocab_size, batches, prompt, new in (("gpt2", 50257, (1, 8, 32), 64, 64), ("gpt-micro", 128, (128,), 1, 32)):
        ours, theirs = both_models(preset, vocab_size, 1024 if preset == "gpt2" else 64)
        for model in filter(None, (ours, theirs)):
            model.eval()
        for B in batches[:2] if C.quick else batches:
            idx = torch.randint(vocab_size, (B, prompt))
            run = theirs and (lambda: theirs.generate(idx, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                                                      attention_mask=torch.ones_like(idx)))
            bytes_read = 4 * sum(p.numel() for p in ours.parameters())  # all weights, once for each new column of tokens
            rows.append(compare(C, f"decoding, {preset}, {B} rows, {prompt} + {new} tokens", "tokens", B * new,
                                lambda: ours.generate(idx, new), "transformers", run,
                                ("memory bandwidth", B * memory_bandwidth() / bytes_read) if preset == "gpt2" else None))
    return rows


def texts(megabytes: int) -> dict[str, str]:
    """English (the docstrings of the installed packages, each once), Python source, and English mixed with ten scripts."""
    docstrings, source, size, rng = {}, [], 0, random.Random(0)
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        code = path.read_text(encoding="utf-8", errors="ignore")
        source.append(code)
        size += len(code)
        try:
            nodes = ast.walk(ast.parse(code))
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings |= {ast.get_docstring(node): None for node in nodes if isinstance(node, kinds)}
        if size > 12 * megabytes * 10**6:
            break
    english = "\n\n".join(filter(None, docstrings))
    alphabets = [range(a, b) for a, b in ((0x430, 0x450), (0x3B1, 0x3CA), (0x5D0, 0x5EB), (0x627, 0x64B), (0x4E00, 0x9FA5), (0x3041, 0x3097),
                                          (0xAC00, 0xD7A4), (0x905, 0x93A), (0xE0, 0x100), (0x1F600, 0x1F650))]
    foreign = ["".join(map(chr, rng.choices(alphabet, k=rng.randint(1, 7)))) for alphabet in alphabets for _ in range(3000)]
    mixed = " ".join(word for pair in zip(english.split(" "), rng.choices(foreign, k=english.count(" ") + 1)) for word in pair)
    cut = lambda text: text.encode()[:megabytes * 10**6].decode(errors="ignore")
    return {"English docstrings": cut(english.encode("ascii", "ignore").decode()), "Python source": cut("".join(source)), "mixed scripts": cut(mixed)}


def bpe_encoding(C: CN) -> list[Row]:
    """Encoding on one thread, with all that was learned from earlier runs forgotten."""
    tiktoken, rows, ours = peer("tiktoken"), [], bpe.BPETokenizer()
    if tiktoken is not None:
        folder, load = bpe.gpt2_folder(), peer("tiktoken.load")
        ranks = load.data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
        theirs = tiktoken.Encoding("gpt2", pat_str=bpe.SPLIT.pattern, mergeable_ranks=ranks, special_tokens={})
    for name, text in texts(1 if C.quick else C.bpe_megabytes).items():
        def cold():
            ours.words.clear()
            ours.encode(text)

        size, other = len(text.encode()) / 1e6, tiktoken and (lambda: theirs.encode_ordinary(text))
        rows.append(compare(C, f"BPE encoding, {size:.0f} MB of {name}, no word known", "MB", size, cold, "tiktoken", other))
        rows.append(compare(C, f"BPE encoding, {size:.0f} MB of {name}, words known", "MB", size, lambda: ours.encode(text), "tiktoken", other))
    return rows


BENCHMARKS = {"train": train, "loop": loop, "decode": decode, "bpe": bpe_encoding}

# ---------------------------------------------------------------------------------------------------------------------
# the report


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    number = lambda x: "-" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    lines = ["| work | unit | minGPT | peer | | ratio | spread | of the limit |", "|---|---|---|---|---|---|---|---|"]
    lines += [f"| {r.work} | {r.unit}/s | {number(r.ours)} | {number(r.theirs)} | {r.peer} | {number(r.ratio)} | {r.spread:.0%} | {r.limit} |"
              for r in rows]
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """A bar for each row that has a peer: how many times as fast we are."""
    plt = import_extra("matplotlib.pyplot", "bench")
    plt.switch_backend("Agg")
    rows = [row for row in rows if row.ratio][::-1]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.35 * len(rows)))
    axis.barh([row.work for row in rows], [row.ratio for row in rows], color=["tab:green" if row.ratio >= 1 else "tab:orange" for row in rows])
    axis.axvline(1, color="black", lw=1)
    axis.set_xlabel("times as fast as the peer")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(args: list[str]) -> None:
    C = get_config()
    parse_args(C, args, __doc__)
    chosen = C.only.split(",") if C.only else list(BENCHMARKS)
    if unknown := set(chosen) - set(BENCHMARKS):
        raise ValueError(f"--only={C.only} has {sorted(unknown)}; there are {', '.join(BENCHMARKS)}")
    log_to_console()
    set_seed(0)
    rows = [row for name in chosen for row in BENCHMARKS[name](C)]
    machine = {"date": str(date.today()), "threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine(),
               "python": platform.python_version(), "torch": torch.__version__,
               **{name: getattr(peer(name), "__version__", "not installed") for name in ("transformers", "tiktoken")}}
    folder = Path(C.work_dir)
    write_text(folder / "results.json", json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    write_text(folder / "table.md", table(rows) + "\n" + ", ".join(f"{k} {v}" for k, v in machine.items()) + "\n")
    if any(row.ratio for row in rows):
        draw(rows, folder / "bench.png")
    sys.stdout.write((folder / "table.md").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
