"""
Benchmarks of a PPO iteration, by phase, against trl's PPOTrainer on the same models, batch, lengths and epochs.

Policy, value model and reward model are GPTs of one size with random weights; a prompt is one token, and no episode ends early.
On a card, too, both sides compute in fp32: trl's trainer leaves its rollout and its scoring there.
"""

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

from measure import DEVICE, Case, Run, now
from mingpt.rlhf import PPOTrainer, RewardModel
from mingpt.config import CfgNode as CN
from mingpt.utils import import_extra
from models import SIZES, our_gpt, their_config, their_gpt


class Stopwatch:
    """Moments of an iteration, by name."""

    def __init__(self):
        self.moments = {}

    def after(self, name: str, f: Callable) -> Callable:
        """f, which notes when it has returned."""
        def timed(*args, **kwargs):
            result = f(*args, **kwargs)
            self.moments[name] = now()
            return result
        return timed

    def phases(self, run: Callable) -> dict[str, float]:
        """Seconds of run() in all and by phase; rollout and scoring must have been noted."""
        start = now()
        run()
        end, rollout, scoring = now(), self.moments["rollout"], self.moments["scoring"]
        return {"": end - start, "rollout": rollout - start, "scoring": scoring - rollout, "update": end - scoring}


def ours(preset: str, episodes: int, length: int, shared_trunk: bool) -> Run:
    config = PPOTrainer.get_default_config()
    config.merge_from_dict({"device": str(DEVICE), "precision": "fp32", "batch_size": episodes, "max_new_tokens": length, "max_iters": 1, "ppo_epochs": 4,
                            "shared_trunk": shared_trunk})
    policy, watch = our_gpt(preset), Stopwatch()
    trainer = PPOTrainer(config, policy, RewardModel.from_gpt(our_gpt(preset)), [[1]])
    policy.generate = watch.after("rollout", policy.generate)
    trainer.rollout = watch.after("scoring", trainer.rollout)

    def run():
        config.max_iters = trainer.iter_num + 1
        return watch.phases(trainer.run)
    return run


def theirs(preset: str, episodes: int, length: int) -> Run:
    with contextlib.redirect_stderr(io.StringIO()):
        import_extra("trl", "bench")
        module, datasets = import_extra("trl.experimental.ppo.ppo_trainer", "bench"), import_extra("datasets", "bench")
    transformers, tokenizers = import_extra("transformers", "bench"), import_extra("tokenizers", "bench")
    pad = SIZES[preset][0] - 1
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(pad + 1)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(pad), eos_token=str(pad - 1))
    scalar = lambda: transformers.GPT2ForSequenceClassification(their_config(preset, pad_token_id=pad, num_labels=1))
    args = module.PPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=episodes, num_mini_batches=1, num_ppo_epochs=4,
                            response_length=length, total_episodes=episodes, local_rollout_forward_batch_size=episodes, temperature=1.0,
                            num_sample_generations=0, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=DEVICE.type == "cpu", bf16=False)
    policy = their_gpt(preset, pad_token_id=pad)
    trainer = module.PPOTrainer(args, tokenizer, policy, copy.deepcopy(policy), scalar(), datasets.Dataset.from_dict({"input_ids": [[1]] * episodes}),
                                scalar())
    watch = Stopwatch()
    generation, whiten = watch.after("rollout", module.batch_generation), watch.after("scoring", module.masked_whiten)

    def run():
        with mock.patch.multiple(module, batch_generation=generation, masked_whiten=whiten), contextlib.redirect_stdout(io.StringIO()):
            return watch.phases(trainer.train)
    return run


def iteration(C: CN) -> Iterator[Case]:
    """An iteration of 4 epochs of one minibatch, and how it grows with the number of episodes, their length and the model; trl has no shared trunk."""
    for preset, episodes, length, shared in (("gpt-micro", 128, 32, False), ("gpt-micro", 128, 32, True), ("gpt-micro", 256, 32, False),
                                             ("gpt-micro", 128, 63, False), ("gpt-mini", 128, 32, False)):
        name = f"PPO iteration, {preset}, {episodes} episodes of {length} tokens{', shared trunk' * shared}"
        yield Case(name, "iterations", 1, lambda p=preset, e=episodes, n=length, s=shared: ours(p, e, n, s), "trl",
                   lambda p=preset, e=episodes, n=length: theirs(p, e, n), slow=(preset, episodes, length) != ("gpt-micro", 128, 32))
