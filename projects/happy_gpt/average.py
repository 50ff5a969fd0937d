"""
The mean of several runs' weights: one policy that pays less KL for its reward than each of them.

    python projects/happy_gpt/average.py --runs=out/happy_gpt,out/seed_1,out/seed_2

Runs of PPO from the same sft model, with other seeds, go the same way, and each strays a little
from it by chance. In the mean of their weights, chance has less to say (Ramé et al. 2024, "WARP",
arXiv:2406.16768). --scale=1.1 then goes ten per cent further away from the sft model, or, below 1,
back towards it: more reward for more KL, or less for less. The policy is written to --out.
"""

from pathlib import Path

import torch

import preferences
import report
from mingpt.chars import CharTokenizer
from mingpt.checkpoint import run_script
from mingpt.config import CfgNode as CN, check_numbers, parse_args
from mingpt.model import GPT
from mingpt.rlhf import TextReward


def main(args):
    config = CN(
        runs="",
        reference="out/happy_gpt/sft/model",
        scale=1.0,
        out="out/average",
        samples=2048,
        seed=1,
    )
    parse_args(config, args, __doc__)
    check_numbers(config, "samples", low=1, whole=True)
    check_numbers(config, "scale", low=0)
    folders = [Path(run) / "rl" / "model" for run in config.runs.split(",") if run]
    if not folders:
        raise ValueError("--runs is empty: give the folders of finished runs, FOLDER,FOLDER")
    for folder in (Path(config.reference), *folders):
        if not folder.exists():
            raise ValueError(f"there is no {folder}: it comes with a finished run of happy_gpt.py")

    reference = GPT.from_pretrained(config.reference)
    policy = average(reference, [GPT.from_pretrained(folder) for folder in folders], config.scale)
    tokenizer = CharTokenizer.from_pretrained(config.reference)
    policy.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)

    reward_fn = TextReward(preferences.vader(), tokenizer)
    tweets = report.sample_tweets(policy, tokenizer, config.samples, config.seed, reward_fn)
    kl = report.kl_to(reference, tweets)
    length, distinct = report.mean_length(tweets), report.share_distinct(tweets)
    print("\n".join(tweets.texts[:10]))
    print(
        f"\nreward {tweets.rewards.mean():.3f} at {kl:.2f} nats, {length:.1f} characters, "
        f"{distinct:.1%} distinct; the model is in {config.out}"
    )


@torch.no_grad()
def average(reference: GPT, policies: list[GPT], scale: float = 1.0) -> GPT:
    """reference + scale · (the mean of the policies - reference), weight by weight.

    ValueError for policies whose weights have other shapes than those of the reference.
    """
    result = GPT(reference.config)
    others = [dict(policy.named_parameters()) for policy in policies]
    starts = dict(reference.named_parameters())
    for name, weight in result.named_parameters():
        ends = [parameters[name] for parameters in others if name in parameters]
        if len(ends) != len(policies) or any(end.shape != weight.shape for end in ends):
            raise ValueError(f"the runs' models differ in {name}: they need the same sft model")
        mean = torch.stack(ends).mean(0)
        weight.copy_(starts[name] + scale * (mean - starts[name]))
    return result.eval()


if __name__ == "__main__":
    run_script(main)
