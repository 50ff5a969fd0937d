"""
All of RLHF, on summaries, as in Stiennon et al. 2020 (arXiv:2009.01325).

    python projects/summarize_rlhf/summarize_rlhf.py

runs the three scripts below, one after the other, on docstrings: without a download, with a small
GPT, on a CPU. Other texts go with

    --data=tldr --system.work_dir=out/tldr               TL;DR with GPT-2, for a GPU
    --data.path=mine.jsonl --system.work_dir=out/mine    texts of your own

  1. sft.py      a GPT learns to write the author's summary
  2. reward.py   a reward model learns which of two summaries is better, and so does a judge
  3. ppo.py      the GPT learns to write what the reward model likes; the judge says if it is better

Each script also runs by itself. The same command continues a run that was interrupted, and skips
the stages that are finished.
"""

import pipeline
import ppo
import reward
import sft
from mingpt.checkpoint import run_script


def main(args: list[str]) -> None:
    run = pipeline.prepare(args, __doc__)
    for stage in (sft, reward, ppo):
        stage.main(run)


if __name__ == "__main__":
    run_script(main)
