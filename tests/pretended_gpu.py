"""
A device that refuses what Apple's GPUs refuse, for a machine that has none.

    python -m tests.pretended_gpu      runs each of the JOBS on it, and prints {job: error or ""}

Its tensors are computed by the CPU, behind a wrapper that says it is on the device "apple", and
every operation on them is looked at first. Refused are

- tensors of float64 or complex128, which Metal does not have;
- a tensor of the CPU beside one of the device (numbers, and indices, may come from the CPU);
- a generator of random numbers that belongs to another device;
- numpy() without cpu(), and a copy that Python does not wait for.

PyTorch registers a device for the whole process, so this file runs in a process of its own.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import TensorDataset

from mingpt import evaluation
from mingpt.chars import CharTokenizer
from mingpt.datasets import Comparisons, Completions
from mingpt.rlhf import (
    ALGORITHMS,
    ActorCritic,
    DPOLoss,
    PPOTrainer,
    RewardModel,
    TextReward,
    ValueModel,
    comparison_loss,
)
from mingpt.trainer import Trainer
from tests.common import tiny_gpt

NAME = "apple"
COPIES = {"copy_", "_to_copy"}  # from one device to another
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # takes indices of the CPU


class Backend(backend_registration._DummyBackendModule):
    """What PyTorch asks of a device: torch.apple."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
DEVICE = torch.device(NAME, 0)


class OnDevice(torch.Tensor):
    """A tensor on the device; its numbers are in `inner`, a tensor of the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self) -> None:
        raise TypeError("can't convert a tensor on the device to numpy: use cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Within, tensors can be made on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func: Any, args: tuple, kwargs: dict) -> Any:
    """Check one operation, and have the CPU do it. Its results are on the device if they would be.
    """
    name = func._schema.name.removeprefix("aten::")
    leaves = tree_flatten((args, kwargs))[0]
    ours = [x for x in leaves if isinstance(x, OnDevice)]
    target = kwargs.get("device")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        is_ours = torch.device(target).type == NAME
    elif name == "copy_":
        is_ours = isinstance(args[0], OnDevice)
    else:
        is_ours = bool(ours)
    if ours or is_ours:
        check(name, leaves, wait=not kwargs.get("non_blocking"))

    inner_args, inner_kwargs = tree_map(
        lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs)
    )
    result = func(*inner_args, **inner_kwargs)
    # What an operation changes in place is the tensor that it was given.
    given = {id(x.inner): x for x in ours}

    def on_device(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not is_ours:
            return x
        if x.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{name}: the device does not support {x.dtype}")
        return given[id(x)] if id(x) in given else OnDevice(x)

    return tree_map(on_device, result)


def check(name: str, leaves: list, wait: bool) -> None:
    """TypeError or RuntimeError for what the device refuses to compute with."""
    if not wait:
        raise RuntimeError(f"{name}: a copy that nobody waits for may give wrong numbers")
    for x in leaves:
        is_foreign = isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) and x.dim() > 0
        if is_foreign and name not in COPIES | INDEXING:
            raise RuntimeError(f"{name}: a tensor {tuple(x.shape)} of the CPU beside the device's")


# torch's own, which are replaced below
CPU_GENERATOR = torch.Generator
MULTINOMIAL = torch.multinomial


class DeviceGenerator:
    """A generator of random numbers that belongs to the device."""

    device = DEVICE

    def __init__(self):
        self.inner = CPU_GENERATOR()

    def manual_seed(self, seed: int) -> "DeviceGenerator":
        self.inner.manual_seed(seed)
        return self


class EitherGenerator(type(torch._C.Generator)):
    """Has isinstance(generator, torch.Generator) be true for those of both devices."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, (CPU_GENERATOR, DeviceGenerator))


class Generator(torch._C.Generator, metaclass=EitherGenerator):
    """Stands in for torch.Generator."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return DeviceGenerator() if torch.device(device).type == NAME else CPU_GENERATOR(device)


def multinomial(probs: torch.Tensor, n: int, generator: Any = None) -> torch.Tensor:
    """Stands in for torch.multinomial, the one operation that draws from a generator."""
    if generator is None:
        return MULTINOMIAL(probs, n)
    if isinstance(probs, OnDevice) != isinstance(generator, DeviceGenerator):
        raise RuntimeError(f"expected a generator of {probs.device}, not of {generator.device}")
    return MULTINOMIAL(probs, n, generator=getattr(generator, "inner", generator))


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within, the device is there."""
    # torch.tensor(numbers, device=...) shall make them on the CPU first, and module.to(...) keep
    # the parameters that are tied.
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    with (
        Device(),
        mock.patch.object(torch, "Generator", Generator),
        mock.patch.object(torch, "multinomial", multinomial),
    ):
        yield


# --------------------------------------------------------------------------------------------------
# the jobs

TOKENIZER = CharTokenizer("abcdefghi ")  # with <|endoftext|>, the 11 tokens of tiny_gpt


def options(trainer_class: type[Trainer], **changes: Any) -> Any:
    config = trainer_class.get_default_config()
    config.merge_from_dict({"device": NAME, "max_iters": 2, "batch_size": 8, **changes})
    return config


def language_model() -> None:
    """Training with evaluations, micro-batches and clipping."""
    idx = torch.randint(11, (16, 9))
    data = TensorDataset(idx[:, :-1], idx[:, 1:])
    config = options(Trainer, eval_every=1, micro_batch_size=4, grad_norm_clip=0.1)
    trainer = Trainer(config, tiny_gpt(resid_pdrop=0.1), data, data)
    trainer.run()
    assert isinstance(trainer.model.lm_head.weight, OnDevice)
    assert not any(group["fused"] for group in trainer.optimizer.param_groups)
    assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight


def demonstrations() -> None:
    """Supervised fine-tuning."""
    rows = [{"prompt": "ab", "completion": "cde"}, {"prompt": "a", "completion": "bc"}] * 8
    data = Completions(rows, TOKENIZER, 12)
    Trainer(
        options(Trainer),
        tiny_gpt(),
        data,
        collate_fn=Completions.collate,
        weight_fn=Completions.weight,
    ).run()


def comparisons() -> Comparisons:
    rows = [{"prompt": "ab", "chosen": "cde", "rejected": "fghi"}] * 8
    return Comparisons(rows, TOKENIZER, 12)


def reward_model() -> None:
    """A reward model, its normalisation included."""
    model = RewardModel.from_gpt(tiny_gpt())
    Trainer(
        options(Trainer),
        model,
        comparisons(),
        loss_fn=comparison_loss,
        collate_fn=Comparisons.collate,
    ).run()
    for scores in (torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 4.0], device=NAME)):
        model.normalize(scores, unit_variance=True)


def preference_losses() -> None:
    """DPO, IPO and SimPO."""
    for loss in ("dpo", "ipo", "simpo"):
        policy = tiny_gpt()
        loss_fn = DPOLoss(None if loss == "simpo" else policy, loss=loss)
        Trainer(
            options(Trainer),
            ActorCritic(policy),
            comparisons(),
            loss_fn=loss_fn,
            collate_fn=Comparisons.collate,
        ).run()


def count_a(completions: list[str], **kwargs: Any) -> list[float]:
    return [text.count("a") - 0.5 for text in completions]


def ppo_family() -> None:
    """Every algorithm of the table, with a reward of text, and prompts of different lengths."""
    for name, row in ALGORITHMS.items():
        changes = {"algorithm": name, "max_new_tokens": 4, "log_every": 1}
        if row.advantage == "gae":
            changes |= {"whiten_rewards": True, "micro_batch_size": 4}
        trainer = PPOTrainer(
            options(PPOTrainer, **changes),
            tiny_gpt(),
            TextReward([count_a, count_a], TOKENIZER),
            prompts=["ab", "abc", "d", "e"],
            tokenizer=TOKENIZER,
        )
        trainer.run()
        trainer.samples()


def shared_trunk() -> None:
    """A value head on the policy's trunk, and a reward model."""
    policy = tiny_gpt()
    PPOTrainer(
        options(PPOTrainer, shared_trunk=True, max_new_tokens=4, kl_target=1.0, approxkl_max=0.1),
        policy,
        RewardModel.from_gpt(policy),
        prompts=["ab", "abc"],
        tokenizer=TOKENIZER,
    ).run()


def generation() -> None:
    """Sampling from a generator, with padding and stop tokens; and past the context."""
    model = tiny_gpt().to(NAME)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]], device=NAME)
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]], device=NAME)
    model.generate(prompts, 20)
    model.generate(
        prompts,
        4,
        do_sample=True,
        top_k=5,
        top_p=0.9,
        attention_mask=padding,
        stop_token=[3, 4],
        generator=torch.Generator(NAME).manual_seed(1),
        return_log_probs=True,
    )


def llama() -> None:
    """PPO of a Llama, with a window and scaled positions, and its generation with padding."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 6,
    }
    policy = tiny_gpt(
        architecture="llama",
        n_kv_head=1,
        query_key_norm=True,
        sliding_window=3,
        rope_scaling=scaling,
    )
    PPOTrainer(
        options(PPOTrainer, group_size=2, max_new_tokens=4),
        policy,
        RewardModel.from_gpt(policy),
        prompts=["ab", "abc"],
        value_model=ValueModel.from_gpt(policy),
        tokenizer=TOKENIZER,
    ).run()
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]], device=NAME)
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]], device=NAME)
    policy.generate(prompts, 6, attention_mask=padding)


def assessment() -> None:
    """Samples, their rewards, their KL, and the best of some."""
    policy, reference = tiny_gpt().to(NAME), tiny_gpt(seed=1).to(NAME)
    for reward_fn in (TextReward(count_a, TOKENIZER), RewardModel.from_gpt(reference).to(NAME)):
        samples = evaluation.sample(
            policy,
            ["ab", "abc"],
            4,
            tokenizer=TOKENIZER,
            max_new_tokens=5,
            stop_strings=["a"],
            reward_fn=reward_fn,
        )
        evaluation.kl(samples, reference)
        best = evaluation.best_of_each(samples, 4)
        evaluation.win_rate(best.rewards, samples.rewards[::4])


def float64_tensor() -> None:
    torch.ones(2, device=NAME).double()


def numbers_of_float64() -> None:
    torch.tensor([1.0], dtype=torch.float64).to(NAME)


def two_devices() -> None:
    torch.ones(2, device=NAME) + torch.ones(2)


def foreign_generator() -> None:
    torch.multinomial(torch.ones(2, device=NAME), 1, generator=torch.Generator())


def numpy_of_the_device() -> None:
    torch.ones(2, device=NAME).numpy()


def copy_without_waiting() -> None:
    torch.ones(2).to(NAME, non_blocking=True)


JOBS = (
    language_model,
    demonstrations,
    reward_model,
    preference_losses,
    ppo_family,
    shared_trunk,
    generation,
    llama,
    assessment,
)
REFUSED = (
    float64_tensor,
    numbers_of_float64,
    two_devices,
    foreign_generator,
    numpy_of_the_device,
    copy_without_waiting,
)


def main() -> None:
    errors = {}
    with pretended_gpu():
        for job in (*JOBS, *REFUSED):
            try:
                job()
                errors[job.__name__] = ""
            except Exception as error:  # whatever it is, the test shows it
                errors[job.__name__] = f"{type(error).__name__}: {error}"[:600]
    sys.stdout.write(json.dumps(errors, indent=1))


if __name__ == "__main__":
    main()
