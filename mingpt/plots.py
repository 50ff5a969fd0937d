"""
Curves of metrics, as PNG files.

A plot with an empty panel looks broken. So a curve without any points is left out, and a warning
names it.
"""

import logging
from pathlib import Path
from typing import Any

from mingpt.checkpoint import atomic_write
from mingpt.utils import import_extra

logger = logging.getLogger("mingpt")

LONG_LEGEND = 5  # a panel with more curves than this has its legend beside it


def plot_metrics(
    path: str | Path,
    panels: dict,
    title: str | None = None,
    xlabel: str = "iteration",
) -> None:
    """Draw panels of curves side by side into the PNG file `path`.

    panels: {panel title: {label: (xs, ys)}}. Points whose y is None or NaN are left out, and so are
    curves without points, and panels without curves. Where nothing remains, no file is written.
    Needs matplotlib (extra `projects`). ValueError for panels of another form.
    """
    check_panels(panels)
    plt = import_extra("matplotlib.pyplot", "projects")
    plt.switch_backend("Agg")  # draws into memory: needs neither a window nor a display

    panels = without_empty_curves(panels, Path(path).name)
    if not panels:
        return
    width = 5 * len(panels)
    if any(len(curves) > LONG_LEGEND for curves in panels.values()):
        width += 3  # room for the legend
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width, 3.6), squeeze=False, layout="tight"
    )
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
        draw_curves(axis, curves)
        axis.set(title=name, xlabel=xlabel)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    with atomic_write(path) as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)


def check_panels(panels: Any) -> None:
    """ValueError unless panels is {panel title: {label: (xs, ys)}}."""
    form = "expected {panel title: {label: (xs, ys)}}"
    if not isinstance(panels, dict):
        raise ValueError(f"panels is {panels!r:.60}; {form}")
    for title, curves in panels.items():
        if not isinstance(curves, dict):
            raise ValueError(f"panel {title!r} is {curves!r:.60}; {form}")
        for label, curve in curves.items():
            try:
                xs, ys = curve
                numbers = [float(y) for _, y in zip(xs, ys, strict=True) if y is not None]
            except (TypeError, ValueError):
                numbers = None
            if numbers is None:
                raise ValueError(
                    f"curve {label!r} of panel {title!r} is {curve!r:.60}; expected as many xs as "
                    "ys, which are numbers or None"
                )


def without_empty_curves(panels: dict, name: str) -> dict:
    """The panels with only those curves that have points, and of each curve only its points.

    name: of the plot, for the warning about curves that have none.
    """
    drawn: dict = {}
    empty = []
    for title, curves in panels.items():
        for label, (xs, ys) in curves.items():
            points = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and y == y]
            if points:
                drawn.setdefault(title, {})[label] = tuple(zip(*points, strict=True))
            else:
                empty.append(f"{title}: {label}")
    if empty:
        logger.warning("%s has no points for %s", name, "; ".join(empty))
    return drawn


def draw_curves(axis: Any, curves: dict) -> None:
    """Draw {label: (xs, ys)} and a legend on a matplotlib axis."""
    for label, (xs, ys) in curves.items():
        style = "-" if len(xs) > 1 else "o"  # a line through one point is invisible
        axis.plot(xs, ys, style, label=label, lw=1.5)
    if len(curves) > LONG_LEGEND:
        # the legend's upper left corner at the upper right corner of the panel
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    else:
        axis.legend(frameon=False)
