"""
Benchmarks of a PPO iteration and its phases, against trl's PPOTrainer.

Both sides have the same models, batch, lengths and number of epochs. Policy, value model and reward
model are GPTs of one size with random weights. A prompt is one token, and no episode ends early.
Both sides compute in fp32, on a card too, because trl's trainer does its rollout and its scoring in
fp32.
"""

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from unittest import mock

from measure import DEVICE, Case, Run, now
from mingpt.config import CfgNode
from mingpt.rlhf import PPOTrainer, RewardModel
from mingpt.utils import import_extra
from models import SIZES, our_gpt, their_config, their_gpt

EPOCHS = 4  # of one minibatch each


def iteration(config: CfgNode) -> Iterator[Case]:
    """An iteration, and how it grows with the number of episodes, their length and the model.

    trl cannot share a trunk between policy and value function, so its side is the same there.
    """
    sizes = [
        # preset, episodes, length, shared_trunk, slow
        ("gpt-micro", 128, 32, False, False),
        ("gpt-micro", 128, 32, True, False),
        ("gpt-micro", 256, 32, False, True),
        ("gpt-micro", 128, 63, False, True),
        ("gpt-mini", 128, 32, False, True),
    ]
    for preset, episodes, length, shared_trunk, slow in sizes:
        suffix = ", shared trunk" if shared_trunk else ""
        yield Case(
            work=f"PPO iteration, {preset}, {episodes} episodes of {length} tokens{suffix}",
            unit="iterations",
            amount=1,
            ours=partial(our_iteration, preset, episodes, length, shared_trunk),
            peer="trl",
            theirs=partial(their_iteration, preset, episodes, length),
            slow=slow,
        )


class Stopwatch:
    """Splits an iteration into its phases by noting when certain functions return."""

    def __init__(self):
        self.moments: dict[str, float] = {}

    def note_end_of(self, phase: str, function: Callable) -> Callable:
        """Wrap a function: whenever it returns, the phase has ended."""

        def noting(*args, **kwargs):
            result = function(*args, **kwargs)
            self.moments[phase] = now()
            return result

        return noting

    def time_phases(self, run: Callable[[], object]) -> dict[str, float]:
        """Seconds of run() as a whole ("") and of each phase."""
        start = now()
        run()
        end = now()
        rollout_end = self.moments["rollout"]
        scoring_end = self.moments["scoring"]
        return {
            "": end - start,
            "rollout": rollout_end - start,
            "scoring": scoring_end - rollout_end,
            "update": end - scoring_end,
        }


# ----------------------------------------------------------------------------------------------
# this library


def our_iteration(preset: str, episodes: int, length: int, shared_trunk: bool) -> Run:
    config = PPOTrainer.get_default_config()
    config.merge_from_dict(
        {
            "device": str(DEVICE),
            "precision": "fp32",
            "batch_size": episodes,
            "max_new_tokens": length,
            "max_iters": 1,
            "ppo_epochs": EPOCHS,
            "shared_trunk": shared_trunk,
        }
    )
    policy = our_gpt(preset)
    reward_model = RewardModel.from_gpt(our_gpt(preset))
    trainer = PPOTrainer(config, policy, reward_model, prompts=[[1]])

    # The trainer's rollout() samples with the policy's generate(), and then scores what it sampled.
    watch = Stopwatch()
    policy.generate = watch.note_end_of("rollout", policy.generate)
    trainer.rollout = watch.note_end_of("scoring", trainer.rollout)

    def run() -> dict[str, float]:
        config.max_iters = trainer.iter_num + 1
        return watch.time_phases(trainer.run)

    return run


# ----------------------------------------------------------------------------------------------
# trl


def their_iteration(preset: str, episodes: int, length: int) -> Run:
    with contextlib.redirect_stderr(io.StringIO()):  # trl warns that its PPO is experimental
        import_extra("trl", "bench")
        trl_ppo = import_extra("trl.experimental.ppo.ppo_trainer", "bench")
    trainer = their_trainer(trl_ppo, preset, episodes, length)

    # Their rollout ends with batch_generation(), their scoring with whitening the advantages.
    watch = Stopwatch()
    generate = watch.note_end_of("rollout", trl_ppo.batch_generation)
    whiten = watch.note_end_of("scoring", trl_ppo.masked_whiten)

    def run() -> dict[str, float]:
        with (
            mock.patch.multiple(trl_ppo, batch_generation=generate, masked_whiten=whiten),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            return watch.time_phases(trainer.train)

    return run


def their_trainer(trl_ppo: ModuleType, preset: str, episodes: int, length: int):
    """trl's PPOTrainer for one iteration: its total_episodes are those of one batch."""
    transformers = import_extra("transformers", "bench")
    datasets = import_extra("datasets", "bench")
    args = trl_ppo.PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=episodes,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        response_length=length,
        total_episodes=episodes,
        local_rollout_forward_batch_size=episodes,
        temperature=1.0,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=DEVICE.type == "cpu",
        bf16=False,
    )
    pad_token = last_token(preset)
    policy = their_gpt(preset, pad_token)

    def scalar_model():
        config = their_config(preset, pad_token, num_labels=1)
        return transformers.GPT2ForSequenceClassification(config)

    return trl_ppo.PPOTrainer(
        args,
        processing_class=their_tokenizer(preset),
        model=policy,
        ref_model=copy.deepcopy(policy),
        reward_model=scalar_model(),
        train_dataset=datasets.Dataset.from_dict({"input_ids": [[1]] * episodes}),
        value_model=scalar_model(),
    )


def their_tokenizer(preset: str):
    """A tokenizer whose words are numbers: trl needs one to pad and to decode."""
    tokenizers = import_extra("tokenizers", "bench")
    transformers = import_extra("transformers", "bench")
    pad_token = last_token(preset)
    vocabulary = {str(i): i for i in range(pad_token + 1)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="0")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        pad_token=str(pad_token),
        eos_token=str(pad_token - 1),
    )


def last_token(preset: str) -> int:
    vocab_size, _ = SIZES[preset]
    return vocab_size - 1
