"""
Stage 3, PPO: the sft model learns to write summaries that the reward model likes, and not to forget where it came from.

    python projects/summarize_rlhf/ppo.py                   after sft.py and reward.py, with the same options
"""

import evaluation
import pipeline
import reward
from mingpt.checkpoint import run_script
from mingpt.rlhf import PPOTrainer, ValueModel
from mingpt.utils import set_seed


def run(config, corpus):
    """PPO, and what came of it."""
    pipeline.run_stage(config, "ppo", lambda: ppo(config, corpus))
    evaluation.write(config, corpus)


def ppo(config, corpus):
    """From the sft model. Episodes begin with the training texts; the value function's trunk is the reward model's, or the policy's own."""
    set_seed(config.system.seed + 4)
    policy, reference = (pipeline.load_model(config, corpus.tokenizer, "sft") for _ in range(2))
    reward_model, judge = reward.load(config, corpus).values()
    C = pipeline.trainer_config(config, "ppo", max_new_tokens=config.data.summary_tokens)
    trainer = PPOTrainer(C, policy, reward_model, [row["prompt"] for row in corpus.rows["train"]], ref_policy=reference,
                         value_model=None if C.shared_trunk or C.algorithm != "ppo" else ValueModel.from_gpt(reward_model),
                         tokenizer=corpus.tokenizer)
    held_out = [row["prompt"] for row in pipeline.some(config, corpus.rows["valid"], config.report.looked_at)]

    def look(trainer):
        """Now and then: what reward model and judge say of held-out texts' summaries."""
        if (trainer.iter_num + 1) % config.report.every == 0 and trainer.rank == 0:
            written = pipeline.summarize(config, policy, corpus.tokenizer, held_out, config.system.seed)
            trainer.metrics |= {"eval/reward": pipeline.judged(reward_model, written).mean().item(),
                                "eval/judge": pipeline.judged(judge, written).mean().item(),
                                "eval/kl": pipeline.kl_to(reference, written, C.temperature)}

    trainer.add_callback("on_batch_end", look)
    return trainer


if __name__ == "__main__":
    run_script(lambda args: run(*pipeline.prepare(args, __doc__)))
