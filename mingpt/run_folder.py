"""
What a training run keeps in its folder.

    metrics.jsonl    a row of metrics every few iterations
    samples.jsonl    what the model wrote, where a trainer logs that
    checkpoint.pt    all that a resumed run needs
    best.pt          the weights with the best validation loss (best.json: the model's options)
    config.json      the options of a script (see `claim`)

The .jsonl files are JSON lines: one dict a line, with the iteration it is of as "iter". A run that
was killed may have logged rows after its last checkpoint. It repeats those iterations when it
resumes, so loading the checkpoint first cuts those rows off: no row appears twice.

In a run of many processes all may call these methods, and only the one of rank 0 writes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mingpt import distributed
from mingpt.checkpoint import load_torch, save_torch, to_json, write_text
from mingpt.config import CfgNode
from mingpt.utils import import_extra

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class RunFolder:
    """The folder `path` of a run. Where path is None, nothing is kept.

    tensorboard: also log the metrics for TensorBoard (extra `projects`). Raises ValueError where
    there is no folder to do that in.
    """

    def __init__(self, path: str | Path | None, tensorboard: bool = False):
        self.path = Path(path) if path else None
        self.checkpoint = self.path / "checkpoint.pt" if self.path else None
        if tensorboard and not self.path:
            raise ValueError("tensorboard=True needs a work_dir to write to")
        # the folder, for the process that writes to it; None in all others
        self.output = self.path if distributed.rank() == 0 else None
        self.tensorboard = tensorboard and self.output is not None
        self.writer: SummaryWriter | None = None  # TensorBoard's, made for the first row
        if self.tensorboard:
            import_extra("tensorboard", "projects")

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
        have yet counts as its default.
        """
        if not self.path:
            return
        config_file = self.path / "config.json"
        has_checkpoint = any(self.path.rglob("checkpoint.pt"))
        if has_checkpoint and config_file.exists():
            then = json.loads(config_file.read_text(encoding="utf-8"))
            # An option that did not exist then counts as its default: so the old run behaved.
            defaults = defaults or {}
            added = {name: defaults[name] for name in options if name in defaults}
            # JSON makes lists of tuples: compare all of them as a JSON file holds them.
            self.compare(as_json(added | then), as_json(options), free)
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
        """Write best.pt, a plain state dict, and beside it best.json, the options of the model.

        A state dict does not tell the number of heads, and `from_pretrained` must know it.
        """
        if self.output:
            if model_options:
                write_text(self.output / "best.json", to_json(model_options, indent=2))
            save_torch(self.output / "best.pt", state)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write checkpoint.pt, atomically. No process continues before it is there."""
        if self.output:
            save_torch(self.output / "checkpoint.pt", state)
        distributed.gather(None)  # waits for all

    def load_checkpoint(
        self,
        config: CfgNode,
        free: set[str],
        effective: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> dict[str, Any] | None:
        """Load the last checkpoint, and cut off the rows that were logged after it.

        effective: gives options as they take effect, with the defaults of those that are missing.
        Old and new options are compared after it, so that runs from before an option was added
        can be resumed.

        Returns None if there is none; then the new run starts with no rows. Raises ValueError where
        the checkpoint is from another number of processes, or from other options than config's,
        apart from those in `free`.
        """
        if not self.checkpoint:
            return None
        state = None
        if self.all_processes_see(self.checkpoint):
            state = load_torch(self.checkpoint)
            if not {"iter_num", "config", "rng"} <= state.keys():
                raise ValueError(
                    f"{self.checkpoint} is no checkpoint of a Trainer: it holds {list(state)[:5]}. "
                    "Choose another work_dir, or load it with from_pretrained if it holds weights"
                )
            # The number of processes changes the run as an option does: each draws its own dropout.
            processes = "the number of processes"
            then = effective(state["config"]) | {processes: len(state["rng"])}
            now = effective(config.to_dict()) | {processes: distributed.world_size()}
            self.compare(then, now, free)
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
    if not path.exists():
        return None
    state = load_torch(path)
    return state if state.get("finished") else None


# -- JSON lines ------------------------------------------------------------------------------------


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl or samples.jsonl; none if there is no such file.

    A line that a crash cut off is left out.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a file of JSON lines, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="\n") as f:
        f.write(to_lines(rows))


def cut_rows(path: Path, last_iter: int) -> None:
    """Keep the rows up to iteration last_iter in a file of JSON lines, if there is that file.

    A line that a crash cut off goes, too.
    """
    if path.exists():
        rows = [row for row in read_metrics(path) if row["iter"] <= last_iter]
        write_text(path, to_lines(rows))


def to_lines(rows: list[dict[str, Any]]) -> str:
    """The rows as JSON lines."""
    return "".join(to_json(row) + "\n" for row in rows)


def as_json(options: dict[str, Any]) -> dict[str, Any]:
    """The options as they come back from a JSON file."""
    return json.loads(to_json(options))
