"""
The training loop. It knows nothing of language or of GPT: a model, a dataset and a loss are enough.

    trainer = Trainer(config, model, train_dataset)
    trainer.run()

One iteration is: fetch batch i, compute the loss, step the optimizer, call back, and now and then log, evaluate and save.
Each of these is a method, so that a subclass (PPOTrainer is one) can replace a part and keep the others.

With a `work_dir` a run can be killed at any moment and continued: a checkpoint holds weights, optimizer, random states and
position in the data, and batch i depends on (seed, i) alone, so that the same weights come out, bit for bit on the CPU. (Only
what a dataset draws at random in worker processes, num_workers > 0, is drawn anew.) Batches are weighted by their examples.
"""

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mingpt.checkpoint import deferred_interrupt, get_rng_state, save_torch, set_rng_state, write_text
from mingpt.utils import CfgNode as CN
from mingpt.utils import adamw, check_numbers, pick_device, pick_precision, read_metrics

logger = logging.getLogger("mingpt")

# what a resumed run may change (and its end, if no schedule hangs on it); anything else would make it another run
FREE_TO_CHANGE = {"device", "num_workers", "log_every", "eval_every", "checkpoint_every", "work_dir"}


class Trainer:
    """Trains `model` on `train_dataset` with AdamW.

    loss_fn(model, batch) returns the loss, or (loss, dict of metrics); without it the loss is `model(*batch)[-1]`.
    valid_dataset is evaluated every `eval_every` iterations. Raises ValueError or TypeError for unusable options or data.
    """

    @staticmethod
    def get_default_config() -> CN:
        """Every option and its default."""
        C = CN()
        C.device = "auto"
        C.precision = "auto"         # fp32, bf16 or fp16 autocast
        C.num_workers = 0            # processes that load data beside the training one
        C.max_iters = None           # stop after so many iterations,
        C.epochs = None              # or so many passes over the data; both None: until interrupted
        C.batch_size = 64            # examples per optimizer step
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
        return C

    def __init__(self, config: CN, model: nn.Module, train_dataset: Dataset, valid_dataset: Dataset | None = None,
                 loss_fn: Callable | None = None, collate_fn: Callable | None = None):
        self.config = config
        self.train_dataset = train_dataset
        self.valid_dataset = valid_dataset
        self.loss_fn = loss_fn or (lambda model, batch: model(*batch)[-1])
        self.collate_fn = collate_fn
        self.callbacks = defaultdict(list)
        self.description = Path(config.work_dir).name if config.work_dir else "training"  # in the progress bar and the log
        self.check_config()

        self.device = pick_device(config.device)
        self.precision = pick_precision(config.precision, self.device)
        self.model = model.to(self.device)
        configure = getattr(model, "configure_optimizers", None)
        self.optimizer = configure(config) if configure else adamw(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.seed = torch.initial_seed()  # the last `set_seed`: fixes which examples form batch i

        self.iter_num = 0  # iterations done; the callbacks see the number of the current one, counted from 0
        self.iter_time = self.iter_dt = 0.0          # when the last one ended, and what it took, in seconds
        self.seconds = self.resumed_seconds = 0.0    # of training in all, and in the runs before this one
        self.loss = self.valid_loss = None           # of the last iteration, a detached scalar; of the last evaluation
        self.best_valid_loss = math.inf

    # -- callbacks, as in minGPT ---------------------------------------------------------------------------------------

    def add_callback(self, onevent: str, callback: Callable) -> None:
        """Have callback(trainer) called on an event: on_train_begin, on_batch_end, on_evaluate, on_train_end."""
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

        Ctrl-C finishes the iteration, saves a checkpoint and raises KeyboardInterrupt; a second one raises at once.
        """
        self.model.train()
        if self.config.work_dir:
            self.resume()
        rng_state = get_rng_state()
        batches = self.batches()
        set_rng_state(rng_state)  # a DataLoader takes a number from the generator when it starts: a resumed run must not see it
        bar = tqdm(total=self.max_iters, initial=self.iter_num, desc=self.description, disable=None, dynamic_ncols=True)
        self.trigger_callbacks("on_train_begin")
        self.iter_time = time.time()
        with bar, logging_redirect_tqdm(), deferred_interrupt() as interrupted:
            while self.max_iters is None or self.iter_num < self.max_iters:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate() * group.get("lr_ratio", 1.0)
                metrics = self.train_step(next(batches))
                now = time.time()
                self.iter_dt, self.iter_time = now - self.iter_time, now
                self.seconds += self.iter_dt
                self.trigger_callbacks("on_batch_end")
                self.iter_num += 1
                self.after_step(metrics)
                bar.set_postfix(self.progress(metrics), refresh=False)
                bar.update()
                if interrupted.is_set():
                    self.save_checkpoint()
                    raise KeyboardInterrupt
        self.save_checkpoint()
        self.trigger_callbacks("on_train_end")

    def train_step(self, batch: tuple) -> dict:
        """One iteration: a batch in, an optimizer step, metrics out."""
        return self.optimizer_step(self.micro_batches(batch))

    def after_step(self, metrics: dict) -> None:
        """What is due now and then: evaluation, a row of metrics, a checkpoint."""
        due = lambda every: every and (self.iter_num % every == 0 or self.iter_num == self.max_iters)
        if self.valid_dataset is not None and due(self.config.eval_every):
            metrics["valid_loss"] = self.evaluate()
            logger.info("%s: iteration %d, train loss %.4f, validation loss %.4f",
                        self.description, self.iter_num, metrics["loss"], metrics["valid_loss"])
        if due(self.config.log_every) or "valid_loss" in metrics:
            self.log_metrics({"iter": self.iter_num, **metrics, "seconds": round(self.seconds, 3)})
        if self.iter_num != self.max_iters and due(self.config.checkpoint_every):  # the last one is saved by run()
            self.save_checkpoint()

    @property
    def max_iters(self) -> int | None:
        """Iterations in all by the stop rule (None: no end). A last, partial pass over the data counts as a pass."""
        ends = [self.config.max_iters] if self.config.max_iters is not None else []
        if self.config.epochs is not None:
            ends.append(math.ceil(self.config.epochs * len(self.train_dataset) / self.config.batch_size))
        return min(ends, default=None)

    def progress(self, metrics: dict) -> dict:
        """What the progress bar shows."""
        return {"loss": f"{metrics['loss']:.3f}", "lr": f"{metrics['lr']:.1e}"}

    # -- batches -------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator:
        """Endless iterator over batches on the device, from number iter_num on."""
        loader = DataLoader(self.train_dataset, batch_sampler=self.batch_indices(), num_workers=self.config.num_workers,
                            collate_fn=self.collate_fn, pin_memory=self.device.type == "cuda")
        return (self.to_device(batch) for batch in iter(loader))

    def batch_indices(self) -> Iterator[list[int]]:
        """Lists of dataset indices, batch by batch: the data in an endless row of passes, each in a new random order."""
        n, size, epoch = len(self.train_dataset), self.config.batch_size, None
        position = self.iter_num * size
        while True:
            indices = []
            while len(indices) < size:
                if position // n != epoch:
                    epoch = position // n
                    order = torch.randperm(n, generator=torch.Generator().manual_seed((self.seed + epoch) % 2**63)).tolist()
                indices.append(order[position % n])
                position += 1
            yield indices

    def to_device(self, batch: tuple) -> tuple:
        """The batch on the device; TypeError if it is no tuple of tensors."""
        if not isinstance(batch, (tuple, list)) or not all(torch.is_tensor(x) for x in batch):
            raise TypeError(f"a batch must be a tuple of tensors, not {type(batch).__name__}: have the dataset return such "
                            "tuples, or pass a collate_fn")
        return tuple(x.to(self.device, non_blocking=True) for x in batch)

    def micro_batches(self, batch: tuple) -> Iterator[tuple]:
        """Split a batch into (weight, micro-batch) pairs; weights are shares of the examples and add up to 1."""
        size = self.config.micro_batch_size or len(batch[0])
        for part in zip(*(x.split(size) for x in batch)):
            yield len(part[0]) / len(batch[0]), part

    # -- the step ------------------------------------------------------------------------------------------------------

    def compute_loss(self, batch) -> tuple[Tensor, dict]:
        """(loss, metrics) of a batch, in the precision that was asked for."""
        with torch.autocast(self.device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision),
                            enabled=self.precision != "fp32"):
            result = self.loss_fn(self.model, batch)
        return result if isinstance(result, tuple) else (result, {})

    def optimizer_step(self, micro_batches: Iterable[tuple]) -> dict:
        """One step on the weighted sum of the micro-batches' losses. Returns loss, lr, grad_norm and the loss's own metrics.

        Raises FloatingPointError, before any weight has changed, where the loss or the gradient is NaN or infinite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        metrics = defaultdict(float)
        for weight, batch in micro_batches:
            loss, extra = self.compute_loss(batch)
            self.scaler.scale(loss * weight).backward()
            for name, value in {"loss": loss.detach(), **extra}.items():
                metrics[name] += weight * value
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_norm_clip or math.inf)
        self.loss = metrics["loss"]
        metrics = {name: float(v) for name, v in metrics.items()} | {"lr": self.learning_rate(), "grad_norm": float(grad_norm)}
        self.check_finite(metrics)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return metrics

    def check_finite(self, metrics: dict) -> None:
        """FloatingPointError where the loss or the gradient norm is NaN or infinite."""
        # fp16 may overflow now and then: the scaler skips that step and lowers its scale
        if math.isfinite(metrics["loss"]) and (math.isfinite(metrics["grad_norm"]) or self.scaler.is_enabled()):
            return
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

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over valid_dataset, each batch weighted by its examples; the best weights are kept as best.pt."""
        was_training = self.model.training
        self.model.eval()
        loader = DataLoader(self.valid_dataset, batch_size=self.config.batch_size, collate_fn=self.collate_fn,
                            generator=torch.Generator())  # its own, so that evaluating does not change the training
        total = sum(self.compute_loss(batch)[0].item() * len(batch[0]) for batch in map(self.to_device, loader))
        self.model.train(was_training)
        self.valid_loss = total / len(self.valid_dataset)
        if self.valid_loss < self.best_valid_loss:
            self.best_valid_loss = self.valid_loss
            if self.config.work_dir:
                save_torch(Path(self.config.work_dir) / "best.pt", self.model.state_dict())
        self.trigger_callbacks("on_evaluate")
        return self.valid_loss

    # -- metrics, checkpoints, resume ----------------------------------------------------------------------------------

    def log_metrics(self, row: dict) -> None:
        """Append a row to work_dir/metrics.jsonl."""
        if self.config.work_dir:
            with (Path(self.config.work_dir) / "metrics.jsonl").open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")

    @property
    def checkpoint_path(self) -> Path | None:
        return Path(self.config.work_dir) / "checkpoint.pt" if self.config.work_dir else None

    def state_dict(self) -> dict:
        """All that a resumed run needs; a subclass adds its own."""
        return {"iter_num": self.iter_num, "seed": self.seed, "best_valid_loss": self.best_valid_loss,
                "finished": self.iter_num == self.max_iters, "seconds": self.seconds, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "rng": get_rng_state(),
                "config": self.config.to_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned."""
        self.iter_num, self.seed, self.best_valid_loss = state["iter_num"], state["seed"], state["best_valid_loss"]
        self.seconds = self.resumed_seconds = state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"])

    def save_checkpoint(self) -> None:
        """Write work_dir/checkpoint.pt, whole or not at all."""
        if self.checkpoint_path:
            save_torch(self.checkpoint_path, self.state_dict())

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one; rows of metrics behind it are dropped, to be written again."""
        if self.checkpoint_path.exists():
            self.load_checkpoint()
        path = Path(self.config.work_dir) / "metrics.jsonl"
        rows = [row for row in read_metrics(path) if row["iter"] <= self.iter_num]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def load_checkpoint(self) -> None:
        """Load work_dir/checkpoint.pt; ValueError if it is from a run with other options."""
        state = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
        free = FREE_TO_CHANGE | ({"max_iters", "epochs"} if self.config.lr_schedule == "constant" else set())
        now, then = self.config.to_dict(), state["config"]
        changed = [f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in {**then, **now}
                   if name not in free and now.get(name) != then.get(name)]
        if changed:
            raise ValueError(f"{self.checkpoint_path} is from a run with other options ({'; '.join(changed)}): put them "
                             "back to continue it, or choose another work_dir")
        self.load_state_dict(state)
        logger.info("%s: at iteration %d already, from %s", self.description, self.iter_num, self.checkpoint_path)

    # -- checks --------------------------------------------------------------------------------------------------------

    def check_config(self) -> None:
        """ValueError for options that do not exist or are out of range, and for data that can't be trained on."""
        C, known = self.config, type(self).get_default_config()
        if unknown := vars(C).keys() - vars(known).keys():
            raise ValueError(f"{type(self).__name__} has no options {sorted(unknown)}; it has {sorted(vars(known))}")
        check_numbers(C, "batch_size", low=1, whole=True)
        check_numbers(C, "max_iters micro_batch_size log_every eval_every checkpoint_every", low=1, whole=True, optional=True)
        check_numbers(C, "learning_rate lr_final_fraction warmup_iters eps weight_decay num_workers")
        check_numbers(C, "epochs grad_norm_clip", optional=True)
        if C.lr_schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"lr_schedule={C.lr_schedule!r} must be constant, linear or cosine")
        if C.lr_schedule != "constant" and C.max_iters is None and C.epochs is None:
            raise ValueError(f"lr_schedule={C.lr_schedule!r} needs an end to decay to: set max_iters or epochs")
        for dataset in (self.train_dataset, *([] if self.valid_dataset is None else [self.valid_dataset])):
            if not hasattr(dataset, "__len__") or len(dataset) == 0:
                raise ValueError("a dataset is empty or has no length; it must be a map-style Dataset with examples")
