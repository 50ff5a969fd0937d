"""
The runs behind the tables and plots of readme.md that compare one thing with another, each from the same sft model.

    python projects/happy_gpt/compare.py family       the algorithms, at equal numbers of sampled tweets
    python projects/happy_gpt/compare.py options      PPO with one option changed at a time
    python projects/happy_gpt/compare.py human        PPO against a reward model, at one kl_coef after the other

needs a finished out/happy_gpt (human: one of --rl.reward=human, in out/human) to take the stages before rl from. A run that is finished is
not repeated; --only=NAME,NAME makes just these runs, and --flags="--a=b --c=d" passes more options to all.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import report
from mingpt.checkpoint import run_script
from mingpt.run_folder import read_metrics
from mingpt.config import CfgNode as CN, parse_args
from mingpt.plots import plot_metrics
from stages import require

SHORT = ["--rl.max_iters=40"]
HUMAN = ["--rl.reward=human", "--rl.kl_target=None", "--rl.max_iters=150", "--rl.shared_trunk=True"]  # one penalty throughout
RUNS = {
    "family": {
        "ppo": [], "ppo seed 1": ["--system.seed=1"], "ppo seed 2": ["--system.seed=2"],
        "reinforce": ["--rl.algorithm=reinforce"], "reinforce without baseline": ["--rl.algorithm=reinforce", "--rl.baseline=False"],
        "rloo": ["--rl.algorithm=rloo"], "grpo": ["--rl.algorithm=grpo"], "dpo": ["--rl.algorithm=dpo"],
        "best of 16": ["--rl.algorithm=best_of_n", "--rl.group_size=16"]},
    "options": {
        "as it is": SHORT, "shared_trunk": [*SHORT, "--rl.shared_trunk=True"], "whiten_rewards": [*SHORT, "--rl.whiten_rewards=True"],
        "missing_eos_penalty 0.5": [*SHORT, "--rl.missing_eos_penalty=0.5"], "four epochs": [*SHORT, "--rl.ppo_epochs=4"],
        "four epochs with approxkl_max 0.0001": [*SHORT, "--rl.ppo_epochs=4", "--rl.approxkl_max=0.0001"]},
    "human": {f"kl_coef {beta:g}": [*HUMAN, f"--rl.kl_coef={beta:g}"] for beta in (0.3, 0.1, 0.05, 0.02, 0.0)},
}


def main(args):
    what = args.pop(0) if args and not args[0].startswith("-") else None
    config = CN(base="out/human" if what == "human" else "out/happy_gpt", out="out/compare", only="", flags="")
    parse_args(config, args, __doc__)
    if what not in RUNS:
        raise ValueError(f"say first what to compare: {', '.join(RUNS)}")
    chosen = config.only.split(",") if config.only else list(RUNS[what])
    if unknown := set(chosen) - set(RUNS[what]):
        raise ValueError(f"--only={config.only}: {', '.join(sorted(unknown))} is none of {', '.join(RUNS[what])}")
    folders = {name: Path(config.out) / what / name.replace(" ", "_") for name in RUNS[what]}
    for name in chosen:
        if not (folders[name] / "summary.json").exists():
            run(Path(config.base), folders[name], [*RUNS[what][name], *config.flags.split()])
    done = {name: folder for name, folder in folders.items() if (folder / "summary.json").exists()}
    print(table(done))
    plot(what, done, Path(config.out) / f"{what}.png")


def run(base, folder, flags):
    """happy_gpt.py with these flags, from the stages before rl that base has finished."""
    require(base, "sft")
    for stage in ("pretrain", "sft", "trunk", "reward", "judge"):
        if (base / stage).exists():
            shutil.copytree(base / stage, folder / stage, dirs_exist_ok=True)
    command = [sys.executable, Path(__file__).with_name("happy_gpt.py"), f"--system.work_dir={folder}", *flags]
    if subprocess.run(command).returncode:
        raise ValueError(f"the run in {folder} failed: mend that, and the same command goes on from there")


def table(folders):
    """The runs' figures in Markdown."""
    rows = {name: json.loads((folder / "summary.json").read_text(encoding="utf-8")) for name, folder in folders.items()}
    judges = sorted({key for row in rows.values() for key in row if key in ("judge_rl", "vader_rl")})
    lines = [f"| | reward | KL, nats | best possible KL | length | distinct |{''.join(f' {judge} |' for judge in judges)}", "| --- |" + " ---: |" * (5 + len(judges))]
    for name, row in rows.items():
        kl = f"{'' if (folders[name] / 'rl').exists() else '≤ '}{row['kl_rl']:.2f}"  # best of n has but a bound
        optimal = "-" if row["kl_optimal"] is None else f"{row['kl_optimal']:.2f}"
        lines.append(f"| {name} | {row['reward_rl']:.3f} | {kl} | {optimal} | {row['length_rl']:.1f} | {row['unique_rl']:.1%} |"
                     f"{''.join(f' {row[judge]:.3f} |' for judge in judges)}")
    return "\n".join(lines)


def plot(what, folders, path):
    """Reward against KL, from the looks that each run took at 256 fresh tweets now and then."""
    looks = {name: [row for row in read_metrics(folder / "rl" / "metrics.jsonl") if "eval/kl" in row] for name, folder in folders.items()}
    if what == "human":
        return plot_over_optimization(looks, path)
    rewards = json.loads((next(iter(folders.values())) / "reference_rewards.json").read_text(encoding="utf-8"))
    curves = {name: ([row["eval/kl"] for row in rows], [row["eval/scores"] for row in rows]) for name, rows in looks.items() if rows}
    plot_metrics(path, {"reward against KL": {**curves, **report.yardsticks(rewards)}}, xlabel="KL to the sft model, nats per tweet")


def plot_over_optimization(looks, path):
    """What the reward model says and what others say, against the root of the KL, as in Gao et al. 2022: of all runs' ends, and on one run's way."""
    ends = sorted((rows[-1] for rows in looks.values() if rows), key=lambda row: row["eval/kl"])
    curve = lambda rows, judge: ([row["eval/kl"] ** 0.5 for row in rows], [row[f"eval/{judge}"] for row in rows])
    learned = lambda rows: {"the reward model": curve(rows, "scores"), "the judge": curve(rows, "judge")}
    panels = {f"the runs' ends: {', '.join(looks)}".replace("kl_coef ", ""): learned(ends), "their ends, by VADER": {"VADER": curve(ends, "vader")}}
    if looks.get("kl_coef 0"):
        panels["the way of kl_coef 0"] = learned(looks["kl_coef 0"])
    plot_metrics(path, panels, xlabel="√KL to the sft model (nats per tweet)")


if __name__ == "__main__":
    run_script(main)
