"""
Stage 3, PPO: the sft model learns to write summaries that the reward model likes, and not to forget
where it came from.

    python projects/summarize_rlhf/ppo.py        after sft.py and reward.py, with the same options
"""

import functools

import pipeline
import report
import reward
from mingpt import evaluation
from mingpt.checkpoint import run_script
from mingpt.model import GPT
from mingpt.rlhf import PPOTrainer, RewardModel, ValueModel, choose
from mingpt.utils import set_seed
from pipeline import Run


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
    reward_models = reward.load(run)
    options = run.stages.trainer_config("ppo")
    # Only generalised advantage estimation needs a value function. It begins as the reward model
    # (Stiennon et al. 2020), unless it is a head on the policy's own trunk.
    value_model = None
    if choose(options).advantage == "gae" and not options.shared_trunk:
        value_model = ValueModel.from_gpt(reward_models["reward"])
    trainer = PPOTrainer(
        options,
        policy,
        reward_models["reward"],
        [row["prompt"] for row in run.corpus.rows["train"]],
        value_model=value_model,
        ref_policy=reference,
        tokenizer=tokenizer,
    )
    look = functools.partial(look_at_held_out, run, policy, reference, reward_models)
    trainer.add_callback("on_batch_end", look)
    return trainer


def look_at_held_out(
    run: Run,
    policy: GPT,
    reference: GPT,
    reward_models: dict[str, RewardModel],
    trainer: PPOTrainer,
) -> None:
    """Now and then: what reward model and judge think of held-out summaries, and their KL."""
    config = run.config
    is_due = (trainer.iter_num + 1) % config.report.every == 0
    if not is_due or trainer.rank > 0:
        return
    rows = pipeline.draw_rows(config, run.corpus.rows["valid"], config.report.looked_at)
    prompts = [row["prompt"] for row in rows]
    seed = config.system.seed  # the same each time
    samples = pipeline.summarize(config, policy, run.corpus.tokenizer, prompts, seed)
    for name, model in reward_models.items():
        trainer.metrics[f"eval/{name}"] = evaluation.score(samples, model).mean().item()
    trainer.metrics["eval/kl"] = evaluation.kl(samples, reference, config.ppo.temperature)


if __name__ == "__main__":
    run_script(lambda args: main(pipeline.prepare(args, __doc__)))
