"""Curves of metrics: how they are drawn, and that every plot of every project is looked at."""

import re
import unittest

from matplotlib import image

from mingpt.plots import plot_metrics
from tests.common import ROOT, TempDirTestCase


class TestPlots(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "plot.png"

    def width(self):
        """Of the plot that was drawn, in pixels."""
        return image.imread(self.path).shape[1]

    def test_a_png_is_drawn(self):
        plot_metrics(self.path, {"a": {"x": ([1, 2, 3], [0.5, 0.3, 0.1])}})
        self.assertEqual(self.path.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

    def test_a_curve_may_have_gaps(self):
        curves = {
            "x": ([1, 2, 3], [0.5, None, 0.1]),
            "y": ([1, 2, 3], [0.5, float("nan"), 0.1]),
        }
        with self.assertNoLogs("mingpt"):
            plot_metrics(self.path, {"a": curves})
        self.assertTrue(self.path.exists())

    def test_many_curves(self):
        plot_metrics(self.path, {"a": {str(i): ([1, 2], [i, i]) for i in range(7)}})
        self.assertTrue(self.path.exists())

    def test_a_panel_without_points_is_left_out_and_named(self):
        panels = {
            "losses": {"train": ([1, 2], [3, 4]), "validation": ([1, 2], [None, None])},
            "accuracy": {"judge": ([], [])},
        }
        with self.assertLogs("mingpt", "WARNING") as logs:
            plot_metrics(self.path, panels)
        [record] = logs.records
        words = "plot.png has no points for losses: validation; accuracy: judge"
        self.assertEqual(record.getMessage(), words)
        width_of_both = self.width()
        plot_metrics(self.path, {"losses": {"train": ([1, 2], [3, 4])}})
        self.assertEqual(self.width(), width_of_both)

    def test_without_any_points_no_file_is_written(self):
        with self.assertLogs("mingpt", "WARNING"):
            plot_metrics(self.path, {"a": {"x": ([], [])}})
        self.assertFalse(self.path.exists())


class TestProjects(unittest.TestCase):
    """The tests of the projects make short runs. In each they look for a curve without points."""

    def test_every_plot_is_looked_at(self):
        tests = {
            "chat": "test_chat_project.py",
            "chargpt": "test_chargpt.py",
            "happy_gpt": "test_happy_gpt.py",
            "summarize_rlhf": "test_summarize.py",
        }
        drawing = set()
        for script in ROOT.glob("projects/*/*.py"):
            code = script.read_text(encoding="utf-8")
            if "plot_metrics(" not in code:
                continue
            project = script.parent.name
            drawing.add(project)
            test = (ROOT / "tests" / tests[project]).read_text(encoding="utf-8")
            for name in re.findall(r'"(\w+\.png)"', code):
                self.assertIn(f'"{name}"', test)
            self.assertIn("NO_POINTS, ", test)
        self.assertEqual(drawing, set(tests))
