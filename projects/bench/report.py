"""
The report of a run: results.json with everything in it, a Markdown table, and a plot.
"""

import platform
import sys
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from measure import DEVICE, DTYPE, Row
from mingpt.checkpoint import to_json, write_text
from mingpt.utils import import_extra


def write(rows: list[Row], folder: Path) -> None:
    """Write results.json, table.md and bench.png to a folder, and print the table."""
    machine = describe_machine()
    results = {"machine": machine, "rows": [asdict(row) for row in rows]}
    write_text(folder / "results.json", to_json(results, indent=2) + "\n")

    last_line = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = f"{table(rows)}\n{last_line}\n"
    write_text(folder / "table.md", text)

    if any(row.ratio for row in rows):
        draw(rows, folder / "bench.png")
    sys.stdout.write(text)


def describe_machine() -> dict[str, object]:
    """When, on what and with which versions a run was made."""
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none"
    machine = {
        "date": str(date.today()),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "card": card,
        "precision": str(DTYPE).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("transformers", "tiktoken", "tokenizers", "trl", "peft"):
        machine[package] = installed_version(package)
    return machine


def installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# ----------------------------------------------------------------------------------------------
# the table

HEADER = """\
| work | unit | here | peer | | ratio | spread | of the limit | MB |
|---|---|---|---|---|---|---|---|---|
"""


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    return HEADER + "".join(table_line(row) for row in rows)


def table_line(row: Row) -> str:
    memory = ""
    if row.ours_mb and row.theirs_mb:
        memory = f"{row.ours_mb:,.0f} / {row.theirs_mb:,.0f}"
    cells = [
        row.work,
        f"{row.unit}/s",
        format_number(row.ours),
        format_number(row.theirs),
        row.peer,
        format_number(row.ratio),
        f"{row.spread:.0%}",
        row.limit,
        memory,
    ]
    return f"| {' | '.join(cells)} |\n"


def format_number(value: float | None) -> str:
    """Three digits, or all those before the decimal point: 0.947, 15.4, 27,113. None is "-"."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ----------------------------------------------------------------------------------------------
# the plot


def draw(rows: list[Row], path: Path) -> None:
    """How many times as fast as its peer each case is: one bar a case, one panel a benchmark."""
    plt = import_extra("matplotlib.pyplot", "bench")
    plt.switch_backend("Agg")
    groups = rows_to_draw(rows)
    # A panel is as high as its bars, and one bar's height more for its title.
    heights = [1 + len(group) for group in groups.values()]
    figure, axes = plt.subplots(
        nrows=len(groups),
        squeeze=False,
        sharex=True,
        figsize=(9, 0.7 + 0.27 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    for axis, (benchmark, group) in zip(axes[:, 0], groups.items(), strict=True):
        draw_group(axis, benchmark, group)
    bottom = axes[-1, 0]
    bottom.set_xlim(0, 1.08 * max(row.ratio for group in groups.values() for row in group))
    bottom.set_xlabel("times as fast as the peer")
    figure.savefig(path, dpi=100)


def rows_to_draw(rows: list[Row]) -> dict[str, list[Row]]:
    """{benchmark: rows}: those of whole cases whose peer was measured, too."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.ratio and not row.part:
            groups.setdefault(row.benchmark, []).append(row)
    return groups


def draw_group(axis, benchmark: str, rows: list[Row]) -> None:
    """One panel: the cases of a benchmark from top to bottom, green if not slower than the peer."""
    works = [row.work for row in rows]
    ratios = [row.ratio for row in rows]
    colors = ["tab:green" if ratio >= 1 else "tab:orange" for ratio in ratios]
    bars = axis.barh(works, ratios, color=colors)
    axis.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontweight="bold")
    axis.axvline(1, color="black", linewidth=1)
    axis.set_ylim(len(rows) - 0.5, -0.5)  # downwards
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    peers = ", ".join(dict.fromkeys(row.peer for row in rows))
    axis.set_title(f"{benchmark}, against {peers}", loc="left", fontsize=10, fontweight="bold")
