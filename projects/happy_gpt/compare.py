"""
The runs behind readme.md's tables and plots that compare one thing with another.

    python projects/happy_gpt/compare.py family       the algorithms, at equal numbers of tweets
    python projects/happy_gpt/compare.py options      PPO with one option changed at a time
    python projects/happy_gpt/compare.py human        PPO against a reward model, by kl_coef

All start from the same sft model: that of a finished run in out/happy_gpt (for human, of a run with
--rl.reward=human in out/human), or in another --base=FOLDER. A finished run is not repeated.
--only=NAME,NAME makes just these runs, and --flags="--a=b --c=d" passes more options to all.
"""

import subprocess
import sys
from pathlib import Path

import happy_gpt
import report
from mingpt.checkpoint import read_json, run_script
from mingpt.config import CfgNode as CN, parse_args
from mingpt.plots import plot_metrics
from mingpt.run_folder import read_metrics
from mingpt.stages import is_finished


def flags(options: dict) -> list[str]:
    """The command line of some options of rl."""
    return [f"--rl.{name}={value}" for name, value in options.items()]


# PPO before it had shaping. What some options do was measured on it.
EARLIER = happy_gpt.UNSHAPED | {"shared_trunk": False}
SHORT = flags(EARLIER | {"max_iters": 40})
HUMAN = [
    "--rl.reward=human",
    "--rl.kl_target=None",  # one penalty throughout
    "--rl.max_iters=150",
]
FAMILY_RUNS = {
    "ppo": [],
    "ppo seed 1": ["--rl.seed=1"],
    "ppo seed 2": ["--rl.seed=2"],
    "ppo without shaping": flags(EARLIER),
    "reinforce": ["--rl.algorithm=reinforce"],
    "reinforce without baseline": ["--rl.algorithm=reinforce", "--rl.whiten_advantages=False"],
    "rloo": ["--rl.algorithm=rloo"],
    # The paper averages over completions first; this is the variant of the figures in readme.md.
    "grpo, token mean": ["--rl.algorithm=grpo", "--rl.loss_mean=token"],
    "dpo": ["--rl.algorithm=dpo"],
    "best of 16": ["--rl.algorithm=best_of_n", "--rl.group_size=16"],
}
OPTIONS_RUNS = {
    "as it is": SHORT,
    "shared_trunk": [*SHORT, "--rl.shared_trunk=True"],
    "whiten_rewards": [*SHORT, "--rl.whiten_rewards=True"],
    "missing_eos_penalty 0.5": [*SHORT, "--rl.missing_eos_penalty=0.5"],
    "four epochs": [*SHORT, "--rl.ppo_epochs=4"],
    "four epochs with approxkl_max 0.0001": [
        *SHORT,
        "--rl.ppo_epochs=4",
        "--rl.approxkl_max=0.0001",
    ],
}
HUMAN_RUNS = {
    f"kl_coef {kl_coef:g}": [*HUMAN, f"--rl.kl_coef={kl_coef:g}"]
    for kl_coef in (0.3, 0.1, 0.05, 0.02, 0.0)
}
RUNS = {"family": FAMILY_RUNS, "options": OPTIONS_RUNS, "human": HUMAN_RUNS}


def main(args):
    comparison = args.pop(0) if args and not args[0].startswith("-") else None
    base = "out/human" if comparison == "human" else "out/happy_gpt"
    config = CN(base=base, out="out/compare", only="", flags="")
    parse_args(config, args, __doc__)
    if comparison not in RUNS:
        raise ValueError(f"say first what to compare: {', '.join(RUNS)}")
    runs = RUNS[comparison]
    chosen = config.only.split(",") if config.only else list(runs)
    unknown = sorted(set(chosen) - set(runs))
    if unknown:
        raise ValueError(
            f"--only has {', '.join(unknown)}, which does not exist: choose from {', '.join(runs)}"
        )

    folders = {name: Path(config.out) / comparison / name.replace(" ", "_") for name in runs}
    for name in chosen:
        if not (folders[name] / "summary.json").exists():
            flags = [*runs[name], *config.flags.split()]
            run(Path(config.base), folders[name], flags, human=comparison == "human")
    done = {
        name: folder for name, folder in folders.items() if (folder / "summary.json").exists()
    }
    print(table(done))
    plot(comparison, done, Path(config.out) / f"{comparison}.png")


def run(base: Path, folder: Path, flags: list[str], human: bool) -> None:
    """Run happy_gpt.py with these flags, from the stages before rl that are finished in base."""
    last_stage = "judge" if human else "sft"
    if not is_finished(base / last_stage):
        reward = " with --rl.reward=human" if human else ""
        raise ValueError(
            f"the stage {last_stage} is not finished in {base}: run happy_gpt.py there "
            f"first{reward}, or name the folder of such a run with --base"
        )
    script = Path(__file__).with_name("happy_gpt.py")
    options = [f"--base={base}", f"--system.work_dir={folder}", *flags]
    result = subprocess.run([sys.executable, script, *options])
    if result.returncode:
        raise ValueError(
            f"the run in {folder} failed: repair that, and the same command continues from there"
        )


def rl_rows(folder: Path) -> list[dict]:
    """The metrics of a run's rl stage."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["stage"] == "rl"]


# --------------------------------------------------------------------------------------------------
# tables and plots


def table(folders: dict[str, Path]) -> str:
    """The runs' figures in Markdown."""
    summaries = {
        name: read_json(folder / "summary.json")
        for name, folder in folders.items()
    }
    found = {key for summary in summaries.values() for key in summary}
    judges = sorted(found & {"judge_rl", "vader_rl"})
    columns = ["reward", "KL, nats", "best possible KL", "length", "distinct", *judges]
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, summary in summaries.items():
        bound = "" if rl_rows(folders[name]) else "≤ "  # of best-of-n, the KL is only bounded
        cells = [
            f"{summary['reward_rl']:.3f}",
            f"{bound}{summary['kl_rl']:.2f}",
            report.number(summary["kl_optimal"]),
            f"{summary['length_rl']:.1f}",
            f"{summary['unique_rl']:.1%}",
            *(f"{summary[judge]:.3f}" for judge in judges),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(comparison: str, folders: dict[str, Path], path: Path) -> None:
    """Reward against KL, from the looks that each run took at fresh tweets now and then."""
    looks = {
        name: [row for row in rl_rows(folder) if "eval/kl" in row]
        for name, folder in folders.items()
    }
    if comparison == "human":
        plot_over_optimization(looks, path)
        return
    any_folder = next(iter(folders.values()))
    rewards = read_json(any_folder / "reference_rewards.json", list)
    curves = {
        name: ([row["eval/kl"] for row in rows], [row["eval/scores"] for row in rows])
        for name, rows in looks.items()
        if rows
    }
    panels = {"reward against KL": {**curves, **report.yardsticks(rewards)}}
    plot_metrics(path, panels, xlabel="KL to the sft model, nats per tweet")


def plot_over_optimization(looks: dict[str, list[dict]], path: Path) -> None:
    """What the reward model says and what others say, against √KL, as in Gao et al. 2022.

    Of all runs at their ends, and of the run without a penalty on its way.
    """
    ends = sorted((rows[-1] for rows in looks.values() if rows), key=lambda row: row["eval/kl"])
    coefficients = ", ".join(looks).replace("kl_coef ", "")
    panels = {
        f"score at the end of each run (kl_coef {coefficients})": learned_rewards(ends),
        "VADER's score at the end of each run": {"VADER": against_root_kl(ends, "vader")},
    }
    if looks.get("kl_coef 0"):
        on_its_way = learned_rewards(looks["kl_coef 0"])
        panels["score during the run without a penalty (kl_coef 0)"] = on_its_way
    plot_metrics(path, panels, xlabel="√KL to the sft model (nats per tweet)")


def learned_rewards(rows: list[dict]) -> dict[str, tuple[list, list]]:
    """The curves of the reward model, which the policy climbs, and of the judge."""
    return {
        "the reward model": against_root_kl(rows, "scores"),
        "the judge": against_root_kl(rows, "judge"),
    }


def against_root_kl(rows: list[dict], judge: str) -> tuple[list[float], list[float]]:
    """(√KL, what the judge says)."""
    return [row["eval/kl"] ** 0.5 for row in rows], [row[f"eval/{judge}"] for row in rows]


if __name__ == "__main__":
    run_script(main)
