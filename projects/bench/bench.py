"""
What this library's parts cost, side by side with what one would use instead, and how near they are to what the machine can do.

    python projects/bench/bench.py                        everything, a quarter of an hour on two CPU cores
    python projects/bench/bench.py --only=decode,bpe      some of it
    python projects/bench/bench.py --quick                the most important rows, in two minutes

Machines drift, so the two sides of a row take turns (A B A B ...), each in a process of its own, and what counts is the ratio of the medians.
The limits are measured in the same run: the rate of a matrix product and of reading memory. Writes results.json, table.md and bench.png.
"""

import json
import logging
import platform
import sys
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

import models
import ppo
import text
from measure import DEVICE, DTYPE, Row, SideFailed, compare, serve
from mingpt.checkpoint import run_script, write_text
from mingpt.config import CfgNode as CN, parse_args
from mingpt.utils import import_extra, log_to_console, set_seed

logger = logging.getLogger("mingpt.bench")

BENCHMARKS = {"train": models.train, "loop": models.loop, "decode": models.decode, "load": models.load, "ppo": ppo.iteration,
              "bpe": text.encoding, "vocabulary": text.vocabulary}


def get_config() -> CN:
    """Every option and its default."""
    C = CN()
    C.work_dir = "out/bench"
    C.only = ""           # a list of benchmarks, separated by commas; empty for all
    C.quick = False
    C.repeat = 5          # counted runs of each side, behind one that warms up
    C.bpe_megabytes = 10
    C.side = ""           # for this script itself: to be one side of a case
    return C


def run(C: CN, name: str) -> list[Row]:
    """The rows of a benchmark, less those of cases that fail on this machine."""
    rows = []
    for number, case in enumerate(BENCHMARKS[name](C)):
        if not (C.quick and case.slow):
            try:
                rows += compare(name, number, case, C)
            except SideFailed as error:
                logger.warning("left out: %s, for %s", case.work, error)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# the report


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    number = lambda x: "-" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    memory = lambda r: f"{r.ours_mb:,.0f} / {r.theirs_mb:,.0f}" if r.ours_mb and r.theirs_mb else ""
    lines = ["| work | unit | here | peer | | ratio | spread | of the limit | MB |", "|---|---|---|---|---|---|---|---|---|"]
    lines += [f"| {r.work} | {r.unit}/s | {number(r.ours)} | {number(r.theirs)} | {r.peer} | {number(r.ratio)} | {r.spread:.0%} | {r.limit} "
              f"| {memory(r)} |" for r in rows]
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """A bar for each row that has a peer: how many times as fast we are."""
    plt = import_extra("matplotlib.pyplot", "bench")
    plt.switch_backend("Agg")
    rows = [row for row in rows if row.ratio][::-1]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.35 * len(rows)))
    axis.barh([row.work for row in rows], [row.ratio for row in rows], color=["tab:green" if row.ratio >= 1 else "tab:orange" for row in rows])
    axis.axvline(1, color="black", lw=1)
    axis.margins(y=0.01)
    axis.set_xlabel("times as fast as the peer")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(args: list[str]) -> None:
    C = get_config()
    parse_args(C, args, __doc__)
    chosen = C.only.split(",") if C.only else list(BENCHMARKS)
    if unknown := set(chosen) - set(BENCHMARKS):
        raise ValueError(f"--only={C.only} has {sorted(unknown)}; there are {', '.join(BENCHMARKS)}")
    set_seed(0)
    if C.side:
        name, number, side = C.side.split()
        return serve(list(BENCHMARKS[name](C))[int(number)], side)
    log_to_console()
    rows = [row for name in chosen for row in run(C, name)]
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none"
    machine = {"date": str(date.today()), "threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine(),
               "card": card, "precision": str(DTYPE).removeprefix("torch."),
               "python": platform.python_version(), "torch": torch.__version__,
               **{name: version(name) for name in ("transformers", "tiktoken", "tokenizers", "trl")}}
    folder = Path(C.work_dir)
    write_text(folder / "results.json", json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    write_text(folder / "table.md", table(rows) + "\n" + ", ".join(f"{k} {v}" for k, v in machine.items()) + "\n")
    if any(row.ratio for row in rows):
        draw(rows, folder / "bench.png")
    sys.stdout.write((folder / "table.md").read_text())


if __name__ == "__main__":
    run_script(main)
