"""
The training loop. It knows nothing of language or of GPT: a model, a dataset and a loss are enough.

    trainer = Trainer(config, model, train_dataset)
    trainer.run()

One iteration fetches batch i, computes the loss, steps the optimizer, calls back, and now and then logs, evaluates and saves; each of
these is a method, so that a subclass (PPOTrainer is one) can replace a part and keep the others. With a `work_dir` a run can be killed
at any moment and continued: a checkpoint holds weights, optimizer, random states and position in the data, and batch i depends on
(seed, i) alone, so that the same weights come out, bit for bit on the CPU. Under `torchrun` many processes share each batch.
"""

import contextlib
import itertools
import logging
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mingpt import distributed
from mingpt.checkpoint import deferred_signals, get_rng_state, leave_ctrl_c_to_the_parent, raise_signal, set_rng_state
from mingpt.run_folder import RunFolder
from mingpt.config import CfgNode as CN, check_numbers
from mingpt.utils import adamw, keep_freed_memory, pick_device, pick_precision, set_seed

logger = logging.getLogger("mingpt")

# what a resumed run may change (and its end, if no schedule hangs on it); anything else would make it another run
FREE_TO_CHANGE = {"device", "num_workers", "log_every", "eval_every", "checkpoint_every", "tensorboard", "work_dir"}


class Trainer:
    """Trains `model` on `train_dataset` with AdamW.

    loss_fn(model, batch) calls model(...) and returns the loss, or (loss, dict of metrics); by default `model(*batch)[-1]`. Where it is a
    mean over something else than the examples (tokens, say), weight_fn(batch) counts that, to weight the parts of a batch by.
    valid_dataset is evaluated every `eval_every` iterations. Raises ValueError or TypeError for unusable options or data.
    """

    @staticmethod
    def get_default_config() -> CN:
        """Every option and its default."""
        C = CN()
        C.device = "auto"
        C.precision = "auto"         # fp32, bf16 or fp16 autocast
        C.compile = False            # torch.compile the model: it starts later and runs faster
        C.num_workers = 0            # processes that load data beside the training one
        C.max_iters = None           # stop after so many iterations,
        C.epochs = None              # or so many passes over the data; both None: until interrupted
        C.batch_size = 64            # examples per optimizer step, of all processes together
        C.micro_batch_size = None    # examples per forward and backward pass, where a batch does not fit into memory
        C.learning_rate = 3e-4
        C.lr_schedule = "constant"   # or linear, cosine: from learning_rate to lr_final_fraction of it at the end
        C.lr_final_fraction = 0.0
        C.warmup_iters = 0           # linear, from 0
        C.betas = (0.9, 0.95)
        C.eps = 1e-8
        C.weight_decay = 0.1         # only on the weights of matrix products
        C.grad_norm_clip = 1.0
        C.work_dir = None            # where metrics.jsonl and checkpoints go; None writes nothing
        C.log_every = 10             # iterations between rows of metrics
        C.eval_every = None          # ... between evaluations, None for never
        C.checkpoint_every = 500     # ... between checkpoints
        C.tensorboard = False        # the metrics to TensorBoard, too
        return C

    def __init__(self, config: CN, model: nn.Module, train_dataset: Dataset, valid_dataset: Dataset | None = None,
                 loss_fn: Callable | None = None, collate_fn: Callable | None = None, weight_fn: Callable | None = None):
        self.config = config
        self.train_dataset, self.valid_dataset, self.collate_fn = train_dataset, valid_dataset, collate_fn
        self.loss_fn = loss_fn or (lambda model, batch: model(*batch)[-1])
        self.weight_fn = weight_fn or (lambda batch: len(batch[0]))
        self.callbacks = defaultdict(list)
        self.description = Path(config.work_dir).name if config.work_dir else "training"  # in the progress bar and the log
        self.device = distributed.join(pick_device(config.device))
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.check_config()
        self.check_data()
        self.folder = RunFolder(config.work_dir, config.tensorboard)
        self.precision = pick_precision(config.precision, self.device)
        keep_freed_memory()
        self.model = model.to(self.device)
        if config.compile:
            model.compile()
        self.optimizer = model.configure_optimizers(config) if hasattr(model, "configure_optimizers") else adamw(model, config)
        self.wrapped = model if self.world_size == 1 else DistributedDataParallel(model)  # whose forward leads to the loss
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.seed = distributed.gather(torch.initial_seed())[0]  # the last `set_seed`: fixes which examples form batch i
        if self.rank > 0:
            set_seed(self.seed + self.rank)  # each process draws its own dropout and samples

        self.iter_num = 0  # iterations done; the callbacks see the number of the current one, counted from 0
        self.iter_time = self.iter_dt = 0.0          # when the last one ended, and what it took, in seconds
        self.seconds = self.resumed_seconds = 0.0    # of training in all, and in the runs before this one
        self.tokens = 0                              # seen in this run: the elements of each batch's first tensor
        self.loss = self.metrics = None              # of the last iteration: a detached scalar; all that is known of it
        self.valid_loss, self.best_valid_loss = None, math.inf

    # -- callbacks, as in minGPT ---------------------------------------------------------------------------------------

    def add_callback(self, onevent: str, callback: Callable) -> None:
        """Have callback(trainer) called on an event: on_train_begin, on_batch_end, on_evaluate, on_log, on_train_end."""
        self.callbacks[onevent].append(callback)

    def set_callback(self, onevent: str, callback: Callable) -> None:
        """The same, in the place of all others of that event."""
        self.callbacks[onevent] = [callback]

    def trigger_callbacks(self, onevent: str) -> None:
        for callback in self.callbacks[onevent]:
            callback(self)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the stop rule holds, from the last checkpoint in work_dir if there is one.

        Ctrl-C finishes the iteration, saves a checkpoint and raises KeyboardInterrupt, SIGTERM likewise SystemExit(143).
        """
        self.model.train()
        self.resume()
        batches = self.batches()
        bar = tqdm(total=self.max_iters, initial=self.iter_num, desc=self.description, disable=self.rank > 0 or None, dynamic_ncols=True)
        self.trigger_callbacks("on_train_begin")
        self.iter_time = time.time()
        with bar, logging_redirect_tqdm(), deferred_signals() as signals:
            while self.max_iters is None or self.iter_num < self.max_iters:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate() * group.get("lr_ratio", 1.0)
                self.metrics = self.train_step(next(batches))
                now = time.time()
                self.iter_dt, self.iter_time = now - self.iter_time, now
                self.seconds += self.iter_dt
                self.metrics["tokens/s"] = self.tokens / (self.seconds - self.resumed_seconds)
                self.trigger_callbacks("on_batch_end")
                self.iter_num += 1
                self.after_step()
                bar.set_postfix({name: self.metrics[name] for name in ("loss", "lr", "tokens/s")}, refresh=False)
                bar.update()
                terminate, stop = distributed.total([signals.count(signal.SIGTERM), len(signals)])  # in all processes at once
                if stop:
                    self.save_checkpoint()
                    raise_signal(signal.SIGTERM if terminate else signal.SIGINT)
        self.save_checkpoint()
        self.trigger_callbacks("on_train_end")

    def train_step(self, batch: tuple) -> dict:
        """One iteration: a batch in, an optimizer step, metrics out."""
        self.tokens += batch[0].numel() * self.world_size
        return self.optimizer_step(self.micro_batches(batch))

    def after_step(self) -> None:
        """What is due now and then: evaluation, a row of metrics, a checkpoint."""
        due = lambda every: every and (self.iter_num % every == 0 or self.iter_num == self.max_iters)
        if self.valid_dataset is not None and due(self.config.eval_every):
            self.metrics["valid_loss"] = self.evaluate()
            logger.info("%s: iteration %d, train loss %.4f, validation loss %.4f", self.description, self.iter_num,
                        self.metrics["loss"], self.valid_loss)
        if due(self.config.log_every) or "valid_loss" in self.metrics:
            self.folder.log({"iter": self.iter_num, **self.metrics, "seconds": round(self.seconds, 3)})
            self.trigger_callbacks("on_log")
        if self.iter_num != self.max_iters and due(self.config.checkpoint_every):  # the last one is saved by run()
            self.save_checkpoint()

    @property
    def max_iters(self) -> int | None:
        """Iterations in all by the stop rule (None: no end). A last, partial pass over the data counts as a pass."""
        ends = [self.config.max_iters] if self.config.max_iters is not None else []
        if self.config.epochs is not None:
            ends.append(math.ceil(self.config.epochs * len(self.train_dataset) / self.config.batch_size))
        return min(ends, default=None)

    # -- batches -------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator:
        """Endless iterator over this process's share of the batches, on the device, from number iter_num on."""
        share = self.config.batch_size // self.world_size
        indices = (batch[self.rank * share:][:share] for batch in self.batch_indices())
        generator = torch.Generator().manual_seed((self.seed + self.rank + 10**6 * self.iter_num) % 2**63)  # for the workers
        loader = DataLoader(self.train_dataset, batch_sampler=indices, num_workers=self.config.num_workers, generator=generator,
                            collate_fn=self.collate_fn, pin_memory=self.device.type == "cuda", worker_init_fn=leave_ctrl_c_to_the_parent)
        return (self.to_device(batch) for batch in iter(loader))

    def batch_indices(self) -> Iterator[list[int]]:
        """Lists of dataset indices, batch by batch: the data in an endless row of passes, each in a new random order."""
        n, size = len(self.train_dataset), self.config.batch_size

        def examples(epoch: int, done: int) -> Iterator[int]:
            while True:
                order = torch.randperm(n, generator=torch.Generator().manual_seed((self.seed + epoch) % 2**63))
                for part in order[done:].split(2**16):  # a list of them all could fill the memory
                    yield from part.tolist()
                epoch, done = epoch + 1, 0

        stream = examples(*divmod(self.iter_num * size, n))
        while True:
            yield list(itertools.islice(stream, size))

    def to_device(self, batch: tuple) -> tuple:
        """The batch on the device; TypeError if it is no tuple of tensors, or they are not all of the same length."""
        if not isinstance(batch, (tuple, list)) or not all(map(torch.is_tensor, batch)) or len({len(x) for x in batch}) != 1:
            shapes = [tuple(getattr(x, "shape", ())) for x in batch] if isinstance(batch, (tuple, list)) else ""
            raise TypeError(f"a batch must be a tuple of equally long tensors, not {type(batch).__name__} {shapes}: pass a collate_fn")
        return tuple(x.to(self.device, non_blocking=True) for x in batch)

    def micro_batches(self, batch: tuple) -> Iterator[tuple]:
        """Split a batch into (weight, micro-batch) pairs."""
        size = self.config.micro_batch_size or len(batch[0])
        for part in zip(*(x.split(size) for x in batch)):
            yield self.weight_fn(part), part

    # -- the step, and evaluation -------------------------------------------------------------------------------------

    def autocast(self) -> torch.autocast:
        """The context in which matrix products have the precision that was asked for."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def compute_loss(self, model: nn.Module, batch) -> tuple[Tensor, dict]:
        """(loss, metrics) of a batch, in the precision that was asked for."""
        with self.autocast():
            result = self.loss_fn(model, batch)
        return result if isinstance(result, tuple) else (result, {})

    def optimizer_step(self, micro_batches: Iterable[tuple]) -> dict:
        """One step on the micro-batches' mean loss, by their weights. Returns loss, lr, grad_norm and the loss's own metrics.

        Raises FloatingPointError, before any weight has changed, where the loss or the gradient is NaN or infinite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(micro_batches)
        whole = distributed.total([float(sum(weight for weight, _ in parts))])[0] or 1.0
        sums = defaultdict(float)
        for i, (weight, batch) in enumerate(parts):
            alone = self.world_size > 1 and i < len(parts) - 1  # the gradients of the processes meet once, at the end
            with self.wrapped.no_sync() if alone else contextlib.nullcontext():
                loss, extra = self.compute_loss(self.wrapped, batch)
                self.scaler.scale(loss * (weight / whole * self.world_size)).backward()  # DDP divides by the world size
            for name, value in {"loss": loss.detach(), **extra}.items():
                sums[name] += weight / whole * value if weight else 0.0  # a mean over nothing may be NaN
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_norm_clip or math.inf)
        metrics = dict(zip(sums, distributed.total([float(x) for x in sums.values()])))
        metrics |= {"lr": self.learning_rate(), "grad_norm": float(grad_norm)}
        self.loss = torch.tensor(metrics["loss"])
        self.check_finite(metrics)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return metrics

    def check_finite(self, metrics: dict) -> None:
        """FloatingPointError where the loss or the gradient norm is NaN or infinite; fp16's scaler deals with the latter itself."""
        if not math.isfinite(metrics["loss"]) or not (math.isfinite(metrics["grad_norm"]) or self.scaler.is_enabled()):
            raise FloatingPointError(
                f"iteration {self.iter_num}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, learning rate "
                f"{metrics['lr']:.3g}. This step touched no weight, and the last checkpoint stays. Look for a learning rate that "
                "is too high, a missing warmup, or NaN in the data")

    def learning_rate(self) -> float:
        """The schedule: linear warmup, then constant, linear or cosine decay to lr_final_fraction at max_iters."""
        C, i = self.config, self.iter_num
        if i < C.warmup_iters:
            return C.learning_rate * (i + 1) / C.warmup_iters
        if C.lr_schedule == "constant":
            return C.learning_rate
        progress = (i - C.warmup_iters) / max(1, self.max_iters - C.warmup_iters)
        left = 1 - progress if C.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return C.learning_rate * (C.lr_final_fraction + (1 - C.lr_final_fraction) * left)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over valid_dataset, its batches weighted as in training; the best weights are kept as best.pt."""
        was_training = self.model.training
        self.model.eval()
        order, size = range(len(self.valid_dataset)), self.config.micro_batch_size or self.config.batch_size // self.world_size
        share = [order[i:i + size] for i in order[::size]][self.rank::self.world_size]
        # a generator of its own: a loader that starts draws from it, and evaluating must not change the training
        loader = DataLoader(self.valid_dataset, batch_sampler=share, collate_fn=self.collate_fn, generator=torch.Generator())
        losses = [(self.weight_fn(batch), self.compute_loss(self.model, batch)[0].item()) for batch in map(self.to_device, loader)]
        self.model.train(was_training)
        loss, weight = distributed.total([float(sum(w * loss for w, loss in losses if w)), float(sum(w for w, _ in losses))])
        self.valid_loss = loss / (weight or math.nan)
        if self.valid_loss < self.best_valid_loss:
            self.best_valid_loss = self.valid_loss
            self.folder.save_best(self.model.state_dict())
        self.trigger_callbacks("on_evaluate")
        return self.valid_loss

    # -- checkpoints and resume ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """All that a resumed run needs; a subclass adds its own. With many processes, each must call it."""
        return {"iter_num": self.iter_num, "seed": self.seed, "best_valid_loss": self.best_valid_loss, "seconds": self.seconds,
                "finished": self.iter_num == self.max_iters, "config": self.config.to_dict(), "rng": distributed.gather(get_rng_state()),
                **{name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned."""
        self.iter_num, self.seed, self.best_valid_loss = state["iter_num"], state["seed"], state["best_valid_loss"]
        self.seconds = self.resumed_seconds = state["seconds"]
        for name in ("model", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        set_rng_state(state["rng"][self.rank])

    def save_checkpoint(self) -> None:
        if self.config.work_dir:
            self.folder.save_checkpoint(self.state_dict())

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one; ValueError if it is from a run with other options."""
        free = FREE_TO_CHANGE | ({"max_iters", "epochs"} if self.config.lr_schedule == "constant" else set())
        if state := self.folder.load_checkpoint(self.config, free):
            self.load_state_dict(state)
            logger.info("%s: at iteration %d already, from %s", self.description, self.iter_num, self.folder.checkpoint)

    # -- checks --------------------------------------------------------------------------------------------------------

    def check_config(self) -> None:
        """ValueError for options that do not exist, are out of range or do not go together."""
        C, known = self.config, type(self).get_default_config()
        if unknown := vars(C).keys() - vars(known).keys():
            raise ValueError(f"{type(self).__name__} has no options {sorted(unknown)}; it has {sorted(vars(known))}")
        check_numbers(C, "batch_size", low=1, whole=True)
        check_numbers(C, "max_iters", "micro_batch_size", "log_every", "eval_every", "checkpoint_every", low=1, whole=True, optional=True)
        check_numbers(C, "num_workers", whole=True)
        check_numbers(C, "learning_rate", "lr_final_fraction", "warmup_iters", "eps", "weight_decay")
        check_numbers(C, "epochs", "grad_norm_clip", optional=True)
        if C.lr_schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"lr_schedule={C.lr_schedule!r} must be constant, linear or cosine")
        if C.lr_schedule != "constant" and C.max_iters is None and C.epochs is None:
            raise ValueError(f"lr_schedule={C.lr_schedule!r} needs an end to decay to: set max_iters or epochs")
        if C.batch_size % self.world_size:
            raise ValueError(f"batch_size={C.batch_size} cannot be shared equally by {self.world_size} processes")

    def check_data(self) -> None:
        """ValueError for data that can't be trained on."""
        for dataset in (self.train_dataset, *([] if self.valid_dataset is None else [self.valid_dataset])):
            if not hasattr(dataset, "__len__") or len(dataset) == 0:
                raise ValueError("a dataset is empty or has no length; it must be a map-style Dataset with examples")
        if (n := len(self.train_dataset)) < self.config.batch_size:
            raise ValueError(f"train_dataset has {n} examples, fewer than batch_size={self.config.batch_size}: lower that")
