"""
What a training run keeps in its folder: rows of metrics, the last checkpoint, the best weights.

In a run of many processes all may call these methods, and only the one of rank 0 writes.
"""

import contextlib
import json
from pathlib import Path

import torch

from mingpt import distributed
from mingpt.checkpoint import save_torch, write_text
from mingpt.config import CfgNode
from mingpt.utils import import_extra


class RunFolder:
    """The folder `path`; where that is None nothing is kept.

    tensorboard: log the metrics for TensorBoard, too (extra `projects`); ValueError without a folder.
    """

    def __init__(self, path: str | Path | None, tensorboard: bool = False):
        self.path = Path(path) if path else None
        self.writes = self.path is not None and distributed.rank() == 0
        self.checkpoint = self.path / "checkpoint.pt" if self.path else None
        self.writer = None  # TensorBoard's, made for the first row
        self.tensorboard = tensorboard and self.writes
        if tensorboard and not path:
            raise ValueError("tensorboard=True needs a work_dir to write to")
        if self.tensorboard:
            import_extra("tensorboard", "projects")

    def claim(self, options: dict, free: set[str]) -> None:
        """For scripts: keep all their options in config.json, and on a later run with others raise ValueError.

        As long as nothing is saved everything may change, and what is in `free` always.
        """
        path, options = self.path / "config.json", json.loads(json.dumps(options))
        if path.exists() and any(self.path.rglob("checkpoint.pt")):
            self.compare(json.loads(path.read_text(encoding="utf-8")), options, free)
        if self.writes:
            write_text(path, json.dumps(options, indent=2))

    def compare(self, then: dict, now: dict, free: set[str]) -> None:
        """ValueError where two sets of options differ in others than the free ones, since the two runs would mix."""
        changed = [f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in {**then, **now}
                   if name not in free and now.get(name) != then.get(name)]
        if changed:
            raise ValueError(f"{self.path} holds a run with other options ({'; '.join(changed)}): put them back to go on "
                             "with it, or choose another work_dir")

    def log(self, row: dict) -> None:
        """Append a row of metrics, its "iter" among them, to metrics.jsonl and to TensorBoard's log."""
        if self.writes:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = self.writer or SummaryWriter(self.path, purge_step=row["iter"])  # drops what a killed run left from here on
            for name, value in row.items():
                self.writer.add_scalar(name, value, row["iter"])
            self.writer.flush()

    def save_best(self, state: dict) -> None:
        """Write best.pt."""
        if self.writes:
            save_torch(self.path / "best.pt", state)

    def save_checkpoint(self, state: dict) -> None:
        """Write checkpoint.pt, whole or not at all; no process goes on before it is there."""
        if self.writes:
            save_torch(self.checkpoint, state)
        distributed.gather(None)

    def load_checkpoint(self, config: CfgNode, free: set[str]) -> dict | None:
        """What was saved last, if anything was, and metrics.jsonl without the rows behind it, which will be written again.

        ValueError where it is from another number of processes, or with other options than config, those in `free` aside.
        """
        if not self.path:
            return None
        found = distributed.gather(self.checkpoint.exists())
        if any(found) != all(found):
            raise ValueError(f"some processes see {self.checkpoint} and some do not: machines must share the disk of work_dir")
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True) if all(found) else None
        if state:
            self.compare(state["config"] | {"the number of processes": len(state["rng"])},
                         config.to_dict() | {"the number of processes": distributed.world_size()}, free)
        if self.writes:
            path = self.path / "metrics.jsonl"
            rows = [row for row in read_metrics(path) if state and row["iter"] <= state["iter_num"]]
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return state


def finished(folder: str | Path) -> dict | None:
    """The state that a trainer with this work_dir ended with; None where it has not."""
    path = Path(folder) / "checkpoint.pt"
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {"finished": False}
    return state if state["finished"] else None


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a metrics.jsonl as a list of dicts; a line that a crash cut off is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows
