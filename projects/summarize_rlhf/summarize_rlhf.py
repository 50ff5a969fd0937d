"""
The whole of RLHF on summaries, as in Stiennon et al. 2020 (arXiv:2009.01325): fine-tune, learn a reward from comparisons, PPO.

    python projects/summarize_rlhf/summarize_rlhf.py                        docstrings: no download, a small GPT, a CPU will do
    python projects/summarize_rlhf/summarize_rlhf.py --data=tldr --system.work_dir=out/tldr        GPT-2 on TL;DR, with a GPU
    python projects/summarize_rlhf/summarize_rlhf.py --data.path=mine.jsonl --system.work_dir=out/mine

  1. sft.py      a GPT learns to write the author's summary
  2. reward.py   a reward model learns which of two summaries is better, and so does a judge
  3. ppo.py      the GPT learns to write what the reward model likes; the judge says whether that is better

Each can be run by itself. A run that was interrupted goes on where it stopped; what is finished is skipped.
"""

import pipeline
import ppo
import reward
import sft
from mingpt.checkpoint import run_script


def main(args):
    config, corpus = pipeline.prepare(args, __doc__)
    for stage in (sft, reward, ppo):
        stage.run(config, corpus)


if __name__ == "__main__":
    run_script(main)
