"""
Stage 3, PPO: the sft model learns to write summaries that the reward model likes, and not to forget
where it came from.

    python projects/summarize_rlhf/ppo.py        after sft.py and reward.py, with the same options
"""

import functools

import pipeline
import report
import reward
from pipeline import Run

from mingpt import evaluation
from mingpt.checkpoint import run_script
from mingpt.config import CfgNode as CN
from mingpt.model import GPT
from mingpt.rlhf import PPOTrainer, RewardModel, ValueModel, choose
from mingpt.utils import set_seed


def main(run: Run) -> None:
    """PPO, and what came of it."""
    run.stages.run("ppo", functools.partial(ppo, run))
    report.write(run)


def ppo(run: Run) -> PPOTrainer:
    """A trainer for the policy, from the sft model. Its episodes begin with the training texts."""
    config, tokenizer = run.config, run.corpus.tokenizer
    set_seed(config.system.seed + 4)
    policy = pipeline.load_model(run, "sft")
    reference = pipeline.load_model(run, "sft")
    judges = reward.load(run)
    options = run.stages.trainer_config("ppo")
    # The value function begins as the reward model (Stiennon et al. 2020), unless it is a head on
    # the policy's own trunk.
    value_model = None
    if has_value_function(options) and not options.shared_trunk:
        value_model = ValueModel.from_gpt(judges["reward"])
    trainer = PPOTrainer(
        options,
        policy,
        judges["reward"],
        [row["prompt"] for row in run.corpus.rows["train"]],
        value_model=value_model,
        ref_policy=reference,
        tokenizer=tokenizer,
    )
    look = functools.partial(look_at_held_out, run, policy, reference, judges)
    trainer.add_callback("on_batch_end", look)
    return trainer


def has_value_function(options: CN) -> bool:
    """Whether the algorithm learns a value function."""
    return choose(options).advantage == "gae"


def look_at_held_out(
    run: Run,
    policy: GPT,
    reference: GPT,
    judges: dict[str, RewardModel],
    trainer: PPOTrainer,
) -> None:
    """Now and then: the policy's KL and what its judges think of it, on held-out texts."""
    config = run.config
    is_due = (trainer.iter_num + 1) % config.report.every == 0
    if not is_due or trainer.rank > 0:
        return
    rows = pipeline.draw_rows(config, run.corpus.rows["valid"], config.report.looked_at)
    prompts = [row["prompt"] for row in rows]
    seed = config.system.seed  # the same each time
    samples = pipeline.summarize(config, policy, run.corpus.tokenizer, prompts, seed)
    for name, judge in judges.items():
        trainer.metrics[f"eval/{name}"] = evaluation.score(samples, judge).mean().item()
    trainer.metrics["eval/kl"] = evaluation.kl(samples, reference, config.ppo.temperature)


if __name__ == "__main__":
    run_script(lambda args: main(pipeline.prepare(args, __doc__)))
