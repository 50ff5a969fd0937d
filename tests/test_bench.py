"""projects/bench: a row is made of medians, and the script leaves its report."""

import json
import os
import subprocess
import sys

from tests.common import ROOT, TempDirTestCase

BENCH = ROOT / "projects" / "bench"


class TestBench(TempDirTestCase):
    def run_script(self, *args):
        return subprocess.run([sys.executable, str(BENCH / "bench.py"), f"--work_dir={self.folder}", *args], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})

    def test_a_row_and_a_report(self):
        code = ("from measure import Case, row; r = row(Case('w', 'u', 12, None, 'p', None, ('limit', lambda: 8.0)), 'x', [3, 1, 2, 9, 2], [3, 4, 9]); "
                "print(r.work, r.ours, r.theirs, r.ratio, r.spread, r.limit)")
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{BENCH}:{ROOT}"})
        self.assertEqual(out.stdout, "w: x 6.0 3.0 2.0 4.0 75% of the limit\n", out.stderr)
        run = self.run_script("--quick", "--only=vocabulary")
        self.assertEqual(run.returncode, 0, run.stderr)
        row, = json.loads((self.folder / "results.json").read_text())["rows"]
        self.assertAlmostEqual(row["ratio"], row["ours"] / row["theirs"])
        self.assertTrue(row["ours_mb"] > 50 and row["theirs_mb"] > 50)
        self.assertIn(f"| {row['work']} | vocabularies/s |", run.stdout)
        self.assertTrue((self.folder / "bench.png").exists())
        self.assertIn("has ['speed']; there are train,", self.run_script("--only=speed").stderr)
