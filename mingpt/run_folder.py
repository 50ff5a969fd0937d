"""
What a training run keeps in its folder.

    metrics.jsonl    a row of metrics every few iterations
    samples.jsonl    what the model wrote, where a trainer logs that
    checkpoint.pt    all that a resumed run needs
    best.pt          the weights with the best validation loss, a plain state dict
    config.json      the options of a script (see `claim`)
    .lock            there while a run is writing here: see `only_run`

The .jsonl files are JSON lines: one dict a line, with the iteration it is of as "iter". A run that
was killed may have logged rows after its last checkpoint. It repeats those iterations when it
resumes, so loading the checkpoint first cuts those rows off: no row appears twice.

In a run of many processes all may call these methods, and only the one of rank 0 writes.
"""

import contextlib
import errno
import json
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import nn

from mingpt import distributed
from mingpt.checkpoint import (
    full_disk_explained,
    load_torch,
    read_json,
    remove_leftovers,
    save_torch,
    to_json,
    write_text,
)
from mingpt.config import CfgNode
from mingpt.utils import import_extra

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("mingpt")

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
LOCK = ".lock"


class RunFolder:
    """The folder `path` of a run. Where path is None, nothing is kept.

    tensorboard: also log the metrics for TensorBoard (extra `projects`). Raises ValueError where
    there is no folder to do that in.
    """

    def __init__(self, path: str | Path | None, tensorboard: bool = False):
        self.path = Path(path) if path is not None and path != "" else None
        self.checkpoint = self.path / "checkpoint.pt" if self.path else None
        if tensorboard and not self.path:
            raise ValueError("tensorboard=True needs a work_dir to write to")
        # the folder, for the process that writes to it; None in all others
        self.output = self.path if distributed.rank() == 0 else None
        self.tensorboard = tensorboard and self.output is not None
        self.writer: SummaryWriter | None = None  # TensorBoard's, made for the first row
        self.last_saved: int | None = None  # the iteration of checkpoint.pt, where that is known
        if self.tensorboard:
            import_extra("tensorboard", "projects")

    # -- one run at a time -------------------------------------------------------------------------

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, no other run may write to the folder. ValueError if one does so already.

        The processes of one run are one: that of rank 0 takes the folder for all.
        """
        with contextlib.ExitStack() as stack:
            refusal = None
            if self.output:
                try:
                    stack.enter_context(only_run(self.output))
                except ValueError as error:
                    refusal = str(error)
            refusal = distributed.gather(refusal)[0]
            if refusal:
                raise ValueError(refusal)
            yield

    # -- the options that a run was started with ---------------------------------------------------

    def claim(
        self,
        options: dict[str, Any],
        free: set[str],
        defaults: dict[str, Any] | None = None,
    ) -> None:
        """For scripts: keep the options in config.json, and refuse to mix two runs in one folder.

        Once a checkpoint is saved anywhere in the folder, a later call with other options raises
        ValueError. The options in `free` may always change. An option that the old run did not
        have yet counts as its default. ValueError, too, while another run writes to the folder.
        """
        if not isinstance(options, dict):
            raise TypeError(f"options is {options!r:.60}; expected a dict, {{name: value}}")
        if not self.path:
            return
        options = as_json(options)
        config_file = self.path / "config.json"
        with self.in_use():
            has_checkpoint = any(self.path.rglob("checkpoint.pt"))
            if has_checkpoint and config_file.exists():
                then = read_json(config_file)
                # An option that did not exist then counts as its default: so the old run behaved.
                defaults = as_json(defaults or {})
                added = {name: defaults[name] for name in options if name in defaults}
                self.compare(added | then, options, free)
            if self.output:
                write_text(config_file, to_json(options, indent=2))

    def compare(
        self,
        then: dict[str, Any],
        now: dict[str, Any],
        free: set[str],
    ) -> None:
        """Raise ValueError if a run that had the options `then` cannot continue with those of now.

        It can where they differ in nothing but the free ones.
        """
        changes = []
        for name in then | now:
            before, after = then.get(name), now.get(name)
            if before != after and name not in free:
                changes.append(f"{name} was {before!r}, is {after!r}")
        if changes:
            raise ValueError(
                f"{self.path} holds a run with other options ({'; '.join(changes)}): "
                "restore them to continue that run, or choose another work_dir"
            )

    # -- rows of metrics and samples ---------------------------------------------------------------

    def log(self, row: dict[str, Any]) -> None:
        """Append a row of metrics to metrics.jsonl, and to TensorBoard's log.

        Its "iter" is the number of iterations done.
        """
        if self.output:
            append_rows(self.output / METRICS, [row])
        if self.tensorboard:
            writer = self.tensorboard_writer(row["iter"])
            for name, value in row.items():
                if name != "iter":  # that is the axis of all curves
                    writer.add_scalar(name, value, row["iter"])
            writer.flush()

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to samples.jsonl: texts of the model, with what is known of them.

        The "iter" of each row is the number of iterations done.
        """
        if self.output:
            append_rows(self.output / SAMPLES, rows)

    def tensorboard_writer(self, first_iter: int) -> "SummaryWriter":
        """TensorBoard's writer, made when it is first needed.

        TensorBoard then hides what a killed run has logged from iteration first_iter on.
        """
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:
            self.writer = SummaryWriter(self.path, purge_step=first_iter)
        return self.writer

    # -- weights and checkpoints -------------------------------------------------------------------

    def save_best(self, state: dict[str, Any], model_options: dict[str, Any] | None = None) -> None:
        """Write best.pt, a plain state dict, with the options of the model among its metadata.

        A state dict does not tell the number of heads, and `from_pretrained` must know it. A file
        of its own could be lost or be older than the weights. But PyTorch's state dicts have an
        attribute for what is not a tensor, {name of a module: dict}, where modules keep versions.
        It is saved with them, and `load_state_dict` ignores what it does not know.
        """
        if self.output:
            described = OrderedDict(state)
            metadata = dict(getattr(state, "_metadata", {}))
            metadata[""] = {**metadata.get("", {}), "model_args": model_options}
            described._metadata = metadata  # type: ignore[attr-defined]  # as PyTorch does it
            save_torch(self.output / "best.pt", described)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write checkpoint.pt, atomically. No process continues before it is there."""
        if self.output:
            save_torch(self.output / "checkpoint.pt", state)
        self.last_saved = state["iter_num"]
        distributed.gather(None)  # waits for all

    def check_finite(self, model: nn.Module, iter_num: int) -> None:
        """FloatingPointError if weights are not finite: no checkpoint may hold such ones."""
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                good = "there is no earlier one"
                if self.last_saved is not None:
                    good = f"{self.checkpoint}, of iteration {self.last_saved}, is still good"
                raise FloatingPointError(
                    f"iteration {iter_num}: the weights {name} are not finite, so no checkpoint is "
                    f"written; {good}. Look for an eps of 0, a weight_decay or a learning rate "
                    "that is too high"
                )

    def load_checkpoint(
        self,
        config: CfgNode,
        free: set[str],
        effective: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        check: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any] | None:
        """Load the last checkpoint, and cut off the rows that were logged after it.

        effective: gives options as they take effect, with the defaults of those that are missing.
        Old and new options are compared after it, so that runs from before an option was added
        can be resumed. check(state): raises ValueError for a state that cannot be used.

        Returns None if there is none; then the new run starts with no rows. Raises ValueError,
        before anything in the folder has changed, where the checkpoint is damaged, from another
        number of processes, or from other options than config's, apart from those in `free`.
        """
        if not self.checkpoint:
            return None
        state = None
        if self.all_processes_see(self.checkpoint):
            state = load_torch(self.checkpoint)
            check_kinds(state, self.checkpoint)
            # The number of processes changes the run as an option does: each draws its own dropout.
            processes = "the number of processes"
            try:
                then = effective(state["config"]) | {processes: len(state["rng"])}
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{self.checkpoint} has damaged options ({error!r})") from None
            now = effective(config.to_dict()) | {processes: distributed.world_size()}
            self.compare(then, now, free)
            if check:
                check(state)
            self.last_saved = state["iter_num"]
        if self.output:
            last_iter = state["iter_num"] if state else -1  # a new run keeps no row
            cut_rows(self.output / METRICS, last_iter)
            cut_rows(self.output / SAMPLES, last_iter)
        return state

    def all_processes_see(self, path: Path) -> bool:
        """Whether the file exists. Raises ValueError where only some of the processes see it."""
        exists = distributed.gather(path.exists())
        if any(exists) and not all(exists):
            raise ValueError(
                f"only some of the processes see {path}: "
                "put work_dir on a disk that all machines share"
            )
        return all(exists)


def finished(folder: str | Path) -> dict[str, Any] | None:
    """The last checkpoint of a trainer with this work_dir; None if it has not finished."""
    path = Path(folder) / "checkpoint.pt"
    if not os.path.exists(path):
        return None
    state = load_torch(path)
    return state if state.get("finished") else None


# -- one run at a time -----------------------------------------------------------------------------

# The locks that runs of this process hold.
held: set[Path] = set()


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Within, this is the only run that writes to the folder. ValueError if there is another.

    The operating system takes the lock away from a process that ends, however it ends. Processes
    that it started do not inherit it: one that loads data may live on for a while.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)  # of a run that was killed here
    path = folder.resolve() / LOCK
    # Within a process the system would grant the lock twice, and give up both with the first.
    f = None if path in held else open_locked(path)
    if f is None:
        raise ValueError(
            f"another run is writing to {folder}: wait until it has ended, or choose another "
            "work_dir"
        )
    with f:
        held.add(path)
        try:
            yield
        finally:
            held.discard(path)
            with contextlib.suppress(PermissionError):  # Windows removes no file that is open
                path.unlink(missing_ok=True)


def open_locked(path: Path) -> BinaryIO | None:
    """The file of a lock, open and locked. None if another process has locked it."""
    while True:
        f = path.open("ab")
        if not take_lock(f):
            f.close()
            return None
        # The run before may have removed the file after we had opened it: then we have nothing.
        if path.exists() and os.path.samestat(os.fstat(f.fileno()), path.stat()):
            return f
        f.close()


def take_lock(f: BinaryIO) -> bool:
    """Lock an open file until it is closed. False if another process has done so."""
    try:
        try:
            import fcntl
        except ImportError:  # Windows
            lock_on_windows(f)
        else:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        logger.warning("%s cannot be locked (%s): let no other run write there", f.name, error)
    return True


def lock_on_windows(f: BinaryIO) -> None:
    """Lock the first byte of an open file. OSError if another process has done so."""
    try:
        import msvcrt
    except ImportError:
        return  # neither Unix nor Windows
    f.seek(0)
    msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # Windows has it


# -- checkpoints -----------------------------------------------------------------------------------

# What the state of a Trainer has at least, and of which type.
KINDS: dict[str, tuple[type, ...]] = {
    "iter_num": (int,),
    "seed": (int,),
    "best_valid_loss": (int, float),
    "seconds": (int, float),
    "config": (dict,),
    "rng": (list,),
    "model": (dict,),
    "optimizer": (dict,),
    "scaler": (dict,),
}


def check_kinds(state: dict[str, Any], path: Path) -> None:
    """ValueError unless a file that was loaded holds what a Trainer saves."""
    if not {"iter_num", "config", "rng"} <= state.keys():
        raise ValueError(
            f"{path} is no checkpoint of a Trainer: it holds {list(state)[:5]}. "
            "Choose another work_dir, or load it with from_pretrained if it holds weights"
        )
    for name, kinds in KINDS.items():
        if name in state and not isinstance(state[name], kinds):
            raise ValueError(f"{path} is damaged: its {name} is {state[name]!r:.60}")
    if not 0 <= state["iter_num"] < 2**63:
        raise ValueError(f"{path} is damaged: its iter_num is {state['iter_num']}")


def trained_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model without those parameters that are frozen.

    It is what a checkpoint needs of a model with adapters (lora.py): a small part of it.
    """
    parameters = model.named_parameters(remove_duplicate=False)  # a tied one has two names
    frozen = {name for name, p in parameters if not p.requires_grad}
    state = model.state_dict()
    for name in frozen:
        del state[name]
    return state


def base_checksum(model: nn.Module) -> int | None:
    """CRC-32 of the weights that a model uses and does not train; None if there are none.

    They are its frozen parameters, and those of a trunk of another model that it stands on: a
    module that does has them as `base_parameters()`.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for module in model.modules():
        if hasattr(module, "base_parameters"):
            base: Any = module
            frozen += base.base_parameters()
    different = {id(p): p for p in frozen}  # policy and value function may stand on one trunk
    return checksum(different.values()) if different else None


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """CRC-32 of the numbers in some tensors, to tell one model from another."""
    crc = 0
    for x in tensors:
        bytes_of_x = x.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
        crc = zlib.crc32(bytes_of_x.numpy().data, crc)
    return crc


def check_fits(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    path: Path | None,
) -> None:
    """ValueError unless the state of a checkpoint can be loaded into this model and optimizer.

    path: the file that it is from, for the message.
    """
    source = path or "the state"
    missing = [name for name in KINDS if name not in state]
    if missing:
        raise ValueError(f"{source} is damaged: it lacks {missing}")
    then = {name: kind_of(x) for name, x in state["model"].items()}
    now = {name: kind_of(x) for name, x in trained_state(model).items()}
    different = [name for name in then | now if then.get(name) != now.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"{source} is of another model ({name} was {then.get(name)}, is {now.get(name)}): make "
            "the same one, or choose another work_dir"
        )
    try:
        then_groups = group_shapes(state["optimizer"], optimizer)
    except Exception as error:  # hostile data can make it raise anything
        raise ValueError(f"{source} is damaged: its optimizer has {error!r:.60}") from None
    now_groups = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    if then_groups != now_groups:
        raise ValueError(
            f"{source} is of another optimizer, with groups of {list(map(len, then_groups))} "
            f"parameters, where this one has {list(map(len, now_groups))}, or of parameters of "
            "other shapes: make the same one, or choose another work_dir"
        )


def kind_of(value: Any) -> str:
    """The type and the shape of a tensor of a state dict, as text; what else may be in it."""
    return f"{value.dtype} {tuple(value.shape)}" if torch.is_tensor(value) else repr(value)[:60]


def group_shapes(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> list[list[tuple[int, ...]]]:
    """The shapes of the parameters in each group of an optimizer's state, as Adam's means tell.

    Where there are none, since it has not made a step or is no Adam, those of the optimizer.
    """
    now = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = []
    for group in state["param_groups"]:
        shapes = []
        for index in group["params"]:
            of_parameter = state["state"].get(index, {})
            like = now[index] if index < len(now) else torch.empty(0)
            for mean in ("exp_avg", "exp_avg_sq"):
                if of_parameter.get(mean, like).shape != like.shape:
                    like = of_parameter[mean]
            shapes.append(tuple(like.shape))
        groups.append(shapes)
    return groups


# -- JSON lines ------------------------------------------------------------------------------------


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl or samples.jsonl; none if there is no such file.

    A line that a crash cut off is left out. ValueError for a path that is no ordinary file.
    """
    path = Path(path)
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        return []
    if not path.is_file():
        raise ValueError(f"{path} is no file that could be read")
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut off, perhaps within a character; or hostile
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a file of JSON lines, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_explained(path), path.open("a", encoding="utf-8", newline="\n") as f:
        f.write(to_lines(rows))


def cut_rows(path: Path, last_iter: int) -> None:
    """Keep the rows up to iteration last_iter in a file of JSON lines, if there is that file.

    A line that a crash cut off goes, too.
    """
    if path.exists():
        rows = [row for row in read_metrics(path) if not is_later(row, last_iter)]
        write_text(path, to_lines(rows))


def is_later(row: dict[str, Any], last_iter: int) -> bool:
    """Whether a row is of an iteration after last_iter. One that does not say so is not."""
    iteration = row.get("iter")
    return isinstance(iteration, (int, float)) and iteration > last_iter


def to_lines(rows: list[dict[str, Any]]) -> str:
    """The rows as JSON lines."""
    return "".join(to_json(row) + "\n" for row in rows)


def as_json(options: dict[str, Any]) -> dict[str, Any]:
    """The options as they come back from a JSON file."""
    return json.loads(to_json(options))
