"""Curves of metrics."""

from mingpt.plots import plot_metrics
from tests.common import TempDirTestCase


class TestPlots(TempDirTestCase):
    def assert_draws(self, panels):
        path = self.folder / "plot.png"
        plot_metrics(path, panels)
        self.assertEqual(path.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

    def test_gaps_and_empty_curves(self):
        curves = {"x": ([1, 2, 3], [0.5, None, 0.1]), "empty": ([], [])}
        self.assert_draws({"a": curves, "b": {"y": ([1], [2])}})

    def test_many_curves(self):
        self.assert_draws({"a": {str(i): ([1, 2], [i, i]) for i in range(7)}})
