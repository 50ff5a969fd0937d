"""projects/bench: how a row is made, and what the script leaves behind."""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch

from tests.common import ROOT

BENCH = ROOT / "projects" / "bench"

A_ROW = """
from measure import Case, Limit, make_row

case = Case("w", "u", 12, None, "p", None, Limit("limit", lambda: 8.0))
row = make_row(case, "x", [3, 1, 2, 9, 2], [3, 4, 9])
print(row.work, row.ours, row.theirs, row.ratio, row.spread, row.limit)
"""

ROWS_TO_DRAW = """
from measure import Case, make_row
from report import rows_to_draw

case = Case("w", "u", 12, None, "p", None)
rows = [
    make_row(case, "", [2], [3], "ppo"),
    make_row(case, "rollout", [2], [3], "ppo"),
    make_row(case, "", [2], None, "bpe"),
]
print({benchmark: [row.work for row in group] for benchmark, group in rows_to_draw(rows).items()})
"""

# What Windows is like: there is no module `resource`.
WITHOUT_RESOURCE = """
import sys

sys.modules["resource"] = None
import bench
import measure

print(list(bench.BENCHMARKS), measure.peak_megabytes())
"""


def run_python(*args, folder):
    """A Python process that finds the modules of projects/bench and of this library."""
    path = os.pathsep.join([str(BENCH), str(ROOT)])
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
    )


class TestParts(unittest.TestCase):
    def python(self, code):
        run = run_python("-c", code, folder=ROOT)
        self.assertEqual(run.returncode, 0, run.stderr)
        return run.stdout

    def test_a_row_is_made_of_medians(self):
        self.assertEqual(self.python(A_ROW), "w: x 6.0 3.0 2.0 4.0 75% of the limit\n")

    def test_the_plot_has_whole_cases_that_have_a_peer(self):
        self.assertEqual(self.python(ROWS_TO_DRAW), "{'ppo': ['w']}\n")

    @unittest.skipIf(torch.cuda.is_available(), "there the card counts its memory")
    def test_runs_where_the_system_does_not_count_memory(self):
        names = (
            "['train', 'loop', 'decode', 'load', 'ppo', 'lora', 'grpo', 'memory', 'bpe', "
            "'vocabulary']"
        )
        self.assertEqual(self.python(WITHOUT_RESOURCE), f"{names} None\n")


class TestScript(unittest.TestCase):
    """What one quick run of one benchmark writes."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.run_of_script = run_python(
            BENCH / "bench.py",
            "--quick",
            "--only=vocabulary",
            folder=cls.folder,
        )
        if cls.run_of_script.returncode:
            raise AssertionError(cls.run_of_script.stderr)
        results = json.loads((cls.folder / "out" / "bench" / "results.json").read_text())
        (cls.row,) = results["rows"]

    def test_the_ratio_is_that_of_the_speeds(self):
        self.assertAlmostEqual(self.row["ratio"], self.row["ours"] / self.row["theirs"])

    def test_both_processes_report_their_memory(self):
        self.assertGreater(self.row["ours_mb"], 50)
        self.assertGreater(self.row["theirs_mb"], 50)

    def test_the_table_is_printed(self):
        self.assertIn(f"| {self.row['work']} | vocabularies/s |", self.run_of_script.stdout)

    def test_a_plot_is_drawn(self):
        self.assertTrue((self.folder / "out" / "bench" / "bench.png").exists())

    def test_an_unknown_benchmark_is_refused(self):
        run = run_python(BENCH / "bench.py", "--only=speed", folder=self.folder)
        self.assertIn("--only=speed with ['speed']; expected some of train,", run.stderr)
