"""
Curves of metrics, as PNG files.
"""

from pathlib import Path

from mingpt.checkpoint import atomic_write
from mingpt.utils import import_extra


def plot_metrics(path: str | Path, panels: dict, title: str | None = None, xlabel: str = "iteration") -> None:
    """Draw curves side by side into the PNG file `path`; needs matplotlib (extra `projects`).

    panels: {panel title: {label: (xs, ys)}}. Points that are None or NaN are left out.
    """
    plt = import_extra("matplotlib.pyplot", "projects")
    plt.switch_backend("Agg")  # no window, no display needed
    width = 5 * len(panels) + 3 * (max(map(len, panels.values())) > 5)  # a long legend stands beside
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.6), squeeze=False, layout="tight")
    for axis, (name, curves) in zip(axes[0], panels.items()):
        for label, (xs, ys) in curves.items():
            points = [(x, y) for x, y in zip(xs, ys) if y is not None and y == y]
            axis.plot(*zip(*points) if points else ([], []), label=label, lw=1.5)
        axis.set(title=name, xlabel=xlabel)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(curves) > 5 else {}))
    figure.suptitle(title)
    with atomic_write(path) as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)
