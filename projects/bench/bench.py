"""
How fast this library is, next to what one would use instead and to what the machine can do.

    python projects/bench/bench.py                        everything: 15 minutes on two CPU cores
    python projects/bench/bench.py --only=decode,bpe      some of the benchmarks
    python projects/bench/bench.py --quick                the most important cases: two minutes

A benchmark is a list of cases. A case is one piece of work, such as a training step, that both
this library ("ours") and another one ("theirs", the peer) can do. The cases are in training.py,
decoding.py, ppo.py, adapters.py and text.py. How they are timed is in measure.py and sides.py.
report.py makes the table and the plot.

The speed of a machine drifts, so the two sides of a case take turns (A B A B ...), each in a
process of its own, and the result is the ratio of their median times. The limits of the machine
are measured in the same run. The results go to out/bench: results.json, table.md and bench.png.
"""

import logging
from pathlib import Path

import adapters
import decoding
import ppo
import report
import text
import training
from measure import Row
from mingpt.checkpoint import run_script
from mingpt.config import CfgNode, documented, parse_args
from mingpt.utils import log_to_console, set_seed
from sides import SideFailed, compare, serve

logger = logging.getLogger("mingpt.bench")

# Each of these yields the cases of one benchmark, always in the same order.
BENCHMARKS = {
    "train": training.train,
    "loop": training.loop,
    "decode": decoding.decode,
    "load": decoding.load,
    "ppo": ppo.iteration,
    "lora": adapters.train,
    "grpo": adapters.grpo,
    "memory": adapters.ppo,
    "bpe": text.encoding,
    "vocabulary": text.vocabulary,
}


@documented
def get_config() -> CfgNode:
    """Every option and its default."""
    config = CfgNode()
    config.work_dir = "out/bench"
    config.only = ""  # names of benchmarks, separated by commas; empty for all of them
    config.quick = False
    config.repeat = 5  # timed runs of each side, after one warm-up run that does not count
    config.bpe_megabytes = 10
    config.side = ""  # set by the script itself: "decode 0 ours" is one side of the first case
    return config


def main(args: list[str]) -> None:
    config = get_config()
    parse_args(config, args, __doc__)
    benchmarks = selected_benchmarks(config)
    set_seed(0)

    # The script starts itself again for each side of each case: such a process works on demand.
    if config.side:
        benchmark, number, side = config.side.split()
        cases = list(BENCHMARKS[benchmark](config))
        serve(cases[int(number)], side)
        return

    log_to_console()
    rows = []
    for benchmark in benchmarks:
        rows += run(benchmark, config)
    report.write(rows, Path(config.work_dir))


def selected_benchmarks(config: CfgNode) -> list[str]:
    """The names in --only, or all names where it is empty."""
    if not config.only:
        return list(BENCHMARKS)
    names = config.only.split(",")
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        allowed = ", ".join(BENCHMARKS)
        raise ValueError(f"got --only={config.only} with {unknown}; expected some of {allowed}")
    return names


def run(benchmark: str, config: CfgNode) -> list[Row]:
    """The rows of one benchmark. A case that fails on this machine is left out with a warning."""
    rows = []
    for number, case in enumerate(BENCHMARKS[benchmark](config)):
        if config.quick and case.slow:
            continue
        try:
            rows += compare(benchmark, number, case, config)
        except SideFailed as error:
            logger.warning("%s is left out: %s", case.work, error)
    return rows


if __name__ == "__main__":
    run_script(main)
