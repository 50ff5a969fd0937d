"""
The training loop. It knows nothing of language or of GPT: a model, a dataset and a loss are enough.

    trainer = Trainer(config, model, train_dataset)
    trainer.run()

One iteration fetches a batch, computes the loss, steps the optimizer and calls the
callbacks. Every so many iterations it also evaluates, logs a row of metrics and saves a
checkpoint. Each of these is a method, so that a subclass can replace one and keep the others;
PPOTrainer in rlhf.py is such a subclass. Read `run` and `iteration` first; the sections after
them hold what they call.

With a `work_dir`, a run can be killed at any moment and continued. A checkpoint holds the
weights, the optimizer, the random states and the number of iterations done. That number is
enough to find the place in the data, because (seed, i) alone decides which examples form
batch i. So a continued run ends with the same weights, bit for bit on the CPU, as a run that
was never interrupted.

Under `torchrun`, each process takes a part of every batch, and DistributedDataParallel (DDP)
combines their gradients.
"""

import contextlib
import itertools
import logging
import math
import numbers
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate

from mingpt import distributed
from mingpt.checkpoint import (
    check_rng_state,
    deferred_signals,
    follow_the_parent,
    get_rng_state,
    interrupt_without_traceback,
    raise_signal,
    set_rng_state,
)
from mingpt.config import (
    CfgNode as CN,
    check_booleans,
    check_is_config,
    check_numbers,
    documented,
)
from mingpt.progress import Progress, console
from mingpt.run_folder import RunFolder, base_checksum, check_fits, trained_state
from mingpt.shuffle import shuffled
from mingpt.utils import (
    adamw,
    check_optimizer_options,
    keep_freed_memory,
    pick_device,
    pick_precision,
    set_seed,
)

logger = logging.getLogger("mingpt")

# Metrics that the Trainer itself logs. A loss_fn cannot use these names.
OWN_METRICS = {"iter", "loss", "lr", "grad_norm", "tokens/s", "seconds"}

# What a callback can be called on.
EVENTS = ("on_train_begin", "on_batch_end", "on_evaluate", "on_log", "on_train_end")

# Options that a continued run may change. Any other change would make it a different run. (It may
# also train longer, unless the learning rate's schedule depends on the end: see `resume`.)
FREE_TO_CHANGE = {
    "device",
    "num_workers",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "tensorboard",
    "work_dir",
}


class Trainer:
    """Trains `model` on `train_dataset` with AdamW.

    train_dataset, valid_dataset: map-style datasets, with a length and items by index.
    loss_fn(model, batch): calls model(...) and returns the loss, or (loss, dict of metrics). By
        default the loss is `model(*batch)[-1]`, as GPT returns it.
    collate_fn(items): makes a batch (a tuple of tensors) from a list of items, as in a
        DataLoader.
    weight_fn(batch): how many terms the loss of a batch is a mean over. These weights let the
        losses of a batch's parts add up to the loss of the whole batch. If your loss_fn is a
        mean over tokens, weight_fn must count those tokens. By default it counts examples, or
        with the default loss the targets that are not ignored.

    Trained are those parameters of the model that require gradients; a checkpoint holds only them.
    Raises ValueError or TypeError for options or data that cannot be used, before training begins.
    """

    # What a run knows of itself, for callbacks to read. Iterations are counted from 0: during
    # iteration i, iter_num is i.
    iter_num = 0                      # iterations done
    iter_time = 0.0                   # when the last iteration ended
    iter_dt = 0.0                     # how long the last iteration took, in seconds
    seconds = 0.0                     # of training, in all
    resumed_seconds = 0.0             # ... of them before this process started
    tokens = 0                        # trained on since then, by all processes
    loss: Tensor | None = None        # of the last iteration, a detached scalar
    valid_loss: float | None = None   # of the last evaluation
    best_valid_loss = math.inf        # of all evaluations

    @staticmethod
    @documented
    def get_default_config() -> CN:
        """Every option and its default."""
        C = CN()
        # The machine.
        C.device = "auto"            # auto is cuda, else mps, else cpu
        C.precision = "auto"         # fp32, bf16 or fp16; auto: bf16 on a GPU that has it
        C.compile = False            # torch.compile the model: starts later, runs faster
        C.num_workers = 0            # processes that load data beside the one that trains
        # How long, and how much at a time.
        C.max_iters = None           # stop after this many iterations
        C.epochs = None              # stop after this many passes over the data
        C.batch_size = 64            # examples per optimizer step, in all processes together
        C.micro_batch_size = None    # examples per forward and backward pass; None: all at once
        # The optimizer, AdamW.
        C.learning_rate = 3e-4       # its highest value
        C.lr_schedule = "constant"   # constant; or decay until the end: linear or cosine
        C.lr_final_fraction = 0.0    # of the learning rate, where a decay ends
        C.warmup_iters = 0           # iterations in which the learning rate rises from 0
        C.betas = (0.9, 0.95)        # decay of the means of gradients and of their squares
        C.eps = 1e-8                 # keeps a division by the second mean from exploding
        C.weight_decay = 0.1         # on the weights of matrix products only
        C.grad_norm_clip = 1.0       # largest norm of the gradient; None or 0: no limit
        # What is kept, every so many iterations.
        C.work_dir = None            # folder for metrics.jsonl and checkpoints; None: keep nothing
        C.log_every = 10             # a row of metrics
        C.eval_every = None          # an evaluation; None: never
        C.checkpoint_every = 500     # a checkpoint
        C.tensorboard = False        # write the metrics for TensorBoard, too
        return C

    def __init__(
        self,
        config: CN,
        model: nn.Module,
        train_dataset: Any,
        valid_dataset: Any = None,
        loss_fn: Callable | None = None,
        collate_fn: Callable | None = None,
        weight_fn: Callable | None = None,
    ):
        self.check_config(config)
        check_functions(model, loss_fn=loss_fn, collate_fn=collate_fn, weight_fn=weight_fn)
        self.config = config
        self.train_dataset = train_dataset
        self.valid_dataset = valid_dataset
        self.loss_fn = loss_fn or default_loss
        self.collate_fn = collate_fn or stack_examples
        self.weight_fn = weight_fn or (count_examples if loss_fn else count_targets)
        self.callbacks: dict[str, list[Callable]] = defaultdict(list)

        # Join the other processes, if torchrun has started any. Then check everything.
        self.device = distributed.join(pick_device(config.device))
        self.rank = distributed.rank()
        self.world_size = distributed.world_size()
        self.check_config(config, self.world_size)
        self.check_data()
        self.folder = RunFolder(config.work_dir, config.tensorboard)
        self.run_name = Path(config.work_dir).name if config.work_dir else "training"

        # The model and its optimizer. With several processes, every training loss goes through
        # the forward of DDP's wrapper, which exchanges the gradients.
        keep_freed_memory()  # trains faster on a CPU
        self.precision = pick_precision(config.precision, self.device)
        check_trained(model)
        self.model = model.to(self.device)
        self.base_checksum = base_checksum(model)  # a resumed run must have the same base
        if config.compile:
            model.compile()
        make_optimizer = getattr(model, "configure_optimizers", None)
        self.optimizer = make_optimizer(config) if make_optimizer else adamw(model, config)
        self.wrapped = DistributedDataParallel(model) if self.world_size > 1 else model
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

        # The seed that rank 0 has set last decides which examples form batch i, for all
        # processes. For dropout and sampling each process needs random numbers of its own.
        self.seed = distributed.gather(torch.initial_seed())[0]
        if self.rank > 0:
            set_seed(self.seed + self.rank)

        self.metrics: dict[str, float] = {}  # the row of the last iteration

    # -- callbacks, as in minGPT -------------------------------------------------------------------

    def add_callback(self, onevent: str, callback: Callable) -> None:
        """Call callback(trainer) on an event, after the callbacks that it has already."""
        check_event(onevent, callback)
        self.callbacks[onevent].append(callback)

    def set_callback(self, onevent: str, callback: Callable) -> None:
        """Call only callback(trainer) on an event, and no earlier callback."""
        check_event(onevent, callback)
        self.callbacks[onevent] = [callback]

    def trigger_callbacks(self, onevent: str) -> None:
        """Call the callbacks of an event, in the order in which they were added."""
        for callback in self.callbacks[onevent]:
            callback(self)

    # -- the loop ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until max_iters or epochs is reached. Starts from the checkpoint, if any.

        Ctrl-C finishes the iteration, saves a checkpoint and raises KeyboardInterrupt, which ends
        a script without a traceback. SIGTERM does the same and raises SystemExit(143). ValueError
        if another run is writing to work_dir.
        """
        is_silent = self.rank > 0  # one process speaks for all
        check_optimizer(self.optimizer)
        with console(is_silent), interrupt_without_traceback(), self.folder.in_use():
            self.model.train()
            self.resume()
            self.announce()
            batches = self.batches()
            self.trigger_callbacks("on_train_begin")
            self.iter_time = time.time()
            progress = Progress(self.run_name, self.max_iters, self.iter_num, is_silent)
            # Signals wait until the iteration is finished.
            with progress, deferred_signals() as signals:
                while self.max_iters is None or self.iter_num < self.max_iters:
                    self.iteration(next(batches))
                    progress.update(self.watched())
                    self.stop_if_asked(signals)
            self.save_checkpoint()
            self.trigger_callbacks("on_train_end")

    def iteration(self, batch: tuple) -> None:
        """Everything that happens for one batch."""
        # Set the learning rate. A group of parameters may train at a multiple of it.
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate() * group.get("lr_ratio", 1.0)

        # Learn from the batch.
        self.metrics = self.train_step(batch)

        # Keep time. It includes what followed the last step: callbacks, evaluation, saving.
        now = time.time()
        self.iter_dt = now - self.iter_time
        self.iter_time = now
        self.seconds += self.iter_dt
        seconds_since_start = self.seconds - self.resumed_seconds
        self.metrics["tokens/s"] = self.tokens / max(seconds_since_start, 1e-9)

        # Callbacks still see the number of this iteration. After that, it counts as done.
        self.trigger_callbacks("on_batch_end")
        self.iter_num += 1
        self.after_step()

    def train_step(self, batch: tuple) -> dict:
        """Learn from a batch, with one optimizer step. Returns the metrics."""
        # The first tensor is the model's input: for a language model, its tokens.
        self.tokens += batch[0].numel() * self.world_size
        return self.optimizer_step(self.micro_batches(batch))

    def after_step(self) -> None:
        """Evaluate, log and save: each of them if it is due after this iteration."""
        if self.valid_dataset is not None and self.is_due(self.config.eval_every):
            self.evaluate()
            logger.info(
                "%s: iteration %d, train loss %.4f, validation loss %.4f",
                self.run_name,
                self.iter_num,
                self.metrics["loss"],
                self.valid_loss,
            )
        # An iteration after which the model was evaluated is always logged.
        if self.is_due(self.config.log_every) or "valid_loss" in self.metrics:
            row = {"iter": self.iter_num, **self.metrics, "seconds": round(self.seconds, 3)}
            self.folder.log(row)
            self.trigger_callbacks("on_log")
        # The last checkpoint is saved by run().
        if self.is_due(self.config.checkpoint_every) and self.iter_num != self.max_iters:
            self.save_checkpoint()

    def is_due(self, every: int | None) -> bool:
        """Whether something is due that happens every so many iterations, and at the end.

        None: it never happens.
        """
        if not every:
            return False
        return self.iter_num % every == 0 or self.iter_num == self.max_iters

    def stop_if_asked(self, signals: list[int]) -> None:
        """End the run after this iteration if any process has received Ctrl-C or SIGTERM."""
        # Add up over the processes, so that all of them stop after the same iteration.
        received = [float(len(signals)), float(signals.count(signal.SIGTERM))]
        all_signals, terminations = distributed.total(received)
        if all_signals:
            self.save_checkpoint()
            result = "nothing is kept: no work_dir"
            if self.folder.path:
                result = f"saved in {self.folder.path}: the same command continues from there"
            logger.info("%s: stopped after iteration %d, %s", self.run_name, self.iter_num, result)
            raise_signal(signal.SIGTERM if terminations else signal.SIGINT)

    def announce(self) -> None:
        """Say how long the run is, and where its files go."""
        length = "until interrupted" if self.max_iters is None else f"{self.max_iters} iterations"
        place = f"kept in {self.folder.path}" if self.folder.path else "not kept: no work_dir"
        logger.info("%s: %s on %s, %s", self.run_name, length, self.device, place)

    def watched(self) -> dict[str, float]:
        """The few metrics that are shown to a person while the run goes on."""
        watched = {"loss": self.metrics["loss"]}
        if self.valid_loss is not None:
            watched["valid_loss"] = self.valid_loss
        return watched

    @property
    def max_iters(self) -> int | None:
        """Iterations in all: to max_iters or epochs, whichever comes first. None: no end.

        If the last epoch ends inside a batch, the whole of that batch is trained on.
        """
        ends = []
        if self.config.max_iters is not None:
            ends.append(self.config.max_iters)
        if self.config.epochs is not None:
            examples = self.config.epochs * len(self.train_dataset)
            ends.append(math.ceil(examples / self.examples_per_batch))
        return min(ends, default=None)

    @property
    def examples_per_batch(self) -> int:
        """Examples of the dataset that a batch takes, in all processes together."""
        return self.config.batch_size

    # -- batches -----------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple]:
        """This process's part of each batch from iter_num on, on the device. Never ends."""
        part_size = self.config.batch_size // self.world_size
        first = self.rank * part_size
        indices = (batch[first : first + part_size] for batch in self.batch_indices())
        # Loading workers may draw random numbers (to augment the data, say). Their seed is
        # another one in each process and after each resume, so that no numbers are repeated.
        worker_seed = (self.seed + self.rank + 10**6 * self.iter_num) % 2**63
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=indices,
            num_workers=self.config.num_workers,
            generator=torch.Generator().manual_seed(worker_seed),
            collate_fn=self.collate_fn,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=follow_the_parent,
        )
        return map(self.to_device, loader)

    def batch_indices(self) -> Iterator[list[int]]:
        """The dataset indices of each batch, of all processes together. Never ends.

        The batches come from pass after pass over the data, each pass in a new random order.
        """
        # Begin where the iterations so far have ended: after so many passes over the data, and
        # so many examples of the next one.
        examples_seen = self.iter_num * self.examples_per_batch
        epoch, examples_done = divmod(examples_seen, len(self.train_dataset))
        examples = self.shuffled_examples(epoch, examples_done)
        while True:
            yield list(itertools.islice(examples, self.examples_per_batch))

    def shuffled_examples(self, epoch: int, skip: int) -> Iterator[int]:
        """Dataset indices: an epoch without its first `skip` ones, then all later epochs."""
        while True:
            # The order of an epoch depends on the seed and the epoch's number alone.
            seed = (self.seed + epoch) % 2**63
            yield from shuffled(len(self.train_dataset), seed, skip)
            epoch += 1
            skip = 0

    def to_device(self, batch: tuple) -> tuple:
        """The batch on the device. TypeError unless it is a tuple of equally long tensors."""
        check_batch(batch)
        # A copy may go on in the background if its source is pinned memory: see `batches`.
        is_pinned = self.device.type == "cuda"
        return tuple(x.to(self.device, non_blocking=is_pinned) for x in batch)

    def micro_batches(self, batch: Any) -> list[tuple[float, Any]]:
        """Split a batch into micro-batches. Returns (share, micro-batch) pairs.

        A micro-batch's share is its weight over the weight of the whole batch, in all
        processes. So the loss of the batch is the sum of each micro-batch's loss times its
        share.
        """
        size = self.config.micro_batch_size or len(batch[0])
        splits = [x.split(size) for x in batch]  # of each tensor
        micro_batches = list(zip(*splits, strict=True))
        weights = [checked_weight(self.weight_fn(micro_batch)) for micro_batch in micro_batches]
        [total_weight] = distributed.total([float(sum(weights))])
        if total_weight == 0:
            total_weight = 1.0  # nothing counts: all shares are 0, not 0 / 0
        shares = [weight / total_weight for weight in weights]
        return list(zip(shares, micro_batches, strict=True))

    # -- the optimizer step ------------------------------------------------------------------------

    def optimizer_step(self, micro_batches: Iterable[tuple[float, Any]]) -> dict[str, float]:
        """One step of the optimizer on the (share, micro-batch) pairs of a batch.

        Returns loss, lr, grad_norm, and the metrics of the loss_fn. Raises FloatingPointError
        if the loss or the gradient is not finite, before any weight has changed.
        """
        # Add up the gradients of all micro-batches, and the loss and metrics with them.
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Any] = defaultdict(float)
        pairs = list(micro_batches)
        for i, (share, micro_batch) in enumerate(pairs):
            is_last = i == len(pairs) - 1
            with self.gradient_exchange(is_last):
                loss, extra = self.compute_loss(self.wrapped, micro_batch)
                # DDP divides the sum over the processes by their number. We want the sum.
                self.scaler.scale(loss * (share * self.world_size)).backward()
            for name, value in {"loss": loss.detach(), **extra}.items():
                # Without any weight, a micro-batch's loss may be NaN, a mean over nothing.
                contribution = share * value if share else 0.0
                sums[name] += contribution

        # Clip the gradient, after undoing the scaling that fp16 needs.
        self.scaler.unscale_(self.optimizer)
        max_norm = self.config.grad_norm_clip or math.inf  # None or 0: no limit
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

        # Each process has summed up over its own part of the batch.
        totals = distributed.total([float(value) for value in sums.values()])
        metrics = dict(zip(sums, totals, strict=True))
        metrics |= {"lr": self.learning_rate(), "grad_norm": float(grad_norm)}
        self.loss = torch.tensor(metrics["loss"])

        # Take the step, if it is finite.
        self.check_finite(metrics)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return metrics

    def gradient_exchange(self, is_last: bool) -> contextlib.AbstractContextManager:
        """The context for a micro-batch's forward and backward pass.

        With several processes, DDP exchanges the gradients in a backward pass. Once a batch is
        enough: in the last one, when the gradients of all micro-batches have been added up.
        """
        if isinstance(self.wrapped, DistributedDataParallel) and not is_last:
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    def compute_loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict]:
        """(loss, metrics) of a batch, in the precision that was asked for."""
        with self.autocast():
            result = self.loss_fn(model, batch)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        check_loss(loss, metrics)
        return loss, metrics

    def autocast(self) -> torch.autocast:
        """The context in which matrix products have the precision that was asked for."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def check_finite(self, metrics: dict[str, float]) -> None:
        """FloatingPointError if the loss or the gradient's norm is NaN or infinite."""
        # In fp16 the gradient may overflow. Then the scaler skips the step and lowers its scale.
        may_overflow = self.scaler.is_enabled()
        gradient_is_fine = math.isfinite(metrics["grad_norm"]) or may_overflow
        if math.isfinite(metrics["loss"]) and gradient_is_fine:
            return
        raise FloatingPointError(
            f"iteration {self.iter_num}: loss {metrics['loss']}, gradient norm "
            f"{metrics['grad_norm']}, learning rate {metrics['lr']:.3g}. This step has changed no "
            "weight, and the last checkpoint is still there. Look for a learning rate that is too "
            "high, a missing warmup, or NaN in the data"
        )

    def learning_rate(self) -> float:
        """The learning rate of the current iteration.

        It rises linearly for warmup_iters iterations. Then it is constant, or decays linearly
        or along half a cosine to lr_final_fraction of itself.
        """
        config = self.config
        if self.iter_num < config.warmup_iters:
            return config.learning_rate * (self.iter_num + 1) / config.warmup_iters
        if config.lr_schedule == "constant":
            return config.learning_rate

        # How far the decay has come, from 0 to 1, and how much of it remains, from 1 to 0.
        assert self.max_iters is not None  # check_config requires an end for a decay
        iters_after_warmup = max(1, self.max_iters - config.warmup_iters)
        progress = (self.iter_num - config.warmup_iters) / iters_after_warmup
        if config.lr_schedule == "linear":
            remaining = 1 - progress
        else:
            remaining = (1 + math.cos(math.pi * progress)) / 2
        final = config.lr_final_fraction
        return config.learning_rate * (final + (1 - final) * remaining)

    # -- evaluation --------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over valid_dataset, by the weights of weight_fn, as in training.

        The metrics of the loss_fn are averaged in the same way. They go into the current row of
        metrics as `valid_<name>`, the loss as `valid_loss`. If this is the lowest valid_loss so
        far, the weights are saved as best.pt in work_dir.
        """
        # Without dropout, and without DDP's wrapper: each process evaluates its own batches.
        was_training = self.model.training
        self.model.eval()
        sums: dict[str, float] = defaultdict(float)
        total_weight = 0.0
        for batch in self.validation_batches():
            weight = checked_weight(self.weight_fn(batch))
            if not weight:
                continue  # the loss may be NaN, a mean over nothing
            loss, extra = self.compute_loss(self.model, batch)
            for name, value in {**extra, "loss": loss}.items():
                sums[name] += weight * float(value)
            total_weight += weight
        self.model.train(was_training)

        # The means over all the data, and whether the loss is the best so far.
        means = weighted_means(sums, total_weight)
        self.metrics |= {f"valid_{name}": mean for name, mean in means.items()}
        self.valid_loss = means.get("loss", math.nan)  # NaN where no batch had any weight
        if self.valid_loss < self.best_valid_loss:
            self.best_valid_loss = self.valid_loss
            self.folder.save_best(trained_state(self.model), self.model_options())
        self.trigger_callbacks("on_evaluate")
        return self.valid_loss

    def validation_batches(self) -> Iterator[tuple]:
        """This process's batches of valid_dataset, in order, on the device."""
        # As many examples at once as in training.
        size = self.config.micro_batch_size or self.config.batch_size // self.world_size
        indices = range(len(self.valid_dataset))
        # The processes take turns: rank 0 the first batch, rank 1 the second, and so on.
        starts = indices[self.rank * size :: self.world_size * size]
        loader = DataLoader(
            self.valid_dataset,
            batch_sampler=(list(indices[start : start + size]) for start in starts),
            collate_fn=self.collate_fn,
            # A loader draws a random number when it starts. It gets a generator of its own, so
            # that an evaluation does not change the training that follows.
            generator=torch.Generator(),
        )
        return map(self.to_device, loader)

    # -- checkpoints and resume --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continued run needs.

        With several processes all must call it, because each has random states of its own.
        """
        return {
            "iter_num": self.iter_num,
            "seed": self.seed,
            "best_valid_loss": self.best_valid_loss,
            "seconds": self.seconds,
            "finished": self.iter_num == self.max_iters,
            "config": self.config.to_dict(),
            "rng": distributed.gather(get_rng_state()),
            "model": trained_state(self.model),
            "base_checksum": self.base_checksum,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "model_args": self.model_options(),
            "examples": len(self.train_dataset),
        }

    def model_options(self) -> dict[str, Any] | None:
        """The options of the model (for PPO, of the policy); None if it has no config.

        They go into the checkpoint under nanoGPT's name, where `from_pretrained` looks for them.
        """
        model = getattr(self.model, "policy", self.model)
        config = getattr(model, "config", None)
        return config.to_dict() if isinstance(config, CN) else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        ValueError for another model or a dataset of another length, before anything changes.
        """
        self.check_state(state)
        self.iter_num = state["iter_num"]
        self.seed = state["seed"]
        self.best_valid_loss = state["best_valid_loss"]
        self.seconds = state["seconds"]
        self.resumed_seconds = state["seconds"]
        # check_state has compared the names. What is frozen is not among them.
        self.model.load_state_dict(state["model"], strict=self.base_checksum is None)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"][self.rank])

    def check_state(self, state: dict[str, Any]) -> None:
        """ValueError unless the state is of a run with this model and as much data."""
        check_fits(state, self.model, self.optimizer, self.folder.checkpoint)
        if state.get("base_checksum") != self.base_checksum:
            raise ValueError(
                f"{self.folder.path} holds a run on other frozen weights: start from the same "
                "model, or choose another work_dir"
            )
        check_rng_state(state["rng"][self.rank], self.folder.checkpoint)
        # Older checkpoints do not say how many examples there were.
        examples = state.get("examples", len(self.train_dataset))
        if examples != len(self.train_dataset):
            raise ValueError(
                f"{self.folder.path} holds a run on {examples} examples, and now train_dataset has "
                f"{len(self.train_dataset)}: put the data back, or choose another work_dir"
            )

    def save_checkpoint(self) -> None:
        """Write work_dir/checkpoint.pt, completely or not at all.

        FloatingPointError for weights that are not finite; the last checkpoint then stays.
        """
        if not self.config.work_dir:
            return
        self.folder.check_finite(self.model, self.iter_num)
        self.folder.save_checkpoint(self.state_dict())

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        ValueError if it is from a run with other options, apart from those that may change.
        """
        may_change = set(FREE_TO_CHANGE)
        if self.config.lr_schedule == "constant":
            # The run may get another end. (A decay depends on the end from its beginning.)
            may_change |= {"max_iters", "epochs"}
        state = self.folder.load_checkpoint(
            self.config, may_change, self.effective_options, self.check_state
        )
        if state is None:
            return
        self.load_state_dict(state)
        if self.iter_num:  # a script may save its model as it is before the first iteration
            logger.info(
                "%s: continues from %s, after iteration %d",
                self.run_name,
                self.folder.checkpoint,
                self.iter_num,
            )

    # -- checks ------------------------------------------------------------------------------------

    @classmethod
    def effective_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a config or a checkpoint, completed with defaults.

        A checkpoint lacks the options that were added to the Trainer after it was saved.
        """
        return cls.get_default_config().to_dict() | options

    @classmethod
    def check_config(cls, config: CN, world_size: int = 1) -> None:
        """ValueError for options that are unknown, missing, out of range or contradictory.

        It needs no trainer, so a script can check the options of a run long before the run.
        """
        check_is_config(config, cls.__name__)
        # The names. A misspelt option would otherwise be ignored without a word.
        known = vars(cls.get_default_config())
        unknown = sorted(vars(config).keys() - known.keys())
        if unknown:
            raise ValueError(f"{cls.__name__} has no options {unknown}; it has {sorted(known)}")
        missing = sorted(known.keys() - vars(config).keys())
        if missing:
            raise ValueError(
                f"the config lacks the options {missing} of {cls.__name__}: begin with "
                f"{cls.__name__}.get_default_config()"
            )

        # The values, each by itself.
        limits = ("max_iters", "micro_batch_size")
        intervals = ("log_every", "eval_every", "checkpoint_every")
        check_numbers(config, *limits, *intervals, low=1, whole=True, optional=True)
        check_numbers(config, "batch_size", low=1, whole=True)
        check_numbers(config, "num_workers", whole=True)
        check_numbers(config, "epochs", "grad_norm_clip", optional=True)
        check_numbers(config, "lr_final_fraction", "warmup_iters")
        check_optimizer_options(config)
        check_booleans(config, "compile", "tensorboard")

        # The values, as they go together.
        check_schedule(config)
        if config.batch_size % world_size:
            raise ValueError(
                f"batch_size={config.batch_size} cannot be divided equally among {world_size} "
                "processes: choose a multiple"
            )

    def check_data(self) -> None:
        """ValueError for data that cannot be trained on."""
        datasets = {"train_dataset": self.train_dataset}
        if self.valid_dataset is not None:
            datasets["valid_dataset"] = self.valid_dataset
        for name, dataset in datasets.items():
            if not hasattr(dataset, "__len__") or len(dataset) == 0:
                raise ValueError(
                    f"{name} is empty or has no length: pass a map-style Dataset with one example "
                    "or more"
                )
        examples = len(self.train_dataset)
        if examples < self.config.batch_size:
            raise ValueError(
                f"train_dataset has {examples} examples, fewer than batch_size="
                f"{self.config.batch_size}: lower batch_size"
            )


# --------------------------------------------------------------------------------------------------
# The default loss and weights, means over processes, and checks


def default_loss(model: nn.Module, batch: tuple) -> Tensor:
    """The last thing that the model returns: a GPT returns (logits, loss)."""
    return model(*batch)[-1]


def stack_examples(items: list) -> Any:
    """A batch of equally large examples, as a DataLoader makes it. TypeError for other examples."""
    try:
        return default_collate(items)
    except RuntimeError as error:
        raise TypeError(
            f"the examples of a batch cannot be stacked ({error}): pass a collate_fn that pads them"
        ) from None


def count_examples(batch: tuple) -> int:
    """The weight of a batch whose loss is a mean over its examples."""
    return len(batch[0])


def count_targets(batch: tuple) -> int:
    """The weight of a batch (x, y) of token ids: its targets, without those that are -1.

    A batch of another kind counts by its examples.
    """
    if len(batch) < 2 or batch[1].dtype != torch.long or batch[1].shape != batch[0].shape:
        return count_examples(batch)
    return int((batch[1] != -1).sum())


def weighted_means(sums: dict[str, float], total_weight: float) -> dict[str, float]:
    """The mean of each metric over all processes.

    sums: for each metric, the sum of weight * value over this process's batches. total_weight:
    the sum of their weights. A process that has evaluated no batch has no sums.
    """
    [total_weight] = distributed.total([total_weight])
    names: list[str] = []
    for names_of_a_process in distributed.gather(list(sums)):
        names += [name for name in names_of_a_process if name not in names]
    totals = distributed.total([sums.get(name, 0.0) for name in names])
    return {name: total / total_weight for name, total in zip(names, totals, strict=True)}


def check_trained(model: nn.Module) -> None:
    """ValueError for a model of which nothing is trained."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"no parameter of the {type(model).__name__} requires gradients, so there is nothing "
            "to train: add an adapter (lora.add), or call model.requires_grad_()"
        )


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """ValueError if all that the optimizer knows has been frozen since it was made."""
    groups = optimizer.param_groups
    if not any(p.requires_grad for group in groups for p in group["params"]):
        raise ValueError(
            "all parameters that the trainer knows have been frozen since it was made: call "
            "lora.add, and `on` of reward and value models, before you make a trainer"
        )


def check_event(onevent: str, callback: Any) -> None:
    """ValueError for an unknown event, TypeError for a callback that cannot be called."""
    if onevent not in EVENTS:
        raise ValueError(f"onevent={onevent!r} is no event: use one of {', '.join(EVENTS)}")
    if not callable(callback):
        raise TypeError(f"callback is {callback!r:.60}; expected a function of the trainer")


def check_functions(model: Any, **functions: Any) -> None:
    """TypeError for a model that is no module, and for functions that cannot be called."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__} {model!r:.60}; expected an nn.Module")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} is {function!r:.60}; expected a function, or None")


def check_loss(loss: Any, metrics: Any) -> None:
    """TypeError or ValueError for what a loss_fn must not return."""
    if not torch.is_tensor(loss) or loss.dim() != 0:
        got = tuple(loss.shape) if torch.is_tensor(loss) else f"{type(loss).__name__} {loss!r:.60}"
        raise TypeError(
            f"the loss is {got}; expected a tensor with one number, as loss_fn(model, batch) or "
            "model(*batch)[-1] gives it"
        )
    if not isinstance(metrics, dict):
        raise TypeError(f"loss_fn returned metrics {metrics!r:.60}; expected a dict")
    for name, value in metrics.items():
        is_number = isinstance(value, numbers.Real) or (torch.is_tensor(value) and value.dim() == 0)
        if not isinstance(name, str) or not is_number:
            raise TypeError(
                f"loss_fn returned a metric {name!r}, {value!r:.60}; expected numbers by name"
            )
    reserved = sorted(OWN_METRICS & metrics.keys())
    if reserved:
        raise ValueError(
            f"loss_fn returned metrics called {reserved}, which the Trainer logs itself: give "
            "them other names"
        )


def checked_weight(weight: Any) -> float:
    """The weight of a batch. ValueError unless it is a finite number from 0 on."""
    is_number = isinstance(weight, numbers.Real) or (torch.is_tensor(weight) and weight.dim() == 0)
    if not is_number or not 0 <= float(weight) < math.inf:
        raise ValueError(f"weight_fn returned {weight!r:.60}; expected a finite number from 0 on")
    return weight


def check_schedule(config: CN) -> None:
    """ValueError for an unknown schedule, or for a decay in a run without an end."""
    if config.lr_schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"lr_schedule={config.lr_schedule!r} must be constant, linear or cosine")
    if config.lr_schedule != "constant" and config.max_iters is None and config.epochs is None:
        raise ValueError(
            f"lr_schedule={config.lr_schedule!r} needs an end to decay to: set max_iters or epochs"
        )


def check_batch(batch: Any) -> None:
    """TypeError unless the batch is a tuple or list of equally long tensors."""
    description = type(batch).__name__
    if isinstance(batch, (tuple, list)):
        are_tensors = all(torch.is_tensor(x) and x.dim() > 0 for x in batch)
        if are_tensors and len({len(x) for x in batch}) == 1:
            return
        items = [tuple(x.shape) if torch.is_tensor(x) else type(x).__name__ for x in batch]
        description += f" of {items}"
    raise TypeError(
        f"a batch must be a tuple of equally long tensors, not {description}: pass a "
        "collate_fn that makes one"
    )
